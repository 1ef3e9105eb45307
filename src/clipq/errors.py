"""Every error that clipq raises on purpose.

Each message names the thing, the value it got, what is accepted and what to do next.
"""

from __future__ import annotations


class ClipqError(Exception):
    """Base class of every error raised by clipq."""


class WeightError(ClipqError, ValueError):
    """A tensor, pruning rate or bit width that the operator cannot work on."""


class PlanError(ClipqError, ValueError):
    """A plan that cannot be read, is inconsistent, or does not fit the model."""


class AttachError(ClipqError, RuntimeError):
    """In-parallel training that was set up or used in a way that would give wrong weights."""


class ArchiveError(ClipqError):
    """A ``.clipq`` file, or the input of one, that cannot be written or read."""


class DamagedFileError(ArchiveError):
    """A ``.clipq`` file that is not as it was written, or is no such file."""


class TooLargeError(ArchiveError):
    """A ``.clipq`` file that would take more memory than the caller allows."""


class MismatchError(ArchiveError):
    """Tensors that do not fit the model they are loaded into."""


class DataError(ClipqError):
    """A data set that is missing, damaged, empty or does not fit the model."""


class RecipeError(ClipqError, ValueError):
    """A recipe, or one of its fields, that cannot be used."""


class TrainingError(ClipqError, RuntimeError):
    """Training that cannot go on, such as a loss that is not a number."""


class SearchError(ClipqError, RuntimeError):
    """A search for a plan that cannot start, go on or meet its target."""


class CheckpointError(ClipqError):
    """Checkpoints of a run that are all damaged, cannot be reached, or belong to something else."""


class Interrupted(ClipqError):
    """A run that was asked to stop by a signal, and kept what it had.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int = 15) -> None:
        super().__init__(message)
        self.signal = signal
