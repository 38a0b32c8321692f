"""Smoothing of the exit signals, in order and in float32, so that no cut of a text into steps changes a value.

none      e_p = x_p
ewma      e_p = alpha x_p + (1 - alpha) e_{p-1}, as torch.lerp computes it; the first x starts it
window    e_p = the mean of the last w values, of fewer before there are w
momentum  e_p = x_p + (x_p - x_{p-w+1}) / (w - 1): x_p plus the mean of the last w - 1 differences
"""

from __future__ import annotations

import torch
from torch import Tensor

from specexit_kernels.state import Smoothing


def smooth(
    kind: Smoothing,
    x: Tensor,
    missing: Tensor,
    inside: Tensor | None,
    alpha: Tensor,
    smoothed: Tensor,
    seen: Tensor,
    history: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed values of R successive rows, from those before them.

    x         [R, B, S] float32, finite, and 0 where missing
    missing   [R, B, S] bool: the row has no value, and leaves e as it was
    inside    [R, B] bool: rows inside thinking; those outside have no value, and what follows them starts afresh. None:
              all are inside
    alpha     [B] float32 (EWMA)
    smoothed  [B, S] float32, seen [B, S] int32, history [B, S, w] float32: as in `DecodeState`
    e         [R, B, S] float32; where the row has a value: NaN if too few went before it
    seen      [R, B, S] int32: how many values went into e
    history   [B, S, w] float32 after the last row
    """
    n_values = missing.logical_not().cumsum(0, dtype=torch.int32)
    n_seen = n_values + seen
    if inside is not None:  # the count restarts: what had been seen by the last row outside is taken off
        n_seen = n_seen - n_seen.masked_fill(inside.unsqueeze(2), 0).cummax(0).values
    if kind in (Smoothing.WINDOW, Smoothing.MOMENTUM):
        window = history.shape[2]
        last = _last_values(x, missing, n_values, n_seen, history)
        if kind is Smoothing.WINDOW:
            # In float64 the order of the addends does not show, so the layout that the sum runs over cannot either.
            e = (last.sum(-1, dtype=torch.float64) / n_seen.clamp(1, window)).float()
        else:
            newest = last[..., -1]
            e = newest + (newest - last[..., 0]) / (window - 1)
            e.masked_fill_(n_seen < window, torch.nan)
        return e, n_seen, last[-1]

    weight = torch.ones_like(x) if kind is Smoothing.NONE else alpha.unsqueeze(1).masked_fill(n_seen == 1, 1)
    weight.masked_fill_(missing, 0)
    values = []
    for value, share in zip(x.unbind(), weight.unbind(), strict=True):
        smoothed = torch.lerp(smoothed, value, share)
        values.append(smoothed)
    return torch.stack(values), n_seen, history


def values_needed(kind: Smoothing, window: int) -> int:
    """How many values must have been seen before e is decided."""
    return window if kind is Smoothing.MOMENTUM else 1


def _last_values(x: Tensor, missing: Tensor, n_values: Tensor, n_seen: Tensor, history: Tensor) -> Tensor:
    """The last w values at each row, oldest first, 0 where there are fewer: [R, B, S, w]."""
    rows, batch, signals = x.shape
    window = history.shape[2]
    # The history and then the run's values without gaps; rows without a value fall on one column more.
    line = torch.cat([history.permute(2, 0, 1), x.new_zeros(rows + 1, batch, signals)])
    line.scatter_(0, (n_values + (window - 1)).masked_fill_(missing, window + rows).long(), x)
    lag = torch.arange(window, device=x.device).view(-1, 1, 1, 1)
    last = line.gather(0, (n_values + lag).flatten(0, 1)).view(window, rows, batch, signals)
    return last.masked_fill_(lag < window - n_seen, 0).permute(1, 2, 3, 0)
