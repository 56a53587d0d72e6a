"""What the commands show in the same way: tables, progress bars and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#c0392b", "#1f5f99", "#7f8c8d", "#e08e0b", "#8e44ad")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


@contextmanager
def progress(title: str, total: int | None, unit: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar on standard error; the yielded function moves it by one and shows a text. Without tqdm, or if quiet, no bar.

    Args:
        title: shown before the bar.
        total: number of units; None if it is not known.
        unit: what is counted.
        quiet: whether to show nothing.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda text: None
        return
    with tqdm(total=total, desc=title, unit=unit, disable=quiet) as bar:

        def advance(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield advance


def tidy(*panels: Axes) -> None:
    """Give panels a light grid and no frame at the top and on the right."""
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
