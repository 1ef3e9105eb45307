"""clipq: smaller neural networks at the same accuracy.

Joint pruning and quantization in parallel with fine-tuning (CLIP-Q, Tung & Mori, CVPR 2018), without
wrapping the model, and a compressed file that gives back every bit.
"""

from clipq.attach import Attachment, attach
from clipq.errors import ClipqError
from clipq.files import load, save
from clipq.hold import SizeHolder
from clipq.norms import fold_norms
from clipq.operator import clip_quantize
from clipq.plan import Plan
from clipq.search import Target, search

__all__ = [
    "Attachment",
    "ClipqError",
    "Plan",
    "SizeHolder",
    "Target",
    "attach",
    "clip_quantize",
    "fold_norms",
    "load",
    "save",
    "search",
]
