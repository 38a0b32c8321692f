"""The EAGLE-3 draft against a float64 forward that reads its file one row at a time (tests/eagle3_reference.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_reference import CONFIG, Reference, Row, random_tensors, write_checkpoint
from safetensors.torch import load_file
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from specexit.bundled import bundled_pair, load_problems
from specexit.config import TreeConfig
from specexit.drafts import Eagle3Draft, load_draft
from specexit.drafts.eagle3_batch import Eagle3Batch
from specexit.drafts.rope import RopeTable
from specexit_kernels.state import SIGNALS

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "reduced vocabulary": {"draft_vocab_size": 13},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "normed residual": {"norm_before_residual": True},
    "narrow": {"target_hidden_size": 20},
}
CAPACITY = 64


@dataclass
class Case:
    """A draft, its reference, and one text for each of B rows: features of every position, and tokens."""

    draft: Eagle3Draft
    reference: Reference
    features: Tensor  # [B, n, 3 Ht]
    tokens: Tensor  # [B, n + 1] int32
    batch: Eagle3Batch | None = None  # the draft at work on them

    def rows(self, b: int, count: int) -> list[Row]:
        """The reference's rows 0 to count - 1 of text b."""
        return self.reference.read(self.features[b], self.tokens[b, 1 : count + 1].tolist())


def make_case(
    folder: Path, rng: torch.Generator, changes: dict[str, Any] | None = None, *, batch: int = 3, **options: Any
) -> Case:
    config = CONFIG | (changes or {})
    write_checkpoint(folder, config, random_tensors(config, rng))
    table = torch.randn(config["vocab_size"], config["hidden_size"], generator=rng, dtype=torch.float64)
    draft = load_draft(folder, embedding=nn.Embedding.from_pretrained(table), **options)
    width = 3 * config.get("target_hidden_size", config["hidden_size"])
    features = torch.randn(batch, 40, width, generator=rng, dtype=torch.float64)
    tokens = torch.randint(config["vocab_size"], (batch, 41), generator=rng, dtype=torch.int32)
    return Case(draft, Reference(folder, table), features, tokens)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def allocate(case: Case, tree: TreeConfig, batch: int | None = None) -> None:
    case.batch = case.draft.allocate(batch or len(case.tokens), CAPACITY, tree, "cpu", torch.float64)


def read(case: Case, start: list[int], count: int) -> None:
    """Rows start[b] to start[b] + count - 1 of every text."""
    features = torch.stack([case.features[b, s : s + count] for b, s in enumerate(start)])
    tokens = torch.stack([case.tokens[b, s + 1 : s + 1 + count] for b, s in enumerate(start)])
    case.batch.read(features, tokens, ints(*start))


def observe(case: Case, start: list[int], last: list[int], tree: TreeConfig, junk: float = float("nan")) -> Tensor:
    """Rows start[b] to start[b] + last[b] in a decode step's shape; the padding behind them is junk."""
    R = tree.max_depth + 2
    features = torch.full((len(start), R, case.features.shape[-1]), junk, dtype=torch.float64)
    tokens = torch.zeros(len(start), R, dtype=torch.int32)
    for b, (s, n) in enumerate(zip(start, last, strict=True)):
        features[b, : n + 1] = case.features[b, s : s + n + 1]
        tokens[b, : n + 1] = case.tokens[b, s + 1 : s + n + 2]
    return case.batch.observe(features, tokens, ints(*start), ints(*last))


def check_signals(case: Case, signals: Tensor, start: list[int], last: list[int]) -> None:
    assert signals.dtype == torch.float32
    for b, (s, n) in enumerate(zip(start, last, strict=True)):
        rows = case.rows(b, s + n + 1)[s:]
        if case.draft.source == "output":
            expected = torch.stack([case.reference.exit_signals(row) for row in rows])
        else:
            expected = torch.stack([case.reference.project(case.features[b, p])[1] for p in range(s, s + n + 1)])
        assert_signals(signals[b, : n + 1], expected)


def assert_signals(actual: Tensor, expected: Tensor) -> None:
    """Within float32's tolerance, relative to the largest: a small signal is the difference of large terms."""
    scale = expected.abs().max().clamp(min=1)
    assert_close(actual / scale, expected / scale, torch.float32)


