"""build_tree against a tree that is built node by node from sets."""

import math

import pytest
import torch

from specexit_kernels import bits
from specexit_kernels.build_tree import build_tree, build_tree_ref
from specexit_kernels.grow_beam import grow_beam
from specexit_kernels.state import Tree

INF = math.inf
Inputs = dict[str, torch.Tensor]


def oracle(inputs: Inputs, nodes: int) -> Tree:
    """The definition, with Python's sort and sets of ancestors."""
    x = {name: value.tolist() for name, value in inputs.items()}
    rows: list[tuple[list[int], list[int], list[int], list[set[int]]]] = []
    for b, root in enumerate(x["root"]):
        if x["n_forced"][b] > 0:
            tokens = x["forced"][b][: min(x["n_forced"][b], nodes)]
            parent = [max(n - 1, 0) for n in range(len(tokens))]
        else:
            score = [-INF if math.isnan(s) else s for s in x["scores"][b]]
            ranked = sorted((c for c in range(len(score)) if score[c] > -INF), key=lambda c: (-score[c], c))
            chosen = sorted(ranked[: nodes - 1])
            node_of = {-1: 0} | {c: n + 1 for n, c in enumerate(chosen)}
            tokens = [root] + [x["tokens"][b][c] for c in chosen]
            parent = [0] + [node_of[x["parents"][b][c]] for c in chosen]
        depth, seen = [0], [{0}]
        for n in range(1, len(tokens)):
            depth.append(depth[parent[n]] + 1)
            seen.append(seen[parent[n]] | {n})
        missing = nodes - len(tokens)
        rows.append((tokens + [0] * missing, parent + [0] * missing, depth + [1] * missing, seen + [set()] * missing))
    visible = torch.zeros(len(rows), nodes, nodes, dtype=torch.bool)
    for b, row in enumerate(rows):
        for n, seen in enumerate(row[3]):
            visible[b, n, list(seen)] = True
    ids = [torch.tensor([row[i] for row in rows], dtype=torch.int32).reshape(-1, nodes) for i in range(3)]
    return Tree(*ids, bits.pack(visible))


def check(inputs: Inputs, nodes: int) -> Tree:
    tree = build_tree(**inputs, nodes=nodes)
    for name, got, want in zip(Tree._fields, tree, oracle(inputs, nodes), strict=True):
        assert torch.equal(got, want), name
        assert got.dtype == want.dtype
        assert got.is_contiguous()
    return tree


def random_inputs(
    rng: torch.Generator, batch: int, count: int, forced: int = 1, *, grid: float = 0.0, bad: float = 0.0
) -> Inputs:
    """Random candidate forests with monotone scores; `grid` rounds them to make ties, `bad` makes NaN and -inf."""
    draws = torch.rand(batch, count, 3, generator=rng).tolist()
    parents = torch.full((batch, count), -1, dtype=torch.int32)
    scores = torch.zeros(batch, count)
    for b in range(batch):
        for c in range(count):
            which, step, broken = draws[b][c]
            parent = int(which * (c + 1)) - 1
            above = scores[b, parent].item() if parent >= 0 else 0.0
            step = round(step / grid) * grid if grid else step
            parents[b, c] = parent
            scores[b, c] = -INF if math.isnan(above) or broken < bad / 2 else math.nan if broken < bad else above - step
    return {
        "root": torch.randint(0, 1000, (batch,), generator=rng, dtype=torch.int32),
        "tokens": torch.randint(0, 1000, (batch, count), generator=rng, dtype=torch.int32),
        "scores": scores,
        "parents": parents,
        "forced": torch.randint(0, 1000, (batch, forced), generator=rng, dtype=torch.int32),
        "n_forced": torch.zeros(batch, dtype=torch.int32),
    }


