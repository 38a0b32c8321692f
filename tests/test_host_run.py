"""The host run itself: right kernels pass in any order of threads, and each planted bug is found by what shall find it.

The kernels are those of `cuda_on_host/planted.cuh`, each right or with one bug. A bug that only one variant can see is
proof of that variant: without it, the same program says "right".
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import host_build
import host_run
import pytest
import torch

pytestmark = pytest.mark.skipif(host_build.absent() is not None, reason=f"no host run: {host_build.absent()}")

ORDERS = range(12)
UNSEEN = {"scan", "rounds", "swap", "count", "no_start"}  # nothing but a wrong result, and that in some orders only
BY_ASAN = {
    "shared_overrun": "AddressSanitizer: global-buffer-overflow",
    "shared_index": "index 96 out of bounds",
    "global_overrun": "AddressSanitizer: heap-buffer-overflow",
    "misaligned": "misaligned address",
}
BY_TSAN = ("scan", "rounds", "swap", "count")
THROWN = {
    "divergent": "divergent barrier: __syncthreads at .* while others wait in __syncthreads at .*; thread .* of block",
    "early_exit": "no thread can go on: 44 of 64 have returned, thread .* waits in __syncthreads at",
    "missing_lane": "no thread can go on: .* waits in __shfl_down_sync at .*planted.cuh:",
    "absent_lane": "__shfl_sync at .*: lane .* reads lane .*, which is not in the mask",
    "different": "lanes of a warp differ: .*(__any_sync|__ballot_sync) at .* while others wait in",
    "too_many_threads": "invalid configuration argument",
    "empty_grid": "invalid configuration argument",
}


def run(variant: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = host_build.build_program(variant, host_build.EMULATION / "planted.cu")
    environment = {**host_build.environment(variant), "LD_PRELOAD": ""}  # linked in
    return subprocess.run([program, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("variant", host_build.VARIANTS)
@pytest.mark.parametrize("case", sorted({*UNSEEN, *BY_ASAN, *BY_TSAN, *THROWN, "primitives"}))
def test_right_kernels_pass_in_every_order(case, variant):
    done = run(variant, case, "right", *ORDERS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["right"] * len(ORDERS)


@pytest.mark.parametrize("case", BY_ASAN)
def test_bad_addresses_are_found(case):
    done = run("asan", case, "bug")
    assert done.returncode == 99
    assert BY_ASAN[case] in done.stderr
    assert "planted.cuh:" in done.stderr
    assert run("plain", case, "bug").stdout == "right\n"


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("case", BY_TSAN)
def test_races_are_found_in_any_order(case, order):
    done = run("tsan", case, "bug", order)
    assert done.returncode == 99
    assert "ThreadSanitizer: data race" in done.stderr
    assert "planted.cuh:" in done.stderr


@pytest.mark.parametrize("variant", host_build.VARIANTS)
@pytest.mark.parametrize("case", THROWN)
def test_what_the_scheduler_sees_is_thrown_and_the_next_launch_starts_afresh(case, variant):
    done = run(variant, case, "bug", *ORDERS)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(ORDERS)
    for line in lines:
        assert re.match(f"error: {THROWN[case]}", line)


def test_orders_show_a_missing_barrier():
    """Threads that run one after another, as far as each can, hide it; a late warp that runs first does not."""
    results = run("plain", "scan", "bug", *range(40)).stdout.split()
    assert results[0] == "right"
    assert results.count("wrong") >= 10
    assert set(results[1::2]) == {"wrong"}  # one warp as long as it can
    assert results == run("plain", "scan", "bug", *range(40)).stdout.split()


@pytest.mark.parametrize("case", ["rounds", "swap", "no_start"])
def test_wrong_results_that_any_order_shows(case):
    assert set(run("plain", case, "bug", *ORDERS).stdout.split()) == {"wrong"}


def test_arithmetic():
    assert run("plain", "arithmetic").stdout == "right\n"
    assert run("asan", "arithmetic").stdout == "right\n"


def test_conversions_round_as_torch_does():
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).int()
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int32).short()
    halves = every_half.view(torch.float16).float()
    brains = every_half.view(torch.bfloat16).float()
    # Every value, and every middle between neighbours, where a tie is broken.
    middles = [(x + x.roll(-1)) / 2 for x in (halves, brains)]
    floats = torch.cat([bits.view(torch.float32), halves, brains, *middles])
    program = host_build.build_program("plain", host_build.EMULATION / "planted.cu")
    done = subprocess.run(
        [program, "convert"], input=floats.numpy().tobytes(), capture_output=True, check=True, timeout=60
    )
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.int16).view(2, -1)
    for row, dtype in zip(found, (torch.float16, torch.bfloat16), strict=True):
        wanted = floats.to(dtype).view(torch.int16)
        is_nan = floats.isnan()
        assert torch.equal(row[~is_nan], wanted[~is_nan])
        assert set(row[is_nan].tolist()) == {0x7FFF}


def compile_alone(folder: Path, text: str) -> Path:
    source = folder / "kernel.cu"
    source.write_text(text)
    return host_build.build_program("plain", source)


def test_compiler_errors_are_reported(tmp_path):
    with pytest.raises(RuntimeError, match=r"kernel.cu:1:.*error: .*undeclared_type"):
        compile_alone(tmp_path, "undeclared_type x;")


def test_shared_variables_must_have_internal_linkage(tmp_path):
    kernel = "template <class T> __global__ void kernel(T* x) { __shared__ T sum; sum = *x; *x = sum; }\n"
    use = "int main() { return cudaLaunchKernelEx(new cudaLaunchConfig_t{}, kernel<int>, new int); }"
    compile_alone(tmp_path, "namespace {\n" + kernel + "}\n" + use)
    with pytest.raises(RuntimeError, match=r"kernel<int>\(int\*\)::sum must have internal linkage"):
        compile_alone(tmp_path, kernel + use)


def test_an_edit_must_match_once_and_change_something():
    for edit in [("there is no such text", ""), ("return", ""), ("*count = 0;", "*count = 0;"), str]:
        with pytest.raises(ValueError, match=r"device.cu"), host_build._edited({"device.cu": edit}):
            pass


def test_an_edit_rebuilds_what_includes_it():
    before = [x.path() for x in host_build._objects("plain", host_build.CSRC)]

    def changed(name: str) -> set[str]:
        with host_build._edited({name: lambda text: text + "\n"}) as folder:
            after = host_build._objects("plain", folder)
            return {x.source.name for x, old in zip(after, before, strict=True) if x.path() != old}

    assert changed("device.cu") == {"device.cu"}
    assert changed("device.h") == {"device.cu", "bindings.cpp"}


def test_pytest_runs_on_an_edited_module():
    """The module's own tests, in a process that loads the one for the host."""
    done = host_run.run_pytest("plain", "-q", "tests/test_native.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels on the host (plain):" in done.stdout
    edits = {"device.cu": ("return cudaGetDeviceCount(count);", "return cudaSuccess;")}
    done = host_run.run_pytest("plain", "-q", "tests/test_native.py", edits=edits)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_imports_without_torch_or_device" in done.stdout
    assert "HOST_RUN_ORDER=" in done.stdout  # how to repeat the failure
