"""The CUDA kernels, run on the host under sanitizers by the very tests of their twins; and bugs planted in them."""

from __future__ import annotations

import re
import subprocess

import host_build
import host_run
import pytest

pytestmark = [
    pytest.mark.skipif(host_build.absent() is not None, reason=f"no host run: {host_build.absent()}"),
    pytest.mark.timeout(900),
]

TREES = ("tests/test_build_tree.py", "tests/test_verify_tree.py", "tests/test_accept.py", "tests/test_compact_kv.py")
EXITS = ("tests/test_decide_exit.py", "tests/test_exit_text.py")
# Tens of thousands of rows, for a statistic: their noise and their draws are the twin's, as the other tests see.
SAMPLES = (
    "tests/test_sample_targets.py",
    "--deselect=tests/test_sample_targets.py::test_draws_follow_the_exact_distribution",
)
CASES = ("tests/test_step_ops.py",)
TEXTS = (
    "tests/test_lossless.py::test_greedy_equals_generate[qwen3]",
    "tests/test_exit_decoding.py::test_exit_position_is_the_same_for_every_tree_and_batch[two-ids]",
)
OF_TREES, OF_A_STEP = {"build_tree", "verify_tree", "accept", "compact_kv"}, {"build_tree", "sample_targets", "accept"}
OF_A_STEP |= {"compact_kv", "decide_exit"}
ALL = OF_TREES | OF_A_STEP


def run(variant: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return host_run.run_pytest(variant, "-q", "--timeout=600", *arguments, **options)


def kernels_run(output: str) -> dict[str, int]:
    """How often each op ran its kernel, from the plugin's line."""
    line = re.search(r"kernels on the host \(\w+\): (.*)", output)
    assert line, output
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", line[1])}


@pytest.mark.parametrize(
    ("variant", "arguments", "ops"),
    [
        ("asan", TREES, OF_TREES),
        ("asan", EXITS, {"accept", "decide_exit"}),
        ("asan", SAMPLES, {"sample_targets"}),
        ("asan", CASES, ALL),
        ("plain", TEXTS, OF_A_STEP),
    ],
    ids=["trees", "exits", "samples", "cases", "texts"],
)
def test_the_twins_tests_pass_on_the_kernels(variant, arguments, ops):
    done = run(variant, *arguments)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    ran = kernels_run(done.stdout)
    assert ops <= set(ran), ran
    assert sum(ran.values()) > 20, ran


def test_no_race(request):
    """Slow under this sanitizer, so a part of them."""
    some = "small_trees or what_it_says or every_smoothing or pages or by_hand or budgets or strided or share_a_batch"
    done = run("tsan", *TREES, *EXITS, SAMPLES[0], "-k", some)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert set(kernels_run(done.stdout)) == ALL


BUGS = {
    "a barrier is missing before the bitmap is read": (
        "tsan",
        "build_tree.cu",
        ("  __syncthreads();\n\n  const auto chosen_up_to", "  const auto chosen_up_to"),
        "tests/test_build_tree.py::test_too_few_candidates_leave_inert_nodes",
    ),
    "the warp is not in step before the trace": (
        "tsan",
        "decide_exit.cu",
        ("  __syncwarp();  // the trace reads all of e\n", ""),
        "tests/test_decide_exit.py::test_budgets",
    ),
    "tiles are read while they are listed": (
        "tsan",
        "narrowed.cuh",
        ("  __syncthreads();\n  for (int i = threadIdx.x / WARP;", "  for (int i = threadIdx.x / WARP;"),
        "tests/test_sample_targets.py::test_rows_may_be_strided",
    ),
    "a thread too many moves": (
        "asan",
        "compact_kv.cu",
        ("if (index >= shape.heads * shape.vectors) return;", "if (index > shape.heads * shape.vectors) return;"),
        "tests/test_compact_kv.py::test_equals_single_copies",
    ),
    "the last tokens are read in eights": (
        "asan",
        "logits.cuh",
        ("if (first + (N - 1) * step + GROUP <= vocabulary && ", "if (first < vocabulary && "),
        "tests/test_sample_targets.py::test_greedy_is_argmax",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug):
    variant, file, edit, test = BUGS[bug]
    done = run(variant, test, edits={file: edit})
    assert done.returncode == 99, done.stdout[-3000:] + done.stderr[-3000:]
    assert file.partition(".")[0] in done.stderr  # the report names the place
    assert "Sanitizer" in done.stderr
