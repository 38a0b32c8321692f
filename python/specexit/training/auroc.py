"""How well a number tells two kinds of cases apart, whatever threshold it is given."""

from __future__ import annotations

from torch import Tensor


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """The probability that a positive case has a higher score than a negative one; of a tie, one half.

    scores    [n], without NaN
    positive  [n] bool
    None where all cases are of one kind. By ranks (Mann and Whitney), so of any number of cases.
    """
    wins, losses = int(positive.sum()), int((~positive).sum())
    if not wins or not losses:
        return None
    _, place, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2  # of equal scores the mean
    return float((ranks[place][positive].sum() - wins * (wins + 1) / 2) / (wins * losses))
