"""Raw exit signals at every thinking position of recorded traces, read once: exit rules are then tried without a model.

The text is known, so base and draft read it in chunks, as they read a prompt: the draft's row p is the base's features
of position p and the token at p + 1, in `observe` as in decoding. What comes out are the numbers that the decoder
would have had at these positions, but for the rounding of products of another shape.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specexit import checks
from specexit.attention import chain_context
from specexit.base import BaseModel
from specexit.config import TreeConfig
from specexit.decoder import SpecExitDecoder
from specexit.drafts.base import Draft, DraftBatch
from specexit.drafts.checkpoint import fingerprint_of
from specexit.drafts.eagle3 import Eagle3Draft
from specexit.engine import round_up, slot_bucket
from specexit.files import write_whole
from specexit.identity import fingerprint
from specexit.prefill import CHUNK
from specexit.training.records import Trace

FORMAT = "specexit-signals"
VERSION = "1"
SOURCES = ("fc", "output")
SLOTS = 2**16  # of the cache at a time: of Qwen3-8B 9 GiB


@dataclass(frozen=True)
class RecordedSignals:
    """The signals of n traces, in the order of the traces.

    raw      by source, [total, S] float32: before activation, one row a thinking token, trace after trace
    names    by source, the signals it has: the columns are those of SIGNALS up to the last of them
    offsets  [n + 1] int64: the rows of trace i are offsets[i] to offsets[i + 1]
    traces, base, draft   fingerprints of what they were read from; "" where a draft has none
    """

    raw: Mapping[str, Tensor]
    names: Mapping[str, tuple[str, ...]]
    offsets: Tensor
    traces: str
    base: str
    draft: str

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(source for source in SOURCES if source in self.raw)

    def check_traces(self, traces: Sequence[Trace]) -> None:
        """Raise ValueError where they were read from other traces."""
        if self.traces != trace_fingerprint(traces):
            raise ValueError(
                f"signals must have been recorded from these {len(traces)} traces, were recorded from"
                f" {len(self.offsets) - 1} others: record them again"
            )

    def check_models(self, base: BaseModel, draft: Draft) -> None:
        """Raise ValueError where they were read with another base or another draft."""
        for what, had, now in (
            ("base", self.base, fingerprint(base.model)),
            ("draft", self.draft, _draft_fingerprint(draft)),
        ):
            if had != now:
                raise ValueError(f"signals must have been recorded with this {what}, were recorded with another")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f"raw.{source}": tensor.contiguous() for source, tensor in self.raw.items()}
        about = {"traces": self.traces, "base": self.base, "draft": self.draft, "names": json.dumps(dict(self.names))}
        data = save({**tensors, "offsets": self.offsets}, {"format": FORMAT, "version": VERSION, **about})
        write_whole(path, data)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> RecordedSignals:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError that names the file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {os.fspath(path)}")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
                    raise ValueError(f"it must hold {FORMAT}, version {VERSION}")
                raw = {s: file.get_tensor(f"raw.{s}") for s in SOURCES if f"raw.{s}" in file.keys()}  # noqa: SIM118
                offsets = file.get_tensor("offsets")
            names = {source: tuple(found) for source, found in json.loads(about["names"]).items()}
            return RecordedSignals(raw, names, offsets, about["traces"], about["base"], about["draft"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} cannot be read as recorded signals: {error}") from error


def trace_fingerprint(traces: Sequence[Trace]) -> str:
    """Of the texts of traces, in this order."""
    content = hashlib.sha256()
    for trace in traces:
        text = [trace.id, trace.sample, trace.prompt, trace.thinking, trace.reply[:1]]
        content.update(json.dumps(text).encode() + b"\n")
    return content.hexdigest()


def record_signals(
    decoder: SpecExitDecoder,
    traces: Sequence[Trace],
    *,
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> RecordedSignals:
    """Read the signals of every thinking position of `traces`, from every source that the draft has.

    decoder   its base and its draft; the draft must have signals
    batch     traces that are read at a time, at most
    progress  called with the number of thinking tokens of each batch, when it has been read

    Raises ValueError for a decoder without signals, or traces with ids that this base does not have.
    """
    checks.integer("batch", batch, 1)
    base, draft = decoder.base, decoder.draft
    if draft is None:
        raise ValueError("decoder must have a draft, whose signals are to be recorded, had none")
    if not traces:
        raise ValueError("traces must hold at least one trace, were none")
    with base.lock:
        names = _names(draft)
        if not names:
            raise ValueError("draft must have exit signals to be recorded, had none: fit it first")
        for trace in traces:
            if max(max(trace.prompt), max(trace.thinking), trace.reply[0]) >= base.vocab_size:
                raise ValueError(
                    f"traces must be texts of this base, with ids below {base.vocab_size}; {trace.id!r} has others"
                )
        lengths = torch.tensor([0, *(len(trace.thinking) for trace in traces)])
        offsets = lengths.cumsum(0)
        raw: dict[str, Tensor] = {}
        with torch.inference_mode(), base.attached():
            for chosen in _batches([len(trace.prompt) + len(trace.thinking) for trace in traces], batch):
                found = _read(base, draft, tuple(names), [traces[i] for i in chosen])
                for source, rows in found.items():
                    whole = raw.setdefault(source, torch.empty(int(offsets[-1]), rows[0].shape[1]))
                    for i, row in zip(chosen, rows, strict=True):
                        whole[offsets[i] : offsets[i + 1]] = row
                if progress is not None:
                    progress(sum(len(traces[i].thinking) for i in chosen))
        draft.select_source("auto")
    prints = trace_fingerprint(traces), fingerprint(base.model), _draft_fingerprint(draft)
    return RecordedSignals(raw, names, offsets, *prints)


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Traces that are read together, by index: those of like length, as a shorter one is padded to the longest."""
    chosen: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chosen and (len(chosen) == most or (len(chosen) + 1) * lengths[index] > SLOTS):
            yield chosen
            chosen = []
        chosen.append(index)
    yield chosen


