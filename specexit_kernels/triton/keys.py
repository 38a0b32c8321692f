# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Integers that sort like (score down, index up), so that the best of many is one maximum without ties.

The high half of a key is the score's bits, mapped to a signed integer in the order of the floats; the low half is the
index, its bits inverted. -0.0 and 0.0 are one score. NaN must be replaced by -inf before.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**63))  # below the key of every score
TOP_KEY = tl.constexpr(2**63 - 1)  # above it
_LOW = tl.constexpr(2**32 - 1)


@triton.jit
def key_of(score, index):
    """int64 keys of fp32 scores without NaN, at indices from 0 to 2**31 - 1."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index.to(tl.int64) ^ _LOW)


@triton.jit
def score_of(key):
    """The fp32 score of a key."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(key):
    """The index of a key, int32."""
    return ((key & _LOW) ^ _LOW).to(tl.int32)
