"""How `draft_topk` and `project_features` are launched: tiles by architecture and rows, splits, slabs.

Every line is provisional: none has been timed on a GPU yet (`benchmarks/bench_draft_head.py` will choose). They compile
without spilling where rows begin at multiples of 16 entries (others are read one entry at a time), and leave room for
two programs on a multiprocessor where rows are few, so that one loads while the other ends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from specexit_kernels.triton.launch import Device

# Rows that norm themselves in every program of a product: it costs the first of them a pass over the rows. More rows
# are normed once, in a launch of their own. Provisional.
FUSED_NORM_ROWS = 16

# Bytes of fp32 logits that one slab of rows may leave in memory. It bounds memory, not what stays in L2: a further slab
# of R rows reads 2 H / R bytes of weights a logit again, where writing one costs 4.
WORKSPACE = 256 * 2**20


class Config(NamedTuple):
    """A program multiplies `rows` rows with `block_v` rows of the weight, block_h columns at a time; warps and stages
    are Triton's num_warps and num_stages."""

    rows: int
    block_v: int
    block_h: int
    warps: int
    stages: int


_Line = tuple[Config, ...]  # by ascending rows

# Hopper, Blackwell: 227 KB of shared memory. More rows than a tile read the weight several times out of L2: the larger
# the tiles, the fewer.
_HEAD: _Line = (
    Config(16, 128, 128, 4, 3),
    Config(32, 128, 128, 4, 3),
    Config(64, 128, 64, 4, 4),
    Config(128, 256, 64, 8, 4),
)
_HEAD_BLACKWELL: _Line = (*_HEAD[:3], Config(128, 128, 64, 8, 3))
_FEATURES: _Line = (
    Config(16, 32, 128, 4, 8),
    Config(32, 32, 128, 4, 4),
    Config(64, 64, 128, 4, 3),
    Config(128, 64, 64, 8, 4),
)

# 99 KB: an A100 has 163, but sm_86, sm_89 and sm_120 are served by this too.
_HEAD_99: _Line = (
    Config(16, 64, 64, 4, 4),
    Config(32, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 3),
    Config(128, 128, 32, 8, 4),
)
_FEATURES_99: _Line = (
    Config(16, 32, 128, 4, 4),
    Config(32, 32, 128, 4, 3),
    Config(64, 64, 64, 8, 3),
    Config(128, 64, 32, 8, 4),
)

_FLOAT32: _Line = (Config(16, 32, 32, 8, 1),)  # without tensor cores; for tests


def head_configs(device: Device, dtype: torch.dtype) -> tuple[Config, ...]:
    """The table's line for `draft_topk`, by ascending rows."""
    if dtype == torch.float32:
        return _FLOAT32
    if not 90 <= device.capability < 120:
        return _HEAD_99
    return _HEAD if device.capability < 100 else _HEAD_BLACKWELL


def features_configs(device: Device, dtype: torch.dtype) -> tuple[Config, ...]:
    """The table's line for `project_features`, by ascending rows."""
    if dtype == torch.float32:
        return _FLOAT32
    return _FEATURES if 90 <= device.capability < 120 else _FEATURES_99


def choose_config(line: tuple[Config, ...], rows: int) -> Config:
    """The lowest tile that holds all rows, or else the highest."""
    return next((config for config in line if rows <= config.rows), line[-1])


def choose_splits(device: Device, programs: int, blocks: int) -> int:
    """How many splits, of so many blocks of columns, occupy the device: as few as give nine of ten multiprocessors a
    program, and each split at least 8 blocks. Half of the multiprocessors can, it is assumed, ask for all that memory
    gives: a launch that occupies them has one."""
    if programs * 2 >= device.multiprocessors:
        return 1
    wanted = math.ceil(0.9 * device.multiprocessors / programs)
    return max(1, min(wanted, blocks // 8))


def slab_rows(rows: int, padded_vocab: int, tile: int) -> int:
    """How many rows a slab takes, a multiple of the tile's unless it takes all: as many as WORKSPACE holds, evenly."""
    most = max(tile, WORKSPACE // (4 * padded_vocab) // tile * tile)
    slabs = math.ceil(rows / most)
    return math.ceil(math.ceil(rows / slabs) / tile) * tile if slabs > 1 else rows
