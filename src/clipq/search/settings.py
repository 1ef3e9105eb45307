"""How to search, and who watches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from clipq.errors import SearchError
from clipq.search.record import Method

if TYPE_CHECKING:  # it imports Optuna, which takes a while
    from clipq.search.progress import Progress


@dataclass(frozen=True)
class Settings:
    """How to search. The defaults were measured; see docs/search.md.

    Attributes:
        method: "default", from a target to a plan; or "layerwise", the paper's.
        evaluations: of each group alone; None for 30 (layerwise) or 10.
        refinements: whole plans that Bayesian optimisation tries at the end of "default".
        highest_pruning_rate: the search goes up to; below 1.
        bits: the least and the most bit width.
        seed: of everything random.
        memory: the most bytes of activations to keep between evaluations.
    """

    method: Method = "default"
    evaluations: int | None = None
    refinements: int = 16
    highest_pruning_rate: float = 0.998
    bits: tuple[int, int] = (2, 8)
    seed: int = 0
    memory: int = 2**30

    def __post_init__(self) -> None:
        if self.method not in ("default", "layerwise"):
            raise SearchError(f"method is {self.method!r}; it is 'default' or 'layerwise'")
        if self.evaluations is not None and self.evaluations < 1:
            raise SearchError(f"evaluations is {self.evaluations}; it must be at least 1")
        if self.refinements < 0:
            raise SearchError(f"refinements is {self.refinements}; it must be at least 0")
        if not 0 < self.highest_pruning_rate < 1:
            raise SearchError(f"highest_pruning_rate is {self.highest_pruning_rate}; it must be above 0 and below 1")
        if not 1 <= self.bits[0] <= self.bits[1] <= 8:
            raise SearchError(f"bits are {self.bits}; give the least and the most, from 1 to 8")


class Watcher(Protocol):
    """Is told of a search's progress; the command line draws it."""

    def stage(self, name: str, total: int) -> None:
        """A stage of so many evaluations begins."""

    def evaluated(self, progress: Progress) -> None:
        """Evaluations were done, by this process or another."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""


class Silent:
    """A watcher that says nothing."""

    def stage(self, name: str, total: int) -> None: ...

    def evaluated(self, progress: Progress) -> None: ...

    def note(self, text: str) -> None: ...
