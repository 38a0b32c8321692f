"""What each part of an exit rule gives: the tables of the paper, for any pair of base and draft.

Thresholds, and the parameters of a smoothing, are chosen on calibration traces, as those that cut most at an allowed
loss (a point estimate); each rule is then evaluated once on the test traces. One part is varied at a time, around all
three signals, an EWMA, the better placement and every annotated boundary.

Answers are known at annotated boundaries alone, so a set of boundaries can only be a part of those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from specexit import checks
from specexit.decoder import SpecExitDecoder
from specexit.exit import ExitConfig
from specexit.thinking import Tokenizer, release_breaks
from specexit.training.auroc import auroc
from specexit.training.calibrate import Signals, as_fields, best_estimate, named_ids, signal_table
from specexit.training.grid import SMOOTHINGS, grid, readouts
from specexit.training.records import Trace
from specexit.training.rules import (
    Boundaries,
    Readout,
    Scores,
    SignalTable,
    after_tokens,
    at_boundary,
    by_probability,
    oracle,
)
from specexit.training.wall_clock import wall_clock
from specexit_kernels.state import SIGNALS

LOSSES = (0.0, 0.01)
_FEWEST = 20  # traces at a boundary, below which its AUROC says little
_BUDGETS = 40
_PROBABILITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9999)

Row = dict[str, Any]


def ablate(
    decoder: SpecExitDecoder,
    calibration: Sequence[Trace],
    test: Sequence[Trace],
    *,
    signals: tuple[Signals, Signals] = (None, None),
    losses: Sequence[float] = LOSSES,
    boundary_sets: Mapping[str, Collection[int]] | None = None,
    timed: int = 0,
    temperature: float = 0.0,
    exit: ExitConfig | None = None,
) -> dict[str, Any]:
    """The tables, as JSON has them; `specexit.training.report` lays them out.

    signals        of the two sets of traces, recorded before, or what gives them; None: they are recorded now
    losses         shares of answers that a rule may lose on the calibration traces
    boundary_sets  ids of boundaries by name; None: the release's strings, and paragraphs that end a sentence
    timed          test prompts that are decoded, in each of four ways, for the wall clock
    temperature    of that decoding: the traces'
    exit           names other markers and boundaries than the tokenizer's, if the traces were annotated with such

    Raises ValueError where traces and decoder do not fit, or both sets share a problem.
    """
    checks.integer("timed", timed, 0, len(test))
    for loss in losses:
        checks.number("losses", loss, 0.0, 1.0)
    if shared := {trace.id for trace in calibration} & {trace.id for trace in test}:
        raise ValueError(f"test must hold other problems than calibration, both hold {sorted(shared)[0]!r}")
    chosen_on, choosing = signal_table(decoder, calibration, signals[0], exit)
    measured_on, measuring = signal_table(decoder, test, signals[1], exit)
    pair = choosing, measuring
    if boundary_sets is None:
        boundary_sets = {} if decoder.tokenizer is None else _boundary_sets(decoder.tokenizer)
    where = measuring.boundaries
    never = torch.full((1, where.tokens.shape[1]), where.most)
    rows: list[Row] = [
        _row("reference", "full thinking", None, measuring.boundaries.score(never)),
        _row("reference", "oracle", None, where.score(oracle(where).unsqueeze(0))),
        _rule_row("reference", "the release's thresholds", None, _allowed(decoder), pair),
    ]
    for loss in losses:
        rows += _signal_rows(pair, loss)
        for name, ids in boundary_sets.items():
            kept = [
                replace_boundaries(table, part, ids) for table, part in zip(pair, (chosen_on, measured_on), strict=True)
            ]
            rows.append(
                _chosen("boundaries", name, loss, (kept[0], kept[1]), readouts(choosing.signals.sources, ["ewma"]))
            )
        rows += _plain_rows(pair, loss)
    best = {
        loss: ExitConfig(**row["exit"])
        for loss in losses
        for row in rows
        if (row["part"], row["allowed_loss"]) == ("everything", loss) and row["exit"] is not None
    }
    last = replace(best[max(best)] if best else ExitConfig(), **named_ids(exit))
    return {
        "calibration": _about(calibration, choosing),
        "test": _about(test, measuring),
        "temperature": temperature,
        "boundary_sets": {name: _share_kept(measured_on, ids) for name, ids in boundary_sets.items()},
        "rules": rows,
        "fixed": _fixed_rows(measuring.boundaries),
        "sensitivity": [row for loss, config in best.items() for row in _sensitivity(measuring, config, loss)],
        "auroc": same_position_auroc(measuring),
        "wall_clock": wall_clock(decoder, measured_on[:timed], last, temperature) if timed else [],
    }


def replace_boundaries(table: SignalTable, traces: Sequence[Trace], ids: Collection[int]) -> SignalTable:
    """The same signals, with cuts behind some ids alone."""
    return SignalTable(table.signals, traces, Boundaries.of(traces, ids))


def same_position_auroc(table: SignalTable) -> list[Row]:
    """At the k-th boundary of all texts: does a number tell where the forced answer is already the final one?

    At one place, so that what grows with the text for any reason gets no credit for it. `hardest` marks the boundary at
    which the share of final answers is nearest to one half.
    """
    where, rows = table.boundaries, []
    columns: dict[str, tuple[Tensor, int]] = {"forced answer's probability": (where.probability, 1)}
    for source in table.signals.sources:
        values = table.values(Readout(source, "none"))
        for index, name in enumerate(SIGNALS):
            if name in table.signals.names[source]:
                columns[f"{source} {name}"] = values[..., index], -1 if name == "remaining" else 1
    for k in range(where.most):
        here = where.valid[k]
        agrees = where.agrees[k]
        row: Row = {"boundary": k, "traces": int(here.sum()), "final": float(agrees[here].double().mean()), "auroc": {}}
        for name, (value, sign) in columns.items():
            known = here & ~value[k].isnan()
            row["auroc"][name] = auroc(sign * value[k][known], agrees[known])
        rows.append(row)
    told = [row for row in rows if row["traces"] >= _FEWEST and 0 < row["final"] < 1]
    hardest = min(told, key=lambda row: abs(row["final"] - 0.5), default=None)
    for row in rows:
        row["hardest"] = row is hardest
    return rows


def _signal_rows(pair: tuple[SignalTable, SignalTable], loss: float) -> list[Row]:
    sources = pair[0].signals.sources
    ewma = readouts(sources, ["ewma"])
    rows = [_chosen("everything", "best of all", loss, pair, readouts(sources))]
    for count in (1, 2, 3):
        rows += [_chosen("signals", " + ".join(some), loss, pair, ewma, some) for some in combinations(SIGNALS, count)]
    rows += [_chosen("smoothing", kind, loss, pair, readouts(sources, [kind])) for kind in SMOOTHINGS]
    rows += [_chosen("placement", source, loss, pair, readouts([source], ["ewma"])) for source in sources]
    return [*rows, _chosen("boundaries", "all annotated", loss, pair, ewma)]


def _plain_rows(pair: tuple[SignalTable, SignalTable], loss: float) -> list[Row]:
    """Rules that read no signal: a place, a budget, and the base's own probability of a forced answer."""
    choosing, measuring = pair[0].boundaries, pair[1].boundaries
    longest = int(choosing.tokens[-1].max())
    budgets = sorted({max(1, round(longest * step / _BUDGETS)) for step in range(_BUDGETS + 1)})

    def stacked(where: Boundaries, kind: str) -> Tensor:
        if kind == "boundary":
            return torch.stack([at_boundary(where, k) for k in range(choosing.most)])
        if kind == "budget":
            return torch.stack([after_tokens(where, budget) for budget in budgets])
        return by_probability(where, torch.tensor(_PROBABILITIES))

    rows = []
    for kind, words, values in (
        ("boundary", "stop after boundary {}", range(1, choosing.most + 1)),
        ("budget", "thinking budget {}", budgets),
        ("probe", "forced answer's probability > {}", _PROBABILITIES),
    ):
        scores = choosing.score(stacked(choosing, kind))
        found = best_estimate(scores, loss)
        if found is None:
            rows.append(_row("without signals", words.format("any"), loss, None))
            continue
        tested = measuring.score(stacked(measuring, kind))
        row = _row("without signals", words.format(values[found]), loss, tested, found)
        rows.append({**row, "calibration": scores.of(found)})
    return rows


