"""What the step's small ops are compared with: the releases' pipeline, and the twins, in CUDA graphs and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Peer, Prepared, Unavailable
from benchmarks.step_ops_cells import AFTER, STATEFUL
from benchmarks.step_ops_inputs import Build, Sample, Step, named
from benchmarks.step_ops_reference import Result
from benchmarks.step_ops_release import release
from specexit_kernels import DecodeState, accept, build_tree, compact_kv, decide_exit, sample_targets
from specexit_kernels._op import OPS
from specexit_kernels.accept import accept_ref
from specexit_kernels.build_tree import build_tree_ref
from specexit_kernels.compact_kv import compact_kv_ref
from specexit_kernels.decide_exit import decide_exit_ref
from specexit_kernels.philox import gumbel_noise
from specexit_kernels.sample_targets import warp

Problem = Build | Sample | Step

TWIN_ROWS = 60  # that the twin draws: one after the other, each in more than a hundred operations


def ours(implementation: str | None = None) -> Callable[[Problem], Prepared]:
    """The ops: the best implementation for the device, or the one of this name."""

    def prepare(problem: Problem) -> Prepared:
        if isinstance(problem, Build):
            call = partial(build_tree, *problem.arguments, implementation=implementation)
            return Prepared([call], _tree, _unlike_ours(problem, implementation))
        if isinstance(problem, Sample):
            sample = partial(_sample, problem, implementation)
            return Prepared(
                [partial(sample, logits) for logits in problem.copies], _targets, _unlike_ours(problem, implementation)
            )
        calls = problem.rotated(partial(_step, problem, implementation))
        return Prepared(calls, partial(_results, problem), _unlike_ours(problem, implementation))

    return prepare


def _sample(problem: Sample, implementation: str | None, logits: Tensor) -> Tensor:
    return sample_targets(logits, *problem.arguments, implementation=implementation)


def _step(problem: Step, implementation: str | None, copy: int) -> Result:
    """The ops of the cell, on one of the copies, in the order of a step."""
    op, state = problem.cell.op, problem.states[copy]
    path, n_accepted = problem.paths
    lengths = problem.lengths[copy]
    results: Result = {}
    if op in ("accept", AFTER):
        path, n_accepted, results["next_token"] = accept(
            problem.tree, problem.targets, problem.stop_ids, state, implementation=implementation
        )
        results |= {"path": path, "n_accepted": n_accepted}
        lengths = state.lengths
    if op in ("compact_kv", AFTER):
        compact_kv(problem.keys, problem.values, path, n_accepted, lengths, implementation=implementation)
    if op in ("decide_exit", AFTER):
        results["cut"] = decide_exit(problem.signals, problem.rules, state, implementation=implementation)
    return results


def _results(problem: Step, results: Result) -> Result:
    """With the state of the first copy, and what a step publishes of it."""
    if problem.cell.op not in STATEFUL:
        return results
    state = problem.states[0]
    published = {} if problem.cell.op == "accept" else {"n_output": state.n_output, "output": state.output}
    return results | {name: value.clone() for name, value in published.items()} | named(state)


def _unlike_ours(problem: Problem, implementation: str | None) -> str:
    """What implements a part of the cell, where it is not what ours is named by: `accept`'s. An argument that a kernel
    cannot take goes to the twin."""
    if implementation is not None:
        return ""
    device = _device(problem)
    usual = OPS["accept"].implementation(device).name
    names = {op: OPS[op].implementation(device, _arguments(problem, op)).name for op in _parts(problem)}
    return "; ".join(f"{op}: {name}" for op, name in names.items() if name != usual)


def _parts(problem: Problem) -> tuple[str, ...]:
    op = problem.cell.op
    return ("accept", "compact_kv", "decide_exit") if op == AFTER else (op,)


def _device(problem: Problem) -> str:
    if isinstance(problem, Step):
        return problem.targets.device.type
    return (problem.arguments[0] if isinstance(problem, Build) else problem.copies[0]).device.type


def _arguments(problem: Problem, op: str, copy: int = 0) -> tuple[Any, ...]:
    """Those of the op's schema, of one of the copies."""
    if isinstance(problem, Build):
        return problem.arguments
    if isinstance(problem, Sample):
        return problem.copies[copy], *problem.arguments
    state = problem.states[copy].tensors()
    if op == "accept":
        return *problem.tree, problem.targets, problem.stop_ids, state
    if op == "compact_kv":
        return problem.keys, problem.values, *problem.paths, problem.lengths[copy], None
    r = problem.rules
    static = int(r.smoothing), r.per_step, r.has_minimum, r.has_budget, r.force_stops
    return problem.signals, r.tensors(), *static, state


