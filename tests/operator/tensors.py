"""Weight tensors of every kind that the operator accepts, for hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

pruning_rates = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.999]), st.floats(0, 1, exclude_max=True))
bit_widths = st.integers(1, 8)
dtypes = st.sampled_from(DTYPES)


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype, sizes: st.SearchStrategy[int]) -> Tensor:
    """A 1-D tensor: any values the dtype can hold, or one of the shapes of distribution that networks have."""
    size = draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["bits", "normal", "few", "subnormal", "one-sided", "constant", "zeros", "shifted"]))
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "bits":
        return _any_bits(size, dtype, generator)
    if kind == "normal":
        return (normal * 10.0 ** draw(st.integers(-4, 3))).to(dtype)
    if kind == "few":
        return (torch.randint(-4, 5, (size,), generator=generator).double() / 8).to(dtype)
    if kind == "subnormal":
        info = torch.finfo(dtype)
        return (normal * 20).round().to(dtype) * torch.tensor(info.tiny * info.eps, dtype=dtype)
    if kind == "one-sided":
        return (normal.abs() * draw(st.sampled_from([-1, 1]))).to(dtype)
    if kind == "constant":
        return torch.full((size,), draw(st.sampled_from([-0.3, 0.7, -0.0])), dtype=dtype)
    if kind == "shifted":
        return (normal * 1e-3 + draw(st.sampled_from([-1.0, 1.0]))).to(dtype)
    return torch.zeros(size, dtype=dtype)


def _any_bits(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    width = torch.finfo(dtype).bits
    integers = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    bits = torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator) >> (64 - width)
    values = bits.to(integers).view(dtype)
    return torch.where(torch.isfinite(values), values, torch.ones((), dtype=dtype))


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a floating-point tensor as integers: equal only if identical, -0 and all."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(width)
