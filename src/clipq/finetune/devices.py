"""The device, the processes and the arithmetic of a recipe."""

from __future__ import annotations

import os
import warnings
from typing import Any

import lightning_fabric
import torch
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.single_device import SingleDeviceStrategy

from clipq.errors import RecipeError
from clipq.finetune.rendezvous import join
from clipq.finetune.sharding import shard
from clipq.recipe import Recipe

_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def make_fabric(recipe: Recipe) -> lightning_fabric.Fabric:
    """The device and arithmetic of a recipe, and the other processes if ``torchrun`` started this one.

    Raises:
        RecipeError: there is no such device here, or the fields do not go together.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1 and recipe.strategy == "fsdp" and recipe.precision == "fp16":
        raise RecipeError("strategy fsdp has no loss scaling, which precision fp16 needs; use bf16, or strategy ddp")
    try:
        alone = single(recipe)
        if processes == 1:
            return alone
        fabric = lightning_fabric.Fabric(
            accelerator=alone.device.type,
            devices=here,
            num_nodes=processes // here,
            strategy=_strategy(recipe, processes, alone.device.type),
            **_precision(recipe, alone.device.type),
        )
        join(fabric.device)
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"device {recipe.device!r} cannot be used here: {error}") from None
    return fabric


def single(recipe: Recipe, device: torch.device | None = None) -> lightning_fabric.Fabric:
    """A Fabric for this process by itself, whatever other processes there are.

    Args:
        device: which one; else the recipe's.
    """
    if device is None:
        device = lightning_fabric.Fabric(accelerator=recipe.device, devices=1).device
    return lightning_fabric.Fabric(
        accelerator=device.type, strategy=SingleDeviceStrategy(device), **_precision(recipe, device.type)
    )


def _strategy(recipe: Recipe, processes: int, device: str) -> DDPStrategy | ModelParallelStrategy:
    if recipe.strategy != "fsdp":
        # Buckets of gradients that stay as first laid out are summed in the same order after a resume.
        return DDPStrategy(find_unused_parameters=device == "cpu")
    return ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1)


def slow_in_16_bits() -> bool:
    """Whether PyTorch takes many times as long in 16 bits as in 32 on this processor: x86 without AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def _precision(recipe: Recipe, device: str) -> dict[str, Any]:
    if device == "cpu" and recipe.precision != "32" and slow_in_16_bits():
        warnings.warn(
            f"precision is {recipe.precision}, but this processor has no AVX-512, without which PyTorch takes 5 to 13 "
            "times as long in 16 bits as in 32; give precision 32",
            stacklevel=3,
        )
    if recipe.precision == "fp16":  # by hand: for a CPU, Fabric would take bfloat16 instead
        return {"plugins": MixedPrecision("16-mixed", device)}
    return {"precision": _PRECISION[recipe.precision]}
