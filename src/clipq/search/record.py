"""What a search leaves behind: every evaluation, the trade-off curve, the plan and why it was chosen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clipq.plan import Plan
from clipq.search.target import Target

Method = Literal["default", "layerwise"]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model.

    Attributes:
        stage: which part of the search it belongs to.
        group: the one group that was changed; None if the whole plan was in force.
        pruning_rate, bits: of that group.
        cost: what ``evaluate`` gave.
        bytes: of the whole file, if it was encoded.
        name: of the plan, if it was one of a few.
        objective: what the search minimised, if that is not the cost: ε - λc of the paper.
    """

    stage: str
    cost: float
    group: str | None = None
    pruning_rate: float | None = None
    bits: int | None = None
    bytes: float | None = None
    name: str | None = None
    objective: float | None = None


@dataclass(frozen=True)
class CurvePoint:
    """A plan on the trade-off curve: its bytes as a file and its cost added, predicted; and measured, if it was."""

    bytes: float
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """One group at one bit width: what it adds alone to the cost at each pruning rate, predicted."""

    group: str
    bits: int
    pruning_rates: tuple[float, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True)
class GroupRecord:
    """A searched group in the chosen plan.

    Attributes:
        bytes, share: predicted, in the file.
        cost, cost_share: what it adds alone to the cost, predicted.
        remark: if it costs bytes without saving error, or the other way round; see `clipq.search.remarks`.
    """

    name: str
    size: int
    pruning_rate: float
    bits: int
    bytes: float
    share: float
    cost: float | None = None
    cost_share: float | None = None
    remark: str | None = None


@dataclass(frozen=True)
class SearchRecord:
    """A finished search.

    Attributes:
        base_cost: ``evaluate`` of the full-precision model.
        bytes: of the plan's file, before any training after the search.
        cost: of the plan, as `bytes`; after ``recover``, if there was one.
        drop: how much worse than the full-precision model ``validate`` (or else ``evaluate``) finds the plan; after
            ``recover``, if there was one.
        interaction: how the cost of whole plans follows the sum of their groups' alone: log(whole) is about
            ``interaction[0] + interaction[1] * log(sum)``.
        sensitivity: the groups' error surfaces, where the method has them.
        recovered: whether whole plans were evaluated after a few steps of fine-tuning.
    """

    method: Method
    target: Mapping[str, Any]
    plan: Plan
    float32_bytes: int
    base_cost: float
    bytes: int
    cost: float
    drop: float
    groups: tuple[GroupRecord, ...]
    evaluations: tuple[Evaluation, ...]
    curve: tuple[CurvePoint, ...] = ()
    interaction: tuple[float, float] | None = None
    sensitivity: tuple[Sensitivity, ...] = ()
    recovered: bool = False
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        value = dataclasses.asdict(self) | {"plan": json.loads(self.plan.to_json())}
        return json.dumps(value, indent=2) + "\n"

    @property
    def ratio(self) -> float:
        """Bytes of the model as float32 over bytes of the plan's file."""
        return self.float32_bytes / self.bytes

    @property
    def target_bytes(self) -> int | None:
        """The most bytes of the file, if that, or a ratio, is the target."""
        return Target(**self.target).file_bytes(self.float32_bytes)

    @classmethod
    def from_json(cls, text: str) -> SearchRecord:
        value = json.loads(text)
        value["plan"] = Plan.from_json(json.dumps(value["plan"]))
        value["groups"] = tuple(GroupRecord(**g) for g in value["groups"])
        value["evaluations"] = tuple(Evaluation(**e) for e in value["evaluations"])
        value["curve"] = tuple(CurvePoint(**p) for p in value["curve"])
        value["sensitivity"] = tuple(
            Sensitivity(**s | {k: tuple(s[k]) for k in ("pruning_rates", "costs")}) for s in value["sensitivity"]
        )
        value["notes"] = tuple(value["notes"])
        value["interaction"] = tuple(value["interaction"]) if value["interaction"] else None
        return cls(**value)
