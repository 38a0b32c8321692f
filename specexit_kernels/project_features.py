"""The draft's first projection: features of three base layers to one hidden row, and to raw exit signals.

    hidden = W[:H] . [x0, x1, x2]        signals = W[H:] . [x0, x1, x2]

This is `fc` of EAGLE-3 (arXiv 2503.01840); SpecExit (arXiv 2509.24248) trains the exit signals as extra rows of it. The
three tensors are read where they are, and the signals, which are compared with thresholds, are not rounded to x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specexit_kernels import _checks, triton
from specexit_kernels._op import Op

# Of the Triton kernel. With more rows the product is no longer a matter of reading the weight, and the twin's cuBLAS
# takes it. Provisional: by arithmetic, not by measurement.
MAX_ROWS = 128


def project_features_ref(features: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """The meaning of `project_features` in plain PyTorch: CPU path and test oracle."""
    hidden_size = features[0].shape[1]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    x = _joined(features)
    hidden = torch.nn.functional.linear(x, weight[:hidden_size])
    return hidden, torch.nn.functional.linear(x.to(dtype), weight[hidden_size:].to(dtype))


def _joined(features: Sequence[Tensor]) -> Tensor:
    """The rows [N, 3 H]: a view where the three lie side by side in one tensor, as a decoder's do, and else a copy."""
    x = features[0]
    rows, size = x.shape
    for i, other in enumerate(features):
        beside = other.storage_offset() == x.storage_offset() + i * size and other.stride(0) == x.stride(0)
        if not beside or other.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            return torch.cat(tuple(features), dim=1)
    return x.as_strided((rows, 3 * size), (x.stride(0), 1))


def outputs(features: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """The op's results, empty."""
    rows, hidden_size = features[0].shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (
        weight.new_empty(rows, hidden_size),
        weight.new_empty(rows, weight.shape[0] - hidden_size, dtype=dtype),
    )


_OP = Op("project_features(Tensor[] features, Tensor weight) -> (Tensor, Tensor)", project_features_ref, outputs)


def _triton_limit(features: Sequence[Tensor], weight: Tensor) -> str | None:
    if features[0].shape[0] > MAX_ROWS:
        return f"features must have at most {MAX_ROWS} rows, had {features[0].shape[0]}"
    return triton.tensor_limit("features[0]", features[0])


triton.register(_OP, "project_features", _triton_limit)


def project_features(
    features: Sequence[Tensor], weight: Tensor, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Project the features of three base layers to the draft's hidden size, and to S raw exit signals.

    features  three tensors [N, H] x (fp32, bf16 or fp16; the twin also takes fp64), last stride 1; they may be views of
              one [N, 3 H] tensor
    weight    [H + S, 3 H] x, S from 0 to 3: the rows of the hidden layer, then those of the signals
    hidden    [N, H] x
    signals   [N, S] fp32 (fp64 for fp64), summed and returned in that dtype: raw, before sigmoid and exp

    On a GPU, float64 and more than 128 rows (a prefill) go to the twin and its cuBLAS, which copies the three into one
    tensor unless they lie side by side in one.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong number, shape, stride or device.
    """
    sizes: dict[str, int] = {}
    _checks.tensor("weight", weight, ("H + S", "3 H"), _checks.FLOATS_64, sizes)
    _checks.unit_stride("weight", weight)
    if not isinstance(features, Sequence):
        raise TypeError(f"features must be a list of tensors, was {type(features).__name__}")
    if len(features) != 3:
        raise ValueError(f"features must be 3 tensors, was {len(features)}")
    for i, x in enumerate(features):
        _checks.tensor(f"features[{i}]", x, ("N", "H"), weight.dtype, sizes, weight)
        _checks.unit_stride(f"features[{i}]", x)
    hidden_size = sizes["H"]
    rows, columns = weight.shape
    if columns != 3 * hidden_size or not hidden_size <= rows <= hidden_size + 3:
        raise ValueError(
            f"weight must be [{hidden_size} to {hidden_size + 3}, {3 * hidden_size}] for features of"
            f" size {hidden_size}, was {list(weight.shape)}"
        )
    hidden, signals = _OP(list(features), weight, implementation=implementation)
    return hidden, signals
