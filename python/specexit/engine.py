"""Slots for sequences: the memory that decoding works in, and the step over it, captured where a GPU has it.

Everything has a fixed address: what differs from prompt to prompt (ids, limits, seeds, thresholds) is written into the
tensors of its slot. An engine serves every call that agrees with it in its `Form`; prompts join and leave at any time,
between steps. A slot that holds none decodes as the others do, one position long, and publishes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from specexit.base import BaseModel
from specexit.capture import Recorder, Replayed
from specexit.config import TreeConfig
from specexit.drafts.base import Draft
from specexit.job import Job
from specexit.memory import available, held, out_of_memory, weights_of
from specexit.prefill import first_token, observe_root, prefill
from specexit.prompts import Prompts
from specexit.publication import pack, publication
from specexit.sampling import Choose, SamplingConfig
from specexit.step import Buffers, chain_form, decode_step
from specexit_kernels import DecodeState, ExitRules, Finish
from specexit_kernels.state import RULES_OF_A_ROW


@dataclass(frozen=True)
class Form:
    """What is fixed in an engine's step besides the model: calls that agree in it can have the same engine.

    batch     B: slots for sequences
    stop_ids  end a sequence
    sampling  None: processors are in the way, which run on the host
    exit      `ExitPlan.shared`
    """

    batch: int
    tree: TreeConfig
    stop_ids: tuple[int, ...]
    sampling: SamplingConfig | None
    exit: tuple[object, ...]


class Engine:
    """B slots of `slots` positions each, for sequences of one form.

    draft   reads the signals that are selected now
    rules   of any rows: what all rows share of them holds here too
    choose  the base's token at each node, for B rows
    slots   of the cache, the tree's scratch slots included
    record  captures the step, which otherwise is called each time
    stream  that all work goes to; None: on a GPU one of its own. Engines that follow one another should have the same:
            torch keeps the memory that one gives back for its stream

    Raises torch.OutOfMemoryError, saying what was asked for and what would fit.
    """

    def __init__(
        self,
        base: BaseModel,
        draft: Draft | None,
        form: Form,
        rules: ExitRules,
        choose: Choose,
        slots: int,
        record: Recorder | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.base = base
        self.form = form
        self.choose = choose
        self.bucket = slot_bucket(base.device)
        # A graph cannot be captured on the default stream.
        self._stream = stream or (torch.cuda.Stream(base.device) if base.device.type == "cuda" else None)
        self._aside = torch.cuda.Stream(base.device) if base.device.type == "cuda" else None
        self._step = Replayed(record)
        self._modules = base.model, draft
        self._weights = 0
        self.place = base.device, base.dtype
        free = available(base.device)
        try:
            with torch.inference_mode(), self._on_stream():
                self._allocate(draft, rules, slots)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, form.batch, slots, base.slot_bytes, free) from error

    def _allocate(self, draft: Draft | None, rules: ExitRules, slots: int) -> None:
        base, batch, tree, device = self.base, self.form.batch, self.form.tree, self.base.device
        empty = partial(
            DecodeState.empty,
            depth=tree.max_depth,
            signals=rules.thresholds.shape[1],
            forced=max(rules.force.shape[0], 1),
            tail=rules.tail,
            window=rules.window,
            trace=rules.thresholds.shape[1] > 0,
            device=device,
        )
        self.state = empty(batch)
        self._fresh = empty(1)  # before a prompt
        self._idle = empty(1)  # one position long, so that the draft has its row
        self._idle.lengths.fill_(1)
        self._idle.limits.fill_(1)
        self._idle.finished.fill_(Finish.STOP)
        self.rules = rules.rows(0, 1).repeated(batch)
        self.published = publication(self.state)
        self.buffers = Buffers(
            chain=chain_form(batch, tree.nodes, device) if tree.is_chain else None,
            state=self.state,
            cache=base.new_cache(self.state.lengths, slots),
            stop_ids=torch.tensor(self.form.stop_ids, dtype=torch.int32, device=device),
            last_features=torch.zeros(batch, base.feature_size, dtype=base.dtype, device=device),
            no_signals=torch.zeros(batch, tree.max_depth + 1, 0, dtype=torch.float32, device=device),
        )
        self.draft = None if draft is None else draft.allocate(batch, slots, tree, device, base.dtype)
        self.park(range(batch))

    @property
    def slots(self) -> int:
        return self.buffers.cache.slots

    @property
    def captured(self) -> bool:
        """Whether steps are replayed."""
        return self._step.recording is not None

    @property
    def refused(self) -> bool:
        """Whether the step could not be captured."""
        return self._step.refused

    def nbytes(self) -> dict[str, int]:
        """Bytes of its parts, by their names in `Memory`."""
        cache = self.buffers.cache
        others = (self.state, self._fresh, self._idle, self.rules, self.published, vars(self.choose))
        return {
            "cache": held(cache.keys(), cache.values()),
            "drafts_cache": 0 if self.draft is None else self.draft.nbytes,
            "buffers": held(others, [value for value in vars(self.buffers).values() if value is not cache]),
            "graph": 0 if self._step.recording is None else self._step.recording.nbytes,
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the model is attached, and all work goes to the engine's stream."""
        if torch.is_autocast_enabled(self.base.device.type):
            raise RuntimeError("autocast must be off: the base and its cache have one dtype; load the model in another")
        with torch.inference_mode(), self.base.attached(), self._on_stream():
            if self._step.records:
                weights = hash(tuple(tensor.data_ptr() for tensor in weights_of(*self._modules)))
                if weights != self._weights:  # a captured step reads them where they were
                    self._step.reset()
                self._weights = weights
            yield

    def aside(self) -> AbstractContextManager[object]:
        """For what the host computes about published tokens: it does not wait for the steps that are launched."""
        return nullcontext() if self._aside is None else torch.cuda.stream(self._aside)

    def seat(self, first: int, jobs: Sequence[Job]) -> bool:
        """Read the prompts of `jobs` into the slots from `first` on, which are free. Inside `active`.

        Returns whether that has published a token of each: with a prompt of one token they take a step.
        """
        count, prompts = len(jobs), [job.prompt for job in jobs]
        lengths = [len(prompt) for prompt in prompts]
        buffers, rules = self.buffers.rows(first, count), self.rules.rows(first, count)
        draft = None if self.draft is None else self.draft.rows(first, count)
        state = buffers.state
        copy_rows(self._fresh, state)
        state.prompt_lengths.copy_(self._upload(lengths))
        state.limits.copy_(self._upload([job.limit for job in jobs]))
        state.thinking.copy_(self._upload([int(job.thinking) for job in jobs]))
        if tail := state.tail.shape[1]:  # the tokens before the root, which is the prompt's last
            state.tail.copy_(self._upload([([-1] * tail + prompt[:-1])[-tail:] for prompt in prompts]))
        for row, job in enumerate(jobs):
            for name in RULES_OF_A_ROW:
                getattr(rules, name)[row].copy_(getattr(job.rules, name)[job.rule])
        self.choose.seat(first, jobs)

        width = max(lengths)
        tokens = self._upload([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        prefill(self.base, draft, Prompts(tokens, lengths), buffers)
        alone = 1 in lengths
        if alone:
            first_token(self.base, self.choose.rows(first, count), rules, buffers)
            pack(self.state, self.published)
        if draft is not None:
            observe_root(draft, buffers)
        return alone

    def step(self) -> None:
        """One step of every slot; `published` has what it publishes. Inside `active`."""
        self._step(self._run)

    def _run(self) -> None:
        decode_step(self.base, self.draft, self.form.tree, self.choose, self.rules, self.buffers)
        pack(self.state, self.published)

    def park(self, slots: Iterable[int]) -> None:
        """Empty the slots: their rows have ended, or have yet to begin."""
        for slot in slots:
            copy_rows(self._idle, self.state.rows(slot, 1))

    def reserve(self, slots: int) -> bool:
        """Make room for `slots` positions a row: in steps of half the present size, so that copying and capturing stay
        a small part. Inside `active`. Returns whether there is room now; a GPU's memory may be too small."""
        before = self.slots
        if slots <= before:
            return True
        free = available(self.base.device)
        for wanted in (round_up(max(slots, before + before // 2), self.bucket), round_up(slots, self.bucket)):
            # The old memory of a layer is given back when the new one is filled.
            if (wanted - before) * self.form.batch * self.base.slot_bytes > free:
                continue
            self._step.reset()
            with suppress(torch.OutOfMemoryError):  # in pieces, perhaps
                if self.draft is not None:
                    self.draft.grow(wanted - before)
                self.buffers.cache.grow(wanted)
                return True
        return False

    def close(self) -> None:
        """Give back the captured step; the memory goes with the engine."""
        self._step.reset()

    def _upload(self, values: Sequence[object]) -> Tensor:
        """Integers on the device, without waiting for it."""
        host = torch.tensor(values, dtype=torch.int32, pin_memory=self._stream is not None)
        return host.to(self.base.device, non_blocking=True)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """After what the caller has queued on its own, and before what it queues then."""
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self.base.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)


def copy_rows(source: DecodeState, target: DecodeState) -> None:
    """Write one row, of the same sizes, to all rows of `target`."""
    for value, tensor in zip(source.tensors(), target.tensors(), strict=True):
        tensor.copy_(value)


def round_up(slots: int, bucket: int) -> int:
    return -(-slots // bucket) * bucket


def slot_bucket(device: torch.device) -> int:
    """Caches have multiples of so many slots. A CPU computes with all of them, so there it is small."""
    return 1024 if device.type == "cuda" else 64
