"""Other tiles and splits for our kernels: what the lines of their tables are to be chosen by.

python benchmarks/bench_draft_head.py --peers tune --cells 1 --budget 300
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

from torch import Tensor

from benchmarks.h200 import ITEMSIZE, SHARED_OF_PROGRAM
from benchmarks.harness import Peer, Prepared, Unavailable
from benchmarks.head_cells import EPS, Projection, Topk
from benchmarks.head_reference import Top
from specexit_kernels.draft_topk import outputs as topk_outputs
from specexit_kernels.project_features import MAX_ROWS
from specexit_kernels.project_features import outputs as features_outputs
from specexit_kernels.triton import draft_topk, project_features
from specexit_kernels.triton.draft_head_table import Config
from specexit_kernels.triton.launch import device_of, run


def tiled(config: Config | None, times: float = 1) -> Callable[[Topk | Projection], Prepared]:
    """Our kernels with these tiles (None: the table's), and with so many times the splits that the table would take."""

    def prepare(problem: Topk | Projection) -> Prepared:
        cell, device = problem.cell, device_of(problem.copies[0].device)
        if cell.op == "level":
            raise Unavailable("the product is draft_topk's")
        if isinstance(problem, Projection) and cell.rows > MAX_ROWS:
            raise Unavailable(f"above {MAX_ROWS} rows cuBLAS computes it")
        if config is not None and config.rows > 16 and cell.rows <= config.rows // 2:
            raise Unavailable(f"{cell.rows} rows fill less than half of a tile")
        note = ""
        splits: int | None = None
        if isinstance(problem, Projection):
            usual = _splits(problem, config)
            splits = max(1, round(usual * times))
            if times != 1 and splits == usual:
                raise Unavailable(f"the table takes {usual} already")
            note = f"{splits} splits"
        elif times != 1:
            raise Unavailable("only project_features has splits")

        def top(lm_head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert isinstance(problem, Topk)
            inputs = (problem.hidden, problem.norm_weight, EPS, lm_head, cell.k)
            arguments = (*inputs, problem.exit_weight, problem.exit_bias, problem.token_map)
            results = topk_outputs(*arguments)
            run(draft_topk.launches(*arguments, *results, device=device, config=config), lm_head.device)
            return results

        def project(weight: Tensor) -> tuple[Tensor, Tensor]:
            assert isinstance(problem, Projection)
            results = features_outputs(problem.features, weight)
            made = project_features.launches(
                problem.features, weight, *results, device=device, config=config, splits=splits
            )
            run(made, weight.device)
            return results

        if isinstance(problem, Projection):
            return Prepared([partial(project, weight) for weight in problem.copies], lambda result: result, note)
        return Prepared([partial(top, weight) for weight in problem.copies], lambda result: (Top(*result), ()), note)

    return prepare


def _splits(problem: Projection, config: Config | None) -> int:
    """What the table would take."""
    weight = problem.copies[0]
    device, results = device_of(weight.device), features_outputs(problem.features, weight)
    made = project_features.launches(problem.features, weight, *results, device=device, config=config)
    return int(made[1].arguments["splits"]) if len(made) > 1 else 1


def _peers() -> tuple[Peer, ...]:
    tiles = [
        Config(rows, block_v, block_h, warps, stages)
        for rows, block_v, block_h, stages in product(
            (16, 32, 64, 128), (128, 256, 64, 32, 16), (64, 128, 256), (3, 4, 6, 8, 2)
        )
        for warps in ((4, 8) if rows * block_v >= 16 * 128 else (4,))
    ]
    fitting = [c for c in tiles if c.stages * (c.rows + c.block_v) * c.block_h * ITEMSIZE <= SHARED_OF_PROGRAM]
    factors = [Peer(f"{times} x splits", tiled(None, times)) for times in (0.5, 2, 4)]
    return (*factors, *(Peer("x".join(map(str, config)), tiled(config)) for config in fitting))


TUNING = _peers()
