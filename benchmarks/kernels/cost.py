"""What a part of a step costs, as a count."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4  # bytes of a float32 number, which factors, inverses and gradients are kept in


@dataclass(frozen=True)
class Cost:
    """Bytes moved, operations by how they are done (see `Rates`), launches, and bytes that pass between these launches."""

    bytes: float
    operations: dict[str, float]
    launches: int
    scratch: float = 0.0

    @property
    def total(self) -> float:
        """Operations of every unit together."""
        return sum(self.operations.values())
