"""The plan: which parameters are compressed, each with its pruning rate and bit width (θ of the paper)."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
from torch import nn

from clipq.errors import PlanError, WeightError
from clipq.operator.reference import check_hyperparameters
from clipq.validation import explain

_ELIGIBLE: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("weight",)),
    (nn.Bilinear, ("weight",)),
    (nn.Conv1d, ("weight",)),
    (nn.Conv2d, ("weight",)),
    (nn.Conv3d, ("weight",)),
    (nn.ConvTranspose1d, ("weight",)),
    (nn.ConvTranspose2d, ("weight",)),
    (nn.ConvTranspose3d, ("weight",)),
    (nn.Embedding, ("weight",)),
    (nn.EmbeddingBag, ("weight",)),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    (nn.RNNBase, ("weight_*",)),
    (nn.RNNCellBase, ("weight_*",)),
)
"""Module types, subclasses included, and the parameters of theirs that are compressed by default."""


@dataclass(frozen=True)
class TensorPlan:
    """What is to become of one parameter.

    Attributes:
        shape: the parameter's shape; checked against the model.
        pruning_rate: p, the fraction of its weights that is clipped to zero; in [0, 1).
        bits: b, the bit width; 1 to 8.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid", strict=True)

    shape: tuple[int, ...]
    pruning_rate: float
    bits: int


