"""Fingerprints of bases and tokenizers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from specexit import bundled_pair
from specexit.identity import (
    check_base,
    check_tokenizer,
    fingerprint,
    tokenizer_fingerprint,
)


def test_a_checkpoint_has_one_fingerprint_in_every_precision() -> None:
    base = bundled_pair().base
    found = {
        fingerprint(AutoModelForCausalLM.from_pretrained(base, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(found) == 1


def test_rounding_to_bfloat16_changes_no_fingerprint() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    assert fingerprint(model.bfloat16()) == before


def test_half_precision_is_the_same_in_float32() -> None:
    model = tiny_model("llama").half()
    half = fingerprint(model)
    assert fingerprint(model.float()) == half


def test_another_weight_is_another_base(rng: torch.Generator) -> None:
    model = tiny_model("llama", seed=int(torch.randint(2**31, (), generator=rng)))
    before = fingerprint(model)
    assert fingerprint(tiny_model("llama", seed=7)) != before
    names = [name for name, _ in model.named_parameters()]
    chosen = names[int(torch.randint(len(names), (), generator=rng))]
    parameter = dict(model.named_parameters())[chosen].data.view(-1)
    old = parameter[5].clone()
    parameter[5] += 1
    assert fingerprint(model) != before
    parameter[5] = old
    assert fingerprint(model) == before


def test_shapes_and_names_count() -> None:
    one, two = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    for layer in (one, two):
        torch.nn.init.zeros_(layer.weight)
    assert len({fingerprint(one), fingerprint(two), fingerprint(torch.nn.Sequential(one))}) == 3


def test_tied_weights_count_once_and_strides_do_not() -> None:
    class Tied(torch.nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
            if again:
                self.b = self.a

    assert fingerprint(Tied(True)) == fingerprint(Tied(False))
    turned = Tied(False)
    turned.a = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T.contiguous().T)
    assert fingerprint(turned) == fingerprint(Tied(False))


def test_another_vocabulary_is_another_tokenizer() -> None:
    one, two = (AutoTokenizer.from_pretrained(bundled_pair().base) for _ in range(2))
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)
    two.add_tokens(["more"])
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(two)


def test_checks_say_what_is_of_another() -> None:
    model, tokenizer = tiny_model("llama"), AutoTokenizer.from_pretrained(bundled_pair().base)
    check_base(fingerprint(model), model, "the draft")
    check_tokenizer(tokenizer_fingerprint(tokenizer), tokenizer, "the draft")
    with pytest.raises(
        ValueError, match=rf"^the draft is of another base: made with x, .* is {fingerprint(model)[:9]}"
    ):
        check_base("x", model, "the draft")
    with pytest.raises(ValueError, match=r"^t\.jsonl is of another tokenizer: made with abc,"):
        check_tokenizer("abc", tokenizer, "t.jsonl")
