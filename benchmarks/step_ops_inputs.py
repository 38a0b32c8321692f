"""The inputs of bench_step_ops.py and the check of what is made of them.

A step's inputs are made backwards, from the path that is to be accepted and the row that is to be cut; what the ops
must give is then known without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.step_ops_cells import AFTER, CACHED, DISTINCT, SIGNALS, STATEFUL, WINDOW, Cell
from benchmarks.step_ops_random import (
    BOUNDARIES,
    Ids,
    agree,
    candidates,
    distinct_rows,
    exit_rules,
    raw_signals,
    smooth_so_far,
)
from benchmarks.step_ops_reference import Result, best_nodes, compare, moved_rows
from specexit_kernels import DecodeState, ExitRules, Tree, accept, build_tree, decide_exit

CUT = 32  # one row in so many is cut, the last of them: at its root
STOP = -1, -2  # the stop ids, from the vocabulary's end


@dataclass
class Build:
    """The arguments of `build_tree` on the device, and the same numbers on the host for the reference."""

    cell: Cell
    arguments: tuple[Any, ...]
    host: tuple[Tensor, ...]  # tokens, scores, parents

    @cached_property
    def expected(self) -> Result:
        """By sorting each row in Python."""
        return best_nodes(self.cell.form.nodes, torch.zeros(self.cell.batch, dtype=torch.int32), *self.host)

    def check(self, result: Result) -> float:
        """0. Raises Unavailable where a tree is another."""
        return compare(result, self.expected, tuple(self.expected))


@dataclass
class Sample:
    """The arguments of `sample_targets`; the logits in as many copies as leave the caches cold."""

    cell: Cell
    copies: list[Tensor]
    arguments: tuple[Any, ...]  # after the logits: positions, seeds, then temperature, top_k, top_p, min_p or None
    targets: Tensor

    @property
    def distinct(self) -> int:
        """So many rows come first; the others repeat them."""
        return min(self.cell.rows, DISTINCT)

    def check(self, result: Result) -> float:
        """0. Raises Unavailable where a token is another."""
        return compare(result, {"targets": self.targets}, ("targets",))


@dataclass
class Step:
    """What the ops after the forward read and change, in copies that are used in turn.

    Each copy has its own state and its own slots of the cache; the rest is shared.

    states, pristine   the states of the copies, and what they are restored from
    live               the tensors behind the states, in the order of `pristine`
    paths              path and n_accepted, for `compact_kv` alone
    lengths            [B] int32 of each copy after `accept`, for `compact_kv` alone
    accepted           the paths as lists
    expected           results by name, of the first copy
    """

    cell: Cell
    tree: Tree
    targets: Tensor
    stop_ids: Tensor
    signals: Tensor
    rules: ExitRules
    states: list[DecodeState]
    live: list[list[Tensor]]
    pristine: list[list[Tensor]]
    keys: list[Tensor]
    values: list[Tensor]
    paths: tuple[Tensor, Tensor]
    lengths: list[Tensor]
    accepted: Ids
    expected: Result

    @property
    def required(self) -> tuple[str, ...]:
        """What every implementation must give; ours and its twin give the state too."""
        of_accept, of_exit = ("path", "n_accepted", "next_token"), ("cut", "n_output", "output")
        return {"accept": of_accept, "decide_exit": of_exit, AFTER: of_accept + of_exit}.get(self.cell.op, ())

    def restore(self) -> None:
        """Make the states of all copies what they were."""
        for live, pristine in zip(self.live, self.pristine, strict=True):  # one launch for integers, one for floats
            torch._foreach_copy_(live, pristine)

    def fill(self) -> None:
        """Make the cache what it was."""
        for index, cache in enumerate(self.keys + self.values):
            cache.copy_(_contents(cache, index))

    def rotated(self, call: Callable[[int], Any]) -> list[Callable[[], Any]]:
        """A call for each copy, by its number; the first restores the states of all before it."""
        self.fill()
        calls: list[Callable[[], Any]] = [partial(call, copy) for copy in range(len(self.lengths))]

        def first() -> Any:
            self.restore()
            return call(0)

        return [first, *calls[1:]] if self.cell.op in STATEFUL else calls

    def check(self, result: Result | None) -> float:
        """The largest error of a float over what is allowed; the rest is equal. Raises Unavailable where it is not, or
        where another slot of the cache has changed. `None` is the result of restoring alone."""
        if result is None:
            for live, pristine in zip(self.live, self.pristine, strict=True):
                if any(
                    not torch.equal(a.view(torch.int32), b.view(torch.int32))
                    for a, b in zip(live, pristine, strict=True)
                ):
                    raise harness.Unavailable("wrong result: the states are not restored")
            return 0.0
        error = compare(result, self.expected, self.required)
        if self.cell.op in CACHED:
            rows, sources, targets = moved_rows(self.accepted, self.keys[0].device)
            for index, cache in enumerate(self.keys + self.values):
                expected = _contents(cache, index)
                expected[rows, :, targets] = expected[rows, :, sources]
                if not torch.equal(cache, expected):
                    raise harness.Unavailable(f"wrong result: the cache, its tensor {index}")
        return error


def named(state: DecodeState) -> Result:
    """A state's fields as results."""
    return {f"state.{name}": value.clone() for name, value in vars(state).items()}


