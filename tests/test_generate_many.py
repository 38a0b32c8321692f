"""`generate_many`: any number of prompts through a few slots, each text as if it were decoded alone."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from typing import Any

import pytest
import torch
from test_replay import Recording, recorded
from tiny_models import VOCAB, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from specexit import Completion, ExitConfig, SpecExitDecoder, TreeConfig, load_draft
from specexit.bundled import bundled_pair, load_problems
from specexit.sampling import row_seeds

__all__ = ["recorded"]  # a fixture
TREES = {
    "plain": TreeConfig.none(),
    "chain": TreeConfig.chain(4),
    "tree": TreeConfig(nodes=20, depth=4, top_k=4),
}
NEW = 48


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    where = bundled_pair()
    model = AutoModelForCausalLM.from_pretrained(where.base, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(where.base)


def make(pair: tuple[Any, Any], **options: Any) -> SpecExitDecoder:
    return SpecExitDecoder.from_pretrained(pair[0], bundled_pair().draft, tokenizer=pair[1], **options)


def ragged(tokenizer: Any, number: int, rng: torch.Generator) -> list[list[int]]:
    """Problems, whole or in part, so that lengths from one token up occur."""
    chats = []
    for problem in load_problems("test")[:number]:
        chat = [{"role": "user", "content": problem.question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        cut = int(torch.randint(4, (), generator=rng))
        first = int(torch.randint(len(ids), (), generator=rng)) if cut == 0 else 0
        chats.append(ids[first:])
    chats[1] = chats[1][-1:]
    return chats


def one_by_one(
    decoder: SpecExitDecoder, prompts: Sequence[Sequence[int]], seed: int | None = None, **options: Any
) -> list[Completion]:
    seeds = [None] * len(prompts) if seed is None else [[value] for value in row_seeds(seed, len(prompts))]
    found = []
    for index, prompt in enumerate(prompts):
        out = decoder.generate(torch.tensor([prompt]), seed=seeds[index], **options)
        found.append(Completion(index, out.new_tokens[0], out.stats[0]))
    return found


def texts(completions: Sequence[Completion]) -> list[tuple[Any, ...]]:
    """Everything that does not depend on how tokens were speculated, by prompt."""
    return [
        (c.index, c.new_tokens, c.stats.finish_reason, c.stats.exit_position, c.stats.thinking_tokens)
        for c in sorted(completions, key=lambda c: c.index)
    ]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_many_ragged_prompts_in_five_slots(pair: tuple[Any, Any], ahead: int, rng: torch.Generator) -> None:
    decoder = make(pair, ahead=ahead)
    prompts = ragged(pair[1], 64, rng)
    options = {"max_new_tokens": NEW, "temperature": 0.0}
    expected = one_by_one(decoder, prompts, **options)
    found = list(decoder.generate_many(iter(prompts), slots=5, **options))
    assert texts(found) == texts(expected)
    assert any(c.index > d.index for c, d in pairwise(found)), "none overtook another"


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_trees_sampling_and_exits(
    pair: tuple[Any, Any], tree: TreeConfig, temperature: float, rng: torch.Generator
) -> None:
    decoder = make(pair, tree=tree, ahead=2)
    prompts = ragged(pair[1], 12, rng)
    options = {"max_new_tokens": 200 if tree.nodes > 1 else 40, "temperature": temperature, "top_k": 20, "seed": 7}
    expected = one_by_one(decoder, prompts, **options)
    found = list(decoder.generate_many([torch.tensor(prompt) for prompt in prompts], slots=3, **options))
    assert texts(found) == texts(expected)
    if tree.nodes > 1 and temperature == 0:
        assert any(c.stats.exit_position is not None for c in found)
        assert any(c.stats.trace is not None and c.stats.trace.positions for c in found)


def test_recorded_steps(pair: tuple[Any, Any], recorded: None, rng: torch.Generator) -> None:
    """Prompts join a step that was recorded before they were there, and the next call finds it again."""
    prompts = ragged(pair[1], 12, rng)
    options = {"max_new_tokens": 100, "temperature": 0.0}
    expected = texts(one_by_one(make(pair, graph=False), prompts, **options))
    decoder = make(pair)
    for call in range(3):
        assert texts(list(decoder.generate_many(prompts, slots=4, **options))) == expected, call
    assert Recording.replays > 50
    (kept,) = decoder._pool.kept
    assert decoder.memory().slots == 4 * kept.slots
    assert decoder.memory().cache == 4 * kept.slots * decoder.base.slot_bytes
    # Another temperature is another step.
    sampled = {**options, "temperature": 0.7, "seed": 3}
    expected = texts(one_by_one(make(pair, graph=False), prompts[:3], **sampled))
    assert texts(list(decoder.generate_many(prompts[:3], slots=4, **sampled))) == expected
    decoder.release()
    assert decoder.memory().cache == decoder.memory().buffers == 0


def test_the_cache_grows_while_steps_are_recorded(
    pair: tuple[Any, Any], recorded: None, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    prompts = sorted(ragged(pair[1], 10, rng), key=len)
    options = {"max_new_tokens": 150, "temperature": 0.0, "exit": ExitConfig.off()}
    expected = texts(one_by_one(make(pair, graph=False), prompts, **options))
    for module in ("engine", "pool"):
        monkeypatch.setattr(f"specexit.{module}.slot_bucket", lambda device: 8)
    decoder = make(pair, ahead=2)
    assert texts(list(decoder.generate_many(prompts, slots=3, **options))) == expected
    assert Recording.replays > 20


def test_a_batch_is_recorded_like_many(pair: tuple[Any, Any], recorded: None, rng: torch.Generator) -> None:
    """A kept engine serves other thresholds, seeds and limits: they are values, not parts of the step."""
    prompts = [prompt[-20:] for prompt in ragged(pair[1], 4, rng) if len(prompt) >= 20][:2]
    ids = torch.tensor(prompts)
    plain, decoder = make(pair, graph=False), make(pair)
    for confidence, seed, new in ((0.5, 1, 60), (0.99, 2, 90), (0.2, 3, 120)):
        rule = ExitConfig(confidence=confidence, progress=None, remaining=None)
        options = {"max_new_tokens": new, "temperature": 0.5, "seed": seed, "exit": rule}
        assert decoder.generate(ids, **options).new_tokens == plain.generate(ids, **options).new_tokens
    assert len(decoder._pool.kept) == 1


def test_calls_that_take_turns_find_their_engines(pair: tuple[Any, Any], recorded: None, rng: torch.Generator) -> None:
    """With the exit and without it, as the demo does; a third form takes the place of the one not used for longest."""
    ids = torch.tensor([max(ragged(pair[1], 4, rng), key=len)])
    plain, decoder = make(pair, graph=False), make(pair)
    engines: list[Any] = []
    for turn in range(3):
        for exit in (None, ExitConfig.off()):
            options = {"max_new_tokens": 30, "temperature": 0.0, "exit": exit}
            assert decoder.generate(ids, **options).new_tokens == plain.generate(ids, **options).new_tokens
            engines.append(decoder._pool.kept[-1])
            assert engines[-1].captured, turn
    assert len(set(engines)) == 2
    decoder.generate(ids, max_new_tokens=4, temperature=0.5)
    assert decoder._pool.kept[0] is engines[-1]
    assert len(decoder._pool.kept) == 2


def test_what_is_given_back_is_gone(pair: tuple[Any, Any], recorded: None, rng: torch.Generator) -> None:
    """At once, and not when Python collects cycles: a GPU's memory cannot wait for that."""
    ids = torch.tensor([max(ragged(pair[1], 4, rng), key=len)])
    decoder = make(pair)
    gc.collect()
    gc.disable()
    try:
        decoder.generate(ids, max_new_tokens=90, temperature=0.0)
        engine = decoder._pool.kept[-1]
        monitored = [weakref.ref(value) for value in (engine, engine.buffers.cache, engine.buffers.cache.keys()[0])]
        before = weakref.ref(engine.buffers.cache.values()[0])
        with engine.active():
            assert engine.reserve(engine.slots + 1)
        assert before() is None, "a layer that has grown"
        del engine
        decoder.release()
        assert [value() for value in monitored] == [None] * 3
    finally:
        gc.enable()


