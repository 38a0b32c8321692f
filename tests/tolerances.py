"""How far a result may lie from the float64 reference: one table, by dtype."""

import torch

# (relative, absolute). The relative part is a few units in the last place of the dtype's result; the absolute part is
# what cancellation in sums of O(1) terms leaves.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """`actual` within the table's tolerance of `expected` (NaN equals NaN); `dtype` is that of the inputs."""
    relative, absolute = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=relative, atol=absolute, equal_nan=True, check_device=False
    )
