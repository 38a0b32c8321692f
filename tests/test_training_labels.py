"""What the signals should say, which texts are read, and in which order."""

import math

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from training_cases import random_trace

from specexit.base import BaseModel
from specexit.training.data import BaseReader, Cache, order, select
from specexit.training.drafting import frequent_ids
from specexit.training.labels import labels_of


def options(**changes):
    return {"max_length": 64, "held_out": 0.0, "seed": 0, "boundary_weight": 4.0, "vocab_size": VOCAB} | changes


@pytest.mark.parametrize("ends_at_boundary", [True, False])
def test_labels_follow_their_definition(ends_at_boundary, rng):
    for _ in range(20):
        trace = random_trace(rng, ends_at_boundary=ends_at_boundary)
        labels = labels_of(trace, boundary_weight=3.0)
        assert labels.values.dtype == labels.weights.dtype == torch.float32
        assert len(labels.values) == len(labels.weights) == len(trace.thinking)
        for p in range(len(trace.thinking)):
            k = p + 1
            before = [q for q, n in enumerate(trace.boundaries) if n <= k]
            confidence = trace.probabilities[before[-1]] * trace.agrees[before[-1]] if before else 0.0
            left = max(0, trace.sufficient - k)
            expected = [confidence, min(1, k / trace.sufficient), math.log(1 + left)]
            assert labels.values[p].tolist() == pytest.approx(expected, rel=1e-6)
            weight = 3.0 if k in trace.boundaries else 1.0
            assert labels.weights[p].tolist() == [weight if before else 0.0, weight, weight]


def test_labels_of_one_token():
    trace = random_trace(torch.Generator().manual_seed(0), thinking=1)
    labels = labels_of(trace)
    assert trace.boundaries == [1]
    assert labels.values[0, 1:].tolist() == [1.0, 0.0]
    assert labels.weights.tolist() == [[4.0, 4.0, 4.0]]


@pytest.mark.parametrize("cut", [0, 1, 7, 1000])
def test_rows_are_what_a_draft_reads_there(cut, rng):
    trace = random_trace(rng, name="a")
    start, length = len(trace.prompt), len(trace.tokens)
    max_length = max(start + 2, length - cut)
    example = select([trace], **options(max_length=max_length)).train[0]
    tokens = trace.tokens[:max_length]
    assert example.tokens.tolist() == tokens
    labels = labels_of(trace)
    assert len(example.generated) == len(example.values) == len(tokens) - 1
    for row in range(len(tokens) - 1):
        assert example.generated[row] == (row + 2 >= start and row + 2 < len(tokens))
        p = row - start
        inside = 0 <= p < len(trace.thinking)
        assert example.weights[row].tolist() == (labels.weights[p].tolist() if inside else [0.0] * 3)
        if inside:
            assert example.values[row].tolist() == labels.values[p].tolist()


def test_what_is_left_out_is_counted(rng):
    good = [random_trace(rng, name=f"g{i}") for i in range(3)]
    long = random_trace(rng, name="long", thinking=200)
    wide = random_trace(rng, name="wide", prompt=63)
    uncut = random_trace(rng, name="uncut", boundaries=[])
    flawed = random_trace(rng, name="flawed", flaw="no end")
    chosen = select([*good, long, wide, uncut, flawed, flawed], **options())
    lost = len(long.tokens) - 64
    assert chosen.counts() == {
        "train": 4, "held_out": 0, "flawed": 2, "uncut": 1, "too_long": 1, "truncated": 1, "lost_tokens": lost
    }  # fmt: skip


@pytest.mark.parametrize(
    ("traces", "changes", "message"),
    [
        ([], {}, "traces must hold one that can be used, held 0"),
        ([{"flaw": "x"}, {"boundaries": []}], {}, "held 2: 1 with a flaw, 1 without a boundary"),
        ([{"prompt": 9}], {"max_length": 10}, "max_length must leave room .* at least 9 tokens, was 10"),
        ([{"name": "p"}], {"vocab_size": 3}, "ids of the base's vocabulary of 3, not so 'p'"),
    ],
)
def test_nothing_to_train_on_is_an_error(traces, changes, message, rng):
    with pytest.raises(ValueError, match=message):
        select([random_trace(rng, **trace) for trace in traces], **options(**changes))


def test_held_out_problems_are_whole_and_stable(rng):
    traces = [random_trace(rng, name=f"p{i // 3}", sample=i % 3) for i in range(60)]
    chosen = select(traces, **options(held_out=0.25))
    train, aside = ({e.problem for e in part} for part in (chosen.train, chosen.held_out))
    assert len(aside) == 5 and len(chosen.held_out) == 15  # noqa: PT018
    assert not train & aside
    again = select(traces[::-1][:-3], **options(held_out=0.25))  # another order, one problem fewer
    assert len({e.problem for e in again.held_out} & aside) >= 4
    assert {e.problem for e in select(traces, **options(held_out=0.25, seed=1)).held_out} != aside
    assert len(select(traces[:6], **options(held_out=0.01)).held_out) == 3  # one problem at least
    assert not select(traces[:3], **options(held_out=0.9)).held_out  # one problem only


