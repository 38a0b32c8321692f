"""What a draft is trained for, and how its losses are kept in balance.

Tokens. At each step of the unroll, the cross-entropy between the base's distribution, softmax at temperature 1 over
the ids that the draft can propose, and the draft's; over generated positions only. Step j weighs decay ** j: a token
counts only where those before it were accepted. Where the base's own choice is none of the draft's ids there is no
loss: nothing that the draft could say would be right.

Signals. Binary cross-entropy for confidence, squared error for progress behind the sigmoid, squared error for
remaining in log space (the raw output against log(1 + tokens left)).

Balance. The three losses of the exit head come in other units than the tokens' and fall at another pace, and all of
them train the one layer. So each is weighed by what it does to that layer: its gradient with respect to the layer's
normed output in step 0, which is where tokens and signals part, is to have a set share of the norm that the token
loss's has there. The norms are running means of measurements, taken every few steps. The unit of a loss cancels out:
scaled by any factor it trains the same draft. EnCodec (arXiv 2210.13438) balances its losses so; GradNorm (arXiv
1711.02257) learns such weights. The signals of fc need no balance: their rows are linear in features of the frozen
base, and share no weight that is trained with anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from specexit_kernels.state import SIGNALS

HELD_LOGITS = 2**25  # that a step may keep for the gradient; where there are more they are made again for it


def token_loss(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, ahead: int = 0, held: int = HELD_LOGITS
) -> Tensor:
    """Sum over rows of weight * cross-entropy, float32.

    hidden   [N, H], normed
    lm_head  [Vd, H]
    targets  [N, Vd]: the base's logits of the draft's ids
    weights  [N] of the targets; those with 0 cost nothing
    ahead    the targets of row n of `hidden` are in row n + ahead; the first `ahead` targets must weigh 0
    held     logits that may be kept, see HELD_LOGITS
    """
    rows = weights.nonzero().squeeze(1)
    hidden = hidden[rows - ahead]
    block = max(1, held // len(lm_head))
    if len(rows) <= block:
        return _token_loss(hidden, lm_head, targets, weights, rows)
    # Each block picks its targets when it is computed: they are the largest tensor there is, never copied whole.
    losses = [
        checkpoint(_token_loss, some, lm_head, targets, weights, own, use_reentrant=False)
        for some, own in zip(hidden.split(block), rows.split(block), strict=True)
    ]
    return torch.stack(losses).sum()


def _token_loss(hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    logits = F.linear(hidden, lm_head)
    exact = torch.promote_types(logits.dtype, torch.float32)
    wanted = targets[rows].to(exact).softmax(-1)
    return F.cross_entropy(logits.to(exact), wanted, reduction="none") @ weights[rows].to(exact)


def signal_losses(raw: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Sums [3] over all rows of weight * loss, of confidence, progress and remaining.

    raw              [.., 3] raw signals
    values, weights  [.., 3], see `labels.Labels`
    """
    confidence = F.binary_cross_entropy_with_logits(raw[..., 0], values[..., 0], reduction="none")
    progress = (raw[..., 1].sigmoid() - values[..., 1]).square()
    remaining = (raw[..., 2] - values[..., 2]).square()
    losses = torch.stack((confidence, progress, remaining), -1)
    # Rows without a label are left out, not multiplied by 0: padding may hold anything.
    return torch.where(weights > 0, losses * weights, 0.0).flatten(0, -2).sum(0)


class Balance:
    """Weights of the exit head's three losses, from running means of gradient norms.

    share  of the token loss's norm that each signal's is to have
    keep   how much of a mean a new measurement leaves

    Before the first measurement every weight is 0.
    """

    def __init__(self, share: float, keep: float = 0.9) -> None:
        self.share = share
        self.keep = keep
        self._sums = torch.zeros(1 + len(SIGNALS), dtype=torch.float64)  # tokens, then the signals
        self._count = 0.0

    def update(self, norms: Sequence[float]) -> None:
        """Take the norms of the token loss's gradient and of the signals', in this order."""
        self._sums = self.keep * self._sums + (1 - self.keep) * torch.tensor(norms, dtype=torch.float64)
        self._count = self.keep * self._count + (1 - self.keep)

    @property
    def means(self) -> list[float]:
        """Of the norms; the first measurements count in full, not as if zeros had come before them."""
        return (self._sums / self._count).tolist() if self._count else [0.0] * len(self._sums)

    @property
    def weights(self) -> list[float]:
        tokens, *signals = self.means
        return [self.share * tokens / norm if norm > 0 else 0.0 for norm in signals]

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums.tolist(), "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)
        self._count = state["count"]


def gradient_norms(losses: Sequence[Tensor], at: Tensor) -> Tensor:
    """Squared norms [n] float64 of the gradients of `losses` at the activation `at`; the graph is kept."""
    squares = []
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
        squares.append(at.new_zeros(()).double() if gradient is None else gradient.double().square().sum())
    return torch.stack(squares)
