"""Memory of an EAGLE-3 draft: its key/value cache, and every index and mask of a step that is the same in all steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specexit.config import TreeConfig
from specexit.drafts.eagle3_config import Eagle3Config
from specexit.drafts.rope import RopeTable
from specexit.memory import held
from specexit_kernels import bits
from specexit_kernels.tree_attention import slot_mask


class Rows(NamedTuple):
    """Where a pass of the layer works: Q rows for each of B sequences, N = B * Q."""

    positions: Tensor  # [B, Q] int32
    store: Tensor  # [B * Q * 2 * heads] int64: rows of the flattened cache that take their keys and values
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
        rope: RopeTable,
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
        self._rope = rope
        heads = config.num_key_value_heads
        # Zeros, and not what the memory held: an empty slot is never seen, but its keys are multiplied all the same.
        self._hold(torch.zeros(2, batch, heads, slots, config.head_dim, device=device, dtype=dtype))

        def integers(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.arange(count, device=device, dtype=dtype)

        self.rows = integers(batch, torch.int64)
        self._steps = integers(self.depth + 2)
        self._chain = bits.chain(batch, self.depth + 2, device)

        level, beam = integers(levels).view(levels, 1, 1), integers(k)
        self._offsets = torch.stack((level.expand(levels, 1, k), level * k + beam))  # positions, slots
        # Beam tokens see themselves and what they grew from: in a chain that is everything before them.
        own = bits.chain(1, levels, device) if k == 1 else bits.pack(torch.eye(levels * k, device=device).bool())
        self.own_bits = own.view(levels, 1, k, -1).repeat(1, batch, 1, 1) if levels else own  # [levels, B, k, W]

        # Candidates are the root's k, then k * k a level: k of each beam token. Their parents, as far as they are the
        # same in every step.
        self._level_candidate = k + k * k * integers(max(levels - 1, 0)).view(-1, 1)  # [levels - 1, 1]
        parents = (
            integers(self.depth) - 1 if k == 1 else torch.cat((beam.new_full((k,), -1), beam.repeat_interleave(k)))
        )
        self._parents = parents[: tree.candidates].repeat(batch, 1)

        # What an `observe` leaves for the `propose` after it, which on a GPU is in the next replay of the step: the
        # root's children and their log-probabilities [B, k], and the hidden state that stands for their features.
        self._children = torch.zeros(batch, k, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(batch, k, dtype=torch.float32, device=device)
        self._hidden = torch.zeros(batch, config.hidden_size, dtype=dtype, device=device)
        self._observed = [False]  # since the allocation; shared with the parts

    def _hold(self, cache: Tensor) -> None:
        """Take `cache` [2, B, heads, slots, head_dim], and the rope table of the position of every slot."""
        self._cache = cache
        self.keys, self.values = cache
        kinds, batch, heads, slots, _ = cache.shape
        first = slots * torch.arange(kinds * batch * heads, device=cache.device).view(kinds, batch, heads)
        # The first slot of each row's keys and values, keys first, in the flattened cache.
        self._first_slot = first.transpose(0, 1).reshape(batch, 1, kinds * heads)
        self.rope = self._rope.reach(slots, cache.device, cache.dtype)

    def part(self, first: int, count: int) -> Workspace:
        """The rows [first, first + count) of the batch, in the same memory: until `grow`, and not for `propose`."""
        part, rows = copy.copy(self), slice(first, first + count)
        part.batch, part.rows = count, self.rows[:count]
        part.keys, part.values = self._cache[:, rows]
        for name in ("_first_slot", "_chain", "_children", "_logprobs", "_hidden"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    @property
    def fresh(self) -> bool:
        """Nothing has been observed since the allocation."""
        return not self._observed[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return held(vars(self))

    def grow(self, slots: int) -> None:
        """Add `slots` slots to every row; what is in the others stays."""
        self._hold(torch.nn.functional.pad(self._cache, (0, 0, 0, slots)))

    def store(self, kv: Tensor, where: Tensor) -> None:
        """Write keys and values [B, Q, 2 * heads, head_dim], keys first, to rows `where` of the flattened cache."""
        size = kv.shape[-1]
        self._cache.view(-1, size).index_copy_(0, where, kv.reshape(-1, size))

    def chain(self, start: Tensor, count: int) -> tuple[Rows, Tensor]:
        """`count` rows behind the committed rows [0, start), and the bits by which each sees those before it."""
        steps, visible = self._steps, self._chain
        if count != len(steps):  # a piece of a prompt
            steps = torch.arange(count, device=start.device, dtype=torch.int32)
            visible = bits.chain(self.batch, count, start.device)
        positions = start.unsqueeze(1) + steps
        slots = positions.long()
        return Rows(positions, (self._first_slot + slots.unsqueeze(2)).flatten(), self.rope[slots], start), visible

    def level_rows(self, lengths: Tensor) -> list[Rows]:
        """The rows of every level behind the committed rows [0, lengths)."""
        where = lengths.view(-1, 1) + self._offsets  # [2, levels, B, k]
        positions = where[0]
        rope_rows, slots = where.long().unbind(0)
        rope = self.rope[rope_rows]
        store = (self._first_slot + slots.unsqueeze(3)).flatten(1)
        return [Rows(positions[i], store[i], rope[i], lengths) for i in range(self.levels)]

    def keep(self, children: Tensor, logprobs: Tensor, hidden: Tensor) -> None:
        """Leave what was observed to `propose`, at its fixed addresses."""
        self._children.copy_(children)
        self._logprobs.copy_(logprobs)
        self._hidden.copy_(hidden)
        self._observed[0] = True

    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the last `keep` left. Raises RuntimeError where there was none."""
        if self.fresh:
            raise RuntimeError("propose needs an observe before it")
        return self._children, self._logprobs, self._hidden

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

    def parents(self, chosen: list[Tensor]) -> Tensor:
        """Parents [B, C] int32 of all candidates; `chosen` [B, k] are the beams of level 1 and on, by candidate."""
        if not chosen:
            return self._parents
        beams = torch.stack(chosen, 1) + self._level_candidate  # [B, levels - 1, k]
        return torch.cat((self._parents, beams.unsqueeze(-1).expand(-1, -1, -1, self.k).flatten(1)), 1)