@pytest.mark.parametrize(("count", "batch"), [(40, 8), (43, 8), (8, 8), (3, 8), (1, 4), (5, 1)])
def test_an_epoch_is_a_function_of_seed_and_number(count, batch, rng):
    lengths = torch.randint(5, 500, (count,), generator=rng).tolist()
    batches = order(lengths, batch, 1, 2)
    assert batches == order(lengths, batch, 1, 2)
    assert all(len(part) == batch for part in batches)
    seen = [index for part in batches for index in part]
    if count >= batch:
        assert len(seen) == len(set(seen)) == count // batch * batch
    else:
        assert set(seen) == set(range(count))
    if count > 8:
        assert batches != order(lengths, batch, 1, 3)
        assert batches != order(lengths, batch, 2, 2)


def test_batches_hold_texts_of_about_one_length(rng):
    lengths = torch.randint(1, 1000, (400,), generator=rng).tolist()
    batches = order(lengths, 8, 0, 0)
    spread = sum(max(lengths[i] for i in part) - min(lengths[i] for i in part) for part in batches) / len(batches)
    assert spread < 250  # at random: 780
    firsts = [lengths[part[0]] for part in batches]
    assert firsts != sorted(firsts)


def test_no_trace_is_always_left_over():
    lengths = [10] * 8 + [1000]
    seen = {index for epoch in range(40) for part in order(lengths, 8, 0, epoch) for index in part}
    assert seen == set(range(9))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_oss", "qwen2_window"])
def test_the_reader_sees_what_the_model_gives(name, rng):
    model = tiny_model(name)
    base = BaseModel(model, (1, 3, 3))
    tokens = torch.randint(VOCAB, (40,), generator=rng)
    ids = torch.randperm(VOCAB, generator=rng)[:50].sort().values
    model.train()
    whole, some = BaseReader(base, None)(tokens), BaseReader(base, ids)(tokens)
    assert model.training
    model.eval()
    with torch.no_grad():
        out = model(tokens.unsqueeze(0), output_hidden_states=True)
    states = out.hidden_states  # the input of layer i is state i
    torch.testing.assert_close(whole.features, torch.cat([states[i][0, :-1] for i in (1, 3, 3)], -1))
    torch.testing.assert_close(whole.targets, out.logits[0, 1:])
    torch.testing.assert_close(some.targets, out.logits[0, 1:][:, ids])
    assert whole.covered.all()
    assert some.covered.tolist() == [int(best) in ids.tolist() for best in out.logits[0, 1:].argmax(-1)]
    assert not whole.features.requires_grad
    assert not any(layer._forward_pre_hooks for layer in base.layers)


def test_features_are_those_that_decoding_reads(rng):
    model = tiny_model("qwen3")
    base = BaseModel(model, None)
    tokens = torch.randint(VOCAB, (1, 20), generator=rng, dtype=torch.int32)
    lengths = torch.zeros(1, dtype=torch.int32)
    from specexit.attention import chain_context
    from specexit.base import probe

    probe(base)
    with base.attached(), torch.no_grad():
        _, features = base.forward(tokens, chain_context(lengths, 20, start=0), base.new_cache(lengths, 32))
    torch.testing.assert_close(BaseReader(base, None)(tokens[0].long()).features, features[0, :-1])


def test_the_cache_stays_within_its_bytes():
    cache, reads = Cache(100), []

    def read(index):
        reads.append(index)
        return {"x": torch.full((10,), float(index))}  # 40 bytes

    for _ in range(2):
        for index in range(4):
            assert cache.get(index, lambda index=index: read(index))["x"][0] == index
    assert cache.nbytes == 80
    assert reads == [0, 1, 2, 3, 2, 3]
    nothing = Cache(0)
    nothing.get(0, lambda: read(0))
    assert nothing.nbytes == 0


def test_frequent_ids_are_counted_in_generated_tokens(rng):
    traces = [random_trace(rng, name=str(i)) for i in range(3)]
    examples = select(traces, **options(max_length=500)).train
    counts = [0] * VOCAB
    for trace in traces:
        for token in [*trace.thinking, *trace.reply]:
            counts[token] += 1
    for size in (1, 10, VOCAB - 1):
        wanted = sorted(range(VOCAB), key=lambda i: (-counts[i], i))[:size]
        assert frequent_ids(examples, VOCAB, size).tolist() == sorted(wanted)
    assert frequent_ids(examples, VOCAB, VOCAB) is None
