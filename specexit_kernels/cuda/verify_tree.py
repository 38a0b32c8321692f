"""The launch of csrc/verify_tree.cu."""

from __future__ import annotations

from torch import Tensor

from specexit_kernels.cuda.launch import stream, view
from specexit_kernels.verify_tree import outputs


def verify_tree_cuda(
    tokens: Tensor, parent: Tensor, visible: Tensor, targets: Tensor, depth: int
) -> tuple[Tensor, Tensor]:
    """The op `verify_tree` on a GPU."""
    path, n_accepted = outputs(tokens, parent, visible, targets, depth)
    with stream(tokens.device) as (module, queue):
        module.verify_tree(
            view(tokens, 2),
            view(parent, 2),
            view(visible, 3),
            view(targets, 2),
            *tokens.shape,
            depth + 1,
            path.data_ptr(),
            n_accepted.data_ptr(),
            queue,
        )
    return path, n_accepted
