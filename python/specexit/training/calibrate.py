"""Thresholds and smoothing that cut the most thinking at a stated risk: "at most this share of answers is lost".

Nothing is decoded: rules are tried on recorded traces, see `rules`. Problems are split at random: on one part a
sequence of rules is chosen, on the other it is tested, see `learn_then_test`. A rule that passes is *certified*. Beside
it, and apart from it, stands the *estimated* rule: the one that kept the promise on all problems it was chosen on. It
is bolder, and on other problems it will often lose a little more: thousands were tried.

An answer counts as it was annotated: forced behind the cut, with the prefix of the annotation, greedily. Decoding that
samples its answers, or lets the base explain itself first, can answer otherwise; of that the promise says nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specexit import checks
from specexit.decoder import SpecExitDecoder
from specexit.drafts.calibration import FIELDS, IDS, KINDS, VERSION, read_calibration, write_calibration
from specexit.drafts.checkpoint import saved_fingerprint
from specexit.exit import ExitConfig
from specexit.files import locked
from specexit.identity import check_base, check_tokenizer, fingerprint
from specexit.training.grid import SMOOTHINGS, Rules, grid, readouts
from specexit.training.learn_then_test import TUNING_SHARE, learn_then_test, problems_needed, split
from specexit.training.records import Trace, read_trace_files, require_alike
from specexit.training.rules import Boundaries, Scores, SignalTable
from specexit.training.signals import SOURCES, RecordedSignals, record_signals
from specexit_kernels.state import SIGNALS

Signals = RecordedSignals | Callable[[], RecordedSignals] | None


@dataclass(frozen=True)
class Choice:
    """A rule, and what was seen of it.

    problems         on which it was seen: those it was tested on, or, of an estimated rule, all
    losses           of their answers that it lost; a problem with several samples can lose a fraction
    thinking_tokens  that it leaves, a trace
    cut              share of the thinking that it does not generate
    p_value          of its test; None: it was not tested
    """

    exit: ExitConfig
    problems: int
    losses: float
    thinking_tokens: float
    cut: float
    p_value: float | None = None

    @property
    def loss(self) -> float:
        return self.losses / self.problems


@dataclass(frozen=True)
class Calibration:
    """What came of a calibration.

    certified   None: no rule was
    estimated   None: even on the problems themselves every rule lost more
    tested      the rules in the order in which they were tested, up to the first that failed
    problems    of the set, and `tested_on`, those of them that rules were tested on
    needed      problems that the set should have had, as far as one can tell; None: it was large enough, or no number
                would do
    left_out    traces with a flaw, which say nothing
    """

    max_loss: float
    confidence_level: float | None
    temperature: float
    certified: Choice | None
    estimated: Choice | None
    tested: tuple[Choice, ...]
    problems: int
    tested_on: int
    needed: int | None
    left_out: int = 0
    base: str = field(default="", repr=False)

    @property
    def why_none(self) -> str | None:
        """Why no rule is certified, in a sentence; None: one is, or none was asked for."""
        if self.certified is not None or self.confidence_level is None:
            return None
        asked = f"a loss of at most {self.max_loss:g} with confidence {self.confidence_level:g}"
        if self.needed is None:
            return f"no rule is certified: on these problems even the safest one does not keep {asked}"
        had = f"{self.problems} problems, {self.tested_on} of them for testing"
        return f"no rule is certified: {asked} takes about {self.needed} problems, there were {had}"


def calibrate(
    decoder: SpecExitDecoder,
    traces: Sequence[Trace],
    *,
    max_loss: float = 0.01,
    confidence_level: float | None = 0.95,
    signals: Signals = None,
    temperature: float = 0.0,
    sources: Sequence[str] | None = None,
    smoothing: Sequence[str] | None = None,
    use: Sequence[str] = SIGNALS,
    min_thinking_tokens: int = 0,
    seed: int = 0,
    exit: ExitConfig | None = None,
) -> Calibration:
    """Choose an exit rule on annotated traces.

    decoder              with the draft whose signals decide, and the tokenizer
    max_loss             share of answers that may be lost
    confidence_level     with which the certified rule keeps it; None: only the estimated rule is wanted
    signals              of these traces, recorded before, or what gives them; None: they are recorded now
    temperature          at which the traces were sampled: the rule is for that
    sources, smoothing   those of `ExitConfig` that are tried; None: all there are
    use                  the signals that may decide
    min_thinking_tokens  of every rule
    seed                 of the split into problems for choosing and problems for testing
    exit                 names other markers and boundaries than the tokenizer's, where traces were annotated with such:
                         the rule gets them

    Raises TypeError or ValueError for an argument that cannot be, an empty set, or traces of another base.
    """
    checks.number("max_loss", max_loss, 0.0, 1.0)
    if confidence_level is not None:
        checks.number("confidence_level", confidence_level, 0.0, 1.0)
        if not 0 < confidence_level < 1 or not 0 < max_loss < 1:
            raise ValueError(
                "max_loss and confidence_level must lie between 0 and 1 to be certified, were"
                f" {max_loss:g} and {confidence_level:g}; confidence_level=None gives the estimated rule alone"
            )
    checks.integer("min_thinking_tokens", min_thinking_tokens, 0)
    checks.integer("seed", seed, 0)
    _check_names("use", use, SIGNALS)
    _check_names("smoothing", smoothing, tuple(SMOOTHINGS))
    _check_names("sources", sources, SOURCES)
    sound, table = signal_table(decoder, traces, signals, exit)
    _check_names("sources", sources, table.signals.sources)
    readings = readouts(table.signals.sources if sources is None else sources, smoothing or tuple(SMOOTHINGS))

    def rules(chosen: Tensor | None = None) -> Rules:
        return grid(table, readings, use, min_thinking_tokens, chosen, named_ids(exit))

    where = table.boundaries
    every = rules()
    found = best_estimate(every.score(table), max_loss, every.strictness())
    everything = torch.ones(where.problems, dtype=torch.bool)
    estimated = None if found is None else _choice(every.config(found), table, everything)
    tested: list[Choice] = []
    best = needed = None
    tested_on = 0
    if confidence_level is not None:
        delta = 1 - confidence_level
        tuning = split(where.problems, TUNING_SHARE, seed)
        tested_on = int((~tuning).sum())
        least = problems_needed(max_loss, delta)
        assert least is not None
        if tested_on < least:
            needed = math.ceil(least / (1 - TUNING_SHARE))
        else:
            tested, best = _certify(table, rules, tuning, max_loss, delta)
            if best is None:
                enough = problems_needed(max_loss, delta, min((c.loss for c in tested), default=max_loss), where.single)
                needed = None if enough is None else math.ceil(enough / (1 - TUNING_SHARE))
    return Calibration(
        max_loss=max_loss,
        confidence_level=confidence_level,
        temperature=temperature,
        certified=best,
        estimated=estimated,
        tested=tuple(tested),
        problems=where.problems,
        tested_on=tested_on,
        needed=needed,
        left_out=len(traces) - len(sound),
        base=fingerprint(decoder.model),
    )


def read_all(paths: Sequence[str | os.PathLike[str]]) -> tuple[dict[str, Any], list[Trace]]:
    """The traces of several files, which must go together, each there once; the header is the first one's."""
    headers, traces = read_trace_files(paths)
    check_alike(headers)
    seen: set[tuple[str, int]] = set()
    for trace in traces:
        if (key := (trace.id, trace.sample)) in seen:
            raise ValueError(f"traces must be there once, sample {trace.sample} of {trace.id!r} was there before")
        seen.add(key)
    return headers[0], traces


