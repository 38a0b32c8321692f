"""The launches of `draft_topk`'s Triton kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from specexit_kernels.draft_topk import outputs
from specexit_kernels.triton.draft_head_table import (
    FUSED_NORM_ROWS,
    Config,
    choose_config,
    head_configs,
    slab_rows,
)
from specexit_kernels.triton.draft_topk_kernels import head_kernel, norm_kernel, select_kernel
from specexit_kernels.triton.launch import Device, Launch, device_of, run

# Provisional. Entries that a program loads at a time to norm its rows: as many as its registers hold, because nothing
# else is on its way to it then.
FUSED_NORM_ENTRIES, NORM_ENTRIES = 32_768, 8192
NORM_ROWS, NORM_WARPS = 4, 4
SELECT_TILES = 1024  # that one warp searches, whose maxima need no barrier; more tiles take more warps


def launches(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    lm_head: Tensor,
    k: int,
    exit_weight: Tensor | None,
    exit_bias: Tensor | None,
    token_map: Tensor | None,
    tokens: Tensor,
    logprobs: Tensor,
    signals: Tensor,
    *,
    device: Device,
    config: Config | None = None,
) -> list[Launch]:
    """The launches that write `tokens`, `logprobs` and `signals` on `device`, for arguments of the op: the product and
    the selection, once a slab of rows; before them the norm, where there are many rows. The table chooses a config
    that is not given."""
    n_rows, size = hidden.shape
    vocab = lm_head.shape[0]
    config = config or choose_config(head_configs(device, hidden.dtype), n_rows)
    made = []
    inside: Tensor | None = norm_weight
    if n_rows > FUSED_NORM_ROWS:
        normed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        made.append(norm(hidden, norm_weight, eps, normed))
        hidden, inside = normed, None

    vocab_tiles = triton.cdiv(vocab, config.block_v)
    width = vocab_tiles * config.block_v
    rows = slab_rows(n_rows, width, config.rows)
    shared = {
        "logits": hidden.new_empty(rows, width, dtype=torch.float32),
        "peaks": hidden.new_empty(rows, vocab_tiles, dtype=torch.float32),
        "totals": hidden.new_empty(rows, vocab_tiles, dtype=torch.float32),
        "vocab_tiles": vocab_tiles,
        "BLOCK_V": config.block_v,
    }
    for start in range(0, n_rows, rows):
        n = min(rows, n_rows - start)
        row_tiles = triton.cdiv(n, config.rows)
        head = {
            **shared,
            "hidden": hidden[start : start + n],
            "norm_weight": inside,
            "lm_head": lm_head,
            "exit_weight": exit_weight,
            "exit_bias": exit_bias,
            "signals": signals[start : start + n],
            "eps": eps,
            "n_rows": n,
            "vocab": vocab,
            "row_tiles": row_tiles,
            "stride_hidden_row": hidden.stride(0),
            "stride_head_row": lm_head.stride(0),
            "stride_exit_row": 0 if exit_weight is None else exit_weight.stride(0),
            "SIGNALS": signals.shape[1],
            "HIDDEN": size,
            "ROWS": config.rows,
            "BLOCK_H": config.block_h,
            "BLOCK_NORM": norm_block(FUSED_NORM_ENTRIES // config.rows, size),
        }
        select = {
            **shared,
            "token_map": token_map,
            "tokens": tokens[start : start + n],
            "logprobs": logprobs[start : start + n],
            "k": k,
            "TILES": triton.next_power_of_2(vocab_tiles),
        }
        warps = min(max(1, select["TILES"] // SELECT_TILES), 32)
        programs = row_tiles * (vocab_tiles + (exit_weight is not None))
        made.append(Launch(head_kernel, programs, head, config.warps, config.stages))
        made.append(Launch(select_kernel, n, select, warps, stages=1))
    return made


def norm(hidden: Tensor, weight: Tensor, eps: float, out: Tensor) -> Launch:
    """The launch that writes the normed rows to `out`."""
    arguments = {
        "hidden": hidden,
        "norm_weight": weight,
        "out": out,
        "eps": eps,
        "n_rows": hidden.shape[0],
        "stride_hidden_row": hidden.stride(0),
        "HIDDEN": hidden.shape[1],
        "ROWS": NORM_ROWS,
        "BLOCK_H": norm_block(NORM_ENTRIES // NORM_ROWS, hidden.shape[1]),
    }
    return Launch(norm_kernel, triton.cdiv(hidden.shape[0], NORM_ROWS), arguments, NORM_WARPS, stages=1)


def norm_block(entries: int, size: int) -> int:
    """How much of a row of `size` entries is normed at a time: a power of two, which eights divide."""
    return max(8, min(entries, triton.next_power_of_2(size)))


def draft_topk_triton(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    lm_head: Tensor,
    k: int,
    exit_weight: Tensor | None = None,
    exit_bias: Tensor | None = None,
    token_map: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `draft_topk` on a GPU."""
    arguments = (hidden, norm_weight, eps, lm_head, k, exit_weight, exit_bias, token_map)
    tokens, logprobs, signals = outputs(*arguments)
    if hidden.shape[0]:
        run(launches(*arguments, tokens, logprobs, signals, device=device_of(hidden.device)), hidden.device)
    return tokens, logprobs, signals
