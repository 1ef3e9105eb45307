"""The constant tables of the model, computed the same on every machine.

Source: docs/format.md, "Tables". Logits are in units of 1/256, probabilities of 1/65536. No entry before rounding
lies within 1e-6 of a rounding boundary, so any mathematics library gives these integers.
"""

from __future__ import annotations

import math

import numpy as np

_LOGIT_LIMIT = 2047
ONE = 1 << 16
LOG_ENTRIES = 2304
NEIGHBOUR_CONTEXTS, ACTIVITY_CONTEXTS = 81, 24
OUT_OF_SPACE = -1  # in place of a number of words

# logit of a probability, by its top 12 bits
STRETCH = np.array(
    [max(-_LOGIT_LIMIT, min(_LOGIT_LIMIT, round(256 * math.log((i + 0.5) / (4095.5 - i))))) for i in range(4096)],
    np.int32,
)
# probability of a logit, by the logit plus 2048
SQUASH = np.array(
    [max(32, min(ONE - 32, round(ONE / (1 + math.exp((2048 - i) / 256))))) for i in range(4096)], np.int32
)
# logarithm of an activity in units of 1/256, kept finite at 0
LOG = np.array([round(256 * math.log((i + 5) / 256)) for i in range(LOG_ENTRIES)], np.int32)
# 1/(n + 1), for running means
RECIPROCAL = np.array([ONE // (n + 1) for n in range(256)], np.int32)
# 1/(n + 1.5), for adaptive probabilities
ADAPT = np.array([2 * ONE // (2 * n + 3) for n in range(256)], np.int32)
# the step of the online regressions after n of them, falling with the root of n
STEP = np.array([131 + math.isqrt(1_400_000 // (1 + n)) for n in range(256)], np.int32)
# of a signed activity plus 8: its size up to 2, and 8 times itself between -3 and 3
NEAR = np.array([min(2, abs(a)) for a in range(-8, 9)], np.int32)
CAPPED = np.array([8 * max(-3, min(3, a)) for a in range(-8, 9)], np.int32)
