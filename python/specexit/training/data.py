"""From traces to batches: what is trained on, in which order, and what the base says of it."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specexit.base import BaseModel, evaluation_mode
from specexit.training.labels import labels_of
from specexit.training.records import Trace
from specexit_kernels.state import SIGNALS


@dataclass(frozen=True)
class Example:
    """A text as the draft reads it. Row r reads the features of position r and the token at r + 1: of L tokens, L - 1.

    problem       that it belongs to
    tokens        [L] int64
    generated     [L - 1] bool: whether the token at r + 2, which row r predicts, was generated; False of the last row
    values        [L - 1, 3] float32: what its signals should be
    weights       [L - 1, 3] float32: how much each counts, 0 outside the thinking
    """

    problem: str
    tokens: Tensor
    generated: Tensor
    values: Tensor
    weights: Tensor


@dataclass
class Selection:
    """What of the traces is trained on, and what is held out to measure on; the counts say what became of the rest.

    flawed        traces that annotating could not use
    uncut         traces without a boundary, at which they could be cut
    too_long      traces whose prompt leaves no room for thinking
    truncated     traces that lost their end
    lost_tokens   tokens that those ends had
    """

    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    flawed: int = 0
    uncut: int = 0
    too_long: int = 0
    truncated: int = 0
    lost_tokens: int = 0

    def counts(self) -> dict[str, int]:
        counts = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        return {"train": len(self.train), "held_out": len(self.held_out), **counts}


def select(
    traces: Sequence[Trace], *, max_length: int, held_out: float, seed: int, boundary_weight: float, vocab_size: int
) -> Selection:
    """Examples of the usable traces, all of one problem on one side.

    Raises ValueError where none is left to train on, saying why.
    """
    result = Selection()
    examples: list[Example] = []
    for trace in traces:
        if trace.flaw is not None:
            result.flawed += 1
        elif not trace.boundaries:
            result.uncut += 1
        elif max_length < len(trace.prompt) + 2:
            result.too_long += 1
        else:
            lost = max(0, len(trace.tokens) - max_length)
            result.truncated += lost > 0
            result.lost_tokens += lost
            examples.append(_example(trace, max_length, boundary_weight))
            if int(examples[-1].tokens.max()) >= vocab_size or int(examples[-1].tokens.min()) < 0:
                raise ValueError(f"traces must hold ids of the base's vocabulary of {vocab_size}, not so {trace.id!r}")
    if not examples:
        raise ValueError(_nothing_left(traces, result, max_length))
    aside = _held_out_problems([example.problem for example in examples], held_out, seed)
    for example in examples:
        (result.held_out if example.problem in aside else result.train).append(example)
    return result


def _example(trace: Trace, max_length: int, boundary_weight: float) -> Example:
    tokens = torch.tensor(trace.tokens[:max_length])
    rows, start = len(tokens) - 1, len(trace.prompt)
    predicted = torch.arange(rows) + 2
    values, weights = torch.zeros(rows, len(SIGNALS)), torch.zeros(rows, len(SIGNALS))
    labels = labels_of(trace, boundary_weight)
    labelled = min(rows - start, len(trace.thinking))
    values[start : start + labelled] = labels.values[:labelled]
    weights[start : start + labelled] = labels.weights[:labelled]
    return Example(trace.id, tokens, (predicted >= start) & (predicted <= rows), values, weights)


def _nothing_left(traces: Sequence[Trace], found: Selection, max_length: int) -> str:
    if found.too_long:
        shortest = min(len(trace.prompt) for trace in traces if trace.flaw is None and trace.boundaries)
        return f"max_length must leave room for thinking behind prompts of at least {shortest} tokens, was {max_length}"
    return (
        f"traces must hold one that can be used, held {len(traces)}: "
        f"{found.flawed} with a flaw, {found.uncut} without a boundary"
    )


def _held_out_problems(problems: Sequence[str], share: float, seed: int) -> set[str]:
    """A share of the problems, at least one if any are asked for and two are there; which, by their names alone."""
    ranked = sorted(set(problems), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    count = min(max(1, round(share * len(ranked))), len(ranked) - 1) if share else 0
    return set(ranked[:count])


def order(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, by index: a function of the seed and the epoch alone.

    Texts of about one length go together. What does not fill a batch waits for another epoch, where another part is
    left over; fewer examples than one batch takes are repeated.
    """
    rng = random.Random(f"{seed} {epoch}")
    indices = list(range(len(lengths)))
    rng.shuffle(indices)
    indices *= math.ceil(batch / len(indices))
    indices = indices[: len(indices) // batch * batch]
    spread = 0.1 * max(lengths)
    indices.sort(key=lambda index: lengths[index] + spread * rng.random())
    batches = [indices[first : first + batch] for first in range(0, len(indices), batch)]
    rng.shuffle(batches)
    return batches


class Reading(NamedTuple):
    """What the base says of a text of L tokens, in rows as `Example` has them."""

    features: Tensor  # [L - 1, 3 H]
    targets: Tensor  # [L - 1, Vd]: row r's are the logits of the token at r + 2, of the ids that the draft can propose
    covered: Tensor  # [L - 1] bool: the base's own choice is one of those


class BaseReader:
    """Runs the frozen base over one text at a time, in its own attention.

    One text at a time, because what a row of a batch gets depends, in its last bits, on those beside it: a run that was
    killed and resumed must read what it would have read.

    ids  [Vd] those that the draft can propose; None: all
    """

    def __init__(self, base: BaseModel, ids: Tensor | None) -> None:
        self.base = base
        self.ids = ids
        self._inputs: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Reading:
        base = self.base
        with evaluation_mode(base.model), self._hooks():
            logits = base.model(input_ids=tokens.to(base.device).unsqueeze(0), use_cache=False).logits[0, 1:]
        features = torch.cat([self._inputs[layer][0, :-1] for layer in base.feature_layers], -1)
        self._inputs.clear()
        if self.ids is None:
            return Reading(features, logits[:, : base.vocab_size], logits.new_ones(len(logits), dtype=torch.bool))
        covered = torch.isin(logits.argmax(-1), self.ids)
        return Reading(features, logits[:, self.ids], covered)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [
            self.base.layers[layer].register_forward_pre_hook(partial(self._keep, layer), with_kwargs=True)
            for layer in set(self.base.feature_layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs[layer] = args[0] if args else kwargs["hidden_states"]


class Cache:
    """What was read of examples, in the host's memory, as long as it holds no more than `limit` bytes.

    Nothing is ever dropped: every example comes once an epoch, so that the ones kept are as good as any.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._kept: dict[int, Mapping[str, Tensor]] = {}

    def get(self, index: int, read: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        if index in self._kept:
            return self._kept[index]
        found = {name: tensor.clone() for name, tensor in read().items()} if self.limit else read()
        size = sum(tensor.nbytes for tensor in found.values())
        if self.nbytes + size <= self.limit:
            found = {name: tensor.cpu() for name, tensor in found.items()}
            self._kept[index] = found
            self.nbytes += size
        return found


def collate(rows: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """[B, R, ..] of each name, zeros behind the shorter ones."""
    return {
        name: nn.utils.rnn.pad_sequence([row[name].to(device) for row in rows], batch_first=True) for name in rows[0]
    }
