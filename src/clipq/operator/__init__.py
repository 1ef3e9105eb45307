"""The CLIP-Q operator: clip, partition and quantize weights (paper, section 3.1)."""

from clipq.operator.dispatch import Quantizer, QuantizerEntry
from clipq.operator.library import quantize
from clipq.operator.reference import Quantized, Thresholds, clip_quantize

__all__ = ["Quantized", "Quantizer", "QuantizerEntry", "Thresholds", "clip_quantize", "quantize"]
