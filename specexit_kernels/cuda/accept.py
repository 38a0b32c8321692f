"""The launch of csrc/accept.cu."""

from __future__ import annotations

from torch import Tensor

from specexit_kernels.accept import outputs
from specexit_kernels.cuda.launch import stream, view
from specexit_kernels.state import DecodeState


def accept_cuda(
    tokens: Tensor,
    parent: Tensor,
    depth: Tensor,
    visible: Tensor,
    targets: Tensor,
    stop_ids: Tensor,
    state: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `accept` on a GPU."""
    path, n_accepted, next_token = outputs(tokens, parent, depth, visible, targets, stop_ids, state)
    with stream(tokens.device) as (module, queue):
        module.accept(
            view(tokens, 2),
            view(parent, 2),
            view(depth, 2),
            view(visible, 3),
            view(targets, 2),
            view(stop_ids, 1),
            [field.data_ptr() for field in state],
            *tokens.shape,
            path.shape[1],
            stop_ids.numel(),
            DecodeState.of(state).forced.shape[1],
            path.data_ptr(),
            n_accepted.data_ptr(),
            next_token.data_ptr(),
            queue,
        )
    return path, n_accepted, next_token
