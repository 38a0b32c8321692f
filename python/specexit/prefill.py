"""From prompts to the first step.

The prompt's last token becomes the first root, so the first step verifies a tree like every other, and stop ids,
limits and publication have one place. The tokens before it are read in chunks: the first by ordinary causal attention,
the others as chains of the tree attention.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specexit.attention import chain_context
from specexit.base import BaseModel
from specexit.config import TreeConfig
from specexit.drafts.base import DraftBatch
from specexit.prompts import Prompts
from specexit.sampling import Choose
from specexit.step import Buffers, chain_form, decode_step
from specexit_kernels import ExitRules

CHUNK = 256  # tokens a forward: four words of bits, and enough rows to use a GPU's arithmetic


def prefill(base: BaseModel, draft: DraftBatch | None, prompts: Prompts, buffers: Buffers) -> None:
    """Commit all but the last token of each prompt, and let the draft read the positions whose next token is known.

    Chunks start at the same position in every row. A shorter row writes junk past its end, which nothing sees and its
    own tokens overwrite.
    """
    state, tokens = buffers.state, prompts.tokens
    ends = state.prompt_lengths - 1
    for start in range(0, max(prompts.lengths) - 1, CHUNK):
        count = min(CHUNK, max(prompts.lengths) - 1 - start)
        state.lengths.fill_(start)
        context = chain_context(state.lengths, count, start)
        _, features = base.forward(tokens[:, start : start + count], context, buffers.cache, last_logits=True)
        if draft is not None:
            draft.read(features, tokens[:, start + 1 : start + 1 + count], state.lengths)
            keep_feature(buffers.last_features, features, ends - 1 - start)
    state.lengths.copy_(ends)
    state.root.copy_(tokens.gather(1, ends.long().unsqueeze(1)).squeeze(1))


def keep_feature(last: Tensor, features: Tensor, row: Tensor) -> None:
    """last[b] = features[b, row[b]] wherever that row is in this chunk."""
    here = ((row >= 0) & (row < features.shape[1])).unsqueeze(1)
    picked = features.take_along_dim(row.clamp(0, features.shape[1] - 1).long().view(-1, 1, 1), 1).squeeze(1)
    last.copy_(torch.where(here, picked, last))


def first_token(base: BaseModel, choose: Choose, rules: ExitRules, buffers: Buffers) -> None:
    """A step without speculation, for batches with a prompt of one token: it has no position before its root, which
    the draft would read. Afterwards every row has one."""
    state = buffers.state
    batch, device = state.root.shape[0], state.root.device
    plain = replace(buffers, chain=chain_form(batch, 1, device))
    features = decode_step(base, None, TreeConfig.none(), choose, rules, plain)
    buffers.last_features.copy_(features[:, 0])


def observe_root(draft: DraftBatch, buffers: Buffers) -> None:
    """Let the draft read position L - 1 with the root: what a step does at its end for the next one."""
    state = buffers.state
    rows = buffers.last_features.new_zeros(state.run.shape[0], state.run.shape[1], buffers.last_features.shape[1])
    rows[:, 0] = buffers.last_features
    run = torch.zeros_like(state.run)
    run[:, 0] = state.root
    draft.observe(rows, run, state.lengths - 1, torch.zeros_like(state.lengths))
