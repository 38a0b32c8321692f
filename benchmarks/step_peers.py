"""What a decode step is compared with: the releases' step, and a token of transformers' generate, compiled or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from benchmarks.harness import Peer, Prepared, Result
from benchmarks.step_cells import GOAL, Cell
from benchmarks.step_ours import ours
from benchmarks.step_parts import counted, profiled
from benchmarks.step_problem import Problem, Text
from benchmarks.step_release import Release
from specexit.engine import round_up

COMPILING = 25  # seconds that are kept for compiling a model of 36 layers


def release(problem: Problem) -> Prepared:
    """One step of the releases' pipeline."""
    pipeline = Release(problem)
    more = _counts(problem, pipeline.step)
    return Prepared([pipeline.step], lambda run: [Text(0, run, 1, pipeline.written(run))], graph=False, more=more)


def generate(problem: Problem) -> Prepared:
    """A token of `generate` as it is: a forward, over a cache that grows by copying, the best token of each row, and
    the question whether all have ended."""
    cache = DynamicCache(problem.batches())

    def call() -> Tensor:
        tokens = _token(problem.base, problem.prompts[:, -1:], cache)
        cache.crop(-1)
        return tokens

    return Prepared([call], _texts(problem), graph=False, more=_counts(problem, call))


def static(problem: Problem) -> Prepared:
    """A token of `generate(cache_implementation="static")`: the forward compiled as transformers compiles it, with mode
    "reduce-overhead", in a CUDA graph."""
    model, length = problem.base, problem.cell.length
    # A multiple of 64, as an odd width of the mask would cost SDPA a copy in every layer.
    cache = StaticCache(config=model.config, max_cache_len=round_up(length + 1, 64))
    for layer, (keys, values) in zip(cache.layers, problem.batches(), strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys[:, :, :length] = keys
        layer.values[:, :, :length] = values
        layer.cumulative_length.fill_(length)
    lengths = [layer.cumulative_length for layer in cache.layers]
    before = [tensor.clone() for tensor in lengths]
    forward = model.get_compiled_call(CompileConfig())

    def call() -> Tensor:
        tokens = _token(forward, problem.prompts[:, -1:], cache)
        torch._foreach_copy_(lengths, before)
        return tokens

    more = _counts(problem, call)
    return Prepared([call], _texts(problem), graph=False, more=more, close=torch.compiler.reset)


def _token(forward: Any, root: Tensor, cache: Any) -> Tensor:
    tokens = forward(input_ids=root, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(1)
    bool((tokens < 0).all())  # as generate asks after every token
    return tokens


def _texts(problem: Problem) -> Any:
    def texts(tokens: Tensor) -> list[Text]:
        return [Text(row, [int(problem.prompts[row, -1]), int(tokens[row])]) for row in problem.rows]

    return texts


def _counts(problem: Problem, call: Any) -> Any:
    def counts() -> Result:
        return counted(profiled(call, problem.device))

    return counts


def _grows_one(cell: Cell) -> bool:
    return cell.batch == 1 and cell.tree.max_depth > 0


def _is_goal(cell: Cell) -> bool:
    return cell == GOAL


RELEASE = Peer("release", release, cells=_grows_one, profiled=True)
GENERATE = Peer("generate", generate, profiled=True)
EAGER = Peer("eager", ours(graph=False), profiled=True)  # without the CUDA graph
PEERS: dict[str, tuple[Peer, ...]] = {
    "release": (RELEASE,),
    "generate": (GENERATE,),
    "eager": (EAGER,),
    "static": (Peer("static", static, cells=_is_goal, seconds=COMPILING, profiled=True),),
}
CPU_PEERS = (RELEASE, GENERATE, EAGER)
