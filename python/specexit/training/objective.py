"""What a batch costs a draft: reads of the base and the draft's forward, turned into losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from specexit.drafts import Eagle3Draft
from specexit.training.data import BaseReader, Example
from specexit.training.drafting import Placement
from specexit.training.losses import Balance, gradient_norms, signal_losses, token_loss
from specexit.training.unroll import Unroll, Unrolled, exit_signals, fc_signals
from specexit_kernels.state import SIGNALS

HELD_PREDICTIONS = 2**27  # logits at once where they are only counted


class Losses(NamedTuple):
    """Means over the global batch; each process has its own part of them, times the number of processes."""

    tokens: list[Tensor]  # of each step of the unroll; empty where only signals are trained
    output: Tensor | None  # [3] of the exit head, None where it is not trained
    fc: Tensor | None  # [3] of fc, likewise
    shared: Tensor  # [B, R, H]: the layer's normed output of step 0

    def values(self) -> Tensor:
        parts = [torch.stack(self.tokens)] if self.tokens else []
        parts += [signals.detach() for signals in (self.output, self.fc) if signals is not None]
        return torch.cat([part.detach().double() for part in parts])


class Objective:
    """A draft, the base that it is trained for, and which of its weights are trained.

    placement     where its signals are trained
    signals_only  all but the rows of the signals stay as they are
    """

    def __init__(
        self, draft: Eagle3Draft, reader: BaseReader, placement: Placement, signals_only: bool, decay: float
    ) -> None:
        self.draft = draft
        self.reader = reader
        self.output = placement in ("output", "both")
        self.fc = placement in ("fc", "both")
        self.signals_only = signals_only
        self.decay = decay
        self._unroll = Unroll(draft)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained; of fc_weight maybe its last rows alone, the others getting no gradient."""
        named = dict(self.draft.named_parameters(recurse=False))  # an embedding of the draft's own stays as it is
        tokens = named.keys() - set(_EXIT_HEAD)
        trained = {"fc_weight"} if self.fc else set()
        trained |= set(_EXIT_HEAD) if self.output else set()
        trained |= set() if self.signals_only else tokens
        return {name: parameter for name, parameter in named.items() if name in trained}

    def untouched(self) -> list[Tensor]:
        """Weights that are to stay as they are."""
        trained, draft = self.parameters(), self.draft
        rows = [draft.fc_weight[: draft.config.hidden_size]] if self.signals_only and "fc_weight" in trained else []
        return rows + [parameter for name, parameter in draft.named_parameters() if name not in trained]

    def gradient_groups(self) -> list[list[Tensor]]:
        """Gradients that are clipped together: of the token part, of the exit head, of the signals' rows of fc. Those
        of a signal's rows are large where its own loss is, which is no reason to learn less of the tokens."""
        H = self.draft.config.hidden_size
        tokens: list[Tensor] = []
        head: list[Tensor] = []
        fc: list[Tensor] = []
        for name, parameter in self.parameters().items():
            if parameter.grad is None:
                continue
            if name == "fc_weight":
                tokens.append(parameter.grad[:H])
                fc.append(parameter.grad[H:])
            else:
                (head if name in _EXIT_HEAD else tokens).append(parameter.grad)
        return [tokens, head, fc]

    @torch.no_grad()
    def read(self, example: Example) -> dict[str, Tensor]:
        """What of an example costs a forward of the base, by row."""
        reading = self.reader(example.tokens)
        if not self.signals_only:
            return reading._asdict()
        kept = {"features": reading.features} if self.fc else {}
        if self.output:
            tokens = example.tokens[1:].to(reading.features.device)
            with self._autocast():
                kept["hidden"] = self._unroll(reading.features.unsqueeze(0), tokens.unsqueeze(0), 1).hidden[0][0]
        return kept

    def rows(self, example: Example, reading: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All that a batch needs of an example, by row."""
        own = {"tokens": example.tokens[1:], "values": example.values, "weights": example.weights}
        if not self.signals_only:
            own["generated"] = example.generated
        return {**own, **reading}

    def sizes(self, batch: Mapping[str, Tensor], depth: int) -> Tensor:
        """Weights that each loss sums over: [depth + 3] float64, of tokens by step and of signals."""
        tokens: list[Tensor] = []
        if not self.signals_only:
            weights = self._token_weights(batch)
            tokens = [weights[:, step:].sum() for step in range(depth)]
        signals = batch["weights"].flatten(0, 1).sum(0)
        return torch.cat([torch.stack([*tokens]), signals]).double() if tokens else signals.double()

    def losses(self, batch: Mapping[str, Tensor], depth: int, sizes: Tensor, processes: int = 1) -> Losses:
        """Losses of a batch as parts of the global one, `sizes` being the sums over all `processes`."""
        scale = processes / sizes.clamp(min=1e-9)
        with self._autocast():
            unrolled = self._forward(batch, depth)
            tokens = []
            if not self.signals_only:
                weights, lm_head = self._token_weights(batch), self.draft.lm_head
                targets = batch["targets"].flatten(0, 1)
                for step, hidden in enumerate(unrolled.hidden):
                    counted = F.pad(weights[:, step:], (step, 0)).flatten()
                    tokens.append(token_loss(hidden.flatten(0, 1), lm_head, targets, counted, step) * scale[step])
            values, weights = batch["values"], batch["weights"]
            output = fc = None
            if self.output and unrolled.output is not None:
                output = signal_losses(unrolled.output, values, weights) * scale[-len(SIGNALS) :]
            if self.fc:
                fc = signal_losses(unrolled.fc, values, weights) * scale[-len(SIGNALS) :]
        return Losses(tokens, output, fc, unrolled.hidden[0] if unrolled.hidden else batch["features"])

    def norms(self, losses: Losses) -> Tensor | None:
        """Squared norms [4] at the layer's normed output in step 0 of the gradients of the token loss and of the exit
        head's three; None where they share no weight."""
        if not losses.tokens or losses.output is None:
            return None
        return gradient_norms([losses.tokens[0], *losses.output.unbind()], losses.shared)

    def total(self, losses: Losses, balance: Balance) -> Tensor:
        parts = [loss * self.decay**step for step, loss in enumerate(losses.tokens)]
        if losses.output is not None:
            parts += [w * loss for w, loss in zip(self.weights(balance), losses.output.unbind(), strict=True)]
        if losses.fc is not None:
            parts.append(losses.fc.sum())
        return torch.stack(parts).sum()

    def weights(self, balance: Balance) -> list[float]:
        """Of the exit head's losses: balanced where they share the layer with the tokens."""
        return [1.0] * len(SIGNALS) if self.signals_only else balance.weights

    @torch.no_grad()
    def measure(self, batch: Mapping[str, Tensor], depth: int) -> Tensor:
        """Sums over a batch [4 * depth + 9] float64: of tokens by step (rows, agreements, rows with a loss, loss), then
        of signals (weights, losses of output, losses of fc)."""
        ones = torch.ones(depth + len(SIGNALS), dtype=torch.float64, device=batch["weights"].device)
        losses = self.losses(batch, depth, ones)
        zeros = ones.new_zeros(len(SIGNALS))
        parts = [batch["weights"].flatten(0, 1).sum(0).double()]
        parts += [zeros if part is None else part.double() for part in (losses.output, losses.fc)]
        if self.signals_only:
            return torch.cat(parts)
        generated, weights = batch["generated"], self._token_weights(batch)
        with self._autocast():
            hidden = self._forward(batch, depth).hidden
            agreed = [self._agreements(row, batch, step) for step, row in enumerate(hidden)]
        tokens = (
            [generated[:, step:].sum() for step in range(depth)],
            agreed,
            [weights[:, step:].sum() for step in range(depth)],
            losses.tokens,
        )
        return torch.cat([*(torch.stack([x.double() for x in part]) for part in tokens), *parts])

    def _agreements(self, hidden: Tensor, batch: Mapping[str, Tensor], step: int) -> Tensor:
        """Generated tokens at which the draft's best is the base's; one that the draft cannot propose is none."""
        rows = F.pad(self._token_weights(batch)[:, step:], (step, 0)).flatten().nonzero().squeeze(1)
        hidden, targets = hidden.flatten(0, 1), batch["targets"].flatten(0, 1)
        agreed = hidden.new_zeros((), dtype=torch.int64)
        for own in rows.split(max(1, HELD_PREDICTIONS // len(self.draft.lm_head))):
            predicted = F.linear(hidden[own - step], self.draft.lm_head).argmax(-1)
            agreed += (predicted == targets[own].argmax(-1)).sum()
        return agreed

    def _forward(self, batch: Mapping[str, Tensor], depth: int) -> Unrolled:
        if not self.signals_only:
            return self._unroll(batch["features"], batch["tokens"], depth)
        hidden = [batch["hidden"]] if self.output else []
        fc = fc_signals(self.draft, batch["features"]) if self.fc else batch["weights"].new_empty(0)
        return Unrolled(hidden, fc, exit_signals(self.draft, hidden[0]) if hidden else None)

    def _token_weights(self, batch: Mapping[str, Tensor]) -> Tensor:
        return (batch["generated"] & batch["covered"]).float()

    def _autocast(self) -> Any:
        """bfloat16 where a GPU's base is in half precision; else the draft's own."""
        device = self.draft.fc_weight.device.type
        half = self.reader.base.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda" and half)


_EXIT_HEAD = ("exit_weight", "exit_bias")


def summary(sums: Sequence[float], depth: int) -> dict[str, Any]:
    """The sums of `Objective.measure` over all batches as means, NaN-free: what had nothing to measure is None."""

    def means(totals: Sequence[float], counts: Sequence[float]) -> list[float | None]:
        return [total / count if count else None for total, count in zip(totals, counts, strict=True)]

    *tokens, signals = sums[: -3 * len(SIGNALS)], sums[-3 * len(SIGNALS) :]
    result: dict[str, Any] = {}
    if tokens[0]:
        rows, agreed, counted, loss = (tokens[0][k * depth : (k + 1) * depth] for k in range(4))
        result |= {"agreement": means(agreed, rows), "token_loss": means(loss, counted)}
    for k, name in ((1, "output"), (2, "fc")):
        found = means(signals[k * len(SIGNALS) : (k + 1) * len(SIGNALS)], signals[: len(SIGNALS)])
        if any(found):
            result[name] = dict(zip(SIGNALS, found, strict=True))
    return result