def test_weights_that_move_are_captured_anew(recorded: None, rng: torch.Generator) -> None:
    model = tiny_model("llama")
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    row = torch.randint(3, VOCAB, (1, 6), generator=rng)
    for turn in range(3):
        expected = model.generate(row, max_new_tokens=10, do_sample=False)
        assert torch.equal(decoder.generate(row, max_new_tokens=10, temperature=0.0).sequences, expected), turn
        layer = model.model.layers[turn].mlp.down_proj
        layer.weight = torch.nn.Parameter(torch.randn(layer.weight.shape, generator=rng))
    model.double()
    expected = model.generate(row, max_new_tokens=10, do_sample=False)
    assert torch.equal(decoder.generate(row, max_new_tokens=10, temperature=0.0).sequences, expected)


def test_a_row_without_exit_counts_its_own_thinking(pair: tuple[Any, Any], rng: torch.Generator) -> None:
    """Whatever the markers of the rows beside it are."""
    decoder = make(pair)
    row = max(ragged(pair[1], 4, rng), key=len)
    off, options = ExitConfig.off(), {"max_new_tokens": 35, "temperature": 0.0}
    other = ExitConfig(start_ids=(), assume_thinking=True, thinking_budget=500)
    alone = decoder.generate(torch.tensor([row]), exit=off, **options).stats[0].thinking_tokens
    beside = decoder.generate(torch.tensor([row, row]), exit=[off, other], **options).stats[0].thinking_tokens
    assert beside == alone > 0