def _chosen(
    part: str,
    name: str,
    loss: float,
    pair: tuple[SignalTable, SignalTable],
    readings: Sequence[Readout],
    use: Sequence[str] = SIGNALS,
) -> Row:
    """The rule that cuts most on the first table at an allowed loss, measured on the second."""
    if not pair[0].boundaries.valid.any():
        return {**_row(part, name, loss, None), "why": "none of these boundaries is annotated"}
    rules = grid(pair[0], readings, use)
    scores = rules.score(pair[0])
    found = best_estimate(scores, loss, rules.strictness())
    if found is None:
        return _row(part, name, loss, None)
    return _rule_row(part, name, loss, rules.config(found), pair)


def _rule_row(
    part: str, name: str, loss: float | None, config: ExitConfig, pair: tuple[SignalTable, SignalTable]
) -> Row:
    choosing, measuring = (table.boundaries.score(table.first(config).unsqueeze(0)) for table in pair)
    return {**_row(part, name, loss, measuring), "exit": as_fields(config), "calibration": choosing.of(0)}


def _row(part: str, name: str, loss: float | None, test: Scores | None, index: int = 0) -> Row:
    row: Row = {"part": part, "name": name, "allowed_loss": loss, "exit": None, "calibration": None}
    if test is None:
        return {**row, "test": None, "why": "every rule loses more"}
    return {**row, "test": test.of(index)}


