"""The CUDA kernels of a decode step's ops on token ids against their twins, in cases that hypothesis draws.

They run on a GPU, or on the host where they are built for it:

    PYTHONPATH=.:python:tests HOST_RUN=plain python -P -m pytest -p host_run tests/test_step_ops.py [-m ""]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exit_harness import KINDS, Row, Settings, begin, ids, make_rules, make_state
from op_samples import SAMPLES, assert_same, tensors
from step_cases import (
    CASES,
    EDGES,
    Arguments,
    Source,
    accept_case,
    build_tree_case,
    exit_case,
    sample_targets_case,
    verify_tree_case,
)
from step_checks import chains, check, copied, kernel_of, twin_of
from torch import Generator

import specexit_kernels
from specexit_kernels import DecodeState, Smoothing, accept, decide_exit, native
from specexit_kernels._op import OPS
from specexit_kernels.philox import gumbel_noise

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

ON_HOST = native.absent() is None and native.load().architectures == "host"
DEVICE = "cpu" if ON_HOST else "cuda"
needs_kernels = pytest.mark.skipif(
    native.absent() is not None or not (ON_HOST or torch.cuda.is_available()),
    reason=f"no CUDA device, and no kernels for the host (HOST_RUN=plain, -p host_run); {native.absent() or ''}",
)
# Some ten seconds each on one core, where a thread of a kernel is a fiber.
EXAMPLES = {
    "build_tree": 500,
    "verify_tree": 600,
    "accept": 600,
    "sample_targets": 500,
    "decide_exit": 600,
    "compact_kv": 600,
}
MANY = 10  # times as many


class Drawn(Source):
    """Choices that hypothesis makes, and makes smaller when a case fails."""

    def __init__(self, draw: st.DrawFn) -> None:
        super().__init__(torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1))))
        self.draw = draw

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))


@st.composite
def drawn(draw: st.DrawFn, make: Callable[[Source], Any]) -> Any:
    return make(Drawn(draw))


def search(name: str, examples: int) -> None:
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(drawn(CASES[name]))
    def holds(case: Any) -> None:
        check(name, case, DEVICE)

    holds()


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_equals_the_twin(name: str) -> None:
    search(name, EXAMPLES[name])


@needs_kernels
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_twin_in_thousands_of_cases(name: str) -> None:
    search(name, MANY * EXAMPLES[name])


@needs_kernels
@pytest.mark.parametrize("nodes", EDGES)
def test_sizes_at_the_edge_of_a_word_or_a_block(rng: Generator, nodes: int) -> None:
    source = Source(rng)
    for _ in range(2):
        check("build_tree", build_tree_case(source, nodes), DEVICE)
        check("verify_tree", verify_tree_case(source, nodes), DEVICE)
        check("accept", accept_case(source, nodes), DEVICE)


@needs_kernels
@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 1023, 1024, 1025, 4095, 4096])
def test_many_candidates(rng: Generator, count: int) -> None:
    for nodes in (60, 256):
        check("build_tree", build_tree_case(Source(rng), nodes, count), DEVICE)


@needs_kernels
@pytest.mark.parametrize(
    "vocab", [1, 2, 31, 33, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 4097, 8191, 32_001]
)
def test_vocabularies_at_the_edge_of_a_tile(rng: Generator, vocab: int) -> None:
    check("sample_targets", sample_targets_case(Source(rng), vocab), DEVICE)


@needs_kernels
@pytest.mark.parametrize(("top_p", "min_p"), [(None, None), (0.999999, None), (None, 1e-7), (0.999999, 1e-7)])
def test_a_very_unlikely_token_is_drawn(rng: Generator, top_p: float | None, min_p: float | None) -> None:
    """Far below the best, where no list of likely tokens holds it: its noise makes up for that."""
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (2,), generator=rng), ids(5, 6)
    noise = gumbel_noise(seeds, positions, 2000)
    logits = -noise
    logits[torch.arange(2), noise.argmax(1)] += 0.1
    args: Arguments = {"logits": logits, "positions": positions, "seeds": seeds, "temperature": torch.ones(2)}
    args["top_p"] = None if top_p is None else torch.full((2,), top_p)
    args["min_p"] = None if min_p is None else torch.full((2,), min_p)
    check("sample_targets", args, DEVICE)


@needs_kernels
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 0.99999, 0), (3, 1, 0), (3, 0.99999, 0), (0, 1, 1e-5)])
def test_an_unlikely_token_that_is_kept_is_drawn(rng: Generator, top_k: int, top_p: float, min_p: float) -> None:
    """Ten below the best: beyond what is listed at first."""
    logits = torch.tensor([[0.0, -100.0, -100.0, -10.0, -100.0]])
    wins = torch.zeros(0, dtype=torch.int64)
    while len(wins) == 0:  # some 1 in 20,000
        seeds = torch.randint(-(2**63), 2**63 - 1, (100_000,), generator=rng)
        scores = logits + gumbel_noise(seeds, torch.zeros(100_000, dtype=torch.int32), 5)
        wins = seeds[scores[:, 3] > scores[:, 0] + 1e-3][:1]
    args: Arguments = {"logits": logits, "positions": ids(0), "seeds": wins, "temperature": torch.ones(1)}
    args |= {"top_k": ids(top_k), "top_p": torch.tensor([float(top_p)]), "min_p": torch.tensor([float(min_p)])}
    assert kernel_of("sample_targets")(**copied(args, DEVICE)).item() == 3
    check("sample_targets", args, DEVICE)


@needs_kernels
@pytest.mark.parametrize(
    ("vocab", "top_k", "kept"), [(2, 0, 1), (8, 0, 1), (8, 0, 3), (2, 9, 1), (4096, 0, 1), (4096, 0, 2)]
)
def test_of_equal_tokens_top_p_keeps_the_first(rng: Generator, vocab: int, top_k: int, kept: int) -> None:
    """As many as it says, where sums and products are exact: one more would be drawn in some of the rows."""
    count = 60 if vocab < 100 else 20
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=rng)
    rows = {"temperature": torch.ones(count), "top_p": torch.full((count,), kept / vocab)}
    args: Arguments = {
        "logits": torch.full((count, vocab), 2.5),
        "positions": ids(*range(count)),
        "seeds": seeds,
        **rows,
    }
    args["top_k"] = torch.full((count,), top_k, dtype=torch.int32)
    drawn = kernel_of("sample_targets")(**copied(args, DEVICE))
    assert drawn.max().item() < kept
    check("sample_targets", args, DEVICE)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("vocab", [128_256, 151_936, 262_144, 524_288])
def test_large_vocabularies(rng: Generator, vocab: int) -> None:
    for _ in range(3):
        check("sample_targets", sample_targets_case(Source(rng), vocab), DEVICE)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 31, 32])
def test_runs_as_long_as_a_warp(rng: Generator, rows: int) -> None:
    for _ in range(3):
        check("decide_exit", exit_case(Source(rng), rows), DEVICE)


@needs_kernels
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize(("kind", "window"), KINDS)
def test_a_value_at_its_threshold_does_not_pass(kind: Smoothing, window: int, per_step: bool) -> None:
    """Values that no rounding touches: raw signals of 0 are 1/2, 1/2 and 1, however they are smoothed."""
    at = ((0.5, 0.4, 2.0), (0.4, 0.5, 2.0), (0.4, 0.4, 1.0), (0.4, 0.4, 2.0))
    shared = Settings(smoothing=kind, window=window, per_step=per_step)
    rules = make_rules([Row(thresholds=x) for x in at], shared)
    state = make_state(len(at), shared, depth=7)
    begin(state, [[8, 1, 9]] * len(at), [99] * len(at), shared)
    said = torch.full((len(at), 8), 4, dtype=torch.int32), ids(7, 7, 7, 7), ids(4, 4, 4, 4)
    cuts = []
    for _ in range(6):  # momentum over 5 values is undecided before
        accept(*chains(state, *said), ids(), state, implementation="torch")
        there = copied(state, DEVICE)
        signals = torch.zeros(len(at), 8, 3)
        cut = kernel_of("decide_exit")(signals=copied(signals, DEVICE), rules=copied(rules, DEVICE), state=there)
        cuts.append(decide_exit(signals, rules, state, implementation="torch"))
        assert torch.equal(cut.cpu(), cuts[-1])
        assert_same(there.tensors(), state.tensors())
    passed = torch.stack(cuts) >= 0
    assert passed.any(0).tolist() == [False, False, False, True]


@needs_kernels
@pytest.mark.parametrize("widths", [[4] * 200, list(range(1, 11)), [*range(1, 8), *[9] * 200]])
def test_layers_beyond_those_of_one_launch(rng: Generator, widths: list[int]) -> None:
    """More tensors, or more shapes, than a launch's arguments hold."""
    keys, values = ([torch.randn(2, 1, 6, width, generator=rng) for width in widths] for _ in range(2))
    path = torch.tensor([[0, 2, 3], [0, 1, 3]], dtype=torch.int32)
    case = {"keys": keys, "values": values, "path": path, "n_accepted": ids(3, 3), "lengths": ids(5, 4)}
    check("compact_kv", case, DEVICE)