def _contents(cache: Tensor, index: int) -> Tensor:
    """Random keys or values: always the same for a tensor of the cache."""
    generator = torch.Generator(cache.device).manual_seed(index)
    return torch.empty_like(cache).normal_(generator=generator)


def make(cell: Cell, device: torch.device, dtype: torch.dtype, copies: int) -> Build | Sample | Step:
    """Random inputs of a cell."""
    if cell.op == "build_tree":
        return _build(cell, device)
    if cell.op == "sample_targets":
        return _sample(cell, device, dtype, copies)
    return _step(cell, device, dtype, copies)


def _build(cell: Cell, device: torch.device) -> Build:
    host = candidates(cell.form, cell.batch, cell.base.vocabulary)
    none = torch.zeros(cell.batch, dtype=torch.int32, device=device)
    on_device = (x.to(device) for x in host)
    return Build(cell, (none, *on_device, cell.form.nodes, none.unsqueeze(1), none), host)


def _sample(cell: Cell, device: torch.device, dtype: torch.dtype, copies: int) -> Sample:
    assert cell.sampling is not None
    count = min(cell.rows, DISTINCT)
    rows, positions, seeds, targets = distinct_rows(count, cell.base.vocabulary, dtype, cell.sampling)
    index = torch.arange(cell.rows) % count
    logits = rows.to(device)[index.to(device)]
    sampling = cell.sampling

    def parameter(value: float | None, kind: torch.dtype) -> Tensor | None:
        return None if value is None else torch.full((cell.rows,), value, dtype=kind, device=device)

    arguments = (
        positions[index].to(device),
        seeds[index].to(device),
        parameter(sampling.temperature, torch.float32),
        parameter(sampling.top_k, torch.int32),
        parameter(sampling.top_p, torch.float32),
        parameter(sampling.min_p, torch.float32),
    )
    clones = [logits.clone() for _ in range(copies - 1)]
    return Sample(cell, [logits, *clones], arguments, targets[index])


