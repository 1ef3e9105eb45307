"""Data of picture files, described by a YAML file: where the parts lie, the classes, how pictures are cut."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import fsspec
import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from clipq.data.folders import class_folders, read_folder
from clipq.data.images import Normalisation, check_labels
from clipq.data.named import DATA_ROOT_VARIABLE
from clipq.data.pictures import PictureSamples
from clipq.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, import_transforms
from clipq.data.shards import read_shards
from clipq.data.split import stratified_split
from clipq.data.stored import StoredImages
from clipq.errors import DataError
from clipq.validation import explain

SHARD_ENDING = ".tar"
Place = str
"""An image folder, or WebDataset shards if it ends in .tar: local, or a URL. Relative ones lie in the data root."""


class PictureData(BaseModel):
    """The fields of a data file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: Place = Field(description="Pictures to train on.")
    validation: Place | None = Field(None, description="Else a part of the training pictures is held out.")
    test: Place | None = Field(None, description="Pictures for the final report alone.")
    classes: str | None = Field(
        None,
        description="A text file with one class a line, in the order of the network's outputs: the names of the "
        "folders, of which some may be missing. Else the training folders, sorted.",
    )
    image_size: int = Field(224, ge=1, description="Pixels a side of a network's input.")
    resize: int | None = Field(
        None, ge=1, description="Pixels of the short side before evaluation crops; else 8/7 of image_size."
    )
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = Field(IMAGENET_MEAN, description="Of the channels, of pixels from 0 to 1.")
    std: tuple[float, float, float] = Field(IMAGENET_STD, description="Of the channels, of pixels from 0 to 1.")
    max_corrupt: int = Field(100, ge=0, description="Pictures of a part that may turn out to be unusable.")


def load_pictures(
    path: str, root: str | Path | None, seed: int, *, validation_fraction: float, workers: int
) -> tuple[PictureSamples, PictureSamples, PictureSamples | None, int]:
    """Training, validation and maybe test samples, and the number of classes.

    Args:
        path: the data file, relative to the current folder or else to the data root.
        root: the data root; else the environment variable CLIPQ_DATA; else the folder of the file.

    Raises:
        DataError: the file or the pictures cannot be found or used, or torchvision is missing.
    """
    import_transforms()
    chosen = root if root is not None else os.environ.get(DATA_ROOT_VARIABLE) or None
    file, described = _read(path, chosen)
    folder = str(file.parent if chosen is None else chosen)
    classes = _classes(folder, described)
    preprocessing = Preprocessing(
        described.image_size,
        described.resize or round(described.image_size * 8 / 7),
        described.interpolation,
        Normalisation(255, described.mean, described.std),
    )

    def samples(images: StoredImages, part: str) -> PictureSamples:
        return PictureSamples(f"{path}, {part} set", images, preprocessing, workers, described.max_corrupt)

    train = _stored(folder, described.train, classes)
    number = int(train.targets.max()) + 1 if classes is None else len(classes)
    others = {}
    for part in ("validation", "test"):
        place = getattr(described, part)
        if place is not None:
            others[part] = _stored(folder, place, classes)
            check_labels(others[part].targets, number, f"{path}, {part} set")
    if "validation" not in others:
        kept, held = stratified_split(train.targets, validation_fraction, seed)
        train, others["validation"] = train.subset(kept), train.subset(held)
    test = samples(others["test"], "test") if "test" in others else None
    return samples(train, "training"), samples(others["validation"], "validation"), test, number


def _stored(folder: str, place: str, classes: Sequence[str] | None) -> StoredImages:
    url = _place(folder, place)
    if not url.endswith(SHARD_ENDING):
        if classes is None:
            raise DataError(
                f"{url}: the training shards do not name the folders' classes; list them in a file: classes"
            )
        return read_folder(url, classes)
    images = read_shards(url, classes)
    if classes is not None:
        check_labels(images.targets, len(classes), url)
    return images


def _classes(folder: str, described: PictureData) -> list[str] | None:
    if described.classes is not None:
        return _read_classes(_place(folder, described.classes))
    return None if described.train.endswith(SHARD_ENDING) else class_folders(_place(folder, described.train))


def _read(path: str, root: str | Path | None) -> tuple[Path, PictureData]:
    places = [Path(path), *([] if root is None else [Path(root) / path])]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataError(
            f"data: there is no file {' or '.join(map(str, places))}; give a YAML file that says where the pictures lie"
        )
    try:
        values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file}: cannot be read as YAML: {error}") from error
    try:
        return file, PictureData.model_validate(values)
    except pydantic.ValidationError as error:
        raise DataError(f"{file} cannot be used:\n{explain(error, PictureData.model_fields)}") from None


def _place(folder: str, place: str) -> str:
    if "://" in place:
        return place
    return f"{folder.rstrip('/')}/{place}" if "://" in folder else str(Path(folder, place))


def _read_classes(url: str) -> list[str]:
    try:
        with fsspec.open(url, "rt", encoding="utf-8") as file:
            classes: list[str] = file.read().splitlines()
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{url}: cannot be read: {error}. Give the text file that lists the classes") from error
    repeated = {name for name in classes if classes.count(name) > 1}
    if not classes or repeated:
        what = f"{sorted(repeated)[0]!r} comes more than once" if repeated else "it is empty"
        raise DataError(f"{url}: {what}; give one class a line, in the order of the network's outputs")
    return classes
