"""How a draft is trained: which optimiser takes which weight, its rate over the steps, and how deep the unroll goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Of a hidden size of 128, on the bundled pair. It falls as the layer gets wider: at 4096 it is 9e-5, where published
# EAGLE-3 drafts were trained (5e-5 to 1e-4).
RATE, RATE_SIZE = 3e-3, 128
MATRICES = ("qkv_weight", "o_weight", "gate_up_weight", "down_weight")  # between hidden states: what Muon is made for
WARMUP, STEADY, FINAL = 30, 0.5, 0.02


def default_rate(hidden_size: int) -> float:
    return RATE * RATE_SIZE / hidden_size


def rate_factor(step: int, steps: int) -> float:
    """Of the learning rate at `step` of `steps`: up within 30 steps, level to the half, and down in a line to 2 %."""
    warm = min(1.0, (step + 1) / min(WARMUP, max(1, steps // 4)))
    done = step / steps
    return warm * (1.0 if done < STEADY else max(FINAL, (1 - done) / (1 - STEADY)))


def unroll_depth(step: int, steps: int, depth: int) -> int:
    """Steps of the unroll: one in the first tenth, half of them up to 35 %, all but one up to 70 %, then all.

    A draft that cannot predict the next token yet learns little from the ones after it, and they cost the most.
    """
    done = step / steps
    return max(1, 1 if done < 0.1 else math.ceil(depth / 2) if done < 0.35 else depth - 1 if done < 0.7 else depth)


class Optimizer:
    """AdamW, or Muon (`torch.optim.Muon`) for the layer's matrices and AdamW for all else.

    Weight decay is Muon's alone: a weight without a gradient stays, to the bit, where it was.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kind: Literal["adamw", "muon"], rate: float) -> None:
        self.rate = rate
        matrices = [p for name, p in parameters.items() if kind == "muon" and name in MATRICES]
        others = [p for name, p in parameters.items() if kind != "muon" or name not in MATRICES]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0))

    def step(self, factor: float) -> None:
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self.rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self._parts]

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(dict(state))


def clip_gradients(groups: Sequence[Sequence[Tensor]], limit: float) -> Tensor:
    """Scale each group of gradients, or of views of them, to a norm of at most `limit`; the norm of all before it."""
    norms = []
    for group in filter(None, groups):
        norm = torch.stack([gradient.norm() for gradient in group]).norm()
        for gradient in group:
            gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        norms.append(norm)
    return torch.stack(norms).norm()
