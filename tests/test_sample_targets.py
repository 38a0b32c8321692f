"""sample_targets against a sampler in Python and float64, transformers' warpers, and the exact distribution."""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from chi_square import contingency_excess, excess

from specexit_kernels.philox import gumbel_noise
from specexit_kernels.sample_targets import sample_targets, sample_targets_ref, warp

NAN, INF = math.nan, math.inf


class Warpers(NamedTuple):
    """The settings of one row; the defaults are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def rows(self, count: int) -> dict[str, torch.Tensor]:
        return settings([self] * count)


def settings(rows: list[Warpers]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(values, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, values in zip(Warpers._fields, zip(*rows, strict=True), strict=True)
    }


def kept_by_hand(logits: torch.Tensor, w: Warpers) -> tuple[list[int], list[float], bool]:
    """What the warpers keep of one row, in float64; the scaled logits; whether no comparison was close to a tie."""
    with np.errstate(over="ignore"):
        z = [float(np.float32(x) / np.float32(w.temperature)) for x in logits.float().tolist()]
    z = [-INF if math.isnan(x) else x for x in z]
    ranked = sorted(range(len(z)), key=lambda v: (-z[v], v))
    best = z[ranked[0]]
    if best == -INF:
        return [], z, True
    if 0 < w.top_k < len(z):
        last = z[ranked[w.top_k - 1]]
        ranked = [v for v in ranked if z[v] >= last]
    weight = {v: math.exp(z[v] - best) for v in ranked}
    total, before, clear, kept = math.fsum(weight.values()), 0.0, True, []
    for v in ranked:
        limit = w.top_p * total
        if w.top_p >= 1 or before < limit or not kept:
            kept.append(v)
        clear = clear and (w.top_p >= 1 or abs(before - limit) > 1e-5 * total)
        before += weight[v]
    clear = clear and all(w.min_p == 0 or abs(weight[v] - w.min_p) > 1e-5 for v in kept)
    return [v for v in kept if weight[v] >= w.min_p and z[v] > -INF], z, clear


def random_rows(rng: torch.Generator, count: int) -> list[Warpers]:
    draws = torch.rand(count, 8, generator=rng).tolist()
    return [
        Warpers(
            temperature=0.2 + 2 * a,
            top_k=int(b * 30) if on_k < 0.6 else 0,
            top_p=0.05 + 0.95 * c if on_p < 0.6 else 1.0,
            min_p=d * 0.3 if on_m < 0.6 else 0.0,
        )
        for a, b, c, d, on_k, on_p, on_m, _ in draws
    ]


def random_places(rng: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.randint(0, 2**31 - 1, (count,), generator=rng, dtype=torch.int32)
    return positions, torch.randint(-(2**63), 2**63 - 1, (count,), generator=rng)


def kept_of(logits: torch.Tensor, **rows: torch.Tensor) -> list[list[int]]:
    return [[v for v, x in enumerate(row) if x > -INF] for row in warp(logits, **rows).tolist()]


# Greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 32_003])
def test_greedy_is_argmax(rng: torch.Generator, dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randn(9, vocab, generator=rng).to(dtype)
    positions, seeds = random_places(rng, 9)
    got = sample_targets(logits, positions, seeds)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), logits.argmax(1))
    assert torch.equal(sample_targets(logits, positions, seeds, torch.zeros(9)), got)


def test_greedy_ties_go_to_the_lowest_id(rng: torch.Generator) -> None:
    logits = torch.randint(0, 3, (50, 40), generator=rng).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    positions, seeds = random_places(rng, 50)
    assert sample_targets(logits, positions, seeds).tolist() == expected
    assert sample_targets(torch.full((2, 9), -INF), positions[:2], seeds[:2]).tolist() == [0, 0]


def test_greedy_takes_nan_for_the_largest_value(rng: torch.Generator) -> None:
    logits = torch.tensor([[1.0, NAN, 9.0, NAN], [INF, 0.0, NAN, 1.0]])
    positions, seeds = random_places(rng, 2)
    for temperature in (None, torch.zeros(2)):
        assert sample_targets(logits, positions, seeds, temperature).tolist() == [1, 2]


def test_greedy_and_drawn_rows_share_a_batch(rng: torch.Generator) -> None:
    logits = torch.randn(40, 50, generator=rng)
    positions, seeds = random_places(rng, 40)
    temperature = torch.tensor([0.0, 1.5]).repeat(20)
    got = sample_targets(logits, positions, seeds, temperature)
    assert torch.equal(got[0::2].long(), logits[0::2].argmax(1))
    assert torch.equal(got[1::2], sample_targets(logits[1::2], positions[1::2], seeds[1::2], temperature[1::2]))
    strange = torch.tensor([-1.0, NAN]).repeat(20)  # no temperature that one could draw at
    assert torch.equal(sample_targets(logits, positions, seeds, strange).long(), logits.argmax(1))


# What is kept


def test_keeps_what_the_definition_keeps(rng: torch.Generator) -> None:
    compared = 0
    for vocab in (1, 2, 37, 101):
        for rounded in (False, True):  # rounded logits have many ties
            logits = torch.randn(60, vocab, generator=rng) * 3
            logits = logits.round() if rounded else logits
            logits[torch.rand(60, vocab, generator=rng) < 0.05] = -INF
            logits[torch.rand(60, vocab, generator=rng) < 0.02] = NAN
            rows = random_rows(rng, 60)
            for row, got, w in zip(logits, kept_of(logits, **settings(rows)), rows, strict=True):
                expected, _, clear = kept_by_hand(row, w)
                if clear:
                    assert got == sorted(expected)
                    compared += 1
    assert compared > 300


def test_keeps_what_transformers_keeps(rng: torch.Generator) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(20, 500, generator=rng) * 4
    compared = 0
    for w in random_rows(rng, 40):
        scores = warpers.TemperatureLogitsWarper(w.temperature)(None, logits)
        if w.top_k > 0:
            scores = warpers.TopKLogitsWarper(w.top_k)(None, scores)
        if w.top_p < 1:
            scores = warpers.TopPLogitsWarper(w.top_p)(None, scores)
        if w.min_p > 0:
            scores = warpers.MinPLogitsWarper(w.min_p)(None, scores)
        got = warp(logits, **w.rows(20))
        clear = torch.tensor([kept_by_hand(row, w)[2] for row in logits])
        assert torch.equal(got[clear], scores[clear])
        compared += int(clear.sum())
    assert compared > 400  # of 800: one setting may leave few rows clear, all together do not


def test_top_k_keeps_ties_with_the_last() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 3.0, 2.0, 0.0]]).expand(7, -1)
    rows = settings([Warpers(top_k=k) for k in (1, 2, 3, 5, 6, 7, 1000)])
    every = list(range(7))
    assert kept_of(logits, **rows) == [[1, 4], [1, 4], every[1:6], every[1:6], every[:6], every, every]


def test_top_p_prefers_the_lower_id_among_ties() -> None:
    logits = torch.zeros(5, 8)
    rows = settings([Warpers(top_p=p) for p in (0.0, 0.125, 0.126, 0.5, 0.999)])
    assert kept_of(logits, **rows) == [[0], [0], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]
    logits[:, 5] = 1e-6  # better by a rounding, and so the first
    assert kept_of(logits, **rows)[:3] == [[5], [5], [0, 5]]


def test_warpers_apply_in_order() -> None:
    """Each reads what the one before it left."""
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    logits = probabilities.log()
    # Alone, top_p = 0.55 keeps two: before the second there is 0.4. Of the best two, 0.4 is 0.571: it keeps one.
    assert kept_of(logits, **settings([Warpers(top_p=0.55)])) == [[0, 1]]
    assert kept_of(logits, **settings([Warpers(top_k=2, top_p=0.55)])) == [[0]]
    # At temperature 1/2 the probabilities are 16/30, 9/30, 4/30, 1/30.
    assert kept_of(logits, **settings([Warpers(temperature=0.5, top_p=0.55)])) == [[0, 1]]
    assert kept_of(logits, **settings([Warpers(temperature=0.5, top_p=0.53)])) == [[0]]
    assert kept_of(logits, **settings([Warpers(temperature=0.5, min_p=0.5)])) == [[0, 1]]
    assert kept_of(logits, **settings([Warpers(temperature=0.5, min_p=0.6)])) == [[0]]


def test_off_is_off(rng: torch.Generator) -> None:
    """0, 1 and None mean the same, and drop no token of a long flat tail to rounding."""
    logits = torch.cat([torch.zeros(3, 20_000), torch.randn(3, 20_000, generator=rng)])
    off = Warpers().rows(6)
    plain = warp(logits, off["temperature"])
    assert torch.equal(plain, logits)
    assert torch.equal(warp(logits, **off), plain)
    for name in ("top_k", "top_p", "min_p"):
        assert torch.equal(warp(logits, off["temperature"], **{name: off[name]}), plain)


def test_the_best_token_is_always_kept(rng: torch.Generator) -> None:
    logits = torch.randn(3, 30, generator=rng)
    for w in (Warpers(top_p=0.0), Warpers(top_p=-1.0), Warpers(min_p=2.0), Warpers(top_k=1, min_p=1.0)):
        assert kept_of(logits, **w.rows(3)) == [[v] for v in logits.argmax(1).tolist()]


# What is drawn


@pytest.mark.parametrize("vocab", [1, 5, 64, 1003])
def test_equals_the_sampler_in_float64(rng: torch.Generator, vocab: int) -> None:
    count, compared = 60, 0
    logits = torch.randn(count, vocab, generator=rng) * 3
    logits[torch.rand(count, vocab, generator=rng) < 0.05] = -INF
    positions, seeds = random_places(rng, count)
    rows = random_rows(rng, count)
    got = sample_targets(logits, positions, seeds, **settings(rows)).tolist()
    noise = gumbel_noise(seeds, positions, vocab).tolist()
    for n, w in enumerate(rows):
        kept, z, clear = kept_by_hand(logits[n], w)
        if not kept:
            assert got[n] == 0
            continue
        assert not clear or got[n] in kept
        ranked = sorted(kept, key=lambda v: -(z[v] + noise[n][v]))
        scores = [z[v] + noise[n][v] for v in ranked[:2]]
        if clear and (len(ranked) == 1 or scores[0] - scores[1] > 1e-4):
            assert got[n] == ranked[0]
            compared += 1
    assert compared > count / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_draw_as_fp32(rng: torch.Generator, dtype: torch.dtype) -> None:
    logits = (torch.randn(50, 100, generator=rng) * 3).bfloat16()  # exact in all
    places = random_places(rng, 50)
    rows = Warpers(temperature=0.5).rows(50)  # a power of two divides exactly
    got = sample_targets(logits.to(dtype), *places, **rows)
    assert torch.equal(got, sample_targets(logits.float(), *places, **rows))


def test_a_row_does_not_depend_on_its_batch(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 1003, generator=rng) * 3
    positions, seeds = random_places(rng, 40)
    rows = settings(random_rows(rng, 40))
    whole = sample_targets(logits, positions, seeds, **rows)

    def of(index: torch.Tensor) -> torch.Tensor:
        return sample_targets(logits[index], positions[index], seeds[index], **{k: x[index] for k, x in rows.items()})

    order = torch.randperm(40, generator=rng)
    assert torch.equal(of(order), whole[order])
    for n in range(0, 40, 7):
        assert torch.equal(of(torch.tensor([n])), whole[n : n + 1])
    monkeypatch.setattr(sys.modules[sample_targets.__module__], "CHUNK", 2500)  # two rows at a time, and one
    assert torch.equal(of(torch.arange(39)), whole[:39])
    assert sample_targets(logits[:0], positions[:0], seeds[:0], **{k: x[:0] for k, x in rows.items()}).shape == (0,)


def test_values_that_are_never_drawn(rng: torch.Generator) -> None:
    count = 200
    logits = torch.full((count, 6), -INF)
    logits[:, 2], logits[:, 3], logits[:, 5] = NAN, 1.0, 1.5
    positions, seeds = random_places(rng, count)
    for w in (Warpers(), Warpers(2.0, 5, 0.99, 0.01)):
        assert set(sample_targets(logits, positions, seeds, **w.rows(count)).tolist()) == {3, 5}
        nothing = torch.full((count, 6), -INF)
        nothing[:, 1] = NAN
        assert not sample_targets(nothing, positions, seeds, **w.rows(count)).any()
        certain = torch.randn(count, 6, generator=rng)
        certain[:, 4] = INF
        assert sample_targets(certain, positions, seeds, **w.rows(count)).eq(4).all()


# The distribution

DRAWS, VOCAB = 40_000, 37
CASES = [
    Warpers(),
    Warpers(temperature=0.6),
    Warpers(temperature=1.7),
    Warpers(top_k=9),
    Warpers(top_p=0.85),
    Warpers(min_p=0.05),
    Warpers(temperature=0.8, top_k=20, top_p=0.95, min_p=0.02),
]


def random_distribution(rng: torch.Generator, w: Warpers, most: float = 0.9) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one row that leaves a choice, and the exact probabilities, at most `most`, of what the warpers keep."""
    while True:
        logits = torch.randn(VOCAB, generator=rng) * 2
        kept, z, clear = kept_by_hand(logits, w)
        weight = torch.zeros(VOCAB, dtype=torch.float64)
        weight[kept] = torch.tensor([z[v] for v in kept], dtype=torch.float64).softmax(0)
        if clear and weight.max() < most:
            return logits, weight


