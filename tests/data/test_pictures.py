"""Image folders and shards give the same pictures, each once, whoever asks for them; damaged ones are named."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from aiohttp import web

from clipq.data import Data, PictureSamples, load_data, stored
from clipq.data.stored import file_system
from clipq.errors import DataError

pytest.importorskip("torchvision", reason="needs torchvision: pip install 'clipq[vision]'")

from tests.data.pictures import CLASSES, LISTED, write_folder, write_list, write_shard

SMALL = "image_size: 16\nclasses: classes.txt\n"
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with 21 pictures of three classes as a folder and as three shards, and a list of five classes."""
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv("CLIPQ_DATA", raising=False)
    samples = write_folder(tmp_path / "folder")
    for i, (first, last) in enumerate([(0, 4), (4, 15), (15, 21)]):
        write_shard(tmp_path / f"shard-{i:02}.tar", samples[first:last], first)
    write_list(tmp_path / "classes.txt")
    return tmp_path


def described(folder: Path, text: str, **options: Any) -> Data:
    (folder / "data.yaml").write_text(SMALL + text)
    return load_data(str(folder / "data.yaml"), **options)


def train(data: Data, batch_size: int = 4, **options: Any) -> Pairs:
    return list(data.batches("train", batch_size, 3, 1, **options))


def same(first: Pairs, second: Pairs) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(first, second, strict=True)
    )


def joined(batches: Pairs) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("place", ["shard-{00..02}.tar", "shard-*.tar"])
def test_shards_give_what_the_folder_gives(root: Path, place: str) -> None:
    folder, shards = (described(root, f"train: {where}\ntest: {where}") for where in ("folder", place))
    assert (len(folder.train), len(folder.validation), folder.num_classes) == (19, 2, len(LISTED))
    assert folder.test is not None
    for part in ("train", "validation", "test"):
        assert same(list(folder.batches(part, 4, 3, 1)), list(shards.batches(part, 4, 3, 1)))
    inputs, targets = joined(list(folder.batches("test", 4)))
    assert (inputs.shape, inputs.dtype) == ((21, 3, 16, 16), torch.float32)
    assert targets.tolist() == [LISTED.index(name) for name in CLASSES for _ in range(7)]


def test_any_fsspec_url_will_do(root: Path) -> None:
    local = described(root, "train: folder")
    memory = fsspec.filesystem("memory")
    for path in [*root.glob("folder/*/*"), *root.glob("shard*"), root / "classes.txt"]:
        memory.pipe_file(f"/pictures/{path.relative_to(root)}", path.read_bytes())
    for place in ("folder", "shard-{00..02}.tar"):
        assert same(train(local), train(described(root, f"train: {place}", root="memory://pictures")))
        assert same(train(local), train(described(root, f"train: memory://pictures/{place}")))


@pytest.fixture
def served(root: Path) -> Iterator[str]:
    """The address of a server of the data root that gives ranges of bytes."""
    ready, loop = queue.Queue[int](), asyncio.new_event_loop()

    async def serve() -> None:
        application = web.Application()
        application.router.add_static("/", root)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready.put(runner.addresses[0][1])

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run)
    thread.start()
    yield f"http://127.0.0.1:{ready.get(timeout=10)}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_worker_processes_read_from_a_server(root: Path, served: str) -> None:
    local = described(root, "train: shard-{00..02}.tar")
    for workers in (0, 2):
        data = described(root, "train: shard-{00..02}.tar", root=served, workers=workers)
        assert same(train(local), train(data))


def test_neither_batch_size_nor_workers_nor_ranks_change_a_picture(root: Path) -> None:
    data = described(root, "train: folder", validation_fraction=0.2)
    whole = train(data)
    inputs, targets = joined(whole)
    assert len(targets) == 17
    for other in (train(data, 5), train(described(root, "train: folder", validation_fraction=0.2, workers=2))):
        assert all(torch.equal(a, b) for a, b in zip(joined(other), (inputs, targets), strict=True))
    ranks = [train(data, 2, rank=rank, world_size=2) for rank in range(2)]
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert torch.equal(joined(together)[0], inputs[:16])  # type: ignore[arg-type]