def check_candidates(case: Case, lengths: list[int], tree: TreeConfig) -> None:
    root = case.tokens[torch.arange(len(lengths)), torch.tensor(lengths)]
    candidates = case.batch.propose(root, ints(*lengths))
    assert [x.dtype for x in candidates] == [torch.int32, torch.float32, torch.int32]
    assert candidates.tokens.shape == (len(lengths), tree.candidates)
    for b, n in enumerate(lengths):
        case.reference.check_candidates(
            case.rows(b, n), *(x[b].tolist() for x in candidates), k=tree.top_k, depth=tree.max_depth
        )


@pytest.mark.parametrize("source", ["fc", "output"])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_steps_match_the_reference(name, source, tmp_path, rng):
    """Ragged prompts, a step, and the step after it, which must not see what the first one left behind."""
    case = make_case(tmp_path, rng, VARIANTS[name], source=source)
    tree = TreeConfig(nodes=20, depth=4, top_k=2)
    allocate(case, tree)
    read(case, [0, 0, 0], 5)  # of the shorter prompts, rows that are read again below
    start, last = [2, 5, 4], [0, 3, 5]
    for _ in range(2):
        signals = observe(case, start, last, tree)
        check_signals(case, signals, start, last)
        start = [s + n for s, n in zip(start, last, strict=True)]
        check_candidates(case, [s + 1 for s in start], tree)
        last = [5, 0, 2]


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_levels_match_the_reference(top_k, depth, tmp_path, rng):
    case = make_case(tmp_path, rng, {"draft_vocab_size": 17}, batch=2)
    tree = TreeConfig(nodes=256, depth=depth, top_k=top_k)
    allocate(case, tree)
    read(case, [0, 0], 6)
    observe(case, [5, 3], [0, 1], tree)
    check_candidates(case, [6, 5], tree)


def test_prompt_in_pieces_is_the_prompt_at_once(tmp_path, rng):
    case = make_case(tmp_path, rng)
    tree = TreeConfig.chain(4)
    results = []
    for pieces in ([20], [1, 6, 13], [7, 7, 6]):
        allocate(case, tree)
        at = 0
        for piece in pieces:
            read(case, [at] * 3, piece)
            at += piece
        signals = observe(case, [20, 20, 20], [2, 2, 2], tree)
        check_candidates(case, [23, 23, 23], tree)
        results.append(signals[:, :3])
    for other in results[1:]:
        assert_signals(other, results[0])


def test_read_leaves_what_observe_leaves(tmp_path, rng):
    case = make_case(tmp_path, rng)
    tree = TreeConfig.chain(3)
    signals = []
    for reader in ("read", "observe"):
        allocate(case, tree)
        if reader == "read":
            read(case, [0, 0, 0], 9)
        else:
            case.batch.observe(case.features[:, :9], case.tokens[:, 1:10], ints(0, 0, 0), ints(8, 8, 8))
        signals.append(observe(case, [9, 9, 9], [1, 1, 1], tree)[:, :2])
    assert_signals(signals[0], signals[1])


def test_long_prompt_in_one_piece(tmp_path, rng):
    case = make_case(tmp_path, rng, batch=1)
    n = 200
    case.features = torch.randn(1, n + 1, case.features.shape[-1], generator=rng, dtype=torch.float64)
    case.tokens = torch.randint(40, (1, n + 2), generator=rng, dtype=torch.int32)
    tree = TreeConfig.chain(1)
    case.batch = case.draft.allocate(1, n + 1, tree, "cpu", torch.float64)
    read(case, [0], n)
    signals = observe(case, [n], [0], tree)
    rows = case.rows(0, n + 1)
    assert_signals(signals[0, 0], case.reference.exit_signals(rows[-1]))


@pytest.mark.parametrize("top_k", [1, 3])
def test_junk_of_earlier_steps_is_invisible(top_k, tmp_path, rng):
    """NaN rows behind `last`, and levels written over them: nothing of it reaches a later step."""
    case = make_case(tmp_path, rng)
    tree = TreeConfig(nodes=30, depth=4, top_k=top_k)
    allocate(case, tree)
    read(case, [0, 0, 0], 4)
    clean = observe(case, [4, 4, 4], [0, 1, 2], tree, junk=0.0)
    check_candidates(case, [5, 6, 7], tree)
    allocate(case, tree)
    read(case, [0, 0, 0], 4)
    dirty = observe(case, [4, 4, 4], [0, 1, 2], tree)
    check_candidates(case, [5, 6, 7], tree)
    for b in range(3):
        assert_signals(dirty[b, : b + 1], clean[b, : b + 1])
    start, last = [4, 5, 6], [1, 5, 0]
    check_signals(case, observe(case, start, last, tree), start, last)


