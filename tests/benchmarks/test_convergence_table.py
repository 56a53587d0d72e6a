"""What `make race` makes of its curves: shares of AdamW's steps and seconds, the table, the picture."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from benchmarks.convergence import picture, problems, table
from benchmarks.convergence.optimizers import ADAMW, CONTESTANTS, KFAC_ADAM, MUON
from benchmarks.convergence.race import DEFAULT, Outcome
from benchmarks.convergence.training import Run

TEXT = dataclasses.replace(problems.BY_NAME["text"], steps=20)


def made_up(optimizer: str, losses: list[float], seed: int = 0, every: int = 5, ms: float = 1000.0, lr: float = 0.1) -> Run:
    """A run evaluated every so many steps, a step so long."""
    steps = [every * i for i in range(len(losses))]
    run = Run("text", "v", optimizer, {"lr": lr}, seed, steps[-1], "cpu", 1)
    run.steps, run.losses, run.seconds = steps, losses, [step * ms / 1000 for step in steps]
    run.held_out_loss, run.held_out_accuracy = losses[-1], 0.5
    return run


def outcome(runs: list[Run], edges: tuple[str, ...] = ()) -> Outcome:
    trials = [runs[0], dataclasses.replace(runs[0], config={"lr": 0.2}, losses=[*runs[0].losses[:-1], 4.5])]
    return Outcome(trials, runs[0].config, list(edges), {run.seed: run for run in runs})


def test_steps_and_seconds_to_a_loss() -> None:
    run = made_up(ADAMW, [5.0, 3.0, 2.0, 2.5, 2.1], ms=100)
    assert table.reached(run, 2.1) == (10, 1.0)  # it was there earlier than at its end
    assert table.reached(run, 5.0) == (0, 0.0)
    assert table.reached(run, 1.0) is None


def test_shares_are_of_all_of_adamws_steps_and_seconds() -> None:
    adamw = made_up(ADAMW, [5.0, 4.0, 3.0, 2.0, 1.0])
    assert table.shares(made_up(MUON, [5.0, 1.0, 9.0], ms=3000), adamw) == (0.25, 0.75)
    assert table.shares(adamw, adamw) == (1.0, 1.0)
    assert table.shares(made_up(MUON, [5.0, 1.5]), adamw) == (math.inf, math.inf)
    assert table.cost(made_up(MUON, [5.0, 1.0], ms=3000), adamw) == 3.0


def test_without_a_finite_target_there_is_no_share() -> None:
    assert all(map(math.isnan, table.shares(made_up(MUON, [5.0, 1.0]), made_up(ADAMW, [5.0, math.inf]))))


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        *((118.84, "118.8"), (12.3456, "12.35"), (2.3, "2.300"), (0.2301, "0.230"), (0.08934, "0.0893")),
        *((1234.5, "1234"), (math.inf, "inf")),
    ],
)
def test_losses_take_six_characters(loss: float, shown: str) -> None:
    assert table.short(loss) == shown


def test_table_of_made_up_curves() -> None:
    adamw = outcome([made_up(ADAMW, [5.0, 4.0, 3.0, 2.5, 2.0], s, ms=40) for s in (0, 1, 2)], ("lr 0.1 is the highest",))
    curves = ([5.0, 1.5], [5.0, 2.5, 1.0], [5.0, 4.0, 3.5])
    muon = outcome([made_up(MUON, curve, seed, ms=60 if seed else 100) for seed, curve in enumerate(curves)])
    ours = outcome([made_up(KFAC_ADAM, [5.0, math.inf], seed, ms=100) for seed in range(3)])
    fixed = outcome([made_up(KFAC_ADAM, [5.0, 1.0], seed, ms=100) for seed in range(3)])
    text = table.render(TEXT, {ADAMW: adamw, MUON: muon, KFAC_ADAM: ours, KFAC_ADAM + DEFAULT: fixed})
    cells = {line[0]: line[1:] for line in (re.split(r"\s{2,}", row.strip()) for row in text.split("Tuned")[0].splitlines())}
    assert cells["held-out loss:"][1] == "seeds 0, 1, 2"
    assert cells[ADAMW] == ["2.000", "2.000 2.000 2.000", "1.00 1.00 1.00", "1.00", "1.00"]
    # Means of 1.5, 1.0 and 3.5; shares 5 / 20 and 10 / 20, and one that never gets there. A step takes 100, 60 and 60
    # milliseconds for AdamW's 40; 500 and 600 of AdamW's 800 lead to its loss, and never.
    assert cells[MUON] == ["2.000", "1.500 1.000 3.500", "0.25 0.50 -", "1.50", "0.75"]
    assert cells[KFAC_ADAM] == ["inf", "inf inf inf", "- - -", "2.50", "-"]
    assert cells[KFAC_ADAM + DEFAULT] == ["1.000", "1.000 1.000 1.000", "0.25 0.25 0.25", "2.50", "0.62"]
    assert "Tuned on seed 0, 2 configurations each" in text
    assert "AdamW: lr 0.1 (2 trials: 2.000 to 4.500); lr 0.1 is the highest of its grid" in re.sub(r"\s+", " ", text)
    assert text.count(f"{KFAC_ADAM}{DEFAULT}") == 1, "what is fixed was not tuned"


def test_a_table_has_80_columns_for_three_seeds_and_long_numbers() -> None:
    names = [*CONTESTANTS.values(), KFAC_ADAM + DEFAULT]
    losses = [0.09, 0.08, 0.07, 0.06, 0.0543]
    outcomes = {n: outcome([made_up(n, losses, seed, ms=9) for seed in range(3)], ("learning rate is high",)) for n in names}
    lines = table.render(TEXT, outcomes).splitlines()
    assert max(map(len, lines)) <= 80 and any("0.0543 0.0543 0.0543" in line for line in lines)


def test_without_adamw_there_are_losses_alone() -> None:
    text = table.render(TEXT, {MUON: outcome([made_up(MUON, [5.0, 1.5])])})
    assert re.search(r"^Muon +1\.500 +1\.500$", text, re.M)


def test_the_mean_curve_ends_where_a_run_diverged() -> None:
    found = outcome([made_up(MUON, [4.0, 3.0, 2.0], 0), made_up(MUON, [4.0, 2.0, math.inf], 1)])
    assert picture.mean_curve(found) == ([0, 5], [4.0, 2.5])


def test_every_contestant_has_a_style_of_its_own() -> None:
    assert list(picture.STYLES) == [*CONTESTANTS.values(), KFAC_ADAM + DEFAULT], "the order of the legend is that of the table"
    assert len({str(style) for style in picture.STYLES.values()}) == len(picture.STYLES)


def test_the_picture_has_a_panel_a_problem_and_one_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *arguments, **options: figures.append(figure))
    outcomes = {name: outcome([made_up(name, [4.0, 3.0, 2.0])]) for name in (ADAMW, MUON, KFAC_ADAM)}
    alone = {MUON: outcome([made_up(MUON, [4.0, math.inf])])}
    picture.draw([(problem, outcomes) for problem in problems.RACE[:3]] + [(problems.RACE[3], alone)], tmp_path / "race.png")
    (figure,) = figures
    curves = [[line for line in axes.lines if line.get_label() in picture.STYLES] for axes in figure.axes]
    assert list(map(len, curves)) == [3, 3, 3, 1, 0, 0]
    assert [axes.axison for axes in figure.axes] == [True] * 4 + [False] * 2, "empty panels have no frame"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [ADAMW, MUON, KFAC_ADAM]
    assert all(axes.get_legend() is None for axes in figure.axes)