def test_augmentation_is_new_in_each_epoch_and_leaves_the_global_generator_alone(root: Path) -> None:
    data = described(root, "train: folder")
    before = torch.get_rng_state()
    first, again, other = (
        dict(zip(*(t.tolist() for t in (targets, inputs.sum((1, 2, 3)))), strict=True))
        for epoch in (0, 0, 1)
        for inputs, targets in [joined(list(data.batches("train", 19, 0, epoch)))]
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other


def test_a_start_reads_nothing_of_what_lies_before(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = described(root, "train: shard-*.tar")
    whole = train(data)
    read: list[int] = []
    original = stored.StoredImages.read
    monkeypatch.setattr(
        stored.StoredImages, "read", lambda self, indices: read.extend(indices) or original(self, indices)
    )
    assert same(train(data, start=3), whole[3:])
    assert len(read) == 19 - 12


def test_damaged_pictures_are_left_out_counted_and_named(root: Path) -> None:
    (root / "folder/cat/002.png").write_bytes(b"no picture")
    whole = (root / "folder/eel/005.png").read_bytes()
    (root / "folder/eel/005.png").write_bytes(whole[: len(whole) // 2])
    data = described(root, "train: folder\ntest: folder\nmax_corrupt: 2", workers=1)
    assert isinstance(data.test, PictureSamples)
    with pytest.warns(UserWarning, match=r"test set: (cat/002|eel/005).png is left out \(.*\); [12] so far") as told:
        found = joined(list(data.batches("test", 6)))
    assert len(told) == len(data.test.corrupt) == 2
    assert len(found[1]) == 19
    list(data.batches("test", 6))  # a second time they are not counted again
    (root / "folder/dog/001.png").unlink()
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"3 pictures cannot be used, and max_corrupt is 2: "),
    ):
        list(data.batches("test", 6))


def test_what_the_storage_fails_to_give_is_asked_for_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = described(root, "train: folder")
    whole = train(data)
    system = file_system(str(root))
    original, broken = system.cat_file, itertools.cycle([True, False, True])

    def cat_file(path: str, *args: Any, **options: Any) -> bytes:
        if next(broken):
            raise ConnectionResetError(path)
        content: bytes = original(path, *args, **options)
        return content

    monkeypatch.setattr(stored, "PAUSES", (0, 0, 0, 0, 0, 0))
    monkeypatch.setattr(stored, "file_system", lambda url: system)
    monkeypatch.setattr(system, "cat_file", cat_file)
    assert same(train(data), whole)
    monkeypatch.setattr(stored, "PAUSES", ())
    with pytest.warns(UserWarning, match="ConnectionResetError"):
        assert len(joined(train(data, 19))[1]) < 19


def test_a_batch_without_any_picture_is_an_error(root: Path) -> None:
    for path in root.glob("folder/cat/00[0-3].png"):
        path.write_bytes(b"")
    data = described(root, "train: folder\ntest: folder")
    message = r"no picture of batch 0 can be used: cat/000.png \(no format that Pillow knows\); "
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match=message):
        list(data.batches("test", 4))


def test_the_index_of_a_shard_is_kept_until_the_shard_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    original = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **options: opened.append(args) or original(*args, **options))
    first = train(described(root, "train: shard-*.tar"))
    assert len(opened) == 3
    assert same(first, train(described(root, "train: shard-*.tar")))
    assert len(opened) == 3
    for kept in (root / "cache").rglob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:100])
    assert same(first, train(described(root, "train: shard-*.tar")))
    assert len(opened) == 6
    opened.clear()
    write_shard(root / "shard-01.tar", [("dog", (root / "folder/dog/000.png").read_bytes())])
    assert len(described(root, "train: shard-*.tar\ntest: shard-*.tar").test or ()) == 11
    assert len(opened) == 2  # writing it, and reading it


def test_labels_of_shards_may_be_numbers(root: Path) -> None:
    write_shard(root / "numbers.tar", [(str(i % 4), (root / "folder/cat/000.png").read_bytes()) for i in range(8)])
    (root / "n.yaml").write_text("train: numbers.tar\nimage_size: 16")
    assert load_data(str(root / "n.yaml")).num_classes == 4
    write_list(root / "classes.txt", CLASSES)
    with pytest.raises(DataError, match=r"numbers.tar: label 3 at position 3 is out of range; with 3 classes"):
        described(root, "train: numbers.tar")


