"""The text of a cell, the cache that stands for it, and what the base alone would say next.

Up to 1,024 tokens the cache is what the model itself makes of a random text; of a longer one it is random numbers, as
reading it would take most of a run. Each row's numbers can be made again, so nobody keeps them: an implementation fills
its own cache, and the base, unchanged and with transformers' own cache and attention, continues from a copy of a row.
What it then thinks of an implementation's tokens is the check: each must be its best next token, as far as rounding
lets it tell. The keys and values that one of the layers has of those tokens must be its own, too: the layers before
have gone into them, with their positions and masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.harness import Unavailable
from benchmarks.step_cells import Cell
from benchmarks.step_models import pair
from specexit.base import PROBE_TOLERANCE

READ = 1024  # tokens of a text that is read, not made up
SEEN = 4  # the layer whose keys and values are compared: in bf16 rounding covers what it would show of later ones
FORCED = 4  # tokens of a text that is dictated, the root included


class Text(NamedTuple):
    """What an implementation has made of a row, from its root on.

    given    so many of the first tokens the base was not asked for
    written  [2, Hkv, n, hd]: keys and values of all tokens but the last, which is not read yet, in the layer that is
             compared; None: the cache is transformers' own
    """

    row: int
    tokens: list[int]
    given: int = 1
    written: Tensor | None = None


class Problem:
    """A batch of rows that continue from position L.

    prompts   [B, L + 1]: the committed tokens, then the root
    dictated  [B, FORCED]: the root and tokens that may follow it, whatever the base says
    rows      which of the batch are checked: the first and the last
    seen      the layer whose keys and values are compared
    """

    def __init__(self, cell: Cell, device: torch.device, dtype: torch.dtype) -> None:
        self.cell = cell
        self.device, self.dtype = device, dtype
        self.base, self.draft = pair(cell.model, device, dtype)
        vocabulary, generator = cell.model.vocabulary, torch.Generator().manual_seed(0)
        drawn = torch.randint(vocabulary, (cell.batch, cell.length + FORCED), generator=generator).to(device)
        self.prompts, self.dictated = drawn[:, : cell.length + 1], drawn[:, cell.length :]
        self.rows = sorted({0, cell.batch - 1})
        self.seen = min(SEEN, cell.model.layers - 1)
        self._read = self._prefill() if cell.length <= READ else None
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def committed(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the committed slots, each [1, Hkv, L, hd]."""
        if self._read is not None:
            keys, values = self._read[layer]
            return keys[row : row + 1], values[row : row + 1]
        m = self.cell.model
        generator = torch.Generator(self.device).manual_seed(self.cell.batch * layer + row)
        shape = 2, 1, m.kv_heads, self.cell.length, m.head_dim
        keys, values = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        return keys, values

    @torch.no_grad()
    def _prefill(self) -> list[tuple[Tensor, Tensor]]:
        """Of every layer, as the model alone makes them; row by row, which bounds what that takes."""
        rows = []
        for prompt in self.prompts[:, :-1].split(1):
            cache = self.base(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
            rows.append([(layer.keys, layer.values) for layer in cache.layers])
        layers = zip(*rows, strict=True)
        return [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each layer the committed keys and values of all rows, each [B, Hkv, L, hd]."""
        for layer in range(self.cell.model.layers):
            keys, values = zip(*(self.committed(layer, row) for row in range(self.cell.batch)), strict=True)
            yield torch.cat(keys), torch.cat(values)

    def check(self, texts: Sequence[Text]) -> float:
        """The largest deviation over what is allowed of it, which is what the decoder's own probe allows: of the
        tokens, how far their logits are below the best ones, in terms of the largest logit; of what was written, the
        relative Frobenius error. Raises Unavailable where one is larger."""
        allowed = PROBE_TOLERANCE[self.dtype]
        worst = 0.0
        for text in texts:
            chosen = text.tokens[text.given :]
            if not chosen:
                raise Unavailable(f"wrong result: row {text.row} has no token after its first {text.given}")
            logits, written = self.continued(text.row, text.tokens[:-1])
            logits = logits[text.given - 1 :]
            at = torch.tensor(chosen, device=self.device).unsqueeze(1)
            below = (logits.amax(1) - logits.gather(1, at).squeeze(1)) / logits.abs().amax(1)
            found = {f"the logit of token {text.given + n} below the best": x for n, x in enumerate(below.tolist())}
            if text.written is not None:
                error = (text.written.float() - written).norm() / written.norm()
                found["keys and values off"] = error.item()
            for what, share in found.items():
                if not share <= allowed:
                    raise Unavailable(
                        f"wrong result: row {text.row}, {what} by {share:.1e} (at most {allowed:.0e} is rounding)"
                    )
                worst = max(worst, share)
        return worst / allowed

    @torch.no_grad()
    def continued(self, row: int, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the base alone makes of n tokens that follow the committed ones: logits [n, V], and the keys and values
        [2, Hkv, n, hd] of the layer that is compared."""
        key = (row, *tokens)
        if key not in self._known:
            cache = DynamicCache([self.committed(layer, row) for layer in range(self.cell.model.layers)])
            ids = torch.tensor([tokens], device=self.device)
            logits = self.base(input_ids=ids, past_key_values=cache).logits[0].float()
            layer = cache.layers[self.seen]
            written = torch.cat([layer.keys, layer.values])[:, :, self.cell.length :].float()
            self._known[key] = logits, written
        return self._known[key]
