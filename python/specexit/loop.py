"""The host's side of decoding: start a batch, step until every row has ended, collect what is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from specexit.base import BaseModel
from specexit.config import TreeConfig
from specexit.drafts.base import Draft
from specexit.output import RowStats, SignalTrace
from specexit.prefill import first_token, observe_root, prefill
from specexit.prompts import Prompts
from specexit.step import Buffers, Choose, chain_form, decode_step
from specexit_kernels import DecodeState, ExitReason, ExitRules, Finish
from specexit_kernels.state import SIGNALS

BUCKET = 64  # the cache grows in multiples of this many slots


@dataclass
class Request:
    """A batch to decode.

    prefixes  each row's ids as transformers would pass them to a criterion, padding included; grows with the text
    limits    a row's tokens stand at positions below its limit
    slots     the cache's hard limit, or None: it grows
    thinking  whether each prompt ends inside the thinking text
    trace     record the signals of every thinking position
    """

    prompts: Prompts
    prefixes: list[list[int]]
    limits: list[int]
    slots: int | None
    stop_ids: list[int]
    choose: Choose
    rules: ExitRules
    thinking: list[bool]
    trace: bool
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None


@torch.inference_mode()
def decode(base: BaseModel, draft: Draft | None, config: TreeConfig, request: Request) -> list[RowStats]:
    """Decode a batch to its end. The new tokens are appended to `request.prefixes`."""
    rows = [RowStats(prompt_tokens=length) for length in request.prompts.lengths]
    with base.attached():
        buffers = allocate(base, draft, config, request)
        prefill(base, draft, request.prompts, buffers)
        if 1 in request.prompts.lengths:
            first_token(base, request.choose, request.rules, buffers)
            publish(buffers.state, request, rows)
        if draft is not None:
            observe_root(draft, buffers)
        while any(row.finish_reason is None for row in rows):
            if request.slots is None:
                # A row that a criterion has stopped may have committed a path whose end it did not publish.
                longest = max(row.prompt_tokens + row.new_tokens for row in rows) + config.max_depth
                grow(draft, buffers, longest + config.nodes)
            decode_step(base, draft, config, request.choose, request.rules, buffers)
            publish(buffers.state, request, rows)
    for row, position, reason in zip(
        rows, buffers.state.exit_position.tolist(), buffers.state.exit_reason.tolist(), strict=True
    ):
        # An exit whose end of thinking a criterion has cut off, in the same step, did not happen.
        if reason != ExitReason.NONE and position + 1 < row.prompt_tokens + row.new_tokens:
            row.exit_position = position
            row.exit_reason = "signals" if reason == ExitReason.SIGNALS else "budget"
    return rows


def allocate(base: BaseModel, draft: Draft | None, config: TreeConfig, request: Request) -> Buffers:
    """The buffers of a batch, and the draft's; the addresses hold until the cache grows."""
    prompts, rules, device = request.prompts, request.rules, base.device
    batch = len(prompts.lengths)
    state = DecodeState.empty(
        batch,
        depth=config.max_depth,
        signals=rules.thresholds.shape[1],
        forced=max(rules.force.shape[0], 1),
        tail=rules.tail,
        window=rules.window,
        trace=request.trace,
        device=device,
    )
    state.prompt_lengths.copy_(torch.tensor(prompts.lengths))
    state.limits.copy_(torch.tensor(request.limits))
    state.thinking.copy_(torch.tensor(request.thinking))
    for index in range(batch if rules.tail else 0):
        before = prompts.row(index)[-1 - rules.tail : -1]  # the root is the prompt's last token
        if before:
            state.tail[index, -len(before) :] = torch.tensor(before)
    slots = request.slots or round_up(max(prompts.lengths) + config.nodes)
    cache = base.new_cache(state.lengths, slots)
    if draft is not None:
        draft.allocate(batch, slots, config, device, base.dtype)
    return Buffers(
        chain=chain_form(batch, config.nodes, device) if config.is_chain else None,
        state=state,
        cache=cache,
        stop_ids=torch.tensor(request.stop_ids, dtype=torch.int32, device=device),
        last_features=torch.zeros(batch, base.feature_size, dtype=base.dtype, device=device),
        no_signals=torch.zeros(batch, config.max_depth + 1, 0, dtype=torch.float32, device=device),
    )


def round_up(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET


def grow(draft: Draft | None, buffers: Buffers, slots: int) -> None:
    """Make room for `slots` a row, in steps of half the present size so that copying stays a small part."""
    cache = buffers.cache
    if slots > cache.slots:
        before = cache.slots
        cache.grow(round_up(max(slots, before + before // 2)))
        if draft is not None:
            draft.grow(cache.slots - before)


def publish(state: DecodeState, request: Request, rows: list[RowStats]) -> None:
    """Read what a step has published and hand it on: prefixes, statistics, streamer, criteria.

    The tokens come from the device in one transfer, the trace in another.
    """
    count = state.output.shape[1]
    packed = torch.cat([state.output, torch.stack([state.n_output, state.finished], 1)], 1).tolist()
    traces = state.trace.tolist() if state.trace.numel() else None
    for index, row in enumerate(rows):
        if row.finish_reason is not None:
            continue
        *output, n_output, finished = packed[index][: count + 2]
        tokens = output[:n_output]
        if request.criteria or request.streamer is not None:
            tokens = offer(tokens, index, request, row)
        else:
            request.prefixes[index].extend(tokens)
        if traces is not None:  # one position for each token published
            extend_trace(row, traces[index][: len(tokens)])
        row.steps += 1
        row.accepted.append(len(tokens))
        row.new_tokens += len(tokens)
        if row.finish_reason == "criteria":
            state.finished[index] = Finish.STOP
        elif finished == Finish.STOP:
            row.finish_reason = "stop"
        elif finished == Finish.LENGTH:
            row.finish_reason = "length"


def offer(tokens: Sequence[int], index: int, request: Request, row: RowStats) -> list[int]:
    """Hand tokens to the streamer and the criteria one by one, as plain decoding would; stop where a criterion does."""
    prefix, kept = request.prefixes[index], []
    for token in tokens:
        prefix.append(token)
        kept.append(token)
        if request.streamer is not None:
            request.streamer.put(torch.tensor([token]))
        if request.criteria:
            ids = torch.tensor([prefix], dtype=torch.int64, device=request.prompts.tokens.device)
            if bool(request.criteria(ids, None).all()):
                row.finish_reason = "criteria"
                break
    return kept


def extend_trace(row: RowStats, steps: list[list[list[float]]]) -> None:
    """Add the read positions of one step; `steps` is [n][x, e][S], NaN where nothing was read."""
    if not steps:
        return
    if row.trace is None:
        row.trace = SignalTrace(names=SIGNALS[: len(steps[0][0])])
    first = row.prompt_tokens + row.new_tokens - 1  # the step's root
    for offset, (signals, smoothed) in enumerate(steps):
        if any(value == value for value in signals):
            row.trace.positions.append(first + offset)
            row.trace.signals.append(signals)
            row.trace.smoothed.append(smoothed)
