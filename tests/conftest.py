"""Shared fixtures: a fresh random generator for each test, whose seed is printed when the test fails."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: its kernels then run on the CPU


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch generator with a new seed every run; SPECEXIT_TEST_SEED=<n> repeats a failure."""
    seed = int(os.environ.get("SPECEXIT_TEST_SEED", random.SystemRandom().randrange(2**31)))
    request.node.user_properties.append(("seed", seed))
    return torch.Generator().manual_seed(seed)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = (yield).get_result()
    seeds = [value for name, value in item.user_properties if name == "seed"]
    if report.failed and seeds:
        report.sections.append(("random seed", f"SPECEXIT_TEST_SEED={seeds[0]}"))
