"""benchmarks/bench_step_ops.py on a CPU: its report, what it refuses, its inputs, its references and its arithmetic."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scripts import load_script, run_script

from specexit_kernels import build_tree, sample_targets

CPU = torch.device("cpu")
OPS = ("build_tree", "accept", "decide_exit", "compact_kv", "after the forward")


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_step_ops")


@pytest.fixture(scope="module")
def cells(bench):
    return sys.modules["benchmarks.step_ops_cells"]


@pytest.fixture(scope="module")
def peers(bench):
    return sys.modules["benchmarks.step_ops_peers"]


@pytest.fixture(scope="module")
def reference(bench):
    return sys.modules["benchmarks.step_ops_reference"]


@pytest.fixture(scope="module")
def numbers(bench):
    return sys.modules["benchmarks.step_ops_random"]


def small(cells, op: str) -> Any:
    return next(cell for cell in cells.CPU if cell.op == op)


def once(prepared: Any) -> Any:
    return prepared.finish(prepared.calls[0]())


def test_writes_a_report_with_a_time_for_each_implementation(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--budget=100000", f"--json={path}") == 0
    report = json.loads(path.read_text())
    assert list(report) == ["device", "dtype", "torch", "ours", "ceilings", "cells"]
    assert load_script("results_file").violations(report, "step_ops") == []
    assert (report["device"], report["dtype"]) == ("cpu", "float32")
    assert [cell["op"] for cell in report["cells"]] == ["sample_targets"] * 5 + list(OPS)
    for cell in report["cells"]:
        shape = ["op", "model", "batch", "nodes", "candidates", "depth", "sampling"]
        assert list(cell) == [*shape, "bytes", "flops", "floor_microseconds", "limit", "results"]
        assert (cell["sampling"] is None) == (cell["op"] != "sample_targets")
        restored = cell["op"] in ("accept", "decide_exit", "after the forward")
        names = [report["ours"], *(["restore"] if restored else []), "release"]
        assert [result["implementation"] for result in cell["results"]] == names
        for result in cell["results"]:
            low, high = result["spread"]
            assert 0 < low <= result["microseconds"] <= high
            assert 0 <= result["error"] <= 1
    table = capsys.readouterr().out
    assert all(name in table for name in ("CPU", "after the forward, B = 3", "sample_targets, B = 2, top_k, top_p"))


def changed(index: int) -> Callable[..., Any]:
    """An op whose result of this number is 1 too large; the other numbers it leaves."""

    def wrong(right: Callable[..., Any], *args: Any, **options: Any) -> Any:
        results = list(right(*args, **options))
        results[index] = results[index] + 1
        return results

    return wrong


def off_by_one(right: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return right(*args, **options) + 1


def narrower(right: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return [x[:, 1:] for x in right(*args, **options)]


def changes_state(name: str, factor: float) -> Callable[..., Any]:
    def wrong(right: Callable[..., Any], *args: Any, **options: Any) -> Any:
        results = right(*args, **options)
        getattr(args[-1], name).mul_(factor)
        return results

    return wrong


def nothing(right: Callable[..., Any], *args: Any, **options: Any) -> None:
    return None


def one_slot_more(right: Callable[..., Any], keys: Any, values: Any, *args: Any, **options: Any) -> None:
    right(keys, values, *args, **options)
    values[-1][-1, -1, -1, -1] += 1


@pytest.mark.parametrize(
    ("op", "cell", "wrong", "why"),
    [
        ("build_tree", "build_tree", changed(0), "tokens, 48 of 48"),
        ("build_tree", "build_tree", changed(1), "parent, 48 of 48"),
        ("build_tree", "build_tree", changed(2), "depth, 48 of 48"),
        ("build_tree", "build_tree", changed(3), "visible, 48 of 48"),
        ("build_tree", "build_tree", narrower, "tokens of shape [3, 15], not [3, 16]"),
        ("sample_targets", "sample_targets", off_by_one, "targets, 32 of 32"),
        ("accept", "accept", changed(0), "path, 12 of 12"),
        ("accept", "accept", changed(1), "n_accepted, 3 of 3"),
        ("accept", "accept", changed(2), "next_token, 3 of 3"),
        ("accept", "accept", changes_state("lengths", 2), "state.lengths, 3 of 3"),
        ("decide_exit", "decide_exit", off_by_one, "cut, 3 of 3"),
        ("decide_exit", "decide_exit", changes_state("output", 2), "output, "),
        ("decide_exit", "decide_exit", changes_state("smoothed", 1.001), "state.smoothed off by"),
        ("decide_exit", "decide_exit", changes_state("trace", float("nan")), "state.trace off by inf"),
        ("compact_kv", "compact_kv", nothing, "the cache, its tensor 0"),
        ("compact_kv", "compact_kv", one_slot_more, "the cache, its tensor 3"),
        ("accept", "after the forward", changed(0), "path, 12 of 12"),
        ("decide_exit", "after the forward", off_by_one, "cut, 3 of 3"),
        ("compact_kv", "after the forward", nothing, "the cache, its tensor 0"),
    ],
)
def test_a_wrong_result_has_no_time(bench, cells, peers, monkeypatch, tmp_path, capsys, op, cell, wrong, why):
    right = getattr(peers, op)
    monkeypatch.setattr(peers, op, lambda *args, **options: wrong(right, *args, **options))
    monkeypatch.setattr(bench, "CPU", (small(cells, cell),))
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--budget=100000", f"--json={path}") == 1
    ours, *others = json.loads(path.read_text())["cells"][0]["results"]
    assert list(ours) == ["implementation", "unavailable"]
    assert ours["unavailable"].startswith(f"wrong result: {why}")
    assert all(other["microseconds"] > 0 for other in others)
    assert ours["unavailable"] in capsys.readouterr().out


def test_a_result_that_is_left_out_is_missed(cells, peers):
    problem = small(cells, "after the forward").problem(CPU, torch.float32)
    results = once(peers.ours()(problem))
    del results["cut"]
    with pytest.raises(peers.Unavailable, match="no cut"):
        problem.check(results)


@pytest.mark.parametrize("op", OPS[1:])
def test_every_call_finds_the_same_state(cells, peers, op):
    """However often the copies have been used, the first call of a round does the work of the first of all."""
    problem = small(cells, op).problem(CPU, torch.float32)
    prepared = peers.ours()(problem)
    for _ in range(3):
        for call in prepared.calls:
            call()
    problem.fill()  # of the cache's contents only the first round's are compared
    problem.check(once(prepared))
    if op != "compact_kv":
        found = [vars(state) for state in problem.states]
        prepared.calls[1]()
        for name, value in found[0].items():  # the second copy did the same, in its own slots
            if value.dtype == torch.int32:
                shift = cells.WINDOW * (name == "lengths")
                assert torch.equal(found[1][name], value + shift), name


def test_states_that_are_not_restored_have_no_time(cells, peers):
    problem = small(cells, "accept").problem(CPU, torch.float32)
    restore = peers.restore(problem)
    assert problem.check(once(restore)) == 0
    peers.ours()(problem).calls[1]()
    with pytest.raises(peers.Unavailable, match="the states are not restored"):
        problem.check(restore.finish(None))
    assert problem.check(once(restore)) == 0


@pytest.mark.parametrize("batch", [1, 33, 512])
def test_the_inputs_are_what_the_readme_says(cells, peers, batch):
    """At the measured shapes: the paths, the rows that are cut, and both pipelines that agree on them."""
    for op in ("accept", "decide_exit"):
        problem = cells.Cell(op, cells.QWEN, cells.TREE, batch).problem(CPU, torch.float32)
        accepted = [len(path) for path in problem.accepted]
        assert accepted == problem.cell.accepted
        assert all(node > place for path in problem.accepted for place, node in enumerate(path[1:], 1))
        assert problem.expected["state.n_pending"].tolist() == accepted
        assert problem.expected["state.finished"].sum() == 0
        if op == "decide_exit":
            cut = [row for row, place in enumerate(problem.expected["cut"].tolist()) if place >= 0]
            assert cut == list(range(31, batch, 32))
        for peer in (peers.ours(), peers.release):
            assert problem.check(once(peer(problem))) <= 1
    many = cells.Cell("accept", cells.QWEN, cells.TREE, 512).accepted
    assert sum(many) / len(many) == 3.875
    assert set(many) == {1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("form", ["TREE", "LARGE", "SMALL_TREE"])
def test_candidates_are_a_draft_s(cells, numbers, reference, form):
    """Monotone scores, parents before their children, distinct siblings; a tree of them as deep as the draft."""
    form = getattr(cells, form)
    tokens, scores, parents = numbers.candidates(form, 5, 5000, seed=3)
    assert tokens.shape == (5, form.candidates)
    below = torch.where(parents < 0, torch.zeros(()), scores.gather(1, parents.clamp(min=0).long()))
    assert bool((scores < below).all())
    assert bool((parents < torch.arange(form.candidates)).all())
    assert all(
        len(set(zip(*row, strict=True))) == form.candidates
        for row in zip(tokens.tolist(), parents.tolist(), strict=True)
    )
    root = torch.arange(5, dtype=torch.int32)
    none = torch.zeros(5, dtype=torch.int32)
    tree = build_tree(root, tokens, scores, parents, form.nodes, none.unsqueeze(1), none, implementation="torch")
    expected = reference.best_nodes(form.nodes, root, tokens, scores, parents)
    assert all(torch.equal(found, right) for found, right in zip(tree, expected.values(), strict=True))
    assert tree.depth.amax(1).tolist() == [form.depth] * 5


def test_draws_are_the_twin_s_and_say_where_rounding_could_decide(cells, numbers, reference):
    for sampling in cells.SAMPLINGS:
        logits, positions, seeds, targets = numbers.distinct_rows(60, 4000, torch.bfloat16, sampling)
        parameters = [
            None if value is None else torch.full((60,), value, dtype=dtype)
            for value, dtype in (
                (sampling.temperature, torch.float32),
                (sampling.top_k, torch.int32),
                (sampling.top_p, torch.float32),
                (sampling.min_p, torch.float32),
            )
        ]
        found = sample_targets(logits, positions, seeds, *parameters, implementation="torch")
        assert torch.equal(found, targets), sampling.name
        if sampling is not cells.GREEDY:
            assert (targets != logits.argmax(1)).sum() >= 3, "some draws are not of the most likely token"
    one, position, seed = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    one[0, 2] = 5
    assert reference.draws(one, position, seed, cells.GREEDY)[1].tolist() == [True]
    one[0, 3] = 5 + 1e-4  # so near that another rounding takes the other token
    assert reference.draws(one, position, seed, cells.GREEDY)[1].tolist() == [False]
    # The nucleus ends at 0.6 plus or minus almost nothing; whether its third token may be drawn is open.
    edge = torch.tensor([[0.3, 0.3, 0.4]]).log().repeat(200, 1)
    seeds = torch.arange(200)
    sampling = cells.Sampling("edge", 1.0, top_p=0.7)
    _, clear = reference.draws(edge, torch.zeros(200, dtype=torch.int32), seeds, sampling)
    assert 0 < int(clear.sum()) < 200


def test_logits_are_a_models(numbers):
    """A few tokens hold nearly all of the probability, and one alone in the sharpest rows."""
    p = numbers._logits(60, 151936, torch.bfloat16).float().softmax(1).sort(1, descending=True).values
    assert bool((p[:, :200].sum(1) > 0.97).all())
    nucleus = (p.cumsum(1) < 0.95).sum(1) + 1
    assert nucleus.min() == 1
    assert 20 <= nucleus.max() <= 200


def test_bytes_of_a_cell(bench, cells):
    after, after_32, greedy, top_p, tree, *_ = bench.SUBSET
    assert str(after) == "after the forward, B = 1"
    assert greedy.bytes(2) == 60 * (2 * 151936 + 4)
    assert greedy.floor(2, 4.3e12, 790e12) == (greedy.bytes(2) / 4.3e12, "memory")
    assert round(greedy.bytes(2) / 4.3e6, 1) == 4.2
    assert top_p.bytes(2) == 60 * (2 * 151936 + 4 + 12 + 2 * 4)  # temperature and top_p
    # 510 candidates of 12 bytes; root, a forced id and their number; 60 nodes of three numbers and a word
    assert tree.bytes(2) == 510 * 12 + 12 + 60 * (12 + 8)
    large = cells.Cell("build_tree", cells.QWEN, cells.LARGE, 8)
    assert large.bytes(2) == 8 * (4096 * 12 + 12 + 256 * (12 + 32))
    accept, decide, compact = (
        cells.Cell(op, cells.QWEN, cells.TREE, 1) for op in ("accept", "decide_exit", "compact_kv")
    )
    # 60 nodes of three numbers and a word; path of 7, run of 8, two results; ten numbers of the state
    assert accept.bytes(2) == 60 * 20 + 4 * (7 + 8 + 2 + 10)
    # 7 columns: 3 signals, their 2 x 3 values, the token twice, and a bool; 3 values and counts, read and written;
    # 3 thresholds and bools; the cut, alpha, and twelve numbers of the state
    assert decide.bytes(2) == 7 * (4 * (3 + 6 + 2) + 1) + 4 * 4 * 3 + 5 * 3 + 4 * 14
    # 3 slots of 36 layers, keys and values, 8 heads of 128, read and written; a path of 7, its length, the row's
    assert compact.bytes(2) == 2 * 3 * 36 * 2 * 8 * 128 * 2 + 4 * 9
    assert after.bytes(2) == accept.bytes(2) + decide.bytes(2) + compact.bytes(2)
    assert after.floor(2, 4.3e12, 790e12)[1] == "launches"
    assert after_32.moved == 32 * 23 // 8
    assert after_32.floor(2, 4.3e12, 790e12)[1] == "memory"
    assert {cell.flops for cell in bench.ALL} == {0}
    assert set(bench.SUBSET) <= set(bench.ALL)
    assert len(bench.ALL) == len(set(bench.ALL)) == 5 * 5 + 3 + 5 * 5 + 2
    assert {cell.batch for cell in bench.ALL} == {1, 8, 32, 128, 512}


def test_the_forms_have_the_candidates_that_are_named(cells):
    assert (cells.TREE.candidates, cells.TREE.depth) == (10 + 10 * 10 * 5, 6)
    assert (cells.LARGE.candidates, cells.LARGE.nodes) == (4096, 256)


def test_memory_holds_the_inputs(cells):
    """As much as the large tensors take, and not twice that."""
    for op in ("sample_targets", "compact_kv", "after the forward"):
        cell = small(cells, op)
        problem = cell.problem(CPU, torch.float32)
        tensors = problem.copies if op == "sample_targets" else problem.keys + problem.values
        held = sum(tensor.nbytes for tensor in tensors)
        assert held < cell.memory(CPU, torch.float32) <= 2 * held


@pytest.mark.parametrize("op", ["sample_targets", *OPS])
def test_what_is_compiled_computes_the_same(cells, peers, monkeypatch, op):
    """The functions that the compiled peer gives to the compiler, run as they are."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for cell in cells.CPU:
        if cell.op == op:
            problem = cell.problem(CPU, torch.float32)
            assert problem.check(once(peers.compiled(problem))) == 0