def test_prompts_are_taken_when_there_is_room(pair: tuple[Any, Any], rng: torch.Generator) -> None:
    """An endless source is fine."""
    prompts, taken = ragged(pair[1], 6, rng), []

    def endless() -> Iterator[list[int]]:
        for index in count():
            taken.append(index)
            yield prompts[index % 6]

    decoder = make(pair)
    results = decoder.generate_many(endless(), slots=3, max_new_tokens=8, temperature=0.0)
    assert not taken, "nothing is decoded before the first result is asked for"
    for seen, _ in zip(range(10), results, strict=False):
        assert len(taken) <= seen + 1 + 3
    results.close()
    assert decoder.memory().cache == 0


def test_other_calls_in_between(pair: tuple[Any, Any], rng: torch.Generator) -> None:
    decoder = make(pair)
    prompts = ragged(pair[1], 8, rng)
    options = {"max_new_tokens": 30, "temperature": 0.0}
    expected = one_by_one(decoder, prompts, **options)
    found = []
    for completion in decoder.generate_many(prompts, slots=2, **options):
        found.append(completion)
        again = decoder.generate(torch.tensor([prompts[0]]), tree=TreeConfig.chain(2), exit=ExitConfig.off(), **options)
        assert len(again.new_tokens[0]) <= 30
        inner = decoder.generate_many(prompts[:2], slots=1, **options)
        assert texts([next(inner)]) == texts(expected[:1])
        plain = decoder.model.generate(torch.tensor([prompts[0]]), max_new_tokens=30, do_sample=False)
        assert plain[0, len(prompts[0]) :].tolist() == again.new_tokens[0]
    assert texts(found) == texts(expected)


def test_prompts_may_come_from_the_decoder_itself(pair: tuple[Any, Any], rng: torch.Generator) -> None:
    """The source of the prompts is the caller's code: it may use the decoder, the model, and other threads."""
    decoder = make(pair)
    rows = ragged(pair[1], 4, rng)
    options = {"max_new_tokens": 12, "temperature": 0.0}

    def longer() -> Iterator[list[int]]:
        with ThreadPoolExecutor(1) as other:
            for row in rows:
                ids = torch.tensor([row])
                mine = other.submit(
                    decoder.generate, ids, tree=TREES["tree"], exit=ExitConfig.off(), **options
                ).result()
                plain = decoder.model.generate(ids, max_new_tokens=12, do_sample=False)
                assert plain[0].tolist() == mine.sequences[0].tolist()
                yield plain[0].tolist()

    found = list(decoder.generate_many(longer(), slots=2, **options))
    assert texts(found) == texts(one_by_one(decoder, list(longer()), **options))


