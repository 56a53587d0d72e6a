"""The table of the 32 conventions: what our optimizers, KFACPreconditioner in front of AdamW, and AdamW do in the same tests.

The tests are in test_convention_*.py, which run before this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.contenders import ALL, CONVENTIONS, FAILURE, OURS, OUTCOMES


def test_every_convention_has_a_test() -> None:
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_convention_*.py")]
    tested = {int(number) for source in sources for number in re.findall(r"^@convention\((\d+)", source, re.MULTILINE)}
    assert tested == set(CONVENTIONS) == set(range(1, 33))


def _cell(outcomes: list[str]) -> str:
    return "; ".join(dict.fromkeys(outcomes)) or "-"


def test_table(request: pytest.FixtureRequest, show: Callable[..., None]) -> None:
    """Shows what was observed in this session; every test before this one has to be in it, and none may have failed."""
    before = request.session.items[: request.session.items.index(request.node)]
    collected = {(item.function.convention, item.originalname) for item in before if hasattr(item.function, "convention")}
    assert {(number, f"test_{name}") for number, name in OUTCOMES} == collected
    rows = [
        (number, CONVENTIONS[number], name.replace("_", " "), *(_cell(row.get(contender, [])) for contender in ALL))
        for (number, name), row in sorted(OUTCOMES.items(), key=lambda item: item[0][0])
    ]
    show("\nConventions of optimizers, as observed:")
    head = ("#", "convention", "test", *ALL)
    show(f"{head[0]:>2} {head[1]:46} {head[2]:48} {head[3]:14} {head[4]:14} {head[5]:29} {head[6]}")
    last = 0
    for number, words, name, *cells in rows:
        label, words = ("", "") if number == last else (str(number), words)
        show(f"{label:>2} {words:46} {name:48} {cells[0]:14} {cells[1]:14} {cells[2]:29} {cells[3]}")
        last = number
    for column, ours in enumerate(OURS, 3):
        short = [str(row[0]) for row in rows if not row[column].startswith("pass")]
        show(f"{ours} passes {len(rows) - len(short)} of {len(rows)} tests" + (f"; not {', '.join(short)}." if short else "."))
    assert [row[0] for row in rows if FAILURE in " ".join(row[3:])] == []
