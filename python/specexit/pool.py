"""The engines of a decoder: made for a call, and on a GPU kept for the next one, which then need not capture again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from specexit.base import BaseModel
from specexit.call import Call
from specexit.capture import recorder, warn_uncaptured
from specexit.drafts.base import Draft
from specexit.engine import Engine, round_up, slot_bucket
from specexit.memory import Memory, held, weights_of


class Pool:
    """keep   how many of the engines that were given back are kept, the last ones
    graph  capture steps where the device can
    """

    def __init__(self, base: BaseModel, draft: Draft | None, capacity: int | None, graph: bool) -> None:
        self.base = base
        self.draft = draft
        self.capacity = capacity
        self.stream = torch.cuda.Stream(base.device) if base.device.type == "cuda" else None
        # Two, for calls that take turns: with the exit and without it, say.
        self.keep = 0 if self.stream is None else 2
        self.record = recorder(base.device) if graph else None
        if self.record is not None and base.uncapturable:
            warn_uncaptured(base.uncapturable)
            self.record = None
        self.kept: list[Engine] = []
        self._taken: list[Engine] = []

    @contextmanager
    def take(self, call: Call, longest: int) -> Iterator[Engine]:
        """An engine for a call whose longest prompt so far has so many tokens; nobody else has it inside the block,
        which leaves its slots empty. After an error it is not used again."""
        with self.base.lock:
            engine = self._reuse(call) or self._new(call, longest)
            self._taken.append(engine)
        done = False
        try:
            yield engine
            done = True
        finally:
            with self.base.lock:
                self._taken.remove(engine)
                if engine.refused:
                    self.record = None
                if done and not call.processed:
                    self.kept.append(engine)
                else:
                    engine.close()
                self._trim(self.keep)

    def release(self) -> None:
        """Give back the memory of the engines that are kept."""
        with self.base.lock:
            self._trim(0)

    def memory(self) -> Memory:
        """Of the weights, the engines in use and those that are kept."""
        engines = self._taken + self.kept
        parts = {"cache": 0, "drafts_cache": 0, "buffers": 0, "graph": 0}
        for engine in engines:
            for name, size in engine.nbytes().items():
                parts[name] += size
        base = held(weights_of(self.base.model))
        draft = held(weights_of(self.base.model, self.draft)) - base
        slots = sum(engine.form.batch * engine.slots for engine in engines)
        return Memory(base=base, draft=draft, slots=slots, **parts)

    def _trim(self, keep: int) -> None:
        while len(self.kept) > keep:
            self.kept.pop(0).close()

    def _reuse(self, call: Call) -> Engine | None:
        """A kept engine that serves the call."""
        place = self.base.device, self.base.dtype
        for engine in self.kept:
            if engine.form == call.form() and engine.place == place:
                self.kept.remove(engine)
                return engine
        return None

    def _new(self, call: Call, longest: int) -> Engine:
        self._trim(max(self.keep - 1, 0))
        try:
            return self._made(call, longest)
        except torch.OutOfMemoryError:
            if not self.kept:
                raise
        self._trim(0)
        return self._made(call, longest)

    def _made(self, call: Call, longest: int) -> Engine:
        record = self.record
        if record is not None and call.processed:
            warn_uncaptured("logits processors run on the host, between the base's forward and the rest")
            record = None
        if self.draft is not None:  # another call may have selected another source since
            self.draft.select_source(call.plan.source)
        slots = self.capacity or round_up(longest + call.tree.nodes, slot_bucket(self.base.device))
        with torch.cuda.stream(self.stream):
            choose = call.choose()
        return Engine(self.base, self.draft, call.form(), call.plan.rules, choose, slots, record, self.stream)


def batch_bucket(batch: int, device: torch.device) -> int:
    """Slots for a batch: on a GPU some more, so that the next batch finds an engine that fits."""
    if device.type != "cuda":
        return batch
    return next((size for size in (1, 2, 4) if batch <= size), round_up(batch, 8))
