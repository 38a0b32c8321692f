"""What the base answers where its thinking is cut: at every place of one text at once, over one cache.

The text's keys and values are computed once. A place where it is cut is a branch that begins there, and the branches of
a text make a tree over that one row of the cache: a forward reads one token of each of K branches, writes it behind all
that was written before, and packed bits say that it sees the text up to its place and its own branch, nothing else. So
nothing is copied and nothing computed twice, and each answer is what plain greedy decoding gives for the text that is
cut there.

    slots      0 ... first cut | text up to the last cut | tokens of the branches, a forward's side by side
               committed       | scratch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specexit import checks
from specexit.attention import TreeContext, chain_context
from specexit.base import BaseModel
from specexit.cache import SlotCache
from specexit.prefill import CHUNK
from specexit_kernels import bits

BRANCHES = 64  # at a time: more rows than that a GPU's matrices no longer get for the price of one


@dataclass
class Branch:
    """What follows a cut.

    tokens             generated, the stop id not among them
    log_probabilities  that the base gives each of them
    generated          tokens that it took, the stop id included
    """

    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    generated: int = 0
    ended: bool = False


class Prober:
    """Answers of a base whose thinking is cut.

    known           ids that follow every cut: the end of thinking, and how the answer begins
    stop_ids        end a branch
    max_new_tokens  that a branch may have behind the known ones
    complete        whether generated ids hold all that is wanted
    branches        that are decoded at a time
    """

    def __init__(
        self,
        base: BaseModel,
        known: Sequence[int],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        complete: Callable[[list[int]], bool],
        branches: int = BRANCHES,
    ) -> None:
        checks.integer("max_new_tokens", max_new_tokens, 1)
        checks.integer("branches", branches, 1)
        if not known:
            raise ValueError("known must hold the ids that follow a cut, was empty")
        self.base = base
        self.known = list(known)
        self.stop_ids = frozenset(stop_ids)
        self.max_new_tokens = max_new_tokens
        self.complete = complete
        self.branches = branches

    @torch.no_grad()
    def answer(self, text: Sequence[int], cuts: Sequence[int]) -> list[Branch]:
        """What the base makes of text[:cut] and the known ids, greedily, for each of `cuts`, which ascend from 1 on.

        Raises ValueError where the base changes with the length (longrope) before the answers end, or gives logits that
        are no numbers.
        """
        if not cuts:
            return []
        most = max(cuts) + len(self.known) + self.max_new_tokens
        if self.base.max_positions is not None and most > self.base.max_positions:
            raise ValueError(
                f"a text of {max(cuts)} tokens and its answer must stay within {self.base.max_positions} positions, "
                f"was {most}: past them this base changes its rotary embedding (longrope) for the whole text"
            )
        with self.base.lock, self.base.attached():
            room = min(len(cuts), self.branches) * (len(self.known) + self.max_new_tokens - 1)
            grove = _Grove(self.base, text[: max(cuts)], room)
            found: list[Branch] = []
            for start in range(0, len(cuts), self.branches):
                grove.plant(cuts[start : start + self.branches])
                found += self._decode(grove)
        return found

    def _decode(self, grove: _Grove) -> list[Branch]:
        """Grow all branches of the grove to their ends."""
        found = [Branch() for _ in range(grove.count)]
        live = list(range(grove.count))
        *before, last = self.known
        width = max(1, CHUNK // grove.count)
        for start in range(0, len(before), width):
            grove.read(live, [before[start : start + width]] * len(live))
        tokens = [last] * len(live)
        while live:
            logits = grove.read(live, [[token] for token in tokens])
            chosen = logits.argmax(-1, keepdim=True)
            weights = logits.float().log_softmax(-1).gather(-1, chosen).squeeze(-1).tolist()
            tokens = chosen.squeeze(-1).tolist()
            if not all(map(math.isfinite, weights)):
                raise ValueError(
                    f"the base's logits must be finite, were not in {self.base.dtype}: where float16 overflows,"
                    " bfloat16 does not"
                )
            for index, token, weight in zip(live, tokens, weights, strict=True):
                self._extend(found[index], token, weight)
            tokens = [token for index, token in zip(live, tokens, strict=True) if not found[index].ended]
            live = [index for index in live if not found[index].ended]
        return found

    def _extend(self, branch: Branch, token: int, log_probability: float) -> None:
        branch.generated += 1
        if token in self.stop_ids:
            branch.ended = True
            return
        branch.tokens.append(token)
        branch.log_probabilities.append(log_probability)
        branch.ended = len(branch.tokens) == self.max_new_tokens or self.complete(branch.tokens)


class _Grove:
    """A text in the cache, and branches that begin inside it. Used while the base is attached.

    text  ids, all of which some branch sees
    room  slots for the tokens of all branches that stand at a time
    """

    def __init__(self, base: BaseModel, text: Sequence[int], room: int) -> None:
        self.base = base
        device = base.device
        self.size = len(text)
        self.written = torch.zeros(1, dtype=torch.int32, device=device)  # where a forward writes: the cache's lengths
        self.cache: SlotCache = base.new_cache(self.written, self.size + room)
        tokens = torch.tensor([list(text)], dtype=torch.int32, device=device)
        for start in range(0, self.size, CHUNK):
            self.written.fill_(start)
            chunk = tokens[:, start : start + CHUNK]
            base.forward(chunk, chain_context(self.written, chunk.shape[1], start), self.cache, last_logits=True)

    def plant(self, cuts: Sequence[int]) -> None:
        """Begin branches, in place of those that stood before. What all of them see of the text is committed."""
        device = self.base.device
        self.count = len(cuts)
        self.used = self.size
        self.first = cuts[0]
        self.committed = torch.tensor([self.first], dtype=torch.int32, device=device)
        self.cuts = torch.tensor(cuts, dtype=torch.int32, device=device)  # [K]
        self.depth = 0  # tokens read of every branch that still lives
        # [K, scratch]: what a branch's next token sees of the slots behind `first`, and their positions.
        slot = torch.arange(self.first, self.cache.slots, dtype=torch.int32, device=device)
        self.seen = slot < self.cuts.unsqueeze(1)
        self.positions = slot.clone()

    def read(self, live: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read n more tokens of each of L branches, and return the logits after the last, [L, V] where n is 1.

        live    [L] the branches, all of them read as far as each other
        tokens  [L, n]
        """
        device, count, width = self.base.device, len(live), len(tokens[0])
        rows = torch.tensor(live, device=device)
        step = torch.arange(self.depth, self.depth + width, dtype=torch.int32, device=device)
        positions = (self.cuts[rows].unsqueeze(1) + step).flatten()
        own = slice(self.used - self.first, self.used - self.first + count * width)
        before, behind = own.start, own.stop
        # Nodes stand branch by branch: node (l, t) sees what its branch saw, and the branch's new tokens up to t.
        branch = torch.eye(count, dtype=torch.bool, device=device).repeat_interleave(width, 1)  # [L, L n]
        chain = branch.repeat_interleave(width, 0).tril()
        visible = torch.cat([self.seen[rows, :before].repeat_interleave(width, 0), chain], 1)
        self.positions[own] = positions
        self.seen[rows, own] = branch
        context = TreeContext(
            lengths=self.committed,
            positions=positions.unsqueeze(0),
            visible=bits.pack(visible).unsqueeze(0),
            span=self.size + self.depth + width,
            start=self.used,
            scratch=self.positions[:behind].unsqueeze(0),
        )
        self.written.fill_(self.used)
        ids = torch.tensor([list(row) for row in tokens], dtype=torch.int32, device=device).view(1, -1)
        logits, _ = self.base.forward(ids, context, self.cache, last_logits=width > 1)
        self.used += count * width
        self.depth += width
        return logits[0]
