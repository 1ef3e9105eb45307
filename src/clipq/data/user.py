"""The user's own data: a function that returns torch data sets, read through torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from clipq.data.batches import Batch, Epoch, Samples
from clipq.data.images import check_labels
from clipq.data.seeding import seeded_generator
from clipq.errors import DataError
from clipq.userfunction import load_function

ACCEPTED = (
    "a pair (training, validation), or a triple with a test set last, of data sets that have a length and give "
    "(input, label) by index"
)


@dataclass(frozen=True, eq=False)
class UserSamples(Samples):
    """Samples that a data set of the user's makes one by one.

    Batches are as the data set makes them, with int64 targets of shape (B,), or (B, ...) where a sample has a label at
    each of several positions, such as the characters of a text or the pixels of an image. Their order depends on seed
    and epoch alone and can be resumed; random transforms inside the data set draw from the generators they choose.

    Attributes:
        name: in errors; the function and the part, such as "data.py:make, training set".
        dataset: has ``__len__`` and ``__getitem__``, which gives (input, label).
        num_classes: labels are checked against it, batch by batch; None if it is not known.
        workers: processes that make the samples; 0 for this one.
    """

    name: str
    dataset: Any
    num_classes: int | None
    workers: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def make(self, epoch: Epoch) -> Iterator[Batch]:
        """See `Samples.make`. Augmentation is the data set's own affair."""
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=[group.tolist() for group in epoch.groups[epoch.start :]],
            num_workers=self.workers,
            generator=seeded_generator("workers", epoch.seed, epoch.epoch),
        )
        try:
            for position, made in enumerate(loader, epoch.start):
                yield checked_batch(made, self.num_classes, f"{self.name}, batch {position}")
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.name}: reading a sample raised {type(error).__name__}: {error}. "
                "Check the data set that the function returned"
            ) from error


def load_user_samples(spec: str, workers: int = 0) -> tuple[UserSamples, UserSamples, UserSamples | None]:
    """Call the function that ``spec`` names and adapt what it returns: training, validation and maybe test samples.

    The first sample of each set is read and checked. The number of classes is taken from the attribute ``classes``
    of the training set (as torchvision's have); otherwise it stays unknown.

    Raises:
        DataError: the function cannot be found, raises, or returns something else.
    """
    function = load_function(spec, "data", DataError)
    try:
        made = function()
    except Exception as error:
        raise DataError(
            f"data {spec!r}: the function raised {type(error).__name__}: {error}. It is called without arguments "
            f"and must return {ACCEPTED}"
        ) from error
    if not (isinstance(made, tuple | list) and len(made) in (2, 3)):
        raise DataError(f"data {spec!r}: the function returned {_described(made)}; it must return {ACCEPTED}")
    classes = getattr(made[0], "classes", None)
    num_classes = len(classes) if isinstance(classes, tuple | list) and classes else None
    parts = [
        _adapted(f"{spec}, {part} set", dataset, num_classes, workers)
        for part, dataset in zip(("training", "validation", "test"), made, strict=False)
    ]
    return parts[0], parts[1], parts[2] if len(parts) == 3 else None


def checked_batch(made: object, num_classes: int | None, where: str) -> Batch:
    """A collated batch as (inputs, int64 targets).

    Raises:
        DataError: it is not a pair of tensors of one length, or the targets are not labels in range.
    """
    if not (isinstance(made, tuple | list) and len(made) == 2 and all(isinstance(part, Tensor) for part in made)):
        raise DataError(f"{where}: samples make {_described(made)}; each must be a pair (input, label)")
    inputs, targets = made
    if not targets.dim() or targets.is_floating_point() or targets.is_complex() or len(inputs) != len(targets):
        raise DataError(
            f"{where}: labels are {targets.dtype} of shape {tuple(targets.shape)}; each sample needs one whole number, "
            f"or one for each of its positions"
        )
    targets = targets.long()
    if num_classes is not None:
        check_labels(targets, num_classes, where)
    return inputs, targets


def _adapted(name: str, dataset: Any, num_classes: int | None, workers: int) -> UserSamples:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"{name}: {_described(dataset)} has no length or no index; the function must return {ACCEPTED}")
    try:
        length = len(dataset)
        first = dataset[0] if length else None
    except Exception as error:
        raise DataError(f"{name}: reading its first sample raised {type(error).__name__}: {error}") from error
    if not length:
        raise DataError(f"{name}: it is empty; check the paths and filters that the function uses")
    if not (isinstance(first, tuple | list) and len(first) == 2):
        raise DataError(f"{name}: its first sample is {_described(first)}; each must be a pair (input, label)")
    try:
        batch = default_collate([first])
    except TypeError as error:
        raise DataError(
            f"{name}: its first sample is {_described(first)}, which torch cannot put into a batch ({error}). "
            "Give tensors, arrays or numbers; torchvision's ToTensor makes them from pictures"
        ) from error
    checked_batch(batch, num_classes, f"{name}, first sample")
    return UserSamples(name, dataset, num_classes, workers)


def _described(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(part).__name__ for part in value[:4])})"
    return f"a {type(value).__name__}"
