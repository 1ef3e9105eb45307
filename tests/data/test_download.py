"""Downloads, from a server of our own: checked, kept, and refused when they are not the file expected."""

from __future__ import annotations

import gzip
import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clipq.data import download, load_images
from clipq.errors import DataError


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address that serves it; the cache is a fresh one and no data root is set."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.delenv("CLIPQ_DATA", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def closed_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/"


def serve_cifar10(folder: Path, root: Path, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = folder / download.CIFAR10_ARCHIVE
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(root / "cifar-10-batches-bin", "cifar-10-batches-bin")
    monkeypatch.setattr(download, "CIFAR10_HOMES", (home,))
    monkeypatch.setattr(download, "CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())


def test_a_second_home_is_tried_and_the_files_are_kept(
    served: tuple[Path, str], mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = served
    checksums = {}
    for path in (mnist_root / "mnist").iterdir():
        content = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(content)
        checksums[f"{path.name}.gz"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(download, "MNIST_SHA256", checksums)
    monkeypatch.setattr(download, "MNIST_HOMES", (closed_port(), home))
    assert len(load_images("mnist").train) == 50
    monkeypatch.setattr(download, "MNIST_HOMES", (closed_port(),))
    assert len(load_images("mnist").test) == 20


def test_cifar10_is_unpacked_once(
    served: tuple[Path, str], cifar10_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = served
    serve_cifar10(folder, cifar10_root, home, monkeypatch)
    assert len(load_images("cifar10").train) == 50_000
    monkeypatch.setattr(download, "CIFAR10_HOMES", (closed_port(),))
    assert len(load_images("cifar10").test) == 10_000


def test_a_file_with_another_checksum_is_refused_and_not_kept(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = served
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"<html>moved</html>")
    monkeypatch.setattr(download, "MNIST_HOMES", (home,))
    with pytest.raises(DataError, match="does not match the known hash"):
        load_images("mnist")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_no_connection_says_what_to_do(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CIFAR10_HOMES", (closed_port(),))
    with pytest.raises(DataError, match=r"'cifar10' cannot be downloaded: .*refused.*--data-root or in CLIPQ_DATA"):
        load_images("cifar10")


def test_an_archive_that_ends_early_leaves_no_half_written_batch(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = served
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.size = 1_000_000
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    archive = folder / download.CIFAR10_ARCHIVE
    archive.write_bytes(whole.getvalue()[:500_000])
    monkeypatch.setattr(download, "CIFAR10_HOMES", (home,))
    monkeypatch.setattr(download, "CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_images("cifar10")
    assert list((tmp_path / "cache").rglob("*.bin")) == []