class Multiple(StoppingCriteria):
    """Stops a text whose length, the prompt's included, is a multiple of 11."""

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] % 11 == 0] * len(input_ids))


@pytest.mark.parametrize("ahead", [0, 2])
def test_criteria_and_processors(pair: tuple[Any, Any], ahead: int, rng: torch.Generator) -> None:
    decoder = make(pair, ahead=ahead)
    prompts = ragged(pair[1], 9, rng)
    for extra in ({"stopping_criteria": StoppingCriteriaList([Multiple()])}, {}):
        options = {"max_new_tokens": 40, "temperature": 0.0, **extra}
        if not extra:
            decoder.model.generation_config.repetition_penalty = 1.3
        try:
            expected = one_by_one(decoder, prompts, **options)
            found = list(decoder.generate_many(prompts, slots=4, **options))
        finally:
            decoder.model.generation_config.repetition_penalty = None
        assert texts(found) == texts(expected)
        reasons = {c.stats.finish_reason for c in found}
        assert ("criteria" in reasons) == bool(extra)


def test_what_has_ended_is_not_lost_with_an_error(pair: tuple[Any, Any]) -> None:
    """A criterion raises for one sequence in the step that ends another."""
    prompts = [[3] * 6, [4] * 9, [5] * 7]

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
            first, new = int(input_ids[0, 0]), input_ids.shape[1] - len(prompts[int(input_ids[0, 0]) - 3])
            if first == 4 and new == 5:
                raise RuntimeError("the criterion failed")
            return torch.tensor([new == 5])

    for ahead in (0, 2):
        decoder = make(pair, ahead=ahead, tree=TreeConfig.none(), exit=ExitConfig.off())
        found: list[Completion] = []
        source = iter([*prompts, [6] * 5])
        options = {"max_new_tokens": 30, "temperature": 0.0, "eos_token_id": -1}
        with pytest.raises(RuntimeError, match="the criterion failed"):
            found.extend(
                decoder.generate_many(source, slots=3, stopping_criteria=StoppingCriteriaList([Criterion()]), **options)
            )
        assert [completion.index for completion in found] == [0, 2]
        assert next(source) == [6] * 5, "a prompt was taken that nobody decodes"
        assert len(decoder.generate(torch.tensor([prompts[0]]), **options).new_tokens[0]) == 30


def test_a_bad_prompt_raises_when_the_others_have_ended(pair: tuple[Any, Any], rng: torch.Generator) -> None:
    decoder = make(pair)
    prompts = ragged(pair[1], 5, rng)
    options = {"max_new_tokens": 20, "temperature": 0.0}
    expected = texts(one_by_one(decoder, prompts, **options))
    found: list[Completion] = []
    bad: list[Any] = [*prompts, [3, 10**6], *prompts]
    with pytest.raises(ValueError, match=r"prompts\[5\] must be in \[0, "):
        found.extend(decoder.generate_many(bad, slots=2, **options))  # extend keeps what came before the error
    assert texts(found) == expected


def test_decoders_of_one_model_take_turns(pair: tuple[Any, Any], rng: torch.Generator) -> None:
    """Whatever thread they are in: both attach the model, and select what their one draft reads."""
    draft = load_draft(bundled_pair().draft, embedding=pair[0].get_input_embeddings())
    decoders = [SpecExitDecoder(pair[0], draft, tokenizer=pair[1]) for _ in range(2)]
    rows = ragged(pair[1], 4, rng)
    calls = [{"max_new_tokens": 40, "temperature": 0.0, "exit": exit} for exit in (None, ExitConfig.off())]
    expected = [texts(one_by_one(decoders[0], rows, **call)) for call in calls]
    before = pair[0].config._attn_implementation
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as threads:
            many = [
                threads.submit(lambda d, c: texts(list(d.generate_many(rows, slots=2, **c))), decoder, call)
                for decoder, call in zip(decoders, calls, strict=True)
            ]
            single = [
                threads.submit(lambda d, c: texts(one_by_one(d, rows, **c)), decoder, call)
                for decoder, call in zip(decoders, calls, strict=True)
            ]
            assert [done.result() for done in many] == expected
            assert [done.result() for done in single] == expected
    finally:
        sys.setswitchinterval(interval)
    assert pair[0].config._attn_implementation == before


