"""benchmarks/bench_step.py on a CPU: its report, what it refuses, its models, its arithmetic, and what its profiler
counts."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scripts import load_script, run_script
from transformers import AutoModelForCausalLM

from specexit import TreeConfig, step
from specexit.drafts.eagle3 import Eagle3Draft

CPU = torch.device("cpu")
SHAPE = ["model", "batch", "length", "nodes", "depth", "top_k", "accepted"]
RESULT = ["implementation", "microseconds", "spread", "samples", "calls", "method", "note", "error"]
COUNTS = ["launches", "kernels", "syncs"]
RATES = ["bytes_per_second", "flops_per_second", "fraction_of_floor", "times_ours", "tokens_per_second", "break_even"]


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_step")


def module(name: str) -> Any:
    return sys.modules[f"benchmarks.{name}"]


@pytest.fixture(scope="module")
def cells(bench):
    return module("step_cells")


@pytest.fixture(scope="module")
def models(bench):
    return module("step_models")


@pytest.fixture(scope="module")
def parts(bench):
    return module("step_parts")


@pytest.fixture(autouse=True)
def only_cells(bench, monkeypatch):
    """Not the bundled pair, which takes seconds: it has a test of its own."""
    monkeypatch.setattr(module("step_bundled"), "report", lambda *args: None)


def small(cells, **changes: Any) -> Any:
    return replace(cells.CPU[0], **changes)


def test_writes_a_report_with_a_time_for_each_implementation(bench, cells, monkeypatch, tmp_path, capsys):
    path = tmp_path / "report.json"
    options = "--device=cpu", "--budget=100000", "--accepted=2.5", f"--json={path}"
    assert run_script(bench, monkeypatch, *options) == 0
    report = json.loads(path.read_text())
    assert list(report) == ["device", "dtype", "torch", "ours", "ceilings", "cells"]
    assert load_script("results_file").violations(report, "step") == []
    assert (report["device"], report["dtype"], report["ours"]) == ("cpu", "float32", "specexit")
    assert [cell["batch"] for cell in report["cells"]] == [1, 3]
    for cell in report["cells"]:
        assert list(cell) == [*SHAPE, "bytes", "flops", "floor_microseconds", "limit", "results"]
        assert cell["accepted"] == 2.5
        names = ["specexit", *(["release"] if cell["batch"] == 1 else []), "generate", "eager"]
        assert [result["implementation"] for result in cell["results"]] == names
        own = cell["results"][0]["microseconds"]
        for result in cell["results"]:
            per_token = result["implementation"] == "generate"
            has_parts = result["implementation"] in ("specexit", "eager")
            assert list(result) == [*RESULT, *COUNTS, *(["parts"] if has_parts else []), *RATES]
            low, high = result["spread"]
            assert 0 < low <= result["microseconds"] <= high
            assert 0 <= result["error"] <= 1
            tokens = cell["batch"] * (1 if per_token else 2.5)
            assert result["tokens_per_second"] == pytest.approx(tokens / result["microseconds"] * 1e6)
            expected = own / result["microseconds"] if per_token else None
            assert result["break_even"] == (None if expected is None else pytest.approx(expected))
            assert result["launches"] is None  # no GPU
            if has_parts:
                assert list(result["parts"]) == [*module("step_parts").PARTS, "other"]
                assert all(value > 0 for value in result["parts"].values())
    table = capsys.readouterr().out
    assert all(text in table for text in ("CPU", "small Llama, B = 3, L = 1,536", "break-even", "2.5 tokens a step"))


OFF = "wrong result: row 0, "  # and then what shows it first


def context(change: Callable[..., tuple[Any, ...]]) -> tuple[str, Callable[..., Any]]:
    """The base over the tree with other lengths, positions or bits."""
    right = step.TreeContext

    def wrong(lengths: Any, positions: Any, visible: Any, **options: Any) -> Any:
        return right(*change(lengths, positions, visible), **options)

    return "TreeContext", wrong


def accepted(tree: Any, targets: Any, *rest: Any, right: Any = step.accept) -> Any:
    return right(tree, (targets + 1) % 1000, *rest)


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        (context(lambda lengths, positions, visible: (lengths, positions + 7, visible)), OFF),
        (context(lambda lengths, positions, visible: (lengths - 1, positions, visible)), OFF),
        (context(lambda lengths, positions, visible: (lengths, positions, visible | 4095)), OFF),
        (context(lambda lengths, positions, visible: (lengths, positions, visible & ~1)), OFF),  # the root is not seen
        (("accept", accepted), OFF + "the logit of token 1 below the best by "),
    ],
)
def test_a_wrong_step_has_no_time(bench, cells, monkeypatch, tmp_path, capsys, patch, why):
    monkeypatch.setattr(bench, "CPU", (small(cells),))
    monkeypatch.setattr(step, *patch)
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--budget=100000", f"--json={path}") == 1
    ours, *others = json.loads(path.read_text())["cells"][0]["results"]
    assert list(ours) == ["implementation", "unavailable"]
    assert ours["unavailable"].startswith(why)
    assert ours["unavailable"] in capsys.readouterr().out
    assert others[-1]["implementation"] == "eager"
    assert others[-1]["unavailable"].startswith(why)
    for other in others[:-1]:
        assert other["microseconds"] > 0
        assert other["break_even"] is None


def test_a_step_that_publishes_nothing_has_no_time(bench, cells):
    problem = small(cells).problem(CPU, torch.float32)
    with pytest.raises(module("harness").Unavailable, match="row 0 has no token after its first 2"):
        problem.check([module("step_problem").Text(0, [1, 2], 2)])


def test_a_wrong_peer_has_no_time(bench, cells, monkeypatch):
    """Of the releases' step each token but the root is the base's."""
    release = module("step_peers").RELEASE
    pipeline = module("step_release").Release
    follow = module("step_release").follow

    def one_more(*args: Any) -> Any:
        path, kept, last = follow(*args)
        return path, kept, (last + 1) % 1000

    monkeypatch.setattr(module("step_release"), "follow", one_more)
    problem = small(cells).problem(CPU, torch.float32)
    assert len(pipeline(problem).step()) >= 2
    result = module("harness").attempt(release, problem, CPU)
    assert result["unavailable"].startswith("wrong result: row 0, the logit of token 1")


def test_the_check_asks_about_dictated_texts_and_later_steps(bench, cells):
    """The second step of a text reads what the first has written."""
    problem = small(cells, batch=2).problem(CPU, torch.float32)
    rows = module("step_ours").Rows(problem, graph=False)
    with torch.no_grad(), rows.engine.active():
        texts = rows.texts()
    assert [(text.row, text.given) for text in texts] == [(0, 1), (1, 1), (0, 4), (1, 4)]
    assert all(len(text.tokens) >= text.given + 2 for text in texts)
    assert [text.tokens[: text.given] for text in texts[2:]] == problem.dictated.tolist()
    with torch.no_grad():
        assert 0 <= problem.check(texts) <= 1
        tokens = texts[2].tokens
        wrong = problem.continued(0, tokens[:-1])[0][-1].argmin().item()
        with pytest.raises(module("harness").Unavailable, match="wrong result: row 0, the logit of token"):
            problem.check([texts[2]._replace(tokens=[*tokens[:-1], wrong])])


def test_a_captured_step_is_checked_as_it_is_replayed(bench, cells, monkeypatch):
    """With a recorder that only counts, as there is no GPU."""
    replayed = []

    class Recording:
        nbytes = 0

        def __init__(self, function: Callable[[], None]) -> None:
            self.function = function

        def replay(self) -> None:
            replayed.append(1)
            self.function()

        def reset(self) -> None:
            replayed.append(-1)

    monkeypatch.setattr(module("step_ours"), "recorder", lambda device: Recording)
    harness, ours = module("harness"), module("step_ours").ours
    problem = small(cells).problem(CPU, torch.float32)
    with torch.no_grad():
        result = harness.attempt(harness.Peer("specexit", ours()), problem, CPU)
        assert (result["note"], replayed.pop()) == ("one CUDA graph", -1)
        assert len(replayed) > 1 + 1 + 2 + 2  # the first, the call that is checked, two steps of two texts, and times
        assert set(replayed) == {1}
        assert "parts" not in harness.more_of(harness.Peer("specexit", ours()), problem)
        replayed.clear()
        eager = harness.Peer("eager", ours(graph=False))
        result = harness.attempt(eager, problem, CPU)
        assert (result["note"], replayed) == ("launched from Python", [])
        assert harness.more_of(eager, problem)["parts"]["base"] > 0


def test_a_step_that_cannot_be_captured_says_why(bench, cells, monkeypatch):
    def refuse(function: Callable[[], None]) -> None:
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(module("step_ours"), "recorder", lambda device: refuse)
    problem = small(cells).problem(CPU, torch.float32)
    with torch.no_grad():
        result = module("harness").attempt(module("harness").Peer("specexit", module("step_ours").ours()), problem, CPU)
    assert result["microseconds"] > 0
    assert result["note"].startswith("launched from Python: the decode step is not captured")
    assert result["note"].endswith("not while capturing")


def test_a_profiler_that_fails_costs_no_time_that_was_taken(bench, cells, monkeypatch, tmp_path):
    def fail(*arguments: object) -> None:
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(module("step_ours"), "counted", fail)
    monkeypatch.setattr(bench, "CPU", (small(cells),))
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--budget=100000", f"--json={path}") == 0
    ours = json.loads(path.read_text())["cells"][0]["results"][0]
    assert ours["microseconds"] > 0
    assert "launches" not in ours


def test_what_was_prepared_is_given_back(bench, cells, monkeypatch):
    """Also where the result is wrong: the next one needs the memory."""
    harness, step_ours = module("harness"), module("step_ours")
    engines = []
    started = step_ours.started

    def noted(*args: Any) -> Any:
        engine = started(*args)
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(step_ours, "started", noted)
    problem = small(cells).problem(CPU, torch.float32)
    peer = harness.Peer("specexit", step_ours.ours())
    with torch.no_grad():
        assert "microseconds" in harness.attempt(peer, problem, CPU)
        assert engines[0]() is None
        monkeypatch.setattr(problem, "check", lambda texts: 1 / 0)
        assert "ZeroDivisionError" in harness.attempt(peer, problem, CPU)["unavailable"]
    assert engines[1]() is None


def test_the_releases_step_accepts_what_the_base_agrees_with(bench, cells, monkeypatch):
    """With a draft that proposes what the base says, more than the root is accepted, and it is the base's text."""
    problem = small(cells).problem(CPU, torch.float32)
    pipeline = module("step_release").Release(problem)
    right = []
    with torch.no_grad():
        tokens = [int(pipeline.root)]
        for _ in range(3):
            tokens.append(int(problem.continued(0, tokens)[0][-1].argmax()))
        right = tokens[1:]
        propose = pipeline.propose

        def knowing(*args: Any) -> Any:
            proposed, scores, parents = propose(*args)
            above = -1  # one candidate a level is the base's token, and the best
            for token in right:
                at = int((parents == above).nonzero()[0])
                proposed[at], scores[at], above = token, 0.0, at
            return proposed, scores, parents

        monkeypatch.setattr(pipeline, "propose", knowing)
        run = pipeline.step()
        assert run[:4] == tokens
        assert len(run) == 5
        assert 0 <= problem.check([module("step_problem").Text(0, run)]) <= 1
        # The accepted keys have moved to where the next step reads them.
        cache = pipeline.cache.layers[0]
        logits = problem.base(
            input_ids=problem.prompts.new_tensor([tokens]),
            past_key_values=module("step_peers").DynamicCache(problem.batches()),
        ).past_key_values.layers[0]
        length = problem.cell.length
        assert torch.allclose(cache.keys[:, :, length : length + 4], logits.keys[:, :, length:], atol=1e-4)


