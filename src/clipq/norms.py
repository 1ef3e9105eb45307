"""Batch norms folded: of the four numbers a channel, the two that evaluation needs.

A batch norm computes ``weight · (x - mean) / sqrt(variance + eps) + bias`` in evaluation: a factor and a summand a
channel. Folded, its weight and bias are those two, and its statistics are a fresh norm's, zeros and ones, which take
no room in a file. Convolutions before a norm cannot take the factor in: their weights share levels over all channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipq.errors import PlanError
from clipq.plan import Plan

_PARTS = ("weight", "bias", "running_mean", "running_var")


@torch.no_grad()
def fold_norms(model: nn.Module, plan: Plan | None = None) -> list[str]:
    """Fold the statistics of a trained model's batch norms into their weights and biases, in place.

    In evaluation the model computes what it did, but for rounding. It is for inference from here on: in training batch
    norms use the statistics of the batch, which these weights and biases do not go with.

    Left as they are: batch norms without weight and bias or without running statistics, those with a tensor that the
    plan names or that another module has as well, and those with a variance that is negative or no number.

    Args:
        model: the network itself, whole; after ``detach`` if it was attached.
        plan: what is compressed.

    Returns:
        The names of the batch norms that were folded.

    Raises:
        PlanError: the model is no module.

    Example:
        >>> attachment.detach()
        >>> clipq.fold_norms(model, plan)
        >>> clipq.save(model, "model.clipq", plan=plan)
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"model is {model!r}; give the trained network, a torch.nn.Module")
    state = model.state_dict()
    folded = folded_norms(model, state, plan)
    for name, tensor in folded.items():
        state[name].copy_(tensor)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in folded))


@torch.no_grad()
def folded_norms(model: nn.Module, state: Mapping[str, Tensor], plan: Plan | None = None) -> dict[str, Tensor]:
    """The new tensors of those batch norms of a model that can be folded.

    Args:
        state: where their tensors are taken from, by the names that they have in the model.
        plan: what is compressed.
    """
    planned = plan.tensors if plan else {}
    new: dict[str, Tensor] = {}
    for names, norm in _batch_norms(model):
        parts = [[f"{name}.{part}".removeprefix(".") for name in names] for part in _PARTS]
        flat = [name for part in parts for name in part]
        if any(name in planned or name not in state for name in flat):
            continue
        weight, bias, mean, variance = (state[part[0]].double() for part in parts)
        factor = weight / (variance + norm.eps).sqrt()
        made = (factor * (1 + norm.eps) ** 0.5, bias - mean * factor, torch.zeros_like(mean), torch.ones_like(variance))
        if not all(bool(tensor.isfinite().all()) for tensor in made):
            continue
        for part, tensor in zip(parts, made, strict=True):
            rounded = tensor.to(state[part[0]].dtype)  # one tensor for all names of a tied one
            new.update(dict.fromkeys(part, rounded))
    return new


def _batch_norms(model: nn.Module) -> Iterator[tuple[list[str], _BatchNorm]]:
    """The batch norms whose tensors are theirs alone, each with all its names."""
    names: dict[_BatchNorm, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            names[module].append(name)
    holders: dict[int, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            holders[id(tensor)].add(module)
    for norm, known_as in names.items():
        parts = [getattr(norm, part) for part in _PARTS]
        if all(part is not None and holders[id(part)] == {norm} for part in parts):
            yield known_as, norm
