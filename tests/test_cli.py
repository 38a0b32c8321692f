"""The command line: what it prints, writes and returns, on good requests and bad ones."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_files import largest_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specexit import ExitConfig, bundled_pair, load_problems
from specexit.cli import main
from specexit.cli.comparison import Comparison, is_correct, until_end
from specexit.cli.console import RunFailed, write_whole
from specexit.cli.plot import SignalCurves, draw_signals
from specexit.cli.stream import ThinkingStreamer
from specexit.drafts.calibration import from_thresholds
from specexit_kernels.state import SIGNALS

CHAT = "a = 5 3 ; b = a - 9 ; c = b + 4 ; c ?"
NAMES = ("confidence", "progress", "remaining")


def words(text: str) -> str:
    """Without line breaks, which depend on the terminal's width."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(bundled_pair().base)


# --- help, usage, start-up


def test_help_and_usage_errors_need_neither_torch_nor_transformers() -> None:
    code = """
import sys
from specexit.cli import main
pages = [["--help"], [], ["demo", "--help"], ["generate", "--help"], ["info", "--help"]]
assert [main(page) for page in pages] == [0] * 5
assert main(["demo", "--problems", "none"]) == 2
slow = {"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for taught in ("specexit demo --problems 8 --plot signals.png", "specexit generate --chat", "--thinking-budget"):
        assert taught in done.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "specexit", "genrate"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command 'genrate'" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--problems", "0"], "--problems"),
        (["demo", "--problems", "301"], "--problems must be at most 300, was 301"),
        (["demo", "--batch-size", "0"], "--batch-size"),
        (["demo", "--plot", "picture.gif"], "--plot must end in .png, .svg, .pdf, was picture.gif"),
        (["demo", "--json", "no/such/folder/x.json"], "--json: there is no directory no/such/folder"),
        (["demo", "--json", "."], "--json must be a file, . is a directory"),
        (["demo", "--device", "gpu"], "--device must be cpu, cuda or cuda:1 and so on, was gpu"),
        (["demo", "--device", "cuda:99"], "--device cuda:99 is not there"),
        (["generate", "--chat", "x", "--prompt", "y"], "give --prompt or --chat, not both"),
        (["generate", "--chat", "x", "--release", "--no-exit"], "give one of --rule, --release and --no-exit"),
        (["generate", "--chat", "x", "--release", "--rule", "a"], "give one of --rule, --release and --no-exit"),
        (["generate", "--chat", "x", "--rule", "half"], "rule must be one of no_loss, one_point, was 'half'"),
        (["generate", "--chat", " "], "the prompt is empty"),
        (["generate", "--chat", "a\udcff"], "the prompt is not valid UTF-8"),
        (["generate", "--chat", "x", "--trace", "-"], "--trace must be a file"),
        (["generate", "--chat", "x", "--confidence", "high"], "--confidence must be a number or off, was high"),
        (["generate", "--chat", "x", "--confidence", "1.5"], "confidence must be between 0 and 1, was 1.5"),
        (["generate", "--chat", "x", "--remaining", "nan"], "remaining must be finite and at least 0, was nan"),
        (["generate", "--chat", "x", "--top-p", "1.5"], "--top-p"),
        (["generate", "--chat", "x", "--hard-budget"], "hard_budget must come with a thinking_budget"),
        (["generate", "--chat", "x", "--smoothing", "median"], "--smoothing"),
        (["generate", "--chat", "x", "--tree-nodes", "0"], "nodes must be between 1 and 256, was 0"),
        (["generate", "--chat", "x", "--model", "./no/model"], "there is no folder ./no/model"),
        (["generate", "--chat", "x", "--draft", "./no/draft"], "there is no folder ./no/draft"),
        (["generate", "--chat", "x", "--model", str(bundled_pair().base), "--progress", "0.5"], "the draft gives none"),
    ],
)
def test_bad_requests_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in err


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        main(["--debug", "generate", "--chat", ""])


# --- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "result", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path)
    write_whole(link, b"new")
    assert path.read_bytes() == b"new"
    assert link.is_symlink()

    with largest_file(1), pytest.raises(RunFailed, match="result could not be written: File too large"):
        write_whole(path, b"newer")
    assert path.read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == [link, path]  # and no half of a file beside it


def test_a_pipe_is_written_to_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"data")
    assert os.read(reader, 10) == b"data"
    os.close(reader)
    assert pipe.is_fifo()


# --- the demo


def test_answers_are_read_as_the_model_writes_them() -> None:
    assert is_correct("So d = 12.\n\n</think>\n\nThe answer is 07.", "07")
    assert is_correct("The answer is 12. The answer is 07.", "07")
    assert not is_correct("The answer is 07.", "70")
    assert not is_correct("The answer is 071.", "07")
    assert not is_correct("So d = 07.\n\nWait, recompute 1", "07")  # it never came to an answer


def test_a_row_ends_with_its_first_end_of_sequence() -> None:
    assert until_end([5, 2, 0, 0], [2]) == [5, 2]
    assert until_end([5, 6, 2, 7], [7, 6]) == [5, 6]
    assert until_end([5, 6], [2]) == [5, 6]
    assert until_end([], [2]) == []


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "signals.png"
    arguments = ["demo", "--problems", "2", "--batch-size", "2", "--device", "cpu"]
    assert main([*arguments, "--json", str(results), "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert "identical to generate's, token for token (2 problems)" in words(out)
    assert "Exit after" in out
    assert "The answer is" in out
    assert "Not generated" in out
    assert err.splitlines() == [
        "test problems: 2, in three modes; batch size: 2; device: cpu",
        f"picture: {picture}",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")

    report = json.loads(results.read_text())
    assert report["problems"] == 2
    assert report["device"] == "cpu"
    assert report["batch_size"] == 2
    assert report["identical_text"] is True
    modes = report["modes"]
    assert list(modes) == ["autoregressive", "speculative", "specexit"]
    for mode in modes.values():
        assert set(mode) == {"accuracy", "thinking_tokens", "new_tokens", "steps", "tokens_per_step", "seconds"}
        assert 0 <= mode["accuracy"] <= 1
        assert 0 < mode["thinking_tokens"] < mode["new_tokens"]
        assert mode["tokens_per_step"] == mode["new_tokens"] / mode["steps"]
        assert mode["seconds"] > 0
    plain, speculative, cut = modes.values()
    assert plain["steps"] == plain["new_tokens"] == speculative["new_tokens"]
    assert speculative["thinking_tokens"] == plain["thinking_tokens"]
    assert speculative["tokens_per_step"] > 2
    assert cut["thinking_tokens"] < 0.6 * plain["thinking_tokens"]
    assert cut["accuracy"] == plain["accuracy"] == 1


def test_demo_says_when_the_text_differs_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Comparison._generate

    def wrong(self: Comparison, mode: str, inputs: object, max_new_tokens: int | None) -> object:
        rows, stats = generate(self, mode, inputs, 12)  # the whole text would take seconds
        if mode == "speculative":
            rows[0][3] += 1
        return rows, stats

    monkeypatch.setattr(Comparison, "_generate", wrong)
    assert main(["demo", "--problems", "1", "--device", "cpu", "--json"]) == 1  # no file: to stdout
    out, err = capsys.readouterr()
    assert json.loads(out)["identical_text"] is False
    assert "The speculative text differs from generate's in 1 of 1 problems" in words(err)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "test-000 differs at token 3, where the base's two best logits are" in line


# --- generate


def test_generate_streams_the_text_and_says_why_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "trace.json"
    assert main(["generate", "--device", "cpu", "--chat", CHAT, "--trace", str(path)]) == 0
    out, err = capsys.readouterr()
    trace = json.loads(path.read_text())
    assert out == trace["text"] + "\n" == tokenizer.decode(trace["new_tokens"], skip_special_tokens=True) + "\n"
    assert out.endswith("</think>\n\nThe answer is 48.\n")
    assert f"thinking stopped after {trace['thinking_tokens']} tokens: confidence" in err
    assert "ended by stop" in err

    # The trace: one row for each thinking token up to the exit, and the exit where the rule says.
    rule, first = trace["rule"], trace["prompt_tokens"]
    last = trace["exit_position"]
    assert trace["exit_reason"] == "signals"
    assert trace["names"] == list(NAMES)
    assert trace["positions"] == list(range(first, last + 1))
    assert trace["thinking_tokens"] == len(trace["positions"])
    assert trace["new_tokens"][last - first + 1] == tokenizer.convert_tokens_to_ids("</think>")
    ends = [p for p in trace["positions"] if tokenizer.decode([trace["new_tokens"][p - first]]).endswith("\n\n")]
    assert trace["boundaries"] == ends
    smoothed = trace["signals"][0]
    exits = []
    for position, signals, stored in zip(trace["positions"], trace["signals"], trace["smoothed"], strict=True):
        smoothed = [rule["alpha"] * x + (1 - rule["alpha"]) * e for x, e in zip(signals, smoothed, strict=True)]
        assert stored == pytest.approx(smoothed, rel=1e-4)
        confidence, progress, remaining = stored
        passes = confidence > rule["confidence"] and progress > rule["progress"] and remaining < rule["remaining"]
        if position in ends and passes:
            exits.append(position)
    assert exits == [last]


def test_generate_reads_stdin_and_takes_every_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{CHAT}\n"))
    path = tmp_path / "trace.json"
    options = (
        "--device cpu --dtype float32 --capacity 500 --max-new-tokens 60 --temperature 0.7 --top-p 0.95 --top-k 20"
    )
    options += " --min-p 0.01 --seed 5 --eos-token-id 2 --eos-token-id 3 --tree-nodes 12 --tree-depth 4 --tree-top-k 3"
    options += " --confidence off --progress 0.9 --remaining 50 --smoothing window --window 4 --alpha 0.2"
    options += " --granularity token --source fc --min-thinking-tokens 3 --thinking-budget 10 --hard-budget --thinking"
    options += " --boundary-id 7 --boundary-id 9 --start-id 5 --end-id 6 --force-id 6"
    assert main(["generate", *options.split(), "--trace", str(path)]) == 0
    trace = json.loads(path.read_text())
    assert trace["thinking_tokens"] == 10
    assert trace["exit_reason"] == "budget"
    expected = ExitConfig(
        confidence=None,
        progress=0.9,
        remaining=50.0,
        smoothing="window",
        window=4,
        alpha=0.2,
        source="fc",
        min_thinking_tokens=3,
        thinking_budget=10,
        hard_budget=True,
        assume_thinking=True,
        boundary_ids=(7, 9),
        start_ids=(5,),
        end_ids=(6,),
        force_ids=(6,),
    )
    assert ExitConfig(**{"confidence": None, **trace["rule"]}) == expected
    assert "thinking stopped after 10 tokens: the thinking budget is spent" in capsys.readouterr().err


def test_generate_without_exit_still_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    assert main(["generate", "--device", "cpu", "--chat", CHAT, "--no-exit", "--trace", str(path)]) == 0
    trace = json.loads(path.read_text())
    assert trace["exit_position"] is None
    assert len(trace["signals"]) == trace["thinking_tokens"] > 200
    assert f"the model ended its thinking itself, after {trace['thinking_tokens']} tokens" in capsys.readouterr().err


def test_generate_without_a_draft_continues_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(bundled_pair().base), "--device", "cpu", "--max-new-tokens", "4"]
    assert main(["generate", *arguments, "--prompt", "what <think> \n\n Start with a = 5 3 ."]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "1 of the prompt's" in err  # what: no word of this model
    assert "4 tokens in 4 steps" in err
    assert "still thinking after 4 tokens" in err


# --- the streamer


def stream(
    tokenizer: PreTrainedTokenizerFast, prompt: list[int], chunks: list[list[int]], *marked: object
) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    streamer = ThinkingStreamer(tokenizer, lambda text, thinking: pieces.append((text, thinking)), *marked)
    streamer.put(torch.tensor([prompt]))
    for chunk in chunks:
        streamer.put(torch.tensor(chunk))
    streamer.end()
    return pieces


def cut(ids: list[int], rng: torch.Generator) -> list[list[int]]:
    """In pieces of 1 to 4."""
    chunks, start = [], 0
    while start < len(ids):
        stop = start + int(torch.randint(1, 5, (), generator=rng))
        chunks.append(ids[start:stop])
        start = stop
    return chunks


def joined(pieces: list[tuple[str, bool]], thinking: bool) -> str:
    return "".join(text for text, kind in pieces if kind == thinking)


def test_streamed_text_is_the_decoded_text_in_two_kinds(
    tokenizer: PreTrainedTokenizerFast, rng: torch.Generator
) -> None:
    before = "First a = 42.\n\nSo a = 42.\n\n</think>"
    after = "\n\nThe answer is 42."
    ids = [*tokenizer.encode(before + after, add_special_tokens=False), tokenizer.eos_token_id]
    prompt = tokenizer.encode("a ? <think> \n\n", add_special_tokens=False)
    marked = [tokenizer.convert_tokens_to_ids([marker]) for marker in ("<think>", "</think>")]
    pieces = stream(tokenizer, prompt, cut(ids, rng), *marked)
    assert joined(pieces, True) == before
    assert joined(pieces, False) == after
    assert len(pieces) > 5  # as it comes

    assert joined(stream(tokenizer, prompt, cut(ids, rng), *marked, False), True) == ""  # overridden
    again = tokenizer.encode("a = 1 <think> a = 2", add_special_tokens=False)  # thinking that starts in the text
    pieces = stream(tokenizer, tokenizer.encode("a ?", add_special_tokens=False), [again], *marked)
    assert joined(pieces, False) == "a = 1"
    assert joined(pieces, True) == " <think> a = 2"


def test_streamed_characters_of_several_tokens_and_markers_of_several_ids(rng: torch.Generator) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    start, end = tokenizer.encode("[[", add_special_tokens=False), tokenizer.encode("]]", add_special_tokens=False)
    text = "naïve ] 🙂 日本 [[mm 𝛼\n\n]x]] 好 ✓"
    pieces = stream(tokenizer, [1], cut(tokenizer.encode(text, add_special_tokens=False), rng), start, end)
    assert "".join(piece for piece, _ in pieces) == text
    assert "\ufffd" not in "".join(piece for piece, _ in pieces)
    assert "mm 𝛼\n\n]x]]" in joined(pieces, True)
    assert joined(pieces, False).endswith(" 好 ✓")

    # A sequence that ends inside a character: shown as it is.
    half = tokenizer.encode("x 好", add_special_tokens=False)[:-1]
    assert "".join(piece for piece, _ in stream(tokenizer, [1], [half], start, end)) == "x \ufffd"


# --- the picture


def curves(rng: torch.Generator, count: int, exit: int | None, **changes: object) -> SignalCurves:
    values = torch.rand(count, 3, generator=rng).tolist()
    settings: dict[str, object] = {
        "title": "a problem",
        "names": NAMES,
        "thinking_tokens": list(range(1, count + 1)),
        "values": values,
        "smoothed": values,
        "thresholds": {"confidence": 0.5, "remaining": 0.3},
        "boundaries": list(range(3, count, 7)),
        "exit": exit,
    }
    return SignalCurves(**(settings | changes))  # type: ignore[arg-type]


def test_picture(rng: torch.Generator) -> None:
    svg = draw_signals(curves(rng, 80, exit=24), "svg").decode()
    assert svg.lstrip().startswith("<?xml")
    for text in ("exit after 25 tokens", "55 tokens not generated", "above 0.5", "below 0.3", "a problem"):
        assert f"<!-- {text} -->" in svg
    assert "exit after" not in draw_signals(curves(rng, 80, exit=None), "svg").decode()
    assert "not generated" not in draw_signals(curves(rng, 25, exit=24), "svg").decode()


def test_picture_of_odd_signals(rng: torch.Generator) -> None:
    missing = [[math.nan, 0.5, math.inf]] * 10
    assert draw_signals(curves(rng, 10, exit=3, smoothed=missing, values=missing)).startswith(b"\x89PNG")
    assert draw_signals(curves(rng, 1, exit=0, boundaries=[0])).startswith(b"\x89PNG")
    assert draw_signals(curves(rng, 0, exit=None)).startswith(b"\x89PNG")
    one = {"names": NAMES[:1], "values": [[0.1]] * 9, "smoothed": [[0.2]] * 9}
    assert draw_signals(curves(rng, 9, exit=3, **one)).startswith(b"\x89PNG")


# --- info, and the rule of a draft


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for op in report["implementations"]:
        assert op in out


def test_generate_takes_a_calibrated_rule_by_name(tmp_path: Path) -> None:
    calibration = from_thresholds(json.loads((bundled_pair().draft / "config.json").read_text())["exit_head"])
    for name in calibration["rules"]:
        trace = tmp_path / name
        question = load_problems("test")[0].question
        assert main(["generate", "--chat", question, "--rule", name, "--trace", str(trace), "--device", "cpu"]) == 0
        rule = json.loads(trace.read_text())["rule"]
        wanted = ExitConfig.from_draft(calibration, name)
        assert {key: rule.get(key) for key in SIGNALS} == {key: getattr(wanted, key) for key in SIGNALS}


def test_the_rule_of_a_draft_is_read_from_its_config() -> None:
    head = json.loads((bundled_pair().draft / "config.json").read_text())["exit_head"]
    calibration = from_thresholds(head)
    rule = ExitConfig.from_draft(calibration, "one_point")
    assert (rule.confidence, rule.progress, rule.remaining, rule.alpha) == (0.5, 0.8, 10, 0.5)
    assert ExitConfig.from_draft(calibration) == ExitConfig.from_draft(calibration, "no_loss") != rule
    with pytest.raises(ValueError, match="rule must be one of no_loss, one_point, was 'half'"):
        ExitConfig.from_draft(calibration, "half")
    with pytest.raises(ValueError, match="the draft has no rule"):
        ExitConfig.from_draft({})
