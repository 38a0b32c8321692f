"""Sampled text is that of plain sampling with the same row seeds, for every tree shape and batch."""

from __future__ import annotations

import pytest
import torch
from oracle_draft import OracleDraft
from test_lossless import TREES, pad, prompts
from tiny_models import tiny_model

from specexit import ExitConfig, SpecExitDecoder, TreeConfig

NEW = 24
OPTIONS = {
    "temperature": {"temperature": 0.8, "top_k": 0},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_text_does_not_depend_on_tree_or_batch(name: str, options: dict[str, float], rng: torch.Generator) -> None:
    model = tiny_model(name)
    rows = prompts(rng, [5, 18, 1, 9])
    ids, mask = pad(rows, "left")
    seeds = torch.randint(2**62, (len(rows),), generator=rng).tolist()
    plain = SpecExitDecoder(model, exit=ExitConfig.off())
    expected = plain.generate(ids, mask, max_new_tokens=NEW, seed=seeds, tree=TreeConfig.none(), **options).new_tokens
    texts = [row.tolist() + new for row, new in zip(rows, expected, strict=True)]
    decoder = SpecExitDecoder(model, OracleDraft(texts), exit=ExitConfig.off())
    deepest = 0
    for label, tree in TREES.items():
        out = decoder.generate(ids, mask, max_new_tokens=NEW, seed=seeds, tree=tree, **options)
        assert out.new_tokens == expected, label
        deepest = max(deepest, *(max(stats.accepted) for stats in out.stats))
    assert deepest > 2, "no step accepted more than one draft token"
    for index, row in enumerate(rows):
        alone = SpecExitDecoder(model, OracleDraft(texts[index : index + 1]), exit=ExitConfig.off())
        out = alone.generate(row[None], max_new_tokens=NEW, seed=seeds[index : index + 1], tree=TREES["12"], **options)
        assert out.new_tokens == expected[index : index + 1]


def test_duplicate_prompts_get_different_samples(rng: torch.Generator) -> None:
    model = tiny_model("llama")
    ids = prompts(rng, [7])[0].expand(4, -1)
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    texts = decoder.generate(ids, max_new_tokens=NEW, temperature=1.0, seed=11).new_tokens
    assert len({tuple(text) for text in texts}) == 4
    assert decoder.generate(ids, max_new_tokens=NEW, temperature=1.0, seed=11).new_tokens == texts
    assert decoder.generate(ids, max_new_tokens=NEW, temperature=1.0, seed=12).new_tokens != texts


def test_first_token_is_distributed_as_the_model_says(rng: torch.Generator) -> None:
    """Thousands of rows with one prompt: a chi-square test of the decoder's own draws against softmax."""
    model = tiny_model("qwen2")
    prompt = prompts(rng, [6])[0]
    rows, rounds = 500, 8
    with torch.no_grad():
        exact = (model(prompt[None]).logits[0, -1].double() / 0.9).softmax(-1)
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    counts = torch.zeros(exact.shape[0], dtype=torch.float64)
    for seed in torch.randint(2**62, (rounds,), generator=rng).tolist():
        out = decoder.generate(
            prompt.expand(rows, -1), max_new_tokens=1, temperature=0.9, top_k=0, seed=seed, tree=TreeConfig.none()
        )
        counts += torch.bincount(torch.tensor(out.new_tokens).flatten(), minlength=exact.shape[0])
    expected = exact * rows * rounds
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    chi_square = float(((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    freedom = len(wanted) - 1
    # Wilson and Hilferty's cube-root approximation; 4.75 standard deviations is a false alarm in a million runs.
    critical = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < critical
