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
from specexit.drafts import eagle3_batch
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
        names = list(inspect.signature(op.twin.function).parameters)
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


def test_every_batch_begins_with_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for module, name in (
        (attention, "check_arguments"),
        (eagle3_batch, "check_tree_attention"),
        (eagle3_batch, "check_draft_topk"),
    ):
        check = getattr(module, name)

        def watch(*arguments: Any, name: str = name, check: Callable[..., None] = check) -> None:
            seen.append(name)
            check(*arguments)

        monkeypatch.setattr(module, name, watch)
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, tree=TreeConfig.chain(3))
    layers = decoder.base.config.num_hidden_layers
    assert seen == ["check_arguments"] * layers, "the probe"
    for _ in range(2):
        seen.clear()
        decoder.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=9)
        assert seen == ["check_arguments"] * layers + ["check_tree_attention", "check_draft_topk"]


def test_a_draft_that_was_altered_is_refused() -> None:
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft)
    decoder.draft.lm_head = torch.nn.Parameter(decoder.draft.lm_head.t().contiguous().t(), requires_grad=False)
    with pytest.raises(ValueError, match="lm_head must have stride 1 in its last axis"):
        decoder.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=9)
