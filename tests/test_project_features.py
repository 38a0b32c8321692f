"""project_features against the sum written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from specexit_kernels.project_features import project_features, project_features_ref


def case(
    rng: torch.Generator, rows: int, hidden: int, signals: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    x = torch.randn(3, rows, hidden, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn(hidden + signals, 3 * hidden, generator=rng, dtype=torch.float64) * (3 * hidden) ** -0.5
    return list(x), weight.to(dtype)


def oracle(features: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    hidden = features[0].shape[1]
    out = sum(x.double() @ weight[:, i * hidden : (i + 1) * hidden].double().T for i, x in enumerate(features))
    return out[:, :hidden], out[:, hidden:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signals", [0, 1, 2, 3])
def test_equals_the_oracle(rng: torch.Generator, dtype: torch.dtype, signals: int) -> None:
    accumulated = torch.promote_types(dtype, torch.float32)
    for rows, size in ((1, 1), (7, 13), (5, 64), (60, 32)):
        features, weight = case(rng, rows, size, signals, dtype)
        hidden, z = project_features(features, weight)
        expected, z_expected = oracle(features, weight)
        assert (hidden.shape, hidden.dtype) == ((rows, size), dtype)
        assert (z.shape, z.dtype) == ((rows, signals), accumulated)
        assert_close(hidden, expected)
        assert_close(z, z_expected)  # whatever the dtype of the inputs: signals are not rounded to it
        assert hidden.is_contiguous()
        assert z.is_contiguous()


def test_views_of_one_tensor(rng: torch.Generator) -> None:
    features, weight = case(rng, 6, 16, 3)
    expected = project_features(features, weight)
    whole = torch.cat(features, dim=1)
    wide = torch.full((6, 3, 20), float("nan"))  # rows further apart than they are long
    wide[..., :16] = torch.stack(features, dim=1)
    for views in (whole.split(16, dim=1), wide[..., :16].unbind(1)):
        for actual, wanted in zip(project_features(views, weight), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("size", [1, 16])
def test_views_in_any_order(rng: torch.Generator, size: int) -> None:
    """Side by side they are read as one tensor; in another order, twice, or of another tensor they are not."""
    whole, other = torch.randn(2, 6, 3 * size, generator=rng).unbind()
    a, b, c = whole.split(size, dim=1)
    _, weight = case(rng, 6, size, 3)
    for views in ((a, b, c), (c, b, a), (a, c, b), (b, b, b), (a, b, other[:, 2 * size :]), (a[:1], b[:1], c[:1])):
        expected = project_features([x.clone() for x in views], weight)
        for actual, wanted in zip(project_features(views, weight), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_no_rows(rng: torch.Generator) -> None:
    hidden, signals = project_features(*case(rng, 0, 8, 3))
    assert hidden.shape == (0, 8)
    assert signals.shape == (0, 3)


def test_nan_stays_in_its_row(rng: torch.Generator) -> None:
    features, weight = case(rng, 4, 8, 3)
    expected = project_features(features, weight)
    features[1][2, 5] = float("nan")
    for actual, wanted in zip(project_features(features, weight), expected, strict=True):
        assert actual[2].isnan().all()
        assert torch.equal(actual[[0, 1, 3]], wanted[[0, 1, 3]])


@pytest.mark.parametrize(("rows", "signals", "dtype"), [(5, 3, torch.bfloat16), (1, 0, torch.float32)])
def test_opcheck(rng: torch.Generator, rows: int, signals: int, dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.specexit.project_features.default, case(rng, rows, 8, signals, dtype))


def test_the_twin_can_be_asked_for(rng: torch.Generator) -> None:
    args = case(rng, 3, 8, 1)
    for actual, wanted in zip(
        project_features(*args, implementation="torch"), project_features_ref(*args), strict=True
    ):
        assert torch.equal(actual, wanted)
    with pytest.raises(ValueError, match="implementation"):
        project_features(*args, implementation="fortran")


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("features", lambda x: x[:2], ValueError),
        ("features", lambda x: torch.stack(x), TypeError),
        ("features", lambda x: iter(x), TypeError),
        (r"features\[0\]", lambda x: [None, x[1], x[2]], TypeError),
        (r"features\[1\]", lambda x: [x[0], x[1].double(), x[2]], TypeError),
        (r"features\[1\]", lambda x: [x[0], x[1][:, :7], x[2]], ValueError),
        (r"features\[2\]", lambda x: [x[0], x[1], x[2][:3]], ValueError),
        (r"features\[2\]", lambda x: [x[0], x[1], x[2].t().contiguous().t()], ValueError),
        (r"features\[0\]", lambda x: [y.to("meta") for y in x], ValueError),
        ("weight", lambda x: x.tolist(), TypeError),
        ("weight", lambda x: x.int(), TypeError),
        ("weight", lambda x: x[0], ValueError),
        ("weight", lambda x: x[:, :16], ValueError),
        ("weight", lambda x: x[:7], ValueError),  # not even the hidden rows
        ("weight", lambda x: torch.cat([x, x]), ValueError),  # 14 signals
        ("weight", lambda x: x.t().contiguous().t(), ValueError),
    ],
)
def test_bad_arguments(rng: torch.Generator, name: str, change: Callable[[Any], Any], error: type[Exception]) -> None:
    args = dict(zip(("features", "weight"), case(rng, 4, 8, 3), strict=True))
    argument = name.partition("\\")[0]
    with pytest.raises(error, match=rf"^{name} must"):
        project_features(**(args | {argument: change(args[argument])}))
