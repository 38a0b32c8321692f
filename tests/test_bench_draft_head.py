"""benchmarks/bench_draft_head.py on a CPU: its report, what it refuses, its reference, its arithmetic and its model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from dataclasses import asdict, replace
from types import ModuleType

import pytest
import torch
from scripts import load_script, run_script

CPU = torch.device("cpu")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the launches are Triton's")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_draft_head")


@pytest.fixture(scope="module")
def cells(bench) -> ModuleType:
    return sys.modules["benchmarks.head_cells"]


@pytest.fixture(scope="module")
def peers(bench) -> ModuleType:
    return sys.modules["benchmarks.head_peers"]


@pytest.fixture(scope="module")
def reference(bench) -> ModuleType:
    return sys.modules["benchmarks.head_reference"]


def test_writes_a_report_with_a_time_for_each_implementation(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--budget=100000", f"--json={path}") == 0
    report = json.loads(path.read_text())
    assert list(report) == ["device", "dtype", "torch", "ours", "ceilings", "cells"]
    assert load_script("results_file").violations(report, "draft_head") == []
    assert (report["device"], report["dtype"], report["ours"]) == ("cpu", "float32", "torch")
    assert [cell["op"] for cell in report["cells"]] == ["draft_topk", "draft_topk", "level", "project_features"]
    for cell in report["cells"]:
        shape = ["op", "model", "hidden", "vocabulary", "batch", "k", "rows"]
        assert list(cell) == [*shape, "bytes", "flops", "floor_microseconds", "limit", "results"]
        assert cell["rows"] == cell["batch"] * cell["k"]
        assert [result["implementation"] for result in cell["results"]] == ["torch", "eager"]
        for result in cell["results"]:
            low, high = result["spread"]
            assert 0 < low <= result["microseconds"] <= high
            assert 0 <= result["error"] <= 1
            assert result["fraction_of_floor"] > 0
        assert cell["results"][0]["times_ours"] == 1
    table = capsys.readouterr().out
    assert all(name in table for name in ("CPU", "draft_topk, small", "level, small", "project_features, small"))


def another(top):
    """A token that is not among the k best, in the place of the most likely."""
    tokens = top[0].clone()
    tokens[:, 0] = (tokens[:, 0] + 1) % 2000
    return tokens, *top[1:]


def repeated(top):
    return top[0][:, :1].expand_as(top[0]).contiguous(), *top[1:]


@pytest.mark.parametrize(
    ("op", "index", "wrong", "why"),
    [
        ("draft_topk", 1, another, "log-probabilities off by"),
        ("draft_topk", 1, repeated, "a token is repeated"),
        ("draft_topk", 0, lambda top: (top[0] + 3000, *top[1:]), "a token is not of the draft's vocabulary"),
        ("draft_topk", 0, lambda top: (top[0], top[1] + 0.01, top[2]), "log-probabilities off by"),
        ("draft_topk", 0, lambda top: (top[0], top[1] * math.nan, top[2]), "log-probabilities off by nan"),
        ("draft_topk", 0, lambda top: (*top[:2], top[2] - 0.01), "signals off by"),
        ("draft_topk", 0, lambda top: (*top[:2], top[2][:, :2]), "signals of shape [2, 2]"),
        ("draft_topk", 1, lambda top: (top[0][:, :9], *top[1:]), "tokens of shape [10, 9]"),
        ("grow_level", 2, lambda grown: (grown[0] + 1, *grown[1:]), "candidate scores"),
        ("grow_level", 2, lambda grown: (*grown[:2], grown[2] - 1, *grown[3:]), "beam"),
        ("grow_level", 2, lambda grown: (*grown[:2], grown[2] + 1000, *grown[3:]), "beam candidates"),
        ("grow_level", 2, lambda grown: (*grown[:4], -grown[4], grown[5]), "beam hidden"),
        ("grow_level", 2, lambda grown: (*grown[:5], grown[5] ^ 1), "beam visible"),
        ("project_features", 3, lambda found: (found[0] * 1.001, found[1]), "hidden rows off by"),
        ("project_features", 3, lambda found: (found[0], found[1] + 0.1), "signals off by"),
    ],
)
def test_a_wrong_result_has_no_time(bench, cells, peers, monkeypatch, tmp_path, capsys, op, index, wrong, why):
    right = getattr(peers, op)
    monkeypatch.setattr(peers, op, lambda *args, **options: wrong(right(*args, **options)))
    monkeypatch.setattr(bench, "CPU", (cells.CPU[index],))
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--budget=100000", f"--json={path}") == 1
    ours, eager = json.loads(path.read_text())["cells"][0]["results"]
    assert list(ours) == ["implementation", "unavailable"]
    assert ours["unavailable"].startswith(f"wrong result: {why}")
    assert eager["microseconds"] > 0
    assert eager["times_ours"] is None
    assert ours["unavailable"] in capsys.readouterr().out


def test_a_missing_token_is_found_behind_the_first(cells, reference):
    """The k best but the second, and the next one: every log-probability is right, and close to the k-th."""
    problem = cells.CPU[1].problem(CPU, torch.bfloat16)
    logprobs, ids = (problem.normed.double() @ problem.copies[0].double().T).log_softmax(1).topk(11)
    keep = [0, *range(2, 11)]
    arguments = (problem.expected, problem.normed, problem.copies[0], None)
    right = reference.Top(ids[:, :10].int(), logprobs[:, :10], ids)
    assert reference.top_error(right, *arguments) < 1e-6
    with pytest.raises(reference.Unavailable, match="log-probabilities off by"):
        reference.top_error(reference.Top(ids[:, keep].int(), logprobs[:, keep], ids), *arguments)


def test_rounded_logits_pass_where_they_are_expected(cells, peers, reference):
    """A library's product in bf16 is checked with what the rounding may cost; beyond that it is wrong."""
    problem = cells.CPU[1].problem(CPU, torch.bfloat16)
    prepared = peers.pipeline()(problem)
    top, grown = prepared.finish(prepared.calls[0]())
    assert top.rounded
    assert prepared.note == "logits rounded to bfloat16"
    assert problem.check((top, grown)) <= 1
    shift = reference.ROUNDING[torch.bfloat16] * float(problem.expected.largest.max())
    with pytest.raises(reference.Unavailable, match="wrong result"):
        problem.check((replace(top, logprobs=top.logprobs - 6 * shift), grown))


