"""What a step publishes: one row of integers for each sequence, packed on the device and read on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specexit_kernels import DecodeState, ExitReason, Finish

_FIXED = 4  # n_output, finished, exit_position, exit_reason


class Published(NamedTuple):
    """What a step has published of one sequence.

    tokens         emitted by the step
    finish         whether, and why, the sequence ends with them
    exit_position  of the first exit so far, and its reason
    trace          [n_output][x, e][S]: the signals at each position that was read, NaN where none; empty: not recorded
    """

    tokens: list[int]
    finish: Finish
    exit_position: int
    exit_reason: ExitReason
    trace: list[list[list[float]]]


def publication(state: DecodeState) -> Tensor:
    """Memory for what a step publishes, [B, n] int32."""
    columns = state.output.shape[1] + _FIXED + state.trace[0].numel()
    return torch.zeros(state.batch, columns, dtype=torch.int32, device=state.lengths.device)


def pack(state: DecodeState, out: Tensor) -> None:
    """Write what the step has published to `out`, made by `publication`; in one operation."""
    columns = (state.n_output, state.finished, state.exit_position, state.exit_reason)
    trace = state.trace.flatten(1).view(torch.int32)
    torch.cat([state.output, *(column.unsqueeze(1) for column in columns), trace], 1, out=out)


def unpack(packed: Tensor, depth: int, signals: int) -> list[Published]:
    """The rows of a host copy of `out`, D and S being `depth` and `signals`; the memory may be written again then."""
    width = depth + 1
    traced = packed[:, width + _FIXED :]
    traces: list[list[list[list[float]]]] = [[]] * len(packed)
    if traced.numel():
        traces = traced.view(torch.float32).unflatten(1, (width, 2, signals)).tolist()
    found = []
    for row, trace in zip(packed[:, : width + _FIXED].tolist(), traces, strict=True):
        count, finish, position, reason = row[width:]
        found.append(Published(row[:count], Finish(finish), position, ExitReason(reason), trace[:count]))
    return found
