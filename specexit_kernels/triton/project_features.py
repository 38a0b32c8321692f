"""The launches of `project_features`' Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from specexit_kernels.project_features import outputs
from specexit_kernels.triton.draft_head_table import Config, choose_config, choose_splits, features_configs
from specexit_kernels.triton.launch import Device, Launch, device_of, run
from specexit_kernels.triton.project_features_kernels import features_kernel, sum_kernel

SUM_BLOCK, SUM_WARPS = 512, 4  # results of one row that a program adds up; provisional


def launches(
    features: Sequence[Tensor],
    weight: Tensor,
    hidden: Tensor,
    signals: Tensor,
    *,
    device: Device,
    config: Config | None = None,
    splits: int | None = None,
) -> list[Launch]:
    """The launches that write `hidden` and `signals` on `device`, for arguments of the op: the product, and the sum
    where there are splits. The table chooses a config and splits that are not given."""
    n_rows, size = features[0].shape
    config = config or choose_config(features_configs(device, weight.dtype), n_rows)
    row_tiles = triton.cdiv(n_rows, config.rows)
    weight_tiles = triton.cdiv(weight.shape[0], config.block_v)
    blocks = 3 * triton.cdiv(size, config.block_h)
    splits = min(splits or choose_splits(device, row_tiles * weight_tiles, blocks), blocks)
    share = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, share)  # each has some
    partial = None if splits == 1 else weight.new_empty(splits, n_rows, weight.shape[0], dtype=torch.float32)
    shared = {
        "hidden": hidden,
        "signals": signals,
        "partial": partial,
        "n_rows": n_rows,
        "SIGNALS": signals.shape[1],
        "HIDDEN": size,
    }
    product = {
        **shared,
        "first_features": features[0],
        "second_features": features[1],
        "third_features": features[2],
        "weight": weight,
        "row_tiles": row_tiles,
        "weight_tiles": weight_tiles,
        "share": share,
        "stride_first_row": features[0].stride(0),
        "stride_second_row": features[1].stride(0),
        "stride_third_row": features[2].stride(0),
        "stride_weight_row": weight.stride(0),
        "ROWS": config.rows,
        "BLOCK_V": config.block_v,
        "BLOCK_H": config.block_h,
    }
    made = [Launch(features_kernel, row_tiles * weight_tiles * splits, product, config.warps, config.stages)]
    if splits > 1:
        programs = n_rows * triton.cdiv(weight.shape[0], SUM_BLOCK)
        made.append(
            Launch(sum_kernel, programs, {**shared, "splits": splits, "BLOCK_V": SUM_BLOCK}, SUM_WARPS, stages=1)
        )
    return made


def project_features_triton(features: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """The op `project_features` on a GPU."""
    hidden, signals = outputs(features, weight)
    if len(hidden):
        run(launches(features, weight, hidden, signals, device=device_of(weight.device)), weight.device)
    return hidden, signals
