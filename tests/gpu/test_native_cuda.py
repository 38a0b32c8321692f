"""The native module and torch, each with a copy of the CUDA runtime, see the same devices."""

from __future__ import annotations

import pytest
import torch

from specexit_kernels import native

pytestmark = pytest.mark.skipif(native.absent() is not None, reason=str(native.absent()))


def test_sees_torchs_devices():
    assert native.load().device_count() == (torch.cuda.device_count(), "")
    assert native.describe()["reason"] == ""


def test_follows_torchs_current_device_and_has_code_for_it():
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            assert native.load().current_device() == index
            major, _ = torch.cuda.get_device_capability()
            assert native.load().selected_architecture() // 10 == major
