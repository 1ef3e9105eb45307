"""Groups are named where a byte has another price than elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clipq import Target
from clipq.search import Settings, run_search
from clipq.search.remarks import HIGH, LOW, remarks


@pytest.mark.parametrize(
    ("bytes_of", "prices", "expected"),
    [
        ([100, 100, 100], [1.0, 2.0, 3.0], [None, None, None]),
        ([100, 100, 100], [1.0, 1.0, 0.1], [None, None, LOW]),
        ([100, 100, 100], [1.0, 1.0, -0.1], [None, None, LOW]),
        ([100, 100, 100], [1.0, 1.0, 6.0], [None, None, HIGH]),
        ([100, 100, 3], [1.0, 1.0, 0.0], [None, None, None]),
        ([100, 100, 100], [1.0, 1.0, math.nan], [None, None, None]),
        ([100], [1.0], [None]),
        ([1000, 10, 10], [1.0, 9.0, 9.0], [None, HIGH, HIGH]),
    ],
)
def test_groups_are_named_by_their_price(bytes_of: list[float], prices: list[float], expected: list[object]) -> None:
    assert list(remarks(bytes_of, prices)) == expected


def test_a_layer_that_the_cost_does_not_see_is_named() -> None:
    torch.manual_seed(0)
    names = ("first", "second", "unseen")
    model = nn.ModuleDict({name: nn.Linear(40, 40, bias=False) for name in names})
    x = torch.randn(64, 40)

    def output(m: nn.Module) -> Tensor:
        return torch.cat([m["first"](x), m["second"](x)])

    wanted = output(model).detach()
    quick = Settings(evaluations=3, refinements=0)
    record = run_search(model, lambda m: float((output(m) - wanted).square().mean()), Target(ratio=6), settings=quick)
    found = {group.name: group for group in record.groups}
    assert found["first.weight"].remark is found["second.weight"].remark is None
    unseen = found["unseen.weight"]
    assert unseen.remark == (LOW if unseen.share > 0.02 else None)
