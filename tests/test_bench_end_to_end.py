"""benchmarks/bench_end_to_end.py on a CPU: its report, and that another text has no speed."""

from __future__ import annotations

import json

import pytest
from scripts import load_script, run_script


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_end_to_end")


def test_writes_a_report_of_three_modes(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--problems=2", f"--json={path}") == 0
    report = json.loads(path.read_text())
    assert bench.results_file.violations(report, "end_to_end") == []
    assert (report["device"], report["dtype"], report["problems"]) == ("cpu", "float32", 2)
    plain, speculative, specexit = report["modes"].values()
    assert plain["new_tokens"] == plain["steps"] == speculative["new_tokens"] > speculative["steps"]
    assert specexit["thinking_tokens"] < plain["thinking_tokens"]
    text = capsys.readouterr().out
    assert "CPU: these times say nothing of a GPU" in text
    assert "speculative + exit" in text


def test_another_text_has_no_speed(bench, monkeypatch, tmp_path, capsys):
    solve = bench.Comparison.solve

    def wrong(self, problems):
        solve(self, problems)
        self.modes["speculative"].solutions[-1].tokens[5] += 1

    monkeypatch.setattr(bench.Comparison, "solve", wrong)
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", "--problems=2", f"--json={path}") == 1
    report = json.loads(path.read_text())
    assert bench.results_file.violations(report, "end_to_end") == []
    assert report["problems"] == 1, "nothing is solved after that"
    assert "modes" not in report
    assert "differs at token 5" in report["unavailable"]
    captured = capsys.readouterr()
    assert report["unavailable"] in captured.err
    assert "speed-up" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--problems=0",), "--problems: must be at least 1, was 0"),
        (("--problems=301",), "--problems must be at most 300, was 301"),
        (("--problems=3", "--all"), "not allowed with argument"),
        (("--device=tpu",), "--device must be cpu, cuda or cuda:1 and so on, was tpu"),
        (("--json=/there/is/no/folder",), "--json: must be in a folder that exists"),
    ],
)
def test_bad_options(bench, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run_script(bench, monkeypatch, *arguments)
    assert message in capsys.readouterr().err
