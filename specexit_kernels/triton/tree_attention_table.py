"""How `tree_attention` is launched: tiles by architecture, head size and query rows, and the number of splits.

Every line is provisional: none has been timed on a GPU yet (`benchmarks/bench_tree_attention.py` will choose). They are
the largest tiles of each height that compile without spilling in the variants of `make aot-full`. (A few of those keep
one value, 8 bytes, in local memory, which is the compiler's price for more programs at a time.)
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from specexit_kernels.triton.launch import Device

WASTE = 0.1  # the share of the best time that fewer splits, with less to merge, may cost; provisional
MAX_SPLITS = 64
WARPS = 8  # of the kernel, that a multiprocessor holds at a time: the tiles of four fit twice
# Units of 32 slots. Of 240 query rows in bf16, a split's part is as large as the K and V of 15 units.
LEAST_UNITS, LEAST_UNITS_FULL = 8, 64


class Config(NamedTuple):
    """block_m query rows of one KV head and block_n slots are one tile; warps and stages are Triton's num_warps and
    num_stages, the latter for the loop without a mask and for the one with."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    masked_stages: int


# By the larger of the two head sizes, then by height.
_Table = dict[int, tuple[Config, ...]]

# wgmma, 227 KB of shared memory.
_HOPPER: _Table = {
    64: (Config(16, 64, 4, 3, 1), Config(32, 64, 4, 3, 1), Config(64, 64, 4, 3, 2), Config(128, 128, 8, 2, 2)),
    128: (Config(16, 64, 4, 3, 1), Config(32, 64, 4, 3, 1), Config(64, 64, 4, 3, 2), Config(128, 64, 8, 3, 2)),
    192: (Config(16, 64, 4, 3, 2), Config(32, 64, 8, 2, 2), Config(64, 64, 8, 2, 2), Config(128, 64, 8, 3, 1)),
    256: (Config(16, 64, 4, 2, 1), Config(32, 64, 4, 3, 1), Config(64, 64, 8, 2, 2)),
}

# tcgen05, 227 KB.
_BLACKWELL: _Table = _HOPPER | {
    64: (Config(16, 64, 4, 3, 1), Config(32, 64, 4, 2, 2), Config(64, 64, 4, 3, 2), Config(128, 128, 8, 2, 2)),
    128: (Config(16, 64, 2, 2, 1), Config(32, 64, 4, 3, 1), Config(64, 64, 4, 3, 2), Config(128, 64, 8, 3, 2)),
}

# mma.sync, 99 KB: an A100 has 163, but sm_86, sm_89 and sm_120 are served by this too.
_AMPERE: _Table = {
    64: (Config(16, 64, 4, 3, 1), Config(32, 64, 4, 2, 1), Config(64, 64, 4, 2, 1), Config(128, 64, 8, 2, 1)),
    128: (Config(16, 64, 4, 3, 2), Config(32, 64, 4, 2, 1), Config(64, 64, 8, 3, 2), Config(128, 32, 8, 3, 2)),
    192: (Config(16, 64, 4, 2, 1), Config(32, 64, 8, 2, 2)),
    256: (Config(16, 64, 4, 2, 1), Config(32, 64, 4, 2, 1)),
}

_FLOAT32 = (Config(16, 32, 8, 1, 1),)  # without tensor cores; for tests


def heights(device: Device, dtype: torch.dtype, head_dim: int) -> tuple[Config, ...]:
    """The table's line, by ascending block_m. `head_dim`: the larger one of keys' and values'; at most 256."""
    if dtype == torch.float32:
        return _FLOAT32
    table = _AMPERE
    if 90 <= device.capability < 120:
        table = _HOPPER if device.capability < 100 else _BLACKWELL
    return table[next(size for size in table if head_dim <= size)]


def choose_config(device: Device, dtype: torch.dtype, head_dim: int, rows: int) -> Config:
    """The lowest tile that holds all `rows` query rows of a KV head (nodes x group), or else the highest."""
    line = heights(device, dtype, head_dim)
    return next((config for config in line if rows <= config.block_m), line[-1])


@functools.lru_cache(1024)  # in eager mode every layer of every step asks
def choose_splits(device: Device, programs: int, warps: int, units: int) -> tuple[int, int]:
    """How many splits fill the device, of a launch that has so many programs with each, of so many warps; and the least
    units of 32 slots that a split takes. `units`: what there can be in a row.

    `waves / splits` is the time. The fewest splits are taken that come within WASTE of the best. Where there are
    programs enough without, a split must also be worth its part, which is written and read again.
    """
    resident = device.multiprocessors * max(1, WARPS // warps)
    least = LEAST_UNITS if programs < resident else LEAST_UNITS_FULL
    most = max(1, min(MAX_SPLITS, units // least))
    times = [math.ceil(programs * splits / resident) / splits for splits in range(1, most + 1)]
    enough = min(times) * (1 + WASTE)
    return next(splits for splits, time in enumerate(times, 1) if time <= enough), least
