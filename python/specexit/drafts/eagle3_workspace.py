"""Memory of an EAGLE-3 draft: its key/value cache, and every index and mask of a step that is the same in all steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specexit.config import TreeConfig
from specexit.drafts.eagle3_config import Eagle3Config
from specexit.drafts.rope import rope_table
from specexit_kernels import bits
from specexit_kernels.tree_attention import slot_mask


class Rows(NamedTuple):
    """Where a pass of the layer works: Q rows for each of B sequences, N = B * Q."""

    positions: Tensor  # [B, Q] int32
    slots: Tensor  # [B, Q] int64: where their keys and values go
    rope: Tensor  # [B, Q, 2, 1, head_dim]
    lengths: Tensor  # [B] int32: committed rows, seen by all of them


class Workspace:
    """The cache of `batch` rows with `slots` slots each, and the constants for growing `tree`.

    A *level* is a pass over the k best tokens of one depth: level l (from 0) holds those of depth l + 1, at position
    length + l and in the scratch slots l * k to l * k + k - 1. A tree of depth D takes D - 1 of them: the tokens of
    depth 1 come from the last observed row.
    """

    def __init__(
        self,
        config: Eagle3Config,
        batch: int,
        slots: int,
        tree: TreeConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.batch = batch
        self.depth = tree.max_depth
        self.k = k = tree.top_k if self.depth else 1
        self.levels = levels = max(self.depth - 1, 0)
        self._config = config
        heads = config.num_key_value_heads
        # Zeros, and not what the memory held: an empty slot is never seen, but its keys are multiplied all the same.
        self._hold(torch.zeros(2, batch, heads, slots, config.head_dim, device=device, dtype=dtype))

        def integers(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.arange(count, device=device, dtype=dtype)

        self.rows = integers(batch, torch.int64)
        # Indices of the cache's first three axes: with slots [B, Q, 1] for the fourth they address [2, B, Q, heads].
        self._address = (
            integers(2, torch.int64).view(2, 1, 1, 1),
            self.rows.view(batch, 1, 1),
            integers(heads, torch.int64),
        )
        self._steps = integers(self.depth + 2)
        self._chain = bits.chain(batch, self.depth + 2, device)

        level, beam = integers(levels).view(levels, 1, 1), integers(k)
        self._offsets = torch.stack((level.expand(levels, 1, k), level * k + beam))  # positions, slots
        # Beam tokens see themselves and what they grew from: in a chain that is everything before them.
        own = bits.chain(1, levels, device) if k == 1 else bits.pack(torch.eye(levels * k, device=device).bool())
        self.own_bits = own.view(levels, 1, k, -1).repeat(1, batch, 1, 1) if levels else own  # [levels, B, k, W]

        # Candidates are the root's k, then k * k a level: k of each beam token. Where those began in the flattened
        # batch, and the candidates' parents as far as they are the same in every step.
        self._first_candidate = (integers(batch) * k * k).repeat_interleave(k)  # [B * k]
        self._level_candidate = k + k * k * integers(max(levels - 1, 0)).view(-1, 1)  # [levels - 1, 1]
        parents = (
            integers(self.depth) - 1 if k == 1 else torch.cat((beam.new_full((k,), -1), beam.repeat_interleave(k)))
        )
        self._parents = parents[: tree.candidates].repeat(batch, 1)

    def _hold(self, cache: Tensor) -> None:
        """Take `cache` [2, B, heads, slots, head_dim], and make the rope table for the position of every slot."""
        self._cache = cache
        self.keys, self.values = cache
        self.rope = rope_table(
            self._config.rope_parameters,
            head_dim=self._config.head_dim,
            positions=cache.shape[3],
            max_position_embeddings=self._config.max_position_embeddings,
            device=cache.device,
            dtype=cache.dtype,
        )

    def grow(self, slots: int) -> None:
        """Add `slots` slots to every row; what is in the others stays."""
        self._hold(torch.nn.functional.pad(self._cache, (0, 0, 0, slots)))

    def store(self, kv: Tensor, slots: Tensor) -> None:
        """Write keys and values [B, Q, 2 * heads, head_dim], keys first, to `slots` [B, Q] int64."""
        source = kv.view(*slots.shape, 2, -1, kv.shape[-1]).permute(2, 0, 1, 3, 4)
        kind, row, head = self._address
        self._cache.index_put_((kind, row, head, slots.unsqueeze(-1)), source)

    def chain(self, start: Tensor, count: int) -> tuple[Rows, Tensor]:
        """`count` rows behind the committed rows [0, start), and the bits by which each sees those before it."""
        steps, visible = self._steps, self._chain
        if count != len(steps):  # a piece of a prompt
            steps = torch.arange(count, device=start.device, dtype=torch.int32)
            visible = bits.chain(self.batch, count, start.device)
        positions = start.unsqueeze(1) + steps
        slots = positions.long()
        return Rows(positions, slots, self.rope[slots], start), visible

    def level_rows(self, lengths: Tensor) -> list[Rows]:
        """The rows of every level behind the committed rows [0, lengths)."""
        where = lengths.view(-1, 1) + self._offsets  # [2, levels, B, k]
        positions = where[0]
        rope_rows, slots = where.long().unbind(0)
        rope = self.rope[rope_rows]
        return [Rows(positions[i], slots[i], rope[i], lengths) for i in range(self.levels)]

    def chain_masks(self, lengths: Tensor) -> Sequence[Tensor | None]:
        """The masks of all levels of a chain, each [B, 1, slots]: they are known beforehand, and a CPU makes them in
        one go. None for the levels of a tree, and for the kernels of a GPU, which read the bits."""
        if self.k > 1 or not self.levels or lengths.is_cuda:
            return [None] * self.levels
        visible = self.own_bits.squeeze(2).transpose(0, 1)  # [B, levels, W]
        positions = lengths.unsqueeze(1).expand(-1, self.levels)
        mask = slot_mask(
            lengths, positions, visible, self.keys.shape[2], dtype=torch.promote_types(self.keys.dtype, torch.float32)
        )
        return mask.split(1, 1)

    def parent_rows(self, chosen: Tensor) -> Tensor:
        """Candidates [B, k] of a level, each among its row's k * k -> rows [B * k] of the beam that they grew from."""
        return (chosen.flatten() + self._first_candidate) // self.k

    def parents(self, chosen: list[Tensor]) -> Tensor:
        """Parents [B, C] int32 of all candidates; `chosen` [B, k] are the beams of level 1 and on, by candidate."""
        if not chosen:
            return self._parents
        beams = torch.stack(chosen, 1) + self._level_candidate  # [B, levels - 1, k]
        return torch.cat((self._parents, beams.unsqueeze(-1).expand(-1, -1, -1, self.k).flatten(1)), 1)
