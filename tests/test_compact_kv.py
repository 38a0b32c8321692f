"""compact_kv against copies of single slots."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specexit_kernels.compact_kv import compact_kv, compact_kv_ref


def draw(rng: torch.Generator, low: int, high: int) -> int:
    """A number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def caches(rng: torch.Generator, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*shape, generator=rng).to(dtype) for shape in shapes]


def paths(rng: torch.Generator, batch: int, nodes: int, depth: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random accepted paths (some empty, some full), and lengths that include them: path, n_accepted, lengths."""
    path = torch.full((batch, depth + 1), -1, dtype=torch.int32)
    n_accepted = torch.zeros(batch, dtype=torch.int32)
    lengths = torch.zeros(batch, dtype=torch.int32)
    for b in range(batch):
        n = draw(rng, 0, min(depth + 1, nodes))
        if n:
            below = torch.randperm(nodes - 1, generator=rng)[: n - 1].sort().values + 1
            path[b, 0], path[b, 1:n] = 0, below
        n_accepted[b], lengths[b] = n, draw(rng, 0, slots - nodes) + n
    return path, n_accepted, lengths


def oracle(cache: Tensor, path: Tensor, n_accepted: Tensor, lengths: Tensor) -> Tensor:
    out = cache.clone()
    for b, n in enumerate(n_accepted.tolist()):
        base = int(lengths[b]) - n
        for i in range(n):
            out[b, :, base + i] = cache[b, :, base + int(path[b, i])]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_single_copies(rng: torch.Generator, dtype: torch.dtype) -> None:
    """Layers of different shapes; trees smaller than the depth; caches that are full to the last slot."""
    for nodes, depth, slots in ((60, 7, 100), (12, 11, 12), (3, 7, 9), (1, 0, 5), (1, 3, 4)):
        batch = draw(rng, 1, 4)
        args = paths(rng, batch, nodes, depth, slots)
        keys = caches(rng, (batch, 2, slots, 8), (batch, 1, slots + 3, 5), dtype=dtype)
        values = caches(rng, (batch, 2, slots, 4), (batch, 1, slots + 3, 1), dtype=dtype)
        expected = [oracle(cache, *args) for cache in keys + values]
        compact_kv(keys, values, *args)
        for actual, wanted in zip(keys + values, expected, strict=True):
            assert torch.equal(actual, wanted)


def test_sources_that_are_targets_too(rng: torch.Generator) -> None:
    """A chain moves nothing; a path one node behind it moves every slot onto the one that was just read."""
    for path, moved in (([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 2, 3, 4], [0, 2, 3, 4])):
        keys, values = caches(rng, (1, 1, 9, 2)), caches(rng, (1, 1, 9, 2))
        before = keys[0].clone()
        tensors = (torch.tensor(x, dtype=torch.int32) for x in ([path], [4], [7]))
        compact_kv(keys, values, *tensors)
        assert torch.equal(keys[0][0, 0, 3:7], before[0, 0, 3:][moved])
        assert torch.equal(keys[0][0, 0, [0, 1, 2, 7, 8]], before[0, 0, [0, 1, 2, 7, 8]])


def test_what_follows_the_path_does_not_matter(rng: torch.Generator) -> None:
    path, n_accepted, lengths = paths(rng, 4, 20, 6, 50)
    unused = torch.arange(7) >= n_accepted[:, None]
    junk = torch.randint(-(2**31), 2**31 - 1, path.shape, generator=rng, dtype=torch.int32)
    keys, values = caches(rng, (4, 2, 50, 3)), caches(rng, (4, 2, 50, 3))
    expected = oracle(keys[0], path, n_accepted, lengths)
    compact_kv(keys, values, torch.where(unused, junk, path), n_accepted, lengths)
    assert torch.equal(keys[0], expected)


def test_strides(rng: torch.Generator) -> None:
    """Views of one storage, which holds slots before heads; what lies between them is left alone."""
    args = paths(rng, 3, 20, 6, 50)
    storage = torch.randn(3, 60, 2, 2, 4, 8, generator=rng)  # [B, slots, layers, K or V, Hkv, hd]
    views = [storage[:, :50, layer, :, :, :5].permute(2, 0, 3, 1, 4) for layer in range(2)]
    expected = storage.clone()
    for layer in range(2):
        for i in range(2):
            moved = oracle(views[layer][i], *args)
            expected[:, :50, layer, i, :, :5] = moved.transpose(1, 2)
    compact_kv([view[0] for view in views], [view[1] for view in views], *args)
    assert torch.equal(storage, expected)


@pytest.mark.parametrize("page", [1, 7, 16])
def test_pages(rng: torch.Generator, page: int) -> None:
    blocks = -(-80 // page)
    args = paths(rng, 3, 20, 6, blocks * page)
    table = torch.randperm(3 * blocks + 4, generator=rng)[: 3 * blocks].view(3, blocks)
    pools = caches(rng, *[(3 * blocks + 4, page, heads, 5) for heads in (2, 2, 1, 1)])
    expected = [pool.clone() for pool in pools]
    for pool in expected:
        slots = pool[table].flatten(1, 2).transpose(1, 2)  # [B, Hkv, slots, hd]
        pool[table] = oracle(slots, *args).transpose(1, 2).unflatten(1, (blocks, page))
    compact_kv(pools[::2], pools[1::2], *args, block_table=table.int())
    for actual, wanted in zip(pools, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_nan_moves_too(rng: torch.Generator) -> None:
    keys, values = caches(rng, (1, 1, 8, 2)), caches(rng, (1, 1, 8, 2))
    keys[0][0, 0, 5] = float("nan")
    compact_kv(keys, values, *(torch.tensor(x, dtype=torch.int32) for x in ([[0, 3]], [2], [4])))
    assert keys[0].isnan().any(-1).flatten().nonzero().flatten().tolist() == [3, 5]


def test_nothing_to_move(rng: torch.Generator) -> None:
    path, n_accepted, lengths = paths(rng, 2, 20, 6, 50)
    compact_kv([], [], path, n_accepted, lengths)
    compact_kv([], [], path, n_accepted, lengths, block_table=torch.zeros(2, 3, dtype=torch.int32))
    empty = caches(rng, (0, 2, 50, 4))
    compact_kv(empty, empty, path[:0], n_accepted[:0], lengths[:0])


def test_opcheck(rng: torch.Generator) -> None:
    op = torch.ops.specexit.compact_kv.default
    args = paths(rng, 2, 20, 6, 50)
    shapes = [(2, 2, 50, 4), (2, 1, 50, 3)]
    torch.library.opcheck(op, (caches(rng, *shapes), caches(rng, *shapes), *args))
    table = torch.randperm(12, generator=rng).view(2, 6).int()
    pages = [(12, 9, 2, 4)]
    torch.library.opcheck(op, (caches(rng, *pages), caches(rng, *pages), *args, table))


def test_the_twin_can_be_asked_for(rng: torch.Generator) -> None:
    args = paths(rng, 2, 20, 6, 50)
    keys = caches(rng, (2, 2, 50, 4))
    twin, asked = [keys[0].clone()], [keys[0].clone()]
    compact_kv(keys, [torch.zeros(2, 1, 50, 1)], *args)
    compact_kv(asked, [torch.zeros(2, 1, 50, 1)], *args, implementation="torch")
    compact_kv_ref(twin, [torch.zeros(2, 1, 50, 1)], *args)
    assert torch.equal(twin[0], keys[0])
    assert torch.equal(asked[0], keys[0])
    with pytest.raises(ValueError, match="implementation"):
        compact_kv(keys, keys, *args, implementation="fortran")


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("keys", lambda x: x[0], TypeError),
        (r"keys\[1\]", lambda x: [x[0], None], TypeError),
        (r"keys\[1\]", lambda x: [x[0], x[1].int()], TypeError),
        (r"keys\[0\]", lambda x: [x[0][0], x[1]], ValueError),
        (r"keys\[0\]", lambda x: [x[0][:1], x[1]], ValueError),
        (r"keys\[1\]", lambda x: [x[0], x[1].transpose(2, 3)], ValueError),
        (r"keys\[1\]", lambda x: [x[0], x[1].to("meta")], ValueError),
        ("values", lambda x: x[0], TypeError),
        ("values", lambda x: x[:1], ValueError),
        (r"values\[1\]", lambda x: [x[0], x[1].transpose(2, 3)], ValueError),
        ("path", lambda x: x.long(), TypeError),
        ("path", lambda x: x[0], ValueError),
        ("path", lambda x: x[:, :0], ValueError),
        ("path", lambda x: x.t().contiguous().t(), ValueError),
        ("n_accepted", lambda x: x.long(), TypeError),
        ("n_accepted", lambda x: x[:1], ValueError),
        ("n_accepted", lambda x: x[:1].expand(2), ValueError),
        ("lengths", lambda x: x.float(), TypeError),
        ("lengths", lambda x: x[:1], ValueError),
        ("lengths", lambda x: x[:1].expand(2), ValueError),
        ("block_table", lambda x: torch.zeros(2, 5), TypeError),
        ("block_table", lambda x: torch.zeros(3, 5, dtype=torch.int32), ValueError),
        ("block_table", lambda x: torch.zeros(5, 2, dtype=torch.int32).t(), ValueError),
    ],
)
def test_bad_arguments(rng: torch.Generator, name: str, change: Callable[[Any], Any], error: type[Exception]) -> None:
    path, n_accepted, lengths = paths(rng, 2, 20, 6, 50)
    args: dict[str, Any] = {"path": path, "n_accepted": n_accepted, "lengths": lengths}
    args |= {key: caches(rng, (2, 2, 50, 4), (2, 2, 50, 4)) for key in ("keys", "values")}
    argument = name.partition("\\")[0]
    with pytest.raises(error, match=rf"^{name} must"):
        compact_kv(**(args | {argument: change(args.get(argument))}))


def test_layers_share_the_page_size(rng: torch.Generator) -> None:
    args = paths(rng, 2, 20, 6, 50)
    table = torch.randperm(12, generator=rng).view(2, 6).int()
    pools = caches(rng, (12, 9, 2, 4), (12, 10, 2, 4))
    with pytest.raises(ValueError, match=r"^keys\[1\] must be \[.*page=9, .*was \[12, 10, 2, 4\]"):
        compact_kv(pools, pools, *args, block_table=table)
