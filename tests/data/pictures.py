"""Small picture files, as an image folder and as shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image

CLASSES = ("cat", "dog", "eel")
LISTED = ("ape", "cat", "cow", "dog", "eel")


def encoded(seed: int) -> bytes:
    """A PNG of random blocks."""
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(20, 50, 2))
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    into = io.BytesIO()
    PIL.Image.fromarray(pixels).resize(size).save(into, "png")
    return into.getvalue()


def write_folder(folder: Path, per_class: int = 7) -> list[tuple[str, bytes]]:
    """Write an image folder of three classes; gives back class and content of each image in the order of the paths."""
    found = []
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            content = encoded(number * 1000 + i)
            (folder / name / f"{i:03}.png").write_bytes(content)
            found.append((name, content))
    return found


def write_shard(path: Path, samples: list[tuple[str, bytes]], first: int = 0, ending: str = "png") -> None:
    with tarfile.open(path, "w") as tar:
        for i, (label, content) in enumerate(samples, first):
            for last, data in ((ending, content), ("cls", label.encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"some/{i:06}.{last}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_list(path: Path, classes: tuple[str, ...] = LISTED) -> None:
    path.write_text("".join(f"{name}\n" for name in classes))
