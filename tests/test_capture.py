"""What captures a step, what cannot be captured, and the host's reading behind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_lossless import pad, prompts
from test_replay import Recording, recorded
from tiny_models import tiny_model
from torch import Tensor

from specexit import ExitConfig, SpecExitDecoder
from specexit.capture import Replayed, Waits
from specexit.publication import pack, publication, unpack
from specexit.ring import Ring
from specexit_kernels import DecodeState, ExitReason, Finish

__all__ = ["recorded"]  # a fixture


def test_replayed_calls_then_records_then_replays() -> None:
    x, calls = torch.zeros(3), []

    def add() -> None:
        calls.append(None)
        x.add_(1)

    step = Replayed(Recording)
    for count in range(1, 6):
        step(add)
        assert x.tolist() == [count] * 3
        assert len(calls) == min(count, 2), "a replay runs no Python"
    step.reset()
    assert step.recording is None
    step(add)
    assert (x[0].item(), len(calls)) == (6, 3)


def test_without_a_recorder_the_function_is_called() -> None:
    x = torch.zeros(1)
    step = Replayed(None)
    for _ in range(4):
        step(lambda: x.add_(1))
    assert x.item() == 4
    assert step.recording is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "operation not permitted when stream"),
        (torch.OutOfMemoryError("tried to allocate 3 GiB"), r"its memory does not fit beside .* 3 GiB"),
    ],
)
def test_what_cannot_be_recorded_is_called_and_says_why(error: Exception, reason: str) -> None:
    x, attempts = torch.zeros(1), []

    def fail(function: Callable[[], None]) -> Recording:
        attempts.append(None)
        raise error

    def add() -> None:
        x.add_(1)

    step = Replayed(fail)
    step(add)
    assert not step.refused
    with pytest.warns(UserWarning, match=f"not captured in a CUDA graph.*{reason}"):
        step(add)
    assert step.refused
    step(add)
    step.reset()
    step(add)
    assert x.item() == 4
    assert len(attempts) == 1, "it is tried once"


def test_errors_of_the_function_itself_are_not_hidden() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        Replayed(Recording)(fail)


def test_a_function_that_waits_twice_is_not_recorded() -> None:
    """What is set up on first use may wait; a hidden wait comes again."""
    for waits, recorded_from in (([True, False], 3), ([False], 2), ([True, True], None)):
        x, said = torch.zeros(1), iter(waits)

        @contextmanager
        def watch(said: Iterator[bool] = said) -> Iterator[list[str]]:
            yield ["an operation (file.py:3)"] if next(said) else []

        step = Replayed(Recording, watch)
        for call in range(1, 6):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step(lambda x=x: x.add_(1))
            refused = recorded_from is None and call == 2
            assert [str(w.message).endswith("it waits for the device: an operation (file.py:3)") for w in caught] == [
                True
            ] * refused
            assert (step.recording is not None) == (recorded_from is not None and call >= recorded_from)
        assert x.item() == 5


def test_a_step_is_warm_in_its_own_thread() -> None:
    x = torch.zeros(1)

    def add() -> None:
        x.add_(1)

    step = Replayed(Recording)
    with ThreadPoolExecutor(1) as other:
        other.submit(step, add).result()
        step(add)
        assert step.recording is None
        step(add)
        recording = step.recording
        assert recording is not None
        other.submit(step, add).result()
    assert step.recording is recording
    assert x.item() == 4


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_routing_on_the_host_is_not_captured(name: str, recorded: None, rng: torch.Generator) -> None:
    model = tiny_model(name)
    model.set_experts_implementation("eager")
    with pytest.warns(UserWarning, match=r"waits for the device \(.*nonzero.*grouped_mm"):
        decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    ids, mask = pad(prompts(rng, [6, 4]), "left")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=8, temperature=0.0).sequences, expected)
    assert Recording.replays == 0


@pytest.mark.parametrize(("name", "experts"), [("mixtral", "grouped_mm"), ("llama", None), ("gemma3", None)])
def test_models_that_can_be_captured(name: str, experts: str | None, recorded: None, rng: torch.Generator) -> None:
    model = tiny_model(name)
    if experts is not None:
        model.set_experts_implementation(experts)
    ids, mask = pad(prompts(rng, [6, 4]), "left")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = SpecExitDecoder(model, exit=ExitConfig.off())
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=12, temperature=0.0).sequences, expected)
    assert Recording.replays >= 8


def test_processors_are_not_captured_and_say_so(recorded: None, rng: torch.Generator) -> None:
    model = tiny_model("llama")
    model.generation_config.repetition_penalty = 1.2
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with pytest.warns(UserWarning, match="logits processors run on the host"):
        decoder.generate(prompts(rng, [6])[0][None], max_new_tokens=8, temperature=0.0)
    assert Recording.replays == 0


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero()],
    ids=["item", "bool", "mask", "nonzero"],
)
def test_waits_are_noted_on_their_device_only(wait: Callable[[Tensor], Any]) -> None:
    for device_type in ("cpu", "cuda"):
        with Waits(device_type) as watch:
            wait(torch.ones(3))
            torch.ones(3)[torch.tensor([0, 2])].sum().add(1)
        assert bool(watch.found) == (device_type == "cpu")


def test_moves_between_devices_are_noted() -> None:
    for move in (lambda x: x.to("meta"), lambda x: x.new_empty(3, device="meta").copy_(x)):
        with Waits("cpu") as watch:
            move(torch.ones(3))
        assert watch.found
    with Waits("cpu") as watch:
        torch.ones(3).to(torch.float16).clone().copy_(torch.ones(3))
    assert not watch.found


def test_ring_gives_copies_in_order() -> None:
    ring: Ring[str] = Ring()
    source = torch.zeros(2, 3, dtype=torch.int32)
    for turn in range(3):
        for note in "abc":
            source.fill_(ord(note) + turn)
            ring.push(source, note)
        assert len(ring) == 3
        for note in "abc":
            copy, found = ring.pop()
            assert (found, copy.tolist()) == (note, [[ord(note) + turn] * 3] * 2)
    with pytest.raises(IndexError):
        ring.pop()


@pytest.mark.parametrize(("signals", "trace"), [(0, False), (0, True), (3, True), (3, False), (1, True)])
def test_publication_round_trip(signals: int, trace: bool, rng: torch.Generator) -> None:
    state = DecodeState.empty(3, depth=4, signals=signals, trace=trace)
    for tensor in (state.output, state.trace):
        values = torch.randint(-99, 99, tensor.shape, generator=rng)
        tensor.copy_(values if tensor is state.output else values / 7)
    state.n_output.copy_(torch.tensor([0, 5, 2]))
    state.finished.copy_(torch.tensor([2, 0, 1]))
    state.exit_position.copy_(torch.tensor([-1, 40, 7]))
    state.exit_reason.copy_(torch.tensor([0, 1, 2]))
    out = publication(state)
    out.fill_(-1)
    pack(state, out)
    for row, found in enumerate(unpack(out, state.depth, state.signals)):
        count = int(state.n_output[row])
        assert found.tokens == state.output[row, :count].tolist()
        assert found.finish == Finish(int(state.finished[row]))
        assert (found.exit_position, found.exit_reason) == (
            int(state.exit_position[row]),
            ExitReason(int(state.exit_reason[row])),
        )
        assert found.trace == (state.trace[row, :count].tolist() if state.trace.numel() else [])
