# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""`draft_topk` in Triton: products of few rows with a large weight, which is read once, and the top k of each row.

`head_kernel` multiplies normed rows with a tile of the vocabulary and leaves fp32 logits in a workspace, with the
largest and the sum of exponentials of each tile; the weights of the exit signals are one tile more. `select_kernel`
then joins the sums, and takes the k best logits of a row from the tiles with the largest maxima: it reads k tiles at
most.

Rows are few, so a program takes all of them, or a tile of `ROWS`, and streams its share of the weight through shared
memory. What lies beyond the last row or the last entry of H reads as zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specexit_kernels.triton.order import HIGHEST, LOWEST, order_of, ranks_after, score_of

EXIT_BLOCK = tl.constexpr(16)  # columns of the signals' tile, the least that a matrix product takes


@triton.jit
def load(pointers, row_inside, first, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Columns first .. first + BLOCK of rows of SIZE entries, zeros past the end; row_inside None: every row is."""
    if SIZE % BLOCK == 0:
        if row_inside is None:
            tile = tl.load(pointers + first)
        else:
            tile = tl.load(pointers + first, mask=row_inside[:, None], other=0.0)
    else:
        inside = (first + tl.arange(0, BLOCK) < SIZE)[None, :]
        if row_inside is not None:
            inside &= row_inside[:, None]
        tile = tl.load(pointers + first, mask=inside, other=0.0)
    return tile


@triton.jit
def _inverse_rms(rows, live, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of each row; `rows` points to [ROWS, BLOCK]."""
    total = tl.zeros([rows.shape[0], BLOCK // 8], tl.float32)
    for first in range(0, HIDDEN, BLOCK):
        x = load(rows, live, first, BLOCK, HIDDEN).to(tl.float32)
        # Sums of eight, which one thread has loaded: the threads add up theirs once, after the last block.
        total += tl.sum(tl.reshape(x * x, [rows.shape[0], BLOCK // 8, 8]), 2)
    return 1.0 / tl.sqrt_rn(tl.sum(total, 1) / HIDDEN + eps)


@triton.jit
def _normed(x, scale, norm_weight, column, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of a tile of rows, rounded to x after the scale and after the weight, as in Llama."""
    if HIDDEN % BLOCK == 0:
        weight = tl.load(norm_weight + column)
    else:
        weight = tl.load(norm_weight + column, mask=column < HIDDEN, other=0.0)
    rounded = (x.to(tl.float32) * scale[:, None]).to(x.dtype)
    return (rounded.to(tl.float32) * weight.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit(do_not_specialize=["n_rows"])
def norm_kernel(
    hidden,  # [N, HIDDEN] x
    norm_weight,  # [HIDDEN] x
    out,  # [N, HIDDEN] x, out
    eps,
    n_rows,
    stride_hidden_row,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """RMSNorm of ROWS rows, for products that take so many that each program would spend its time on norms."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < n_rows
    row = row.to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    rows = hidden + row[:, None] * stride_hidden_row + column[None, :]
    scale = _inverse_rms(rows, live, eps, HIDDEN, BLOCK_H)
    for first in range(0, HIDDEN, BLOCK_H):
        x = load(rows, live, first, BLOCK_H, HIDDEN)
        normed = _normed(x, scale, norm_weight, first + column, HIDDEN, BLOCK_H)
        inside = live[:, None] & (first + column < HIDDEN)[None, :]
        tl.store(out + row[:, None] * HIDDEN + first + column[None, :], normed, mask=inside)


@triton.jit
def _products(
    rows,
    live,
    scale,
    norm_weight,
    weights,
    weight_inside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rows times the transposed weight tile, [ROWS, COLUMNS] fp32. With `norm_weight` the rows are normed first."""
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    column = tl.arange(0, BLOCK_H)
    for first in range(0, HIDDEN, BLOCK_H):
        x = load(rows, live, first, BLOCK_H, HIDDEN)
        weight = load(weights, weight_inside, first, BLOCK_H, HIDDEN)
        if norm_weight is not None:
            x = _normed(x, scale, norm_weight, first + column, HIDDEN, BLOCK_H)
        products = tl.dot(x, tl.trans(weight), products, input_precision="ieee")
    return products


@triton.jit(do_not_specialize=["n_rows", "vocab", "row_tiles", "vocab_tiles"])
def head_kernel(
    hidden,  # [N, HIDDEN] x
    norm_weight,  # [HIDDEN] x; None: `hidden` is normed
    lm_head,  # [vocab, HIDDEN] x
    exit_weight,  # [SIGNALS, HIDDEN] x, or None
    exit_bias,  # [SIGNALS] x, or None
    logits,  # [N, vocab_tiles * BLOCK_V] fp32, out
    peaks,  # [N, vocab_tiles] fp32, out: the largest logit of each tile
    totals,  # [N, vocab_tiles] fp32, out: its sum of exp(logit - peak)
    signals,  # [N, SIGNALS] fp32, out
    eps,
    n_rows,
    vocab,
    row_tiles,
    vocab_tiles,
    stride_hidden_row,
    stride_head_row,
    stride_exit_row,
    SIGNALS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_NORM: tl.constexpr,
):
    """A tile of rows times a tile of the vocabulary. Tiles of rows are neighbours: they share the weights in L2. The
    last program of each tile of rows computes the signals, where there are any."""
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) // row_tiles
    live = row < n_rows
    row = row.to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    row_start = hidden + row[:, None] * stride_hidden_row
    rows = row_start + column[None, :]
    scale = tl.zeros([ROWS], tl.float32)
    if norm_weight is not None:
        scale = _inverse_rms(row_start + tl.arange(0, BLOCK_NORM)[None, :], live, eps, HIDDEN, BLOCK_NORM)

    if tile < vocab_tiles:
        token = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        # Tokens past the end read the last one's weights, which no mask need keep from memory.
        weights = lm_head + tl.minimum(token, vocab - 1).to(tl.int64)[:, None] * stride_head_row + column[None, :]
        found = _products(rows, live, scale, norm_weight, weights, None, ROWS, BLOCK_V, HIDDEN, BLOCK_H)
        found = tl.where((found == found) & (token < vocab)[None, :], found, float("-inf"))
        tl.store(logits + row[:, None] * (vocab_tiles * BLOCK_V) + token[None, :], found, mask=live[:, None])
        peak = tl.max(found, 1)
        finite = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)  # -inf - -inf would be NaN
        tl.store(peaks + row * vocab_tiles + tile, peak, mask=live)
        tl.store(totals + row * vocab_tiles + tile, tl.sum(tl.exp(found - finite[:, None]), 1), mask=live)
    elif exit_weight is not None:
        signal = tl.arange(0, EXIT_BLOCK)
        exit_rows = exit_weight + signal.to(tl.int64)[:, None] * stride_exit_row + column[None, :]
        raw = _products(rows, live, scale, norm_weight, exit_rows, signal < SIGNALS, ROWS, EXIT_BLOCK, HIDDEN, BLOCK_H)
        if exit_bias is not None:
            raw += tl.load(exit_bias + signal, mask=signal < SIGNALS, other=0.0).to(tl.float32)[None, :]
        read = live[:, None] & (signal < SIGNALS)[None, :]
        tl.store(signals + row[:, None] * SIGNALS + signal[None, :], raw, mask=read)


@triton.jit(do_not_specialize=["vocab_tiles", "k"])
def select_kernel(
    logits,  # [N, vocab_tiles * BLOCK_V] fp32
    peaks,  # [N, vocab_tiles] fp32
    totals,  # [N, vocab_tiles] fp32
    token_map,  # [vocab] int32, or None
    tokens,  # [N, k] int32, out
    logprobs,  # [N, k] fp32, out
    vocab_tiles,
    k,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least vocab_tiles
):
    """The k best logits of one row, one after the other. The best that is left lies in the tile with the largest
    maximum that is left, the first of equals; so a step reads one tile, and takes from it the first entry with that
    maximum that was not taken yet, and the next maximum."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    peak = tl.load(peaks + row * vocab_tiles + tile, mask=tile < vocab_tiles, other=float("-inf"))
    total = tl.load(totals + row * vocab_tiles + tile, mask=tile < vocab_tiles, other=0.0)
    highest = tl.max(peak, 0)
    has_softmax = tl.abs(highest) < float("inf")
    shift = tl.where(has_softmax, highest, 0.0)
    log_total = tl.log(tl.sum(total * tl.exp(peak - shift), 0))

    heads = tl.where(tile < vocab_tiles, order_of(peak), LOWEST)  # of what is left of each tile
    last = tl.full((), HIGHEST, tl.int32)
    token = tl.full((), -1, tl.int32)
    for rank in range(k):
        best = tl.max(heads, 0)
        chosen = tl.min(tl.where(heads == best, tile, HIGHEST), 0)
        entry = chosen * BLOCK_V + tl.arange(0, BLOCK_V)
        order = order_of(tl.load(logits + row * (vocab_tiles * BLOCK_V) + entry))
        left = (order == best) & ranks_after(order, entry, last, token)
        token = tl.min(tl.where(left, entry, HIGHEST), 0)
        last = best
        logprob = tl.where(has_softmax, score_of(best) - shift - log_total, float("-inf"))
        target = token
        if token_map is not None:
            target += tl.load(token_map + token)
        tl.store(tokens + row * k + rank, target)
        tl.store(logprobs + row * k + rank, logprob)
        head = tl.max(tl.where(ranks_after(order, entry, last, token), order, LOWEST), 0)
        heads = tl.where(tile == chosen, head, heads)
