"""Seconds that prompts take with and without speculation, with and without exit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from specexit.config import TreeConfig
from specexit.decoder import SpecExitDecoder
from specexit.exit import ExitConfig
from specexit.training.records import Trace

_WARM_UP_TOKENS = 32


def wall_clock(
    decoder: SpecExitDecoder, traces: Sequence[Trace], rule: ExitConfig, temperature: float
) -> list[dict[str, Any]]:
    """The prompts of some traces decoded in four ways, one at a time, the ways taking turns on each prompt.

    The exit falls in the same place with and without speculation: what differs is the time.
    """
    off, none = ExitConfig.off(), TreeConfig.none()
    ways: dict[str, tuple[ExitConfig, TreeConfig]] = {
        "full thinking": (off, none),
        "speculation": (off, decoder.tree_for(1)),
        "speculation and exit": (rule, decoder.tree_for(1)),
        "exit without speculation": (rule, none),
    }
    sums = {name: {"seconds": 0.0, "steps": 0, "new_tokens": 0, "thinking_tokens": 0} for name in ways}
    limit = max(len(trace.thinking) + len(trace.reply) for trace in traces)

    def decode(name: str, trace: Trace, tokens: int) -> None:
        exit, tree = ways[name]
        prompt = torch.tensor([trace.prompt], device=decoder.device)
        start = time.perf_counter()
        out = decoder.generate(prompt, max_new_tokens=tokens, temperature=temperature, seed=0, exit=exit, tree=tree)
        if decoder.device.type == "cuda":
            torch.cuda.synchronize(decoder.device)
        stats, own = out.stats[0], sums[name]
        own["seconds"] += time.perf_counter() - start
        own["steps"] += stats.steps
        own["new_tokens"] += stats.new_tokens
        own["thinking_tokens"] += stats.thinking_tokens

    for name in ways:
        decode(name, traces[0], _WARM_UP_TOKENS)
        sums[name] = dict.fromkeys(sums[name], 0)
    for trace in traces:
        for name in ways:
            decode(name, trace, limit)
    return [{"way": name, "prompts": len(traces), **own} for name, own in sums.items()]
