"""The constants of `step_model`, and where each is from.

Constants of an H100 were not measured on one. Their sources:

    sheet       the data sheet of the card
    estimated   by hand, by what the line says
    compiled    estimated from compiled code for sm_90 (Triton 3.6), without a card, some 40 % either way
    host        measured on a CPU: the real launch path with a driver that launches into nothing, or training runs
    fitted      so that the model's first column comes within 10 % of that of `ESTIMATES`, the step that was estimated for
                the kernels as they were before the items of `step_model`
"""

from __future__ import annotations

from dataclasses import dataclass

MS, US = 1e-3, 1e-6

# What was estimated for an H100, first AdamW's step, then K-FAC's with everything updated in every step.
ADAMW = {"gpt2": 57.0, "vit_b": 19.0, "resnet50": 14.0, "wide_block": 70.0, "autoencoder": 1.2, "autoencoder, graph": 0.5}
# ... before; with free scale, TF32 and dense updates; with 1/8 of the rows, fused norms and copies; with blocks up to 1,024.
ESTIMATES: dict[str, tuple[float | None, ...]] = {
    "gpt2": (174.0, 105.0, 81.0, 68.0), "vit_b": (122.0, 53.0, 36.0, 28.0), "resnet50": (121.0, 56.0, 37.0, None),
    "wide_block": (234.0, 122.0, 100.0, 75.0), "autoencoder": (12.0, 8.0, 6.0, None),
    "autoencoder, graph": (6.6, 2.6, 1.8, None),
}  # fmt: skip
GOALS = {"gpt2": 85.0, "autoencoder, graph": 2.6}  # for an H100, everything switched on


@dataclass(frozen=True)
class Machine:
    """A card and its host.

    Attributes:
        name: for the tables.
        bandwidth: bytes a second.
        tf32: peak, operations a second.
        covariance: operations a second that the covariance kernel reaches on rows, edges and reduction included.
        patches: the same on patches of images.
        newton: share of the TF32 peak that the products of the warm refresh reach, beside reading and writing.
        fp32_products, tf32_products: operations a second of the library's batched products.
        one_program: bytes a second that one program reads of a matrix, on a processor of its own.
        kernel: seconds of the device between kernels, and for one that does nothing.
        idle_program: seconds of the device for each program of a launch that ends at once, beside `kernel`.
        triton_launch: seconds of the host for one Triton kernel.
        operator: seconds of the host for one PyTorch operator of a step, the Python around it included.
        layer_sum: seconds of the host for the hook of a layer that sums its rows in the backward pass.
        norm: seconds of the host for the hook of a norm.
        hook: seconds of the host for a hook that keeps its rows for the step.
        adamw_device, adamw_host: milliseconds of AdamW's step.
        autoencoder_batch: images of the autoencoder's step. With 256 all rows wait for the step, with 1,000 most do not.
    """

    name: str
    bandwidth: float
    adamw_device: dict[str, float]
    adamw_host: dict[str, float]
    tf32: float = 494e12  # sheet
    # compiled: 45 to 50 % of bf16's 989 TFLOP/s in the loop; some 350 TFLOP/s with the rest, 15 ms for GPT-2.
    covariance: float = 350e12
    # compiled: 2-byte loads, below 10 % of the peak. 3 % are assumed; GEMM's way was estimated to save 25 ms on ResNet-50.
    patches: float = 30e12
    # compiled: warm refreshes with one step, (side, matrices): (512, 64) 0.4 ms, (1024, 16) 0.5, (3072, 12) 6, (4096, 4) 4.6.
    newton: float = 0.35
    fp32_products: float = 0.7 * 67e12  # sheet, of which products of these sizes reach 70 %; 25 ms for GPT-2
    tf32_products: float = 0.4 * 494e12  # sheet, 40 %; 4 to 8 ms for GPT-2
    # compiled: the same refreshes before the free scale, with two steps and one power iteration: 0.9, 2.2, 24 and 31 ms.
    one_program: float = 25e9
    kernel: float = 3 * US  # fitted, to the autoencoder in a graph
    # estimated: three reads that wait for each other take 1 us, and 132 processors have room for four programs each.
    idle_program: float = 1 * US / (132 * 4)
    triton_launch: float = 23 * US  # host: 22 to 24
    # fitted, with `Operators`: host, the engine takes 22 ms a step on GPT-2's structure with 111 Triton launches, and a step of
    # K-FAC on the autoencoder, forward and backward included, 11.8 ms with 132.
    operator: float = 20 * US
    layer_sum: float = 0.55 * MS  # host: hooks take 35 ms on GPT-2's structure, of 48 layers and 25 norms
    norm: float = 0.34 * MS  # host
    hook: float = 0.1 * MS  # host
    autoencoder_batch: int = 256


