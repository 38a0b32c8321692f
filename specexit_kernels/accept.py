"""Acceptance: the tokens that a step emits, and the state after them.

    verify -> stop at the first stop id -> stop at the row's limit -> commit

Forced ids take the place of the base's choices, so that a forced sequence is verified like any other. A finish found
here is provisional: `decide_exit` clears it when it cuts the run before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specexit_kernels import _checks, bits, cuda
from specexit_kernels._op import Op
from specexit_kernels.state import DecodeState, Finish, Tree
from specexit_kernels.verify_tree import verify_tree_ref


def accept_ref(
    tokens: Tensor,
    parent: Tensor,
    depth: Tensor,
    visible: Tensor,
    targets: Tensor,
    stop_ids: Tensor,
    state: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of `accept` in plain PyTorch: CPU path and test oracle."""
    s = DecodeState.of(state)
    columns = s.run.shape[1] - 1  # D + 1
    if s.forced.shape[1] > 1:  # one forced id is the root, and forces nothing more
        targets = _force(targets, depth, s)
    path, n_found = verify_tree_ref(tokens, parent, visible, targets, columns - 1)
    emitted = targets.gather(1, path.clamp(min=0))  # junk past the path

    # A finished row has no room, and none that it could fill: -1.
    room = (s.limits - s.lengths).sub_(1).clamp_(min=0).masked_fill_(s.finished.bool(), -1)
    n = torch.minimum(n_found, room).clamp_(min=0)
    count = torch.arange(1, columns + 1, dtype=torch.int32, device=n.device)  # tokens up to each column
    first_stop = None
    if stop_ids.numel():
        others = emitted != stop_ids if stop_ids.numel() == 1 else (emitted.unsqueeze(-1) != stop_ids).all(-1)
        first_stop = count.masked_fill(others, columns + 1).amin(1)
        n = torch.minimum(n, first_stop)

    dropped = count > n.unsqueeze(1)
    path.masked_fill_(dropped, -1)
    torch.cat([s.root.unsqueeze(1), emitted.masked_fill_(dropped, 0)], 1, out=s.run)
    s.root.copy_(s.run.gather(1, n.unsqueeze(1)).squeeze(1))
    s.n_pending.copy_(n)
    s.lengths.add_(n)
    s.finished.masked_fill_(n == room, Finish.LENGTH)
    if first_stop is not None:
        s.finished.masked_fill_(n == first_stop, Finish.STOP)
    _shift_forced(s, n)
    return path, n, s.root.clone()


def _force(targets: Tensor, depth: Tensor, s: DecodeState) -> Tensor:
    """Targets [B, T] of nodes at depth d replaced by forced[d + 1], where there is one."""
    after = depth + 1
    ids = s.forced.gather(1, after.clamp(max=s.forced.shape[1] - 1))
    return torch.where(after < s.n_forced.unsqueeze(1), ids, targets)


def _shift_forced(s: DecodeState, n: Tensor) -> None:
    """Drop the forced ids before the new root, n of them."""
    s.n_forced.sub_(n).clamp_(min=0)
    width = s.forced.shape[1]
    if width > 1:
        column = torch.arange(width, dtype=torch.int32, device=n.device)
        source = (column + n.unsqueeze(1)).clamp_(max=width - 1)
        s.forced.copy_(s.forced.gather(1, source).mul_(column < s.n_forced.unsqueeze(1)))
    else:
        s.forced.mul_(s.n_forced.unsqueeze(1))  # n_forced is 0 or 1


def outputs(
    tokens: Tensor,
    parent: Tensor,
    depth: Tensor,
    visible: Tensor,
    targets: Tensor,
    stop_ids: Tensor,
    state: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's results, empty: what a launch fills, and all that a fake has."""
    output = DecodeState.of(state).output
    batch, columns = output.shape
    return output.new_empty(batch, columns), output.new_empty(batch), output.new_empty(batch)


_OP = Op(
    "accept(Tensor tokens, Tensor parent, Tensor depth, Tensor visible, Tensor targets, Tensor stop_ids,"
    " Tensor(a!)[] state) -> (Tensor, Tensor, Tensor)",
    accept_ref,
    outputs,
)


def _cuda_limit(tokens: Tensor, *arguments: Any) -> str | None:
    *_, state = arguments
    return (
        cuda.tree_limit("tree.tokens", tokens.shape[1])
        or cuda.dense_limit("state", DecodeState, state)
        or cuda.device_limit("tree.tokens", tokens)
    )


cuda.register(_OP, _cuda_limit)


def accept(
    tree: Tree, targets: Tensor, stop_ids: Tensor, state: DecodeState, *, implementation: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify the trees and commit what they and the base agree on, one token more included.

    tree        the trees that the base has read; their roots are the state's
    targets     [B, T] int32: the token that the base chose after each node
    stop_ids    [n] int32: the run ends after the first of them; n may be 0
    state       changed in place, see below
    path        [B, D + 1] int32: the accepted nodes, root first, then -1
    n_accepted  [B] int32: how many there are, m; 0 for a row that has finished
    next_token  [B] int32: the new root

    While forced ids are pending, the target of a node at depth d is `state.forced[:, d + 1]`. The path's nodes yield
    the tokens e_1 .. e_n: those of the path after the root, and the target of its last node; the m of them that end
    with the first stop id, or at the row's limit, are kept. Of the state, `run` becomes the old root and e_1 .. e_m,
    `n_pending` m, `lengths` grows by m, `root` is e_m, the forced ids move up by m, and `finished` says whether a stop
    id or the limit was met. A finished row keeps its state, with an empty run (`n_pending` 0).

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape or device.
    """
    if not isinstance(state, DecodeState):
        raise TypeError(f"state must be a DecodeState, was {type(state).__name__}")
    if not isinstance(tree, Tree):
        raise TypeError(f"tree must be a Tree, was {type(tree).__name__}")
    sizes = {"B": state.batch}
    tokens, parent, depth, visible = tree
    like = state.lengths
    _checks.tensor("tree.tokens", tokens, ("B", "T"), torch.int32, sizes, like)
    if tokens.shape[1] == 0:
        raise ValueError(f"tree.tokens must have at least one node a row, was {list(tokens.shape)}")
    _checks.tensor("tree.parent", parent, ("B", "T"), torch.int32, sizes, like)
    _checks.tensor("tree.depth", depth, ("B", "T"), torch.int32, sizes, like)
    _checks.tensor("tree.visible", visible, ("B", "T", bits.words(tokens.shape[1])), torch.int64, sizes, like)
    _checks.tensor("targets", targets, ("B", "T"), torch.int32, sizes, like)
    _checks.tensor("stop_ids", stop_ids, ("n",), torch.int32, sizes, like)
    path, n_accepted, next_token = _OP(
        tokens, parent, depth, visible, targets, stop_ids, state.tensors(), implementation=implementation
    )
    return path, n_accepted, next_token
