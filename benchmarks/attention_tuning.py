"""Other tiles and splits for our kernel: what the lines of its table are to be chosen by.

python benchmarks/bench_tree_attention.py --peers tune --cells 1 --budget 300
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.attention_cells import Problem
from benchmarks.harness import Peer, Prepared, Unavailable
from specexit_kernels.triton.launch import Launch, device_of, run
from specexit_kernels.triton.tree_attention import launches
from specexit_kernels.triton.tree_attention_table import MAX_SPLITS, Config


def tiled(config: Config | None, times: float = 1) -> Callable[[Problem], Prepared]:
    """Our kernel with these tiles (None: the table's), and with so many times the splits that the table would take."""

    def prepare(problem: Problem) -> Prepared:
        model = problem.cell.model
        options = (problem.scale, model.window, model.softcap, problem.sinks, None)
        device = device_of(problem.lengths.device)
        if config is not None and config.block_m > 16 and problem.cell.rows <= config.block_m // 2:
            raise Unavailable(f"{problem.cell.rows} rows fill less than half of a tile")

        def made(q: Tensor, k: Tensor, v: Tensor, splits: int | None) -> tuple[Tensor, list[Launch]]:
            out = torch.empty_like(q)
            tensors = (q, k, v, problem.lengths, problem.positions, problem.visible)
            return out, launches(*tensors, *options, out, device=device, config=config, splits=splits)

        usual = made(*problem.copies[0], None)[1][0].arguments["splits"]
        splits = min(MAX_SPLITS, max(1, round(usual * times)))
        if times != 1 and splits == usual:
            raise Unavailable(f"the table takes {usual} already")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, found = made(q, k, v, splits)
            run(found, out.device)
            return out

        return Prepared([partial(attend, *copy) for copy in problem.copies], lambda result: result, f"{splits} splits")

    return prepare


def _peers() -> tuple[Peer, ...]:
    factors = [Peer(f"{times} x splits", tiled(None, times)) for times in (0.25, 0.5, 2, 4)]
    tiles = [
        Config(block_m, block_n, warps, stages, masked)
        for block_m, block_n, stages, masked in product((128, 64, 32, 16), (64, 128), (3, 2, 4), (2, 1))
        for warps in ((4, 8) if block_m >= 64 else (4,))
    ]
    return (*factors, *(Peer("x".join(map(str, config)), tiled(config)) for config in tiles))


TUNING = _peers()
