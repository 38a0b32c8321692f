"""benchmarks/bench_tree_attention.py on a CPU: its report, what it refuses, its arithmetic, and the timer."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import time
from types import ModuleType

import pytest
import torch
from scripts import load_script, run_script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_tree_attention")


@pytest.fixture(scope="module")
def harness(bench) -> ModuleType:
    return sys.modules["benchmarks.harness"]


@pytest.fixture(scope="module")
def cells(bench) -> ModuleType:
    return sys.modules["benchmarks.attention_cells"]


@pytest.fixture
def small(bench, cells, monkeypatch):
    """One cell, small enough to be measured in no time."""
    cell = cells.Cell(bench.SUBSET[0].model, 5, 2, 70)
    monkeypatch.setattr(bench, "CPU", (cell,))
    return cell


def test_writes_a_report_with_a_time_for_each_implementation(bench, small, monkeypatch, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--budget=100000", f"--json={path}") == 0
    report = json.loads(path.read_text())
    assert list(report) == ["device", "dtype", "torch", "ours", "ceilings", "cells"]
    assert load_script("results_file").violations(report, "tree_attention") == []
    assert (report["device"], report["dtype"], report["ours"]) == ("cpu", "float32", "sdpa")
    assert all(rate > 0 for rate in report["ceilings"].values())
    (cell,) = report["cells"]
    assert (cell["nodes"], cell["batch"], cell["length"], cell["heads"]) == (5, 2, 70, 32)
    assert [result["implementation"] for result in cell["results"]] == ["sdpa", "torch twin", "SDPA"]
    for result in cell["results"]:
        low, high = result["spread"]
        assert 0 < low <= result["microseconds"] <= high
        assert 0 <= result["error"] < 1e-4
        assert result["fraction_of_floor"] > 0
    assert cell["results"][0]["times_ours"] == 1
    table = capsys.readouterr().out
    assert all(name in table for name in ("CPU", "sdpa", "torch twin", "SDPA"))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda out: out * 1.02, "wrong result: relative error 2.0e-02"),
        (lambda out: out.masked_fill(torch.ones(()).bool(), math.nan), "wrong result: relative error nan"),
        (lambda out: out[:, :-1], "wrong result: relative error nan"),
    ],
)
def test_a_wrong_result_has_no_time(bench, small, monkeypatch, tmp_path, capsys, wrong, why):
    peers = sys.modules["benchmarks.attention_peers"]
    right = peers.tree_attention
    monkeypatch.setattr(peers, "tree_attention", lambda *args, **options: wrong(right(*args, **options)))
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--budget=100000", f"--json={path}") == 1
    ours, twin, sdpa = json.loads(path.read_text())["cells"][0]["results"]
    assert ours == {"implementation": "sdpa", "unavailable": why}
    assert "microseconds" not in twin
    assert sdpa["microseconds"] > 0
    assert sdpa["times_ours"] is None
    assert why in capsys.readouterr().out


def test_what_fails_is_a_line_and_stops_nothing(bench, harness, small):
    def broken(problem):
        raise KeyError("no such kernel")

    peers = [bench.Peer("broken", broken), bench.Peer("twin", bench.ours("torch"))]
    results = harness.run_cell(small, peers, torch.device("cpu"), torch.float32, math.inf)
    assert results[0] == {"implementation": "broken", "unavailable": "KeyError: 'no such kernel'"}
    assert results[1]["microseconds"] > 0


def test_past_the_time_budget_only_ours_is_measured(bench, harness, small):
    peers = [bench.Peer("ours", bench.ours(), optional=False), bench.Peer("twin", bench.ours("torch"))]
    ours, twin = harness.run_cell(small, peers, torch.device("cpu"), torch.float32, time.monotonic() - 1)
    assert ours["microseconds"] > 0
    assert twin["unavailable"] == "the time budget was used up"


def test_bytes_and_flops_of_a_cell(bench):
    qwen = next(cell for cell in bench.SUBSET if str(cell) == "Qwen3-4B, 60 nodes, batch 1, 8,192 slots")
    # K and V of 8 heads for 8,252 slots; q and the result of 32 heads for 60 nodes; 128 columns of 2 bytes
    assert qwen.bytes(2) == 2 * (2 * 8 * 8252 * 128) + 2 * (2 * 32 * 60 * 128) == 34_783_232
    # two products of 32 x 60 queries with 8,252 slots over 128 columns, 2 operations for each term
    assert qwen.flops == 2 * (2 * 32 * 60 * 8252 * 128) == 8_112_046_080
    assert qwen.floor(2, 4.3e12, 790e12) == (8_112_046_080 / 790e12, "arithmetic")
    windowed = next(cell for cell in bench.ALL if cell.model.window == 128 and cell.length == 8192 and cell.batch == 1)
    assert windowed.attended == 127 + 60  # the root, at position 8,192, sees the last 127 slots


def test_peers_agree_with_the_twin(cells):
    """The dense mask and the block mask say what the bits say, in a window too."""
    peers = sys.modules["benchmarks.attention_peers"]
    from torch.nn.attention.flex_attention import create_mask

    for window in (None, 100):
        cell = cells.Cell(cells.Model("test", 4, 2, 16, window=window), 37, 2, 300)
        problem = cells.make_problem(cell, torch.device("cpu"), torch.float32, 2)
        for prepare in (peers.sdpa(None), peers.sdpa(None, packed=True)):
            prepared = prepare(problem)
            assert [problem.error(prepared.finish(call())) < 1e-5 for call in prepared.calls] == [True, True]
        blocks = peers.tree_block_mask(problem)
        dense = create_mask(blocks.mask_mod, cell.batch, None, cell.nodes, problem.slots, device="cpu")
        assert torch.equal(dense[:, 0], problem.seen)
        listed = blocks.to_dense()[:, 0, 0].bool().repeat_interleave(128, -1)[:, : problem.slots]
        assert torch.equal(listed & problem.seen.any(1), problem.seen.any(1))


def test_occupancy_on_sm_90(bench):
    occupancy = sys.modules["benchmarks.h200"].occupancy
    assert occupancy(32, 0, 4) == 16  # 64 warps
    assert occupancy(32, 0, 1) == 32  # programs
    assert occupancy(168, 1024, 8) == 1  # registers: 12 warps
    assert occupancy(128, 1024, 4) == 4  # registers: 16 warps
    assert occupancy(64, 100 * 1024, 4) == 2  # shared memory
    assert occupancy(64, 227 * 1024, 4) == 1
    assert occupancy(64, 228 * 1024, 4) == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the launches are Triton's")
def test_the_model_is_marked_as_one(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "model.json"
    monkeypatch.setattr(bench.attention_model, "compiled", lambda cell: (230, 100_000))  # the interpreter compiles none
    assert run_script(bench, monkeypatch, "--model", "--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert report["measured"] is False
    assert len(report["cells"]) == len(bench.SUBSET)
    for cell, found in zip(bench.SUBSET, report["cells"], strict=True):
        assert found["tiles"] * found["block_m"] >= cell.rows
        assert found["programs"] == cell.batch * cell.model.kv_heads * found["active"] * found["tiles"]
        assert 1 <= found["active"] <= found["splits"]
        assert found["computed"] >= found["flops"]
        assert found["limit"]
    assert "nothing here was measured" in capsys.readouterr().out


def test_timer_on_a_cpu(harness):
    timer = harness.timer
    calls = [lambda: time.sleep(0.002)] * 2
    timing = timer.measure(calls, "cpu", seconds=0.05)
    low, high = timing.spread
    assert 2000 <= low <= timing.microseconds <= high
    assert timing.method == "clock"
    assert timing.samples >= 3
    once = timer.measure(calls, "cpu", seconds=0.001)
    assert (once.samples, once.calls) == (1, 2)
    with pytest.raises(ValueError, match="calls must have at least one call"):
        timer.measure([], "cpu")


def test_other_tiles_and_splits_compute_the_same(bench, harness, cells):
    """What `--peers tune` measures, in Triton's interpreter."""
    tuning = importlib.import_module("benchmarks.attention_tuning")
    problem = cells.make_problem(cells.Cell(bench.SUBSET[0].model, 5, 1, 600), torch.device("cpu"), torch.float32, 1)
    for config, times in ((tuning.Config(16, 64, 4, 2, 1), 1), (None, 0.5)):
        prepared = tuning.tiled(config, times)(problem)
        assert problem.error(prepared.calls[0]()) < 1e-5
    with pytest.raises(harness.Unavailable, match="20 rows fill less than half of a tile"):
        tuning.tiled(tuning.Config(64, 64, 4, 2, 1))(problem)
    assert len({peer.name for peer in tuning.TUNING}) == len(tuning.TUNING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cells", "0"), "--cells: must be at least 1, was 0"),
        (("--budget", "-5"), "--budget: must be at least 1, was -5"),
        (("--peers", ""), "--peers must be of sdpa, flex, flashinfer, tune, was ''"),
        (("--peers", "sdpa,fast"), "--peers must be of sdpa, flex, flashinfer, tune, was 'fast'"),
        (("--json", "/missing/x.json"), "--json: must be in a folder that exists, was '/missing/x.json'"),
    ],
)
def test_bad_options(bench, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run_script(bench, monkeypatch, "--device", "cpu", *arguments)
    assert message in capsys.readouterr().err
