"""Whole files are read exactly; anything missing, damaged or out of range is one error that names the file."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipq.data import load_data, load_images
from clipq.data.files import read_idx
from clipq.errors import DataError
from tests.data.conftest import CIFAR10_BATCH_BYTES, write_idx

IMAGES, LABELS = "mnist/train-images-idx3-ubyte", "mnist/train-labels-idx1-ubyte"


def test_mnist_is_read_plain_and_gzipped_alike(mnist_root: Path) -> None:
    plain = load_images("mnist", mnist_root)
    for path in (mnist_root / "mnist").iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = load_images("mnist", mnist_root)
    assert plain.train.inputs.shape == (50, 1, 28, 28)
    assert plain.train.inputs.dtype == torch.uint8
    assert plain.train.targets.dtype == torch.int64
    assert torch.equal(plain.train.inputs, zipped.train.inputs)
    assert torch.equal(plain.test.targets, zipped.test.targets)


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_an_idx_file_gives_back_what_was_written(tmp_path: Path, shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape)
    write_idx(tmp_path / "file", array)
    assert np.array_equal(read_idx(tmp_path / "file", len(shape)).numpy(), array)


def test_cifar10_keeps_planes_and_order(cifar10_root: Path) -> None:
    path = cifar10_root / "cifar-10-batches-bin" / "data_batch_2.bin"
    with path.open("r+b") as file:
        file.seek(5 * 3073)
        file.write(bytes([7]) + bytes([1] * 1024 + [2] * 1024 + list(range(256)) * 4))
    train = load_images("cifar10", cifar10_root).train
    assert len(train) == 50_000
    assert train.targets[10_005] == 7
    assert train.targets.sum() == 7
    red, green, blue = train.inputs[10_005]
    assert bool((red == 1).all())
    assert bool((green == 2).all())
    assert blue.flatten().tolist() == list(range(256)) * 4


def test_the_real_sets_have_their_known_statistics(real_data: Path) -> None:
    mnist = load_images("mnist", real_data)
    pixels = mnist.train.inputs.double() / 255
    assert (len(mnist.train), len(mnist.test)) == (60_000, 10_000)
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    cifar = load_images("cifar10", real_data)
    assert cifar.train.targets.bincount().tolist() == [5000] * 10
    assert cifar.test.targets.bincount().tolist() == [1000] * 10


def test_the_environment_names_the_folder_and_the_argument_wins(
    mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPQ_DATA", str(mnist_root))
    assert len(load_images("mnist").train) == 50
    monkeypatch.setenv("CLIPQ_DATA", str(mnist_root / "nowhere"))
    assert len(load_images("mnist", mnist_root).train) == 50
    with pytest.raises(DataError, match=r"CLIPQ_DATA is .*nowhere, which is not a folder"):
        load_images("mnist")


def test_a_missing_file_is_named_with_the_way_out(mnist_root: Path) -> None:
    (mnist_root / LABELS).unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz: there is no such file.*--data-root"):
        load_data("mnist", mnist_root)


@pytest.mark.parametrize("keep", [0, 3, 15, 16, 1000, -1])
def test_a_truncated_idx_file_is_refused(mnist_root: Path, keep: int) -> None:
    path = mnist_root / IMAGES
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: [\d,]+ bytes.*get it again"):
        load_data("mnist", mnist_root)


def test_an_idx_file_with_more_than_it_announces_is_refused(mnist_root: Path) -> None:
    path = mnist_root / IMAGES
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="39,217 bytes; its header announces 50 × 28 × 28, so 39,216"):
        load_data("mnist", mnist_root)


def test_a_wrong_magic_number_is_refused(mnist_root: Path) -> None:
    path = mnist_root / IMAGES
    path.write_bytes(b"\x00\x00\x0d\x03" + path.read_bytes()[4:])
    with pytest.raises(DataError, match=r"0x00000d03.*0x00000803"):
        load_data("mnist", mnist_root)


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_gzip_file_is_refused(mnist_root: Path, damage: str) -> None:
    path = mnist_root / IMAGES
    zipped = bytearray(gzip.compress(path.read_bytes()))
    path.unlink()
    if damage == "cut":
        del zipped[len(zipped) // 2 :]
    elif damage == "flip":
        zipped[len(zipped) // 2] ^= 0xFF
    else:
        zipped[:] = b"<html>not found</html>"
    path.with_name(path.name + ".gz").write_bytes(zipped)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: not a whole gzip file"):
        load_data("mnist", mnist_root)


def test_images_and_labels_must_go_together(mnist_root: Path) -> None:
    write_idx(mnist_root / LABELS, np.zeros(49))
    with pytest.raises(DataError, match="49 labels for the 50 images"):
        load_data("mnist", mnist_root)


def test_an_empty_set_is_refused(mnist_root: Path) -> None:
    write_idx(mnist_root / IMAGES, np.zeros((0, 28, 28)))
    write_idx(mnist_root / LABELS, np.zeros(0))
    with pytest.raises(DataError, match="holds no images"):
        load_data("mnist", mnist_root)


def test_images_of_another_size_are_refused(mnist_root: Path) -> None:
    write_idx(mnist_root / IMAGES, np.zeros((50, 32, 32)))
    with pytest.raises(DataError, match="images are 32 × 32; MNIST's are 28 × 28"):
        load_data("mnist", mnist_root)


def test_a_label_out_of_range_is_named_with_its_position(mnist_root: Path) -> None:
    write_idx(mnist_root / LABELS, np.r_[np.zeros(17), 10, np.zeros(32)])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: label 10 at position 17 .* 0 to 9"):
        load_data("mnist", mnist_root)


def test_a_cifar10_batch_of_another_size_is_refused(cifar10_root: Path) -> None:
    path = cifar10_root / "cifar-10-batches-bin" / "data_batch_4.bin"
    os.truncate(path, CIFAR10_BATCH_BYTES - 3073)
    with pytest.raises(DataError, match=r"data_batch_4.bin: 30,726,927 bytes; .* has 30,730,000"):
        load_data("cifar10", cifar10_root)


def test_a_cifar10_label_out_of_range_is_refused(cifar10_root: Path) -> None:
    with (cifar10_root / "cifar-10-batches-bin" / "test_batch.bin").open("r+b") as file:
        file.seek(3 * 3073)
        file.write(b"\xff")
    with pytest.raises(DataError, match=r"test_batch.bin: label 255 at position 3 "):
        load_data("cifar10", cifar10_root)


def test_a_folder_in_place_of_a_file_is_refused(mnist_root: Path) -> None:
    (mnist_root / IMAGES).unlink()
    (mnist_root / IMAGES).mkdir()
    with pytest.raises(DataError, match="train-images-idx3-ubyte: cannot be read: Is a directory"):
        load_data("mnist", mnist_root)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'CIFAR-10'.*did you mean 'cifar10'.*digits, mnist, cifar10"):
        load_data("CIFAR-10")
