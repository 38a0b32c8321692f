"""One step of decoding, in the order in which it happens.

A step is a function of the model, the draft, the rules and a set of fixed-address buffers. Its shapes are static and
it never asks the device for a value, so on a GPU it is captured once and replayed.

It begins with growing the tree that it verifies. So what it publishes is out before the next tree is grown, the last
step grows none in vain, and no tree outlives its step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specexit.attention import TreeContext
from specexit.base import BaseModel
from specexit.cache import SlotCache
from specexit.config import TreeConfig
from specexit.drafts.base import DraftBatch
from specexit.sampling import Choose
from specexit_kernels import DecodeState, ExitRules, Tree, accept, bits, build_tree, compact_kv, decide_exit


@dataclass(frozen=True)
class Buffers:
    """What a batch carries from step to step; every tensor keeps its address.

    chain          the form of a chain of nodes, of which only the tokens change; None: trees branch
    stop_ids       [n] int32
    last_features  [B, n H]: the base's features at position L - 1, which the draft reads again with the root
    no_signals     [B, D + 1, 0] float32: what a missing draft says
    """

    chain: Tree | None
    state: DecodeState
    cache: SlotCache
    stop_ids: Tensor
    last_features: Tensor
    no_signals: Tensor

    def rows(self, first: int, count: int) -> Buffers:
        """Those of the rows [first, first + count), in the same memory, until the cache grows."""
        rows = slice(first, first + count)
        return Buffers(
            chain=None if self.chain is None else Tree(*(tensor[rows] for tensor in self.chain)),
            state=self.state.rows(first, count),
            cache=self.cache.rows(first, count),
            stop_ids=self.stop_ids,
            last_features=self.last_features[rows],
            no_signals=self.no_signals[rows],
        )


def decode_step(
    base: BaseModel, draft: DraftBatch | None, config: TreeConfig, choose: Choose, rules: ExitRules, buffers: Buffers
) -> Tensor:
    """Grow a tree, verify it, decide on an exit, and publish tokens to `state.output`.

    Returns the base's features of the nodes, [B, T, n H].
    """
    state = buffers.state
    tree = grow_tree(draft, config, buffers)

    # The base reads the tree. No node at or past the limit is ever accepted, so clamping its position changes nothing
    # and keeps it inside the model's position table.
    positions = torch.minimum(state.lengths.unsqueeze(1) + tree.depth, state.limits.unsqueeze(1) - 1)
    context = TreeContext(state.lengths, positions, tree.visible, span=config.max_depth)
    logits, features = base.forward(tree.tokens, context, buffers.cache)

    # Its own token at each node; the longest path that agrees; the keys and values of that path move into place.
    targets = choose(logits, tree, state)
    path, n_accepted, _ = accept(tree, targets, buffers.stop_ids, state)
    if not config.is_chain:  # what is accepted of a chain is already in place
        compact_kv(buffers.cache.keys(), buffers.cache.values(), path, n_accepted, state.lengths)

    # The draft reads the accepted tokens and signals, for each, whether the thinking could end there.
    if draft is None:
        decide_exit(buffers.no_signals, rules, state)
    else:
        rows = chain_rows(features, path, config, buffers)
        signals = draft.observe(rows, state.run, state.lengths - state.n_pending - 1, state.n_pending)
        decide_exit(signals[:, 1:], rules, state)
        # After an exit the last position is the boundary's; `n_output` is its row, as row 0 is position L - 1 before.
        last = state.n_output.long().view(-1, 1, 1)
        buffers.last_features.copy_(rows.take_along_dim(last, 1).squeeze(1))
    return features


def grow_tree(draft: DraftBatch | None, config: TreeConfig, buffers: Buffers) -> Tree:
    """What the draft proposes after the root, or the forced ids as a chain."""
    state = buffers.state
    if draft is None or config.max_depth == 0:
        empty = state.run[:, :0]
        tokens, scores, parents = empty, empty.float(), empty
    else:
        tokens, scores, parents = draft.propose(state.root, state.lengths)
    if buffers.chain is None:
        return build_tree(state.root, tokens, scores, parents, config.nodes, state.forced, state.n_forced)
    # Of a chain there is nothing to choose. Behind the forced ids stands what the draft made of the text that was cut:
    # a wrong guess, as an empty place would be.
    tokens = torch.cat([state.root.unsqueeze(1), tokens], 1)
    width = min(state.forced.shape[1], config.nodes)
    if width > 1:  # the first one is the root
        due = buffers.chain.depth[:, :width] < state.n_forced.unsqueeze(1)
        tokens[:, :width] = torch.where(due, state.forced[:, :width], tokens[:, :width])
    return buffers.chain._replace(tokens=tokens)


def chain_form(batch: int, nodes: int, device: torch.device | str) -> Tree:
    """A chain of `nodes` nodes, its tokens zero."""
    depth = torch.arange(nodes, dtype=torch.int32, device=device).repeat(batch, 1)
    return Tree(torch.zeros_like(depth), (depth - 1).clamp(min=0), depth, bits.chain(batch, nodes, device))


def chain_rows(features: Tensor, path: Tensor, config: TreeConfig, buffers: Buffers) -> Tensor:
    """What the draft reads: position L - 1 again, because an exit may have replaced the root, then the path.

    features  [B, T, n H] of the tree
    rows      [B, D + 2, n H]; rows past the accepted ones are junk
    """
    if config.is_chain:
        features = features[:, : path.shape[1]]
    else:
        features = features.take_along_dim(path.clamp(min=0).long().unsqueeze(-1), 1)
    return torch.cat([buffers.last_features.unsqueeze(1), features], 1)