# What the kernels do not take


def sample(s: Source, name: str) -> Arguments:
    return list(SAMPLES[name](s.rng))[-1]


def with_gaps(args: Arguments, argument: str, field: str) -> Arguments:
    """A field of the state or of the rules is every second entry of a wider tensor."""
    value = getattr(args[argument], field)
    apart = torch.stack([value, value], -1)[..., 0]
    return args | {argument: dataclasses.replace(args[argument], **{field: apart})}


def deep(s: Source) -> Arguments:
    state = DecodeState.empty(3, depth=32, signals=3, forced=2, tail=1)
    return sample(s, "decide_exit") | {"signals": torch.zeros(3, 33, 3), "state": state}


def float64_logits(s: Source) -> Arguments:
    args = sample(s, "sample_targets")
    return args | {"logits": args["logits"].double()}


# By what the message begins with, after the op's name.
TOO_MUCH: dict[tuple[str, str], Callable[[Source], Arguments]] = {
    ("build_tree", "nodes"): lambda s: build_tree_case(s, 257, 20),
    ("build_tree", "tokens must have at most 4096"): lambda s: build_tree_case(s, 9, 4097),
    ("verify_tree", "tokens"): lambda s: verify_tree_case(s, 257),
    ("accept", "tree.tokens"): lambda s: accept_case(s, 257),
    ("accept", "state.*forced"): lambda s: with_gaps(sample(s, "accept"), "state", "forced"),
    ("sample_targets", "logits must be"): float64_logits,
    ("sample_targets", "logits must have at most 524288 columns"): lambda s: sample_targets_case(s, 524_289),
    ("decide_exit", "signals"): deep,
    ("decide_exit", "state.*run"): lambda s: with_gaps(sample(s, "decide_exit"), "state", "run"),
    ("decide_exit", "rules.*thresholds"): lambda s: with_gaps(sample(s, "decide_exit"), "rules", "thresholds"),
}


