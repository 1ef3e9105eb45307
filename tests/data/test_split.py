"""What is held out is a fair share of every class, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipq.data import load_data, load_images, stratified_split
from clipq.errors import DataError

labels = st.lists(st.integers(0, 6), min_size=2, max_size=200).map(torch.tensor)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**40)


@given(labels, fractions, seeds)
def test_the_two_parts_make_up_the_whole(targets: torch.Tensor, fraction: float, seed: int) -> None:
    kept, held = stratified_split(targets, fraction, seed)
    assert torch.cat([kept, held]).sort().values.tolist() == list(range(len(targets)))
    assert len(held) == min(max(round(fraction * len(targets)), 1), len(targets) - 1)


@given(labels, fractions, seeds)
def test_every_class_gives_its_share_up_to_one(targets: torch.Tensor, fraction: float, seed: int) -> None:
    _, held = stratified_split(targets, fraction, seed)
    counts, held_counts = (t.bincount(minlength=7).double() for t in (targets, targets[held]))
    assert bool(((held_counts - fraction * counts).abs() < 1 + 1e-9).all())


@given(labels, fractions, seeds)
def test_the_same_seed_gives_the_same_split(targets: torch.Tensor, fraction: float, seed: int) -> None:
    first, second = (stratified_split(targets, fraction, seed) for _ in range(2))
    assert torch.equal(first[1], second[1])


def test_another_seed_gives_another_split() -> None:
    targets = torch.arange(1000) % 10
    splits = {tuple(stratified_split(targets, 0.1, seed)[1].tolist()) for seed in range(5)}
    assert len(splits) == 5


def test_every_sample_has_the_same_chance_to_be_held_out() -> None:
    targets = torch.tensor([0] * 10 + [1] * 10)
    times = torch.zeros(20)
    for seed in range(500):
        times[stratified_split(targets, 0.5, seed)[1]] += 1
    assert bool(((times - 250).abs() < 60).all())  # 5 standard deviations


def test_the_parts_of_digits_share_no_image_and_leave_the_test_part_alone() -> None:
    whole = load_images("digits")
    assert len(whole.train) + len(whole.test) == 1797
    for seed in (0, 1):
        data = load_data("digits", seed=seed)
        assert data.test is not None
        (test_inputs, _), *rest = data.test.batches(1000)
        assert rest == []
        assert torch.equal(test_inputs, whole.normalisation(whole.test.inputs))
        assert len(data.train) + len(data.validation) == len(whole.train)
        assert len(data.validation) == round(0.1 * len(whole.train))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=f"is {fraction}; it must be above 0 and below 1"):
        load_data("digits", validation_fraction=fraction)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples_are_refused(n: int) -> None:
    with pytest.raises(DataError, match=f"a set of {n} samples"):
        stratified_split(torch.zeros(n, dtype=torch.int64), 0.5, 0)
