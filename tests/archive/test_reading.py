"""Reading: one tensor at a time, from anywhere, and no more of it than is needed."""

from __future__ import annotations

import http.server
import io
import mmap
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from clipq import archive
from clipq.errors import ArchiveError, DamagedFileError
from tests.vectors import make

ROOT = Path(__file__).parents[2]


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    layers = {f"layer{i}.weight": make.quantized(rng, (64, 32, 3, 3), 7, 0.3) for i in range(6)}
    biases = {f"layer{i}.bias": rng.normal(size=64).astype(np.float32) for i in range(6)}
    return {**layers, **biases, "head.weight": rng.normal(size=(300, 200)).astype(np.float32)}


TENSORS = tensors()
CONTENT = archive.encode_file(TENSORS)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `CONTENT`, by ranges unless the address says not to, and counts the bytes sent."""

    sent = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def do_GET(self) -> None:
        if "missing" in self.path:
            self.send_error(404)
            return
        part, found = CONTENT, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and "whole" not in self.path:
            start, end = int(found[1]), int(found[2]) + 1
            part = CONTENT[start:end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        Server.sent += len(part)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        Server.sent = 0
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_url_is_asked_for_the_ranges_of_one_tensor_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = 0
    cat_file = MemoryFileSystem.cat_file

    def counting(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        nonlocal requested
        requested += end - start
        return cat_file(self, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
    fsspec.filesystem("memory").pipe_file("/m.clipq", CONTENT)
    with archive.Archive("memory://m.clipq") as file:
        header = requested
        assert header == len(CONTENT) - sum(file.stored_bytes(name) for name in file)
        assert np.array_equal(file["layer3.weight"], TENSORS["layer3.weight"])
        assert requested == header + file.stored_bytes("layer3.weight")
        file.read()  # of the biases, which share a block, it asks once
        assert requested == len(CONTENT) + file.stored_bytes("layer3.weight")


def test_over_http_only_the_bytes_of_a_tensor_travel(server: str) -> None:
    with archive.Archive(f"{server}/model.clipq") as file:
        assert np.array_equal(file["layer5.weight"], TENSORS["layer5.weight"])
        assert Server.sent < len(CONTENT) // 4
        assert all(np.array_equal(array, TENSORS[name]) for name, array in file.read().items())


def test_a_server_without_ranges_is_asked_once(server: str) -> None:
    with archive.Archive(f"{server}/whole/model.clipq") as file:
        assert all(np.array_equal(array, TENSORS[name]) for name, array in file.read().items())
        assert Server.sent == len(CONTENT)


@pytest.mark.parametrize("url", ["{}/missing", "nosuch://model.clipq", "memory://none.clipq", "http://127.0.0.1:9/m"])
def test_a_url_that_cannot_be_read_is_named(url: str, server: str) -> None:
    url = url.format(server)
    with pytest.raises(ArchiveError, match=re.escape(url)):
        archive.Archive(url)


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.clipq"
    path.write_bytes(CONTENT)
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for source in (path, str(path), CONTENT, bytearray(CONTENT), memoryview(CONTENT), mapped, opened):
            with archive.Archive(source) as file:
                assert all(np.array_equal(file[name], array) for name, array in TENSORS.items())
        assert not opened.closed


def test_a_tensor_is_read_when_it_is_asked_for_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "m.clipq"
    path.write_bytes(CONTENT)
    with archive.Archive(path) as file:
        damaged = bytearray(CONTENT)
        damaged[-1] ^= 1  # of head.weight, the last one
        path.write_bytes(damaged)
        assert np.array_equal(file["layer0.weight"], TENSORS["layer0.weight"])
        with pytest.raises(DamagedFileError, match=r"head\.weight"):
            file["head.weight"]


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.clipq").write_bytes(CONTENT)
    closed = (tmp_path / "m.clipq").open("rb")
    closed.close()
    with (tmp_path / "m.clipq").open("r", encoding="latin-1") as text:
        for source in (text, io.StringIO("text"), closed, 3, [CONTENT], memoryview(CONTENT)[::2]):
            with pytest.raises(ArchiveError):
                archive.Archive(source)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured as Linux gives it")
@pytest.mark.parametrize("how", ["path", "map", "url"])
def test_memory_while_reading_is_the_tensors_and_16_mib(how: str, heavy_file: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/workers/reading_memory.py"), str(heavy_file), how]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 16 * 2**20


@pytest.fixture(scope="module")
def heavy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose tiles take the most that they can: levels that are noise, rows as long as they come."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("heavy") / "m.clipq"
    content = {
        "noise": rng.integers(0, 256, (3 * 2**10, 2**10), dtype=np.uint8),
        "wide": rng.integers(0, 200, (33, 2**16)).astype(np.float32),
        "few": make.quantized(rng, (1000, 3000), 7, 0.1),
        "raw": rng.normal(size=5 * 2**20).astype(np.float32),
    }
    path.write_bytes(archive.encode_file(content))
    return path