def _step(cell: Cell, device: torch.device, dtype: torch.dtype, copies: int) -> Step:
    host = candidates(cell.form, cell.batch, cell.base.vocabulary)
    cut = torch.arange(cell.batch) % CUT == CUT - 1
    vocabulary, depth = cell.base.vocabulary, cell.form.depth
    root = torch.where(cut, BOUNDARIES, 1).int()  # a boundary where the row is to be cut
    none = torch.zeros(cell.batch, dtype=torch.int32)
    tree = build_tree(root, *host, cell.form.nodes, none.unsqueeze(1), none, implementation="torch")
    targets, accepted = agree(tree, cell)

    rules = exit_rules(cell.base, cell.batch, torch.device("cpu"))
    stop_ids = torch.tensor([vocabulary + i for i in STOP], dtype=torch.int32)
    signals = raw_signals(cut, depth)
    state = DecodeState.empty(cell.batch, depth=depth, signals=SIGNALS)
    for name, value in (("limits", 2**20), ("thinking", 1), ("thinking_tokens", 500), ("seen", 40)):
        getattr(state, name).fill_(value)
    state.root.copy_(root)
    state.smoothed.copy_(smooth_so_far(cut))

    begin, state = state, _cloned(state)
    path, n_accepted, next_token = accept(tree, targets, stop_ids, state, implementation="torch")
    n = [len(nodes) for nodes in accepted]
    if path.tolist() != [nodes + [-1] * (depth + 1 - len(nodes)) for nodes in accepted] or n_accepted.tolist() != n:
        raise AssertionError("the path is not the one that the targets were made for")
    expected: Result = {}
    if cell.op in ("accept", AFTER):
        expected |= {"path": path, "n_accepted": n_accepted, "next_token": next_token}
    if cell.op == "decide_exit":
        begin = _cloned(state)
    lengths = state.lengths.clone()
    if cell.op in ("decide_exit", AFTER):
        found = decide_exit(signals, rules, state, implementation="torch")
        if found.tolist() != torch.where(cut, 0, -1).tolist():
            raise AssertionError("the rows that are cut are not those that were to be")
        expected |= {"cut": found, "n_output": state.n_output, "output": state.output}
    if cell.op in STATEFUL:
        expected |= named(state)

    states, live = _copied(begin, copies, device)
    behind = torch.cat([-signals[:, :1], signals], 1)  # as the step has them: behind the row that the draft reads again
    shape = (cell.batch, cell.base.kv_heads, WINDOW * copies, cell.base.head_dim)
    tensors = 2 * cell.base.layers if cell.op in CACHED else 0
    caches = [torch.empty(shape, dtype=dtype, device=device) for _ in range(tensors)]
    return Step(
        cell,
        tree=Tree(*(x.to(device) for x in tree)),
        targets=targets.to(device),
        stop_ids=stop_ids.to(device),
        signals=behind.to(device)[:, 1:],
        rules=exit_rules(cell.base, cell.batch, device),
        states=states,
        live=live,
        pristine=[[x.clone() for x in group] for group in live],
        keys=caches[::2],
        values=caches[1::2],
        paths=(path.to(device), n_accepted.to(device)),
        lengths=[(lengths + WINDOW * copy).to(device) for copy in range(copies)],
        accepted=accepted,
        expected=expected,
    )


def _cloned(state: DecodeState) -> DecodeState:
    return DecodeState(*(x.clone() for x in state.tensors()))


def _copied(state: DecodeState, copies: int, device: torch.device) -> tuple[list[DecodeState], list[list[Tensor]]]:
    """The state in so many copies, whose windows of slots follow each other, and the tensors behind them: integers,
    floats. Fields do not share storage, which a compiler would have to prove harmless, and are aligned as usual."""
    fields: list[list[Tensor]] = []
    groups: dict[torch.dtype, list[Tensor]] = {}
    for name, value in vars(state).items():
        step = -(-max(value.numel(), 1) // 64) * 64  # 256 bytes
        storage = torch.zeros(copies, step, dtype=value.dtype, device=device)
        groups.setdefault(value.dtype, []).append(storage)
        fields.append([storage[copy, : value.numel()].view(value.shape) for copy in range(copies)])
        for copy, field in enumerate(fields[-1]):
            field.copy_(value + WINDOW * copy if name == "lengths" else value)
    return [DecodeState(*copy) for copy in zip(*fields, strict=True)], list(groups.values())
