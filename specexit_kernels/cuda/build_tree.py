"""The launch of csrc/build_tree.cu."""

from __future__ import annotations

from torch import Tensor

from specexit_kernels.build_tree import outputs
from specexit_kernels.cuda.launch import stream, view


def build_tree_cuda(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, nodes: int, forced: Tensor, n_forced: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `build_tree` on a GPU."""
    made = outputs(root, tokens, scores, parents, nodes, forced, n_forced)
    with stream(root.device) as (module, queue):
        module.build_tree(
            view(root, 1),
            view(tokens, 2),
            view(scores, 2),
            view(parents, 2),
            view(forced, 2),
            view(n_forced, 1),
            *tokens.shape,
            forced.shape[1],
            nodes,
            *(tensor.data_ptr() for tensor in made),
            queue,
        )
    return made
