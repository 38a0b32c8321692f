"""What CUDA kernels must make of the cases in `step_cases.py`: what the twins make of them, on a CPU.

Integers are equal. Only where a rounding decides may they differ, which is decided here, not by the results: a sampled
token may be any that float64 with the tolerance of `tolerances.py` leaves possible, and a row's exit is compared if its
signals pass and fail the same thresholds when these are moved by that tolerance either way. Results lie in memory that
held what no result is; all memory of the arguments is compared, between the rows and around them too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from op_samples import tensors
from step_cases import Steps
from tolerances import TOLERANCE
from torch import Tensor

import specexit_kernels
from specexit_kernels import DecodeState, ExitRules, Tree, accept, bits, decide_exit
from specexit_kernels.philox import gumbel_noise
from specexit_kernels.signals import activate_signals

RELATIVE, ABSOLUTE = TOLERANCE[torch.float32]
CHANGED = ("state", "keys", "values")  # arguments that an op writes to


@dataclasses.dataclass
class Count:
    """How many rows were compared, and of how many a rounding could have decided otherwise."""

    compared: int = 0
    open: int = 0

    def add(self, clear: Tensor) -> None:
        self.compared += int(clear.sum())
        self.open += int(clear.logical_not().sum())


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch allocates holds NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def copied(value: Any, device: str, memory: dict[int, Tensor] | None = None) -> Any:
    """A copy on a device, in memory of the same layout: strides, what lies between rows, and what tensors share."""
    memory = {} if memory is None else memory
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = _bytes(value).to(device, copy=True)
        there = memory[storage.data_ptr()].untyped_storage()
        made = torch.empty(0, dtype=value.dtype, device=device)
        return made.set_(there, value.storage_offset(), value.shape, value.stride())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: copied(x, device, memory) for name, x in vars(value).items()})
    if isinstance(value, dict):
        return {name: copied(x, device, memory) for name, x in value.items()}
    if isinstance(value, Tree):
        return Tree(*(copied(x, device, memory) for x in value))
    return [copied(x, device, memory) for x in value] if isinstance(value, list) else value


def _bytes(tensor: Tensor) -> Tensor:
    """All memory that the tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def assert_same_memory(actual: Any, expected: Any, name: str) -> None:
    """All memory behind the tensors is the same, bit for bit; only a NaN may be another NaN."""
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        had, has = _bytes(e).cpu(), _bytes(a).cpu()
        if not torch.equal(had, has) and e.is_floating_point():
            had, has = had.view(e.dtype), has.view(e.dtype)
            same = (had.view(torch.uint8) == has.view(torch.uint8)).view(-1, e.element_size()).all(1)
            assert (same | (had.isnan() & has.isnan())).all(), f"{name} differs: {a.cpu()}, not {e.cpu()}"
            continue
        assert torch.equal(had, has), f"{name} differs: {a.cpu()}, not {e.cpu()}"


Operator = Callable[..., Any]


def twin_of(name: str) -> Operator:
    return functools.partial(getattr(specexit_kernels, name), implementation="torch")


def cuda_of(name: str) -> Operator:
    return functools.partial(getattr(specexit_kernels, name), implementation="cuda")


def kernel_of(name: str) -> Operator:
    """The op's CUDA kernel, with poisoned results."""

    def run(**arguments: Any) -> Any:
        with poisoned():
            return cuda_of(name)(**arguments)

    return run


def check(name: str, case: Any, device: str, count: Count | None = None, operator: Operator | None = None) -> None:
    """`operator`, the op's CUDA kernel, makes of this case on `device` what the twin makes of it on the CPU."""
    operator, count = operator or kernel_of(name), Count() if count is None else count
    if isinstance(case, Steps):
        check_exit(case, device, count, operator)
        return
    there = copied(case, device)
    compare(name, case, there, operator(**there), count)