@pytest.mark.parametrize("source", ["fc", "output"])
def test_without_speculation_only_signals(source, tmp_path, rng):
    case = make_case(tmp_path, rng, source=source)
    tree = TreeConfig.none()
    allocate(case, tree)
    read(case, [0, 0, 0], 6)
    start, last = [5, 3, 6], [1, 1, 0]
    check_signals(case, observe(case, start, last, tree), start, last)
    candidates = case.batch.propose(ints(1, 2, 3), ints(7, 5, 7))
    assert [x.shape for x in candidates] == [(3, 0)] * 3
    assert [x.dtype for x in candidates] == [torch.int32, torch.float32, torch.int32]


@pytest.mark.parametrize(("method", "column"), [("confidence", 0), ("progress", 1), ("remain", 2)])
def test_one_signal_stands_in_its_column(method, column, tmp_path, rng):
    case = make_case(tmp_path, rng, {"early_stop_method": method, "exit_head": None})
    assert case.draft.source == "fc"
    assert case.draft.signals == (SIGNALS[column],)
    tree = TreeConfig.chain(2)
    allocate(case, tree)
    signals = observe(case, [0, 0, 0], [0, 0, 0], tree)[:, 0]
    expected = torch.full((3, column + 1), float("nan"), dtype=torch.float64)
    for b in range(3):
        expected[b, column] = case.reference.project(case.features[b, 0])[1]
    assert_close(signals, expected, torch.float32)


def test_draft_without_signals(tmp_path, rng):
    case = make_case(tmp_path, rng, {"early_stop_method": None, "exit_head": None})
    assert (case.draft.source, case.draft.signals) == (None, ())
    tree = TreeConfig(nodes=10, depth=2, top_k=2)
    allocate(case, tree)
    assert observe(case, [0, 0, 0], [1, 2, 3], tree).shape == (3, 4, 0)
    check_candidates(case, [2, 3, 4], tree)
    allocate(case, TreeConfig.none())
    assert observe(case, [0, 0, 0], [1, 1, 1], TreeConfig.none()).shape == (3, 2, 0)


def test_auto_prefers_the_output(tmp_path, rng):
    assert make_case(tmp_path / "both", rng).draft.source == "output"
    assert make_case(tmp_path / "fc", rng, {"exit_head": None}).draft.source == "fc"


def test_source_can_be_chosen_later(tmp_path, rng):
    case = make_case(tmp_path, rng)
    for source, names in (("fc", SIGNALS), (None, ()), ("output", SIGNALS), ("auto", SIGNALS)):
        case.draft.select_source(source)
        assert case.draft.signals == names
        tree = TreeConfig.chain(2)
        allocate(case, tree)
        signals = observe(case, [0, 0, 0], [1, 1, 1], tree)
        assert signals.shape == (3, 4, len(names))
        if source is not None:
            check_signals(case, signals, [0, 0, 0], [1, 1, 1])
        check_candidates(case, [2, 2, 2], tree)
    with pytest.raises(ValueError, match="source must be"):
        case.draft.select_source("head")


def test_calibration_is_what_the_config_says(tmp_path, rng):
    thresholds = {"thresholds_from_calibration": {"no_loss": {"conf": 0.5}}}
    calibration = make_case(tmp_path / "with", rng, {"exit_head": thresholds}).draft.calibration
    exit = {"confidence": 0.5, "progress": None, "remaining": None, "source": "output"}
    assert (calibration["default"], calibration["rules"]["no_loss"]["exit"]) == ("no_loss", exit)
    assert make_case(tmp_path / "without", rng, {"exit_head": None}).draft.calibration == {}


def test_grow_keeps_what_was_read(tmp_path, rng):
    case = make_case(tmp_path, rng)
    tree = TreeConfig(nodes=12, depth=3, top_k=2)
    case.batch = case.draft.allocate(3, 6, tree, "cpu", torch.float64)
    read(case, [0, 0, 0], 5)
    case.batch.grow(20)
    read(case, [5, 5, 5], 15)
    start, last = [20, 19, 18], [1, 2, 4]
    check_signals(case, observe(case, start, last, tree), start, last)
    check_candidates(case, [22, 22, 23], tree)


