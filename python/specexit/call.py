"""One call of the decoder: from what transformers prepared to jobs, and to the form of the engine that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from specexit.base import BaseModel
from specexit.config import TreeConfig
from specexit.engine import Form
from specexit.generation import row_limits, split_criteria
from specexit.job import Job
from specexit.output import RowStats
from specexit.plan import Exit, ExitPlan, ExitPlanner
from specexit.processors import PathProcessor, check_processors, of_row, split_warpers
from specexit.prompts import pack_prompts
from specexit.sampling import Choose, Sampler, SamplingConfig


@dataclass(frozen=True)
class Prepared:
    """What transformers made of the options for a batch.

    input_ids       [B, P] int64, padded on the left
    attention_mask  [B, P], or None
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig


class Call:
    """What the prompts of one call share; the first of them fix it, with what transformers made of the options.

    exit      one for all prompts, or, where all come at once, one each
    capacity  hard limit of cache slots a row, or None
    slots     sequences that are decoded at a time
    """

    plan: ExitPlan
    sampling: SamplingConfig
    stop_ids: list[int]

    def __init__(
        self, base: BaseModel, planner: ExitPlanner, exit: Exit, tree: TreeConfig, capacity: int | None, slots: int
    ) -> None:
        if torch.is_autocast_enabled(base.device.type):
            raise RuntimeError("autocast must be off: the base and its cache have one dtype; load the model in another")
        self.base = base
        self.planner = planner
        self.exit = exit
        self.tree = tree
        self.capacity = capacity
        self.slots = slots
        self.processed = False  # whether processors run on the host

    def jobs(
        self, prepared: Prepared, seeds: Sequence[int], streamer: BaseStreamer | None = None, prompt: int | None = None
    ) -> list[Job]:
        """The rows of a batch.

        seeds   one a row
        prompt  index of the one prompt that all rows are of; None: each row is a prompt
        """
        base = self.base
        mask, config = prepared.attention_mask, prepared.config
        input_ids = prepared.input_ids.cpu()
        prompts = pack_prompts(input_ids, None if mask is None else mask.cpu(), base.vocab_size)
        stop_ids, longest, criteria = split_criteria(prepared.criteria, config, base.vocab_size)
        sampling, processors = split_warpers(list(prepared.processors), bool(config.do_sample))
        self._fix(not prompt, sampling, stop_ids, bool(processors))
        wanted = [length + longest - input_ids.shape[1] for length in prompts.lengths]
        limits = row_limits(
            prompts.lengths, wanted, positions=base.max_positions, capacity=self.capacity, nodes=self.tree.nodes
        )
        batch = len(wanted)
        if not prompt:
            self.plan = self.planner.plan(self.exit, batch if prompt is None else 1, stop_ids, base.device)
        check_processors(processors, self.slots)
        rows = [prompts.row(index) for index in range(batch)]
        rule = range(batch) if prompt is None else [0] * batch
        return [
            Job(
                index=index if prompt is None else prompt,
                prompt=rows[index],
                prefix=prefix,
                limit=limits[index],
                wanted=wanted[index],
                seed=seeds[index],
                rules=self.plan.rules,
                rule=rule[index],
                thinking=self.plan.is_thinking(rows[index], rule[index]),
                processors=of_row(processors, index),
                criteria=criteria,
                streamer=streamer,
                device=base.device,
            )
            for index, prefix in enumerate(input_ids.tolist())
        ]

    def _fix(self, is_first: bool, sampling: SamplingConfig, stop_ids: list[int], processed: bool) -> None:
        """Raises RuntimeError where transformers made other things of a later prompt."""
        if is_first:
            self.sampling, self.stop_ids, self.processed = sampling, stop_ids, processed
        elif (self.sampling, self.stop_ids, self.processed) != (sampling, stop_ids, processed):
            raise RuntimeError("transformers prepared another way of sampling or stopping for a later prompt")

    def form(self) -> Form:
        """Of an engine for the jobs made so far."""
        sampling = None if self.processed else self.sampling
        return Form(self.slots, self.tree, tuple(self.stop_ids), sampling, self.plan.shared)

    def choose(self) -> Choose:
        sampler = Sampler(self.sampling, self.slots, self.tree.nodes, self.base.device)
        return PathProcessor(sampler, self.slots, set(self.stop_ids)) if self.processed else sampler

    def ahead(self, steps: int) -> int:
        """How many steps may be launched ahead: none where a processor must see what the last one published."""
        return 0 if self.processed else steps

    def stats(self, job: Job) -> RowStats:
        """Of a job that has ended."""
        job.stats.thinking_tokens = self.plan.count_thinking(job.prompt, job.new_tokens, job.rule)
        return job.stats
