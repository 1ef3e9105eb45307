"""A model as it is at one moment, to compare it with later and to put it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ModelState:
    """The modules, tensors and flags of a model: which objects they are, and what the tensors hold.

    Args:
        model: is only read.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [_Module(module) for module in model.modules()]
        self._tensors = [_Tensor(tensor) for tensor in tensors_of(model).values()]
        self.values = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}

    def changed(self) -> list[str]:
        """Names of the parameters and buffers that hold something else now, are new, or are gone."""
        now = tensors_of(self._model)
        kept = [name for name, then in self.values.items() if name in now and _same(then, now[name])]
        return [name for name in {**self.values, **now} if name not in kept]

    def put_back(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Modules, parameters, buffers, training flags, ``requires_grad`` and gradients as they were.

        Args:
            values: what the tensors are to hold; None leaves what they hold now.
        """
        for module in self._modules:
            module.put_back()
        for kept in self._tensors:
            kept.put_back()
        if values is not None:
            with torch.no_grad():
                for name, tensor in tensors_of(self._model).items():
                    tensor.copy_(values[name])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class _Module:
    """What a module holds by itself, without that which its children hold."""

    _TABLES = ("_parameters", "_buffers", "_modules")

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._class = type(module)  # torch's parametrizations make it another
        self._training = module.training
        self._tables = {name: dict(getattr(module, name).items()) for name in self._TABLES}
        self._non_persistent = set(module._non_persistent_buffers_set)

    def put_back(self) -> None:
        self._module.__class__ = self._class
        self._module.training = self._training
        for name, then in self._tables.items():
            now: dict[str, Any] = getattr(self._module, name)
            if list(now.keys()) != list(then) or any(now[key] is not value for key, value in then.items()):
                now.clear()
                now.update(then)
        self._module._non_persistent_buffers_set = set(self._non_persistent)


class _Tensor:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._data = tensor.detach()
        self._requires_grad = tensor.requires_grad
        self._gradient = tensor.grad if tensor.is_leaf else None

    def put_back(self) -> None:
        tensor, data = self._tensor, self._data
        if tensor.dtype != data.dtype or tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
            tensor.data = data
        if tensor.is_leaf:
            tensor.requires_grad_(self._requires_grad)
            tensor.grad = self._gradient


def _same(a: Tensor, b: Tensor) -> bool:
    """To the bit, so that NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