def test_the_static_cache_peer_says_the_same(bench, cells, monkeypatch):
    """Not compiled here, which takes a minute."""
    problem = small(cells, batch=2).problem(CPU, torch.float32)
    monkeypatch.setattr(problem.base, "get_compiled_call", lambda config: problem.base, raising=False)
    static = module("step_peers").static
    with torch.no_grad():
        prepared = static(problem)
        first = prepared.finish(prepared.calls[0]())
        assert prepared.finish(prepared.calls[0]()) == first  # it goes back to where it began
        assert 0 <= problem.check(first) <= 1
        generate = module("step_peers").generate(problem)
        assert generate.finish(generate.calls[0]()) == first
        assert generate.finish(generate.calls[0]()) == first


def test_models_have_the_published_sizes(models):
    """Of the model cards: parameters in billions."""
    cards = {"Qwen3-4B": 4.02, "Qwen3-8B": 8.19, "Llama-3.1-8B": 8.03, "DeepSeek-R1-Distill-Llama-8B": 8.03}
    assert {model.name: round(model.parameters / 1e9, 2) for model in models.MODELS} == cards
    assert models.QWEN3_4B.matrices + 36 * (2 * 2560 + 2 * 128) + 2560 == models.QWEN3_4B.parameters


@pytest.mark.parametrize("name", ["QWEN3_4B", "QWEN3_8B", "LLAMA_8B", "DEEPSEEK_8B", "SMALL_QWEN", "SMALL_LLAMA"])
def test_models_are_what_they_count(models, name):
    model = getattr(models, name)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model.config())
        draft = Eagle3Draft(model.draft_config(), base.get_input_embeddings())
    assert sum(weight.numel() for weight in base.parameters()) == model.parameters
    sizes = {name: weight.numel() for name, weight in draft.named_parameters() if "norm" not in name}
    assert sizes.pop("exit_bias") == 3
    assert sum(sizes.values()) == model.draft_projection + model.draft_layer + model.draft_head
    assert draft.signals == ("confidence", "progress", "remaining")
    heads = base.config.num_key_value_heads * base.config.head_dim
    assert model.slot == base.config.num_hidden_layers * 2 * heads


