"""ResNet-50 and ViT-B/16 without torchvision, which a machine with PyTorch alone does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..convergence.models import ViT

NAMES = ("resnet50", "vit_b")
BATCH, SIDE, CLASSES = 32, 224, 1000


class Bottleneck(nn.Module):
    """Convolutions 1 x 1, 3 x 3 (with the stride, as torchvision has it) and 1 x 1 with BatchNorm; He et al. (2016)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.reduce = nn.Conv2d(inputs, width, 1, bias=False)
        self.conv = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.expand = nn.Conv2d(width, outputs, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (width, width, outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, 4 width, H / stride, W / stride]`."""
        inner = F.relu(self.norms[0](self.reduce(x)))
        inner = F.relu(self.norms[1](self.conv(inner)))
        return F.relu(self.norms[2](self.expand(inner)) + self.shortcut(x))


def resnet(
    widths: tuple[int, ...] = (64, 128, 256, 512), blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = CLASSES
) -> nn.Module:
    """ResNet-50, or a smaller one."""
    stem = nn.Conv2d(3, widths[0], 7, 2, padding=3, bias=False)
    modules: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    channels = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for number in range(count):
            modules.append(Bottleneck(channels, width, stride=2 if stage > 0 and number == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def vit(
    side: int = SIDE, patch: int = 16, width: int = 768, heads: int = 12, blocks: int = 12, classes: int = CLASSES
) -> nn.Module:
    """ViT-B/16, or a smaller one, with the mean token into the head."""
    model = ViT(side, patch, width, heads, blocks, 4 * width, classes)
    model.patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch)  # three colours instead of one
    return model


def build(name: str, device: torch.device, small: bool) -> tuple[nn.Module, Tensor]:
    """A model, and a batch of made-up images."""
    side, batch = (32, 4) if small else (SIDE, BATCH)
    if name == "resnet50":
        model = resnet((8, 16), (1, 1), 10) if small else resnet()
    else:
        model = vit(side, 8, 16, 2, 2, 10) if small else vit()
    return model.to(device), torch.randn(batch, 3, side, side, device=device)