def _fixed_rows(where: Boundaries) -> list[Row]:
    """Every stop after a fixed boundary, on the test traces: what a choice of places could have got at best."""
    scores = where.score(torch.stack([at_boundary(where, k) for k in range(where.most)]))
    return [{"boundary": k, **scores.of(k)} for k in range(where.most)]


def _sensitivity(table: SignalTable, config: ExitConfig, loss: float) -> list[Row]:
    """A chosen rule with each of its thresholds, and then with all of them, a tenth higher and lower."""
    used = [name for name in SIGNALS if getattr(config, name) is not None]
    moves: list[tuple[str, dict[str, float]]] = [("as chosen", {})]
    for factor in (0.9, 1.1):
        moves += [(f"{name} x {factor:g}", {name: factor}) for name in used]
        strict = {name: 2 - factor if name == "remaining" else factor for name in used}
        moves.append(("all stricter" if factor > 1 else "all looser", strict))
    rows = []
    for words, factors in moves:
        moved = {name: getattr(config, name) * factor for name, factor in factors.items()}
        within = {name: value if name == "remaining" else min(value, 1.0) for name, value in moved.items()}
        scores = table.boundaries.score(table.first(replace(config, **within)).unsqueeze(0))
        rows.append({"allowed_loss": loss, "moved": words, **scores.of(0)})
    return rows


def _allowed(decoder: SpecExitDecoder) -> ExitConfig:
    """The release's thresholds, for those signals that the draft has."""
    assert decoder.draft is not None
    absent: dict[str, Any] = dict.fromkeys(set(SIGNALS) - set(decoder.draft.signals))
    return ExitConfig(**absent)


def _boundary_sets(tokenizer: Tokenizer) -> dict[str, Collection[int]]:
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode([[index] for index in ids], skip_special_tokens=False)
    ends = [index for index, text in zip(ids, texts, strict=True) if text.rstrip().endswith((".", "!", "?"))]
    return {"the release's": release_breaks(tokenizer), "ends of sentences": ends}


def _share_kept(traces: Sequence[Trace], ids: Collection[int]) -> float:
    """Share of the annotated boundaries that a set keeps."""
    tokens = [trace.thinking[b - 1] for trace in traces for b in trace.boundaries]
    return sum(token in ids for token in tokens) / len(tokens)


def _about(traces: Sequence[Trace], table: SignalTable) -> Row:
    where = table.boundaries
    return {
        "traces": where.tokens.shape[1],
        "problems": where.problems,
        "left_out": len(traces) - where.tokens.shape[1],
    }