def test_slots_suffice_for_the_longest_row(tmp_path, rng):
    """A row at its capacity: neither the chain nor the levels may reach past the cache."""
    for tree in (TreeConfig.chain(5), TreeConfig(nodes=40, depth=4, top_k=3), TreeConfig.none()):
        case = make_case(tmp_path, rng, batch=1)
        case.batch = case.draft.allocate(1, 8, tree, "cpu", torch.float64)
        read(case, [0], 7)
        check_signals(case, observe(case, [7], [0], tree), [7], [0])
        check_candidates(case, [8], tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["fc", "output"])
def test_bundled_draft_matches_the_reference(source, dtype, rng):
    """The file that is shipped, on features of real size, in the dtypes of use."""
    pair = bundled_pair()
    table = load_file(pair.base / "model.safetensors")["model.embed_tokens.weight"].to(dtype)
    draft = load_draft(pair.draft, embedding=nn.Embedding.from_pretrained(table), source=source)
    tree = TreeConfig(nodes=30, depth=3, top_k=4)
    features = torch.randn(1, 12, 384, generator=rng).to(dtype)
    tokens = torch.randint(62, (1, 13), generator=rng, dtype=torch.int32)
    batch = draft.allocate(1, 32, tree, "cpu", dtype)
    batch.read(features[:, :8], tokens[:, 1:9], ints(0))
    signals = batch.observe(features[:, 8:12], tokens[:, 9:13], ints(8), ints(3))

    reference = Reference(pair.draft, table)
    rows = reference.read(features[0], tokens[0, 1:].tolist())
    if source == "output":
        expected = torch.stack([reference.exit_signals(row) for row in rows[8:]])
    else:
        expected = torch.stack([reference.project(features[0, p])[1] for p in range(8, 12)])
    # Through the layer rounding adds up: a few times the error of one op, relative to the signals' own size.
    error = (signals[0] - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    if dtype == torch.float32:
        candidates = batch.propose(tokens[:, 12], ints(12))
        reference.check_candidates(rows, *(x[0].tolist() for x in candidates), k=4, depth=3)


class NoSync(TorchDispatchMode):
    """Fails on what would wait for a device: reading a value, or a shape that follows from values."""

    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.SYNCS), func
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["fc", "output"])
@pytest.mark.parametrize("tree", [TreeConfig.none(), TreeConfig.chain(3), TreeConfig(nodes=9, depth=3, top_k=2)])
def test_a_step_never_waits_for_the_device(tree, source, tmp_path, rng):
    case = make_case(tmp_path, rng, {"draft_vocab_size": 20}, source=source)
    allocate(case, tree)
    R = tree.max_depth + 2
    features, tokens = case.features[:, :R].contiguous(), case.tokens[:, 1 : R + 1].contiguous()
    start, last, root, lengths = ints(0, 3, 1), ints(0, 1, 0), ints(1, 2, 3), ints(1, 5, 2)
    with NoSync():
        case.batch.read(features, tokens, start)
        case.batch.observe(features, tokens, start, last)
        case.batch.propose(root, lengths)


def test_steps_in_inference_mode_and_with_gradients_on(tmp_path, rng):
    case = make_case(tmp_path, rng)
    case.draft.embedding.weight.requires_grad_(True)  # as in a base that was just loaded
    tree = TreeConfig(nodes=9, depth=3, top_k=2)
    allocate(case, tree)
    read(case, [0, 0, 0], 3)
    with torch.inference_mode():
        inside = observe(case, [3, 3, 3], [1, 1, 1], tree)
    outside = observe(case, [3, 3, 3], [1, 1, 1], tree)
    assert not outside.requires_grad
    assert torch.equal(inside[:, :2], outside[:, :2])


def test_embedding_stays_the_bases(tmp_path, rng):
    case = make_case(tmp_path, rng)
    embedding = case.draft.embedding
    assert not any(parameter is embedding.weight for parameter in case.draft.parameters())
    case.draft.float()
    assert embedding.weight.dtype == torch.float64