def counts(targets: torch.Tensor) -> torch.Tensor:
    return torch.bincount(targets.long(), minlength=VOCAB)


@pytest.mark.parametrize("w", CASES, ids=str)
@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_draws_follow_the_exact_distribution(rng: torch.Generator, w: Warpers, along: str) -> None:
    logits, exact = random_distribution(rng, w)
    index = torch.arange(DRAWS)
    seed = int(torch.randint(-(2**62), 2**62, (), generator=rng))
    positions = index if along == "positions" else torch.full_like(index, 123)
    seeds = seed + index if along == "seeds" else torch.full_like(index, seed)
    targets = sample_targets(logits.expand(DRAWS, -1), positions.int(), seeds, **w.rows(DRAWS))
    assert excess(counts(targets), exact) < 1
    # and one draw says nothing of the next
    likely = counts(targets).argmax()
    hit = (targets == likely).long()
    assert contingency_excess(hit[:-1], hit[1:], 2) < 1


Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def too_cold(z: torch.Tensor, noise: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (z * 1.1 + noise).argmax(1)


def noise_of_a_neighbour(z: torch.Tensor, noise: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Words used twice: tokens 2 v and 2 v + 1 share theirs."""
    return (z + noise[:, ::2].repeat_interleave(2, 1)[:, : z.shape[1]]).argmax(1)


def normal_noise(z: torch.Tensor, noise: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    gumbel_deviation = math.pi / math.sqrt(6)
    uniform = noise.double().neg().exp().neg().exp()
    return (z + torch.special.ndtri(uniform) * gumbel_deviation).argmax(1)


def sometimes_greedy(z: torch.Tensor, noise: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.where(rows % 10 == 0, z.argmax(1), (z + noise).argmax(1))


@pytest.mark.parametrize("biased", [too_cold, noise_of_a_neighbour, normal_noise, sometimes_greedy])
def test_the_test_rejects_a_biased_sampler(rng: torch.Generator, biased: Sampler) -> None:
    logits, exact = random_distribution(rng, Warpers(), most=0.5)  # near certainty shows no bias
    rows = torch.arange(DRAWS)
    seed = int(torch.randint(-(2**62), 2**62, (), generator=rng))
    noise = gumbel_noise(torch.full((DRAWS,), seed), rows.int(), VOCAB)
    z = logits.expand(DRAWS, -1)
    assert excess(counts((z + noise).argmax(1)), exact) < 1
    assert excess(counts(biased(z, noise, rows)), exact) > 1


# Arguments


def test_rows_may_be_strided(rng: torch.Generator) -> None:
    logits = torch.randn(6, 90, generator=rng)[:, 10:51]
    positions, seeds = random_places(rng, 12)
    rows = settings(random_rows(rng, 6))
    expected = sample_targets_ref(logits.clone(), positions[::2].clone(), seeds[::2].clone(), **rows)
    assert torch.equal(sample_targets(logits, positions[::2], seeds[::2], **rows), expected)


@pytest.mark.parametrize("given", [(), ("temperature",), ("temperature", "min_p"), Warpers._fields])
def test_opcheck(rng: torch.Generator, given: tuple[str, ...]) -> None:
    rows = settings(random_rows(rng, 4))
    warpers = [rows[name] if name in given else None for name in Warpers._fields]
    args = (torch.randn(4, 30, generator=rng), *random_places(rng, 4), *warpers)
    torch.library.opcheck(torch.ops.specexit.sample_targets.default, args)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", torch.zeros(3, 8, dtype=torch.int32), TypeError),
        ("logits", torch.zeros(3, 1, 8), ValueError),
        ("logits", torch.zeros(3, 0), ValueError),
        ("logits", torch.zeros(8, 3).T, ValueError),
        ("positions", torch.zeros(3, dtype=torch.int64), TypeError),
        ("positions", torch.zeros(2, dtype=torch.int32), ValueError),
        ("seeds", torch.zeros(3, dtype=torch.int32), TypeError),
        ("seeds", torch.zeros(3, 1, dtype=torch.int64), ValueError),
        ("seeds", 7, TypeError),
        ("temperature", 0.6, TypeError),
        ("temperature", torch.ones(3, dtype=torch.float64), TypeError),
        ("temperature", torch.ones(1), ValueError),
        ("top_k", torch.ones(3), TypeError),
        ("top_k", torch.ones(4, dtype=torch.int32), ValueError),
        ("top_p", torch.ones(3, dtype=torch.float16), TypeError),
        ("top_p", torch.ones(3, device="meta"), ValueError),
        ("min_p", 0.1, TypeError),
        ("min_p", torch.ones(3, 3), ValueError),
        ("implementation", "fortran", ValueError),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    valid = {
        "logits": torch.zeros(3, 8),
        "positions": torch.zeros(3, dtype=torch.int32),
        "seeds": torch.zeros(3, dtype=torch.int64),
        **Warpers().rows(3),
    }
    with pytest.raises(error, match=name):
        sample_targets(**{**valid, name: value})  # type: ignore[arg-type]