@needs_kernels
@pytest.mark.parametrize(("name", "word"), TOO_MUCH)
def test_what_a_kernel_does_not_take_goes_to_the_twin(rng: Generator, name: str, word: str) -> None:
    args = TOO_MUCH[name, word](Source(rng))
    here, there, asked = (copied(args, device) for device in ("cpu", DEVICE, DEVICE))
    with pytest.raises(ValueError, match=f"implementation='cuda' of {name}: {word}"):
        kernel_of(name)(**asked)
    expected = twin_of(name)(**here)
    assert_same([getattr(specexit_kernels, name)(**there), there], [expected, here])
    for left, given in zip(tensors(asked), tensors(args), strict=True):
        torch.testing.assert_close(left.cpu(), given, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(native.absent() is not None or ON_HOST, reason=native.absent() or "the kernels run on the host")
@pytest.mark.parametrize("name", CASES)
def test_tensors_on_the_cpu_are_refused(rng: Generator, name: str) -> None:
    with pytest.raises(ValueError, match=r"CUDA device.* cpu"):
        getattr(specexit_kernels, name)(**sample(Source(rng), name), implementation="cuda")


@pytest.mark.skipif(native.absent() is None, reason="the native module is there")
@pytest.mark.parametrize("name", CASES)
def test_an_absent_module_says_how_to_get_it(rng: Generator, name: str) -> None:
    assert OPS[name].implementation("cuda").name == "torch"
    with pytest.raises(RuntimeError, match=rf"of {name} cannot run here: the native module .*nvcc"):
        getattr(specexit_kernels, name)(**sample(Source(rng), name), implementation="cuda")
