# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""`project_features` in Triton: few rows, which lie in three tensors, times a weight that is read once.

Where the weight's tiles are too few to occupy the device its columns are split, and `sum_kernel` adds the parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specexit_kernels.triton.draft_topk_kernels import load


@triton.jit(do_not_specialize=["n_rows", "row_tiles", "weight_tiles", "share"])
def features_kernel(
    first_features,  # [N, HIDDEN] x
    second_features,
    third_features,
    weight,  # [HIDDEN + SIGNALS, 3 HIDDEN] x
    hidden,  # [N, HIDDEN] x, out
    signals,  # [N, SIGNALS] fp32, out
    partial,  # [splits, N, HIDDEN + SIGNALS] fp32, out; None with one split
    n_rows,
    row_tiles,
    weight_tiles,
    share,  # blocks of BLOCK_H that a split takes
    stride_first_row,
    stride_second_row,
    stride_third_row,
    stride_weight_row,
    SIGNALS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A tile of rows times a tile of the weight's rows, over one split of the 3 HIDDEN columns."""
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) // row_tiles % weight_tiles
    split = tl.program_id(0) // (row_tiles * weight_tiles)
    live = row < n_rows
    row = row.to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    target = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    last = HIDDEN + SIGNALS - 1
    weights = weight + tl.minimum(target, last).to(tl.int64)[:, None] * stride_weight_row + column[None, :]

    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H  # of one tensor
    products = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for block in range(split * share, tl.minimum(split * share + share, 3 * BLOCKS)):
        which = block // BLOCKS
        first = block % BLOCKS * BLOCK_H
        features = tl.where(which == 0, first_features, tl.where(which == 1, second_features, third_features))
        stride = tl.where(which == 0, stride_first_row, tl.where(which == 1, stride_second_row, stride_third_row))
        x = load(features + row[:, None] * stride + column[None, :], live, first, BLOCK_H, HIDDEN)
        tile_weight = load(weights + which * HIDDEN, None, first, BLOCK_H, HIDDEN)
        products = tl.dot(x, tl.trans(tile_weight), products, input_precision="ieee")

    if partial is None:
        _store(products, hidden, signals, row, target, live, SIGNALS, HIDDEN)
    else:
        place = (split * n_rows + row)[:, None] * (HIDDEN + SIGNALS) + target[None, :]
        tl.store(partial + place, products, mask=live[:, None] & (target <= last)[None, :])


@triton.jit
def _store(products, hidden, signals, row, target, live, SIGNALS: tl.constexpr, HIDDEN: tl.constexpr):
    """Columns below HIDDEN to `hidden`, rounded to x; those of the signals as they are."""
    inside = live[:, None] & (target < HIDDEN)[None, :]
    tl.store(hidden + row[:, None] * HIDDEN + target[None, :], products, mask=inside)
    if SIGNALS:
        inside = live[:, None] & ((target >= HIDDEN) & (target < HIDDEN + SIGNALS))[None, :]
        tl.store(signals + row[:, None] * SIGNALS + (target - HIDDEN)[None, :], products, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "splits"])
def sum_kernel(
    partial,  # [splits, N, HIDDEN + SIGNALS] fp32
    hidden,  # [N, HIDDEN] x, out
    signals,  # [N, SIGNALS] fp32, out
    n_rows,
    splits,
    SIGNALS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add the splits of BLOCK_V results of one row, in their order."""
    row = (tl.program_id(0) % n_rows).to(tl.int64) + tl.arange(0, 1)
    target = tl.program_id(0) // n_rows * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (target < HIDDEN + SIGNALS)[None, :]
    total = tl.zeros([1, BLOCK_V], tl.float32)
    for split in range(splits):
        place = (split * n_rows + row)[:, None] * (HIDDEN + SIGNALS) + target[None, :]
        total += tl.load(partial + place, mask=inside, other=0.0)
    _store(total, hidden, signals, row, target, row >= 0, SIGNALS, HIDDEN)
