"""The host's side of decoding: fill free slots with prompts, launch steps, hand on what they have published."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from specexit.engine import Engine
from specexit.job import Job
from specexit.publication import unpack
from specexit.ring import Ring

Seats = tuple[Job | None, ...]  # which job each slot holds


class Loop:
    """Decodes jobs, any number of them, through the slots of an engine. `feed`, then `run`, until that has none.

    jobs   taken one by one as slots become free. Where taking one raises, no more are taken, and the error comes when
           those that are in the slots have ended
    ahead  steps that are launched before what the last one has published is read. So the device never waits for the
           host, and what a sequence has decoded past a stopping criterion is dropped
    """

    def __init__(self, engine: Engine, jobs: Iterator[Job], ahead: int) -> None:
        self.engine = engine
        self.jobs = jobs
        self.ahead = ahead
        self.seats: list[Job | None] = [None] * engine.form.batch
        self._waiting: deque[Job] = deque()
        self._ring: Ring[Seats] = Ring()
        self._error: Exception | None = None  # to be raised when all that are in the slots have ended
        self._failure: Exception | None = None  # when those that have ended are handed over

    def feed(self) -> None:
        """Take jobs for the free slots. Whoever makes them may use the model, so not inside `engine.active()`, unless
        they are made already."""
        if self._failure is not None:  # a prompt that is taken would be lost
            return
        try:
            while self._error is None and len(self._waiting) < self.seats.count(None):
                self._waiting.append(next(self.jobs))
        except StopIteration:
            pass
        except Exception as error:
            self._error = error

    def run(self) -> list[Job]:
        """Decode until some jobs have ended: those, or none when there are no more. Inside `engine.active()`."""
        self._fill()
        while True:
            if ended := self._publish():  # with the first token of a prompt, or behind the last step
                return ended
            if self._failure is not None:
                raise self._failure
            if not any(self.seats):
                if self._error is not None:
                    raise self._error
                return []
            self._reserve()
            self.engine.step()
            self._ring.push(self.engine.published, tuple(self.seats))

    def _fill(self) -> None:
        """Seat the jobs that wait, neighbours together; prompts of one token apart, as they take a step at once."""
        first = 0
        while self._waiting and first < len(self.seats):
            taken: list[Job] = []
            while first + len(taken) < len(self.seats) and self.seats[first + len(taken)] is None and self._fits():
                if taken and (len(taken[0].prompt) == 1) != (len(self._waiting[0].prompt) == 1):
                    break
                taken.append(self._waiting.popleft())
            if taken:
                self.seats[first : first + len(taken)] = taken
                if self.engine.seat(first, taken):
                    seats = tuple(job if job in taken else None for job in self.seats)
                    self._ring.push(self.engine.published, seats)
            first += len(taken) or 1

    def _fits(self) -> bool:
        """Whether there is a next job that waits, and room for it. Those that waited behind one that has none are not
        decoded: the error comes when the others have ended."""
        if not self._waiting:
            return False
        job = self._waiting[0]
        if self.engine.reserve(self._needed([job])):
            return True
        most = f"{len(self.seats)} x {self.engine.slots} slots"
        error = torch.OutOfMemoryError(
            f"prompts must fit in the cache, which has no memory to grow beyond {most}, prompts[{job.index}] has "
            f"{job.length} tokens: decode fewer at a time"
        )
        error.__context__ = self._error  # of the prompts' source, perhaps
        self._error = error
        self._waiting.clear()
        return False

    def _needed(self, jobs: Iterable[Job | None], steps: int = 0) -> int:
        """Slots for a tree of these when they have come as far as they can in `steps` steps."""
        tree = self.engine.form.tree
        most = steps * (tree.max_depth + 1)
        return max(min(job.length + most, job.limit) for job in jobs if job is not None) - 1 + tree.nodes

    def _reserve(self) -> None:
        """Room for the tree after the next step of every row; where memory is short, rows end where the slots do."""
        engine = self.engine
        if not engine.reserve(self._needed(self.seats, len(self._ring) + 1)):
            most = engine.slots - engine.form.tree.nodes + 1
            for job in self.seats:
                if job is not None:
                    job.limit = min(job.limit, most)
            engine.state.limits.clamp_(max=most)

    def _publish(self) -> list[Job]:
        """Hand on what steps have published, but for the last `ahead` of them. Returns the jobs that have ended.

        What a criterion or a streamer raises comes after them: they are not lost with it."""
        state = self.engine.state
        ended: list[Job] = []
        while len(self._ring) > self.ahead and self._failure is None:
            packed, seats = self._ring.pop()
            for slot, (job, found) in enumerate(zip(seats, unpack(packed, state.depth, state.signals), strict=True)):
                if job is None or job.ended:
                    continue
                try:
                    with self.engine.aside():
                        job.take(found)
                except Exception as error:
                    self._failure = error
                if job.ended:
                    ended.append(job)
                    self.seats[slot] = None
                    self.engine.park([slot])
        return ended