def force(rng: torch.Generator, inputs: Inputs) -> Inputs:
    """Half of the rows have forced ids, whose first is the root."""
    batch, width = inputs["forced"].shape
    inputs["forced"][:, 0] = inputs["root"]
    inputs["n_forced"] = torch.randint(0, width + 1, (batch,), generator=rng, dtype=torch.int32)
    inputs["n_forced"][torch.rand(batch, generator=rng) < 0.5] = 0
    return inputs


@pytest.mark.parametrize("nodes", [1, 2, 12, 60, 64, 65, 130])
@pytest.mark.parametrize("count", [0, 1, 11, 100])
def test_equals_the_definition(rng: torch.Generator, nodes: int, count: int) -> None:
    check(random_inputs(rng, 2, count), nodes)
    check(random_inputs(rng, 2, count, grid=0.5, bad=0.1), nodes)
    check(force(rng, random_inputs(rng, 3, count, forced=6, grid=0.5)), nodes)


def test_many_small_trees(rng: torch.Generator) -> None:
    """Ties, broken scores, forced rows and too few candidates, all in one batch."""
    for nodes in range(1, 12):
        for count in (0, 3, 9):
            for forced in (1, 2, 5, 14):
                check(force(rng, random_inputs(rng, 6, count, forced, grid=0.5, bad=0.2)), nodes)


def test_a_chain(rng: torch.Generator) -> None:
    """k = 1: every candidate hangs from the one before it."""
    inputs = random_inputs(rng, 2, 9)
    inputs["parents"] = torch.arange(-1, 8, dtype=torch.int32).expand(2, -1).contiguous()
    inputs["scores"] = -torch.rand(2, 9, generator=rng).cumsum(1)
    tree = check(inputs, 6)
    assert torch.equal(tree.depth, torch.arange(6, dtype=torch.int32).expand(2, -1))
    assert torch.equal(tree.visible, bits.chain(2, 6))


def test_deep_chain() -> None:
    """300 levels: the closure stays exact however deep the tree is."""
    nodes = 300
    chain = torch.arange(-1, nodes - 2, dtype=torch.int32)[None]
    inputs = {
        "root": torch.ones(1, dtype=torch.int32),
        "tokens": chain + 3,
        "scores": torch.zeros(1, nodes - 1),
        "parents": chain,
        "forced": torch.zeros(1, 1, dtype=torch.int32),
        "n_forced": torch.zeros(1, dtype=torch.int32),
    }
    assert torch.equal(check(inputs, nodes).visible, bits.chain(1, nodes))


def test_too_few_candidates_leave_inert_nodes(rng: torch.Generator) -> None:
    tree = check(random_inputs(rng, 2, 3), 70)
    assert tree.tokens[:, 4:].eq(0).all()
    assert tree.parent[:, 4:].eq(0).all()
    assert tree.depth[:, 4:].eq(1).all()
    assert tree.visible[:, 4:].eq(0).all()
    assert tree.visible.shape == (2, 70, 2)


def test_no_node_loses_its_parent(rng: torch.Generator) -> None:
    """The beam of a draft whose log-probabilities rounding lets pass 0: children tie with their parents."""
    batch, width, levels, nodes = 4, 4, 5, 23
    root = torch.zeros(batch, dtype=torch.int32)
    scores, base, count = torch.zeros(batch, 1), torch.full((batch, 1), -1, dtype=torch.int32), 0
    all_tokens, all_scores, all_parents = [], [], []
    for _ in range(levels):
        beams = scores.shape[1]
        tokens = torch.randint(0, 50, (batch, beams, width), generator=rng, dtype=torch.int32)
        logprobs = (torch.rand(batch, beams, width, generator=rng) - 0.5).mul(4e-7)  # about 0, half of them above
        candidates, _, kept, scores = grow_beam(tokens, logprobs, scores, width)
        all_tokens.append(tokens.flatten(1))
        all_scores.append(candidates)
        all_parents.append(base.repeat_interleave(width, 1))
        base, count = kept + count, count + beams * width
    forest = (torch.cat(x, 1) for x in (all_tokens, all_scores, all_parents))
    inputs = dict(zip(("tokens", "scores", "parents"), forest, strict=True))
    none = torch.zeros(batch, 1, dtype=torch.int32)
    check({"root": root, **inputs, "forced": none, "n_forced": none[:, 0]}, nodes)  # the oracle raises on a lost parent


