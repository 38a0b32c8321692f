"""The attention function that transformers calls for us: every tree forward goes through one op, `tree_attention`.

So do the chunks of a prompt, except the first, which is ordinary causal attention.

A forward passes its context as the keyword `specexit`, and the packed visibility bits as a 4-D `attention_mask`, which
transformers hands through untouched. A forward without a context (the model used as usual while our name is set) is
ordinary SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specexit_kernels import bits, unchecked
from specexit_kernels.tree_attention import check_arguments, slot_mask

NAME = "specexit"  # transformers gives names with "flash_attention" or "/" in them a meaning of their own


class TreeContext:
    """What the attention layers of one forward share.

    lengths    [B] int32: committed slots
    positions  [B, T] int32
    visible    [B, T, W] int64
    span       no node sees a scratch slot that is further from it than this many positions
    start      slots of every row that are in use before the forward, where the host knows them (None: it does not):
               the cache is cut behind the forward's own. 0 also says that the nodes are a chain.
    scratch    [B, M] int32: positions of the scratch slots, where there are others than the nodes' own (None)
    check      check what the model gives the op, and note in `windows` what it says of each layer's
    """

    def __init__(
        self,
        lengths: Tensor,
        positions: Tensor,
        visible: Tensor,
        span: int,
        start: int | None = None,
        scratch: Tensor | None = None,
    ) -> None:
        self.lengths = lengths
        self.positions = positions
        self.visible = visible
        self.span = span
        self.start = start
        self.scratch = positions if scratch is None else scratch
        self.check = False
        self.windows: dict[int, int | None] = {}
        self._windowed: dict[int, Tensor] = {}
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def visible_in(self, window: int | None) -> Tensor:
        """The bits for a layer that attends `window` positions; the op applies windows to committed slots only."""
        if window is None or self.span < window:
            return self.visible
        if window not in self._windowed:
            near = self.positions.unsqueeze(2) - self.scratch.unsqueeze(1) < window
            mask = bits.unpack(self.visible, self.scratch.shape[1]) & near
            self._windowed[window] = bits.pack(mask)
        return self._windowed[window]

    def mask(self, window: int | None, slots: int, dtype: torch.dtype) -> Tensor | None:
        """The mask as a CPU needs it, made once for all layers; the kernels of a GPU read the bits themselves."""
        if self.visible.is_cuda:
            return None
        if (window, slots) not in self._masks:
            self._masks[window, slots] = slot_mask(
                self.lengths,
                self.positions,
                self.visible_in(window),
                slots,
                window=window,
                dtype=torch.promote_types(dtype, torch.float32),
            )
        return self._masks[window, slots]


def specexit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    specexit: TreeContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' signature: query [B, Hq, T, hd], key and value [B, Hkv, slots, hd] -> [B, T, Hq, hd_v]."""
    if specexit is None:
        if softcap is not None or s_aux is not None:
            raise RuntimeError("a forward without SpecExit's context has no softcap or sinks under this attention")
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    count = query.shape[2]
    if specexit.start is not None:
        key, value = (cache[:, :, : specexit.start + count] for cache in (key, value))
    arguments = (
        query.transpose(1, 2),
        key,
        value,
        specexit.lengths,
        specexit.positions,
        specexit.visible_in(sliding_window),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        softcap,
        s_aux,
        None,
    )
    if specexit.check:
        check_arguments(*arguments)
        specexit.windows[getattr(module, "layer_idx", len(specexit.windows))] = sliding_window
    in_window = sliding_window is None or count <= sliding_window
    if specexit.start == 0 and in_window and softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=count > 1)
    return unchecked.tree_attention(*arguments, specexit.mask(sliding_window, key.shape[2], key.dtype)), None


def register() -> None:
    """Make the attention known to transformers under `NAME`; safe to repeat.

    The mask function must be registered too: for an unknown name transformers drops padding masks silently.
    """
    AttentionInterface.register(NAME, specexit_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def chain_context(lengths: Tensor, count: int, start: int | None = None) -> TreeContext:
    """Context of `count` successive tokens from each row's length on: a chunk of a prompt. `start`: as in
    `TreeContext`."""
    batch, device = lengths.shape[0], lengths.device
    positions = lengths.unsqueeze(1) + torch.arange(count, dtype=torch.int32, device=device)
    return TreeContext(lengths, positions, bits.chain(batch, count, device), span=count - 1, start=start)