def test_random_weights_are_scaled_and_the_token_map_reaches_the_vocabulary(models):
    pair = models.build(models.SMALL_LLAMA, CPU, torch.float32)
    assert pair.draft.input_norms.eq(1).all()
    assert pair.draft.lm_head.std().item() == pytest.approx(1 / 8, rel=0.05)
    tokens = torch.arange(250) + pair.draft.d2t
    assert tokens.tolist() == list(range(0, 1000, 4))


def test_one_pair_is_held(models):
    first = models.pair(models.SMALL_QWEN, CPU, torch.float32)
    assert models.pair(models.SMALL_QWEN, CPU, torch.float32) is first
    models.pair(models.SMALL_LLAMA, CPU, torch.float32)
    assert len(models._HELD) == 1
    models.free()
    assert not models._HELD


def test_the_floor_by_hand(cells, models):
    """A model whose numbers can be added up on paper: H 4, I 6, one layer, 2 heads and 1 KV head of 2, V 10; of the
    draft Vd 5."""
    sizes = {"hidden": 4, "intermediate": 6, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 2, "vocabulary": 10}
    model = models.Model(
        "paper", "Llama", **sizes, positions=99, epsilon=1e-6, head_norms=False, tied=True, draft_vocabulary=5
    )
    cell = cells.Cell(model, batch=3, length=100, tree=TreeConfig(nodes=5, depth=3, top_k=2))
    # Attention 4 * (2 + 2) * 2 and 2 * 2 * 4, MLP 3 * 4 * 6, head 10 * 4; the draft's layer reads rows of 8.
    assert model.matrices == 32 + 16 + 72 + 40
    layer = 64 + 16 + 72 + (5 + 3) * 4
    assert model.draft_projection + model.draft_layer + model.draft_head == 48 + layer
    passes = [
        # weights, rows of a sequence, slots that they attend
        (160, 5, 105),
        (48 + layer, 5, 105),  # depth + 2 rows
        (layer, 2, 102),  # the first level's beam of two, then the second's
        (layer, 2, 104),
    ]
    # A slot has 2 * 1 * 2 entries; a row's query 2 * 2, multiplied with a key and with a value.
    expected = [(2 * (w + 3 * (slots * 4 + rows * 4)), 3 * rows * 2 * (w + 2 * 4 * slots)) for w, rows, slots in passes]
    assert cell.passes(2) == expected
    assert (cell.bytes(2), cell.flops) == (sum(b for b, _ in expected), sum(f for _, f in expected))
    seconds, limit = cell.floor(2, 1000.0, 20_000.0)
    assert seconds == pytest.approx(sum(max(b / 1000, f / 20_000) for b, f in expected))
    assert limit == ("memory" if expected[0][0] / 1000 > expected[0][1] / 20_000 else "arithmetic")
    token = cell.work("generate")
    assert token.passes(2) == [(2 * (160 + 3 * (101 * 4 + 4)), 3 * 2 * (160 + 2 * 4 * 101))]
    assert cell.work("release") is cell
    alone = replace(cell, tree=TreeConfig.none())  # the draft still reads signals, of two rows
    assert [part.bytes for part in alone.passes(1)] == [160 + 3 * (101 * 4 + 4), 48 + layer + 3 * (102 * 4 + 2 * 4)]