def test_scores_that_are_not_monotone_still_make_a_tree(rng: torch.Generator) -> None:
    for nodes in (2, 7, 30):
        inputs = random_inputs(rng, 20, 40)
        inputs["scores"] = torch.randn(20, 40, generator=rng)
        tree = build_tree(**inputs, nodes=nodes)
        index = torch.arange(nodes)
        seen = bits.unpack(tree.visible, nodes)
        assert (tree.parent[:, 1:] < index[1:]).all()
        assert tree.parent[:, 0].eq(0).all()
        for n in range(1, nodes):
            above = tree.parent[:, n].long()
            rows = torch.arange(20)
            assert torch.equal(seen[:, n], seen[rows, above] | (index == n))
            assert torch.equal(tree.depth[:, n], tree.depth[rows, above] + 1)


def test_strided_inputs_are_read_and_left_alone(rng: torch.Generator) -> None:
    inputs = force(rng, random_inputs(rng, 4, 30, forced=3, bad=0.1))
    expected = build_tree_ref(**inputs, nodes=12)
    strided = {name: torch.stack([x, torch.full_like(x, 77)], -1)[..., 0] for name, x in inputs.items()}
    for got, want in zip(build_tree(**strided, nodes=12), expected, strict=True):
        assert torch.equal(got, want)
    for name, x in inputs.items():
        torch.testing.assert_close(strided[name], x, rtol=0, atol=0, equal_nan=True)


def test_empty_batch(rng: torch.Generator) -> None:
    tree = build_tree(**random_inputs(rng, 0, 5, forced=2), nodes=7)
    assert [tuple(x.shape) for x in tree] == [(0, 7), (0, 7), (0, 7), (0, 7, 1)]


@pytest.mark.parametrize(
    ("batch", "count", "forced", "nodes"), [(2, 9, 1, 6), (1, 9, 3, 6), (2, 0, 1, 1), (2, 4, 2, 70)]
)
def test_opcheck(rng: torch.Generator, batch: int, count: int, forced: int, nodes: int) -> None:
    x = force(rng, random_inputs(rng, batch, count, forced))
    args = (x["root"], x["tokens"], x["scores"], x["parents"], nodes, x["forced"], x["n_forced"])
    torch.library.opcheck(torch.ops.specexit.build_tree.default, args)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("root", torch.zeros(2, dtype=torch.int64), TypeError),
        ("root", torch.zeros(2, 1, dtype=torch.int32), ValueError),
        ("tokens", torch.zeros(2, 5), TypeError),
        ("tokens", torch.zeros(3, 5, dtype=torch.int32), ValueError),
        ("scores", torch.zeros(2, 5, dtype=torch.float16), TypeError),
        ("scores", torch.zeros(2, 6), ValueError),
        ("scores", torch.zeros(2, 5, device="meta"), ValueError),
        ("parents", [[-1] * 5] * 2, TypeError),
        ("parents", torch.zeros(2, 5, 1, dtype=torch.int32), ValueError),
        ("nodes", 0, ValueError),
        ("nodes", None, TypeError),
        ("forced", torch.zeros(2, 1), TypeError),
        ("forced", torch.zeros(2, 0, dtype=torch.int32), ValueError),
        ("forced", torch.zeros(1, 1, dtype=torch.int32), ValueError),
        ("n_forced", torch.zeros(2, dtype=torch.bool), TypeError),
        ("n_forced", torch.zeros(1, dtype=torch.int32), ValueError),
        ("implementation", "fortran", ValueError),
    ],
)
def test_bad_arguments_are_named(rng: torch.Generator, name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        build_tree(**{**random_inputs(rng, 2, 5), "nodes": 4, name: value})  # type: ignore[arg-type]
