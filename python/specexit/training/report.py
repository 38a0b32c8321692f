"""An ablation laid out for reading: tables in Markdown, and a picture of accuracy against tokens."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_PARTS = {
    "reference": "References",
    "everything": "Every source, smoothing and signal",
    "signals": "Signals (EWMA, better placement)",
    "smoothing": "Smoothing (all signals, better placement)",
    "placement": "Placement (all signals, EWMA)",
    "boundaries": "Boundaries (all signals, EWMA, better placement)",
    "without signals": "Without signals",
}
_COLORS = ("#1a8f5a", "#2563a8", "#7c3aed", "#0891b2", "#d97706", "#b0392f", "#475569")


def markdown(ablation: Mapping[str, Any]) -> str:
    """The tables of `ablate`."""
    sizes = ", ".join(
        f"{name}: {about['problems']} problems, {about['traces']} traces"
        + (f" ({about['left_out']} with a flaw left out)" if about["left_out"] else "")
        for name, about in ((name, ablation[name]) for name in ("calibration", "test"))
    )
    lines = [
        "# Ablation",
        "",
        f"{sizes}; temperature {ablation['temperature']:g}. Thresholds are chosen on the calibration traces, as those"
        " that cut most at the allowed loss (a point estimate, nothing is certified); every number below is of the test"
        " traces. Lost: share of answers that full thinking has right and the exit has not.",
        "",
    ]
    for part, title in _PARTS.items():
        rows = [row for row in ablation["rules"] if row["part"] == part]
        if rows:
            lines += [f"## {title}", "", *_table(_RULE_HEAD, map(_rule_cells, rows)), ""]
    if ablation["boundary_sets"]:
        kept = ", ".join(f"{name} {share:.0%}" for name, share in ablation["boundary_sets"].items())
        lines += [f"Answers are known at annotated boundaries alone; of those a set keeps: {kept}.", ""]
    fixed = ((str(row["boundary"] + 1), *_score_cells(row)) for row in ablation["fixed"])
    lines += ["## Stop after the k-th boundary", "", *_table(("k", *_SCORE_HEAD), fixed), ""]
    moved = ((f"{row['allowed_loss']:.1%}", row["moved"], *_score_cells(row)) for row in ablation["sensitivity"])
    lines += ["## Chosen thresholds moved by a tenth", ""]
    lines += [*_table(("allowed loss", "moved", *_SCORE_HEAD), moved), ""]
    lines += ["## AUROC at the k-th boundary: is the forced answer already the final one?", ""]
    lines += [*_auroc_table(ablation["auroc"]), ""]
    if ablation["wall_clock"]:
        timed = (
            (
                row["way"],
                f"{row['seconds']:.2f}",
                str(row["thinking_tokens"]),
                str(row["new_tokens"]),
                f"{row['new_tokens'] / max(row['steps'], 1):.2f}",
            )
            for row in ablation["wall_clock"]
        )
        prompts = ablation["wall_clock"][0]["prompts"]
        lines += [f"## Wall clock, {prompts} prompts one at a time", ""]
        lines += [*_table(("way", "seconds", "thinking tokens", "new tokens", "tokens a step"), timed), ""]
    return "\n".join(lines)


def draw(ablation: Mapping[str, Any], image_format: str = "png") -> bytes:
    """Accuracy against thinking tokens of every rule on the test traces, as a file's bytes. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(7.5, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fixed = [row for row in ablation["fixed"] if row["exits"] > 0]
    axes.plot(
        [row["tokens"] for row in fixed],
        [row["accuracy"] for row in fixed],
        color="0.6",
        marker=".",
        linewidth=1,
        label="stop after the k-th boundary",
    )
    for part, color in zip(_PARTS, _COLORS, strict=True):
        rows = [row["test"] for row in ablation["rules"] if row["part"] == part and row["test"] is not None]
        if rows:
            axes.scatter(
                [row["tokens"] for row in rows],
                [row["accuracy"] for row in rows],
                s=22,
                color=color,
                label=_PARTS[part],
            )
    axes.set_xlabel("thinking tokens a trace")
    axes.set_ylabel("accuracy")
    axes.set_xlim(left=0)
    axes.grid(color="#d5dae0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, format=image_format)
    return image.getvalue()


_SCORE_HEAD = ("tokens", "cut", "accuracy", "lost", "cut at all")
_RULE_HEAD = ("rule", "allowed loss", *_SCORE_HEAD, "chosen")


def _rule_cells(row: Row) -> tuple[str, ...]:
    allowed = "" if row["allowed_loss"] is None else f"{row['allowed_loss']:.1%}"
    if row["test"] is None:
        return row["name"], allowed, *["-"] * len(_SCORE_HEAD), row["why"]
    return row["name"], allowed, *_score_cells(row["test"]), "" if row["exit"] is None else _words(row["exit"])


def _score_cells(scores: Row) -> tuple[str, ...]:
    shares = (f"{scores[name]:.1%}" for name in ("cut", "accuracy", "loss", "exits"))
    return f"{scores['tokens']:.1f}", *shares


def _words(exit: Row) -> str:
    """The fields of a rule that differ from the defaults."""
    return ", ".join(f"{name} {value if isinstance(value, str) else _number(value)}" for name, value in exit.items())


def _number(value: float | None) -> str:
    return "unused" if value is None else f"{value:g}"


def _auroc_table(rows: Sequence[Row]) -> list[str]:
    names = list(rows[0]["auroc"]) if rows else []
    cells = (
        (
            f"**{row['boundary'] + 1}, the hardest**" if row["hardest"] else str(row["boundary"] + 1),
            str(row["traces"]),
            f"{row['final']:.2f}",
            *("-" if row["auroc"][name] is None else f"{row['auroc'][name]:.3f}" for name in names),
        )
        for row in rows
    )
    return _table(("k", "traces", "final", *names), cells)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
