# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""`tree_attention` in Triton: flash-decoding whose packed tree mask costs nothing on the prefix.

The query rows of one KV head (the nodes x its group's heads) stand below each other and share every K/V tile. Slots are
counted in units of 32, the bits of half a word: the committed slots, then the scratch slots from the row's length on,
so that scratch unit w is exactly half-word w of `visible`. Most units are seen by every query and take no mask; the
others (the edge of a window, the last committed slots, the scratch units) are attended one by one with theirs.

The units are divided among splits, which the merge joins by their log-sum-exp (Flash-Decoding). How many splits are
launched follows from shapes alone; how many of them work, from the length on the device (`_share`). Where that is one,
it writes the result itself. Scores are in units of log2, because the hardware's exponential is exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(32)  # slots: the bits of half a word
LOWEST = tl.constexpr(-3.4e38)  # finite, where -inf - -inf would be NaN: a tile without any score adds 0
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _share(length, positions, queries, words, splits, least, window, QUERIES: tl.constexpr, BLOCK_UNITS: tl.constexpr):
    """How the units of a row are divided: the first unit that a query sees, the committed units from there on, the
    units of a split (`least` or more, and whole tiles), and the splits that have any. The same in every program of the
    row, and in the merge."""
    first = length * 0
    if window is not None:
        query = tl.arange(0, QUERIES)
        position = tl.load(positions + query, mask=query < queries, other=2147483647)
        first = tl.minimum(tl.maximum(tl.min(position, 0) - window + 1, 0), length) // UNIT
    units = tl.cdiv(length, UNIT) - first + words
    share = tl.cdiv(tl.maximum(tl.cdiv(units, splits), least), BLOCK_UNITS) * BLOCK_UNITS
    return first, units - words, share, tl.cdiv(units, share)


@triton.jit
def _rows(cache, slot, needed, table, stride_page, stride_slot, PAGE: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to slots in the cache of one head; through the row's page table where there is one."""
    if table is None:
        offset = slot.to(tl.int64) * stride_slot
    else:
        entry = table + slot // PAGE
        page = tl.load(entry) if needed is None else tl.load(entry, mask=needed, other=0)
        offset = page.to(tl.int64) * stride_page + (slot % PAGE).to(tl.int64) * stride_slot
    return cache + offset * ALIGN


@triton.jit
def _load(rows, needed, FIRST: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Columns FIRST .. FIRST + BLOCK of rows of SIZE entries, [rows, BLOCK]: zeros past the end, and in rows that are
    not needed (None: all are)."""
    column = FIRST + tl.arange(0, BLOCK)
    pointers = rows[:, None] + column[None, :]
    if FIRST + BLOCK <= SIZE:
        tile = tl.load(pointers) if needed is None else tl.load(pointers, mask=needed[:, None], other=0.0)
    else:
        inside = (column < SIZE)[None, :]
        if needed is not None:
            inside &= needed[:, None]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def _scores(q, q_rest, rows, needed, scale, softcap, HEAD: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """The scores of a tile, [queries, slots]: q . k, or with a softcap c tanh(scale * q . k / c)."""
    scores = tl.dot(q, tl.trans(_load(rows, needed, 0, BLOCK, HEAD)), input_precision="ieee")
    if REST:
        k = _load(rows, needed, BLOCK, REST, HEAD)
        scores = tl.dot(q_rest, tl.trans(k), scores, input_precision="ieee")
    if softcap is not None:  # tanh(x) = 1 - 2 / (exp(2x) + 1): right at both ends, where exp is 0 or infinite
        scores = softcap - 2 * softcap / (tl.exp2(scores * (scale / softcap * 2 * LOG2E)) + 1)
    return scores


@triton.jit
def _accumulate(acc, acc_rest, peak, total, scores, v, v_rest, factor, REST: tl.constexpr):
    """One step of the online softmax: sums of exp2(factor * score - peak), alone and times V."""
    highest = tl.maximum(peak, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - highest[:, None])
    decay = tl.exp2(peak - highest)
    total = total * decay + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
    if REST:
        acc_rest = tl.dot(weights, v_rest, acc_rest * decay[:, None], input_precision="ieee")
    return acc, acc_rest, highest, total


@triton.jit
def _finite(rows, needed, FIRST: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Which of these rows hold no NaN and no infinity."""
    tile = _load(rows, needed, FIRST, BLOCK, SIZE).to(tl.float32)
    return tl.min((tl.abs(tile) < float("inf")).to(tl.int32), 1) > 0


@triton.jit
def _store(out, acc, acc_rest, live, SIZE: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """Write fp32 rows, rounded to what `out` points to."""
    column = tl.arange(0, BLOCK)
    tl.store(out[:, None] + column[None, :], acc, mask=live[:, None] & (column < SIZE)[None, :])
    if REST:
        column = BLOCK + tl.arange(0, REST)
        tl.store(out[:, None] + column[None, :], acc_rest, mask=live[:, None] & (column < SIZE)[None, :])


# What changes from call to call would be compiled anew for 1 and for multiples of 16. What the strides of K and V are
# multiples of, ALIGN says.
@triton.jit(
    do_not_specialize=[
        *("window", "queries", "words", "slots", "splits", "least", "tiles"),
        *("stride_k_batch", "stride_k_head", "stride_k_slot", "stride_v_batch", "stride_v_head", "stride_v_slot"),
        *("stride_positions_batch", "stride_visible_batch", "stride_visible_query", "stride_table_batch"),
    ]
)
def attend_kernel(
    q,  # [B, Tq, Hq, HEAD] x
    k,  # [B, Hkv, slots, HEAD] x, or [pages, page, Hkv, HEAD]
    v,  # the same with VALUE
    lengths,  # [B] int32
    positions,  # [B, Tq] int32
    visible,  # [B, Tq, words] int32: the halves of the words, low one first
    sinks,  # [Hq], or None
    table,  # [B, blocks] int32, or None
    out,  # [B, Tq, Hq, VALUE] x, out
    partial,  # [B, Tq, Hq, splits, VALUE] fp32, out; None with one split
    partial_lse,  # [B, Tq, Hq, splits] fp32, out; None with one split
    scale,
    softcap,  # or None
    window,  # or None
    queries,
    words,
    slots,
    kv_heads,
    splits,
    least,
    tiles,
    stride_q_batch,
    stride_q_query,
    stride_q_head,
    stride_k_batch,  # of a page in a paged cache; of K and V in multiples of ALIGN
    stride_k_head,
    stride_k_slot,
    stride_v_batch,
    stride_v_head,
    stride_v_slot,
    stride_positions_batch,
    stride_visible_batch,
    stride_visible_query,
    stride_table_batch,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,  # HEAD is covered by two powers of two, of which the second may be 0
    HEAD_REST: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_REST: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,  # a power of two, at least `queries`; 1 without a window
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):
    """One split of one tile of query rows of one KV head. The tiles of a split are neighbours: they share K and V."""
    program = tl.program_id(0)
    split = program // tiles % splits
    kv_head = program // (tiles * splits) % kv_heads
    batch = (program // (tiles * splits * kv_heads)).to(tl.int64)

    length = tl.minimum(tl.load(lengths + batch), slots)
    positions += batch * stride_positions_batch
    first, committed, share, active = _share(
        length, positions, queries, words, splits, least, window, QUERIES, BLOCK_N // UNIT
    )
    if split >= active:
        return

    row = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < queries * GROUP
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    q += batch * stride_q_batch + query.to(tl.int64) * stride_q_query + head.to(tl.int64) * stride_q_head
    q_block = _load(q, live, 0, HEAD_BLOCK, HEAD)
    q_rest = q_block  # stands where there is no rest, as others below: a name must always have a value
    if HEAD_REST:
        q_rest = _load(q, live, HEAD_BLOCK, HEAD_REST, HEAD)
    visible += batch * stride_visible_batch + query.to(tl.int64) * stride_visible_query
    k += kv_head.to(tl.int64) * stride_k_head * ALIGN
    v += kv_head.to(tl.int64) * stride_v_head * ALIGN
    if table is None:
        k += batch * stride_k_batch * ALIGN
        v += batch * stride_v_batch * ALIGN
    else:
        table += batch * stride_table_batch

    # This split's units: [begin, stop) counted from `first`. Those before `edge` are at the window's edge.
    begin = split * share
    stop = tl.minimum(begin + share, committed + words)
    edge = first * 0
    position = row
    if window is not None:
        position = tl.load(positions + query, mask=live, other=0)
        farthest = tl.max(tl.where(live, position, 0), 0)
        nearest = tl.min(tl.where(live, position, 2147483647), 0)
        seen_by_all = tl.maximum(farthest - window + 1, 0)
        edge = tl.minimum(tl.maximum(seen_by_all // UNIT + (seen_by_all % UNIT > 0) - first, 0), committed)
    whole_begin = tl.minimum(tl.maximum(begin, edge), stop)
    whole_stop = tl.maximum(tl.minimum(stop, length // UNIT - first), whole_begin)
    whole_stop -= (whole_stop - whole_begin) % (BLOCK_N // UNIT)

    # A sink is a slot with this score and nothing to add. It is counted once: here, or in the merge.
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        peak = tl.where(active == 1, tl.maximum(sink, LOWEST), LOWEST)
        total += tl.where(active == 1, 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
    acc_rest = peak
    if VALUE_REST:
        acc_rest = tl.zeros([BLOCK_M, VALUE_REST], tl.float32)
    factor = scale * LOG2E
    if softcap is not None:  # _scores has applied the scale
        factor = LOG2E

    # Units with a mask: at the window's edge, the committed slots that are left over below, and the scratch slots.
    edges = whole_begin - begin
    for index in tl.range(0, stop - begin - (whole_stop - whole_begin), num_stages=MASKED_STAGES):
        unit = begin + index + tl.where(index < edges, 0, whole_stop - whole_begin)
        word = unit - committed
        bit = tl.arange(0, UNIT)
        slot = tl.where(word < 0, (first + unit) * UNIT, length + word * UNIT) + bit
        bits = tl.load(visible + word, mask=live & (word >= 0), other=0)
        inside = slot < length
        if window is not None:
            inside &= slot > nearest - window
        # What no query of the tile sees is not even read.
        needed = (inside | ((tl.reduce(bits, 0, _either) >> bit) & 1 != 0)) & (slot < slots)
        k_rows = _rows(k, slot, needed, table, stride_k_batch, stride_k_slot, PAGE, ALIGN)
        v_rows = _rows(v, slot, needed, table, stride_v_batch, stride_v_slot, PAGE, ALIGN)
        scores = _scores(q_block, q_rest, k_rows, needed, scale, softcap, HEAD, HEAD_BLOCK, HEAD_REST)
        # A weight of zero does not silence a NaN in V. A slot that holds one is read as zeros, and what it held goes
        # into the scores of those who see it.
        finite = _finite(v_rows, needed, 0, VALUE_BLOCK, VALUE)
        if VALUE_REST:
            finite &= _finite(v_rows, needed, VALUE_BLOCK, VALUE_REST, VALUE)
        value = _load(v_rows, needed & finite, 0, VALUE_BLOCK, VALUE)
        value_rest = value
        if VALUE_REST:
            value_rest = _load(v_rows, needed & finite, VALUE_BLOCK, VALUE_REST, VALUE)
        scores = tl.where(finite[None, :], scores, float("nan"))
        inside = needed[None, :] & (slot < length)[None, :]
        if window is not None:
            inside &= slot[None, :] > position[:, None] - window
        seen = inside | (needed[None, :] & ((bits[:, None] >> bit[None, :]) & 1 != 0))
        scores = tl.where(seen, scores, float("-inf"))
        acc, acc_rest, peak, total = _accumulate(
            acc, acc_rest, peak, total, scores, value, value_rest, factor, VALUE_REST
        )

    # Committed slots that every query sees: no mask.
    for unit in tl.range(whole_begin, whole_stop, BLOCK_N // UNIT):
        slot = (first + unit) * UNIT + tl.arange(0, BLOCK_N)
        k_rows = _rows(k, slot, None, table, stride_k_batch, stride_k_slot, PAGE, ALIGN)
        v_rows = _rows(v, slot, None, table, stride_v_batch, stride_v_slot, PAGE, ALIGN)
        scores = _scores(q_block, q_rest, k_rows, None, scale, softcap, HEAD, HEAD_BLOCK, HEAD_REST)
        value = _load(v_rows, None, 0, VALUE_BLOCK, VALUE)
        value_rest = value
        if VALUE_REST:
            value_rest = _load(v_rows, None, VALUE_BLOCK, VALUE_REST, VALUE)
        acc, acc_rest, peak, total = _accumulate(
            acc, acc_rest, peak, total, scores, value, value_rest, factor, VALUE_REST
        )

    total = tl.where(total == 0, 1.0, total)  # a query that sees nothing: zeros
    acc = acc / total[:, None]
    if VALUE_REST:
        acc_rest = acc_rest / total[:, None]
    out_row = (batch * queries + query) * (kv_heads * GROUP) + head
    alone = live & (active == 1)
    _store(out + out_row * VALUE, acc, acc_rest, alone, VALUE, VALUE_BLOCK, VALUE_REST)
    if partial is not None:  # noqa: SIM102, decided when the kernel is compiled; the next, when it runs
        if active > 1:
            out_row = out_row * splits + split
            tl.store(partial_lse + out_row, peak + tl.log2(total), mask=live)
            _store(partial + out_row * VALUE, acc, acc_rest, live, VALUE, VALUE_BLOCK, VALUE_REST)


@triton.jit(
    do_not_specialize=["window", "queries", "words", "slots", "splits", "least", "stride_positions_batch"],
)
def merge_kernel(
    partial,  # [B, Tq, Hq, splits, VALUE] fp32
    partial_lse,  # [B, Tq, Hq, splits] fp32
    lengths,  # [B] int32
    positions,  # [B, Tq] int32
    sinks,  # [Hq], or None
    out,  # [B, Tq, Hq, VALUE] x, out
    window,  # or None
    queries,
    words,
    slots,
    heads,
    splits,
    least,
    stride_positions_batch,
    VALUE: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, at least VALUE
    QUERIES: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Join the splits of a few queries and heads of one sequence."""
    blocks = tl.cdiv(queries * heads, BLOCK_ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    length = tl.minimum(tl.load(lengths + batch), slots)
    positions += batch * stride_positions_batch
    _, _, _, active = _share(length, positions, queries, words, splits, least, window, QUERIES, BLOCK_UNITS)
    if active == 1:
        return

    row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < queries * heads
    peak = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + row % heads, mask=live, other=0.0).to(tl.float32) * LOG2E
        peak = tl.maximum(sink, LOWEST)
        total += 1.0
    row += batch * queries * heads
    column = tl.arange(0, COLUMNS)
    acc = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    for first in range(0, active, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        there = live[:, None] & (split < active)[None, :]
        part_row = (row * splits)[:, None] + split[None, :]
        lse = tl.load(partial_lse + part_row, mask=there, other=float("-inf"))
        part = tl.load(
            partial + part_row[:, :, None] * VALUE + column[None, None, :],
            mask=there[:, :, None] & (column < VALUE)[None, None, :],
            other=0.0,
        )
        highest = tl.maximum(peak, tl.max(lse, 1))
        decay = tl.exp2(peak - highest)
        weights = tl.exp2(lse - highest[:, None])
        acc = acc * decay[:, None] + tl.sum(part * weights[:, :, None], 1)
        total = total * decay + tl.sum(weights, 1)
        peak = highest
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    _store(out + row * VALUE, acc, acc, live, VALUE, COLUMNS, 0)
