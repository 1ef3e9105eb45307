"""clipq: smaller neural networks at the same accuracy.

Joint pruning and quantization in parallel with fine-tuning (CLIP-Q, Tung & Mori, CVPR 2018), without
wrapping the model, and a compressed file that gives back every bit.
"""

from clipq.errors import ClipqError
from clipq.operator import clip_quantize

__all__ = ["ClipqError", "clip_quantize"]