def test_the_goals_cell_reads_its_weights_once_and_its_drafts_once_a_level(cells):
    passes = cells.GOAL.passes(2)
    assert len(passes) == 1 + 1 + 6
    assert passes[0].bytes == pytest.approx(2 * 4.022e9 + 147_456 * 1084, rel=1e-3)
    assert passes[2].bytes == pytest.approx(2 * (218.2e6 - 3 * 2560**2), rel=2e-2)
    assert passes[0].flops == pytest.approx(2 * 4.022e9 * 60 + 4 * 60 * 1084 * 36 * 4096, rel=1e-3)


def test_break_even_by_hand(cells):
    cell = cells.Cell(cells.QWEN3_4B, 8, 1024, accepted=4.0)
    own = {"implementation": "specexit", "microseconds": 3000.0}
    assert cell.figures(own, own) == {"tokens_per_second": pytest.approx(8 * 4 / 3e-3), "break_even": None}
    token = cell.figures({"implementation": "generate", "microseconds": 2000.0}, own)
    assert token == {"tokens_per_second": pytest.approx(8 / 2e-3), "break_even": 1.5, "times_ours": None}
    refused = {"implementation": "specexit", "unavailable": "wrong result"}
    assert cell.figures({"implementation": "static", "microseconds": 2000.0}, refused)["break_even"] is None
    chain = replace(cell, tree=TreeConfig.chain(2))  # publishes three tokens at most
    assert chain.figures(own, own)["tokens_per_second"] == pytest.approx(8 * 3 / 3e-3)


