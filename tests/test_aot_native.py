"""The machine code of the native module: no spills, and within the committed budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import load_script, run_script

from specexit_kernels import native

needs_module = pytest.mark.skipif(native.absent() is not None, reason=str(native.absent()))


@needs_module
def test_no_kernel_spills_or_passes_its_budget():
    pytest.importorskip("triton")
    script = load_script("aot_native")
    found = script.usages(Path(native.load().__file__), script.tool())
    budget = json.loads(script.BUDGET.read_text())
    assert {usage.kernel for usage in found} == set(budget)
    architectures = {usage.architecture for usage in found}
    assert all(problem == [] for problem in (usage.problems(budget) for usage in found)), found
    assert len(found) == len(budget) * len(architectures)


def test_without_the_module_there_is_nothing_to_compare(monkeypatch, capsys):
    script = load_script("aot_native")
    monkeypatch.setattr(native, "absent", lambda: "the native module is not built")
    assert run_script(script, monkeypatch) == 0
    assert "left out: the native module is not built" in capsys.readouterr().out


def test_says_what_is_wrong():
    script = load_script("aot_native")
    budget = {"a_kernel": {"registers": 32, "shared": 64}}
    assert script.Usage("a_kernel", "sm_90", 32, 0, 64).problems(budget) == []
    assert script.Usage("a_kernel", "sm_90", 33, 8, 65).problems(budget) == [
        "stack of 8 bytes",
        "registers 33 above 32",
        "shared 65 above 64",
    ]
    assert script.Usage("b_kernel", "sm_90", 1, 0, 0).problems(budget) == ["no budget"]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN8specexit41_GLOBAL__N__bfb48b54_9_accept_cu_ecbb1f3213accept_kernelENS_6AcceptE", "accept_kernel"),
        (
            "_ZN8specexit46_GLOBAL__N__39_13_build_tree_cu_d717build_tree_kernelILi256EEEvNS_9BuildTreeE",
            "build_tree_kernel<256>",
        ),
        (
            "_ZN8specexit46_GLOBAL__N__51_13_compact_kv_cu_617compact_kv_kernelI5uint4EEvNS_9CompactKvE",
            "compact_kv_kernel<16>",
        ),
        (
            "_ZN8specexit50_GLOBAL__N__0_17_sample_targets_cu_720narrowed_rows_kernelI13__nv_bfloat16EEvNS_13SampleTargetsE",
            "narrowed_rows_kernel<bf16>",
        ),
        (
            "_ZN8specexit50_GLOBAL__N__0_17_sample_targets_cu_720best_of_tiles_kernelIfLb1EEEvNS_13SampleTargetsEi",
            "best_of_tiles_kernel<fp32, true>",
        ),
    ],
)
def test_names_kernels(symbol, name):
    assert load_script("aot_native").kernel_name(symbol) == name


def test_the_budget_is_the_most_of_all_architectures():
    script = load_script("aot_native")
    found = [script.Usage("a_kernel", "sm_80", 33, 0, 64), script.Usage("a_kernel", "sm_90", 8, 0, 128)]
    assert script.budget_of(found) == {"a_kernel": {"registers": 40, "shared": 128}}
