"""A model of K-FAC's whole step, and of what each change of the kernels and the host's path saves: no measurement.

    python -m benchmarks.steps.step_model

A step is AdamW's plus what K-FAC adds. On the device that is the sum of its parts, each at the rate of `step_constants`, plus
the time between kernels. The host's time is counted in launches and operators. Where no graph is replayed, the step takes the
longer of the two. Counts are those of `benchmarks.kernels.cost_model` and `data_movement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.kernels import data_movement
from benchmarks.kernels.shapes import BY_NAME, autoencoder

from . import step_parts
from .step_constants import ESTIMATES, GOALS, H100, H200, MEASURED, MS, Machine
from .workload import Options, Workload

PARTS: dict[str, Callable[[Workload, Machine], float]] = {
    "statistics": step_parts.statistics,
    "Newton steps": step_parts.newton_steps,
    "power iteration": step_parts.power_iteration,
    "preconditioning": step_parts.preconditioning,
    "norms": step_parts.norms,
    "blending, copies": step_parts.blending,
    "gradients": step_parts.gradients,
    "updates beside AdamW's": step_parts.updates,
}
# In this order, each with those before it.
ITEMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("free scale", {"free_scale": True}),
    ("TF32 preconditioning", {"tf32": True}),
    ("dense updates", {"dense": True}),
    ("1/8 of the rows", {"stats_fraction": 1 / 8}),
    ("fused norms", {"fused_norms": True}),
    ("no copies", {"kept_in_kernels": True}),
    ("grouped launches", {"grouped": True}),
    ("fused updates", {"fused_updates": True}),
    ("images without gather", {"without_gather": True}),
    ("roots in panels", {"in_panels": True}),
    ("no idle writes", {"no_idle_writes": True}),
    ("blocks to 1,024", {"largest": 1024}),
)
ESTIMATED_COLUMNS = "dense updates", "images without gather", "blocks to 1,024"  # after which there are estimates by hand


def columns() -> list[tuple[str, Options]]:
    """What the columns of the table have switched on."""
    result = [("before", Options())]
    for name, change in ITEMS:
        result.append((name, replace(result[-1][1], **change)))
    return result


@dataclass(frozen=True)
class Step:
    """A step of the model.

    Attributes:
        parts: seconds of the device, AdamW's step first.
        host: seconds of the host; zero where it replays a graph.
        launches: kernels that K-FAC adds.
    """

    parts: dict[str, float]
    host: float
    launches: int

    @property
    def device(self) -> float:
        """Seconds of the device."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.device, self.host)


def step(name: str, options: Options, machine: Machine) -> Step:
    """The model of a step.

    Args:
        name: one of `ESTIMATES`.
        options: what is switched on.
        machine: that runs it.
    """
    in_graph = name.endswith("graph")
    model = autoencoder(machine.autoencoder_batch) if name.startswith("autoencoder") else BY_NAME[name]
    work = Workload(model, options, in_graph)
    of_norms = 0 if options.fused_norms else data_movement.norms(model, by_pytorch=True).launches
    kernels = sum(step_parts.launches(work)) + of_norms
    parts = {"AdamW": machine.adamw_device[name] * MS}
    parts |= {part: seconds(work, machine) for part, seconds in PARTS.items()}
    parts["between kernels"] = kernels * machine.kernel
    host = 0.0 if in_graph else machine.adamw_host[name] * MS + step_parts.host(work, machine)
    return Step(parts, host, kernels)


def _cells(values: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def _titles(first: str) -> list[str]:
    names = [name for name, _ in columns()]
    heads = [first, names[0], *(f"+ {name}" for name in names[1:])]
    return [_cells(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]


def table(machine: Machine) -> str:
    """Milliseconds of a step, with the items switched on one after another; an h where the host takes longest."""
    lines = _titles("step, ms")
    for name in machine.adamw_device:
        found = [step(name, options, machine) for _, options in columns()]
        lines.append(_cells([name, *(f"{x.seconds / MS:.1f}{' h' if x.host > x.device else ''}" for x in found)]))
    return "\n".join(lines)


def parts_table(name: str, machine: Machine) -> str:
    """The parts of a step on the device and the host's time, in milliseconds, with the items switched on."""
    found = [step(name, options, machine) for _, options in columns()]
    lines = _titles(f"{name}, ms")
    for part in found[0].parts:
        lines.append(_cells([part, *(f"{x.parts[part] / MS:.2f}" for x in found)]))
    lines.append(_cells(["device", *(f"{x.device / MS:.1f}" for x in found)]))
    lines.append(_cells(["host", *(f"{x.host / MS:.1f}" for x in found)]))
    lines.append(_cells(["K-FAC's kernels", *(f"{x.launches:,}" for x in found)]))
    return "\n".join(lines)


def estimates_table(machine: Machine) -> str:
    """The model's columns beside those that were estimated by hand, and the goals."""
    options = dict(columns())
    marked = [options["before"], *(options[name] for name in ESTIMATED_COLUMNS)]
    heads = ["before", "+ free scale, TF32, dense updates", "+ 1/8 of the rows, norms to images", "+ blocks"]
    lines = [_cells(["model / estimate, ms", *heads, "goal"]), "|---" + "|--:" * 5 + "|"]
    for name in machine.adamw_device:
        found = [step(name, x, machine).seconds / MS for x in marked]
        cells = [f"{x:.1f} / {'-' if y is None else y}" for x, y in zip(found, ESTIMATES[name], strict=True)]
        goal = f"{GOALS[name]}: {'met' if found[-1] <= GOALS[name] else 'missed'}" if name in GOALS else ""
        lines.append(_cells([name, *cells, goal]))
    return "\n".join(lines)


def measured_table(machine: Machine) -> str:
    """The model beside what was measured, part by part, before and after free scale and TF32."""
    options = dict(columns())
    pairs = options["before"], options["TF32 preconditioning"]
    lines = [_cells(["model / measured, ms", "part", "before", "free scale, TF32"]), "|---|---|--:|--:|"]
    for name, measured in MEASURED.items():
        steps = [step(name, x, machine) for x in pairs]
        for part, values in measured.items():
            totals = [{"device": x.device, "host": x.host, "step": x.seconds} | x.parts for x in steps]
            cells = [
                "" if value is None else f"{total[part] / MS:.3g} / {value:.3g}"
                for total, value in zip(totals, values, strict=True)
            ]
            lines.append(_cells([name, part, *cells]))
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    print("**A model, not a measurement.** Milliseconds of a training step with statistics and inverses in every step.\n")
    for machine in (H100, H200):
        print(f"{machine.name}, each item with those before it (h: the host takes longest)\n\n{table(machine)}\n")
    print(f"H100, the model and what was estimated by hand\n\n{estimates_table(H100)}\n")
    print(f"H200, the model and what was measured there\n\n{measured_table(H200)}\n")
    for name in ("gpt2", "autoencoder, graph"):
        print(f"H100, parts\n\n{parts_table(name, H100)}\n")


if __name__ == "__main__":
    main()
