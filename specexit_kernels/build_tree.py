"""The best candidates of a draft as a token tree: tokens, parents, depths and packed visibility.

The scores must be *monotone*, as `grow_beam` makes them: no candidate's is above its parent's. By (score down, index
up) a parent then precedes its children, and any number of best candidates is a tree. This is not checked. With other
scores a node may lose its parent; it then hangs from the last node chosen before that parent. The result is still a
tree, and the base verifies the tree that it is given, so the text is right; only the draft's advice is worse.

Visibility is the transitive closure of the parent relation. With P[n, parent[n]] = 1 below the diagonal,

    (I + P)^-1 = I - P + P^2 - P^3 ...        P^i[n, m] = 1 where m is the ancestor of n, i levels up

so one triangular solve finds the ancestors of all nodes. Its forward substitution adds one earlier row to each row:
entries are 0, 1 and -1, exact in any float format.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specexit_kernels import _checks, bits, cuda, native
from specexit_kernels._op import Op
from specexit_kernels.state import Tree


def build_tree_ref(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, nodes: int, forced: Tensor, n_forced: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The meaning of `build_tree` in plain PyTorch: CPU path and test oracle."""
    batch, count = tokens.shape
    n_forced = n_forced.unsqueeze(1)
    scores = scores.nan_to_num(-math.inf, math.inf, -math.inf).masked_fill_(n_forced > 0, -math.inf)
    if forced.shape[1] > 1:
        # The forced ids after the root are further candidates: certain where they are due, each the parent of the next.
        # The first names the candidate before it, which such a row does not choose, and so hangs from the root.
        after_root = torch.arange(1, forced.shape[1], device=root.device)
        chain = (after_root + (count - 2)).to(torch.int32).expand(batch, -1)
        due = scores.new_zeros(batch, after_root.numel()).masked_fill_(after_root >= n_forced, -math.inf)
        tokens, scores = torch.cat([tokens, forced[:, 1:]], 1), torch.cat([scores, due], 1)
        parents, count = torch.cat([parents, chain], 1), tokens.shape[1]

    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    # `count` stands for an inert node: the last in order, and one column more in the tensors that are read.
    chosen = order[:, : nodes - 1].masked_fill_(ranked[:, : nodes - 1] == -math.inf, count).sort(dim=1).values
    if nodes - 1 > count:
        chosen = pad(chosen, (0, nodes - 1 - count), value=count)
    chosen = chosen.contiguous()  # which it is, unless scores are not
    node_tokens = torch.cat([root.unsqueeze(1), pad(tokens, (0, 1)).gather(1, chosen)], 1)
    # Nodes are in the order of candidates, after the root: a parent's node is the number of those chosen up to it.
    above = pad(parents, (0, 1), value=-1).gather(1, chosen)
    parent = torch.searchsorted(chosen, above.long(), right=True)

    link = scores.new_zeros(batch, nodes, nodes)
    link[:, 1:].scatter_(2, parent.unsqueeze(2), 1.0)
    identity = torch.eye(nodes, dtype=scores.dtype, device=root.device)
    seen = torch.linalg.solve_triangular(link, identity, upper=False, unitriangular=True).bool()
    depth = seen.sum(2, dtype=torch.int32).sub_(1)
    visible = bits.pack(seen)
    visible[:, 1:].mul_((chosen < count).unsqueeze(2))
    return node_tokens, pad(parent.int(), (1, 0)), depth, visible


def outputs(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, nodes: int, forced: Tensor, n_forced: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's results, empty: what a launch fills, and all that a fake has."""
    batch = root.shape[0]
    tokens, parent, depth = (root.new_empty(batch, nodes) for _ in range(3))
    return tokens, parent, depth, root.new_empty(batch, nodes, bits.words(nodes), dtype=torch.int64)


_OP = Op(
    "build_tree(Tensor root, Tensor tokens, Tensor scores, Tensor parents, int nodes, Tensor forced, Tensor n_forced)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    build_tree_ref,
    outputs,
)


def _cuda_limit(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, nodes: int, *arguments: Any
) -> str | None:
    most, count = native.load().max_candidates, tokens.shape[1]
    if count > most:
        return f"tokens must have at most {most} columns, had {count}"
    return cuda.tree_limit("nodes", nodes) or cuda.device_limit("root", root)


cuda.register(_OP, _cuda_limit)


def build_tree(
    root: Tensor,
    tokens: Tensor,
    scores: Tensor,
    parents: Tensor,
    nodes: int,
    forced: Tensor,
    n_forced: Tensor,
    *,
    implementation: str | None = None,
) -> Tree:
    """A tree of `nodes` nodes: the root and the nodes - 1 best candidates by (score down, index up).

    root      [B] int32: the last emitted token
    tokens    [B, C] int32: the candidates; C may be 0
    scores    [B, C] fp32, monotone: scores[c] <= scores[parents[c]]. One that is -inf or NaN is no candidate
    parents   [B, C] int32: the candidate below which each hangs, parents[c] < c; -1 for the root
    nodes     at least 1: T
    forced    [B, F] int32, F at least 1: ids to emit whatever the base says; forced[:, 0], the root, is not read
    n_forced  [B] int32, 0 to F. Where it is not 0 the row has no candidates: its tree is the chain of its forced ids

    Returns the `Tree`. Its nodes are in the candidates' order; where there are too few, inert nodes follow (token 0,
    parent 0, depth 1, no visible bit).
    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or number of nodes.
    """
    sizes: dict[str, int] = {}
    _checks.tensor("root", root, ("B",), torch.int32, sizes)
    _checks.tensor("tokens", tokens, ("B", "C"), torch.int32, sizes, root)
    _checks.tensor("scores", scores, ("B", "C"), torch.float32, sizes, root)
    _checks.tensor("parents", parents, ("B", "C"), torch.int32, sizes, root)
    _checks.between("nodes", nodes, 1, 2**31 - 1)
    _checks.tensor("forced", forced, ("B", "F"), torch.int32, sizes, root)
    if forced.shape[1] == 0:
        raise ValueError(f"forced must have at least one column, was {list(forced.shape)}")
    _checks.tensor("n_forced", n_forced, ("B",), torch.int32, sizes, root)
    return Tree(*_OP(root, tokens, scores, parents, nodes, forced, n_forced, implementation=implementation))
