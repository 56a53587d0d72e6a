"""Every kernel that is shipped, with every configuration that is shipped for it, as its launcher would have it compiled.

Types are in Triton's notation: `*fp32` an address, `i32:16` an integer that 16 divides. Addresses of tensors are divisible by
16; so are sizes and strides of the stacks that the optimizer keeps, which are padded for that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kfac_triton.kernels import precision, tuning
from kfac_triton.kernels.covariance import kernel as covariance_kernel
from kfac_triton.kernels.covariance import launch as covariance_launch
from kfac_triton.kernels.covariance import plan as covariance_plan
from kfac_triton.kernels.eigen_adam import kernel as eigen_adam_kernel
from kfac_triton.kernels.eigen_adam import launch as eigen_adam_launch
from kfac_triton.kernels.factored_newton import kernel as factored_newton_kernel
from kfac_triton.kernels.factored_newton import launch as factored_newton_launch
from kfac_triton.kernels.factored_newton import plan_kernel as factored_newton_plan_kernel
from kfac_triton.kernels.factored_newton.reference import POWER_STEPS
from kfac_triton.kernels.first_order import kernel as first_order_kernel
from kfac_triton.kernels.first_order import launch as first_order_launch
from kfac_triton.kernels.gradients import kernel as gradients_kernel
from kfac_triton.kernels.gradients import launch as gradients_launch
from kfac_triton.kernels.multi_tensor import kernel as multi_tensor_kernel
from kfac_triton.kernels.newton_schulz import kernel as newton_schulz_kernel
from kfac_triton.kernels.newton_schulz import launch as newton_schulz_launch
from kfac_triton.kernels.newton_schulz import reference as newton_schulz
from kfac_triton.kernels.norm_fisher import kernel as norm_fisher_kernel
from kfac_triton.kernels.norm_fisher import launch as norm_fisher_launch
from kfac_triton.kernels.norm_fisher import layout as norm_fisher_layout
from kfac_triton.kernels.orthogonal_iteration import kernel as orthogonal_iteration_kernel
from kfac_triton.kernels.orthogonal_iteration import launch as orthogonal_iteration_launch
from kfac_triton.kernels.precondition import kernel as precondition_kernel
from kfac_triton.kernels.runtime import Target, tl

from .audit import ARCHITECTURES


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        name: "key/up_to/kernel/variant"; the first two name the configuration, and are "-" where a kernel takes none.
        kernel: the jitted function.
        types: of its arguments, in order, without the constants.
        constants: its compile-time arguments.
        options: launch options.
        rows: of the tile of its products; 0 where it multiplies nothing.
        wide: whether its operands are such that every copy in the hot loop must be wide.
        copied: bytes that a wide copy brings.
    """

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any]
    options: dict[str, Any]
    rows: int = 0
    wide: bool = False
    copied: int = 16

    def signature(self) -> tuple[dict[str, str], list[str]]:
        """Type of every argument that is no constant, and those that 16 divides."""
        names = [parameter.name for parameter in self.kernel.params if not parameter.is_constexpr]
        types = dict(zip(names, self.types.split(), strict=True))
        aligned = [name for name, kind in types.items() if kind.startswith("*") or kind.endswith(":16")]
        return {name: kind.removesuffix(":16") for name, kind in types.items()}, aligned


def target(arch: str) -> Target:
    """The kernels' name for an architecture."""
    return Target(ARCHITECTURES[arch].target.backend, arch, processors=1)


def _entries(arch: str, key: str) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """The shipped configurations of one key: the start of a case's name, the largest side, tile sizes and options."""
    for entry in tuning.load(tuning.SHIPPED / f"{arch}.json")[key]:
        rest = {name: value for name, value in entry.items() if name != "up_to"}
        yield f"{key}/{entry['up_to'] or 'any'}", entry["up_to"], rest


