"""Annotating, reading signals and fitting on CUDA: what they give on the CPU, and a draft that decodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair, load_draft
from specexit.training.annotate import annotate
from specexit.training.fit import fit
from specexit.training.fit_config import FitConfig
from specexit.training.problems import read_problems
from specexit.training.records import Trace, read_traces
from specexit.training.signals import record_signals

DEVICE = "cuda"
PROBLEMS = 6


def load(device: str, dtype: torch.dtype = torch.float32) -> SpecExitDecoder:
    pair = bundled_pair()
    return SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=dtype, device=device)


@pytest.fixture(scope="module")
def decoders() -> dict[str, SpecExitDecoder]:
    return {device: load(device) for device in ("cpu", DEVICE)}


@pytest.fixture(scope="module")
def files(decoders, tmp_path_factory) -> dict[str, Path]:
    """The same texts, annotated on either device: phrasing is a near tie, so each would write its own."""
    folder = tmp_path_factory.mktemp("traces")
    problems = read_problems(bundled_pair().calibration, decoders["cpu"].tokenizer)[:PROBLEMS]
    options = {"extractor": "last-number", "max_answer_tokens": 12, "max_new_tokens": 700}
    annotate(decoders["cpu"], problems, folder / "sampled", slots=PROBLEMS, temperature=0.7, **options)
    texts = [
        {"id": trace.id, "completion_ids": [*trace.thinking, *trace.reply]}
        for trace in read_traces(folder / "sampled")[1]
    ]
    (folder / "texts").write_text("".join(json.dumps(text) + "\n" for text in texts))
    for device, decoder in decoders.items():
        annotate(decoder, problems, folder / device, texts=folder / "texts", **options)
    return {device: folder / device for device in decoders}


@pytest.fixture(scope="module")
def traces(files) -> dict[str, list[Trace]]:
    return {device: read_traces(file)[1] for device, file in files.items()}


def test_forced_answers_are_the_cpus(traces):
    for here, there in zip(traces["cpu"], traces[DEVICE], strict=True):
        assert (here.boundaries, here.answers, here.sufficient) == (there.boundaries, there.answers, there.sufficient)
        torch.testing.assert_close(
            torch.tensor(there.probabilities), torch.tensor(here.probabilities), atol=2e-3, rtol=0
        )


def test_signals_are_the_cpus(decoders, traces):
    found = [record_signals(decoder, traces["cpu"]) for decoder in decoders.values()]
    for source, expected in found[0].raw.items():
        torch.testing.assert_close(found[1].raw[source], expected, atol=2e-2, rtol=1e-3)


def test_a_step_of_training_is_the_cpus(decoders, files, tmp_path):
    config = FitConfig(steps=4, batch_size=2, depth=3, placement="both", checkpoint_every=2)
    for device, decoder in decoders.items():
        fit(decoder.model, files["cpu"], tmp_path / device, config)
    first = [
        next(line for line in map(json.loads, (tmp_path / device / "training.jsonl").open()) if line["step"] == 1)
        for device in decoders
    ]
    for name in ("tokens", "output", "fc"):
        values = [list(line[name].values()) if isinstance(line[name], dict) else line[name] for line in first]
        torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(values[0]), atol=1e-3, rtol=1e-3)


def test_a_base_in_bfloat16_gets_a_draft_that_decodes(traces, tmp_path):
    decoder = load(DEVICE, torch.bfloat16)
    path = tmp_path / "traces"
    problems = read_problems(bundled_pair().calibration, decoder.tokenizer)[:PROBLEMS]
    annotate(decoder, problems, path, extractor="last-number", max_answer_tokens=12, max_new_tokens=700, slots=PROBLEMS)
    fit(decoder.model, path, tmp_path / "draft", FitConfig(steps=6, batch_size=2, depth=3, checkpoint_every=0))
    draft = load_draft(tmp_path / "draft", embedding=decoder.model.get_input_embeddings())
    fitted = SpecExitDecoder(decoder.model, draft, tokenizer=decoder.tokenizer, exit=ExitConfig.off())
    prompt = torch.tensor([traces["cpu"][0].prompt], device=DEVICE)
    out = fitted.generate(prompt, max_new_tokens=20, temperature=0.0, tree=TreeConfig(nodes=12, depth=3, top_k=4))
    assert len(out.new_tokens[0]) == 20
