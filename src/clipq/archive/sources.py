"""Where a file's bytes come from: a path, memory, an open file or an fsspec URL."""

from __future__ import annotations

import io
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Protocol

from clipq.errors import ArchiveError, DamagedFileError

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | mmap.mmap | IO[bytes]


class Input(Protocol):
    """Bytes at known places; may be asked from several threads."""

    size: int

    def read(self, offset: int, n: int) -> memoryview:
        """Exactly n bytes."""
        ...


class _Memory:
    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, n: int) -> memoryview:
        return self._data[offset : offset + n]


class _File:
    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name, self._lock = file, name, threading.Lock()
        try:
            self.size = file.seek(0, io.SEEK_END)
            binary = isinstance(file.read(0), bytes)
        except (OSError, ValueError, AttributeError) as error:
            raise ArchiveError(
                f"{name} cannot be read from any place in it (seek): {error}; read it into memory first"
            ) from error
        if not binary:
            raise ArchiveError(f"{name} is open as text; open it with mode 'rb'")

    def read(self, offset: int, n: int) -> memoryview:
        parts: list[bytes] = []
        left = n
        try:
            with self._lock:
                self._file.seek(offset)
                while left and (part := self._file.read(left)):
                    parts.append(part)
                    left -= len(part)
        except (OSError, ValueError) as error:
            raise ArchiveError(f"{self._name} cannot be read: {error}; open it, or get a copy, again") from error
        if left:
            raise _shorter(self._name)
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


class _Remote:
    """A file of an fsspec filesystem: each read is one request, for no more than its range."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._whole: _Memory | None = None
        with self._as_archive_errors():
            from fsspec.core import url_to_fs  # only here: it takes longer to import than a small file to read

            self._filesystem, self._path = url_to_fs(url)
            size = self._filesystem.info(self._path)["size"]
        if size is None:
            raise ArchiveError(f"{url}: the server does not say how large it is; download it first")
        self.size = int(size)

    def read(self, offset: int, n: int) -> memoryview:
        if self._whole is None and n:
            with self._as_archive_errors():
                data = self._filesystem.cat_file(self._path, start=offset, end=offset + n)
            if len(data) == n:
                return memoryview(data)
            if len(data) != self.size:
                raise _shorter(self._url)
            self._whole = _Memory(memoryview(data))  # a server that knows no ranges: once is enough
        return self._whole.read(offset, n) if self._whole else memoryview(b"")

    @contextmanager
    def _as_archive_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each filesystem has its own
            raise ArchiveError(
                f"{self._url} cannot be read: {type(error).__name__}: {error}; check the address and your access"
            ) from error


def open_source(source: Source, stack: ExitStack) -> Input:
    """Open a source for reading; what has to be closed again is put on the stack.

    Raises:
        ArchiveError: it cannot be opened.
    """
    if isinstance(source, bytes | bytearray | memoryview | mmap.mmap):
        try:
            return _Memory(stack.enter_context(memoryview(source).cast("B")))
        except (ValueError, TypeError) as error:
            raise ArchiveError(f"the {type(source).__name__} cannot be read: {error}; give an open one") from error
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if "://" in name:
            return _Remote(name)
        try:
            return _File(stack.enter_context(open(name, "rb")), name)
        except (OSError, ValueError) as error:
            raise ArchiveError(f"{name} cannot be opened: {error}; check the path and that it may be read") from error
    if hasattr(source, "seek") and hasattr(source, "read"):
        return _File(source, str(getattr(source, "name", "the open file")))
    raise ArchiveError(f"a {type(source).__name__} is no source; give a path, URL, bytes or an open binary file")


def _shorter(name: str) -> DamagedFileError:
    return DamagedFileError(f"{name} became shorter while it was read; get a whole copy of it")
