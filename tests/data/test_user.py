"""A function of the user's is as good as a named set; what is wrong with it is said in one error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipq.data import Data, load_data
from clipq.errors import DataError

PREAMBLE = """
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

def pairs(n, label=lambda i: i % 3):
    return TensorDataset(torch.arange(n).float()[:, None, None, None].expand(n, 2, 3, 3),
                         torch.tensor([label(i) for i in range(n)]))
"""


def user_data(tmp_path: Path, body: str, workers: int = 0) -> Data:
    path = tmp_path / "mine.py"
    path.write_text(PREAMBLE + body)
    return load_data(f"{path}:make", workers=workers)


GOOD = "def make():\n    return pairs(23), pairs(7)"


def test_a_users_sets_give_batches_like_a_named_set(tmp_path: Path) -> None:
    data = user_data(tmp_path, GOOD)
    assert (len(data.train), len(data.validation), data.test, data.num_classes) == (23, 7, None, None)
    whole = data.batches("train", 5, seed=1, epoch=2, channels_last=True)
    first = next(whole)
    assert first[0].shape == (5, 2, 3, 3)
    assert first[0].is_contiguous(memory_format=torch.channels_last)
    assert first[1].dtype == torch.int64
    rest = list(whole)
    assert (whole.position, whole.total) == (5, 5)
    resumed = list(data.batches("train", 5, seed=1, epoch=2, start=1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, resumed, strict=True))
    order = torch.cat([inputs[:, 0, 0, 0] for inputs, _ in [first, *rest]])
    assert order.tolist() != list(range(23))
    assert sorted(order.tolist()) == list(range(23))
    assert torch.cat([inputs[:, 0, 0, 0] for inputs, _ in data.batches("validation", 3)]).tolist() == list(range(7))
    assert list(data.batches("train", 5, start=5)) == []


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    alone, with_workers = (list(user_data(tmp_path, GOOD, n).batches("train", 4, 3, 1)) for n in (0, 2))
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(alone, with_workers, strict=True))


def test_ranks_share_the_samples(tmp_path: Path) -> None:
    data = user_data(tmp_path, GOOD)
    ranks = [list(data.batches("train", 4, 3, 1, rank=rank, world_size=2)) for rank in range(2)]
    labels = [int(inputs[i, 0, 0, 0]) for rank in ranks for inputs, _ in rank for i in range(len(inputs))]
    assert len(labels) == len(set(labels)) == 22
    assert [len(rank) for rank in ranks] == [3, 3]


def test_a_negative_number_of_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the number of workers is -1; it must be 0"):
        user_data(tmp_path, GOOD, workers=-1)


def test_a_third_set_is_the_test_set_and_classes_are_taken_from_the_first(tmp_path: Path) -> None:
    data = user_data(
        tmp_path, "def make():\n    t = pairs(9)\n    t.classes = ['a', 'b', 'c']\n    return [t, pairs(4), pairs(5)]"
    )
    assert data.num_classes == 3
    assert data.test is not None
    assert sum(len(targets) for _, targets in data.batches("test", 2)) == 5


def test_a_file_can_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text(PREAMBLE)
    (tmp_path / "mine.py").write_text("from neighbour_of_mine import pairs\n" + GOOD)
    assert len(load_data(f"{tmp_path / 'mine.py'}:make").train) == 23


def test_labels_are_checked_against_the_networks_outputs(tmp_path: Path) -> None:
    data = user_data(tmp_path, "def make():\n    return pairs(40, lambda i: 3 if i == 31 else 0), pairs(4)")
    assert len(list(data.for_outputs(4).batches("train", 8))) == 5
    with pytest.raises(DataError, match=r"mine.py:make, training set, batch 3: label 3 at position 7 .* 0 to 2"):
        list(data.for_outputs(3).train.batches(8))


def test_a_named_set_needs_a_network_with_an_output_for_every_class() -> None:
    data = load_data("digits")
    assert data.for_outputs(10) is data
    with pytest.raises(DataError, match=r"'digits' has 10 classes .* the network has 9 outputs"):
        data.for_outputs(9)


def test_without_a_test_set_asking_for_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no part 'test'; use 'train' or 'validation'"):
        user_data(tmp_path, GOOD).batches("test", 4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make():\n    raise RuntimeError('no disk')", r"mine.py:make'.* raised RuntimeError: no disk"),
        ("def make(folder):\n    pass", "raised TypeError: .*without arguments"),
        ("def make():\n    pass", "returned a NoneType; it must return a pair"),
        ("def make():\n    return pairs(3)", "returned a TensorDataset; it must return a pair"),
        ("def make():\n    return (pairs(3),)", r"returned a tuple of 1 \(TensorDataset\)"),
        ("def make():\n    return pairs(3), 5", "validation set: a int has no length or no index"),
        (
            "class E(IterableDataset):\n    def __iter__(self): return iter([])\ndef make():\n    return E(), E()",
            "training set: a E has no length",
        ),
        (
            "def make():\n    return pairs(3), TensorDataset(torch.zeros(0), torch.zeros(0))",
            "validation set: it is empty",
        ),
        ("def make():\n    return ['ab', 'cd'], ['ab']", "its first sample is a str; each must be a pair"),
        ("def make():\n    return [(1, 2, 3)], []", r"its first sample is a tuple of 3 \(int, int, int\)"),
        ("def make():\n    return [(object(), 1)], []", r"\(object, int\), which torch cannot put into a batch"),
        ("def make():\n    return [(torch.zeros(2), 'cat')], []", "each must be a pair"),
        ("def make():\n    return [(torch.zeros(2), 0.5)], []", "labels are torch.float64 of shape .*whole number"),
        ("def make():\n    return [(torch.zeros(2), torch.zeros(3))], []", r"of shape \(1, 3\)"),
        (
            "class D(Dataset):\n    def __len__(self): return 3\ndef make():\n    return D(), D()",
            "raised NotImplementedError",
        ),
        ("import nothing_of_that_name\n" + GOOD, "raised ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def make(:\n", "raised SyntaxError"),
        ("import sys; sys.exit(3)\n" + GOOD, "raised SystemExit: 3"),
        ("def makes():\n    pass", r"mine.py has no 'make' \(did you mean 'makes'\?\)"),
        ("make = 3", "has a int, not a function, named 'make'"),
    ],
)
def test_a_function_that_gives_something_else_is_refused(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        user_data(tmp_path, body)


def test_a_sample_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    body = "class D(list):\n    def __getitem__(self, i):\n        return [(0.5, 1)][i]\n"
    data = user_data(tmp_path, body + "def make():\n    return D([0, 0]), D([0])")
    with pytest.raises(DataError, match=r"mine.py:make, training set: reading a sample raised IndexError"):
        list(data.batches("train", 2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:make", r"there is no file .*nowhere.py"),
        (":make", "not of the form 'file.py:function'"),
        ("mine.py:", "not of the form"),
        ("no_such_module:make", "importing module 'no_such_module' raised ModuleNotFoundError"),
        ("torch.utils.data:make", "torch.utils.data has no 'make'"),
    ],
)
def test_a_function_that_cannot_be_found_is_refused(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(spec)
