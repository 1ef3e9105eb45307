"""One process of several that share a model's tensors: each check is a function; says which of them failed, and how.

Run with the folder to work in and, to run only some, the names of checks.
"""

from __future__ import annotations

import copy
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import clipq
from clipq.errors import AttachError, PlanError, WeightError
from clipq.files import round_rest
from clipq.finetune.processes import leave
from clipq.hold import file_bytes
from clipq.operator import Quantizer, QuantizerEntry
from clipq.operator.reference import clip_quantize
from tests.operator.tensors import DTYPES, bits_of
from tests.zoo import build, train_step

CHECKS: dict[str, Callable[[Path], None]] = {}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


class Net(nn.Module):
    """Layers whose first dimension no number of processes divides, and that are shorter than four processes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 7, 3, padding=1)
        self.hidden = nn.Linear(7, 13)
        self.narrow = nn.Linear(13, 3)
        self.head = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.narrow(torch.relu(self.hidden(torch.relu(self.conv(x)).mean((2, 3)))))))


def net(seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    return Net(), torch.randn(5, 2, 6, 6)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model: nn.Module) -> nn.Module:
    for child in model.children():
        fully_shard(child, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def plan_of(model: nn.Module) -> clipq.Plan:
    return clipq.Plan.uniform(model, pruning_rate=0.4, bits=2).override({"hidden.*": {"bits": 3}})


def attached(model: nn.Module, kind: str = "SGD") -> tuple[torch.optim.Optimizer, clipq.Attachment]:
    optimizer = OPTIMIZERS[kind](model.parameters())
    return optimizer, clipq.attach(model, optimizer, plan_of(model))


def whole(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_same(ours: Tensor, theirs: Tensor, what: object = "") -> None:
    ours, theirs = whole(ours), whole(theirs)
    assert ours.shape == theirs.shape, what
    assert torch.equal(bits_of(ours), bits_of(theirs)), what


def assert_same_state(a: tuple[nn.Module, clipq.Attachment], b: tuple[nn.Module, clipq.Attachment]) -> None:
    for name, parameter in a[0].named_parameters():
        assert_same(parameter, b[0].get_parameter(name), name)
    for name, weight in a[1].full_precision.items():
        assert_same(weight, b[1].full_precision[name], name)


def raises(kind: type[Exception], part: str, action: Callable[[], object]) -> None:
    with pytest.raises(kind, match=re.escape(part)):
        action()


@check
def training_is_that_of_one_process(folder: Path) -> None:
    for kind in OPTIMIZERS:
        one, x = net()
        many = sharded(net()[0])
        one_optimizer, one_attachment = attached(one, kind)
        many_optimizer, many_attachment = attached(many, kind)
        assert all(isinstance(w, DTensor) for w in many_attachment.full_precision.values())
        for _ in range(4):
            train_step(one, one_optimizer, x)
            train_step(many, many_optimizer, x)  # each process has the same batch, so their mean is that of one
            assert_same_state((many, many_attachment), (one, one_attachment))
        many(x)  # leaves the outer parameters gathered
        plan = plan_of(one).override({"*": {"pruning_rate": 0.7}})
        many_attachment.replan(plan)
        one_attachment.replan(plan)
        assert_same_state((many, many_attachment), (one, one_attachment))
        for _ in range(2):
            train_step(one, one_optimizer, x)
            train_step(many, many_optimizer, x)
        for attachment in (one_attachment, many_attachment):
            attachment.detach()
        assert_same(many.head.weight, one.head.weight)


@check
def frozen_layers_tied_weights_and_a_closure(folder: Path) -> None:
    one, x = build("tied")
    many = fully_shard(build("tied")[0], mesh=mesh())
    states = []
    for model in (one, many):
        model.body.requires_grad_(False)
        optimizer, attachment = attached_to_all(model)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        states.append((model, attachment))
    assert_same_state(states[1], states[0])


def attached_to_all(model: nn.Module) -> tuple[torch.optim.Optimizer, clipq.Attachment]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return optimizer, clipq.attach(model, optimizer, clipq.Plan.uniform(model, pruning_rate=0.3, bits=2))


def tensors(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Tensors to try the operator on; the same in every process."""
    normal = torch.randn(37, 11, generator=generator, dtype=torch.float64)
    return [
        (normal * 0.02).to(dtype),
        (normal.abs() * -3).to(dtype),
        torch.randint(-3, 4, (5, 30), generator=generator).to(dtype) / 8,
        torch.full((3, 4), 0.7, dtype=dtype),
        torch.zeros(6, 2, dtype=dtype),
        torch.zeros(0, 2, dtype=dtype),
        torch.cat([normal.flatten() * 1e-3, torch.tensor([1e4], dtype=torch.float64)]).to(dtype)[:, None],
        (torch.randn(60_001, 2, generator=generator, dtype=torch.float64) * 0.02).to(dtype),
    ]