def test_the_twin_draws_few_rows_only(cells, peers):
    cell = cells.Cell("sample_targets", cells.SMALL, cells.SMALL_TREE, 4, cells.TOP_P)
    with pytest.raises(peers.Unavailable, match="row by row"):
        peers.twin(cell.problem(CPU, torch.float32))
    problem = cells.CPU[2].problem(CPU, torch.float32)
    assert problem.check(once(peers.twin(problem))) == 0


def test_a_result_names_what_computed_it(cells, peers, monkeypatch):
    """Ours is named by `accept`; where another op's implementation differs, a note says so."""

    class Implementation:
        def __init__(self, name: str) -> None:
            self.name = name

    class Op:
        def __init__(self, name: str) -> None:
            self.name = name

        def implementation(self, device: str, args: Any = None) -> Implementation:
            return Implementation(self.name)

    monkeypatch.setattr(peers, "OPS", {op: Op("cuda") for op in OPS} | {"compact_kv": Op("torch")})
    after, decide = (small(cells, op).problem(CPU, torch.float32) for op in ("after the forward", "decide_exit"))
    assert peers._unlike_ours(after, None) == "compact_kv: torch"
    assert peers._unlike_ours(after, "torch") == ""
    assert peers._unlike_ours(decide, None) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "release,tune"), "--peers must be of release, twin, compiled, was 'tune'"),
        (("--model",), "unrecognized arguments: --model"),
        (("--cells", "0"), "--cells: must be at least 1, was 0"),
    ],
)
def test_bad_options(bench, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run_script(bench, monkeypatch, "--device", "cpu", *arguments)
    assert message in capsys.readouterr().err
