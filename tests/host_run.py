"""The CUDA kernels on the host: their sources, unchanged, as C++ against `cuda_on_host`, one fiber a CUDA thread.

As a pytest plugin it makes every op with a CUDA kernel run that kernel for CPU tensors, so that the tests of the twins
test the kernels. Each test draws an order of threads, which is printed when it fails; HOST_RUN_ORDER=<n> repeats it.

    PYTHONPATH=.:python:tests HOST_RUN=plain python -P -m pytest -p host_run tests/test_verify_tree.py

The variants "asan" and "tsan" need their sanitizer loaded before Python: `run_pytest` does it.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from host_build import ROOT, VARIANTS, Edit, absent, build_module, environment, load


def run_pytest(
    variant: str, *arguments: str, edits: Mapping[str, Edit] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run pytest with these arguments in a process of its own, where ops with CUDA kernels run them on the CPU.

    The result's `returncode` is pytest's, or 99 after a sanitizer's report, which is in `stderr`. `edits` as in
    `build_module`: a test of the tests plants a bug and expects a status other than 0. Raises
    subprocess.TimeoutExpired.
    """
    return subprocess.run(
        # Captured by Python alone: a sanitizer's report must not end in a file that dies with the process.
        [sys.executable, "-P", "-m", "pytest", "-p", "host_run", "-p", "no:cacheprovider", "--capture=sys", *arguments],
        cwd=ROOT,
        env={
            **environment(variant),
            "HOST_RUN": variant,
            "HOST_RUN_MODULE": str(build_module(variant, edits)),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "python", "tests")),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class _Plugin:
    """What `pytest -p host_run` does; there is one while HOST_RUN names a variant."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.order = os.environ.get("HOST_RUN_ORDER")
        self.runs: Counter[str] = Counter()
        path = os.environ.get("HOST_RUN_MODULE")
        load(Path(path) if path else build_module(variant))  # before specexit_kernels looks for it
        self._serve_the_cpu()

    def _serve_the_cpu(self) -> None:
        from specexit_kernels import _op

        for name, op in _op.OPS.items():
            if kernel := op.kernels.get("cuda"):
                served = self._counted(name, kernel, op.cpu.function)
                op.cpu = dataclasses.replace(kernel, function=served, absent=None)

    def _counted(self, name: str, kernel: Any, otherwise: Callable[..., Any]) -> Callable[..., Any]:
        def serve(*arguments: Any) -> Any:
            if kernel.limit is not None and kernel.limit(*arguments):
                return otherwise(*arguments)
            self.runs[name] += 1
            return kernel.function(*arguments)

        return serve

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        order = self.order or str(random.SystemRandom().randrange(2**31))
        os.environ["HOST_RUN_ORDER"] = order
        item.user_properties.append(("host_run_order", order))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = (yield).get_result()  # type: ignore[misc]
        if report.failed:
            order = dict(item.user_properties).get("host_run_order")
            report.sections.append(("order of threads", f"HOST_RUN={self.variant} HOST_RUN_ORDER={order}"))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):  # a worker of xdist
            session.config.workeroutput["host_run"] = dict(self.runs)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.runs.update(getattr(node, "workeroutput", {}).get("host_run", {}))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        runs = ", ".join(f"{name} {count}" for name, count in sorted(self.runs.items())) or "none"
        terminalreporter.write_line(f"kernels on the host ({self.variant}): {runs}")


def pytest_configure(config: pytest.Config) -> None:
    if variant := os.environ.get("HOST_RUN"):
        if variant not in VARIANTS:
            raise pytest.UsageError(f"HOST_RUN must be one of {', '.join(VARIANTS)}, was {variant!r}")
        if reason := absent():
            raise pytest.UsageError(f"HOST_RUN={variant}: {reason}")
        config.pluginmanager.register(_Plugin(variant), "host_run_plugin")
