"""What the decoder knows of a draft: it reads what the base has done, and it proposes tokens.

Rows and positions. A draft reads *rows*: row p of a sequence is the base's features of position p together with the
token at p + 1. So its committed rows are [0, L - 1) where the base has committed [0, L), and the row for position
L - 1 is read with the *root*, the token that follows.

Order of calls. `allocate` once for a batch; for its rows, all or a part of them, `read` over the prompt, in pieces, and
`observe` of its last token; then in every decode step `propose` and, when the base has verified the tree, `observe`:

    batch = draft.allocate(rows, capacity, tree, device, dtype)
    part = batch.rows(first, count)                                   # a few prompts join
    part.read(features[:, 0:n], tokens[:, 1:n+1], start)              # rows 0 .. L-2 of the prompts
    part.observe(features, root, start, last)                         # row L-1
    while running:
        candidates = batch.propose(root, lengths)                     # -> a tree -> the base -> accept
        signals = batch.observe(features, run, start, last)           # rows L-1 .. : the root, then the accepted tokens
        ...                                                           # the exit decision; the row's root and length

`read`, `observe` and `propose` never wait for the device, their shapes follow from those of their arguments, and their
memory comes from `allocate` or from torch's allocator: a decode step is captured in a CUDA graph. Anything that a
drafter must know of a row it keeps in device memory, at addresses that stay from `allocate` to `grow`. That holds for
what an `observe` leaves to the `propose` after it, too: on a GPU that is in the next replay.

An n-gram drafter reads only tokens: `feature_layers = ()`, no signals, `observe` appends the run to its own history and
`propose` looks the root up. A block drafter returns one chain of candidates, each the parent of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specexit.config import TreeConfig
from specexit_kernels.state import SIGNALS


class Candidates(NamedTuple):
    """Tokens that may follow the root, for `build_tree`. C is the same in every step.

    Where the tree is a chain they are that chain, each the parent of the next, whatever their scores.
    """

    tokens: Tensor  # [B, C] int32, ids of the base's vocabulary
    scores: Tensor  # [B, C] float32: log-probability of the path from the root, never above the parent's; -inf: none
    parents: Tensor  # [B, C] int32: candidate index of the parent, below the candidate's own; -1: the root


class Draft(Protocol):
    """A drafter: what it is, whatever it works on."""

    @property
    def signals(self) -> Sequence[str]:
        """The exit signals that `observe` gives: those of confidence, progress, remaining, in this order."""
        ...

    @property
    def feature_layers(self) -> tuple[int, ...] | None:
        """Layers of the base whose inputs are the features, in this order; None: 2, N // 2 and N - 3 of N layers."""
        ...

    @property
    def feature_size(self) -> int:
        """Numbers that a position's features hold: 3H for three layers of a base of hidden size H; 0: it reads none."""
        ...

    @property
    def calibration(self) -> Mapping[str, Any]:
        """What was calibrated for its signals, as `ExitConfig.from_draft` reads it; empty: nothing was."""
        ...

    def select_source(self, source: str | None) -> None:
        """Read signals from "fc", "output", or "auto", the best there is; None: read none. `signals` follows.

        Before `allocate`: which rows and cache are needed depends on it.
        Raises ValueError where the draft has no signals there.
        """
        ...

    def allocate(
        self, batch: int, capacity: int, tree: TreeConfig, device: torch.device | str, dtype: torch.dtype
    ) -> DraftBatch:
        """Cache and buffers for `batch` rows of at most `capacity` positions, which read the signals selected now.

        device, dtype   the base's: of the features, the tokens and the lengths
        Raises ValueError where the draft cannot serve the tree, the device or the dtype.
        """
        ...


class DraftBatch(Protocol):
    """A drafter at work on B rows, with all that it remembers of them.

    Features may be views of any strides with a dense last axis; token ids are the base's, in padding rows too. A row
    that has ended, or waits for its first prompt, is read and proposed for as the others; nobody uses what comes out.
    """

    @property
    def nbytes(self) -> int:
        """Bytes that its cache and buffers take."""
        ...

    def rows(self, first: int, count: int) -> DraftBatch:
        """The rows [first, first + count) in the same memory, to `read` and `observe` a prompt that joins: whatever
        was in them is forgotten, for the new prompt starts at position 0. It need not live beyond the next `grow`."""
        ...

    def grow(self, slots: int) -> None:
        """Add room for `slots` positions to every row; what was read stays. Addresses change: never inside a step."""
        ...

    def read(self, features: Tensor, tokens: Tensor, start: Tensor) -> None:
        """Read rows of a prompt: as `observe`, without signals, and with nothing left for `propose`."""
        ...

    def observe(self, features: Tensor, tokens: Tensor, start: Tensor, last: Tensor) -> Tensor:
        """Read R rows, and remember the last valid one for `propose`.

        features  [B, R, feature_size] x: row r is position start + r
        tokens    [B, R] int32: row r's is the token at position start + r + 1
        start     [B] int32: the rows [0, start) are committed, and the R rows follow them
        last      [B] int32: index of the last valid row, 0 to R - 1. The rows after it are padding: whatever they
                  hold, valid rows do not see them, and a later call overwrites them
        Returns the raw exit signals [B, R, S] float32, before any activation: confidence, progress and remaining as
        far as the last one of `signals`; S is `signal_columns(signals)`. One before it that is not there is NaN.
        """
        ...

    def propose(self, root: Tensor, lengths: Tensor) -> Candidates:
        """Tokens that may follow the root.

        root      [B] int32: the token of the last observed row; after a cut another one, the first forced id. What a
                  draft then makes of the dropped text is not accepted, and costs nothing but the one step
        lengths   [B] int32: the rows [0, lengths) are committed, the last observed one included
        """
        ...


def signal_columns(signals: Sequence[str]) -> int:
    """S: how many of SIGNALS, from the first on, hold all of `signals`."""
    return max((SIGNALS.index(name) + 1 for name in signals), default=0)
