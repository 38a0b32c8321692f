"""Philox against the published vectors and Python's integers; the noise against float64 and its distribution."""

import math
from pathlib import Path

import pytest
import torch
from chi_square import contingency_excess, excess

from specexit_kernels.philox import gumbel, gumbel_noise, philox4x32

WORD = 2**32


def oracle(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        upper_0, lower_0 = divmod(c0 * 0xD2511F53, WORD)
        upper_1, lower_1 = divmod(c2 * 0xCD9E8D57, WORD)
        c0, c1, c2, c3 = upper_1 ^ c1 ^ k0, lower_1, upper_0 ^ c3 ^ k1, lower_0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def philox_of(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3, k0, k1 = (torch.tensor([[word]]) for word in (*counter, *key))
    return philox4x32((c0, c1, c2, c3), (k0, k1)).flatten().tolist()


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # "philox4x32 10" of Random123's kat_vectors
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, words: str) -> None:
    c, k, w = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox_of(c, k) == w
    assert oracle(c, k) == w


def test_equals_integers(rng: torch.Generator) -> None:
    words = torch.randint(0, WORD, (50, 6), generator=rng)
    words[torch.rand(50, 6, generator=rng) < 0.2] = WORD - 1
    for row in words.tolist():
        assert philox_of(row[:4], row[4:]) == oracle(row[:4], row[4:])


def test_counters_broadcast(rng: torch.Generator) -> None:
    def words(*shape: int) -> torch.Tensor:
        return torch.randint(0, WORD, shape, generator=rng)

    counter = words(1, 5), words(3, 1), words(3, 5), words(1, 1)
    key = words(3, 1), words(3, 1)
    got = philox4x32(counter, key)
    c = [x.expand(3, 5).tolist() for x in counter]
    for r in range(3):
        for q in range(5):
            expected = oracle([x[r][q] for x in c], [x[r].item() for x in key])
            assert got[:, r, q].tolist() == expected


def test_the_noise_is_that_of_its_counter_and_key(rng: torch.Generator) -> None:
    seeds = torch.randint(-(2**63), 2**63 - 1, (5,), generator=rng)
    seeds[0], seeds[1] = -1, 7
    positions = torch.randint(0, 2**31 - 1, (5,), generator=rng, dtype=torch.int32)
    vocab = 23
    got = gumbel_noise(seeds, positions, vocab)
    assert got.shape == (5, vocab)
    assert got.dtype == torch.float32
    for n, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        for v in range(vocab):
            word = oracle([v // 4, position, 0, 0], [seed % WORD, seed // WORD % WORD])[v % 4]
            u = min((word + 0.5) / WORD, 1 - 2**-24)
            expected = -math.log(-math.log1p(-u))
            of_u = 2**-24 / ((1 - u) * -math.log1p(-u))  # near 1, what the rounding of u to fp32 does to the noise
            assert got[n, v].item() == pytest.approx(expected, abs=2e-6 + 1e-6 * abs(expected) + of_u)


def test_noise_is_finite_and_fine_at_both_ends() -> None:
    words = torch.tensor([0, 1, 2, 1000, WORD // 2, WORD - 2**20, WORD - 2, WORD - 1])
    noise = gumbel(words)
    expected = [-math.log(-math.log1p(-min((w + 0.5) / WORD, 1 - 2**-24))) for w in words.tolist()]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-6, atol=2e-6)
    assert noise.isfinite().all()
    assert (noise[:-2].diff() < 0).all()  # a smaller word is larger noise, strictly: words 0, 1 and 2 differ
    assert noise[-1] == noise[-2]  # fp32 has no number between 1 - 2**-24 and 1


def test_the_bound_of_the_noise(rng: torch.Generator) -> None:
    """The one of csrc/philox.cuh, by which the kernel leaves noise out that cannot win."""
    source = (Path(__file__).parent.parent / "csrc" / "philox.cuh").read_text()
    assert "0.6932f * static_cast<float>(__clz(word) + 1)" in source
    words = torch.cat([torch.randint(0, WORD >> shift, (4000,), generator=rng) for shift in range(32)])
    words = torch.cat([words, 2 ** torch.arange(32), 2 ** torch.arange(33) - 1])
    leading_zeros = 32 - torch.tensor([word.bit_length() for word in words.tolist()])
    noise = gumbel(words)
    assert (noise <= 0.6932 * (leading_zeros + 1)).all()


def test_the_noise_of_a_token_does_not_depend_on_the_rest(rng: torch.Generator) -> None:
    seeds = torch.randint(0, 2**62, (9,), generator=rng)
    positions = torch.randint(0, 1000, (9,), generator=rng, dtype=torch.int32)
    whole = gumbel_noise(seeds, positions, 103)
    order = torch.randperm(9, generator=rng)
    assert torch.equal(gumbel_noise(seeds[order], positions[order], 103), whole[order])
    for vocab in (1, 2, 3, 4, 5, 102):
        assert torch.equal(gumbel_noise(seeds[4:5], positions[4:5], vocab), whole[4:5, :vocab])
    assert gumbel_noise(seeds[:0], positions[:0], 103).shape == (0, 103)


def deciles(noise: torch.Tensor) -> torch.Tensor:
    """Which tenth of the Gumbel distribution, exp(-exp(-g)), each value lies in."""
    return noise.double().neg().exp().neg().exp().mul(10).long().clamp(0, 9)


def test_distribution_and_independence(rng: torch.Generator) -> None:
    """Uniform deciles; and none from the next token, the next word block, the next position or the next seed."""
    count, vocab = 500, 200
    seed = torch.randint(-(2**62), 2**62, (), generator=rng)
    first = torch.randint(0, 2**20, (), generator=rng, dtype=torch.int32)
    index = torch.arange(count)
    along = deciles(gumbel_noise(seed.expand(count), first + index.int(), vocab))
    across = deciles(gumbel_noise(seed + index, first.expand(count), vocab))
    other_half = deciles(gumbel_noise(seed + (index << 32), first.expand(count), vocab))
    for tenths in (along, across, other_half):
        assert excess(torch.bincount(tenths.flatten(), minlength=10), torch.full((10,), 0.1)) < 1
        for a, b in (
            (tenths[:, :-1], tenths[:, 1:]),
            (tenths[:, :-4], tenths[:, 4:]),
            (tenths[:-1], tenths[1:]),
        ):
            assert contingency_excess(a.flatten(), b.flatten(), 10) < 1


def test_the_statistics_can_fail(rng: torch.Generator) -> None:
    noise = gumbel_noise(torch.arange(500), torch.zeros(500, dtype=torch.int32), 200)
    tenths = deciles(noise * 1.02)
    assert excess(torch.bincount(tenths.flatten(), minlength=10), torch.full((10,), 0.1)) > 1
    mixed = torch.where(torch.rand(noise.shape, generator=rng) < 0.05, noise.roll(1, 1), noise)
    assert contingency_excess(deciles(mixed)[:, 1:].flatten(), deciles(noise)[:, :-1].flatten(), 10) > 1