def twin(problem: Problem) -> Prepared:
    """What the ops run where there is no kernel, replayed as a CUDA graph where its calls are short enough."""
    if isinstance(problem, Sample) and problem.arguments[2] is not None and problem.cell.rows > TWIN_ROWS:
        raise Unavailable(f"it draws row by row, and there are more than {TWIN_ROWS}")
    return ours("torch")(problem)


def compiled(problem: Problem) -> Prepared:
    """The twins through `torch.compile`, replayed as a CUDA graph. The three after the forward are one function.

    Graph breaks are allowed: the trace of the signals leaves `decide_exit` in an operation that is not compiled.
    """
    torch._dynamo.reset()  # each shape is compiled anew, and past a few of them dynamo would run it uncompiled
    build = partial(torch.compile, dynamic=False)
    if isinstance(problem, Build):
        return Prepared([partial(build(build_tree_ref), *problem.arguments)], _tree)
    if isinstance(problem, Sample):
        function = build(sample_whole)
        calls = [partial(function, logits, *problem.arguments) for logits in problem.copies]
        return Prepared(calls, _targets, "all rows at once")
    functions = {"accept": accept_ref, "decide_exit": decide_exit_ref, "compact_kv": compact_kv_ref, AFTER: after}
    function = build(functions[problem.cell.op])

    def call(copy: int) -> Any:
        arguments = [_arguments(problem, op, copy) for op in _parts(problem)]
        return function(*arguments) if problem.cell.op == AFTER else function(*arguments[0])

    def finish(found: Any) -> Result:
        results: Result = {}
        if problem.cell.op in ("accept", AFTER):
            results = dict(zip(("path", "n_accepted", "next_token"), found, strict=False))
        if problem.cell.op in ("decide_exit", AFTER):
            results["cut"] = found[-1] if problem.cell.op == AFTER else found
        return _results(problem, results)

    return Prepared(problem.rotated(call), finish)


def after(accepting: tuple[Any, ...], compacting: tuple[Any, ...], deciding: tuple[Any, ...]) -> Any:
    """The three twins in the order of a step; arguments as in their schemas, but for what one leaves for the next."""
    path, n_accepted, next_token = accept_ref(*accepting)
    keys, values, *_ = compacting
    compact_kv_ref(keys, values, path, n_accepted, DecodeState.of(accepting[-1]).lengths)
    return path, n_accepted, next_token, decide_exit_ref(*deciding)


def sample_whole(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor:
    """The twin of `sample_targets` without its loop, which only keeps the temporaries small."""
    greedy = logits.argmax(1)
    if temperature is None:
        return greedy.int()
    noise = gumbel_noise(seeds, positions, logits.shape[1])
    drawn = (warp(logits, temperature, top_k, top_p, min_p) + noise).argmax(1)
    return torch.where(temperature > 0, drawn, greedy).int()


def restore(problem: Step) -> Prepared:
    """What of the others' times restoring the states is."""

    def nothing(_: int) -> None:
        return None

    return Prepared(problem.rotated(nothing), nothing, "a part of all times but the release's")


def _tree(tree: Any) -> Result:
    return dict(zip(("tokens", "parent", "depth", "visible"), tree, strict=True))


def _targets(targets: Tensor) -> Result:
    return {"targets": targets}


RELEASE = (
    Peer("restore", restore, cells=lambda cell: getattr(cell, "op", "") in STATEFUL),
    Peer("release", release),
)
PEERS: dict[str, tuple[Peer, ...]] = {
    "release": RELEASE,
    "twin": (Peer("twin", twin),),
    "compiled": (Peer("compiled", compiled),),
}
