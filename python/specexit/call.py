"""One call of the decoder: from what transformers prepared to jobs, and to the form of the engine that they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from specexit.base import BaseModel
from specexit.config import TreeConfig
from specexit.engine import Form
from specexit.generation import Prepared, prepare, row_limits, split_criteria
from specexit.job import Job
from specexit.output import RowStats
from specexit.plan import Exit, ExitPlan, ExitPlanner
from specexit.processors import PathProcessor, check_processors, of_row, split_warpers
from specexit.prompts import pack_prompts, prompt_ids
from specexit.sampling import Choose, Sampler, SamplingConfig


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
        self.base = base
        self.planner = planner
        self.exit = exit
        self.tree = tree
        self.capacity = capacity
        self.slots = slots
        self.processed = False  # whether processors run on the host

    def jobs_of(
        self, prompts: Iterable[Sequence[int] | Tensor], seeds: Iterator[int], options: dict[str, Any]
    ) -> Iterator[Job]:
        """The prompts of `generate_many`, each prepared when it is its turn."""
        base, taken = self.base, 0
        for index, prompt in enumerate(prompts):
            ids = prompt_ids(prompt, f"prompts[{index}]", base.vocab_size).to(base.device)
            prepared = prepare(base.model, ids, torch.ones_like(ids), options)
            rows = list(islice(seeds, len(prepared.input_ids)))
            if len(rows) < len(prepared.input_ids):
                raise ValueError(f"seed must be one int or one a prompt, was {taken + len(rows)} of them for more")
            taken += len(rows)
            yield from self.jobs(prepared, rows, index)

    def jobs(
        self, prepared: Prepared, seeds: Sequence[int], index: int | None = None, streamer: BaseStreamer | None = None
    ) -> list[Job]:
        """The rows of a batch.

        seeds  one a row
        index  of the one prompt that all rows are of; None: each row is a prompt
        """
        base, config, mask = self.base, prepared.config, prepared.attention_mask
        input_ids = prepared.input_ids.cpu()
        prompts = pack_prompts(input_ids, None if mask is None else mask.cpu(), base.vocab_size)
        batch = len(prompts.lengths)
        stop_ids, longest, criteria = split_criteria(prepared.criteria, config, base.vocab_size)
        sampling, processors = split_warpers(list(prepared.processors), bool(config.do_sample))
        check_processors(processors, several=batch > 1)
        if index is None or index == 0:
            self.sampling, self.stop_ids, self.processed = sampling, stop_ids, bool(processors)
            self.plan = self.planner.plan(self.exit, batch if index is None else 1, stop_ids, base.device)
        elif (self.sampling, self.stop_ids, self.processed) != (sampling, stop_ids, bool(processors)):
            raise RuntimeError("transformers prepared another way of sampling or stopping for a later prompt")
        wanted = [length + longest - input_ids.shape[1] for length in prompts.lengths]
        limits = row_limits(
            prompts.lengths,
            wanted,
            name="input_ids" if index is None else f"prompts[{index}]",
            positions=base.max_positions,
            capacity=self.capacity,
            nodes=self.tree.nodes,
        )
        jobs = []
        for row, prefix in enumerate(input_ids.tolist()):
            prompt, rule = prompts.row(row), row if index is None else 0
            jobs.append(
                Job(
                    index=row if index is None else index,
                    prompt=prompt,
                    prefix=prefix,
                    limit=limits[row],
                    wanted=wanted[row],
                    seed=seeds[row],
                    rules=self.plan.rules,
                    rule=rule,
                    thinking=self.plan.is_thinking(prompt, rule),
                    processors=of_row(processors, row),
                    criteria=criteria,
                    streamer=streamer,
                    device=base.device,
                )
            )
        return jobs

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
