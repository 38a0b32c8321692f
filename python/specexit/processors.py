"""Logits processors of transformers, with their exact meaning under speculation.

The warpers that the sampler knows (temperature, top-k, top-p, min-p, in transformers' order at the end of the list)
become its parameters. Any other processor must see the very prefix that plain decoding would show it, so it runs on
the host, along the accepted path only: at most D + 1 calls a row and step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from specexit.job import Job
from specexit.sampling import Sampler, SamplingConfig
from specexit_kernels import DecodeState, Tree, bits

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)

# They know a row by its place in the batch, or keep something of each between the calls.
_OF_A_BATCH = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


def check_processors(processors: Iterable[LogitsProcessor], *, several: bool) -> None:
    """Refuse a processor of whole batches where it would get several prompts, one at a time. Raises ValueError."""
    for processor in processors:
        if several and isinstance(processor, _OF_A_BATCH):
            raise ValueError(
                f"logits_processor must not hold a {type(processor).__name__} for several prompts: "
                "it works on whole batches, and rows are processed one at a time"
            )


def of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors as they are for one row of the batch: the repetition penalty knows the padding of each."""
    own = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            ignored = getattr(processor, "prompt_ignore_length", None)
            if isinstance(ignored, Tensor):
                processor = copy.copy(processor)
                processor.prompt_ignore_length = ignored[row : row + 1]
        own.append(processor)
    return own


def split_warpers(processors: list[LogitsProcessor], do_sample: bool) -> tuple[SamplingConfig, LogitsProcessorList]:
    """The sampler's parameters, and the processors that stay.

    Only a tail of the list in the sampler's own order can become parameters: what runs after a warper must see its
    result. A warper that keeps a minimum of tokens or marks the others by another value than -inf stays as well.
    """
    if not do_sample:
        return SamplingConfig(), LogitsProcessorList(processors)
    rest, values = list(processors), {"temperature": 1.0}
    order = len(_WARPERS)
    while rest and type(rest[-1]) in _WARPERS[:order]:
        warper = rest[-1]
        order = _WARPERS.index(type(warper))
        if getattr(warper, "min_tokens_to_keep", 1) > 1 or getattr(warper, "filter_value", -float("inf")) > -1e30:
            break
        name = ("temperature", "top_k", "top_p", "min_p")[order]
        values[name] = getattr(warper, name)
        rest.pop()
    return SamplingConfig(**values), LogitsProcessorList(rest)  # type: ignore[arg-type]


class PathProcessor:
    """Chooses targets along the accepted path with processors in the way; the counterpart of `Sampler`.

    Reads the device, so runs with it are not captured, and no step begins before the last one is published. Nodes off
    the path get -1, which matches no token.
    """

    def __init__(self, sampler: Sampler, batch: int, stop_ids: set[int]) -> None:
        self.sampler = sampler
        self.stop_ids = stop_ids
        self.jobs: list[Job | None] = [None] * batch

    def seat(self, first: int, jobs: Sequence[Job]) -> None:
        self.sampler.seat(first, jobs)
        self.jobs[first : first + len(jobs)] = jobs

    def rows(self, first: int, count: int) -> PathProcessor:
        part = PathProcessor(self.sampler.rows(first, count), count, self.stop_ids)
        part.jobs = self.jobs[first : first + count]
        return part

    def __call__(self, logits: Tensor, tree: Tree, state: DecodeState) -> Tensor:
        targets = torch.full_like(tree.tokens, -1)
        tokens, parents = tree.tokens.tolist(), tree.parent.tolist()
        alive = bits.unpack(tree.visible, tree.tokens.shape[1]).diagonal(dim1=1, dim2=2).tolist()
        lengths, limits = state.lengths.tolist(), state.limits.tolist()
        for row, finished in enumerate(state.finished.tolist()):
            job = self.jobs[row]
            if finished or job is None:
                continue
            forced = state.forced[row, : int(state.n_forced[row])].tolist()
            ids, node, position = list(job.prefix), 0, lengths[row] + 1
            for depth in range(1, state.run.shape[1]):  # a step takes D + 1 tokens, a chain of forced ids may be longer
                token = forced[depth] if depth < len(forced) else self._token(logits[row, node], ids, row, position)
                targets[row, node] = token
                children = (
                    child
                    for child in range(1, len(tokens[row]))
                    if alive[row][child] and parents[row][child] == node and tokens[row][child] == token
                )
                node = next(children, -1)
                position += 1
                if node < 0 or token in self.stop_ids or position >= limits[row]:
                    break
                ids.append(token)
        return targets

    def _token(self, logits: Tensor, ids: list[int], row: int, position: int) -> int:
        prefix = torch.tensor([ids], dtype=torch.int64, device=logits.device)
        job = self.jobs[row]
        assert job is not None
        scores = job.processors(prefix, logits[None].to(torch.float32, copy=True))
        return int(self.sampler.draw(scores, row, position))
