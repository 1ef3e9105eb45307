"""Checkpoints: written whole or not at all, the last few kept, a damaged one passed over for the one before."""

from __future__ import annotations

import contextlib
import io
import random
import re
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from clipq.archive import write_file
from clipq.errors import CheckpointError

VERSION = 1
PHASES = ("float", "compress")
"""The trainings of a run, in their order."""
WAITS = (0.5, 2.0)
"""Seconds before a write that failed is tried again."""
_NAME = re.compile(rf"({'|'.join(PHASES)})-(\d+)\.pt")


class Checkpoints:
    """The checkpoints of one run, in a local folder or at an fsspec URL.

    Each is a file of ``torch.save`` that ``torch.load(..., weights_only=True)`` reads, named by phase and step. Only
    one process of a run may write.

    Args:
        place: a folder, or a URL such as ``s3://bucket/run``.
        keep: how many are kept.
        note: is told what went wrong and what was done about it.
    """

    def __init__(self, place: str, keep: int, note: Callable[[str], None]) -> None:
        self.place = place
        self.last: str | None = None
        """The newest that was written or read whole."""
        self._keep = keep
        self._note = note

    def save(self, phase: str, step: int, state: Mapping[str, Any]) -> bool:
        """Write one, and delete those that are too many.

        What fails is tried again; if it still fails that is noted, and the checkpoints before it are still there.

        Returns:
            Whether it was written.
        """
        buffer = io.BytesIO()
        torch.save({"version": VERSION, "phase": phase, "step": step, **state}, buffer)
        name = f"{phase}-{step:08d}.pt"
        for wait in (*WAITS, None):
            try:
                self._write(name, buffer.getvalue())
                break
            except Exception as error:  # whatever a file system of fsspec's raises
                if wait is None:
                    kept = f"the last one is {self.last}" if self.last else "there is none yet"
                    self._note(f"checkpoint {self.place}/{name} was not written; {kept}. Training goes on. {error}")
                    return False
                time.sleep(wait)
        self.last = f"{self.place}/{name}"
        with contextlib.suppress(Exception):  # the next one deletes them
            for old in self._names()[: -self._keep]:
                self._remove(old)
        return True

    def latest(self) -> bytes | None:
        """The newest whole checkpoint, for `unpack`; None if there is none at all.

        Damaged ones get the ending ``.damaged``, which is noted.

        Raises:
            CheckpointError: the place cannot be read, or every checkpoint is damaged.
        """
        try:
            names = self._names()
            for name in reversed(names):
                content = self._read(name)
                fault = damage(content)
                if fault is None:
                    self.last = f"{self.place}/{name}"
                    return content
                self._note(f"checkpoint {self.place}/{name} is damaged ({fault}) and passed over for the one before")
                self._set_aside(name)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoints in {self.place} cannot be read: {type(error).__name__}: {error}. Resume when they can"
            ) from error
        if names:
            raise CheckpointError(
                f"every checkpoint in {self.place} is damaged ({', '.join(names)}); they now end in .damaged. Resume "
                f"again to start from the beginning"
            )
        return None

    def clear(self, *, force: bool) -> None:
        """Make the place ready for a new run.

        Args:
            force: delete what an earlier run left there.

        Raises:
            CheckpointError: there are checkpoints and ``force`` is not given, or one cannot be deleted.
        """
        try:
            names = self._names()
            if not names or force:
                for name in names:
                    self._remove(name)
                self.sweep()
                return
        except Exception as error:
            raise CheckpointError(f"checkpoints in {self.place} cannot be kept: {error}; give another place") from error
        raise CheckpointError(
            f"{self.place} has checkpoints already ({names[-1]}); give another place with --checkpoints, or --force to "
            f"replace them"
        )

    def sweep(self) -> None:
        """Delete what a process that was killed left half written."""
        system, folder = self._system()
        if system.exists(folder):
            for path in system.ls(folder, detail=False):
                if str(path).endswith(".part"):
                    system.rm(path)

    def _system(self) -> tuple[Any, str]:
        system, folder = fsspec.core.url_to_fs(self.place)
        system.invalidate_cache()
        return system, folder

    def _names(self) -> list[str]:
        system, folder = self._system()
        if not system.exists(folder):
            return []
        found = [_NAME.fullmatch(str(path).rpartition("/")[2]) for path in system.ls(folder, detail=False)]
        return [m[0] for m in sorted((m for m in found if m), key=lambda m: (PHASES.index(m[1]), int(m[2])))]

    def _write(self, name: str, content: bytes) -> None:
        system, folder = self._system()
        system.makedirs(folder, exist_ok=True)
        if "file" in system.protocol:
            write_file(Path(folder) / name, content)
        else:
            system.pipe_file(f"{folder}/{name}.part", content)
            system.mv(f"{folder}/{name}.part", f"{folder}/{name}")

    def _read(self, name: str) -> bytes:
        system, folder = self._system()
        content: bytes = system.cat_file(f"{folder}/{name}")
        return content

    def _remove(self, name: str) -> None:
        system, folder = self._system()
        system.rm(f"{folder}/{name}")

    def _set_aside(self, name: str) -> None:
        system, folder = self._system()
        system.mv(f"{folder}/{name}", f"{folder}/{name}.damaged")


def damage(content: bytes) -> str | None:
    """What is wrong with a checkpoint's bytes; None if every checksum in them is right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            wrong = file.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, OSError, NotImplementedError) as error:
        return f"{len(content)} bytes: {error}"
    return None if wrong is None else f"{wrong}: its checksum is wrong"


def unpack(content: bytes) -> dict[str, Any]:
    """The state in a checkpoint; tensors are on the CPU.

    Raises:
        CheckpointError: it was written by another version.
    """
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"the checkpoint has version {state.get('version')!r}; this clipq reads version {VERSION}: resume with the "
            f"clipq that wrote it"
        )
    return state


def random_states(device: torch.device) -> dict[str, Any]:
    """Where this process's random generators are: torch's, of the device too, Python's and NumPy's."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - what data sets draw from
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(cached)),
    }


def seed_random_states(seed: int) -> None:
    """Put this process's random generators where a seed says."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def set_random_states(states: Sequence[Mapping[str, Any]], rank: int, device: torch.device) -> None:
    """Put this process's random generators where they were.

    Args:
        states: of every process, by rank.
    """
    state = states[rank % len(states)]
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy(), position, has_gauss, cached))  # noqa: NPY002
