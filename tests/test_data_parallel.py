"""Several processes agree without talking: clipq sends nothing, and the ranks stay equal bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import run_processes
from tests.zoo import KINDS

pytestmark = pytest.mark.slow


def test_two_ranks_end_with_equal_bits_whatever_their_hash_seed(tmp_path: Path) -> None:
    run_processes("tests.workers.data_parallel", [str(tmp_path)], 2, seconds=240)
    for number, kind in enumerate(KINDS):
        one, two = (torch.load(tmp_path / f"{number}.{rank}.pt", weights_only=True) for rank in range(2))
        for part in ("quantized", "full"):
            assert one[part].keys() == two[part].keys()
            for name in one[part]:
                assert torch.equal(one[part][name], two[part][name]), (kind, part, name)
