"""All that changes while a network is trained: wired together, stepped, saved and restored as one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from clipq.attach import attach
from clipq.attached import STATE_KEY
from clipq.finetune.average import WeightAverage, reestimate_batch_norm
from clipq.finetune.checkpoint import random_states, set_random_states
from clipq.finetune.finish import finish_of
from clipq.finetune.losses import Objective
from clipq.finetune.optimization import make_optimizer, make_schedule
from clipq.finetune.processes import Processes
from clipq.finetune.ramp import PruningRamp
from clipq.finetune.sharding import gathered, scattered
from clipq.finetune.step import gradients, scaler_of, update
from clipq.hold import SizeHolder
from clipq.operator import Quantizer, QuantizerEntry
from clipq.plan import Plan
from clipq.recipe import Recipe

ADJUSTMENTS = 20
"""How often the size of the file is corrected while training holds it."""
SETTLED = 0.9
"""From this share of the steps on, the plan stays as it is until the last step."""


class Training:
    """One training of a network, with or without a plan.

    Args:
        network: is given what comes out, by `publish`; in the plain case it is itself trained.
        plan: what to compress; None trains plainly.
        steps: of the whole training; they set the schedule.
        hold_bytes: the most bytes of the compressed file; see `SizeHolder`.
        state: of `state`, to go on from there.
    """

    def __init__(
        self,
        fabric: Fabric,
        network: nn.Module,
        recipe: Recipe,
        plan: Plan | None,
        *,
        steps: int,
        steps_per_epoch: int,
        learning_rate: float,
        objective: Objective,
        hold_bytes: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.fabric = fabric
        self.processes = Processes.of(fabric)
        self.network = network
        self.steps = steps
        self._recipe = recipe
        self._objective = objective
        sharded = recipe.strategy == "fsdp" and self.processes.count > 1
        self.trained = copy.deepcopy(network) if sharded or recipe.ema is not None else network
        self._ramp = None
        if plan is not None and recipe.pruning_ramp:
            self._ramp = PruningRamp(plan, max(round(recipe.pruning_ramp * steps), 1))
            plan = self._ramp.at(0)
        if state is not None:
            self.trained.load_state_dict(state["model"])
            plan = None if state["plan"] is None else Plan.from_json(json.dumps(state["plan"]))
        self._wrapped: Any = fabric.setup_module(torch.compile(self.trained) if recipe.compile else self.trained)  # type: ignore[arg-type]
        self._optimizer = make_optimizer(self.trained, recipe, learning_rate)
        self._wrapped_optimizer: Any = fabric.setup_optimizers(self._optimizer)
        self.attachment = None if plan is None else attach(self.trained, self._optimizer, plan)
        self.schedule = make_schedule(self._optimizer, recipe, steps, steps_per_epoch)
        self._average = None if recipe.ema is None else WeightAverage(self.trained, recipe.ema, self.attachment)
        self._holder = None
        if self.attachment is not None and hold_bytes is not None:
            self._holder = SizeHolder(self.trained, self.attachment, hold_bytes, finish_of(network, recipe))
        self._settled = math.ceil(SETTLED * steps)
        self._held_from = 0 if self._ramp is None else self._ramp.steps
        self._every = max((self._settled - self._held_from) // ADJUSTMENTS, 1)
        if state is not None:
            self._restore(state)

    @property
    def plan(self) -> Plan | None:
        """The plan in force."""
        return None if self.attachment is None else self.attachment.plan

    def gradients(self, batch: tuple[Tensor, Tensor]) -> float:
        """The loss of a minibatch, whose gradients are then there."""
        return gradients(
            self.fabric, self._wrapped, self._wrapped_optimizer, batch, self._objective, self._recipe.accumulate
        )

    def update(self, step: int) -> bool:
        """The optimizer step on the gradients that are there, and what follows it; whether it was made.

        Args:
            step: which one it is, from 1 to ``steps``. After the last one the plan is final.
        """
        made = update(self.fabric, self._wrapped, self._wrapped_optimizer, self._recipe.clip_norm)
        self.schedule.step()
        if self._average is not None:
            self._average.update()
            if step == self.steps:
                self._average.give()
        if self._ramp is not None and self.attachment is not None:
            risen = self._ramp.after(step)
            if risen is not None:
                self.attachment.replan(risen)
        if self._holder is not None and (step == self._settled or step == self.steps):
            self._same_buffers()
            self._holder.finish()
        elif self._holder is not None and self._held_from <= step < self._settled and step % self._every == 0:
            self._same_buffers()
            self._holder.adjust()
        return made

    def reestimate(self, batches: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
        """After the last step: estimate batch-norm statistics anew, of the network as it will ship."""
        self.publish()
        reestimate_batch_norm(self.network, batches, count)
        self.processes.average_buffers(self.network)
        buffers = dict(self.network.named_buffers())
        with torch.no_grad():
            for name, buffer in self.trained.named_buffers():
                buffer.copy_(buffers[name])
        if self._average is not None:
            self._average.take_buffers()
        if self._holder is not None:
            self._holder.finish()

    @torch.no_grad()
    def publish(self) -> nn.Module:
        """Make the network what would ship now, whole and alike in every process, and return it."""
        if self.trained is not self.network:
            state = self.trained.state_dict() if self._average is None else self._average.state
            self.network.load_state_dict(gathered(state))
            if self._average is not None and self.attachment is not None:
                trained = {n: p.detach() for n, p in self.network.named_parameters(remove_duplicate=False)}
                names = list(self.attachment.full_precision)
                plans = {name: self.attachment.plan.tensors[name] for name in names}
                quantizer = Quantizer([QuantizerEntry(n, t.pruning_rate, t.bits) for n, t in plans.items()])
                quantizer([trained[n] for n in names], [trained[n] for n in names])
                quantizer.check()
        self.processes.copy_from_first(list(self.network.buffers()))
        return self.network

    def state(self) -> dict[str, Any]:
        """All of it, whole, for a checkpoint; all processes must ask at once."""
        scaler = scaler_of(self.fabric)
        plan = self.plan
        return {
            "plan": None if plan is None else json.loads(plan.to_json()),
            "model": gathered(self.trained.state_dict()),
            "optimizer": gathered(self._optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "average": None if self._average is None else gathered(self._average.state_dict()),
            "random_states": self.processes.gather(random_states(self.fabric.device)),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """The rest of a state, once the network has its weights and is attached."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        named = dict(self.trained.named_parameters(remove_duplicate=False))
        optimizer = dict(state["optimizer"])
        optimizer["state"] = {i: scattered(s, parameters[i]) for i, s in optimizer["state"].items()}
        if STATE_KEY in optimizer:
            full = optimizer[STATE_KEY]["weights"]
            weights = {name: scattered(weight, named[name]) for name, weight in full.items()}
            optimizer[STATE_KEY] = optimizer[STATE_KEY] | {"weights": weights}
        self._optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(state["schedule"])
        scaler = scaler_of(self.fabric)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            average = state["average"]
            split = {n: scattered(t, named[n]) if n in named else t for n, t in average["state"].items()}
            self._average.load_state_dict({**average, "state": split})
        set_random_states(state["random_states"], self.processes.rank, self.fabric.device)

    def _same_buffers(self) -> None:
        """Ranks hold the file at its size each by itself, and must see the same bytes."""
        self.processes.copy_from_first(list(self.trained.buffers()))

    def end(self) -> None:
        """Give the plain network back."""
        if self.attachment is not None:
            self.attachment.detach()
