"""The draft's forward as it is trained: EAGLE-3's training-time test (arXiv 2503.01840), in autograd.

    step 0   row t reads the features of position t and the token at t + 1, as `DraftBatch.observe` does
    step j   row t reads its own hidden state of step j - 1, which stands for the features of position t + j that are
             not there yet, and the token at t + j + 1, as the j-th level of `DraftBatch.propose` does

Row t of step j sees the rows 0 .. t of step 0, and itself in the steps 1 .. j: T chains in one pass. The weights are
those of an `Eagle3Draft`; there is no other model to train.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from specexit.drafts import Eagle3Draft
from specexit.drafts.rope import RopeTable, rotate_

# Attention weights [B, heads, R, R] that a step may keep for the gradient: 256 MiB in float32. Where there are more,
# they are made for a block of queries at a time, of no more than these, and made again for the gradient.
HELD_WEIGHTS = 2**26


class Unrolled(NamedTuple):
    """hidden   of each step, [B, R, H]: the layer's output, normed, as lm_head and exit_head read it
    fc       [B, R, S] float32: raw signals of the rows of fc behind the hidden ones; S may be 0
    output   [B, R, 3] float32: raw signals of the exit head, None where there is none
    """

    hidden: list[Tensor]
    fc: Tensor
    output: Tensor | None


class Unroll:
    """The unrolled forward of a draft.

    held  attention weights that a step may keep, see HELD_WEIGHTS
    """

    def __init__(self, draft: Eagle3Draft, held: int = HELD_WEIGHTS) -> None:
        self.draft = draft
        self.held = held
        c = draft.config
        self._rope = RopeTable(
            c.rope_parameters, head_dim=c.head_dim, max_position_embeddings=c.max_position_embeddings
        )

    def __call__(self, features: Tensor, tokens: Tensor, depth: int) -> Unrolled:
        """Unroll `depth` steps over R rows from position 0 on.

        features  [B, R, 3 Ht]: row r is position r
        tokens    [B, R] int64: row r's is the token at position r + 1. Step j reads it j places further; behind the
                  last one it reads id 0, and what comes out there means nothing

        Padding behind a text is invisible to its rows.
        """
        draft, H = self.draft, self.draft.config.hidden_size
        weight = draft.fc_weight[:H]
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        hidden = F.linear(features, weight).to(weight.dtype)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        normed: list[Tensor] = []
        for step in range(depth):
            following = F.pad(tokens[:, step:], (0, step))
            hidden = self._layer(following, hidden, step, keys, values)
            normed.append(F.rms_norm(hidden, (H,), draft.norm, draft.config.rms_norm_eps))
        return Unrolled(normed, fc_signals(draft, features), exit_signals(draft, normed[0]))

    def _layer(self, tokens: Tensor, feature: Tensor, step: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Tokens [B, R] and the features [B, R, H] they come with -> the layer's output before the norm [B, R, H].

        keys, values  of the steps before, [B, Hkv, R, hd] each: this step's are added
        """
        draft, c = self.draft, self.draft.config
        with torch.no_grad():  # the embedding is the base's, or stays as it was loaded
            embedded = draft.embedding(tokens)
        pair = torch.stack((embedded.to(feature.dtype), feature), 2)
        inputs = F.rms_norm(pair, pair.shape[-1:], None, c.rms_norm_eps) * draft.input_norms
        residual = inputs[:, :, 1] if c.norm_before_residual else feature
        qkv = F.linear(inputs.flatten(2), draft.qkv_weight, draft.qkv_bias).unflatten(-1, (-1, c.head_dim))
        heads, kv_heads, rows = c.num_attention_heads, c.num_key_value_heads, tokens.shape[1]
        rope = self._rope.reach(step + rows, qkv.device, qkv.dtype)
        rotate_(qkv[:, :, : heads + kv_heads], rope[step : step + rows])
        query, key, value = qkv.transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        keys.append(key)
        values.append(value)
        if step == 0:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            attended = attend_chains(query, keys, values, self.held)
        hidden = residual + F.linear(attended.transpose(1, 2).flatten(2), draft.o_weight, draft.o_bias)
        normed = F.rms_norm(hidden, hidden.shape[-1:], draft.mlp_norm, c.rms_norm_eps)
        gate, up = F.linear(normed, draft.gate_up_weight, draft.gate_up_bias).chunk(2, -1)
        return hidden + F.linear(F.silu(gate) * up, draft.down_weight, draft.down_bias)


def fc_signals(draft: Eagle3Draft, features: Tensor) -> Tensor:
    """Raw signals [B, R, S] of fc; never in less than float32, as `project_features` has them."""
    rows = draft.fc_weight[draft.config.hidden_size :]
    if not len(rows):
        return features.new_empty(*features.shape[:-1], 0, dtype=torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.to(rows.dtype), rows).float()


def exit_signals(draft: Eagle3Draft, hidden: Tensor) -> Tensor | None:
    """Raw signals [B, R, 3] of the exit head on the normed hidden state of step 0, None where there is none."""
    if draft.exit_weight is None:
        return None
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(draft.exit_weight.dtype), draft.exit_weight, draft.exit_bias).float()


def attend_chains(query: Tensor, keys: list[Tensor], values: list[Tensor], held: int = HELD_WEIGHTS) -> Tensor:
    """Attention [B, Hq, R, hd] of the last step: row t over the rows 0 .. t of the first step, itself in the others.

    query         [B, Hq, R, hd]
    keys, values  of each step, [B, Hkv, R, hd]
    held          attention weights that may be kept
    """
    batch, heads, rows, size = query.shape
    grouped = query.unflatten(1, (keys[0].shape[1], -1)) * size**-0.5  # [B, Hkv, G, R, hd]
    own_keys, own_values = torch.stack(keys[1:], 3), torch.stack(values[1:], 3)  # [B, Hkv, R, j, hd]
    block = max(1, min(rows, held // (batch * heads * rows)))
    parts = []
    for first in range(0, rows, block):
        at, seen = slice(first, min(first + block, rows)), slice(0, min(first + block, rows))
        arguments = (
            grouped[:, :, :, at],
            keys[0][:, :, seen],
            values[0][:, :, seen],
            own_keys[:, :, at],
            own_values[:, :, at],
        )
        if block < rows and torch.is_grad_enabled():
            parts.append(checkpoint(_attend, *arguments, use_reentrant=False))
        else:
            parts.append(_attend(*arguments))
    return torch.cat(parts, 3).flatten(1, 2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor) -> Tensor:
    """The last Q rows of n: query [B, Hkv, G, Q, hd], keys [B, Hkv, n, hd], own keys [B, Hkv, Q, j, hd]."""
    group, count, seen = query.shape[2], query.shape[3], keys.shape[2]
    shared = (query.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (group, count))
    row = torch.arange(seen, device=query.device)
    shared = shared.masked_fill(row > row[seen - count :].unsqueeze(1), float("-inf"))
    own = (query.transpose(2, 3) @ own_keys.transpose(-1, -2)).transpose(2, 3)
    weights = torch.cat((shared, own), -1).softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    of_shared, of_own = weights.to(values.dtype).split((seen, own_keys.shape[3]), -1)
    attended = (of_shared.flatten(2, 3) @ values).unflatten(2, (group, count))
    return attended + (of_own.transpose(2, 3) @ own_values).transpose(2, 3)
