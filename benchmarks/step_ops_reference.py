"""What the step's small ops must give, found without them: trees sorted in Python, draws in float64, paths as lists.

All results are integers and compared exactly, but for the smoothed signals. Where rounding could decide a draw, it says
so, and the inputs are made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.harness import Unavailable
from specexit_kernels.philox import gumbel_noise

if TYPE_CHECKING:
    from benchmarks.step_ops_cells import Sampling

Result = dict[str, Tensor]

SMOOTH = 1e-5  # of a smoothed signal, and of 1: the error that its fp32 arithmetic may have
MARGIN = 1e-3  # by which a draw must win: noise and logits in fp32 are some 1e-6 from their values here
SHARE = 1e-4  # by which a share of the probability may be off, of itself; sums in fp32 are some 1e-6 off


def compare(result: Mapping[str, Tensor], expected: Mapping[str, Tensor], required: Sequence[str]) -> float:
    """The largest error of a float over what is allowed, 0 where there is none.

    Raises Unavailable where a required result is missing, or one that is given is wrong.
    """
    if missing := [name for name in required if name not in result]:
        raise Unavailable(f"wrong result: no {', '.join(missing)}")
    errors = [0.0]
    for name, value in result.items():
        found, right = value.cpu(), expected[name]
        if found.shape != right.shape:
            raise Unavailable(f"wrong result: {name} of shape {list(found.shape)}, not {list(right.shape)}")
        if not right.is_floating_point():
            if wrong := int((found != right).sum()):
                raise Unavailable(f"wrong result: {name}, {wrong} of {right.numel()}")
            continue
        allowed = SMOOTH * (1 + right.abs())
        error = ((found - right).abs() / allowed).nan_to_num(torch.inf)
        error[found.isnan() & right.isnan()] = 0
        errors.append(float(error.max()) if error.numel() else 0.0)
        if errors[-1] > 1:
            raise Unavailable(f"wrong result: {name} off by {errors[-1]:.3g} times what is allowed")
    return max(errors)


def best_nodes(nodes: int, root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor) -> Result:
    """`build_tree` for at least nodes - 1 candidates that are none of them -inf."""
    rows: list[tuple[list[int], list[int], list[int], list[list[int]]]] = []
    words = -(-nodes // 64)
    for first, ids, score, above in zip(*(x.tolist() for x in (root, tokens, scores, parents)), strict=True):
        chosen = sorted(sorted(range(len(ids)), key=lambda c: (-score[c], c))[: nodes - 1])
        node_of = {-1: 0, **{c: n for n, c in enumerate(chosen, 1)}}
        parent, depth, bits = [0], [0], [1]
        for node, candidate in enumerate(chosen, 1):
            parent.append(node_of[above[candidate]])
            depth.append(depth[parent[-1]] + 1)
            bits.append(bits[parent[-1]] | 1 << node)
        split = [[_signed(row >> 64 * word) for word in range(words)] for row in bits]
        rows.append(([first, *(ids[c] for c in chosen)], parent, depth, split))
    node_tokens, node_parents, depths, visible = zip(*rows, strict=True)
    return {
        "tokens": torch.tensor(node_tokens, dtype=torch.int32),
        "parent": torch.tensor(node_parents, dtype=torch.int32),
        "depth": torch.tensor(depths, dtype=torch.int32),
        "visible": torch.tensor(visible, dtype=torch.int64),
    }


def _signed(value: int) -> int:
    """The low 64 bits as a signed integer."""
    value &= 2**64 - 1
    return value - 2**64 if value >> 63 else value


def draws(logits: Tensor, positions: Tensor, seeds: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`sample_targets` in float64: targets [N] int32, and whether no rounding could have changed each [N] bool."""
    z = logits.double()
    if sampling.temperature is None:
        best = z.topk(2).values
        return z.argmax(1).int(), best[:, 0] - best[:, 1] > MARGIN
    z /= sampling.temperature
    ranked, token = z.sort(dim=1, descending=True, stable=True)
    noise = gumbel_noise(seeds, positions, z.shape[1]).double().gather(1, token)
    found = []
    clear = torch.ones(len(z), dtype=torch.bool)
    for share in (1 - SHARE, 1.0, 1 + SHARE):
        score = (ranked + noise).masked_fill(~_kept(ranked, sampling, share), -torch.inf)
        best, rank = score.topk(2)
        clear &= best[:, 0] - best[:, 1] > MARGIN
        found.append(token.gather(1, rank[:, :1]).squeeze(1))
    clear &= (found[0] == found[1]) & (found[1] == found[2])
    return found[1].int(), clear


def _kept(ranked: Tensor, sampling: Sampling, share: float) -> Tensor:
    """Which of the logits, largest first, the warpers keep; their limits on probabilities times `share`."""
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.top_k is not None:
        kept &= ranked >= ranked[:, sampling.top_k - 1 : sampling.top_k]
    if sampling.top_p is not None:
        p = ranked.masked_fill(~kept, -torch.inf).softmax(1)
        kept &= p.cumsum(1) - p < sampling.top_p * share
    if sampling.min_p is not None:
        p = ranked.masked_fill(~kept, -torch.inf).softmax(1)
        kept &= p >= sampling.min_p * share * p[:, :1]
    return kept


def moved_rows(paths: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, source slots and target slots of what `compact_kv` moves, where the committed slots are none."""
    moves = [(row, node, place) for row, path in enumerate(paths) for place, node in enumerate(path) if node != place]
    rows, sources, targets = torch.tensor(moves, device=device).view(-1, 3).unbind(1)
    return rows, sources, targets