def test_the_reference_in_slabs_is_the_whole(reference):
    rows, weight = torch.randn(7, 24), torch.randn(301, 24)
    logits = rows.double() @ weight.double().T
    for size in (8 * 24 * 40, 8 * 24, 2**28):  # 40 rows of the weight at a time, one, all
        torch.testing.assert_close(reference.product(rows, weight, size), logits, rtol=1e-12, atol=1e-12)
        best = reference.best(rows, weight, 10, size)
        torch.testing.assert_close(best.logprobs, logits.log_softmax(1).topk(10).values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(best.normaliser, logits.logsumexp(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(best.largest, logits.abs().amax(1), rtol=1e-12, atol=0)


def test_the_inputs_are_what_the_op_takes(cells, reference):
    """The tokens of a mapped draft are distinct and below the base's vocabulary; the rows are those of the twin."""
    problem = cells.CPU[0].problem(CPU, torch.bfloat16)
    head = problem.cell.head
    targets = torch.arange(head.vocabulary) + problem.token_map
    assert bool((targets.diff() > 0).all())
    assert 0 <= int(targets[0]) <= int(targets[-1]) < head.target
    assert torch.equal(reference.draft_ids(targets, problem.token_map, head.vocabulary), torch.arange(head.vocabulary))
    twin = problem.hidden.float() * torch.rsqrt(problem.hidden.float().square().mean(1, True) + cells.EPS)
    torch.testing.assert_close(problem.normed, problem.norm_weight * twin.bfloat16(), rtol=2**-7, atol=0)


def test_bytes_and_flops_of_a_cell(bench, cells):
    topk, _, level, _, project, *_ = bench.SUBSET
    assert str(topk) == "draft_topk, Llama-3.1-8B, 10 rows"
    # lm_head, three exit rows and ten hidden rows in 2 bytes; 10 x (10 tokens, 10 log-probabilities, 3 signals) in 4
    assert topk.bytes(2) == 2 * 4096 * (32000 + 3 + 10) + 4 * 10 * 23 == 262_251_416
    assert topk.flops == 2 * 10 * 4096 * 32003 == 2_621_685_760
    assert topk.floor(2, 4.3e12, 790e12) == (262_251_416 / 4.3e12, "memory")
    # no exit rows; 20 results a row; a score, 10 candidates and 3 numbers a beam; hidden rows twice; 3 words a beam
    assert level.bytes(2) == 2 * 4096 * (32000 + 10 + 10) + 4 * 10 * (20 + 14) + 8 * 10 * 3
    # the weight, 10 x (three features and a result) in 2 bytes, 10 x 3 signals in 4
    assert project.bytes(2) == 2 * (4099 * 12288 + 10 * 4 * 4096) + 4 * 10 * 3
    assert project.flops == 2 * 10 * 4099 * 12288
    many = cells.Cell("draft_topk", cells.LLAMA, 32, 10)
    assert many.floor(2, 4.3e12, 790e12) == (2 * 320 * 4096 * 32003 / 790e12, "arithmetic")
    assert set(bench.SUBSET) <= set(bench.ALL)
    assert len(bench.ALL) == len(set(bench.ALL)) == 4 * 5 + 4 * 3 + 3 * 5


def test_in_flight_is_what_is_resident_and_has_its_buffers(bench):
    model = bench.head_model
    step = model.Step("head_kernel", programs=264, warps=4, stages=3, registers=128, shared=80_000, resident=4, waves=0)
    tile = (16 + 128) * 128 * 2  # 36,864 bytes: two fit in the shared memory
    assert model.in_flight(step, tile) == 2 * 2 * tile  # two programs for each of 132, although four would fit
    assert model.in_flight(replace(step, programs=66), tile) == tile
    assert model.in_flight(replace(step, programs=10_000, shared=200_000), tile) == 4 * 3 * tile


@needs_triton
def test_the_model_of_a_cell(bench, cells):
    """Llama's head for a beam of 10: the launches of the table, with registers and shared memory that are given."""
    from specexit_kernels.triton.draft_head_table import choose_config, head_configs
    from specexit_kernels.triton.launch import H200

    cell = bench.SUBSET[0]
    config = choose_config(head_configs(H200, torch.bfloat16), 10)
    found = bench.head_model.analyse(cell, lambda launch: (128, 50_000))
    tiles = math.ceil(32000 / config.block_v)
    assert (found.rows, found.block_v, found.block_h) == (config.rows, config.block_v, config.block_h)
    assert found.steps[0].kernel == "head_kernel"
    assert found.steps[0].programs == tiles + 1  # and one for the signals
    assert found.steps[0].resident == 4  # programs of 50 KB; registers would allow four of four warps
    assert found.steps[0].waves == (tiles + 1) / (132 * 4)
    assert found.padding == pytest.approx(1 - 10 / config.rows)
    assert found.computed == 2 * config.rows * tiles * config.block_v * 4096
    assert found.workspace == 4 * 10 * (tiles * config.block_v + 2 * tiles)  # fp32 logits; a maximum and a sum a tile
    assert found.through_l2 == 2 * 4096 * (32000 + 2 * 10 * tiles)  # the weight once, and the rows twice a tile
    # All programs norm 10 rows at first; then ten tokens are selected.
    assert found.serial == pytest.approx((tiles + 1) * 10 * 4096 * 2 / 5.5e6 + 10 * 0.35)
    assert found.floor == pytest.approx(262_251_416 / 4.3e12 * 1e6)
    assert bench.head_model.analyse(cell, lambda launch: (300, 50_000)).limit.startswith("does not run")
    level = bench.head_model.analyse(bench.SUBSET[2], lambda launch: (128, 50_000))
    assert [step.kernel for step in level.steps] == ["head_kernel", "select_kernel", "grow_kernel"]
    assert level.workspace == found.workspace


@needs_triton
def test_the_model_is_marked_as_one(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "model.json"
    # The interpreter compiles nothing.
    monkeypatch.setattr(bench.head_model.h200, "compiled", lambda launch: (128, 90_000))
    assert run_script(bench, monkeypatch, "--model", "--all", "--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert report["measured"] is False
    assert len(report["cells"]) == len(bench.ALL)
    for cell, found in zip(bench.ALL, report["cells"], strict=True):
        assert found["cell"] == cell.keys()
        assert found["limit"]
        if cell.op == "project_features" and cell.rows > 128:
            assert "cuBLAS" in found["limit"]
            continue
        assert found["computed"] >= found["flops"] * 0.999  # the three rows of the signals are a tile of their own
        assert 0 <= found["padding"] < 1
        assert 0 < found["busy"] <= 1
        assert found["steps"]
        modelled = found
    assert "nothing here was measured" in capsys.readouterr().out
    assert set(asdict(bench.head_model.analyse(bench.ALL[0], lambda launch: (128, 90_000)))) == set(modelled) - {"cell"}


@needs_triton
def test_other_tiles_and_splits_compute_the_same(cells):
    """What `--peers tune` measures, in Triton's interpreter."""
    tuning = importlib.import_module("benchmarks.head_tuning")
    topk, _, level, project = (cell.problem(CPU, torch.float32) for cell in cells.CPU)
    config = tuning.Config(16, 64, 32, 4, 1)
    for problem, chosen, times in ((topk, config, 1), (project, config, 1), (project, None, 4)):
        prepared = tuning.tiled(chosen, times)(problem)
        assert problem.check(prepared.finish(prepared.calls[0]())) <= 1
    for problem, chosen, times, why in (
        (topk, config._replace(rows=64), 1, "2 rows fill less than half of a tile"),
        (topk, None, 2, "only project_features has splits"),
        (level, config, 1, "the product is draft_topk's"),
    ):
        with pytest.raises(tuning.Unavailable, match=why):
            tuning.tiled(chosen, times)(problem)
    assert len({peer.name for peer in tuning.TUNING}) == len(tuning.TUNING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cells", "0"), "--cells: must be at least 1, was 0"),
        (("--budget", "-5"), "--budget: must be at least 1, was -5"),
        (("--peers", ""), "--peers must be of eager, graph, compiled, autotuned, tune, was ''"),
        (("--peers", "eager,sdpa"), "--peers must be of eager, graph, compiled, autotuned, tune, was 'sdpa'"),
        (("--json", "/missing/x.json"), "--json: must be in a folder that exists, was '/missing/x.json'"),
    ],
)
def test_bad_options(bench, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run_script(bench, monkeypatch, "--device", "cpu", *arguments)
    assert message in capsys.readouterr().err


def test_a_result_names_what_computed_it(cells, peers):
    """On a GPU ours is the kernel; where the op gives arguments to the twin, a note says so."""
    small = cells.Head("small", 64, 200, 200)
    notes = []
    for rows in (10, 129):
        problem = cells.make_projection(
            cells.Cell("project_features", small, rows, 1), torch.device("cpu"), torch.bfloat16, 1
        )
        problem.copies = [weight.to("meta") for weight in problem.copies]
        notes.append(peers._unlike_ours(problem, "cuda"))
    assert notes == ["", "project_features: torch"]
