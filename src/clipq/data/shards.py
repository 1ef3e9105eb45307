"""WebDataset shards: tar files in which ``KEY.jpg`` and ``KEY.cls`` make a sample.

The format is that of the webdataset library (https://github.com/webdataset/webdataset). A shard is read through once,
only its headers if the storage can seek, and what is found is kept in the user's cache folder. From then on samples
are read by their place, so that a shuffle is one of the whole set, and a resume or another number of processes costs
nothing. The library itself reads shards from front to back, which allows neither.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import fsspec
import numpy as np
import torch

from clipq.archive import write_file
from clipq.data.stored import StoredImages, joined
from clipq.errors import DataError
from clipq.suggest import nearest

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
LABEL_ENDING = "cls"
_READ_AT_ONCE = 8  # shards whose headers are read side by side

Index = Mapping[str, Any]  # of one shard: names and labels (bytes), ranges (int64)


def read_shards(url: str, classes: Sequence[str] | None) -> StoredImages:
    """All samples of WebDataset shards, in the order of the shards and of the samples in them.

    Args:
        url: of one ``.tar`` file or more, local or any that fsspec knows; ``{000..146}`` counts and, where the storage
            can list files, ``*`` matches.
        classes: the name of each label. The ``.cls`` files hold a label or a name.

    Raises:
        DataError: no shard is found, one cannot be read, or a sample has no image, no label or an unknown one.
    """
    try:
        system, paths = _expanded(url)
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            shards = list(pool.map(lambda path: _index_kept(system, path), paths))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{url}: cannot be read: {error}") from error
    labels = {name: label for label, name in enumerate(classes or ())}
    return joined([_images(url, path, shard, labels) for path, shard in zip(paths, shards, strict=True)])


def _expanded(url: str) -> tuple[Any, list[str]]:
    urls = [url]
    while braces := re.search(r"\{(\d+)\.\.(\d+)\}", urls[0]):
        first, last = braces[1], braces[2]
        numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        urls = [u.replace(braces[0], number, 1) for u in urls for number in numbers]
        if not urls:
            raise DataError(f"{url}: {braces[0]} counts down; write the smaller number first")
    system = fsspec.core.url_to_fs(url)[0]
    paths = [system._strip_protocol(u) for u in urls]
    if "*" in url:
        paths = sorted(found for path in paths for found in system.glob(path))
        if not paths:
            raise DataError(f"{url}: no file matches")
    return system, paths


def _index_kept(system: Any, path: str) -> Index:
    """The index of a shard, from the cache if the shard has not changed since."""
    import pooch

    key = hashlib.sha256(f"1 {system.protocol} {path} {system.ukey(path)}".encode()).hexdigest()[:32]
    kept = Path(pooch.os_cache("clipq")) / "shards" / f"{key}.npz"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(kept.with_suffix(".lock")):  # the ranks of a run look for it at the same time
        try:
            with np.load(kept) as stored:
                return {name: stored[name] for name in ("names", "labels", "ranges")}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            index = _index(system, path)
        into = io.BytesIO()
        np.savez(into, **index)
        write_file(kept, into.getvalue())
    return index


def _index(system: Any, path: str) -> Index:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, bytes] = {}
    try:
        with system.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, ending = member.name.rpartition("/")[2].partition(".")
                key = member.name[: len(member.name) - len(ending) - 1]
                if not member.isreg() or not ending:
                    continue
                if ending.lower() in IMAGE_ENDINGS:
                    images[key] = (member.name, member.offset_data, member.offset_data + member.size)
                elif ending.lower() == LABEL_ENDING:
                    content = tar.extractfile(member)
                    labels[key] = b"" if content is None else content.read().strip()
            file.seek(tar.offset)  # tarfile takes a file that ends between two members for a whole one
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end mark")
    except tarfile.TarError as error:
        raise DataError(
            f"{path}: is no whole tar file ({error}). Get it again; a compressed one must be unpacked first"
        ) from error
    lacking = next((key for key in (*images, *labels) if key not in images or key not in labels), None)
    if lacking is not None or not images:
        what = "no samples" if lacking is None else f"the sample {lacking!r} lacks its image or its label"
        raise DataError(
            f"{path}: {what}; a sample is KEY.{LABEL_ENDING} with a label, and KEY.jpg or another of "
            f"{', '.join(IMAGE_ENDINGS)}"
        )
    return {
        "names": np.array([f"{path}#{name}".encode() for name, _, _ in images.values()]),
        "labels": np.array([labels[key] for key in images]),
        "ranges": np.array([(start, stop) for _, start, stop in images.values()], np.int64),
    }


def _images(url: str, path: str, shard: Index, labels: Mapping[str, int]) -> StoredImages:
    distinct, which = np.unique(shard["labels"], return_inverse=True)
    values = torch.tensor([_label(bytes(text).decode(errors="replace"), path, labels) for text in distinct])
    return StoredImages(
        url,
        np.array([path.encode()]),
        np.zeros(len(which), np.int64),
        shard["ranges"],
        shard["names"],
        values[torch.from_numpy(which)],
    )


def _label(text: str, path: str, labels: Mapping[str, int]) -> int:
    if text in labels:
        return labels[text]
    if text.isdecimal():
        return int(text)
    raise DataError(
        f"{path}: the label {text!r} is no number and none of the {len(labels)} classes{nearest(text, labels)}"
    )
