"""Random numbers that depend on nothing but (seed, position, token id): Philox, and the Gumbel noise made from it.

Philox4x32-10 turns a 128-bit counter and a 64-bit key into four 32-bit words (Salmon, Moraes, Dror and Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC'11). There is no state, so a draw is the same in any batch, order or tree.

Words become Gumbel noise by two logarithms, u being uniform in (0, 1):

    u = min((word + 0.5) 2^-32, 1 - 2^-24)        g = -log(-log1p(-u))        in fp32

A draw is decided by the largest noise, which comes from the smallest u, where fp32 is finest: u has 24 significant bits
down to 2^-33. In -log(-log(u)) it would come from u near 1, on a grid of 2^-24: too coarse for the unlikely tokens of a
large vocabulary, and (word + 0.5) 2^-24 of a 24-bit word can round to 1, which is infinite noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1: what each round adds to the key
MASK = 0xFFFFFFFF
WORDS = 4
LARGEST_UNIFORM = 1 - 2**-24  # the largest fp32 below 1


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10 in int64 tensors that hold 32-bit words.

    counter  four int64 tensors of 0 to 2**32 - 1, whose shapes broadcast to [R, Q]
    key      two int64 tensors of 0 to 2**32 - 1, [R, 1]
    words    [4, R, Q] int64 of 0 to 2**32 - 1
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    index = torch.arange(ROUNDS, device=c0.device).view(-1, 1, 1)
    round_keys = torch.stack([k + index * weyl for k, weyl in zip(key, WEYL, strict=True)], 1)  # [10, 2, R, 1]
    # The two multipliers; a tensor made from a list would be copied from the host, and wait for it.
    low, high = MULTIPLIERS
    multipliers = torch.arange(low, high - 1, high - low, device=c0.device).view(2, 1, 1)

    factors, addends = torch.stack([c0, c2]), torch.stack([c1, c3])
    for round_key in round_keys.unbind():
        # The product's upper word goes to the other factor, its lower one to the other addend. int64 wraps, but its 64
        # bits are those of the unsigned product; what is above a word is cleared when it next becomes a factor.
        product = (factors * multipliers).flip(0)
        factors = (product >> 32).bitwise_xor_(addends).bitwise_xor_(round_key).bitwise_and_(MASK)
        addends = product
    return torch.stack([factors, addends & MASK], 1).flatten(0, 1)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise of 32-bit words: int64 to fp32 of the same shape, finite, between -2.82 and 22.88."""
    minus_u = words.float().add_(0.5).mul_(-(2.0**-32)).clamp_(min=-LARGEST_UNIFORM)
    return minus_u.log1p_().neg_().log_().neg_()


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """The noise of every token in every row, [N, vocab] fp32.

    seeds      [N] int64, all 64 bits of which count
    positions  [N] int32

    Token v takes word v % 4 of Philox with the counter (v // 4, position, 0, 0) and the low and high half of the seed
    as the key.
    """
    block = torch.arange(-(-vocab // WORDS), device=seeds.device).unsqueeze(0)
    position = positions.unsqueeze(1).long() & MASK
    zero = torch.zeros_like(block)
    seed = seeds.unsqueeze(1)
    words = philox4x32((block, position, zero, zero), (seed & MASK, (seed >> 32) & MASK))
    return gumbel(words).movedim(0, 2).flatten(1)[:, :vocab]
