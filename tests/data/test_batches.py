"""An epoch is the same for the same seed, whole or resumed; and augmentation crops and mirrors, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq.data import CropAndFlip, Images, ImageSamples, Normalisation, load_data
from clipq.data.seeding import seeded_generator
from clipq.errors import DataError

PLAIN = Normalisation(1, (0.0,), (1.0,))


def numbered(n: int, size: int = 4, augmentation: CropAndFlip | None = None) -> ImageSamples:
    """Samples whose label is their index."""
    pixels = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSamples("numbered", Images(pixels, torch.arange(n)), PLAIN, augmentation)


def drawn(samples: ImageSamples, batch_size: int, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(samples.batches(batch_size, **options))


def same(first: list[tuple[torch.Tensor, torch.Tensor]], second: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True)
    )


sizes = st.integers(1, 60)


@given(n=sizes, batch_size=sizes, seed=st.integers(0, 99), epoch=st.integers(0, 99), shuffle=st.booleans())
def test_an_epoch_has_every_sample_once(n: int, batch_size: int, seed: int, epoch: int, shuffle: bool) -> None:
    samples = numbered(n)
    batches = drawn(samples, batch_size, seed=seed, epoch=epoch, shuffle=shuffle)
    assert sorted(torch.cat([targets for _, targets in batches]).tolist()) == list(range(n))
    assert {len(targets) for _, targets in batches[:-1]} <= {batch_size}
    for inputs, targets in batches:
        assert torch.equal(inputs, samples.images.inputs[targets].float())


@given(n=sizes, batch_size=sizes, data=st.data(), drop_last=st.booleans())
@settings(deadline=None)
def test_resuming_gives_the_rest_to_the_bit(n: int, batch_size: int, data: st.DataObject, drop_last: bool) -> None:
    samples = numbered(n, augmentation=CropAndFlip(2))
    options: dict[str, Any] = {
        "seed": 5,
        "epoch": 2,
        "shuffle": True,
        "augment": True,
        "drop_last": drop_last and n >= batch_size,
    }
    whole = samples.batches(batch_size, **options)
    stop = data.draw(st.integers(0, whole.total))
    for _ in range(stop):
        next(whole)
    assert whole.position == stop
    resumed = samples.batches(batch_size, **options, start=whole.position)
    assert (resumed.position, resumed.total) == (whole.position, whole.total)
    assert same(list(whole), list(resumed))
    assert resumed.position == resumed.total


def of_ranks(samples: ImageSamples, world_size: int, batch_size: int, **options: Any) -> list[list[Any]]:
    return [drawn(samples, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


@given(n=sizes, batch_size=st.integers(1, 20), world_size=st.integers(1, 5), epoch=st.integers(0, 9))
@settings(deadline=None)
def test_ranks_together_train_on_the_batches_of_one_process(
    n: int, batch_size: int, world_size: int, epoch: int
) -> None:
    options: dict[str, Any] = {"seed": 5, "epoch": epoch, "shuffle": True, "augment": True}
    samples = numbered(n, augmentation=CropAndFlip(2))
    if n < world_size:
        with pytest.raises(DataError, match=f"{n} samples do not go round {world_size} processes"):
            samples.batches(batch_size, **options, rank=0, world_size=world_size)
        return
    ranks = of_ranks(samples, world_size, batch_size, **options)
    whole = drawn(samples, batch_size * world_size, **options)
    left_over = n % (batch_size * world_size) % world_size
    if left_over and len(whole[-1][1]) == left_over:
        whole.pop()
    elif left_over and world_size > 1:  # fewer images draw other augmentations
        whole[-1] = (torch.cat([r[-1][0] for r in ranks]), whole[-1][1][:-left_over])
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert same(whole, together)  # type: ignore[arg-type]
    assert len({tuple(len(targets) for _, targets in rank) for rank in ranks}) == 1


@given(n=sizes, batch_size=st.integers(1, 20), world_size=st.integers(1, 5), start=st.integers(0, 3))
@settings(deadline=None)
def test_ranks_together_evaluate_every_sample_once(n: int, batch_size: int, world_size: int, start: int) -> None:
    ranks = of_ranks(numbered(n), world_size, batch_size)
    labels = [label for rank in ranks for _, targets in rank for label in targets.tolist()]
    assert sorted(labels) == list(range(n))
    lengths = [len(rank) for rank in ranks]
    assert max(lengths) - min(lengths) <= 1
    if start <= min(lengths):
        later = of_ranks(numbered(n), world_size, batch_size, start=start)
        assert all(same(rank[start:], rest) for rank, rest in zip(ranks, later, strict=True))


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none_is_refused(rank: int) -> None:
    with pytest.raises(DataError, match=f"numbered: rank {rank} of 2 processes"):
        numbered(5).batches(2, rank=rank, world_size=2)


def test_order_and_augmentation_depend_on_seed_and_epoch_alone() -> None:
    samples = numbered(500, augmentation=CropAndFlip(1))
    epochs = {}
    for seed in range(3):
        for epoch in range(3):
            torch.manual_seed(seed * epoch)  # the global generator has no say
            options = {"seed": seed, "epoch": epoch, "shuffle": True, "augment": True}
            first = drawn(samples, 100, **options)
            torch.rand(7)
            assert same(first, drawn(samples, 100, **options))
            epochs[tuple(torch.cat([targets for _, targets in first]).tolist())] = (seed, epoch)
    assert len(epochs) == 9


def test_drawing_batches_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    drawn(numbered(20, augmentation=CropAndFlip(1)), 8, shuffle=True, augment=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropping_the_last_batch_leaves_only_full_ones() -> None:
    assert [len(t) for _, t in drawn(numbered(25), 10, drop_last=True)] == [10, 10]
    assert [len(t) for _, t in drawn(numbered(20), 10, drop_last=True)] == [10, 10]
    with pytest.raises(DataError, match="numbered: 5 samples do not fill one batch of 6"):
        numbered(5).batches(6, drop_last=True)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises(DataError, match=f"the batch size is {batch_size}; it must be at least 1"):
        numbered(5).batches(batch_size)


@pytest.mark.parametrize("start", [-1, 4])
def test_a_start_outside_the_epoch_is_refused(start: int) -> None:
    with pytest.raises(DataError, match=f"cannot start at batch {start}; the epoch has 3"):
        numbered(5).batches(2, start=start)


def test_channels_last_changes_the_layout_alone() -> None:
    images = Images(torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8), torch.arange(8))
    samples = ImageSamples("colour", images, Normalisation(255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), CropAndFlip(1))
    (plain, _), (last, _) = (drawn(samples, 8, augment=True, channels_last=flag)[0] for flag in (False, True))
    assert torch.equal(plain, last)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_normalisation_is_scale_then_mean_then_deviation() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    expected = (pixels.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(Normalisation(255, mean, std)(pixels).double(), expected, atol=2e-6)
    assert torch.equal(Normalisation(256, (0.0,), (1.0,))(pixels), pixels.float() / 256)


def one_by_one(image: torch.Tensor, padding: int) -> set[bytes]:
    """Every image that the augmentation may give, made the slow way."""
    height, width = image.shape[1:]
    padded = torch.zeros(image.shape[0], height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    return {
        (crop.flip(2) if flip else crop).contiguous().numpy().tobytes()
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
        for crop in [padded[:, y : y + height, x : x + width]]
        for flip in (False, True)
    }


@given(padding=st.integers(0, 2), height=st.integers(2, 5), width=st.integers(2, 5), seed=st.integers(0, 99))
@settings(deadline=None)
def test_augmentation_gives_every_crop_and_mirror_image_and_no_other(
    padding: int, height: int, width: int, seed: int
) -> None:
    pixels = torch.arange(1, 2 * height * width + 1, dtype=torch.uint8).view(1, 2, height, width)
    many = CropAndFlip(padding)(pixels.expand(800, -1, -1, -1).contiguous(), seeded_generator("test", seed))
    assert many.shape == (800, 2, height, width)
    assert {image.numpy().tobytes() for image in many} == one_by_one(pixels[0], padding)


def test_augmentation_leaves_its_input_alone_and_is_for_training_only() -> None:
    samples = numbered(40, augmentation=CropAndFlip(2))
    before = samples.images.inputs.clone()
    augmented = drawn(samples, 40, augment=True)[0][0]
    assert not torch.equal(augmented, before.float())
    assert torch.equal(samples.images.inputs, before)
    assert torch.equal(drawn(samples, 40)[0][0], before.float())


def test_of_the_parts_only_the_training_set_is_shuffled() -> None:
    data = load_data("digits")
    in_order = list(data.train.batches(64))
    assert not same(list(data.batches("train", 64)), in_order)
    assert same(list(data.batches("train", 64, 1, 2)), list(data.train.batches(64, seed=1, epoch=2, shuffle=True)))
    assert same(list(data.batches("validation", 64, 1, 2)), list(data.validation.batches(64)))
    assert data.test is not None
    assert same(list(data.batches("test", 64, 1, 2)), list(data.test.batches(64)))


def test_cifar10_trains_augmented_and_is_evaluated_as_it_is(cifar10_root: Any) -> None:
    data = load_data("cifar10", cifar10_root)
    for part, augmentation in (("train", CropAndFlip(4)), ("validation", None), ("test", None)):
        samples = getattr(data, part)
        assert isinstance(samples, ImageSamples)
        assert samples.augmentation == augmentation