@check
def any_placement_has_the_bits_of_one_process(folder: Path) -> None:
    world = dist.get_world_size()
    square = init_device_mesh("cpu", (2, world // 2))
    placed: list[tuple[DeviceMesh, list[Placement]]] = [
        (mesh(), [Shard(0)]),
        (mesh(), [Shard(1)]),
        (mesh(), [Replicate()]),
        (square, [Replicate(), Shard(0)]),
        (square, [Shard(0), Shard(1)]),
        (square, [Shard(1), Replicate()]),
    ]
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        hyperparameters = list(zip([0.9, 0.5, 0.0, 0.3, 0.999, 0.5, 0.25, 0.9], range(1, 9), strict=True))
        entries = [QuantizerEntry(f"{i}", p, b) for i, (p, b) in enumerate(hyperparameters)]
        quantizers = [Quantizer(entries) for _ in placed]
        start = tensors(generator, dtype)
        for drift in (0.0, 1e-3, 0.7):  # from a threshold that stays where it was to one that jumps
            step = [(w.double() * (1 + drift)).to(dtype) for w in start]
            expected = [clip_quantize(w, p, b).quantized for w, (p, b) in zip(step, hyperparameters, strict=True)]
            for quantize, (where, placements) in zip(quantizers, placed, strict=True):
                split = [distribute_tensor(w, where, placements) for w in step]
                out = [torch.empty_like(w) for w in split]
                quantize(split, out)
                for i, (w, q, right) in enumerate(zip(split, out, expected, strict=True)):
                    assert_same(q, right, (dtype, placements, i))
                    again = torch.zeros_like(w)
                    if dist.get_rank() == 0:
                        quantize.recall(i, w, again)  # alone
                        assert torch.equal(bits_of(again.to_local()), bits_of(q.to_local()))


@check
def split_whole_and_differently_split_tensors_in_one_plan(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(9, 4, generator=generator) for _ in range(3)]
    bfloat16 = weights[0].bfloat16()
    square = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    given = [
        distribute_tensor(weights[0], mesh(), [Shard(0)]),
        weights[1],
        distribute_tensor(weights[2], square, [Shard(1), Replicate()]),
        distribute_tensor(bfloat16, mesh(), [Shard(0)]),
    ]
    out = [torch.empty_like(w) for w in given]
    Quantizer([QuantizerEntry(str(i), 0.5, 2) for i in range(4)])(given, out)
    for w, q in zip([*weights, bfloat16], out, strict=True):
        assert_same(q, clip_quantize(w, 0.5, 2).quantized)


@check
def the_file_is_that_of_one_process(folder: Path) -> None:
    one, x = net()
    many = sharded(net()[0])
    (one_optimizer, one_attachment), (many_optimizer, many_attachment) = attached(one), attached(many)
    for _ in range(2):
        train_step(one, one_optimizer, x)
        train_step(many, many_optimizer, x)
    path = folder / "many.clipq"
    report = clipq.save(many, path, plan=many_attachment.plan, bfloat16_rest=True)
    dist.barrier()
    alone = clipq.save(one, folder / f"one{dist.get_rank()}.clipq", plan=one_attachment.plan, bfloat16_rest=True)
    assert report == alone
    assert path.read_bytes() == (folder / f"one{dist.get_rank()}.clipq").read_bytes()
    loaded = clipq.load(path, sharded(net(seed=1)[0]))
    for name, tensor in clipq.load(path, net(seed=1)[0]).named_parameters():
        assert_same(loaded.get_parameter(name), tensor, name)
    raises(clipq.ClipqError, "cannot be written", lambda: clipq.save(many, folder / "no folder" / "many.clipq"))

    finished = file_bytes(many, many_attachment.plan, finish=round_rest)
    assert finished == file_bytes(one, one_attachment.plan, finish=round_rest) == path.stat().st_size
    wanted = round(0.8 * file_bytes(one, one_attachment.plan))
    holders = [
        clipq.SizeHolder(model, attachment, wanted)
        for model, attachment in ((one, one_attachment), (many, many_attachment))
    ]
    assert holders[0].adjust() == holders[1].adjust()
    assert holders[0].finish() == holders[1].finish()
    assert many_attachment.plan == one_attachment.plan
    assert_same_state((many, many_attachment), (one, one_attachment))


@check
def a_tied_weight_is_stored_once(folder: Path) -> None:
    one, _ = build("tied")
    many = fully_shard(build("tied")[0], mesh=mesh())
    assert file_bytes(many, plan_of_tied(one)) == file_bytes(one, plan_of_tied(one))


def plan_of_tied(model: nn.Module) -> clipq.Plan:
    return clipq.Plan.uniform(model, pruning_rate=0.3, bits=2)


@check
def checkpoints_keep_the_full_precision_weights(folder: Path) -> None:
    many, x = sharded(net()[0]), net()[1]
    optimizer, attachment = attached(many, "AdamW")
    for _ in range(2):
        train_step(many, optimizer, x)
    model_state, optimizer_state = get_state_dict(many, optimizer)
    path = str(folder / "checkpoint")
    dcp.save({"model": model_state, "optimizer": optimizer_state, "clipq": attachment}, checkpoint_id=path)
    kept = {name: whole(weight).clone() for name, weight in attachment.full_precision.items()}
    train_step(many, optimizer, x)

    again = sharded(net(seed=1)[0])
    again_optimizer, again_attachment = attached(again, "AdamW")
    model_state, optimizer_state = get_state_dict(again, again_optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state, "clipq": again_attachment}, checkpoint_id=path)
    set_state_dict(again, again_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for name, weight in again_attachment.full_precision.items():
        assert_same(weight, kept[name], name)
    train_step(again, again_optimizer, x)
    assert_same_state((again, again_attachment), (many, attachment))

    state = copy.deepcopy(optimizer.state_dict())  # torch's own, whole, on the same processes
    third = sharded(net(seed=2)[0])
    third_optimizer, third_attachment = attached(third, "AdamW")
    third.load_state_dict(many.state_dict())
    third_optimizer.load_state_dict(state)
    train_step(many, optimizer, x)
    train_step(third, third_optimizer, x)
    assert_same_state((third, third_attachment), (many, attachment))
    other = plan_of(many).override({"head.*": {"bits": 5}})
    attachment.replan(other)
    raises(AttachError, "another plan", lambda: attachment.load_state_dict(third_attachment.state_dict()))


@check
def weights_written_in_some_processes_only_become_the_full_precision_weights(folder: Path) -> None:
    many, x = sharded(net()[0]), net()[1]
    optimizer, attachment = attached(many)
    train_step(many, optimizer, x)
    for group in optimizer.param_groups:
        group |= {"lr": 0.0, "momentum": 0.0}
    before = whole(attachment.full_precision["hidden.weight"]).clone()
    with torch.no_grad():
        if dist.get_rank() == 0:
            many.hidden.weight.to_local()[0, 0] = 7.0
        many.conv.weight.copy_(many.conv.weight)  # put back: changes nothing
    conv = whole(attachment.full_precision["conv.weight"]).clone()
    train_step(many, optimizer, x)
    before[0, 0] = 7.0
    assert_same(attachment.full_precision["hidden.weight"], before)
    assert_same(attachment.full_precision["conv.weight"], conv)
    assert_same(many.hidden.weight, clip_quantize(before, 0.4, 3).quantized)


@check
def nan_in_one_process_is_told_in_all(folder: Path) -> None:
    many, x = sharded(net()[0]), net()[1]
    optimizer, _ = attached(many)
    many(x).square().mean().backward()
    if dist.get_rank() == 0:
        many.hidden.weight.grad.to_local()[0, 0] = torch.nan
    part = "1 of" if dist.get_rank() == 0 else "weights in another process are NaN or Inf"
    raises(WeightError, f"hidden.weight: {part}", optimizer.step)


@check
def different_plans_are_told_in_all(folder: Path) -> None:
    many = sharded(net()[0])
    plan = plan_of(many)
    if dist.get_rank() == dist.get_world_size() - 1:
        plan = plan.override({"head.*": {"bits": 5}})
    before = whole(many.head.weight).clone()
    optimizer = torch.optim.SGD(many.parameters(), lr=0.1)
    last = dist.get_world_size() - 1
    expected = f"head.weight: pruning rate 0.4 and 2 bits on rank 0, pruning rate 0.4 and 5 bits on rank {last}"
    raises(PlanError, expected, lambda: clipq.attach(many, optimizer, plan))
    assert_same(many.head.weight, before)


@check
def what_cannot_be_quantized_is_refused_by_name(folder: Path) -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(DTensor.from_local(model.weight.detach(), mesh(), [Partial()]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    raises(
        WeightError,
        "weight: is a DTensor placed as P(sum)",
        lambda: clipq.attach(model, optimizer, plan_of_tied(model)),
    )
    many = net()[0]
    early = torch.optim.SGD(many.parameters(), lr=0.1)
    sharded(many)
    raises(AttachError, "make the optimizer after", lambda: clipq.attach(many, early, plan_of(many)))


@check
def plain_data_parallel_training_sends_nothing_of_ours(folder: Path) -> None:
    """By the process group's own count of collectives."""

    def sent(with_clipq: bool) -> int:
        model, x = net()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        group = dist.distributed_c10d._get_default_group()
        before = group._get_sequence_number_for_group()
        attachment = clipq.attach(parallel, optimizer, plan_of(model)) if with_clipq else None
        for _ in range(3):
            train_step(parallel, optimizer, x)
        if attachment is not None:
            holder = clipq.SizeHolder(model, attachment, 10_000)
            holder.adjust()
            attachment.detach()
            clipq.save(model, folder / f"parallel{dist.get_rank()}.clipq")
        return group._get_sequence_number_for_group() - before

    assert sent(with_clipq=True) == sent(with_clipq=False) > 0


@check
def a_step_sends_counts_and_sums_only(folder: Path) -> None:
    many, x = sharded(net()[0]), net()[1]
    optimizer, attachment = attached(many)
    sizes: list[int] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert not tensor.is_floating_point()
        sizes.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    for _ in range(3):
        many(x).square().mean().backward()
        group = dist.distributed_c10d._get_default_group()
        before = group._get_sequence_number_for_group()
        sizes.clear()
        dist.all_reduce = counted
        try:
            optimizer.step()
        finally:
            dist.all_reduce = original
        assert len(sizes) <= 6, "the largest, a few passes, the sums"
        assert sum(sizes) <= 5 * 8400 * len(attachment.plan.tensors)
        assert group._get_sequence_number_for_group() - before <= len(sizes)
        optimizer.zero_grad()


@check
def triton_kernels_have_the_bits_of_one_process(folder: Path) -> None:
    from clipq.operator.gpu import GpuQuantizer
    from clipq.operator.split import part_of

    generator = torch.Generator().manual_seed(0)
    hyperparameters = [(0.9, 3), (0.0, 1), (0.5, 1), (0.3, 4)]
    entries = [QuantizerEntry(str(i), p, b) for i, (p, b) in enumerate(hyperparameters)]
    quantize = GpuQuantizer(entries, torch.device("cpu"))
    sizes = [(150, 160), (1, 5), (7, 9), (33, 2)]
    start = [torch.randn(*size, generator=generator) * 0.02 for size in sizes]
    start[3] = start[3].bfloat16()
    for drift in (0.0, 0.3):
        step = [(w.double() * (1 + drift)).to(w.dtype) for w in start]
        split = [distribute_tensor(w, mesh(), [Shard(0)]) for w in step]
        parts = [part_of(w, "layer") for w in split]
        parts[2] = part_of(step[2], "layer")  # one of them is not split
        out = [torch.empty_like(p.local) for p in parts]
        quantize(range(4), parts, out)
        quantize.check()
        for i, (w, q, (p, b)) in enumerate(zip(split, out, hyperparameters, strict=True)):
            expected = clip_quantize(step[i], p, b).quantized
            here = expected if i == 2 else distribute_tensor(expected, w.device_mesh, w.placements).to_local()
            assert torch.equal(bits_of(q), bits_of(here)), i
            again = torch.empty_like(q)
            quantize.recall(i, parts[i].local.clone(), again)
            assert torch.equal(bits_of(again), bits_of(q)), i
    with torch.no_grad():
        if dist.get_rank() == 0:
            parts[0].local[0, 0] = torch.nan
    quantize(range(4), parts, out)
    raises(WeightError, "0: had NaN or Inf", quantize.check)


def main(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=4))
    for name in names or [name for name in CHECKS if not name.startswith("triton")]:
        failure = ""
        try:
            CHECKS[name](folder)
        except Exception:
            failure = f"{name}, rank {dist.get_rank()}:\n{traceback.format_exc()}"
        failures = [""] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        if any(failures):
            sys.exit("\n".join(failures))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
