"""The settings of the exit: every check, the ids they take from a tokenizer, and the rules of a batch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracle_draft import OracleDraft
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specexit.exit import ExitConfig, markers_for, rules_for
from specexit.plan import ExitPlanner
from specexit.thinking import Markers
from specexit_kernels import Smoothing
from specexit_kernels.state import NO_BUDGET, SIGNALS

MARKERS = Markers((1,), (2,), (2,), (4, 5))
V = 10


def tokenizer(*added: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_tokens([AddedToken(text, normalized=False) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=built)


def test_defaults_are_the_releases_thresholds_at_each_token() -> None:
    config = ExitConfig()
    assert (config.confidence, config.progress, config.remaining) == (0.8, 0.3, 200.0)
    assert (config.granularity, config.smoothing, config.source, config.active) == ("token", "ewma", "auto", True)


def test_off_cuts_nothing() -> None:
    assert not ExitConfig.off().active
    assert ExitConfig(enabled=False, thinking_budget=9).active
    rules = rules_for(ExitConfig.off(), V, Markers((), (), (), ()), 2)
    assert rules.force.numel() == 0
    assert not rules.has_budget


def test_release() -> None:
    config = ExitConfig.release()
    assert (config.alpha, config.granularity, config.source) == (0.1, "step", "fc")
    assert (config.start_ids, config.assume_thinking) == ((), True)
    rules = rules_for(config, V, MARKERS, 1, signals=SIGNALS)
    assert rules.per_step
    assert rules.smoothing is Smoothing.EWMA


def test_frozen_and_comparable() -> None:
    config = ExitConfig(end_ids=[2, 3])
    assert config.end_ids == (2, 3)
    assert config == ExitConfig(end_ids=(2, 3))
    assert len({config, ExitConfig(end_ids=(2, 3))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.3  # type: ignore[misc]
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, was 2"):
        dataclasses.replace(config, alpha=2)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"confidence": 1.1}, ValueError, "confidence must be between 0 and 1, was 1.1"),
        ({"confidence": -0.1}, ValueError, "confidence must be between 0 and 1, was -0.1"),
        ({"confidence": "high"}, TypeError, "confidence must be a number, was str"),
        ({"progress": math.nan}, ValueError, "progress must be between 0 and 1, was nan"),
        ({"progress": True}, TypeError, "progress must be a number, was bool"),
        ({"remaining": -1}, ValueError, "remaining must be finite and at least 0, was -1"),
        ({"remaining": math.inf}, ValueError, "remaining must be finite and at least 0, was inf"),
        ({"confidence": None, "progress": None, "remaining": None}, ValueError, "must not all be None"),
        ({"alpha": 0}, ValueError, "alpha must be above 0, was 0"),
        ({"alpha": 1.5}, ValueError, "alpha must be between 0 and 1, was 1.5"),
        ({"smoothing": "ema"}, ValueError, "smoothing must be one of none, ewma, window, momentum, was 'ema'"),
        ({"granularity": "word"}, ValueError, "granularity must be one of token, step, was 'word'"),
        ({"source": "head"}, ValueError, "source must be one of auto, fc, output, was 'head'"),
        ({"window": 0}, ValueError, "window must be between 1 and 1024, was 0"),
        ({"window": 1, "smoothing": "momentum"}, ValueError, "window must be between 2 and 1024, was 1"),
        ({"window": 4.0}, TypeError, "window must be an int, was float"),
        ({"min_thinking_tokens": -1}, ValueError, "min_thinking_tokens must be at least 0"),
        ({"min_thinking_tokens": True}, TypeError, "min_thinking_tokens must be an int, was bool"),
        ({"thinking_budget": 0}, ValueError, "thinking_budget must be at least 1"),
        ({"thinking_budget": 2**31}, ValueError, r"thinking_budget must be below 2\*\*31 - 1"),
        ({"thinking_budget": 1.5}, TypeError, "thinking_budget must be an int, was float"),
        ({"hard_budget": True}, ValueError, "hard_budget must come with a thinking_budget"),
        ({"hard_budget": 1, "thinking_budget": 3}, TypeError, "hard_budget must be a bool, was int"),
        ({"enabled": None}, TypeError, "enabled must be a bool, was NoneType"),
        ({"boundary_ids": ()}, ValueError, "boundary_ids must hold at least one id"),
        ({"boundary_ids": 4}, TypeError, "boundary_ids must be a sequence of token ids, was int"),
        ({"end_ids": "</think>"}, TypeError, "end_ids must be a sequence of token ids, was str"),
        ({"end_ids": ["2"]}, TypeError, "end_ids must hold ints, was str"),
        ({"force_ids": [-2]}, ValueError, "force_ids must hold ids of at least 0, was -2"),
        ({"start_ids": ()}, ValueError, "start_ids must not be empty unless assume_thinking"),
        ({"assume_thinking": 1}, TypeError, "assume_thinking must be a bool or None, was int"),
    ],
)
def test_bad_settings(settings: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ExitConfig(**settings)  # type: ignore[arg-type]


def test_rules_of_a_batch_whose_rows_differ() -> None:
    rows = [
        ExitConfig(confidence=0.5, progress=None, alpha=0.25, min_thinking_tokens=7),
        ExitConfig(remaining=None, thinking_budget=9, hard_budget=True),
        ExitConfig.off(),
        ExitConfig(enabled=False, thinking_budget=5),
    ]
    rules = rules_for(rows, V, MARKERS, 4, signals=SIGNALS, stop_ids=[3])
    assert rules.thresholds[0].tolist() == [0.5, 0.0, 200.0]
    assert rules.used.tolist() == [[True, False, True], [True, True, False], [True] * 3, [True] * 3]
    assert rules.thresholds[2:, 0].isinf().all()  # out of reach
    assert rules.alpha.tolist() == [0.25, 0.5, 0.5, 0.5]
    assert rules.min_thinking.tolist() == [7, 0, 0, 0]
    assert rules.budget.tolist() == [NO_BUDGET, 9, NO_BUDGET, 5]
    assert rules.hard_budget.tolist() == [False, True, False, False]
    assert rules.boundary.nonzero().flatten().tolist() == [4, 5]
    assert (rules.start.tolist(), rules.end.tolist(), rules.force.tolist()) == ([1], [2], [2])
    assert (rules.has_minimum, rules.has_budget, rules.force_stops, rules.window, rules.tail) == (
        True,
        True,
        False,
        0,
        0,
    )
    for field in ("thresholds", "alpha"):
        assert getattr(rules, field).dtype == torch.float32


def test_rules_know_the_static_settings() -> None:
    for name, kind in (("none", Smoothing.NONE), ("ewma", Smoothing.EWMA), ("window", Smoothing.WINDOW)):
        rules = rules_for(ExitConfig(smoothing=name, window=5), V, MARKERS, 1, signals=SIGNALS)
        assert (rules.smoothing, rules.window) == (kind, 5 if kind is Smoothing.WINDOW else 0)
        assert (rules.has_minimum, rules.has_budget, rules.per_step) == (False, False, False)
    assert rules_for(ExitConfig(), V, MARKERS, 1, signals=SIGNALS, stop_ids=[2]).force_stops
    long = Markers((1, 7), (2, 8, 9), (2, 8, 9), (4,))
    assert rules_for(ExitConfig(), V, long, 1, signals=SIGNALS).tail == 2
    assert rules_for([], V, MARKERS, 0, signals=SIGNALS).thresholds.shape == (0, 3)
    beyond = Markers((1,), (2,), (2,), (4, V + 3))  # a tokenizer may know ids that its model cannot emit
    assert rules_for(ExitConfig(), V, beyond, 1, signals=SIGNALS).boundary.sum() == 1


@pytest.mark.parametrize(
    ("settings", "signals", "words"),
    [
        (
            {},
            (),
            "confidence, progress, remaining must be None: .* the draft gives none",
        ),
        ({}, SIGNALS[:1], "progress, remaining must be None: .* the draft gives confidence"),
        ({"progress": None}, SIGNALS[:1], "remaining must be None"),
        ({}, ("remaining",), "confidence, progress must be None: .* the draft gives remaining"),
    ],
)
def test_signals_that_the_draft_lacks(settings: dict[str, None], signals: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rules_for(ExitConfig(**settings), V, MARKERS, 1, signals=signals)
    rules_for(ExitConfig(progress=None, remaining=None), V, MARKERS, 1, signals=SIGNALS[:1])
    rules_for(ExitConfig(enabled=False, thinking_budget=3), V, MARKERS, 1)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({}, {"smoothing": "none"}, "smoothing must be the same in every row of a batch, was 'ewma' and 'none'"),
        ({"window": 3}, {}, "window must be the same"),
        ({"granularity": "step"}, {}, "granularity must be the same"),
        ({"source": "fc"}, {}, "source must be the same"),
        ({"boundary_ids": [4]}, {}, "boundary_ids must be the same"),
        ({"start_ids": [4]}, {}, "start_ids must be the same"),
        ({"end_ids": [4]}, {"end_ids": [5]}, "end_ids must be the same"),
        ({"force_ids": [4]}, {}, "force_ids must be the same"),
    ],
)
def test_settings_that_a_batch_shares(one: dict, other: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rules_for([ExitConfig(**one), ExitConfig(**other)], V, MARKERS, 2, signals=SIGNALS)
    rules_for([ExitConfig(**one), ExitConfig.off()], V, MARKERS, 2, signals=SIGNALS)


@pytest.mark.parametrize(
    ("markers", "config", "words"),
    [
        (Markers((1,), (V,), (2,), (4,)), ExitConfig(), r"end_ids must be in \[0, 10\), the base's vocabulary, was 10"),
        (Markers((1,), (2,), (2, 11), (4,)), ExitConfig.off(), "force_ids must be in"),
        (Markers((1,), (2,), (2,), (4, 12)), ExitConfig(boundary_ids=[4, 12]), "boundary_ids must be in .* was 12"),
        (Markers((1,), (), (), (4,)), ExitConfig(), "end_ids must hold the end of thinking, was empty"),
        (Markers((1,), (2,), (2,), ()), ExitConfig(), "boundary_ids must be given: no single token"),
        (Markers((1, 2), (2,), (2,), (4,)), ExitConfig(), "start_ids must not end with end_ids"),
        (Markers((1,), (2,), (7, 1, 2), (4,)), ExitConfig(), "force_ids must not hold start_ids"),
    ],
)
def test_markers_that_allow_no_exit(markers: Markers, config: ExitConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rules_for(config, V, markers, 1, signals=SIGNALS)


def test_a_hard_budget_needs_no_boundary() -> None:
    config = ExitConfig(enabled=False, thinking_budget=3, hard_budget=True)
    assert rules_for(config, V, Markers((1,), (2,), (2,), ()), 1).has_budget


def test_one_config_a_prompt() -> None:
    with pytest.raises(ValueError, match="exit must be one ExitConfig, or one for each of 3 prompts, was 2"):
        rules_for([ExitConfig(), ExitConfig()], V, MARKERS, 3, signals=SIGNALS)


def test_markers_of_tokenizer_and_settings() -> None:
    known = tokenizer("<think>", "</think>", "\n\n", "):\n\n")
    ids = known.get_vocab()
    start, end = ids["<think>"], ids["</think>"]
    found = markers_for(ExitConfig(), known)
    assert found == Markers((start,), (end,), (end,), (ids["\n\n"], ids["):\n\n"]))
    assert markers_for(ExitConfig(end_ids=[7, 8]), known) == Markers((start,), (7, 8), (7, 8), found.boundary)
    assert markers_for(ExitConfig(force_ids=[9, end]), known).force == (9, end)
    assert markers_for(ExitConfig(boundary_ids=[3]), known).boundary == (3,)
    assert markers_for(ExitConfig(granularity="step"), known) == Markers((start,), (end,), (end,), (ids["\n\n"],))
    assert markers_for(ExitConfig.release(), known) == Markers((), (end,), (end,), (ids["\n\n"],))
    assert markers_for(ExitConfig.off(), known) == Markers((start,), (end,), (end,), ())


def test_default_rule_is_the_calibrated_one_or_that_of_the_signals() -> None:
    known, draft = tokenizer("<think>", "</think>", "\n\n"), OracleDraft([[3]], signals=lambda position, token: [0.0])
    unread = {"progress": None, "remaining": None}
    assert ExitPlanner(draft, known, len(known)).default() == ExitConfig(progress=None, remaining=None)
    draft.calibration = {"meaning": "of each signal"}  # says something, but holds no rule
    assert ExitPlanner(draft, known, len(known)).default() == ExitConfig(progress=None, remaining=None)
    draft.calibration = {"default": "a", "rules": {"a": {"exit": {"confidence": 0.6, **unread}}}}
    calibrated = ExitConfig.from_draft(draft.calibration)
    assert calibrated == ExitConfig(confidence=0.6, **unread)
    assert ExitPlanner(draft, known, len(known)).default() == calibrated
    assert ExitPlanner(draft, None, V).default() == ExitConfig.off()
    draft.select_source(None)  # as a batch without exit leaves it
    assert ExitPlanner(draft, known, len(known)).default() == calibrated
    draft.calibration = {}
    lines = tokenizer("<think>", "</think>")  # no token ends a paragraph
    assert ExitPlanner(draft, lines, len(lines)).default() == ExitConfig.off()


def test_markers_without_a_tokenizer_or_in_one_without_markers() -> None:
    given = ExitConfig(start_ids=[1], end_ids=[2], boundary_ids=[4])
    assert markers_for(given, None) == Markers((1,), (2,), (2,), (4,))
    assert markers_for(ExitConfig(start_ids=[1], end_ids=[2]), tokenizer("\n\n")).boundary != ()
    assert markers_for(ExitConfig.off(), None) == Markers((), (), (), ())
    assert markers_for(ExitConfig.off(), tokenizer()) == Markers((), (), (), ())
    with pytest.raises(ValueError, match="tokenizer must be given for an exit, was None; or give start_ids"):
        markers_for(ExitConfig(end_ids=[2]), None)
    with pytest.raises(ValueError, match="give start_ids and end_ids in ExitConfig"):
        markers_for(ExitConfig(), tokenizer("\n\n"))
