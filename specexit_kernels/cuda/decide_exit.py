"""The launch of csrc/decide_exit.cu."""

from __future__ import annotations

from torch import Tensor

from specexit_kernels.cuda.launch import stream, view
from specexit_kernels.decide_exit import outputs
from specexit_kernels.state import DecodeState, ExitRules


def decide_exit_cuda(
    signals: Tensor,
    rules: list[Tensor],
    smoothing: int,
    per_step: bool,
    has_minimum: bool,
    has_budget: bool,
    force_stops: bool,
    state: list[Tensor],
) -> Tensor:
    """The op `decide_exit` on a GPU."""
    cut = outputs(signals, rules, smoothing, per_step, has_minimum, has_budget, force_stops, state)
    s = DecodeState.of(state)
    r = ExitRules.of(rules, smoothing, per_step, has_minimum, has_budget, force_stops)
    with stream(signals.device) as (module, queue):
        module.decide_exit(
            view(signals if signals.shape[2] else None, 3),
            [field.data_ptr() for field in rules],
            [r.boundary.numel(), r.start.numel(), r.end.numel(), r.force.numel()],
            [smoothing, int(per_step), int(has_minimum), int(has_budget), int(force_stops)],
            [field.data_ptr() for field in state],
            s.batch,
            s.output.shape[1],
            s.signals,
            s.forced.shape[1],
            s.tail.shape[1],
            s.history.shape[2],
            s.trace.shape[1] > 0,
            cut.data_ptr(),
            queue,
        )
    return cut