@dataclass(frozen=True)
class Plan:
    """The parameters to compress, by name, each with its pruning rate and bit width.

    Plain data: made by a search, by hand, or by `Plan.uniform`; JSON in and out. A tied weight is one tensor
    and appears under the first of its names.

    Raises:
        PlanError: there is no tensor, or a pruning rate or bit width is out of range.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid", strict=True)

    tensors: Mapping[str, TensorPlan]
    format: Literal["clipq-plan"] = "clipq-plan"
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        if not self.tensors:
            raise PlanError("the plan names no tensor; a plan needs at least one parameter to compress")
        for name, tensor in self.tensors.items():
            try:
                check_hyperparameters(tensor.pruning_rate, tensor.bits, name)
            except WeightError as error:
                raise PlanError(str(error)) from None

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        *,
        pruning_rate: float,
        bits: int,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
    ) -> Plan:
        """The same pruning rate and bit width for every eligible parameter of a model.

        Eligible are the weights of linear, convolution, transposed convolution, bilinear, embedding, attention
        and recurrent layers; no biases, norms or buffers.

        Args:
            include: globs on parameter names to compress as well, such as ``"*.bias"``.
            exclude: globs on parameter names to leave as they are; applied last.

        Raises:
            PlanError: a glob matches no parameter, nothing is left, or a value is out of range.
        """
        names = _names(model)
        chosen = set(_eligible(model))
        for pattern in include:
            chosen |= _matching(pattern, names, "include", "parameter of the model")
        for pattern in exclude:
            chosen -= _matching(pattern, names, "exclude", "parameter of the model")
        tensors = {}
        for name, parameter in model.named_parameters():
            if name in chosen:
                if isinstance(parameter, nn.parameter.UninitializedParameter):
                    raise PlanError(f"{name} has no shape yet; run the lazy module once before making a plan")
                if not parameter.is_floating_point():
                    raise PlanError(f"{name} is of type {parameter.dtype}; only floating point can be planned")
                tensors[name] = TensorPlan(tuple(parameter.shape), pruning_rate, bits)
        if not tensors:
            raise PlanError(
                f"{type(model).__name__} has no parameter to compress: by default these are the weights of linear, "
                f"convolution, embedding, attention and recurrent layers. Name others with include=, such as "
                f"include=['*']"
            )
        return cls(tensors)

    def override(self, overrides: Mapping[str, Mapping[str, Any]]) -> Plan:
        """This plan with other values where a glob on the tensor names matches; later globs win.

        Args:
            overrides: glob → ``{"pruning_rate": …}``, ``{"bits": …}`` or both.

        Raises:
            PlanError: a glob matches no tensor of the plan, or a key or value is not accepted.
        """
        tensors = dict(self.tensors)
        names = {name: name for name in tensors}
        for pattern, values in overrides.items():
            unknown = set(values) - {"pruning_rate", "bits"}
            if unknown:
                raise PlanError(
                    f"override {pattern!r} sets {', '.join(sorted(unknown))}; it can set pruning_rate and bits"
                )
            for name in _matching(pattern, names, "override", "tensor of the plan"):
                tensors[name] = dataclasses.replace(tensors[name], **values)
        return Plan(tensors)

    def check(self, model: nn.Module) -> None:
        """Raise `PlanError`, with every difference listed, unless the plan fits the model."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        primary = _names(model)
        differences = []
        planned: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            if name not in parameters:
                differences.append(f"{name}: not a parameter of the model{_suggestion(name, primary)}")
                continue
            if tuple(parameters[name].shape) != tuple(tensor.shape):
                differences.append(
                    f"{name}: shape {tuple(tensor.shape)} in the plan, {tuple(parameters[name].shape)} in the model"
                )
            other = planned.setdefault(primary[name], name)
            if other != name:
                differences.append(f"{name}: is tied to {other}, which is in the plan too; keep one of them")
        if differences:
            raise PlanError(
                f"the plan does not fit {type(model).__name__}:\n  "
                + "\n  ".join(differences)
                + "\nMake a plan for this model, or load the model the plan was made for"
            )

    def left_out(self, model: nn.Module) -> dict[str, str]:
        """Every tensor of the model's ``state_dict()`` that is not compressed → why it is not."""
        primary = _names(model)
        planned = {primary[name] for name in self.tensors}
        eligible = set(_eligible(model))
        owners = {
            f"{prefix}.{name}" if prefix else name: type(module).__name__
            for prefix, module in model.named_modules(remove_duplicate=False)
            for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        }
        reasons = {}
        for name in model.state_dict():
            owner = owners.get(name, type(model).__name__)
            if name not in primary:
                reasons[name] = f"buffer of {owner}"
            elif primary[name] not in planned:
                by_default = "left out of the plan" if primary[name] in eligible else "not compressed by default"
                reasons[name] = f"{name.rpartition('.')[2]} of {owner}, {by_default}"
        return reasons

    def to_json(self) -> str:
        """The plan as JSON text, readable again by `from_json`."""
        value = {
            "format": self.format,
            "version": self.version,
            "tensors": {name: dataclasses.asdict(tensor) for name, tensor in self.tensors.items()},
        }
        return json.dumps(value, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> Plan:
        """Read a plan from JSON text.

        Args:
            source: what to call the text in an error.

        Raises:
            PlanError: it is not JSON, is of another format or version, has unknown fields or bad values.
        """
        try:
            return pydantic.TypeAdapter(Plan).validate_json(text)
        except pydantic.ValidationError as error:
            fields = ("format", "version", "tensors", "shape", "pruning_rate", "bits")
            raise PlanError(f"{source} cannot be used:\n{explain(error, fields)}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file; raises `PlanError` as `from_json` does, or if the file cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot be read as a plan ({error}); give a plan's JSON file") from None
        return cls.from_json(text, source=str(path))


def _eligible(model: nn.Module) -> Iterator[str]:
    """The (first) names of the parameters that are compressed by default."""
    primary = _names(model)
    for module_name, module in model.named_modules():
        patterns = [p for kind, ps in _ELIGIBLE if isinstance(module, kind) for p in ps]
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is not None and any(fnmatchcase(name, p) for p in patterns):
                yield primary[f"{module_name}.{name}" if module_name else name]


def _names(model: nn.Module) -> dict[str, str]:
    """Every parameter name of a model → the first name of the same parameter."""
    first: dict[int, str] = {}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


def _matching(pattern: str, names: Mapping[str, str], option: str, of_what: str) -> set[str]:
    """The first names of all tensors that a glob matches; it must match one."""
    found = {primary for name, primary in names.items() if fnmatchcase(name, pattern)}
    if not found:
        raise PlanError(f"{option} {pattern!r} matches no {of_what}{_suggestion(pattern, names)}")
    return found


def _suggestion(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3) or list(known)[:3]
    return f"; the nearest {'is' if len(nearest) == 1 else 'are'} {', '.join(nearest)}" if nearest else ""
