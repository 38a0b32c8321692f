"""Forced answers over one shared cache, against plain forwards of every text that is cut."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, WINDOW, tiny_model
from transformers import PreTrainedModel

from specexit.base import BaseModel, probe
from specexit.training.probe import Branch, Prober

# Full attention, windows in all layers or some, softcap, sinks and experts, learned positions.
ARCHITECTURES = ("llama", "qwen2_window", "mistral_window", "gemma2", "gemma3", "gpt_oss", "gpt2")


def integers(rng: torch.Generator, low: int, high: int, count: int) -> list[int]:
    return torch.randint(low, high, (count,), generator=rng).tolist()


def attach(model: PreTrainedModel) -> BaseModel:
    base = BaseModel(model)
    probe(base)
    return base


@torch.no_grad()
def check(
    model: PreTrainedModel, text: list[int], cut: int, known: list[int], branch: Branch, limit: int, stops: set[int]
) -> None:
    """Compare a branch with one forward of its whole text, by the model as it is."""
    ids = [*text[:cut], *known, *branch.tokens]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, cut + len(known) - 1 :].float()
    chosen = torch.tensor(branch.tokens, dtype=torch.long)
    said = logits[: len(chosen)]
    best = said.max(-1).values
    scale = logits.abs().max().item()
    assert ((best - said.gather(1, chosen[:, None]).squeeze(1)) <= 1e-4 * scale).all(), "not the likeliest token"
    expected = said.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(branch.log_probabilities), expected, atol=2e-3, rtol=1e-3)
    assert not stops & set(branch.tokens)
    if branch.generated == len(branch.tokens):
        assert len(branch.tokens) == limit
    else:  # the next token was a stop id
        assert branch.generated == len(branch.tokens) + 1
        assert max(logits[-1, list(stops)]) >= logits[-1].max() - 1e-4 * scale


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_answer_is_that_of_plain_decoding_of_the_text_that_is_cut_there(name: str, rng: torch.Generator) -> None:
    """Places far apart and next to each other, the first token's and the last's among them; some texts are longer than
    the windows, which then reach into the text, the known ids and the branch."""
    model = tiny_model(name, seed=int(torch.randint(2**31, (), generator=rng)))
    text = integers(rng, 3, VOCAB, 3 * WINDOW + int(torch.randint(20, (), generator=rng)))
    inner = sorted(set(integers(rng, 2, len(text), 6)))
    cuts = sorted({1, *inner, inner[0] + 1, len(text)})
    for known, limit, branches in (([3], WINDOW + 3, 64), (integers(rng, 3, VOCAB, 5), 4, 3)):
        stops = set(integers(rng, 0, VOCAB, 8))
        prober = Prober(attach(model), known, stops, limit, lambda ids: False, branches)
        found = prober.answer(text, cuts)
        assert len(found) == len(cuts)
        for cut, branch in zip(cuts, found, strict=True):
            check(model, text, cut, known, branch, limit, stops)


def test_a_prompt_of_many_chunks_and_known_ids_of_many(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More known ids than one forward takes, and a text of several forwards."""
    monkeypatch.setattr("specexit.training.probe.CHUNK", 7)
    model = tiny_model("gemma3", seed=int(torch.randint(2**31, (), generator=rng)))
    text, known = integers(rng, 3, VOCAB, 40), integers(rng, 3, VOCAB, 9)
    cuts = [5, 21, 40]
    found = Prober(attach(model), known, [], 3, lambda ids: False).answer(text, cuts)
    for cut, branch in zip(cuts, found, strict=True):
        check(model, text, cut, known, branch, 3, set())


def test_how_many_are_decoded_at_a_time_changes_nothing(rng: torch.Generator) -> None:
    base = attach(tiny_model("mistral_window", seed=int(torch.randint(2**31, (), generator=rng))).double())
    text = integers(rng, 3, VOCAB, 50)
    cuts = sorted(set(integers(rng, 1, 51, 9)))
    known = integers(rng, 3, VOCAB, 3)

    def tokens(branches: int) -> list[list[int]]:
        return [branch.tokens for branch in Prober(base, known, [], 8, lambda ids: False, branches).answer(text, cuts)]

    assert tokens(1) == tokens(4) == tokens(64)


def test_a_branch_ends_where_its_answer_is_complete_and_the_others_go_on(rng: torch.Generator) -> None:
    base = attach(tiny_model("llama", seed=int(torch.randint(2**31, (), generator=rng))).double())
    text, cuts = integers(rng, 3, VOCAB, 30), [3, 9, 15, 30]
    whole = Prober(base, [5], [], 9, lambda ids: False).answer(text, cuts)
    parity = text[0] % 2  # tokens that end a branch

    def complete(ids: list[int]) -> bool:
        return ids[-1] % 2 == parity

    for branch, long in zip(Prober(base, [5], [], 9, complete).answer(text, cuts), whole, strict=True):
        ends = [n for n, token in enumerate(long.tokens, 1) if token % 2 == parity]
        assert branch.tokens == long.tokens[: min(ends, default=9)]
        assert branch.log_probabilities == pytest.approx(long.log_probabilities[: len(branch.tokens)], abs=1e-9)
        assert branch.generated == len(branch.tokens)


def test_a_stop_id_may_come_first(rng: torch.Generator) -> None:
    base = attach(tiny_model("llama", seed=int(torch.randint(2**31, (), generator=rng))))
    text = integers(rng, 3, VOCAB, 12)
    (branch,) = Prober(base, [5], range(VOCAB), 9, lambda ids: False).answer(text, [12])
    assert branch == Branch([], [], 1, True)


def test_no_place_to_cut_needs_no_forward(rng: torch.Generator) -> None:
    assert Prober(attach(tiny_model("llama")), [5], [], 9, lambda ids: False).answer([4, 5], []) == []


def test_the_model_is_left_as_it_was(rng: torch.Generator) -> None:
    model = tiny_model("llama").train()
    before = model.config._attn_implementation
    Prober(attach(model), [5], [], 2, lambda ids: False).answer([4, 6, 7], [2])
    assert model.training
    assert model.config._attn_implementation == before
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny_model("llama")
    base = attach(model)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"base's logits must be finite, were not in torch\.float32"):
        Prober(base, [5], [], 2, lambda ids: False).answer([4, 6, 7], [2])


def test_a_text_must_stay_where_the_rotary_embedding_does(monkeypatch: pytest.MonkeyPatch) -> None:
    prober = Prober(attach(tiny_model("llama")), [5, 6], [], 4, lambda ids: False)
    monkeypatch.setattr(BaseModel, "max_positions", 20)
    assert prober.answer([7] * 14, [14])
    with pytest.raises(ValueError, match="a text of 15 tokens and its answer must stay within 20 positions, was 21"):
        prober.answer([7] * 15, [3, 15])


@pytest.mark.parametrize(
    ("known", "limit", "branches", "message"),
    [
        ([], 1, 1, "known must hold the ids that follow a cut"),
        ([3], 0, 1, "max_new_tokens must be at least 1, was 0"),
        ([3], 1, 0, "branches must be at least 1, was 0"),
    ],
)
def test_wrong_settings_are_named(known: list[int], limit: int, branches: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prober(attach(tiny_model("llama")), known, [], limit, lambda ids: False, branches)
