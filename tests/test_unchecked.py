"""What the decoder gives the operators that it calls without their checks would pass the checks."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import specexit_kernels
from specexit import ExitConfig, SpecExitDecoder, TreeConfig, attention, bundled_pair
from specexit_kernels import unchecked

TREES = {"plain": TreeConfig.none(), "chain": TreeConfig.chain(3), "tree": TreeConfig(nodes=9, depth=3, top_k=2)}


def checked(name: str, calls: Counter[str]) -> Callable[..., Any]:
    """The public function, called as the one without checks is: by position."""
    public = getattr(specexit_kernels, name)
    signature = inspect.signature(public)

    def run(*args: Any) -> Any:
        calls[name] += 1
        given = dict(zip(signature.parameters, args, strict=False))
        first = [given.pop(n) for n, p in signature.parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        return public(*first, **given)

    return run


def test_signatures_have_the_same_order() -> None:
    for name in unchecked.__all__:
        op = getattr(unchecked, name)
        names = list(inspect.signature(op.reference).parameters)
        assert [*names, "implementation"] == list(inspect.signature(getattr(specexit_kernels, name)).parameters)


@pytest.mark.parametrize("signals", [True, False], ids=["signals", "no-signals"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_decoders_arguments_pass(tree: TreeConfig, signals: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=torch.float32, tree=tree)
    exit = ExitConfig() if signals else ExitConfig.off()
    ids = torch.tensor([[1, 5, 9, 7, 30], [1, 4, 8, 8, 2]])
    options = {"max_new_tokens": 12, "temperature": 0.0, "exit": exit}
    expected = decoder.generate(ids, **options)
    calls: Counter[str] = Counter()
    for name in unchecked.__all__:
        monkeypatch.setattr(unchecked, name, checked(name, calls))
    assert decoder.generate(ids, **options).new_tokens == expected.new_tokens
    assert calls["tree_attention"] > 0
    assert (calls["draft_topk"] > 0) == (tree.nodes > 1 or signals)


def test_the_probe_checks_what_the_base_gives(monkeypatch: pytest.MonkeyPatch) -> None:

    seen = []
    check = attention.check_arguments

    def watch(*arguments: Any) -> None:
        seen.append(arguments[0].shape)
        check(*arguments)

    monkeypatch.setattr(attention, "check_arguments", watch)
    decoder = SpecExitDecoder.from_pretrained(bundled_pair().base)
    assert len(seen) == decoder.base.config.num_hidden_layers
    decoder.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2)
    assert len(seen) == decoder.base.config.num_hidden_layers