def test_embedding_that_does_not_fit_is_refused(tmp_path, rng):
    folder = write_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG, rng))
    with pytest.raises(ValueError, match=r"another vocabulary: vocab_size is 40, the base's embedding has 41 rows"):
        load_draft(folder, embedding=nn.Embedding(41, 16))
    with pytest.raises(ValueError, match=r"hidden_size 16 in its last axis, was 18"):
        load_draft(folder, embedding=nn.Embedding(40, 18))
    with pytest.raises(ValueError, match="embedding must be a token embedding"):
        load_draft(folder, embedding=nn.Identity())


@pytest.mark.parametrize("source", ["fc", "output"])
def test_absent_source_is_refused(source, tmp_path, rng):
    config = CONFIG | {"early_stop_method": None, "exit_head": None}
    folder = write_checkpoint(tmp_path, config, random_tensors(config, rng))
    with pytest.raises(ValueError, match=f"source '{source}': this draft has no exit signals there"):
        load_draft(folder, embedding=nn.Embedding(40, 16), source=source)


def test_unknown_source_is_refused(tmp_path, rng):
    with pytest.raises(ValueError, match="source must be 'fc', 'output' or 'auto', was 'head'"):
        make_case(tmp_path, rng, source="head")


def test_allocate_checks_what_it_is_given(tmp_path, rng):
    case = make_case(tmp_path, rng, {"draft_vocab_size": 4})
    with pytest.raises(ValueError, match=r"dtype must be the draft's, torch.float64, was torch.float32"):
        case.draft.allocate(1, 8, TreeConfig.chain(1), "cpu", torch.float32)
    with pytest.raises(ValueError, match="device must be the draft's, cpu, was meta"):
        case.draft.allocate(1, 8, TreeConfig.chain(1), "meta", torch.float64)
    with pytest.raises(ValueError, match="top_k must be at most the draft's vocabulary, 4"):
        case.draft.allocate(1, 8, TreeConfig(nodes=9, depth=2, top_k=5), "cpu", torch.float64)


def test_calls_out_of_order_are_refused(tmp_path, rng):
    case = make_case(tmp_path, rng)
    allocate(case, TreeConfig.chain(2))
    with pytest.raises(RuntimeError, match="propose needs an observe before it"):
        case.batch.propose(ints(1, 2, 3), ints(2, 2, 2))


def test_bundled_draft_predicts_its_base():
    """Features, token shift and embedding as the draft was trained with: it guesses most of the base's own text."""
    pair = bundled_pair()
    base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    question = [{"role": "user", "content": load_problems("calibration")[0].question}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = base.generate(**prompt, max_new_tokens=64, do_sample=False)
    draft = load_draft(pair.draft, embedding=base.get_input_embeddings())
    assert draft.feature_layers is not None
    states = base(text, output_hidden_states=True).hidden_states  # states[i] enters layer i
    features = torch.cat([states[i] for i in draft.feature_layers], -1)

    # One batch row for each position of the answer: it has read what lies before, and guesses the token at p + 2.
    first = prompt["input_ids"].shape[1] - 1
    start = torch.arange(first, text.shape[1] - 2, dtype=torch.int32)
    B, at = len(start), start.long()
    batch = draft.allocate(B, text.shape[1], TreeConfig.chain(1), "cpu", torch.float32)
    tokens = text.int().expand(B, -1)
    batch.read(features[:, :-1].expand(B, -1, -1), tokens[:, 1:], start * 0)
    root = text[0, at + 1].int()
    batch.observe(features[0, at].unsqueeze(1), root.unsqueeze(1), start, start * 0)
    guesses = batch.propose(root, start + 1).tokens[:, 0]
    assert (guesses == text[0, at + 2]).float().mean() > 0.85  # 0.95 over the whole test split


def test_rope_table_is_kept_as_far_as_it_is_needed():
    rope = RopeTable({"rope_type": "default", "rope_theta": 10000.0}, head_dim=4, max_position_embeddings=64)
    cpu = torch.device("cpu")
    first = rope.reach(10, cpu, torch.float32)
    assert rope.reach(len(first), cpu, torch.float32) is first
    longer = rope.reach(len(first) + 1, cpu, torch.float32)
    assert len(longer) == 2 * len(first)
    assert torch.equal(longer[: len(first)], first)
    for dtype in (torch.float64, torch.float32, torch.float64):
        assert rope.reach(10, cpu, dtype).dtype == dtype
        assert len(rope.reach(10, cpu, dtype)) == len(longer), "another dtype needs no more positions"
