"""Fit a draft to a base: tokens by EAGLE-3's training-time test, exit signals by the labels of annotated traces.

    fit(model, "traces.jsonl", "draft", FitConfig(steps=700))

The folder gets the draft in EAGLE-3's layout, and training.jsonl: a line for each step. While it runs it holds
checkpoints; the same call goes on from the last of them, and on a CPU ends with the weights, to the bit, that an
undisturbed run would have: the order of the data follows from the seed and the epoch, the base reads each text alone,
and nothing else draws a random number.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specexit.base import BaseModel
from specexit.drafts import Eagle3Draft
from specexit.drafts.checkpoint import fingerprint_of
from specexit.files import locked
from specexit.identity import check_base, fingerprint
from specexit.training import checkpoint, drafting
from specexit.training.data import BaseReader, Cache, Example, Selection, collate, order, select
from specexit.training.fit_config import FitConfig
from specexit.training.losses import Balance
from specexit.training.objective import Losses, Objective, summary
from specexit.training.output import Log, finished, write_draft
from specexit.training.processes import Processes, find_processes
from specexit.training.records import Trace, read_trace_files, require_alike
from specexit.training.schedule import Optimizer, clip_gradients, default_rate, rate_factor, unroll_depth
from specexit_kernels.state import SIGNALS

File = str | os.PathLike[str]
BALANCE_EVERY = 10  # steps between two measurements of the gradients' norms


@dataclass(frozen=True)
class FitResult:
    """output        the draft's folder
    resumed_from  the step that this call went on from; 0: it began, `steps`: the draft was there already
    data          how many traces were used, held out, left out and truncated, see `data.Selection`
    coverage      share of the generated tokens that the draft can propose
    held_out      on the held-out problems: "agreement" with the base's own choice and "token_loss" by depth, and the
                  losses of the signals by placement; empty where nothing is held out
    """

    output: Path
    resumed_from: int
    data: dict[str, int]
    coverage: float
    held_out: dict[str, Any]


def fit(
    model: PreTrainedModel,
    traces: File | Sequence[File],
    output: str | os.PathLike[str],
    config: FitConfig | None = None,
    *,
    on_log: Callable[[Mapping[str, Any]], None] | None = None,
    processes: Processes | None = None,
) -> FitResult:
    """Fit a draft to `model` on the traces of a file, or several, and write it to the folder `output`.

    model      the base that the traces are of; it stays as it is
    on_log     is told every line of the log
    processes  None: as a launcher's environment says, `accelerate launch` for example; all of them read `output`

    Raises ValueError for traces of another base, or where none can be used; for an init that does not fit; and for an
    output that holds another run, or a draft, already. Raises FloatingPointError where a loss is no number.
    """
    config = config or FitConfig()
    base = BaseModel(model, None)
    processes = processes or find_processes(cpu=base.device.type == "cpu")
    paths: list[File] = [traces] if isinstance(traces, (str, os.PathLike)) else list(traces)
    headers, found = read_trace_files(paths)
    require_alike(headers, ("base", "tokenizer", "markers"))
    check_base(str(headers[0].get("base")), model, str(paths[0]))
    chosen = select(
        found,
        max_length=config.max_length,
        held_out=config.held_out,
        seed=config.seed,
        boundary_weight=config.boundary_weight,
        vocab_size=base.vocab_size,
    )
    run = _Run(base, chosen, Path(output), config, processes, on_log or (lambda line: None))
    run.identify(headers, found)
    return run.go()


def _traces_fingerprint(traces: list[Trace]) -> str:
    content = hashlib.sha256()
    for trace in traces:  # one at a time: together they are gigabytes
        content.update(json.dumps(vars(trace)).encode() + b"\n")
    return content.hexdigest()


class _Run:
    """One run of training: its draft, its data, and where it stands."""

    def __init__(
        self,
        base: BaseModel,
        chosen: Selection,
        output: Path,
        config: FitConfig,
        processes: Processes,
        on_log: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.config = config
        self.chosen = chosen
        self.output = output
        self.processes = processes
        self.on_log = on_log
        self.draft = self._make_draft(base)
        if config.init is not None:
            base = BaseModel(base.model, self.draft.feature_layers)
        self.base = base
        ids = target_ids(self.draft)
        reader = BaseReader(base, None if ids is None else ids.to(base.device))
        self.objective = Objective(self.draft, reader, config.placement, config.signals_only, config.decay)
        self.balance = Balance(config.signal_share)
        self.cache = Cache(int(config.cache_gib * 2**30))
        self.coverage = coverage(chosen.train, ids)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def _make_draft(self, base: BaseModel) -> Eagle3Draft:
        config, embedding, train = self.config, drafting.trainable_embedding(base), self.chosen.train
        if config.init is None:
            return drafting.new_draft(base, embedding, train, config.placement, config.draft_vocab, config.seed)
        return drafting.existing_draft(
            config.init, base, embedding, train, config.placement, config.signals_only, config.seed
        )

    def identify(self, headers: list[dict[str, Any]], traces: list[Trace]) -> None:
        """Note what the run is of: its settings, by which it is recognised, and what the draft's config will say."""
        settings = self.config.identity()
        self.settings: dict[str, Any] = {
            **settings,
            "base": fingerprint(self.base.model),
            "traces": _traces_fingerprint(traces),
            "draft's first weights": fingerprint_of(self.draft),
            "dtype of the base": str(self.base.dtype).removeprefix("torch."),
            "number of processes": self.processes.count,
        }
        self.provenance = {
            "base": self.settings["base"],
            "base_name": str(getattr(self.base.model.config, "_name_or_path", "")),
            "traces": self.settings["traces"],
            "traces_headers": hashlib.sha256(json.dumps(headers, sort_keys=True).encode()).hexdigest(),
            "examples": self.chosen.counts(),
            "settings": settings,
        }

    def go(self) -> FitResult:
        config = self.config
        if (result := finished(self.output, self.provenance)) is not None:
            return FitResult(self.output, config.steps, self.chosen.counts(), self.coverage, result)
        if not self.processes.writes:
            return self._go()
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.output, wait=False):
                return self._go()
        except BlockingIOError:
            raise ValueError(f"output must be of one run, {self.output} is being written by another process") from None

    def _go(self) -> FitResult:
        config = self.config
        parameters = self.objective.parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = Optimizer(parameters, config.optimizer, self._rate())
        first = self._resume()
        self.log = Log(self.output, first, self.on_log if self.processes.writes else None)
        with self.log:
            data = {**self.chosen.counts(), "coverage": self.coverage, "resumed_from": first}
            self.log.write({"step": 0, "data": data}, again=first > 0)
            held_out: dict[str, Any] = {}
            for step in range(first, config.steps):
                self.log.write(self._step(step))
                done = step + 1
                if done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0):
                    held_out = self._checkpoint(done)
            if first == config.steps:  # it was killed while the draft was written
                held_out = self._measure()
        self.processes.wait()
        if self.processes.writes:
            write_draft(self.draft, self.output, self.provenance | {"held_out": held_out}, self._save_dtype())
            checkpoint.remove_checkpoints(self.output)
        self.processes.wait()
        return FitResult(self.output, first, self.chosen.counts(), self.coverage, held_out)

    def _rate(self) -> float:
        if self.config.lr is not None:
            return self.config.lr
        return default_rate(self.draft.config.hidden_size)

    def _step(self, step: int) -> dict[str, Any]:
        """Update the weights once; what the log says of it."""
        config, objective = self.config, self.objective
        full = 1 if config.signals_only else config.depth
        depth = full if config.init is not None else unroll_depth(step, config.steps, full)
        batch = self._batch(step)
        sizes = objective.sizes(batch, depth)
        self.processes.sum_([sizes])
        losses = objective.losses(batch, depth, sizes, self.processes.count)
        if step % BALANCE_EVERY == 0:
            self._balance(losses)
        objective.total(losses, self.balance).backward()
        values = losses.values() / self.processes.count
        self.processes.sum_([values, *(p.grad for p in objective.parameters().values() if p.grad is not None)])
        groups = objective.gradient_groups()
        for gradient in (gradient for group in groups for gradient in group):
            gradient /= self.processes.count
        norm = clip_gradients(groups, config.clip)
        factor = rate_factor(step, config.steps)
        if not math.isfinite(float(norm)) or not bool(values.isfinite().all()):
            raise FloatingPointError(
                f"a loss was no number at step {step + 1}: lr must be lower, was {self._rate() * factor:.2g}; "
                f"the checkpoints in {self.output} are from before it"
            )
        self.optimizer.step(factor)
        return {
            "step": step + 1,
            "depth": depth,
            "lr": self._rate() * factor,
            "gradient": float(norm),
            **self._named(values.tolist(), losses),
            "weights": objective.weights(self.balance) if losses.output is not None else [],
        }

    def _named(self, values: list[float], losses: Losses) -> dict[str, Any]:
        count = len(losses.tokens)
        named: dict[str, Any] = {"tokens": values[:count]} if count else {}
        for name, signals in (("output", losses.output), ("fc", losses.fc)):
            if signals is not None:
                named[name] = dict(zip(SIGNALS, values[count : count + len(SIGNALS)], strict=True))
                count += len(SIGNALS)
        return named

    def _balance(self, losses: Losses) -> None:
        squares = self.objective.norms(losses)
        if squares is not None:
            self.processes.sum_([squares])
            self.balance.update(squares.sqrt().tolist())

    def _batch(self, step: int) -> dict[str, Tensor]:
        """This process's part of the global batch of `step`."""
        train, whole = self.chosen.train, self.config.batch_size * self.processes.count
        per_epoch = max(1, len(train) // whole)
        epoch, at = divmod(step, per_epoch)
        if self._epoch[0] != epoch:
            lengths = [len(example.tokens) for example in train]
            self._epoch = (epoch, order(lengths, whole, self.config.seed, epoch))
        indices = self._epoch[1][at]
        return self._collate(
            {index: train[index] for index in indices}, indices[self.processes.rank :: self.processes.count]
        )

    def _collate(self, examples: Mapping[int, Example], indices: list[int]) -> dict[str, Tensor]:
        objective = self.objective
        readings = [self.cache.get(i, lambda i=i: objective.read(examples[i])) for i in indices]  # type: ignore[misc]
        rows = [objective.rows(examples[i], reading) for i, reading in zip(indices, readings, strict=True)]
        return collate(rows, self.base.device)

    def _measure(self) -> dict[str, Any]:
        """The held-out examples, shared among the processes."""
        depth = 1 if self.config.signals_only else self.config.depth
        # Negative: apart, in the cache, from those that are trained on.
        examples = {~index: example for index, example in enumerate(self.chosen.held_out)}
        mine = sorted(examples, key=lambda index: len(examples[index].tokens))[
            self.processes.rank :: self.processes.count
        ]
        columns = 3 * len(SIGNALS) + (0 if self.config.signals_only else 4 * depth)
        sums = torch.zeros(columns, dtype=torch.float64, device=self.base.device)
        for first in range(0, len(mine), self.config.batch_size):
            sums += self.objective.measure(self._collate(examples, mine[first : first + self.config.batch_size]), depth)
        self.processes.sum_([sums])
        return summary(sums.tolist(), depth) if examples else {}

    def _checkpoint(self, step: int) -> dict[str, Any]:
        held_out = self._measure()
        self.log.write({"step": step, "held_out": held_out})
        if self.processes.writes:
            content = {
                "settings": self.settings,
                "weights": {name: p.detach() for name, p in self.objective.parameters().items()},
                "optimizer": self.optimizer.state(),
                "balance": self.balance.state(),
            }
            checkpoint.save_checkpoint(self.output, step, content, self.config.keep)
        self.processes.wait()
        return held_out

    @torch.no_grad()
    def _resume(self) -> int:
        """Go on from the last checkpoint; the step that it is of, 0 where there is none."""
        there = checkpoint.checkpoints(self.output)
        self.processes.wait()
        if not there:
            return 0
        content = checkpoint.load_checkpoint(there[-1], self.settings)
        for name, parameter in self.objective.parameters().items():
            parameter.copy_(content["weights"][name])
        self.optimizer.restore(content["optimizer"])
        self.balance.restore(content["balance"])
        return int(content["step"])

    def _save_dtype(self) -> torch.dtype:
        if self.config.save_dtype is not None:
            return getattr(torch, self.config.save_dtype)
        if not self.config.signals_only:
            return torch.bfloat16
        return narrowest(self.objective.untouched())


def narrowest(weights: list[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds every one of them."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            return dtype
    return torch.float64


def target_ids(draft: Eagle3Draft) -> Tensor | None:
    """[Vd] the base's ids that the draft can propose; None: all."""
    if draft.d2t is None:
        return None
    return torch.arange(len(draft.d2t), device=draft.d2t.device) + draft.d2t


def coverage(examples: list[Example], ids: Tensor | None) -> float:
    """Share of the generated tokens that are among `ids`."""
    if ids is None:
        return 1.0
    known = [torch.isin(example.tokens[2:][example.generated[:-1]], ids.cpu()) for example in examples]
    return float(torch.cat(known).double().mean())
