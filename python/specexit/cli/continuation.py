"""The work of `specexit generate`: load, encode, decode, and say why the thinking stopped."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specexit import ExitConfig, SpecExitDecoder, TreeConfig
from specexit.cli.console import note, stdout
from specexit.cli.example import thresholds_of
from specexit.cli.generate import Request
from specexit.cli.loading import draft_rule, load_bundled, load_decoder, watching
from specexit.cli.report import why_exit
from specexit.cli.stream import ThinkingStreamer
from specexit.output import RowStats
from specexit_kernels.state import SIGNALS


@dataclass(frozen=True)
class Continuation:
    """What was generated, and how."""

    rule: ExitConfig
    tokens: list[int]
    text: str
    stats: RowStats
    seconds: float
    boundary_ids: frozenset[int]
    still_thinking: bool

    def summary(self) -> list[str]:
        """For stderr: why thinking stopped, and how fast the text came."""
        stats = self.stats
        lines = []
        if stats.exit_position is not None:
            lines.append(f"thinking stopped after {stats.thinking_tokens} tokens: {self._why()}")
        elif self.still_thinking:
            lines.append(f"still thinking after {stats.thinking_tokens} tokens")
        elif stats.thinking_tokens:
            lines.append(f"no exit: the model ended its thinking itself, after {stats.thinking_tokens} tokens")
        lines.append(
            f"{stats.new_tokens} tokens in {stats.steps} steps ({stats.tokens_per_step:.2f} a step), "
            f"{self.seconds:.2f} s, {stats.new_tokens / self.seconds:.0f} tokens/s; ended by {stats.finish_reason}"
        )
        return lines

    def trace(self) -> dict[str, Any]:
        """The signals at every thinking token that was read, for JSON; NaN, a missing signal, is null."""
        stats, trace = self.stats, self.stats.trace
        positions = trace.positions if trace is not None else []
        at = [position - stats.prompt_tokens for position in positions]  # indices of new tokens
        return {
            "rule": {name: value for name, value in asdict(self.rule).items() if value is not None},
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": self.tokens,
            "text": self.text,
            "thinking_tokens": stats.thinking_tokens,
            "finish_reason": stats.finish_reason,
            "exit_position": stats.exit_position,
            "exit_reason": stats.exit_reason,
            "names": list(trace.names) if trace is not None else [],
            "positions": positions,
            "boundaries": [p for p, i in zip(positions, at, strict=True) if self.tokens[i] in self.boundary_ids],
            "signals": _finite(trace.signals if trace is not None else []),
            "smoothed": _finite(trace.smoothed if trace is not None else []),
        }

    def _why(self) -> str:
        trace = self.stats.trace
        signals: dict[str, float] = {}
        if trace is not None and self.stats.exit_position in trace.positions:
            index = trace.positions.index(self.stats.exit_position)
            signals = dict(zip(trace.names, trace.smoothed[index], strict=True))
        return why_exit(self.stats.exit_reason or "", signals, thresholds_of(self.rule))


def continue_text(request: Request) -> Continuation:
    """Load the models, stream the text to stdout and a summary to stderr."""
    # What is wrong with the numbers is found before a model is loaded.
    tree = TreeConfig(**request.tree) if request.tree else None
    ExitConfig(**request.rule_changes)
    decoder = load(request)
    tokenizer = decoder.tokenizer
    if tokenizer is None:
        raise ValueError(f"{request.model} has no tokenizer")
    rule = exit_rule(request, decoder)
    markers = decoder.planner.markers(rule)
    ids = encode(tokenizer, request.text, request.is_chat)
    console = stdout()

    def write(piece: str, thinking: bool) -> None:
        console.out(piece, style="dim" if thinking else None, highlight=False, end="")

    streamer = ThinkingStreamer(tokenizer, write, markers.start, markers.end, rule.assume_thinking)
    start = time.perf_counter()
    out = decoder.generate(ids.to(decoder.device), **request.decoding, streamer=streamer, exit=rule, tree=tree)
    seconds = time.perf_counter() - start
    console.out("")
    tokens = out.new_tokens[0]
    result = Continuation(
        rule=rule,
        tokens=tokens,
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        stats=out.stats[0],
        seconds=seconds,
        boundary_ids=frozenset(markers.boundary),
        still_thinking=streamer.thinking,
    )
    for line in result.summary():
        note(line)
    return result


def load(request: Request) -> SpecExitDecoder:
    """The decoder over the request's models: the bundled pair where none are named."""
    options = dict(request.loading)
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    if request.model is not None:
        require_model(request.model)
        return load_decoder(request.model, request.draft, quiet=not sys.stderr.isatty(), **options)
    return load_bundled(options.pop("device", None), request.draft, **options)


def require_model(name: str) -> None:
    """Raise ValueError where `name` can only be meant as a folder, and there is none."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"--model must be a folder or a hub id; there is no folder {name}")


def exit_rule(request: Request, decoder: SpecExitDecoder) -> ExitConfig:
    """The rule that the request starts from, changed as it says."""
    changes = dict(request.rule_changes)
    rule = ExitConfig.release() if request.rule == "release" else draft_rule(decoder)
    if request.rule_name is not None:
        rule = ExitConfig.from_draft({} if decoder.draft is None else decoder.draft.calibration, request.rule_name)
    if request.rule == "off" and request.trace and rule.enabled:
        rule = watching(rule)
    elif request.rule == "off":
        changes["enabled"] = False
    elif any(name in changes for name in SIGNALS):
        changes["enabled"] = True  # asked for by name: an error where the draft has no such signal
    return replace(rule, **changes)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, is_chat: bool | None) -> Tensor:
    """Ids of a message in the chat template, or of a text as it is, [1, P]. Says what the tokenizer does not know.

    Raises ValueError where there is no template, or nothing is left of the text.
    """
    if is_chat and not tokenizer.chat_template:
        raise ValueError("--chat needs a tokenizer with a chat template, this one has none: give --prompt")
    if is_chat is None:
        is_chat = bool(tokenizer.chat_template)
    if is_chat:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")[
            "input_ids"
        ]
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt holds no token")
    if tokenizer.unk_token_id is not None and (unknown := int((ids == tokenizer.unk_token_id).sum())):
        note(f"{unknown} of the prompt's {ids.shape[1]} tokens are words that this model does not know")
    return ids


def _finite(rows: list[list[float]]) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in rows]
