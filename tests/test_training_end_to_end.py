"""As a new user would: the four commands in their order, on a random model made a moment ago, and the draft in use."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair
from specexit.cli import main
from specexit.training.records import read_traces


@pytest.fixture
def base(tmp_path: Path, rng: torch.Generator) -> Path:
    """The folder of a tiny random model, whose tokenizer knows `</think>`."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_pair().base)
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 3,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_lines(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def annotated(folder: Path, base: Path, name: str, count: int, source: random.Random) -> Path:
    """Traces of texts that no model would write; what it answers when they are cut is its own."""
    problems, texts = [], []
    for number in range(count):
        value = source.randrange(100)
        check = f"Wait, verify 1: a = {value}.\n\n" * source.randint(2, 6)
        problems.append({"id": f"{name}-{number}", "question": f"a = {value} ; a ?", "answer": f"{value:02d}"})
        completion = f"First a = {value}.\n\n{check}</think>\n\nThe answer is {value:02d}.<eos>"
        texts.append({"id": f"{name}-{number}", "completion": completion})
    files = (
        write_lines(folder / f"{name}.jsonl", problems),
        write_lines(folder / f"{name}-texts.jsonl", texts),
        folder / f"{name}-traces.jsonl",
    )
    options = ["--model", str(base), "--extractor", "last-number", "--max-answer-tokens", "8", "--device", "cpu"]
    command = ["train", "annotate", "--problems", str(files[0]), "--texts", str(files[1]), "--output", str(files[2])]
    assert main([*command, *options]) == 0
    return files[2]


def test_from_problems_to_a_draft_that_is_used(
    tmp_path: Path, base: Path, rng: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    source = random.Random(int(torch.randint(2**31, (), generator=rng)))
    train, calibration, test = (
        annotated(tmp_path, base, name, count, source)
        for name, count in (("train", 12), ("calibration", 30), ("test", 8))
    )
    _, traces = read_traces(train)
    assert all(trace.flaw is None and len(trace.boundaries) >= 3 for trace in traces)
    draft, model = tmp_path / "draft", ["--model", str(base), "--device", "cpu"]

    sizes = ["--steps", "6", "--batch-size", "4", "--depth", "3", "--placement", "both"]
    assert main(["train", "fit", *model, "--traces", str(train), "--output", str(draft), *sizes]) == 0
    before = (draft / "model.safetensors").read_bytes()
    again = ["--init", str(draft), "--signals-only", "--steps", "4", "--output", str(tmp_path / "again")]
    assert main(["train", "fit", *model, "--traces", str(train), *again]) == 0

    capsys.readouterr()
    common = [*model, "--draft", str(draft), "--temperature", "0"]
    assert main(["calibrate", *common, "--traces", str(calibration)]) == 1
    assert "takes about 499 problems, there were 30" in " ".join(capsys.readouterr().err.split())
    # A random model answers at random, so no rule loses little: what may be lost is all.
    assert main(["calibrate", *common, "--traces", str(calibration), "--max-loss", "1", "--estimate", "--default"]) == 0
    assert "estimated" in capsys.readouterr().out
    assert (draft / "model.safetensors").read_bytes() == before

    tables = tmp_path / "tables"
    sets = ["--calibration", str(calibration), "--test", str(test), "--output", str(tables)]
    assert main(["train", "ablate", *common, *sets, "--timed", "1"]) == 0
    assert json.loads((tables / "ablation.json").read_text())
    assert "oracle" in (tables / "ablation.md").read_text()

    decoder = SpecExitDecoder.from_pretrained(base, draft, device="cpu")
    assert decoder.exit == ExitConfig.from_draft(decoder.draft.calibration)
    prompt = torch.tensor([traces[0].prompt])
    texts = [
        decoder.generate(prompt, max_new_tokens=40, temperature=0, tree=tree)
        for tree in (TreeConfig.none(), TreeConfig.chain(3), TreeConfig(nodes=12, depth=3, top_k=4))
    ]
    assert len({tuple(out.new_tokens[0]) for out in texts}) == 1
    assert len({out.stats[0].exit_position for out in texts}) == 1
