"""A picture of the exit signals over the thinking text: three panels, thresholds, paragraph ends, the exit."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specexit.cli.report import passes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
_CURVE, _PASS, _FAIL, _EXIT, _GRID = "#2563a8", "#1a8f5a", "#b0392f", "#d97706", "#d5dae0"
_DASHES = (0, (4, 3))
_LABELS = {"confidence": "confidence", "progress": "progress", "remaining": "remaining\n(tokens, log)"}


@dataclass(frozen=True)
class SignalCurves:
    """The signals of one text, and what the picture says about them.

    thinking_tokens  for each read position, how many thinking tokens the text has up to it (the horizontal axis)
    values, smoothed for each read position, x and e of each signal in `names`
    thresholds       of the signals that decide
    boundaries       indices of the positions that end a paragraph
    exit             index of the boundary at which thinking was cut, or None
    """

    title: str
    names: Sequence[str]
    thinking_tokens: Sequence[int]
    values: Sequence[Sequence[float]]
    smoothed: Sequence[Sequence[float]]
    thresholds: Mapping[str, float]
    boundaries: Sequence[int]
    exit: int | None = None


def require_plottable(path: Path | None) -> None:
    """Raise ValueError or ImportError now if a picture could not be drawn to `path`."""
    if path is None:
        return
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise ValueError(f"--plot must end in {', '.join('.' + f for f in FORMATS)}, was {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib")


def draw_signals(curves: SignalCurves, image_format: str = "png") -> bytes:
    """The picture as a file's bytes. What lies after the exit, if anything, is shown pale: it was not generated."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(9.0, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(curves.names), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axes, name) in enumerate(zip(panels, curves.names, strict=True)):
        _draw_panel(axes, curves, index, name)
    if curves.exit is not None:
        _label_exit(panels[0], curves.thinking_tokens[curves.exit], curves.thinking_tokens[-1])
    panels[-1].set_xlabel("thinking tokens generated")
    if curves.thinking_tokens:
        panels[-1].set_xlim(0, 1.01 * curves.thinking_tokens[-1])
    figure.suptitle(curves.title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    figure.align_ylabels(panels)
    _add_legend(figure)
    image = io.BytesIO()
    figure.savefig(image, format=image_format)
    return image.getvalue()


def _draw_panel(axes: Axes, curves: SignalCurves, index: int, name: str) -> None:
    x = list(curves.thinking_tokens)
    raw = [row[index] for row in curves.values]
    smoothed = [row[index] for row in curves.smoothed]
    below = name == "remaining"  # the one signal that must fall under its threshold
    if below:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(-0.05, 1.08)
    axes.set_ylabel(_LABELS.get(name, name))
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for boundary in curves.boundaries:
        axes.axvline(x[boundary], color=_GRID, linewidth=0.8, zorder=0)
    # The exit position itself belongs to what was generated.
    cut = len(x) if curves.exit is None else curves.exit + 1
    for part, alpha in ((slice(0, cut), 1.0), (slice(max(cut - 1, 0), None), 0.25)):
        axes.plot(x[part], raw[part], color=_CURVE, alpha=0.35 * alpha, linewidth=0.8)
        axes.plot(x[part], smoothed[part], color=_CURVE, alpha=alpha, linewidth=1.8)
    threshold = curves.thresholds.get(name)
    if threshold is not None:
        axes.axhline(threshold, color=_FAIL, linewidth=1.0, linestyle=_DASHES)
        axes.annotate(
            f"{'below' if below else 'above'} {threshold:g}",
            (1.0, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_FAIL,
            annotation_clip=False,
        )
    for boundary in curves.boundaries:
        value = smoothed[boundary]
        if not math.isfinite(value):
            continue
        passed = threshold is not None and passes(name, value, threshold)
        axes.plot(
            x[boundary],
            value,
            marker="o",
            markersize=5,
            color=_PASS,
            markerfacecolor=_PASS if passed else "white",
            alpha=1.0 if boundary < cut else 0.3,
            zorder=3,
        )
    if curves.exit is not None:
        axes.axvline(x[curves.exit], color=_EXIT, linewidth=2.0, zorder=2)
        axes.axvspan(x[curves.exit], 1.01 * x[-1], color=_EXIT, alpha=0.06, linewidth=0)


def _label_exit(axes: Axes, x: int, last: int) -> None:
    axes.annotate(
        f"exit after {x} tokens",
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right" if x > last / 4 else "left",
        color=_EXIT,
        fontweight="bold",
    )
    if last > x:
        axes.annotate(
            f"{last - x} tokens not generated",
            ((x + last) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color="0.45",
        )


def _add_legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    def dot(face: str, label: str) -> Line2D:
        return Line2D([], [], marker="o", linestyle="", color=_PASS, markerfacecolor=face, label=label)

    entries = [
        Line2D([], [], color=_CURVE, linewidth=1.8, label="smoothed"),
        Line2D([], [], color=_CURVE, alpha=0.35, linewidth=0.8, label="each token"),
        Line2D([], [], color=_FAIL, linestyle=_DASHES, linewidth=1.0, label="threshold"),
        dot(_PASS, "paragraph end: passes"),
        dot("white", "does not pass"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8.5, frameon=False)
