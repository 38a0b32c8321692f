"""Verification of a token tree: the longest path that the base itself would have taken.

    matched[n] = tokens[n] == targets[parent[n]]            targets[m]: the base's choice after node m
    stands[n]  = every ancestor of n and n itself matched   the root always stands

The drafts are deterministic, so following the base's own choice from the root, for as long as the tree holds it, is
lossless (Leviathan et al., 2023, arXiv 2211.17192; Miao et al., 2024, arXiv 2305.09781). Nodes are tested all at once:
a node's ancestors are its visible bits, so no pointer is chased.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specexit_kernels import _checks, bits, cuda
from specexit_kernels._op import Op


def verify_tree_ref(
    tokens: Tensor, parent: Tensor, visible: Tensor, targets: Tensor, depth: int
) -> tuple[Tensor, Tensor]:
    """The meaning of `verify_tree` in plain PyTorch: CPU path and test oracle."""
    nodes = tokens.shape[1]
    matched = tokens == targets.gather(1, parent.long())
    seen = bits.unpack(visible, nodes)  # [B, T, T]

    # One unmatched ancestor outweighs all matched ones: the sum is a node's depth if it stands, negative if it does
    # not, and 0 for the root and for inert nodes, of which argmax takes the root, the first. Exact in fp32 and TF32.
    weight = matched[:, 1:].float().mul_(nodes + 1).sub_(nodes)  # 1 or -T
    deepest = torch.bmm(seen[:, :, 1:].float(), weight.unsqueeze(2)).argmax(1)  # [B, 1]

    # Nodes are topologically ordered, so the visible bits of the deepest node, in order, are its path.
    row = seen.gather(1, deepest.unsqueeze(2).expand(-1, 1, nodes)).squeeze(1)
    on_path, node = row.sort(dim=1, descending=True, stable=True)
    on_path = on_path[:, : depth + 1]
    path = node[:, : depth + 1].int().masked_fill_(~on_path, -1)
    if depth >= nodes:
        path = torch.nn.functional.pad(path, (0, depth + 1 - nodes), value=-1)
    return path, on_path.sum(1, dtype=torch.int32)


def outputs(tokens: Tensor, parent: Tensor, visible: Tensor, targets: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The op's results, empty: what a launch fills, and all that a fake has."""
    batch = tokens.shape[0]
    return tokens.new_empty(batch, depth + 1), tokens.new_empty(batch)


_OP = Op(
    "verify_tree(Tensor tokens, Tensor parent, Tensor visible, Tensor targets, int depth) -> (Tensor, Tensor)",
    verify_tree_ref,
    outputs,
)


def _cuda_limit(tokens: Tensor, *arguments: Any) -> str | None:
    return cuda.tree_limit("tokens", tokens.shape[1]) or cuda.device_limit("tokens", tokens)


cuda.register(_OP, _cuda_limit)


def verify_tree(
    tokens: Tensor,
    parent: Tensor,
    visible: Tensor,
    targets: Tensor,
    depth: int,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The path from the root to the deepest node on which every token is the base's own choice.

    tokens      [B, T] int32; node 0 is the root, whose token is not compared
    parent      [B, T] int32, parent[n] < n for n > 0, and 0 for the root
    visible     [B, T, words(T)] int64: a node's ancestors and itself; no bit for an inert node, which is never accepted
    targets     [B, T] int32: the token that the base chose after each node
    depth       at least 0: how far below the root a path may reach; a longer one is cut there
    path        [B, depth + 1] int32: the accepted nodes, root first, then -1
    n_accepted  [B] int32, 1 to depth + 1: how many nodes the path has, the root included

    Of several deepest nodes (siblings may hold the same token) the one with the lowest index is taken.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or depth.
    """
    sizes: dict[str, int] = {}
    _checks.tensor("tokens", tokens, ("B", "T"), torch.int32, sizes)
    if tokens.shape[1] == 0:
        raise ValueError(f"tokens must have at least one node a row, was {list(tokens.shape)}")
    _checks.tensor("parent", parent, ("B", "T"), torch.int32, sizes, tokens)
    _checks.tensor("visible", visible, ("B", "T", bits.words(tokens.shape[1])), torch.int64, sizes, tokens)
    _checks.tensor("targets", targets, ("B", "T"), torch.int32, sizes, tokens)
    _checks.between("depth", depth, 0, 2**31 - 2)
    path, n_accepted = _OP(tokens, parent, visible, targets, depth, implementation=implementation)
    return path, n_accepted
