"""Folders as model hubs have them: ``config.json`` and what else there is, with one or several files of weights.

Each file of weights becomes a ``.clipq`` file at its place, or is made from one; every other file is copied.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipq import archive
from clipq.errors import ArchiveError
from clipq.files import FileReport, load, save
from clipq.formats import TORCH, read_metadata, read_state, write_state

_INDEX = ".bin.index.json"


def pack_folder(
    source: Path, out: Path, *, effort: archive.Effort = "default", bfloat16_rest: bool = False
) -> dict[str, FileReport]:
    """Make a folder in which each file of weights is a ``.clipq`` file.

    These are the ``.safetensors`` files or, where a folder has none, its ``.bin``, ``.pt`` and ``.pth`` files, which
    are left out where it has both. Hidden files and folders are left out too.

    Returns:
        What is in each file written, by its path in the folder.

    Raises:
        ArchiveError: there are no weights, a file cannot be read or written, or ``out`` is there already.
    """
    reports: dict[str, FileReport] = {}

    def convert(file: Path, target: Path) -> None:
        if file.suffix in (".safetensors", *TORCH):
            if file.suffix in TORCH and any(file.parent.glob("*.safetensors")):
                return
            target = target.with_name(_hub_name(target.stem) + ".clipq")
            metadata = read_metadata(file) or {"format": "pt"}
            report = save(read_state(file), target, effort=effort, bfloat16_rest=bfloat16_rest, metadata=metadata)
            reports[str(target.name if file.parent == source else file.parent.relative_to(source) / target.name)] = (
                report
            )
        elif file.name.endswith(_INDEX):
            if not any(file.parent.glob("*.safetensors")):
                name = _hub_name(file.name.removesuffix(_INDEX)) + ".safetensors.index.json"
                target.with_name(name).write_text(_index_of_safetensors(file), encoding="utf-8")
        else:
            shutil.copyfile(file, target)

    with _new_folder(out) as made:
        _for_each_file(source, made, convert)
        if not reports:
            raise ArchiveError(f"{source} holds no weights: no file in it ends with .safetensors, {', '.join(TORCH)}")
    return reports


def unpack_folder(source: Path, out: Path, *, limit: int | None = None) -> dict[str, int]:
    """The inverse of `pack_folder`: each ``.clipq`` file becomes a ``.safetensors`` file.

    Returns:
        How many tensors are in each file written, by its path in the folder.

    Raises:
        ArchiveError: there is no ``.clipq`` file, one cannot be read, or ``out`` is there already.
    """
    counts: dict[str, int] = {}

    def convert(file: Path, target: Path) -> None:
        if file.suffix == ".clipq":
            tensors = load(file, limit=limit)
            write_state(target.with_suffix(".safetensors"), tensors, read_metadata(file))
            counts[str(file.relative_to(source).with_suffix(".safetensors"))] = len(tensors)
        else:
            shutil.copyfile(file, target)

    with _new_folder(out) as made:
        _for_each_file(source, made, convert)
        if not counts:
            raise ArchiveError(f"{source} holds no .clipq file; give a folder that clipq pack made")
    return counts


def _for_each_file(source: Path, made: Path, convert: Callable[[Path, Path], None]) -> None:
    try:
        for folder, folders, files in os.walk(source):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            target = made / Path(folder).relative_to(source)
            target.mkdir(exist_ok=True)
            for name in sorted(files):
                if not name.startswith("."):
                    convert(Path(folder) / name, target / name)
    except OSError as error:
        raise ArchiveError(f"{source}: {error}; give a folder that may be read, and room for a second one") from error


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which is at its place when all went well, and gone otherwise."""
    if out.exists():
        raise ArchiveError(f"{out} is there already; give another folder with --out")
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise ArchiveError(f"{out} cannot be made: {error.strerror}; give a folder that may be written to") from error
    try:
        yield made
        made.chmod(0o755)
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _hub_name(stem: str) -> str:
    """Weights of a hub are called otherwise as pickles than as safetensors."""
    return "model" + stem.removeprefix("pytorch_model") if stem.startswith("pytorch_model") else stem


def _index_of_safetensors(file: Path) -> str:
    """An index of shards that names what `unpack_folder` writes."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        places = index["weight_map"].items()
        index["weight_map"] = {name: _hub_name(Path(place).stem) + ".safetensors" for name, place in places}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArchiveError(f"{file} is no index of shards: {error!r}; get a whole copy of it") from None
    return json.dumps(index, indent=2) + "\n"
