"""The unrolled forward is what decoding computes: step 0 is `observe`, and the steps after it are `propose`'s chain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_reference import CONFIG, random_tensors, write_checkpoint
from torch import Tensor, nn

from specexit.config import TreeConfig
from specexit.drafts import Eagle3Draft, load_draft
from specexit.training.unroll import Unroll, attend_chains

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "reduced vocabulary": {"draft_vocab_size": 13},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "yarn rope": {"rope_scaling": YARN},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "normed residual": {"norm_before_residual": True},
    "narrow": {"target_hidden_size": 20},
    "one signal in fc": {"early_stop_method": "progress"},
    "no signals": {"early_stop_method": None, "exit_head": None},
}
ROWS, DEPTH = 23, 5


def make_draft(folder: Path, rng: torch.Generator, changes: dict[str, Any]) -> tuple[Eagle3Draft, Tensor, Tensor]:
    """A draft in float64, features [B, R + 1, 3 Ht] and texts [B, R + 1 + DEPTH] of its base."""
    config = CONFIG | changes
    write_checkpoint(folder, config, random_tensors(config, rng))
    table = torch.randn(config["vocab_size"], config["hidden_size"], generator=rng, dtype=torch.float64)
    draft = load_draft(folder, embedding=nn.Embedding.from_pretrained(table))
    width = 3 * config.get("target_hidden_size", config["hidden_size"])
    features = torch.randn(2, ROWS, width, generator=rng, dtype=torch.float64)
    tokens = torch.randint(config["vocab_size"], (2, ROWS + DEPTH + 1), generator=rng)
    return draft, features, tokens


def logprobs(draft: Eagle3Draft, hidden: Tensor) -> Tensor:
    return (hidden @ draft.lm_head.T).log_softmax(-1)


def near(actual: Tensor, expected: Tensor) -> None:
    """float32 is the least that decoding promises of scores and signals."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_step_0_is_observe(name, tmp_path, rng):
    draft, features, tokens = make_draft(tmp_path, rng, VARIANTS[name])
    unrolled = Unroll(draft)(features, tokens[:, 1 : ROWS + 1], 1)
    start, last = torch.zeros(2, dtype=torch.int32), torch.tensor([ROWS - 1, 4], dtype=torch.int32)
    for source in ("fc", "output"):
        if not (draft.config.fc_signals if source == "fc" else draft.config.exit_head):
            continue
        draft.select_source(source)
        batch = draft.allocate(2, ROWS + 8, TreeConfig.chain(1), "cpu", torch.float64)
        signals = batch.observe(features, tokens[:, 1 : ROWS + 1].int(), start, last)
        mine = unrolled.fc if source == "fc" else unrolled.output
        near(mine, signals[..., signals.shape[-1] - mine.shape[-1] :])
    if draft.config.exit_head is None:
        assert unrolled.output is None
    if not draft.config.fc_signals:
        assert unrolled.fc.shape == (2, ROWS, 0)
    draft.select_source(None)
    batch = draft.allocate(2, ROWS + 8, TreeConfig.chain(1), "cpu", torch.float64)
    batch.observe(features, tokens[:, 1 : ROWS + 1].int(), start, last)
    root = tokens[torch.arange(2), last.long() + 1].int()
    candidates = batch.propose(root, last + 1)
    best, which = logprobs(draft, unrolled.hidden[0][torch.arange(2), last.long()]).max(-1)
    near(candidates.scores[:, 0], best)
    offset = 0 if draft.d2t is None else draft.d2t[which]
    assert torch.equal(candidates.tokens[:, 0].long(), which + offset)


@pytest.mark.parametrize("name", VARIANTS)
def test_later_steps_are_the_chain_that_propose_grows(name, tmp_path, rng):
    draft, features, tokens = make_draft(tmp_path, rng, VARIANTS[name])
    draft.select_source(None)
    anchors = torch.tensor([ROWS - 1, int(torch.randint(ROWS - DEPTH, (), generator=rng))])
    batch = draft.allocate(2, ROWS + 2 * DEPTH, TreeConfig.chain(DEPTH), "cpu", torch.float64)
    batch.observe(features, tokens[:, 1 : ROWS + 1].int(), torch.zeros(2, dtype=torch.int32), anchors.int())
    rows = torch.arange(2)
    candidates = batch.propose(tokens[rows, anchors + 1].int(), anchors.int() + 1)
    # The text goes on as the draft proposes, so that its chain reads what the unrolled rows read.
    for step in range(DEPTH):
        tokens[rows, anchors + 2 + step] = candidates.tokens[:, step].long()
    pad = torch.randn(2, DEPTH, features.shape[-1], generator=rng, dtype=torch.float64)  # no anchor sees these
    unrolled = Unroll(draft)(torch.cat((features, pad), 1), tokens[:, 1:], DEPTH)
    score = torch.zeros(2, dtype=torch.float64)
    for step, hidden in enumerate(unrolled.hidden):
        ids = candidates.tokens[:, step].long()
        if draft.d2t is not None:
            target = torch.arange(len(draft.d2t)) + draft.d2t
            ids = (target == ids.unsqueeze(1)).long().argmax(1)
        score = score + logprobs(draft, hidden[rows, anchors])[rows, ids]
        near(candidates.scores[:, step], score)


