"""Differences between two models are all found, and measured."""

from __future__ import annotations

import math

import pytest
import torch

from clipq.compare import differences


def test_every_kind_of_difference_is_found() -> None:
    a = {
        "same": torch.randn(3),
        "gone": torch.ones(2),
        "shape": torch.ones(2, 3),
        "type": torch.ones(4),
        "n": torch.tensor(3),
    }
    b = {"same": a["same"].clone(), "new": torch.ones(2), "shape": torch.ones(3, 2), "type": torch.ones(4).half()}
    found = {d.name: d for d in differences(a, b | {"n": torch.tensor(4)})}
    assert {name: d.what for name, d in found.items()} == {
        "gone": "only in A", "shape": "shape", "type": "dtype", "n": "values", "new": "only in B",
    }  # fmt: skip
    assert (found["type"].a, found["type"].b, found["type"].count) == ("float32 (4,)", "float16 (4,)", 0)
    assert (found["n"].count, found["n"].max_abs, found["n"].relative) == (1, 1.0, pytest.approx(1 / 3))


def test_values_are_compared_bit_for_bit_and_measured() -> None:
    a = torch.zeros(3_000_000)
    a[7], b = 3.0, a.clone()
    b[7], b[2_999_999], b[1] = 3.5, float("nan"), -0.0
    (found,) = differences({"w": a}, {"w": b})
    assert (found.count, found.elements, found.max_abs, found.not_finite) == (3, 3_000_000, 0.5, 1)
    assert math.isclose(found.relative or 0, 0.5 / 3)
    assert not differences({"w": b}, {"w": b.clone()})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.complex64], ids=str)
def test_every_dtype_and_empty_tensors(dtype: torch.dtype) -> None:
    a, b = torch.zeros(4, 2).to(dtype), torch.zeros(4, 2).to(dtype)
    b[1, 1] = 1
    (found,) = differences({"w": a.T, "e": a[:0]}, {"w": b.T, "e": b[:0]})
    assert (found.count, found.max_abs, found.relative) == (1, 1.0, None)
