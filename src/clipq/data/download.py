"""Fetch the public data sets from their usual homes into the user's cache folder, checked by SHA-256."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from clipq.data.files import CIFAR10_FILES
from clipq.errors import DataError

MNIST_HOMES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
CIFAR10_HOMES = ("https://www.cs.toronto.edu/~kriz/",)
CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def fetch_mnist() -> Path:
    """The folder with MNIST's four IDX files; downloads those that are not there yet.

    Raises:
        DataError: a file cannot be downloaded, or is not the one expected.
    """
    for name, sha256 in MNIST_SHA256.items():
        _fetch("mnist", MNIST_HOMES, name, sha256, "the folder mnist/ with its four IDX files")
    return _cache("mnist")


def fetch_cifar10() -> Path:
    """The folder with CIFAR-10's binary batches; downloads and unpacks them if they are not there yet.

    Raises:
        DataError: the archive cannot be downloaded or unpacked, or is not the one expected.
    """
    folder = _cache("cifar10") / "cifar-10-batches-bin"
    names = {name for part in CIFAR10_FILES.values() for name in part}
    if all((folder / name).exists() for name in names):
        return folder
    layout = "the folder cifar-10-batches-bin/ with its binary batches"
    archive = _fetch("cifar10", CIFAR10_HOMES, CIFAR10_ARCHIVE, CIFAR10_SHA256, layout)
    try:
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                source = tar.extractfile(member)
                name = Path(member.name).name
                if source is not None and name in names:
                    unfinished = folder / f"{name}.part{os.getpid()}"
                    with unfinished.open("wb") as file:
                        shutil.copyfileobj(source, file)
                    unfinished.replace(folder / name)
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{archive}: cannot be unpacked into {folder}: {error}. Free some space, or delete it"
        ) from error
    return folder


def _cache(set_name: str) -> Path:
    import pooch

    return Path(pooch.os_cache("clipq")) / set_name


def _fetch(set_name: str, homes: Sequence[str], file: str, sha256: str, layout: str) -> Path:
    import pooch

    failures = []
    for home in homes:
        try:
            return Path(pooch.retrieve(home + file, f"sha256:{sha256}", fname=file, path=_cache(set_name)))
        except (OSError, ValueError) as error:  # no connection, no space, or another checksum
            # For a failed connection, the text of the cause alone; all around it repeats the address.
            cause = getattr(error.args[0], "reason", error) if error.args else error
            failures.append(f"{home + file}: {' '.join(str(cause).split())}")
    raise DataError(
        f"data set {set_name!r} cannot be downloaded: {'; '.join(failures)}. Try again later, or get the files "
        f"another way and name, as --data-root or in CLIPQ_DATA, the folder that holds {layout}"
    )