def _covariance(arch: str) -> Iterator[Case]:
    types = "*i64 *i64 *i32 *fp32 *fp32 *u8 *fp32"
    mode = precision.resolve(precision.ROWS, target(arch))
    bf16, fp32 = tl.bfloat16, tl.float32
    variants = {  # name, type, dimensions of the windows, rows side by side, width
        "covariance": [("bf16", bf16, 0, False, 8)],
        "covariance_fp32": [("fp32", fp32, 0, False, 8)],
        "covariance_images": [("bf16", bf16, 0, True, 8), ("bf16, 8 bytes", bf16, 0, True, 4)],
        "covariance_images_fp32": [("fp32", fp32, 0, True, 4)],
        "covariance_unaligned": [
            ("bf16", bf16, 0, False, 1),
            ("fp32", fp32, 0, False, 1),
            ("bf16, images", bf16, 0, True, 1),
            ("fp32, images", fp32, 0, True, 1),
        ],
        "covariance_patches": [
            ("bf16, 2 dimensions", bf16, 2, False, 1),
            ("fp32, 2 dimensions", fp32, 2, False, 1),
            ("fp32, 3 dimensions", fp32, 3, False, 1),
        ],
    }
    blocks = set()
    for key, kinds in variants.items():
        for name, _, config in _entries(arch, key):
            block, block_k = config.pop("BLOCK"), config.pop("BLOCK_K")
            blocks.add(block)
            for kind, type_, spatial, images, width in kinds:
                depth = covariance_plan.rows_at_a_time(block_k, spatial)
                constants = {
                    "DTYPE": type_, "BLOCK": block, "BLOCK_K": depth, "PRECISION": mode, "IMAGES": images, "WIDTH": width,
                    "SPATIAL": spatial, "UPCAST": False, "HAS_ACCEPT": True,
                }  # fmt: skip
                # Images and patches whose alignment is unknown are hinted to be contiguous: they must not be loaded in pairs.
                yield Case(
                    f"{name}/covariance_kernel/{kind}", covariance_kernel.covariance_kernel, types, constants, config,
                    rows=block, wide=width > 1 or images or spatial > 0, copied=min(16, width * type_.primitive_bitwidth // 8),
                )  # fmt: skip
    for block in sorted(blocks):
        part = min(block, covariance_launch.REDUCED_PART)
        constants = {"BLOCK": block, "PART": part, "HAS_ACCEPT": True}
        reduce = covariance_kernel.covariance_reduce_kernel
        yield Case(f"-/-/covariance_reduce_kernel/{block}", reduce, types, constants, {"num_warps": 4})


def _power(side: int) -> int:
    """The side that a fused kernel pads a matrix to."""
    return max(16, 1 << (side - 1).bit_length())


def _newton_schulz(arch: str) -> Iterator[Case]:
    kernel, exact = newton_schulz_kernel, precision.resolve(precision.EXACT, target(arch))
    source = "*fp32 i32:16 i32:16 *fp32"
    schedule = {"TOLERANCE": 1e-3, "EDGE": newton_schulz.EDGE, "LEAST": newton_schulz.LEAST, "MOST": newton_schulz.MOST}
    rounding = {"ROUNDING": newton_schulz_launch._ROUNDING}
    smallest = 1
    for name, up_to, config in _entries(arch, "newton_schulz_fused"):
        if config.pop("FUSED") and up_to is not None:
            largest = _power(up_to)
            for side in (side for side in (16, 32, 64, 128) if _power(smallest) <= side <= largest):
                constants = schedule | rounding | {"SIDE": side, "PRECISION": exact}
                types = f"{source} *fp32 i32:16 i32:16 *fp32 i32:16 i32"
                yield Case(f"{name}/fused_kernel/{side}", kernel.fused_kernel, types, constants, config, rows=side)
            smallest = up_to + 1
    for name, _, config in _entries(arch, "newton_schulz_step"):
        tile = {"BLOCK": config.pop("BLOCK"), "BLOCK_K": config.pop("BLOCK_K"), "PRECISION": exact}
        types = "*fp32 *fp32 *i32 i32 i32 i32:16"
        yield Case(f"{name}/step_kernel/-", kernel.step_kernel, types, tile, config, rows=tile["BLOCK"], wide=True)
    for name, _, config in _entries(arch, "newton_schulz_residual"):
        tile = {"BLOCK": config.pop("BLOCK"), "BLOCK_K": config.pop("BLOCK_K"), "PRECISION": exact}
        types = f"{source} *fp32 *fp32 i32:16 i32:16 *fp32 *i32 i32 i32 i32:16 i32:16"
        yield Case(f"{name}/residual_kernel/-", kernel.residual_kernel, types, tile, config, rows=tile["BLOCK"], wide=True)
    plain = {"BLOCK": newton_schulz_launch._TILE}
    yield Case("-/-/norm_kernel/-", kernel.norm_kernel, f"{source} *fp64 *i32 i32 i32:16", plain, {})
    types = f"{source} *fp32 *fp32 *fp32 *i32 i32 i32 i32:16 i32:16"
    yield Case("-/-/prepare_kernel/-", kernel.prepare_kernel, types, plain, {})
    chunk = {"CHUNK": newton_schulz_launch._CHUNK}
    types = "*fp64 *fp32 *fp32 *fp32 i32 i32 i32"
    yield Case("-/-/schedule_kernel/-", kernel.schedule_kernel, types, schedule | chunk, {"enable_fp_fusion": False})
    yield Case("-/-/certificate_kernel/-", kernel.certificate_kernel, "*fp32 *fp32 i32 i32", rounding | chunk, {})


def _factored_newton(arch: str) -> Iterator[Case]:
    kernel, planning = factored_newton_kernel, factored_newton_plan_kernel
    mode = precision.resolve(precision.COARSE, target(arch))
    split, tables, half = mode == "tf32", "*i64 *i32 *fp32", POWER_STEPS + 1
    kinds = {"aligned": True, "unaligned": False}
    for name, _, config in _entries(arch, "factored_newton"):
        block, block_k = config.pop("BLOCK"), config.pop("BLOCK_K")
        warps = {"num_warps": config.get("num_warps", 4)}
        for kind, aligned in kinds.items():
            common = {"ROUND": split, "ALIGNED": aligned}
            for label, keeps in ((kind, True), (f"{kind}, some", False)):
                prepare = {"BLOCK": block, "KEEP": keeps, "SOME": not keeps, **common}
                yield Case(f"{name}/prepare_kernel/{label}", kernel.prepare_kernel, tables, prepare, warps)
            tile: dict[str, Any] = {"BLOCK": block, "BLOCK_K": block_k, "PRECISION": mode, **common}
            for function, extra, types in (
                (kernel.factor_kernel, {}, f"{tables} i32"),
                (kernel.energy_kernel, {}, f"{tables} i32"),
                (kernel.update_kernel, {"KEEP": True}, f"{tables} i32 i32 fp32"),
            ):
                yield Case(
                    f"{name}/{function.__name__}/{kind}", function, types, tile | extra, config, rows=block, wide=aligned
                )  # fmt: skip
    sums = {"CHUNK": factored_newton_launch._CHUNK, "FLUSHED": split}
    yield Case("-/-/plan_kernel/-", planning.plan_kernel, f"{tables} i32 fp32 fp32 fp32 fp32", sums, {})
    conclude = {"HALF": half, **sums}
    yield Case("-/-/conclude_kernel/-", planning.conclude_kernel, f"{tables} fp32 fp32", conclude, {})
    for name, _, config in _entries(arch, "factored_newton_plan"):
        rows = config["BLOCK"]
        constants = {"HALF": half, "BLOCK": config.pop("BLOCK"), "BLOCK_K": config.pop("BLOCK_K"), "PRECISION": mode}
        for kind, aligned in kinds.items():
            case = (planning.grow_kernel, f"{tables} i32", constants | {"ALIGNED": aligned}, config)
            yield Case(f"{name}/grow_kernel/{kind}", *case, rows=rows)


def _orthogonal_iteration(arch: str) -> Iterator[Case]:
    kernel, tables = orthogonal_iteration_kernel, "*i64 *i32 *fp32"
    exact, coarse = (precision.resolve(purpose, target(arch)) for purpose in (precision.EXACT, precision.COARSE))
    chunk = {"CHUNK": orthogonal_iteration_launch._CHUNK}
    for name, _, config in _entries(arch, "orthogonal_iteration"):
        block, block_k = config.pop("BLOCK"), config.pop("BLOCK_K")
        warps = {"num_warps": config.get("num_warps", 4)}
        for kind, aligned in {"aligned": True, "unaligned": False}.items():
            simple = {"BLOCK": block, "ALIGNED": aligned}
            yield Case(f"{name}/prepare_kernel/{kind}", kernel.prepare_kernel, tables, simple, warps)
            yield Case(f"{name}/commit_kernel/{kind}", kernel.commit_kernel, tables, simple | chunk, warps)
            for function, label, mode, extra, types in (
                (kernel.turn_kernel, kind, exact, {}, f"{tables} fp32"),
                (kernel.gram_kernel, kind, exact, {"START": False}, f"{tables} i32 i32 i32"),
                (kernel.gram_kernel, f"{kind}, start", exact, {"START": True}, f"{tables} i32 i32 i32"),
                (kernel.apply_kernel, kind, exact, {}, f"{tables} i32"),
                (kernel.correct_kernel, kind, coarse, {}, f"{tables} i32"),
            ):
                yield Case(
                    f"{name}/{function.__name__}/{label}", function, types,
                    simple | {"BLOCK_K": block_k, "PRECISION": mode, **extra}, config, rows=block, wide=aligned,
                )  # fmt: skip
    yield Case("-/-/start_kernel/-", kernel.start_kernel, f"{tables} fp32", chunk, {})
    yield Case("-/-/judge_kernel/-", kernel.judge_kernel, f"{tables} i32 i32 fp32 fp32 fp32", chunk, {})


def _precondition(arch: str) -> Iterator[Case]:
    mode = precision.resolve(precision.COARSE, target(arch))
    types = f"*fp32 *fp32 *fp32 *fp32 *fp32 i32:16 i32:16 i32:16 {' '.join(['i32:16'] * 8)}"
    steps = {"symmetric": (False, False), "right root": (False, True), "left root": (True, True)}
    for name, _, config in _entries(arch, "precondition"):
        tile = {key: config.pop(key) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
        for step, (turned, triangular) in steps.items():
            constants: dict[str, Any] = {
                "PRECISION": mode, "LEFT_TRANSPOSED": turned, "TRIANGULAR": triangular, "REDUCE": True,
            }  # fmt: skip
            yield Case(
                f"{name}/product_kernel/{step}", precondition_kernel.product_kernel, types, tile | constants, config,
                rows=tile["BLOCK_M"], wide=True,
            )  # fmt: skip


def _lists(arch: str) -> Iterator[Case]:
    del arch  # a kernel that only adds is the same everywhere
    kernel = multi_tensor_kernel
    for dtype, type_ in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        for aligned in (True, False):
            constants = {"DTYPE": type_, "BLOCK": 4096, "ALIGNED": aligned}
            label = f"-/-/squares_kernel/{dtype}{'' if aligned else ', unaligned'}"
            yield Case(label, kernel.squares_kernel, "*i64 *fp32", constants, {"num_warps": 4}, wide=aligned)
    for name, aligned in (("-", True), ("unaligned", False)):
        constants = {"BLOCK": 1024, "ALIGNED": aligned}
        types = "*i64 *fp32 *fp32 *u8 *u8 *u8"
        yield Case(f"-/-/blend_kernel/{name}", kernel.blend_kernel, types, constants, {"num_warps": 4}, wide=aligned)
    yield Case("-/-/traces_kernel/-", kernel.traces_kernel, "*i64 *fp32", {"BLOCK": 1024}, {"num_warps": 4})
    for bits, type_ in ((16, tl.int16), (32, tl.int32)):
        constants = {"DTYPE": type_, "BLOCK": 1024}
        yield Case(f"-/-/restore_kernel/{bits}", kernel.restore_kernel, "*i64 *u8", constants, {"num_warps": 4})


def _norm_fisher(arch: str) -> Iterator[Case]:
    """Widths of GPT-2 and of large models, the widest that a program holds, and those that it does not."""
    kernel, backend, layout = norm_fisher_kernel, target(arch).backend, norm_fisher_layout
    tables, warps = "*i64 *i64", norm_fisher_launch.warps
    plain, positions, unaligned = ("", False, True), (", positions", True, True), (", unaligned", False, False)
    sizes = [(64, [plain]), (1024, [plain, positions, unaligned]), (layout.WIDEST, [plain, unaligned])]
    for dtype, type_ in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        types = {"X_TYPE": type_, "G_TYPE": type_}
        widest = [(layout.WIDEST_16_BIT, [plain])] if dtype == "bf16" else []
        for columns, kinds in [*sizes, *widest, (layout.WIDE_COLUMNS, [plain, unaligned])]:
            wide, rows = columns == layout.WIDE_COLUMNS, layout.rows_of(columns)
            for kind, by_position, aligned in kinds:
                shape = {"ROWS": rows, "COLUMNS": columns, "BY_POSITION": by_position, "ALIGNED": aligned, "WIDE": wide}
                yield Case(
                    f"-/-/row_sums_kernel/{dtype}, {columns} columns{' of more' if wide else ''}{kind}",
                    kernel.row_sums_kernel, f"{tables} *fp32 *fp32", types | shape,
                    norm_fisher_launch.row_options(rows * columns, backend),
                    wide=aligned and not wide,  # the statistics of a row are 4 bytes
                )  # fmt: skip
        for last, (kind, by_position, aligned) in itertools.product((False, True), (plain, positions, unaligned)):
            rows, channels = layout.CHANNEL_TILE[last]
            shape = {
                "CHANNELS": channels, "POSITIONS": rows, "BY_POSITION": by_position, "ALIGNED": aligned, "CHANNELS_LAST": last,
            }  # fmt: skip
            yield Case(
                f"-/-/channel_sums_kernel/{dtype}, channels {'last' if last else 'first'}{kind}",
                kernel.channel_sums_kernel, f"{tables} *fp32", types | shape,
                {"num_warps": warps(rows * channels, backend)}, wide=aligned,
            )  # fmt: skip
        for kind, _, aligned in (plain, unaligned):
            shape = {"COLUMNS": layout.WIDE_COLUMNS, "ALIGNED": aligned}
            yield Case(
                f"-/-/row_statistics_kernel/{dtype}{kind}", kernel.row_statistics_kernel, f"{tables} *fp32",
                {"X_TYPE": type_} | shape, {"num_warps": warps(layout.WIDE_COLUMNS // 2, backend)}, wide=aligned,
            )  # fmt: skip
    four = {"num_warps": 4}
    tile = {"UNITS": norm_fisher_launch.UNITS, "ITEMS": norm_fisher_launch.ITEMS}
    statistics = kernel.channel_statistics_kernel
    yield Case("-/-/channel_statistics_kernel/-", statistics, f"{tables} *fp32 *fp32", tile, four)
    tile = {"EXAMPLES": norm_fisher_launch.EXAMPLES, "COLUMNS": norm_fisher_launch.COLUMNS}
    for kind, has_channels, by_position in (("rows", False, False), ("channels", True, False), ("positions", True, True)):
        constants = tile | {"HAS_CHANNELS": has_channels, "BY_POSITION": by_position}
        types_of = f"{tables} *fp32 *fp32 *fp32 *fp32"
        yield Case(f"-/-/fisher_kernel/{kind}", kernel.fisher_kernel, types_of, constants, four)


def _gradients(arch: str) -> Iterator[Case]:
    del arch
    kernel, warps = gradients_kernel, {"num_warps": 4}
    tile = {"BLOCK_M": gradients_launch._BLOCK_M, "BLOCK_N": gradients_launch._BLOCK_N}
    for dtype, type_ in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        constants = {"DTYPE": type_, **tile}
        yield Case(f"-/-/gather_kernel/{dtype}", kernel.gather_kernel, "*i64 *i64", constants, warps)
        yield Case(f"-/-/scatter_kernel/{dtype}", kernel.scatter_kernel, "*i64 *i64 *fp32 *u8", constants, warps)
    for name, aligned in (("-", True), ("unaligned", False)):
        constants = {"BLOCK": 1024, "ALIGNED": aligned}
        yield Case(f"-/-/inner_kernel/{name}", kernel.inner_kernel, "*i64 *fp32", constants, warps, wide=aligned)
    types = "*fp32 *fp32 *i32 *i64 fp32 *fp32 *u8 *u8 *i64 i32"
    for members, block in ((1, 1), (100, 64)):
        constants = {"MEMBERS": members, "BLOCK_W": 2048 // block, "BLOCK_K": block}
        yield Case(f"-/-/clip_kernel/{members}", kernel.clip_kernel, types, constants, warps)


def _first_order(arch: str) -> Iterator[Case]:
    del arch
    kernel, warps = first_order_kernel, {"num_warps": 4}
    for name, adam, nesterov in (("sgd", False, True), ("adamw", True, False), ("nesterov's adamw", True, True)):
        constants: dict[str, Any] = {"ADAM": adam, "NESTEROV": adam and nesterov, "BLOCK": 128}
        yield Case(f"-/-/factors_kernel/{name}", kernel.factors_kernel, "*i64 *fp64 *fp64 *fp32 i32", constants, warps)
        for dtype, type_, size in (("bf16", tl.bfloat16, 2), ("fp32", tl.float32, 4)):
            for aligned in (True, False):
                constants = {
                    "ADAM": adam, "MOMENTUM": not adam, "NESTEROV": nesterov, "MAXIMIZE": False,
                    "BLOCK": first_order_launch._BLOCK * 4 // size, "DTYPE": type_, "ALIGNED": aligned,
                }  # fmt: skip
                label = f"-/-/move_kernel/{name}, {dtype}{'' if aligned else ', unaligned'}"
                types = "*i64 *fp32 *u8 fp32 fp32 fp32 fp32 fp32"
                yield Case(label, kernel.move_kernel, types, constants, warps, wide=aligned)


def _eigen_adam(arch: str) -> Iterator[Case]:
    del arch
    kernel, launch, warps = eigen_adam_kernel, eigen_adam_launch, {"num_warps": 4}
    tile = {"BLOCK_M": launch._BLOCK_M, "BLOCK_N": launch._BLOCK_N}
    for name, aligned in (("-", True), ("unaligned", False)):
        constants = tile | {"ALIGNED": aligned}
        yield Case(f"-/-/sums_kernel/{name}", kernel.sums_kernel, "*i64 *fp64 *fp32", constants, warps, wide=aligned)
        types = "*i64 *fp64 *fp32 *fp32"
        yield Case(f"-/-/direction_kernel/{name}", kernel.direction_kernel, types, constants, warps, wide=aligned)
        constants, types = {"BLOCK": launch._BLOCK, "ALIGNED": aligned}, "*i64 *fp64 *fp32 *u8"
        yield Case(f"-/-/moments_kernel/{name}", kernel.moments_kernel, types, constants, warps, wide=aligned)
    constants = tile | {"SPAN": launch._SPAN, "DEPTH": launch._DEPTH, "ADDED": launch._ADDED}
    types = "*i64 *fp64 *fp32 *fp32 *fp32 *fp32"
    yield Case("-/-/means_kernel/-", kernel.means_kernel, types, constants, warps)


def shipped(arch: str) -> list[Case]:
    """All of them for one architecture."""
    families = (
        _covariance, _newton_schulz, _factored_newton, _orthogonal_iteration, _precondition, _lists, _gradients, _first_order,
        _eigen_adam, _norm_fisher,
    )  # fmt: skip
    return [case for family in families for case in family(arch)]
