"""The launches of csrc/sample_targets.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from specexit_kernels.cuda.launch import stream, view
from specexit_kernels.sample_targets import outputs

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Float of csrc/sample_targets.h


def sample_targets_cuda(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """The op `sample_targets` on a GPU."""
    targets = outputs(logits, positions, seeds, temperature, top_k, top_p, min_p)
    rows, vocabulary = logits.shape
    with stream(logits.device) as (module, queue):
        tiles = -(-vocabulary // module.tile)
        best = torch.empty(rows, tiles, dtype=torch.int64, device=logits.device)
        mass = None if top_p is None else torch.empty_like(best)
        module.sample_targets(
            logits.data_ptr(),
            logits.stride(0),
            DTYPES[logits.dtype],
            view(positions, 1),
            view(seeds, 1),
            view(temperature, 1),
            view(top_k, 1),
            view(top_p, 1),
            view(min_p, 1),
            rows,
            vocabulary,
            best.data_ptr(),
            0 if mass is None else mass.data_ptr(),
            targets.data_ptr(),
            queue,
        )
    return targets