def test_evaluation_takes_the_middle(root: Path) -> None:
    data = described(root, "train: folder\ntest: folder\nresize: 16\nmean: [0, 0, 0]\nstd: [1, 1, 1]")
    import PIL.Image

    picture = PIL.Image.open(root / "folder/cat/000.png").convert("RGB")
    scale = 16 / min(picture.size)
    resized = picture.resize([int(side * scale) for side in picture.size], PIL.Image.Resampling.BILINEAR)
    left, top = ((side - 16) / 2 for side in resized.size)
    expected = resized.crop([round(left), round(top), round(left) + 16, round(top) + 16])
    pixels = torch.tensor(list(expected.tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    assert torch.allclose(next(data.batches("test", 1))[0][0], pixels, atol=1e-6)


def without_label(root: Path) -> None:
    with tarfile.open(root / "x.tar", "w") as tar:
        tar.add(root / "folder/cat/000.png", "a.png")


def compressed(root: Path) -> None:
    with tarfile.open(root / "x.tar", "w:gz") as tar:
        tar.add(root / "folder/cat/000.png", "a.png")


def cut(root: Path) -> None:
    (root / "x.tar").write_bytes((root / "shard-01.tar").read_bytes()[:5000])


@pytest.mark.parametrize(
    ("prepare", "text", "message"),
    [
        (None, "train: nowhere", "nowhere: cannot be listed"),
        (None, "train: folder/cat", "has no folders in it"),
        (lambda root: (root / "folder/dogs").mkdir(), "train: folder", r"folder 'dogs' is none of the 5 .* 'dog'"),
        (lambda root: (root / "empty/cat").mkdir(parents=True), "train: empty", "no file in any of its folders"),
        (None, "train: nothing-*.tar", "no file matches"),
        (None, "train: nothing.tar", "cannot be read"),
        (None, "train: 'x-{3..1}.tar'", "counts down"),
        (without_label, "train: x.tar", "sample 'a' lacks its image or its label"),
        (compressed, "train: x.tar", "is no whole tar file .* must be unpacked first"),
        (cut, "train: x.tar", "is no whole tar file"),
        (lambda root: write_shard(root / "x.tar", [("dug", b"")]), "train: x.tar", "label 'dug' is no number and"),
        (lambda root: write_shard(root / "x.tar", []), "train: x.tar", "no samples"),
        (lambda root: write_list(root / "classes.txt", ("a", "a")), "train: folder", "'a' comes more than once"),
        (lambda root: (root / "classes.txt").unlink(), "train: folder", "classes.txt: cannot be read"),
        (None, "train: folder\ntests: folder", r"tests: unknown field \(did you mean 'test'\?\)"),
        (None, "image_size: 0", "image_size: input should be greater"),
        (None, "train: [", "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_used_is_one_error(root: Path, prepare: Any, text: str, message: str) -> None:
    if prepare is not None:
        prepare(root)
    with pytest.raises(DataError, match=message):
        described(root, text)


def test_a_data_file_that_is_not_there_is_looked_for_in_both_places(root: Path) -> None:
    with pytest.raises(DataError, match=r"no file nowhere.yaml or .*nowhere.yaml"):
        load_data("nowhere.yaml", root)


def test_without_torchvision_it_is_asked_for_by_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(DataError, match=r"needs torchvision.*pip install 'clipq\[vision\]'"):
        described(root, "train: folder")


def test_bench_data_measures_what_it_is_asked_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from clipq.cli.app import app

    described(root, "train: folder")
    arguments = ["bench-data", str(root / "data.yaml"), "--batch-size", "4", "--batches", "3", "--json"]
    result = CliRunner().invoke(app, arguments)
    values = json.loads(result.stdout)
    assert (values["samples"], values["batches"], values["part"]) == (12, 3, "train")
    assert values["samples_per_second"] == pytest.approx(12 / values["seconds"])
    assert "samples a second" in CliRunner().invoke(app, ["bench-data", "digits"]).stdout
