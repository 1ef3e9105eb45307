"""Image folders: one folder a class, the images inside it, at any depth."""

from __future__ import annotations

from collections.abc import Sequence

import fsspec
import numpy as np
import torch

from clipq.data.stored import StoredImages
from clipq.errors import DataError
from clipq.suggest import nearest


def class_folders(url: str) -> list[str]:
    """The names of the folders in a folder, sorted.

    Raises:
        DataError: the folder cannot be listed, or has no folders in it.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
        entries = system.ls(path, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{url}: cannot be listed: {error}. Give a folder that holds one folder a class") from error
    names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
    if not names:
        raise DataError(f"{url}: has no folders in it; an image folder holds one folder a class")
    return sorted(name for name in names if not name.startswith("."))


def read_folder(url: str, classes: Sequence[str]) -> StoredImages:
    """All files in the class folders of an image folder, but hidden ones, in the order of their paths.

    Args:
        url: a local folder or any that fsspec knows, such as ``s3://bucket/imagenet/train``.
        classes: the folder of each label; not every one need be there.

    Raises:
        DataError: the folder cannot be listed, holds a folder of no class, or holds no image.
    """
    labels = {name: label for label, name in enumerate(classes)}
    for name in class_folders(url):
        if name not in labels:
            raise DataError(
                f"{url}: the folder {name!r} is none of the {len(labels)} classes{nearest(name, labels)}. "
                "Complete the list of classes, or move the folder away"
            )
    system, path = fsspec.core.url_to_fs(url)
    prefix = path.rstrip("/") + "/"
    found = sorted(p for p in system.find(path) if _is_image(p.removeprefix(prefix)))
    if not found:
        raise DataError(f"{url}: no file in any of its folders")
    names = [p.removeprefix(prefix) for p in found]
    return StoredImages(
        url,
        np.array([p.encode() for p in found]),
        np.arange(len(found)),
        None,
        np.array([name.encode() for name in names]),
        torch.tensor([labels[name.partition("/")[0]] for name in names]),
    )


def _is_image(name: str) -> bool:
    parts = name.split("/")
    return len(parts) > 1 and not any(part.startswith(".") for part in parts)