def compare(name: str, case: dict[str, Any], there: dict[str, Any], actual: Any, count: Count) -> None:
    """The result `actual` of arguments that were copies of `case`, and are `there` now."""
    own = {x.untyped_storage().data_ptr() for x in tensors([actual]) if x.numel()}
    assert own.isdisjoint(x.untyped_storage().data_ptr() for x in tensors(there)), "a result lies in an argument"
    if name == "decide_exit":
        assert_same_memory(there["signals"], case["signals"], "signals")
        assert_same_memory(there["rules"], case["rules"], "rules")
        state = copied(there["state"], "cpu")
        compare_exit(actual.cpu(), state, case["signals"], case["rules"], case["state"], count)
        return
    here = copied(case, "cpu")
    expected = twin_of(name)(**here)
    if name == "sample_targets":
        possible = possible_targets(case)
        count.add(possible.sum(1) == 1)
        assert actual.dtype == torch.int32
        for who, token in (("the kernel", actual.cpu()), ("the twin", expected)):
            in_range = (token >= 0) & (token < possible.shape[1])
            assert in_range.all(), f"{who}: {token}"
            right = possible.gather(1, token.long().unsqueeze(1)).squeeze(1)
            allowed = [row.nonzero().flatten().tolist() for row in possible[~right]]
            assert right.all(), f"{who} drew {token[~right]}, not among {allowed}"
    else:
        for index, (a, e) in enumerate(zip(tensors([actual]), tensors([expected]), strict=True)):
            assert (a.dtype, a.shape, a.is_contiguous()) == (e.dtype, e.shape, True)
            assert torch.equal(a.cpu(), e), f"result {index} is {a.cpu()}, not {e}"
        count.compared += len(tensors(expected)[0]) if name != "compact_kv" else len(case["lengths"])
    for argument in case:
        changed = argument in CHANGED
        assert_same_memory(there[argument], (here if changed else case)[argument], argument)


# Sampling


def possible_targets(args: dict[str, Any]) -> Tensor:
    """Which tokens each row can be, [N, V] bool, by the definition in float64: with sums, exponentials and noise each
    right to the tolerance. Logits are divided in fp32, and noise added in fp32, exactly."""
    logits, temperature = args["logits"], args.get("temperature")
    count, vocab = logits.shape
    greedy = torch.nn.functional.one_hot(logits.argmax(1), vocab).bool()
    if temperature is None or count == 0:
        return greedy
    drawn = temperature > 0
    z = (logits.float() / torch.where(drawn, temperature, 1.0).unsqueeze(1)).nan_to_num(-math.inf, None, -math.inf)
    certain, possible = kept_tokens(z, *(args.get(name) for name in ("top_k", "top_p", "min_p")))

    noise = gumbel_noise(args["seeds"], args["positions"], vocab)
    error = RELATIVE * noise.abs() + ABSOLUTE
    low, high = z + (noise - error), z + (noise + error)
    worst = low.masked_fill(~certain, -math.inf)
    best, first = worst.max(1, keepdim=True).values, worst.argmax(1, keepdim=True)  # the first of equals
    token = torch.arange(vocab)
    wins = possible & ((high > best) | ((high == best) & (token <= first)))
    nothing = (z == -math.inf).all(1, keepdim=True)
    wins = torch.where(nothing, token == 0, wins & (z > -math.inf))
    return torch.where(drawn.unsqueeze(1), wins, greedy)


