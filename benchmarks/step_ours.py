"""Our decoder on the text of a cell: its step as decoding takes it, a CUDA graph on a GPU, and without the graph.

Every timed call puts the state back to the cell's length first, in two launches: so all calls take the same step. No
exit passes its thresholds, but each is decided.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from benchmarks.harness import Prepared, Result
from benchmarks.step_parts import Meter, counted, kernel_times, metered, profiled
from benchmarks.step_problem import FORCED, Problem, Text
from specexit import ExitConfig, SpecExitDecoder
from specexit.capture import recorder
from specexit.engine import Engine, Form
from specexit.prefill import observe_root
from specexit.sampling import Sampler, SamplingConfig
from specexit_kernels import Finish

STEPS = 2  # that are checked, one after the other: the second reads what the first has left in the cache
STEPS_TO_CAPTURE = 3  # the first compiles kernels and may wait, the second may not, the third captures
MEASURED = 5  # steps that are taken apart on a CPU
CHUNK = 1024  # rows that the draft reads at a time

# No probability is above 1. The ids that follow an exit are as many as the tokens that are dictated for the check.
EXIT = ExitConfig(
    confidence=1.0,
    boundary_ids=(0,),
    start_ids=(),
    end_ids=(1,),
    force_ids=tuple(range(1, 1 + FORCED)),
    assume_thinking=True,
)


def ours(graph: bool = True) -> Callable[[Problem], Prepared]:
    """The step: captured where that is possible, or launched from Python."""

    def prepare(problem: Problem) -> Prepared:
        rows = Rows(problem, graph)
        return Prepared(
            [rows.again],
            finish=lambda _: rows.texts(),
            note=rows.note,
            graph=False,
            within=rows.active,
            more=rows.more,
            close=rows.close,
        )

    return prepare


def started(problem: Problem, graph: bool) -> Engine:
    """An engine whose rows have the problem's text behind them, with random features, of which the draft makes its own
    keys and values."""
    cell, device = problem.cell, problem.device
    decoder = SpecExitDecoder(problem.base, problem.draft, exit=EXIT, tree=cell.tree, graph=graph)
    plan = decoder.planner.plan(EXIT, cell.batch, (), device)
    form = Form(cell.batch, cell.tree, (), SamplingConfig(), plan.shared)
    sampler = Sampler(SamplingConfig(), cell.batch, cell.tree.nodes, device)
    slots = cell.length + (STEPS + 1) * cell.tree.nodes
    record = recorder(device) if graph else None
    engine = Engine(decoder.base, decoder.draft, form, plan.rules, sampler, slots, record)
    with engine.active():
        for layer, (keys, values) in zip(engine.buffers.cache.layers, problem.batches(), strict=True):
            layer.keys[:, :, : cell.length] = keys
            layer.values[:, :, : cell.length] = values
        state = engine.state
        state.lengths.fill_(cell.length)
        state.prompt_lengths.fill_(cell.length + 1)
        state.limits.fill_(slots - cell.tree.nodes + 1)
        state.finished.fill_(Finish.RUNNING)
        state.thinking.fill_(1)
        state.root.copy_(problem.prompts[:, -1])
        draft = engine.draft
        assert draft is not None
        normal = partial(torch.randn, device=device, dtype=problem.dtype)
        for start in range(0, cell.length - 1, CHUNK):
            tokens = problem.prompts[:, start + 1 : min(start + 1 + CHUNK, cell.length)].int()
            features = normal(*tokens.shape, problem.draft.feature_size)
            draft.read(features, tokens, torch.full_like(state.lengths, start))
        engine.buffers.last_features.copy_(normal(engine.buffers.last_features.shape))
        observe_root(draft, engine.buffers)
    return engine


class Rows:
    """The rows of a problem in an engine, and where they began."""

    def __init__(self, problem: Problem, graph: bool) -> None:
        self.problem = problem
        self.engine = started(problem, graph)
        self.state = self.engine.state
        with self.engine.active():
            # By dtype, and without the empty ones: each list is one launch.
            tensors = [tensor for tensor in self.state.tensors() if tensor.numel()]
            lists = [[t for t in tensors if t.dtype == dtype] for dtype in (torch.int32, torch.float32)]
            self.saved = [(tensors, [tensor.clone() for tensor in tensors]) for tensors in lists if tensors]
            self.note = "launched from Python"
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for _ in range(STEPS_TO_CAPTURE if graph else 2):
                    self.again()
            if self.engine.captured:
                self.note = "one CUDA graph"
            elif self.engine.refused:
                self.note += "".join(f": {w.message}" for w in said if "not captured" in str(w.message))

    def active(self) -> AbstractContextManager[None]:
        """What steps are taken inside of."""
        return self.engine.active()

    def again(self) -> None:
        """A step from the beginning."""
        self.restore()
        self.engine.step()

    def restore(self) -> None:
        """The state as it was. What the draft has read is not put back: it changes what is proposed, and no work."""
        for tensors, saved in self.saved:
            torch._foreach_copy_(tensors, saved)

    def texts(self) -> list[Text]:
        """What steps make of the text as it is, and of one that is dictated, whose accepted path is long."""
        self.restore()
        texts = self._steps(1)
        self.restore()
        forced = min(FORCED, self.problem.cell.tree.nodes)
        self.state.root.copy_(self.problem.dictated[:, 0])
        self.state.forced[:, :forced] = self.problem.dictated[:, :forced]
        self.state.n_forced.fill_(forced)
        return texts + self._steps(forced)

    def _steps(self, given: int) -> list[Text]:
        tokens = {row: [int(self.state.root[row])] for row in self.problem.rows}
        for _ in range(STEPS):
            self.engine.step()
            for row in self.problem.rows:
                tokens[row] += self.state.output[row, : self.state.n_output[row]].tolist()
        layer, length = self.engine.buffers.cache.layers[self.problem.seen], self.problem.cell.length
        written = torch.stack([cache[:, :, length:] for cache in (layer.keys, layer.values)], 1)
        return [Text(row, found, given, written[row, :, :, : len(found) - 1]) for row, found in tokens.items()]

    def more(self) -> Result:
        """Launches and syncs of a step; of one without a graph the time of its parts, in microseconds: on a GPU that of
        their kernels, else what the clock says."""
        device = self.problem.device
        counts = counted(profiled(self.again, device))
        if self.engine.captured:
            return counts
        meter = Meter(device)
        with metered(meter):
            if device.type == "cuda":
                parts = kernel_times(profiled(self.again, device))
                return {**counts, "parts": parts} if parts else counts
            for _ in range(MEASURED):
                self.again()
        return {**counts, "parts": meter.by_part()}

    def close(self) -> None:
        """Give the memory back now."""
        self.engine.close()
        del self.engine, self.state
        if self.problem.device.type == "cuda":
            torch.cuda.empty_cache()
