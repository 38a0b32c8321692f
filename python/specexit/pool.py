"""The engines of a decoder: made for a call, and on a GPU kept for the next one, which then need not capture again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import nn

from specexit.base import BaseModel
from specexit.call import Call
from specexit.capture import recorder, warn_uncaptured
from specexit.drafts.base import Draft
from specexit.engine import Engine, round_up, slot_bucket
from specexit.memory import Memory, held


class Pool:
    """keep   keep the last engine that was given back
    graph  capture steps where the device can
    lock   that the decoder's calls take turns by
    """

    def __init__(self, base: BaseModel, draft: Draft | None, capacity: int | None, graph: bool, lock: RLock) -> None:
        self.base = base
        self.lock = lock
        self.draft = draft
        self.capacity = capacity
        self.keep = base.device.type == "cuda"
        self.stream = torch.cuda.Stream(base.device) if base.device.type == "cuda" else None
        self.record = recorder(base.device) if graph else None
        if self.record is not None and base.uncapturable:
            warn_uncaptured(base.uncapturable)
            self.record = None
        self._kept: tuple[int, Engine] | None = None
        self._taken: list[Engine] = []

    @contextmanager
    def take(self, call: Call, longest: int) -> Iterator[Engine]:
        """An engine for a call whose longest prompt so far has so many tokens; nobody else has it inside the block,
        which leaves its slots empty. After an error it is not used again."""
        with self.lock:
            weights = self._fingerprint()
            engine = self._reuse(call, weights) or self._new(call, longest)
            self._taken.append(engine)
        done = False
        try:
            yield engine
            done = True
        finally:
            with self.lock:
                self._taken.remove(engine)
                if done and self.keep and not call.processed:
                    self.release()
                    self._kept = weights, engine
                else:
                    engine.close()

    def release(self) -> None:
        """Give back the memory of the engine that is kept."""
        with self.lock:
            if self._kept is not None:
                self._kept[1].close()
            self._kept = None

    def memory(self) -> Memory:
        """Of the engines in use and the one that is kept."""
        engines = self._taken + ([self._kept[1]] if self._kept else [])
        parts = {"cache": 0, "drafts_cache": 0, "buffers": 0, "graph": 0}
        for engine in engines:
            for name, size in engine.nbytes().items():
                parts[name] += size
        weights = list(self.base.model.parameters()) + list(self.base.model.buffers())
        drafts = weights + _tensors_of(self.draft)
        base = held(weights)
        slots = (sum(e.form.batch for e in engines), max((e.slots for e in engines), default=0))
        return Memory(base=base, draft=held(drafts) - base, slots=slots, **parts)

    def _reuse(self, call: Call, weights: int) -> Engine | None:
        """The kept engine if it serves the call. Otherwise its memory is given back before another is made."""
        if self._kept is not None:
            found, engine = self._kept
            if found == weights and engine.form == call.form():
                self._kept = None
                return engine
            del engine
            self.release()
        return None

    def _new(self, call: Call, longest: int) -> Engine:
        record = self.record
        if record is not None and call.processed:
            warn_uncaptured("logits processors run on the host, between the base's forward and the rest")
            record = None
        if self.draft is not None:  # another call may have selected another source since
            self.draft.select_source(call.plan.source)
        slots = self.capacity or round_up(longest + call.tree.nodes, slot_bucket(self.base.device))
        rules, choose = call.plan.rules, call.choose()
        return Engine(self.base, self.draft, call.form(), rules, choose, slots, record, self.stream)

    def _fingerprint(self) -> int:
        """Where the weights are: a captured step reads them there."""
        if not self.keep:
            return 0
        tensors = [*self.base.model.parameters(), *self.base.model.buffers(), *_tensors_of(self.draft)]
        return hash(tuple(tensor.data_ptr() for tensor in tensors))


def _tensors_of(draft: Draft | None) -> list[torch.Tensor]:
    return [*draft.parameters(), *draft.buffers()] if isinstance(draft, nn.Module) else []


def batch_bucket(batch: int, device: torch.device) -> int:
    """Slots for a batch: on a GPU some more, so that the next batch finds an engine that fits."""
    if device.type != "cuda":
        return batch
    return next((size for size in (1, 2, 4) if batch <= size), round_up(batch, 8))