@pytest.mark.parametrize("options", [["--accepted=0.5"], ["--accepted=many"], ["--accepted=nan"], ["--peers=other"]])
def test_refuses_wrong_options(bench, monkeypatch, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(bench, monkeypatch, "--device=cpu", *options)
    assert stopped.value.code == 2
    assert options[0].partition("=")[0].lstrip("-") in capsys.readouterr().err


def test_a_peer_that_would_outlast_the_budget_is_not_begun(bench, cells):
    harness = module("harness")
    begun = []
    slow = harness.Peer("slow", lambda problem: begun.append(problem), seconds=1e9)
    deadline = harness.time.monotonic() + 1e6
    (result,) = harness.run_cell(small(cells), [slow], CPU, torch.float32, deadline)
    assert result == {"implementation": "slow", "unavailable": harness.OUT_OF_TIME}
    assert not begun


def test_only_the_goals_cell_is_compiled(bench, cells):
    (static,) = module("step_peers").PEERS["static"]
    assert [cell for cell in cells.ALL if static.cells(cell)] == [cells.GOAL]
    assert static.cells(replace(cells.GOAL, accepted=2.0))
    assert cells.SUBSET[0] == cells.GOAL
    assert set(cells.SUBSET) <= set(cells.ALL)


def events(parts, *found: tuple[str, bool, float, float]) -> list[Any]:
    return [parts.Event(*event) for event in found]


def test_counts_the_calls_inside_the_range(parts):
    found = events(
        parts,
        ("cudaStreamSynchronize", False, 0, 1),  # before it
        (parts.RANGE, False, 2, 50),
        (parts.RANGE, True, 3, 60),  # the profiler's copy of it on the device
        ("cudaLaunchKernel", False, 3, 4),
        ("cuLaunchKernelEx", False, 5, 6),
        ("cudaGraphLaunch", False, 7, 8),
        ("cudaMemcpyAsync", False, 9, 10),
        ("cudaStreamSynchronize", False, 11, 12),
        ("cudaEventRecord", False, 13, 14),
        ("aten::mm", False, 3, 4),
        ("gemm", True, 20, 30),
        ("_tree_attention_kernel", True, 55, 70),  # after the host has gone on
        ("Memcpy DtoH (Device -> Pageable)", True, 30, 31),
        ("cudaDeviceSynchronize", False, 51, 52),  # the benchmark's own
    )
    assert parts.counted(found) == {"launches": 4, "kernels": 2, "syncs": 1}
    assert parts.counted([]) == {"launches": None, "kernels": None, "syncs": None}


def test_kernels_belong_to_the_part_in_which_they_run(parts):
    found = events(
        parts,
        (parts.PREFIX + "step", False, 0, 100),
        (parts.PREFIX + "base", False, 10, 40),
        (parts.PREFIX + "base", True, 10, 40),
        (parts.PREFIX + "accept", False, 50, 60),
        ("gemm", True, 12, 20),
        ("gemm", True, 20, 25),
        ("accept", True, 51, 52),
        ("copy", True, 70, 73),
        ("Memset (Device)", True, 75, 99),
    )
    times = parts.kernel_times(found)
    assert {name: time for name, time in times.items() if time} == {"base": 13, "accept": 1, "other": 3}
    assert list(times) == [*parts.PARTS, "other"]


def test_the_meter_counts_operations_but_no_views(parts):
    meter = parts.Meter(CPU)
    add = meter.timed("base", lambda x: (x + 1).view(-1))
    with meter:
        add(torch.zeros(2, 2))
    assert meter.operations["base"] == 1
    assert meter.milliseconds("base") >= 0
    assert meter.milliseconds("accept") is None


def test_takes_the_bundled_pair_apart(bench, monkeypatch, capsys):
    """The counts that README.md cites."""
    monkeypatch.undo()  # the real report
    assert run_script(bench, monkeypatch, "--device=cpu", "--bundled", "--problems=1") == 0
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line.split(":")[1].split()[0]) for line in lines if "besides the base's forward" in line]
    assert len(counts) == 2
    assert all(410 <= count <= 460 for count in counts)
