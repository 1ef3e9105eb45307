"""From an encoded picture to a network's input, with torchvision's transforms (v2)."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from clipq.data.images import Normalisation
from clipq.data.seeding import seeded_generator
from clipq.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How pictures are decoded, cut and, for training, augmented.

    To be evaluated: the short side becomes ``resize`` pixels, and the square of ``size`` in the middle is taken.
    To be trained on: a random part, of 8 to 100 % of the area and 3/4 to 4/3 in shape, becomes the square, and every
    other one is mirrored (Szegedy et al., *Going Deeper with Convolutions*, 2015, section 6).
    """

    size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"]
    normalisation: Normalisation

    def __call__(self, encoded: bytes, draw: tuple[int, int, int] | None) -> Tensor:
        """The picture's uint8 pixels, shape (3, size, size).

        Args:
            draw: seed, epoch and index of the picture, which decide its augmentation; None does not augment.

        Raises:
            Exception: whatever Pillow raises for bytes that are no whole picture.
        """
        import PIL.Image

        try:
            picture = PIL.Image.open(io.BytesIO(encoded)).convert("RGB")
        except PIL.UnidentifiedImageError:  # its own message names the address of the bytes
            raise DataError("no format that Pillow knows") from None
        if draw is None:
            return self._transforms[0](picture)
        # The transforms draw from torch's own generator; of the CPU's alone, which is given back as it was.
        before = torch.get_rng_state()
        try:
            torch.set_rng_state(seeded_generator("augmentation", *draw).get_state())
            return self._transforms[1](picture)
        finally:
            torch.set_rng_state(before)

    @cached_property
    def _transforms(self) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
        v2 = import_transforms()
        how = v2.InterpolationMode(self.interpolation)
        return (
            v2.Compose([v2.Resize(self.resize, how), v2.CenterCrop(self.size), v2.PILToTensor()]),
            v2.Compose(
                [v2.RandomResizedCrop(self.size, interpolation=how), v2.RandomHorizontalFlip(), v2.PILToTensor()]
            ),
        )


def import_transforms() -> Any:
    """The module torchvision.transforms.v2.

    Raises:
        DataError: torchvision is not installed, or does not work here.
    """
    try:
        import torchvision.transforms.v2
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"data of picture files needs torchvision, which cannot be imported ({error}). Install it with "
            "pip install 'clipq[vision]', in the build that goes with your torch"
        ) from error
    return torchvision.transforms.v2
