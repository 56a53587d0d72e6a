"""The demo's picture: losses over steps and over seconds, and what the autoencoders make of held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..output import COLORS, tidy
from .digits import SIDE
from .training import AUTO, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES = 14


def draw(results: Sequence[Result], held_out: Tensor, title: str, path: Path) -> None:
    """Write the picture as a PNG.

    Args:
        results: The contestants, at most as many as there are colors.
        held_out: Held-out images `[N, 784]`; the first ones are shown.
        title: Line on top.
        path: File to write.
    """
    # Imported here: matplotlib is an extra, and importing kfac_triton must not need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplot_mosaic(
        [["by steps", "by seconds"], ["strip", "strip"]], height_ratios=(4.2, 0.85 * (1 + len(results)))
    )
    axes["by seconds"].sharey(axes["by steps"])
    _draw_curves(axes["by steps"], axes["by seconds"], results)
    _draw_strip(axes["strip"], results, held_out[:SAMPLES])
    figure.savefig(path, format="png", dpi=130)


def _draw_curves(by_steps: Axes, by_seconds: Axes, results: Sequence[Result]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for result, color in zip(results, COLORS, strict=False):
        losses = result.run.losses
        label = f"{result.name}, lr {result.settings['lr']}" if result.name != AUTO else AUTO
        style: dict[str, Any] = {"color": color, "label": label, "linewidth": 1.8}
        by_steps.plot(range(1, len(losses) + 1), losses, **style)
        by_seconds.plot(result.run.seconds, losses, **style)
    by_steps.set(xlabel="steps", ylabel="training loss (nats per image)", yscale="log")
    by_seconds.set(xlabel="seconds of training")
    by_steps.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    by_steps.yaxis.set_major_formatter(ScalarFormatter())
    by_steps.yaxis.set_minor_formatter(NullFormatter())
    by_seconds.legend(frameon=False)
    tidy(by_steps, by_seconds)


@torch.no_grad()
def _draw_strip(axes: Axes, results: Sequence[Result], images: Tensor) -> None:
    rows = {"held out": images}
    for result in results:
        rows[f"{result.name}\n{len(result.run.losses)} steps"] = torch.sigmoid(result.run.model(images))
    pixels = torch.stack(list(rows.values())).unflatten(2, (SIDE, SIDE))  # [rows, images, SIDE, SIDE]
    strip = pixels.transpose(1, 2).reshape(len(rows) * SIDE, -1).cpu()
    axes.imshow(strip.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([SIDE * (row + 0.5) for row in range(len(rows))], labels=list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