def test_runs_do_not_depend_on_the_neighbours(pair: tuple[Any, Any], rng: torch.Generator) -> None:
    """A prompt of one token takes a step before the draft has read anything; the others do not take it with it."""
    decoder = make(pair, exit=ExitConfig.off(), tree=TreeConfig.chain(4))
    rows = [row for row in ragged(pair[1], 6, rng) if len(row) > 1][:3]
    options = {"max_new_tokens": 30, "temperature": 0.0}
    alone = one_by_one(decoder, [*rows, [3]], **options)
    beside = sorted(decoder.generate_many([*rows, [3]], slots=4, **options), key=lambda c: c.index)
    assert [c.stats.accepted for c in beside] == [c.stats.accepted for c in alone]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("text", TypeError, r"prompts\[0\] must be ids or a tensor of them, was str"),
        (3, TypeError, r"prompts\[0\] must be ids or a tensor of them, was int"),
        ([1.5], TypeError, r"prompts\[0\] must hold ints, was float"),
        ([], ValueError, r"prompts\[0\] must hold at least one token"),
        ([2**70], ValueError, r"prompts\[0\] must be in \[0, 80\), the base's vocabulary, was 1180591620717411303424"),
        (torch.ones(3), TypeError, r"prompts\[0\] must hold integers, was torch.float32"),
        (torch.ones(2, 3, dtype=torch.long), ValueError, r"prompts\[0\] must be \[P\] or \[1, P\], was \[2, 3\]"),
    ],
)
def test_what_is_no_prompt(pair: tuple[Any, Any], prompt: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        list(make(pair).generate_many([prompt]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": 5}, TypeError, "prompts must be an iterable over prompts, each its ids, was int"),
        ({"prompts": {"input_ids": [[1]]}}, TypeError, "prompts must be an iterable over prompts.* was dict"),
        ({"prompts": "text"}, TypeError, "prompts must be an iterable over prompts.* was str"),
        ({"logits_processor": 3}, TypeError, "logits_processor must be a list, as transformers' are, was int"),
        ({"stopping_criteria": print}, TypeError, "stopping_criteria must be a list.*was builtin_function"),
        ({"slots": 0}, ValueError, "slots must be"),
        ({"slots": 2.0}, TypeError, "slots must be"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be"),
        ({"exit": [ExitConfig.off()]}, TypeError, "exit must be one ExitConfig for all prompts, was list"),
        ({"tree": 3}, TypeError, "tree must be a TreeConfig"),
        ({"seed": "x"}, TypeError, "seed must be"),
    ],
)
def test_wrong_options_are_refused_at_once(
    pair: tuple[Any, Any], options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        make(pair).generate_many(**{"prompts": [[1]], **options})


def test_a_prompt_for_which_the_capacity_has_no_room(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\] must leave room in the capacity of 64 slots"):
        list(make(pair, capacity=64).generate_many([[3], [3] * 70], max_new_tokens=4, temperature=0.0))


def test_autocast_in_the_middle(pair: tuple[Any, Any]) -> None:
    decoder = make(pair)
    results = decoder.generate_many([[3, 4]] * 3, slots=1, max_new_tokens=4, temperature=0.0)
    next(results)
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="autocast must be off"):
        next(results)


def test_too_few_seeds(pair: tuple[Any, Any]) -> None:
    options = {"max_new_tokens": 4, "temperature": 1.0}
    results = make(pair).generate_many([[3], [4], [5]], slots=1, seed=[1, 2], **options)
    assert len([next(results), next(results)]) == 2
    with pytest.raises(ValueError, match="seed must be one int or one a prompt, was 2 of them for more"):
        next(results)


def test_no_prompts_and_no_draft(rng: torch.Generator) -> None:
    decoder = SpecExitDecoder(tiny_model("llama"), exit=ExitConfig.off())
    assert list(decoder.generate_many([])) == []
    prompts = [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in (1, 7, 1, 3, 12)]
    options = {"max_new_tokens": 10, "temperature": 0.0}
    found = list(decoder.generate_many(prompts, slots=2, **options))
    assert texts(found) == texts(one_by_one(decoder, prompts, **options))