def kept_tokens(z: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the warpers keep for certain, and what they may keep, of scaled logits [N, V] fp32 without NaN."""
    vocab = z.shape[1]
    z, order = z.sort(dim=1, descending=True, stable=True)
    best = z[:, :1]
    kept = torch.ones_like(z, dtype=torch.bool)
    if top_k is not None:
        limited = (top_k > 0) & (top_k < vocab)
        last = z.gather(1, torch.where(limited, top_k - 1, vocab - 1).long().unsqueeze(1))
        kept &= z >= last
    weight = torch.where(z == best, 1.0, (z.double() - best.double()).exp()) * kept
    certain, possible = kept.clone(), kept.clone()
    if top_p is not None:
        before = weight.cumsum(1) - weight
        total, on = weight.sum(1, keepdim=True), (top_p < 1).unsqueeze(1)
        limit = top_p.double().unsqueeze(1) * total
        # Where all weights are 1 or nothing, and the limit has few bits, no sum or product is rounded.
        exact = ((weight == 1) | (weight < 1e-60)).all(1, keepdim=True) & (limit * 64 == (limit * 64).round())
        error = RELATIVE * total.masked_fill(exact, 0)
        first = torch.arange(vocab) == 0
        certain &= ~on | first | (before < limit - error)
        possible &= ~on | first | (before < limit + error)
    if min_p is not None:
        least, on = min_p.double().clamp(max=1).unsqueeze(1), (min_p > 0).unsqueeze(1)
        certain &= ~on | (z == best) | (weight > least * (1 + RELATIVE) + 1e-37)
        possible &= ~on | (z == best) | (weight > least * (1 - RELATIVE) - 1e-37)
    back = order.argsort(1)
    return certain.gather(1, back), possible.gather(1, back)


# Exits


def check_exit(case: Steps, device: str, count: Count, operator: Operator) -> None:
    """Step by step: the state that the kernel leaves is the next step's, for the twin too."""
    state, rules = copied(case.state, device), copied(case.rules, device)
    for said in zip(case.tokens, case.agreed, case.sampled, case.signals, strict=True):
        begun = copied(state, "cpu")
        accept(*chains(begun, *said[:3]), case.stop_ids, begun, implementation="torch")
        step = {"signals": said[3], "rules": case.rules, "state": begun}
        there = {"signals": copied(said[3], device), "rules": rules, "state": copied(begun, device)}
        compare("decide_exit", step, there, operator(**there), count)
        state = there["state"]


def chains(state: DecodeState, tokens: Tensor, agreed: Tensor, sampled: Tensor) -> tuple[Tree, Tensor]:
    """A chain for each row, of its forced ids where some are due, and the base's choices after its nodes."""
    batch, rows = tokens.shape
    index = torch.arange(rows, dtype=torch.int32).expand(batch, -1)
    tokens = tokens.clone()
    tokens[:, 0] = state.root
    width = min(rows, state.forced.shape[1])
    due = index[:, :width] < state.n_forced.unsqueeze(1)
    tokens[:, :width] = torch.where(due, state.forced[:, :width], tokens[:, :width])
    following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    targets = torch.where(index < agreed.unsqueeze(1), following, sampled.unsqueeze(1))
    return Tree(tokens, (index - 1).clamp(min=0), index.contiguous(), bits.chain(batch, rows)), targets


def compare_exit(
    cut: Tensor, state: DecodeState, signals: Tensor, rules: ExitRules, begun: DecodeState, count: Count
) -> None:
    """A cut and the state after it against the twin's, after the same `begun`."""
    assert (cut.dtype, cut.shape) == (torch.int32, (begun.batch,))
    scale = magnitudes(signals, begun)
    error = RELATIVE * torch.maximum(scale, rules.thresholds.abs().nan_to_num(0, 0, 0)) + ABSOLUTE
    if rules.per_step:
        error = torch.zeros_like(error)  # the state's own values decide, which both have
    sign = torch.tensor([1.0, 1.0, -1.0])[: error.shape[1]]
    expected, easy, hard = (
        twin_exit(signals, dataclasses.replace(rules, thresholds=rules.thresholds + move * sign * error), begun)
        for move in (0, -1, 1)
    )
    clear = torch.ones(begun.batch, dtype=torch.bool)
    for a, b in zip(easy, hard, strict=True):
        if not a.is_floating_point():
            clear &= (a == b).flatten(1).all(1) if a.dim() > 1 else a == b
    count.add(clear)
    rows = begun.run.shape[1]
    at, earliest, latest = (torch.where(x < 0, rows, x) for x in (cut, easy[0], hard[0]))
    assert ((earliest <= at) & (at <= latest)).all(), f"cut is {cut}, not between {easy[0]} and {hard[0]}"
    names = ("cut", *DecodeState.__dataclass_fields__)
    for name, a, e in zip(names, [cut, *state.tensors()], expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        a, e = a[clear], e[clear]
        if e.is_floating_point() and e.numel():
            tolerance = RELATIVE * scale[clear] + ABSOLUTE
            tolerance = tolerance.unsqueeze(2) if name == "history" else tolerance
            tolerance = tolerance[:, None, None] if name == "trace" else tolerance
            assert torch.equal(a.isnan(), e.isnan()), f"state.{name} is {a}, not {e}"
            near = (a - e).abs().nan_to_num(0) <= tolerance
            assert near.all(), f"state.{name} is {a}, not {e}"
        else:
            assert torch.equal(a, e), f"{name} is {a}, not {e}"


def magnitudes(signals: Tensor, begun: DecodeState) -> Tensor:
    """The largest number in the smoothing of each row and signal, [B, S]: what errors are relative to."""
    scale = begun.smoothed.abs()
    if begun.history.shape[2]:
        scale = torch.maximum(scale, begun.history.abs().amax(2))
    if signals.shape[2]:
        scale = torch.maximum(scale, activate_signals(signals).nan_to_num(0, 0, 0).amax(1))
    return scale


def twin_exit(signals: Tensor, rules: ExitRules, begun: DecodeState) -> list[Tensor]:
    """The twin's cut and state."""
    state = copied(begun, "cpu")
    return [decide_exit(signals, rules, state, implementation="torch"), *state.tensors()]