def test_padding_and_batch_change_no_row(tmp_path, rng):
    draft, features, tokens = make_draft(tmp_path, rng, {})
    whole = Unroll(draft)(features, tokens[:, 1 : ROWS + 1], 4)
    tokens[:, 11:] = 7
    features[:, 10:] = 1e3
    padded = Unroll(draft)(features, tokens[:, 1 : ROWS + 1], 4)
    alone = Unroll(draft)(features[:1, :10], tokens[:1, 1:11], 4)
    for step in range(4):
        torch.testing.assert_close(padded.hidden[step][:, : 10 - step], whole.hidden[step][:, : 10 - step])
        torch.testing.assert_close(alone.hidden[step][0, : 10 - step], whole.hidden[step][0, : 10 - step])


@pytest.mark.parametrize("rows", [1, 2, 13])
@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_chain_attention_is_attention_with_a_list_of_visible_rows(heads, kv_heads, steps, rows, rng):
    def random(count: int) -> Tensor:
        return torch.randn(2, count, rows, 6, generator=rng, dtype=torch.float64, requires_grad=True)

    query, keys, values = (
        random(heads),
        [random(kv_heads) for _ in range(steps)],
        [random(kv_heads) for _ in range(steps)],
    )
    out = torch.empty(2, heads, rows, 6, dtype=torch.float64)
    expected = []
    for h in range(heads):
        k = h * kv_heads // heads
        for t in range(rows):
            seen = [keys[0][:, k, s] for s in range(t + 1)] + [keys[j][:, k, t] for j in range(1, steps)]
            read = [values[0][:, k, s] for s in range(t + 1)] + [values[j][:, k, t] for j in range(1, steps)]
            scores = torch.stack([(query[:, h, t] * key).sum(-1) for key in seen], -1) / 6**0.5
            expected.append((scores.softmax(-1).unsqueeze(-1) * torch.stack(read, 1)).sum(1))
    expected = torch.stack(expected, 1).unflatten(1, (heads, rows))
    grad = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    leaves = [query, *keys, *values]
    wanted = torch.autograd.grad(expected, leaves, grad)
    # At once, in blocks of a few queries, and of one.
    for held in (2**20, 2 * heads * rows * 3, 1):
        attended = attend_chains(query, keys, values, held)
        torch.testing.assert_close(attended, expected)
        torch.testing.assert_close(torch.autograd.grad(attended, leaves, grad), wanted)


def test_blocks_give_the_same_draft_gradients(tmp_path, rng):
    draft, features, tokens = make_draft(tmp_path, rng, {"attention_bias": True, "mlp_bias": True})
    draft.requires_grad_(True)
    results = []
    for held in (2**20, 2 * 4 * ROWS * 5):
        unrolled = Unroll(draft, held)(features, tokens[:, 1 : ROWS + 1], 4)
        loss = sum(hidden.square().sum() * (i + 1) for i, hidden in enumerate(unrolled.hidden))
        loss = loss + unrolled.fc.double().square().sum() + unrolled.output.double().square().sum()
        parameters = {name: p for name, p in draft.named_parameters() if name != "lm_head"}
        results.append((loss, torch.autograd.grad(loss, list(parameters.values()))))
    torch.testing.assert_close(results[0], results[1])
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1])


def test_the_embedding_gets_no_gradient(tmp_path, rng):
    draft, features, tokens = make_draft(tmp_path, rng, {})
    draft.requires_grad_(True)
    draft.embedding.weight.requires_grad_(True)
    Unroll(draft)(features, tokens[:, 1 : ROWS + 1], 2).hidden[1].sum().backward()
    assert draft.embedding.weight.grad is None
    assert draft.qkv_weight.grad is not None
