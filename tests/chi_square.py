"""Pearson's chi-square test, without scipy."""

from statistics import NormalDist

import torch

FALSE_ALARMS = 1e-6  # of a correct sampler, per test; seeds are fresh in every run


def critical_value(freedom: int) -> float:
    """The chi-square quantile at 1 - FALSE_ALARMS (Wilson and Hilferty, 1931): 10% too high at 2 degrees of freedom, 2%
    at 10, and so on the safe side."""
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS)
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + z * spread**0.5) ** 3


def excess(observed: torch.Tensor, probabilities: torch.Tensor, least: float = 10.0) -> float:
    """How far counts lie from a distribution: the statistic over its critical value, so more than 1 rejects.

    observed       [n] counts
    probabilities  [n], sum 1
    least          cells that expect fewer counts are counted as one, since the statistic needs large cells
    An observation where the probability is 0 is an infinite excess.
    """
    observed, probabilities = observed.flatten().double(), probabilities.flatten().double()
    if observed[probabilities == 0].sum() > 0:
        return float("inf")
    expected = probabilities * observed.sum()
    small = expected < least
    observed = torch.cat([observed[~small], observed[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    used = expected >= least
    if used.sum() < 2:
        raise ValueError("too few counts for a test")
    if not used.all():  # what is left of the small cells goes to the last large one
        observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return statistic / critical_value(len(observed) - 1)


def contingency_excess(first: torch.Tensor, second: torch.Tensor, values: int) -> float:
    """How far two samples of paired values 0 to values - 1 are from independent; more than 1 rejects."""
    table = torch.bincount(first.long() * values + second.long(), minlength=values**2).double().view(values, values)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    if expected.min() < 5:
        raise ValueError("too few counts for a test")
    rows, columns = table.shape
    return (((table - expected) ** 2 / expected).sum() / critical_value((rows - 1) * (columns - 1))).item()