def check_alike(headers: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where files of traces with these headers do not go together."""
    require_alike(headers, ("base", "tokenizer", "extractor", "answer_prefix", "markers"))
    found = dict.fromkeys(str(_temperature(header)) for header in headers)
    if len(found) > 1:
        raise ValueError(f"traces must be of one temperature, were of {' and '.join(found)}")


def temperature_of(header: Mapping[str, Any], given: float | None = None) -> float:
    """At which the traces of a file were sampled: as its header says, or, of texts from elsewhere, as is `given`.

    Raises ValueError where neither says it, or they disagree.
    """
    known = _temperature(header)
    if known is None and given is None:
        raise ValueError("temperature must be given for traces of texts from elsewhere, which do not say theirs")
    if None not in (known, given) and known != given:
        raise ValueError(f"temperature must be that of the traces, {known:g}, was {given:g}")
    return float(given if known is None else known)  # type: ignore[arg-type]


def _temperature(header: Mapping[str, Any]) -> float | None:
    sampling = header.get("sampling")
    return float(sampling["temperature"]) if isinstance(sampling, Mapping) else None


def check_models(header: Mapping[str, Any], decoder: SpecExitDecoder) -> None:
    """Raise ValueError where a file of traces, or the draft, was made with another base or tokenizer."""
    if "base" in header:
        check_base(str(header["base"]), decoder.model, "the file of traces")
    if "tokenizer" in header and decoder.tokenizer is not None:
        check_tokenizer(str(header["tokenizer"]), decoder.tokenizer, "the file of traces")
    training = getattr(getattr(decoder.draft, "config", None), "extra", {}).get("training")
    if isinstance(training, Mapping) and "base" in training:
        check_base(str(training["base"]), decoder.model, "the draft")


def named_ids(exit: ExitConfig | None) -> dict[str, Any]:
    """The markers and boundaries that an exit's settings name; the others are the tokenizer's."""
    named = {name: getattr(exit, name, None) for name in IDS}
    return {name: tuple(ids) for name, ids in named.items() if ids is not None}


def exit_of(header: Mapping[str, Any], decoder: SpecExitDecoder) -> ExitConfig:
    """Names those markers and boundaries that a file of traces was made with, where they are not the tokenizer's."""
    if not isinstance(header.get("markers"), Mapping):
        return ExitConfig()
    made_with = {f"{name}_ids": tuple(ids) for name, ids in header["markers"].items()}
    try:
        markers = asdict(decoder.planner.markers(ExitConfig()))
    except ValueError:  # the tokenizer has none
        markers = {}
    others = {name for name, ids in made_with.items() if ids != markers.get(name.removesuffix("_ids"))}
    if others - {"boundary_ids"}:
        others |= {"start_ids", "end_ids", "force_ids"}  # what follows a cut depends on what ends thinking
    named: dict[str, Any] = {name: ids for name, ids in made_with.items() if ids and name in others}
    return ExitConfig(**named)


def signal_table(
    decoder: SpecExitDecoder,
    traces: Sequence[Trace],
    signals: Signals = None,
    exit: ExitConfig | None = None,
) -> tuple[list[Trace], SignalTable]:
    """The traces without a flaw, and their signals. Raises ValueError where there are none, or they do not fit."""
    if not traces:
        raise ValueError("traces must hold at least one trace, were none")
    sound = [trace for trace in traces if trace.flaw is None]
    if not any(trace.boundaries for trace in sound):
        flaws = sorted({trace.flaw for trace in traces if trace.flaw is not None})
        raise ValueError(
            f"traces must hold one that can be cut at a boundary, none of {len(traces)} can: "
            f"{'; '.join(flaws) or 'they have no boundary'}"
        )
    check_boundaries(decoder, sound, exit)
    if signals is None:
        signals = record_signals(decoder, sound)
    elif callable(signals):
        signals = signals()
    assert decoder.draft is not None
    signals.check_models(decoder.base, decoder.draft)
    return sound, SignalTable(signals, sound, Boundaries.of(sound))


def check_boundaries(decoder: SpecExitDecoder, traces: Sequence[Trace], exit: ExitConfig | None = None) -> None:
    """Raise ValueError where a trace is not annotated at just those boundaries at which the decoder could cut it.

    exit   names other boundaries than the tokenizer's
    """
    ids = set(decoder.planner.markers(ExitConfig(**named_ids(exit))).boundary)
    for trace in traces:
        wanted = [place for place, token in enumerate(trace.thinking, 1) if token in ids]
        if wanted != trace.boundaries:
            raise ValueError(
                f"traces must be annotated at every paragraph's end that the decoder cuts at: {trace.id!r} has"
                f" {len(wanted)} of them, and is annotated at {len(trace.boundaries)}"
            )


def write(
    result: Calibration, folder: str | os.PathLike[str], name: str | None = None, default: bool = False
) -> list[str]:
    """Add the rules to calibration.json of a draft's folder: the certified one as `name`, the estimated one as
    `name`-estimated, or, where no certified one was wanted, as `name`. Other rules stay, as long as they are for this
    base and these weights; and no estimated rule takes the place of a certified one, but gets the longer name.

    name      None: "1-percent", by the loss, and "1-percent-at-0.7" by the temperature, where that is not 0
    default   use the certified rule, or without one the estimated, where nothing else is asked for. The first rule
              that a file gets is its default anyway

    Returns the names that were written.
    """
    place = Path(folder)
    name = name or default_name(result.max_loss, result.temperature)
    marks = {"base": result.base, "draft": saved_fingerprint(place)}
    with locked(place):
        had = read_calibration(place)
        if had is not None and any(had[key] != mark for key, mark in marks.items()):
            had = None  # of other weights: nothing in it holds now
        rules = dict(had["rules"]) if had else {}
        certified = rules.get(name, {}).get("kind") == "certified"
        own = (name, f"{name}-estimated" if certified or result.confidence_level is not None else name)
        written = []
        for called, kind, choice in zip(own, KINDS, (result.certified, result.estimated), strict=True):
            if choice is not None:
                rules[called] = as_rule(result, choice, kind)
                written.append(called)
        if not written:
            raise ValueError("result must hold a rule to be written, held none")
        named = had["default"] if had else None
        if default or named not in rules:
            named = written[0]
        write_calibration(place, {"version": VERSION, "default": named, "rules": rules, **marks})
    return written


def default_name(max_loss: float, temperature: float) -> str:
    return f"{100 * max_loss:g}-percent" + (f"-at-{temperature:g}" if temperature else "")


def as_fields(config: ExitConfig) -> dict[str, Any]:
    """The fields of an exit rule that differ from the defaults."""
    default = {f.name: f.default for f in fields(ExitConfig)}
    values = {name: getattr(config, name) for name in FIELDS}
    return {name: value for name, value in values.items() if value != default[name]}


def as_rule(result: Calibration, choice: Choice, kind: str) -> dict[str, Any]:
    """As calibration.json has it."""
    evidence = {"problems": choice.problems, "losses": choice.losses, "loss": choice.loss, "p_value": choice.p_value}
    return {
        "exit": {name: getattr(choice.exit, name) for name in FIELDS},  # all: defaults of another version may be others
        "kind": kind,
        "temperature": result.temperature,
        "max_loss": result.max_loss,
        "confidence_level": result.confidence_level if kind == "certified" else None,
        "evidence": {**evidence, "thinking_tokens": choice.thinking_tokens, "cut": choice.cut},
    }


def best_estimate(scores: Scores, max_loss: float, strictness: Tensor | None = None) -> int | None:
    """The rule that cuts most at a loss of at most `max_loss`; of several the one that loses least, then the strictest.

    None where every rule loses more.
    """
    allowed = (scores.loss <= max_loss + 1e-9).nonzero().flatten().tolist()
    strict = torch.zeros_like(scores.loss) if strictness is None else strictness
    ranks = torch.stack([scores.tokens, scores.loss, -strict], 1).tolist()
    return min(allowed, key=ranks.__getitem__, default=None)


def _certify(
    table: SignalTable, rules: Callable[[Tensor], Rules], tuning: Tensor, max_loss: float, delta: float
) -> tuple[list[Choice], Choice | None]:
    """The rules that were tested, and of those that passed the one that cuts most.

    rules    the grid by the signals of some traces
    tuning   [problems] bool: those on which the sequence is chosen
    """
    chosen = tuning[table.boundaries.problem].nonzero().flatten()
    own = rules(chosen)
    scores = own.score(table, chosen)
    others = (~tuning[table.boundaries.problem]).nonzero().flatten()
    where = table.boundaries.select(others)

    def test_losses(rule: int) -> Tensor:
        losses = where.losses(table.first(own.config(rule))[others].unsqueeze(0))[0]
        return losses.bool() if table.boundaries.single else losses

    result = learn_then_test(scores.loss, scores.tokens, own.stricter, test_losses, max_loss=max_loss, delta=delta)
    pairs = zip(result.order, result.p_values, strict=False)  # what stands behind a rule that failed has none
    tested = [replace(_choice(own.config(rule), table, ~tuning), p_value=value) for rule, value in pairs]
    return tested, min(tested[: result.certified], key=lambda choice: choice.thinking_tokens, default=None)


def _choice(config: ExitConfig, table: SignalTable, problems: Tensor) -> Choice:
    """What some problems, [problems] bool, say of a rule."""
    traces = problems[table.boundaries.problem].nonzero().flatten()
    where, first = table.boundaries.select(traces), table.first(config)[traces].unsqueeze(0)
    scores, losses = where.score(first), where.losses(first)[0]
    return Choice(
        exit=config,
        problems=len(losses),
        losses=float(losses.sum()),
        thinking_tokens=float(scores.tokens[0]),
        cut=float(scores.cut[0]),
    )


def _check_names(name: str, values: Sequence[str] | None, known: Sequence[str]) -> None:
    if values is None:
        return
    if not values or isinstance(values, str) or any(value not in known for value in values):
        raise ValueError(f"{name} must be some of {', '.join(known)}, was {values!r}")