def _names(draft: Draft) -> dict[str, tuple[str, ...]]:
    """The signals of each source that the draft has."""
    found = {}
    for source in SOURCES:
        try:
            draft.select_source(source)
        except ValueError:
            continue
        if draft.signals:
            found[source] = tuple(draft.signals)
    return found


def _read(base: BaseModel, draft: Draft, sources: Sequence[str], traces: Sequence[Trace]) -> dict[str, list[Tensor]]:
    """The raw signals of some traces, by source: [thinking tokens, S] each."""
    starts = [len(trace.prompt) for trace in traces]
    ends = [len(trace.prompt) + len(trace.thinking) for trace in traces]
    count, width, device = len(traces), max(ends), base.device
    texts = [[*trace.prompt, *trace.thinking, trace.reply[0]] for trace in traces]
    tokens = torch.tensor([text + [0] * (width + 1 - len(text)) for text in texts], dtype=torch.int32, device=device)
    lengths = torch.zeros(count, dtype=torch.int32, device=device)
    cache = base.new_cache(lengths, round_up(width, slot_bucket(device)))
    readers: dict[str, DraftBatch] = {}
    for source in sources:
        draft.select_source(source)
        readers[source] = draft.allocate(count, width, TreeConfig.none(), device, base.dtype)
    pieces: dict[str, list[Tensor]] = {source: [] for source in sources}
    observed = width  # where the first signals are of
    for start in range(0, width, CHUNK):
        rows = min(CHUNK, width - start)
        lengths.fill_(start)
        context = chain_context(lengths, rows, start)
        _, features = base.forward(tokens[:, start : start + rows], context, cache, last_logits=True)
        following = tokens[:, start + 1 : start + 1 + rows]
        for source, reader in readers.items():
            if start + rows <= min(starts):
                reader.read(features, following, lengths)
                continue
            observed = min(observed, start)
            signals = reader.observe(features, following, lengths, torch.full_like(lengths, rows - 1))
            pieces[source].append(signals.float().cpu())
    return {
        source: [
            row[start - observed : end - observed]
            for row, start, end in zip(torch.cat(found, 1), starts, ends, strict=True)
        ]
        for source, found in pieces.items()
    }


def _draft_fingerprint(draft: Draft) -> str:
    return fingerprint_of(draft) if isinstance(draft, Eagle3Draft) else ""
