"""What the exit signals should say at each thinking token of a trace.

With k tokens of thinking read, s of them sufficient, and q the last boundary at or before the k-th:

    confidence   probabilities[q] where the answer there is the final one, else 0
    progress     min(1, k / s)
    remaining    log(1 + max(0, s - k))

Each is what the raw signal is trained to: confidence and progress through a sigmoid, remaining as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specexit.training.records import Trace


class Labels(NamedTuple):
    """Columns in the order of SIGNALS."""

    values: Tensor  # [n, 3] float32, at each thinking token
    weights: Tensor  # [n, 3] float32; 0: no label


def labels_of(trace: Trace, boundary_weight: float = 4.0) -> Labels:
    """Labels of a trace without a flaw.

    boundary_weight  of the tokens that end a paragraph, where the exit is decided; others weigh 1

    Before the first boundary nothing was asked, so confidence has no label there.
    """
    count = len(trace.thinking)
    read = torch.arange(1, count + 1)
    boundaries = torch.tensor(trace.boundaries, dtype=torch.int64)
    last = torch.searchsorted(boundaries, read, right=True) - 1  # -1 before the first one
    agreed = [p if agrees else 0.0 for p, agrees in zip(trace.probabilities, trace.agrees, strict=True)]
    confidence = torch.tensor([0.0, *agreed])[last + 1]
    progress = (read / trace.sufficient).clamp(max=1.0)
    remaining = (trace.sufficient - read).clamp(min=0).float().log1p()
    weights = torch.ones(count, 3)
    weights[boundaries - 1] = boundary_weight
    weights[last < 0, 0] = 0.0
    return Labels(torch.stack((confidence, progress, remaining), 1), weights)
