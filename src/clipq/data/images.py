"""What an image data set is: pixels, labels, the normalisation that goes with them, and the augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipq.errors import DataError


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels, in memory.

    Attributes:
        inputs: uint8 pixels, shape (N, channels, height, width), contiguous.
        targets: int64 labels, shape (N,).
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> Images:
        """The images at these indices (int64, shape (K,)), copied."""
        return Images(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True)
class Normalisation:
    """How pixels become a network's input: ``(pixel / scale - mean) / std``, per channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 of the shape of ``pixels``, which is (N, channels, height, width)."""
        factor = torch.tensor([1 / (self.scale * s) for s in self.std]).view(-1, 1, 1)
        offset = torch.tensor([m / s for m, s in zip(self.mean, self.std, strict=True)]).view(-1, 1, 1)
        return pixels.float().mul_(factor).sub_(offset)


@dataclass(frozen=True)
class CropAndFlip:
    """The usual augmentation of CIFAR-10: pad with black, crop at random, mirror every other image at random."""

    padding: int

    def __call__(self, images: Tensor, generator: torch.Generator, rank: int = 0, world_size: int = 1) -> Tensor:
        """Augmented copies of ``images``, any dtype, shape (N, channels, height, width); one offset and flip each.

        Ranks draw for all of their images together and take their own, as one process with all images would.
        """
        n, channels, height, width = images.shape
        own = slice(rank * n, (rank + 1) * n)
        offsets = torch.randint(0, 2 * self.padding + 1, (2, world_size * n, 1), generator=generator)[:, own]
        mirrored = torch.randint(0, 2, (world_size * n, 1), generator=generator)[own].bool()
        rows = torch.arange(height) + offsets[0]
        columns = torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width)) + offsets[1]
        # One gather for the whole batch: half the time of indexing each axis, a third of cropping one by one.
        pixels = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]
        padded = F.pad(images, [self.padding] * 4).flatten(2)
        picked = padded.gather(2, pixels.view(n, 1, height * width).expand(n, channels, height * width))
        return picked.view(images.shape)


@dataclass(frozen=True)
class ImageSet:
    """A named data set. ``test`` is for the final report alone: no search and no early stopping may see it."""

    name: str
    train: Images
    test: Images
    num_classes: int
    normalisation: Normalisation
    augmentation: CropAndFlip | None = None


def check_labels(targets: Tensor, num_classes: int, where: str) -> None:
    """Refuse labels outside 0 to ``num_classes - 1``; ``where`` names the file or set they come from.

    Raises:
        DataError: a label is out of range; the message has the first one and its position.
    """
    wrong = (targets < 0) | (targets >= num_classes)
    if bool(wrong.any()):
        first, *within = wrong.nonzero()[0].tolist()
        place = f"position {first}" if not within else f"position {first}, {tuple(within)} in the sample,"
        raise DataError(
            f"{where}: label {int(targets[wrong][0])} at {place} is out of range; with {num_classes} classes, "
            f"labels are 0 to {num_classes - 1}. Check the labels, or give the network more outputs"
        )
