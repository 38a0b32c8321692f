"""A draft that knows the text and is right some of the time: acceptance without training, for any base.

It implements the decoder's draft protocols (both: it knows its batch beforehand) and nothing of EAGLE, so it also shows
that the decoder needs no more. It loops on the host, which a real draft must not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from specexit.config import TreeConfig
from specexit.drafts.base import Candidates, signal_columns
from specexit_kernels.state import SIGNALS

Signals = Callable[[int, int], list[float]]  # position p, token at p + 1 -> raw signals of p


class OracleDraft:
    """texts: each row's prompt and continuation; accuracy: how often the right child is among those proposed."""

    feature_layers = (2, 3, 3)

    def __init__(
        self,
        texts: list[list[int]],
        hidden: int = 64,
        accuracy: float = 0.8,
        signals: Signals | None = None,
        vocab: int = 199,
    ) -> None:
        self.texts = texts
        self.feature_size = 3 * hidden
        self.accuracy = accuracy
        self.tell = signals
        self.select_source("auto")
        self.vocab = vocab
        self.generator = torch.Generator().manual_seed(len(texts))
        self.read_rows: list[dict[int, int]] = []
        self.calibration: dict[str, object] = {}

    def select_source(self, source: str | None) -> None:
        self.signals: tuple[str, ...] = ()
        if self.tell is not None and source is not None:
            self.signals = SIGNALS[: len(self.tell(0, 0))]

    def allocate(
        self, batch: int, capacity: int, tree: TreeConfig, device: torch.device | str, dtype: torch.dtype
    ) -> OracleDraft:
        assert batch == len(self.texts)
        self.tree = tree
        self.read_rows = [{} for _ in range(batch)]
        return self

    nbytes = 0

    def rows(self, first: int, count: int) -> OracleDraft:
        part = copy.copy(self)
        part.texts = self.texts[first : first + count]
        part.read_rows = self.read_rows[first : first + count]
        for row in part.read_rows:
            row.clear()
        return part

    def grow(self, capacity: int) -> None:
        pass

    def read(self, features: Tensor, tokens: Tensor, start: Tensor) -> None:
        self.observe(features, tokens, start, torch.full_like(start, tokens.shape[1] - 1))

    def observe(self, features: Tensor, tokens: Tensor, start: Tensor, last: Tensor) -> Tensor:
        assert features.shape == (*tokens.shape, self.feature_size)
        raw = torch.full((*tokens.shape, signal_columns(self.signals)), float("nan"), dtype=torch.float32)
        for row in range(tokens.shape[0]):
            for r in range(int(last[row]) + 1):
                position, token = int(start[row]) + r, int(tokens[row, r])
                assert position >= 0
                # Every row before this one has been read, with the token that is in the text by now.
                assert all(p in self.read_rows[row] for p in range(position)), "a position was never read"
                self.read_rows[row][position] = token
                if self.tell and self.signals:
                    raw[row, r] = torch.tensor(self.tell(position, token))
        return raw

    def propose(self, root: Tensor, lengths: Tensor) -> Candidates:
        rows = [self._row(self.texts[row], int(lengths[row])) for row in range(len(self.texts))]
        tokens, scores, parents = zip(*rows, strict=True)
        return Candidates(torch.stack(tokens), torch.stack(scores), torch.stack(parents))

    def _row(self, text: list[int], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Levels of top_k candidates for each of top_k nodes, as a beam would give them; scores fall with depth."""
        k, draw = self.tree.top_k, lambda *shape: torch.rand(*shape, generator=self.generator)
        tokens: list[int] = []
        scores: list[float] = []
        parents: list[int] = []
        beams = [(-1, True, 0.0)]  # candidate, whether its path is the text so far, its score
        for depth in range(self.tree.max_depth):
            position = length + 1 + depth
            grown = []
            for parent, right, score in beams:
                hit = right and position < len(text) and float(draw(1)) < self.accuracy
                place = int(draw(1) * k) if hit else -1
                for child in range(k):
                    token = text[position] if child == place else int(draw(1) * self.vocab)
                    tokens.append(token)
                    scores.append(score - 0.05 * (child + 1))
                    parents.append(parent)
                    grown.append((len(tokens) - 1, child == place, scores[-1]))
            # Keep the right one among the beams, so that deep acceptance happens.
            grown.sort(key=lambda beam: (not beam[1], -beam[2]))
            beams = grown[:k]
        return (
            torch.tensor(tokens, dtype=torch.int32),
            torch.tensor(scores, dtype=torch.float32),
            torch.tensor(parents, dtype=torch.int32),
        )
