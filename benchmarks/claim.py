"""What one benchmark measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A measured ratio, what was asked of it, and the two figures it comes from.

    Attributes:
        name: as on the command line.
        ratio: baseline over ours for times, ours over baseline for rates; no unit.
        goal: what the ratio has to reach.
        higher_is_better: whether reaching means at least the goal, or at most.
        ours: absolute figure with its unit, e.g. "0.21 s".
        baseline: the other one.
        fault: why the claim fails whatever its ratio, e.g. too much memory; None if nothing does.
    """

    name: str
    ratio: float
    goal: float
    higher_is_better: bool = True
    ours: str
    baseline: str
    fault: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the ratio reaches the goal and nothing else is wrong."""
        reached = self.ratio >= self.goal if self.higher_is_better else self.ratio <= self.goal
        return reached and self.fault is None

    def line(self) -> str:
        """The one line that is printed."""
        fault = f" FAULT: {self.fault}" if self.fault else ""
        return (
            f"{self.name} ratio={self.ratio:.2f} goal={self.goal:g} ours: {self.ours}; baseline: {self.baseline}{fault}"
        )
