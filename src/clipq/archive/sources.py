"""Where a file's bytes come from: a path, memory, an open file or an fsspec URL."""

from __future__ import annotations

import io
import mmap
import os
import threading
from contextlib import ExitStack
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
        except (OSError, AttributeError) as error:
            raise ArchiveError(
                f"{name} cannot be read from any place in it (seek); read it into memory first"
            ) from error

    def read(self, offset: int, n: int) -> memoryview:
        parts: list[bytes] = []
        left = n
        try:
            with self._lock:
                self._file.seek(offset)
                while left and (part := self._file.read(left)):
                    parts.append(part)
                    left -= len(part)
        except OSError as error:
            raise ArchiveError(f"{self._name} cannot be read: {error}") from error
        if left:
            raise DamagedFileError(f"{self._name} became shorter while it was read; get a whole copy of it")
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


def open_source(source: Source, stack: ExitStack) -> Input:
    """Open a source for reading; what has to be closed again is put on the stack.

    Raises:
        ArchiveError: it cannot be opened.
    """
    if isinstance(source, bytes | bytearray | memoryview | mmap.mmap):
        return _Memory(stack.enter_context(memoryview(source).cast("B")))
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        try:
            if "://" in name:
                import fsspec  # only here: it takes longer to import than a small file to read

                return _File(stack.enter_context(fsspec.open(name, "rb")), name)
            return _File(stack.enter_context(open(name, "rb")), name)
        except (OSError, ImportError, ValueError) as error:
            raise ArchiveError(f"{name} cannot be opened: {error}; check the path and that it may be read") from error
    if hasattr(source, "seek") and hasattr(source, "read"):
        return _File(source, str(getattr(source, "name", "the open file")))
    raise ArchiveError(f"a {type(source).__name__} is no source; give a path, URL, bytes or an open binary file")
