"""Exit signals as numbers with a meaning: SpecExit, arXiv 2509.24248."""

from __future__ import annotations

from torch import Tensor


def activate_signals(raw: Tensor) -> Tensor:
    """What raw exit signals say: confidence and progress by a sigmoid, the remaining length by exp.

    raw     [..., S], S from 0 to 3, in this order: as `project_features` and `draft_topk` return them
    values  [..., S] of the same dtype: confidence and progress from 0 to 1, remaining in tokens; NaN of NaN

    `decide_exit` takes raw signals, and does this itself.
    """
    # 1 / (1 + exp(-z)), because torch.sigmoid gives an element other bits at another place in the tensor.
    values = raw.clone()
    shares = values[..., :2]
    shares.neg_()
    values.exp_()
    shares.add_(1).reciprocal_()
    return values
