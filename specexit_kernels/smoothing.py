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
    valid: Tensor,
    outside: Tensor | None,
    alpha: Tensor,
    smoothed: Tensor,
    seen: Tensor,
    history: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed values of R successive rows, from those before them.

    x         [R, B, S] float32, finite where valid and 0 elsewhere
    valid     [R, B, S] bool: the row has a value; another leaves e as it was
    outside   [R, B] bool: rows outside thinking, of which none is valid: what follows them starts afresh; None: no row
    alpha     [B] float32 (EWMA)
    smoothed  [B, S] float32, seen [B, S] int32, history [B, S, w] float32: as in `DecodeState`
    e         [R, B, S] float32; where the row has a value: NaN if too few went before it
    seen      [R, B, S] int64: how many values went into e
    history   [B, S, w] float32 after the last row
    """
    n_valid = valid.cumsum(0)
    n_seen = n_valid + seen
    if outside is not None:  # the count restarts: what had been seen by the last row outside is taken off
        n_seen -= (n_seen * outside.unsqueeze(2)).cummax(0).values
    if kind in (Smoothing.WINDOW, Smoothing.MOMENTUM):
        window = history.shape[2]
        last = _last_values(x, valid, n_valid, n_seen, history)
        if kind is Smoothing.WINDOW:
            # In float64 the order of the addends does not show, so the layout that the sum runs over cannot either.
            e = (last.sum(-1, dtype=torch.float64) / n_seen.clamp(1, window)).float()
        else:
            newest = last[..., -1]
            e = newest + (newest - last[..., 0]) / (window - 1)
            e.masked_fill_(n_seen < window, torch.nan)
        return e, n_seen, last[-1]

    if kind is Smoothing.NONE:
        weight = valid.to(x.dtype)
    else:
        weight = torch.where(n_seen == 1, 1.0, alpha.unsqueeze(1)).mul_(valid)
    values = []
    for value, share in zip(x.unbind(), weight.unbind(), strict=True):
        smoothed = torch.lerp(smoothed, value, share)
        values.append(smoothed)
    return torch.stack(values), n_seen, history


def values_needed(kind: Smoothing, window: int) -> int:
    """How many values must have been seen before e is decided."""
    return window if kind is Smoothing.MOMENTUM else 1


def _last_values(x: Tensor, valid: Tensor, n_valid: Tensor, n_seen: Tensor, history: Tensor) -> Tensor:
    """The last w values at each row, oldest first, 0 where there are fewer: [R, B, S, w]."""
    rows, batch, signals = x.shape
    window = history.shape[2]
    # The history and then the run's values without gaps; rows without a value fall on one column more.
    line = torch.cat([history.permute(2, 0, 1), x.new_zeros(rows + 1, batch, signals)])
    line.scatter_(0, torch.where(valid, n_valid + (window - 1), window + rows), x)
    lag = torch.arange(window, device=x.device).view(-1, 1, 1, 1)
    last = line.gather(0, (n_valid + lag).flatten(0, 1)).view(window, rows, batch, signals)
    return last.masked_fill_(lag < window - n_seen, 0).permute(1, 2, 3, 0)
