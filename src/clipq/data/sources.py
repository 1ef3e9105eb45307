"""The one way to data, by name, from a data file or the user's own function: what comes out is used alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clipq.data.batches import Batches, ImageSamples, Samples
from clipq.data.described import load_pictures
from clipq.data.images import ImageSet
from clipq.data.named import load_images
from clipq.data.split import stratified_split
from clipq.data.user import UserSamples, load_user_samples
from clipq.errors import DataError

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class Data:
    """Everything a run needs of its data.

    Attributes:
        name: as it was asked for.
        train: to learn from, and to choose hyperparameters on.
        validation: to stop early and pick among checkpoints; never overlaps ``train`` in named sets.
        test: for the final report alone; None if the user's function gave none.
        num_classes: labels are 0 to ``num_classes - 1``; None if the user's data does not say.
    """

    name: str
    train: Samples
    validation: Samples
    test: Samples | None
    num_classes: int | None

    def batches(
        self,
        part: Part,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        *,
        drop_last: bool = False,
        start: int = 0,
        channels_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batches:
        """The minibatches of one epoch: "train" shuffled and augmented, the other parts in order and as they are.

        For the arguments see `Samples.batches`. Of several ranks, each gets as many minibatches of "train" as any
        other; of the other parts some may get one less, and together they get every sample once.

        Raises:
            DataError: there is no such part, an argument is out of range, or a sample cannot be used.
        """
        samples: Samples | None = {"train": self.train, "validation": self.validation, "test": self.test}.get(part)
        if samples is None:
            raise DataError(f"data {self.name!r} has no part {part!r}; use 'train' or 'validation'")
        training = part == "train"
        return samples.batches(
            batch_size,
            seed=seed,
            epoch=epoch,
            shuffle=training,
            augment=training,
            drop_last=drop_last,
            start=start,
            channels_last=channels_last,
            rank=rank,
            world_size=world_size,
        )

    def for_outputs(self, outputs: int) -> Data:
        """This data for a network with that many outputs. Where the classes were not known, they are now checked.

        Raises:
            DataError: there are more classes than outputs.
        """
        if self.num_classes is not None:
            if self.num_classes > outputs:
                raise DataError(
                    f"data {self.name!r} has {self.num_classes} classes (labels 0 to {self.num_classes - 1}), but the "
                    f"network has {outputs} outputs. Give the network an output for every class"
                )
            return self
        return replace(
            self,
            train=_with_classes(self.train, outputs),
            validation=_with_classes(self.validation, outputs),
            test=None if self.test is None else _with_classes(self.test, outputs),
            num_classes=outputs,
        )


def load_data(
    name_or_spec: str,
    root: str | Path | None = None,
    seed: int = 0,
    *,
    validation_fraction: float = 0.1,
    workers: int = 0,
) -> Data:
    """Load data by name ("digits", "mnist", "cifar10"), of a data file ("imagenet.yaml"), or from the user's function
    ("file.py:function").

    Args:
        name_or_spec: a data file has the fields of `PictureData`. The function is called without arguments and returns
            torch data sets (training, validation), or (training, validation, test).
        root: where named sets and those of data files lie; see `load_images` and `load_pictures`.
        seed: of the split of a training set into training and validation samples.
        validation_fraction: the share of a training set that is held out, with every class in proportion; not of the
            user's function, and not where a data file says where the validation samples are.
        workers: processes that make the samples of data files and of the user's data sets.

    Raises:
        DataError: the data cannot be found or used; the message names the file, the value and the remedy.
    """
    if workers < 0:
        raise DataError(f"the number of workers is {workers}; it must be 0 (this process) or more")
    if name_or_spec.endswith((".yaml", ".yml")):
        parts = load_pictures(name_or_spec, root, seed, validation_fraction=validation_fraction, workers=workers)
        return Data(name_or_spec, *parts)
    if ":" in name_or_spec:
        train, validation, test = load_user_samples(name_or_spec, workers)
        return Data(name_or_spec, train, validation, test, train.num_classes)
    return split_images(load_images(name_or_spec, root), validation_fraction, seed)


def split_images(images: ImageSet, validation_fraction: float, seed: int) -> Data:
    """Hold part of the training images out for validation.

    Raises:
        DataError: the fraction is out of range, or there are too few images.
    """
    kept, held = stratified_split(images.train.targets, validation_fraction, seed)
    normalisation = images.normalisation
    return Data(
        images.name,
        ImageSamples(f"{images.name}, training set", images.train.subset(kept), normalisation, images.augmentation),
        ImageSamples(f"{images.name}, validation set", images.train.subset(held), normalisation),
        ImageSamples(f"{images.name}, test set", images.test, normalisation),
        images.num_classes,
    )


def _with_classes(samples: Samples, num_classes: int) -> Samples:
    return replace(samples, num_classes=num_classes) if isinstance(samples, UserSamples) else samples
