"""The training engine behind the command line: from a recipe to a run folder with the compressed file."""

from clipq.finetune.compress import compress
from clipq.finetune.loop import fit
from clipq.finetune.score import Score, score

__all__ = ["Score", "compress", "fit", "score"]
