# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Ranking by (score down, index up) with maxima and minima of 32-bit integers, which a warp finds in one instruction.

A score's order is its bits as a signed integer, mapped so that integers compare as the floats do; -0.0 and 0.0 have the
same. NaN must be replaced by -inf before. The best that is left after (last, at) has the highest order, and of those
the lowest index.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below the order of every score: nothing is there
HIGHEST = tl.constexpr(2**31 - 1)  # above it, and above every index


@triton.jit
def order_of(score):
    """int32 orders of fp32 scores without NaN."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(order):
    """The fp32 score of an order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranks_after(order, index, last, at):
    """Which of these come after order `last` at index `at`."""
    return (order < last) | ((order == last) & (index > at))