H100 = Machine(
    name="H100",
    bandwidth=3.35e12,  # sheet
    adamw_device=ADAMW | {"autoencoder": 0.5},
    # Half of what was measured on the H200's host: the ratio of the estimated to the measured step on the autoencoder, where
    # AdamW waits for the host. The block was not measured; it has a seventh of GPT-2's layers.
    adamw_host={"gpt2": 32.0, "vit_b": 15.7, "resnet50": 14.0, "wide_block": 4.5, "autoencoder": 1.2},
)
# AdamW's steps, rates and host times that were measured on an H200 (benchmarks/results/nvidia-h200-2026-11-27/results.md).
# Everything that belongs to K-FAC's kernels is the H100's: to be compared with what was measured there.
H200 = Machine(
    name="H200",
    bandwidth=4.23e12,  # measured, a copy
    # AdamW waits for the host on the three others, and its time on the device is not known: that of the H100.
    adamw_device={"gpt2": 74.8, "vit_b": 19.0, "resnet50": 14.0, "autoencoder": 0.967, "autoencoder, graph": 0.967},
    adamw_host={"gpt2": 64.0, "vit_b": 31.4, "resnet50": 29.4, "autoencoder": 2.37},
    triton_launch=55 * US,  # measured: 40 to 70
    # Adam's step on the autoencoder takes 1.32 times as long as on the host where the H100's figures were measured (2.37 and
    # 1.8 ms), so that everything that is Python and PyTorch does.
    operator=1.32 * 20 * US,
    layer_sum=1.32 * 0.55 * MS,
    norm=1.32 * 0.34 * MS,
    hook=1.32 * 0.1 * MS,
    autoencoder_batch=1000,
)


@dataclass(frozen=True)
class Refreshes:
    """What warm refreshes take on average.

    Attributes:
        steps: Newton steps of a matrix.
        iterated: share of the matrices whose refresh takes the power iteration.
    """

    steps: float
    iterated: float


# host, training runs: 30 % of a GPT's refreshes took one step, and 34 to 95 % the power iteration.
BEFORE = Refreshes(steps=2.0, iterated=0.75)
# host, training runs: 74 to 97 % took one step. `refresh_steps` measures both on a small GPT and on the autoencoder.
AFTER = Refreshes(steps=1.2, iterated=0.03)


@dataclass(frozen=True)
class Operators:
    """PyTorch operators that K-FAC's step runs in the engine: fitted to two measured host times, see `Machine.operator`.

    Attributes:
        fixed: whatever the model.
        stack: for factors of one side, those that copy whole stacks included.
        copies: of these, those that copy whole stacks.
        shape: for gradients of one shape.
        norm: for a norm: its gradients joined and its update divided.
        tensor: for a parameter, where updates have gaps.
    """

    fixed: int = 60
    stack: int = 20
    copies: int = 6
    shape: int = 10
    norm: int = 8
    tensor: int = 4


OPERATORS = Operators()


# Measured on the H200, milliseconds: before free scale and TF32 (first run), and with both (second run).
MEASURED: dict[str, dict[str, tuple[float | None, float]]] = {
    "gpt2": {
        "statistics": (13.0, 12.9),  # covariance_kernel
        "Newton steps": (12.9 + 8.1 + 7.4, 9.0 + 5.9 + 5.1),  # factor, energy and update kernel
        "power iteration": (84.8, 1.6),  # plan_kernel; below 1.6 in the second
        "preconditioning": (24.3, 4.90),  # float32 products in the profile; the operation by itself
        "device": (247.0, 132.0),  # what the profiler counted as busy
        "host": (242.3, 119.5),
        "step": (338.9, 139.7),  # 145.0 and 161.0 ms with later trees
    },
    "vit_b": {"host": (None, 122.6), "step": (None, 122.6)},
    "resnet50": {"host": (None, 133.6), "step": (None, 133.6)},
    "autoencoder": {
        "statistics": (0.28, 0.28),
        "Newton steps": (0.21 + 0.19 + 0.18, 0.19 + 0.17 + 0.16),
        "power iteration": (2.28, 0.04),
        "device": (5.4, 2.7),
        "host": (25.4, 20.8),
        "step": (25.4, 20.8),
    },
    "autoencoder, graph": {"step": (3.54, 3.16)},
}
