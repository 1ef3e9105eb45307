"""`torch.ops.clipq.quantize`: the operator as torch's own operators are, in eager, compiled and exported code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipq.errors import WeightError
from clipq.operator import clip_quantize, quantize
from tests.operator.tensors import DTYPES, bits_of

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(6, 8),
    "channels_last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(6, 8).t(),
    "every other column": lambda: torch.randn(6, 8)[:, ::2],
    "expanded": lambda: torch.randn(1, 8).expand(6, 8),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_a_well_formed_operator_of_torch(dtype: torch.dtype, layout: str) -> None:
    for requires_grad in (False, True):
        weight = LAYOUTS[layout]().to(dtype).detach().requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.clipq.quantize, (weight, 0.5, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_bits_of_the_reference(dtype: torch.dtype, layout: str) -> None:
    weight = LAYOUTS[layout]().to(dtype)
    expected = clip_quantize(weight, 0.5, 3).quantized
    for ours in (quantize(weight, 0.5, 3), torch.ops.clipq.quantize(weight, 0.5, 3)):
        assert torch.equal(bits_of(ours), bits_of(expected))


class StraightThrough(nn.Module):
    """A linear layer that is quantized inside its own forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, quantize(self.weight * 2, 0.5, 2)).relu()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph_it_trains_as_in_eager_code(dynamic: bool) -> None:
    model, twin = StraightThrough(), StraightThrough()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for batch in (3, 4):
        x = torch.randn(batch, 7)
        for forward, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            forward(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.weight, twin.weight)


def test_the_gradient_passes_straight_through() -> None:
    weight = torch.randn(30, requires_grad=True)
    gradient = torch.randn(30)
    quantize(weight, 0.9, 1).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_an_exported_program_keeps_it_as_one_operator() -> None:
    model, x = StraightThrough(), torch.randn(3, 7)
    program = torch.export.export(model, (x,))
    assert torch.ops.clipq.quantize.default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(x), model(x))


def test_bad_input_is_refused_also_while_tracing() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(WeightError, match=r"1 of 2 weights are NaN or Inf, the first at \(1,\)"):
        quantize(torch.tensor([1.0, torch.nan], device=device), 0.5, 3)
    with pytest.raises(WeightError, match=r"pruning rate 1\.5 is out of range"):
        quantize(torch.ones(2), 1.5, 3)
    with pytest.raises(WeightError, match="a strided tensor of int64 cannot be quantized"):
        quantize(torch.ones(2, dtype=torch.int64, device="meta"), 0.5, 3)
