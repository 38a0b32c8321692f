"""verify_tree against a walk over the tree, one node at a time."""

import pytest
import torch

from specexit_kernels import bits
from specexit_kernels.state import Tree
from specexit_kernels.verify_tree import verify_tree, verify_tree_ref


def random_tree(rng: torch.Generator, batch: int, nodes: int, *, vocab: int, chain: float, inert: float) -> Tree:
    """Random trees. A node is inert with probability `inert`, and grows from the last live one with `chain`."""
    parent = torch.zeros(batch, nodes, dtype=torch.int32)
    depth = torch.zeros(batch, nodes, dtype=torch.int32)
    tokens = torch.randint(0, vocab, (batch, nodes), generator=rng, dtype=torch.int32)
    mask = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    draws = torch.rand(batch, nodes, 3, generator=rng).tolist()
    for b in range(batch):
        mask[b, 0, 0] = True
        live = [0]
        for n in range(1, nodes):
            dead, last, which = draws[b][n]
            if dead < inert:
                tokens[b, n], depth[b, n] = 0, 1
                continue
            p = live[-1] if last < chain else live[int(which * len(live))]
            parent[b, n], depth[b, n] = p, depth[b, p] + 1
            mask[b, n] = mask[b, p]
            mask[b, n, n] = True
            live.append(n)
    return Tree(tokens, parent, depth, bits.pack(mask))


def oracle(tree: Tree, targets: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow every node to the root, as one would on paper; `depth` cuts the path."""
    batch, nodes = tree.tokens.shape
    tokens, parent, target = tree.tokens.tolist(), tree.parent.tolist(), targets.tolist()
    inert = (tree.visible == 0).all(-1).tolist()
    path = torch.full((batch, depth + 1), -1, dtype=torch.int32)
    for b in range(batch):
        best = [0]
        for n in range(1, nodes):
            walk, m = [], n
            while m != 0 and not inert[b][m] and tokens[b][m] == target[b][parent[b][m]]:
                walk.append(m)
                m = parent[b][m]
            if m == 0 and len(walk) + 1 > len(best):
                best = [0, *reversed(walk)]
        best = best[: depth + 1]
        path[b, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return path, (path >= 0).sum(1, dtype=torch.int32)


def check(tree: Tree, targets: torch.Tensor, depth: int) -> torch.Tensor:
    """Compare with the oracle; returns n_accepted."""
    path, n_accepted = verify_tree(tree.tokens, tree.parent, tree.visible, targets, depth)
    expected, n_expected = oracle(tree, targets, depth)
    assert torch.equal(path, expected)
    assert torch.equal(n_accepted, n_expected)
    assert path.is_contiguous()
    return n_accepted


@pytest.mark.parametrize("nodes", [1, 2, 3, 12, 60, 63, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("chain", [0.0, 0.7, 1.0])
def test_equals_the_walk(rng: torch.Generator, nodes: int, chain: float) -> None:
    for vocab, inert in ((1, 0.0), (2, 0.1), (2, 0.5)):
        tree = random_tree(rng, 3, nodes, vocab=vocab, chain=chain, inert=inert)
        targets = torch.randint(0, vocab, (3, nodes), generator=rng, dtype=torch.int32)
        deepest = int(tree.depth.max())
        for depth in {0, max(0, deepest - 1), deepest, nodes + 2}:
            check(tree, targets, depth)


def test_many_small_trees(rng: torch.Generator) -> None:
    lengths = set()
    for nodes in range(1, 14):
        tree = random_tree(rng, 100, nodes, vocab=2, chain=0.5, inert=0.15)
        targets = torch.randint(0, 2, (100, nodes), generator=rng, dtype=torch.int32)
        lengths.update(check(tree, targets, 12).tolist())
    assert lengths >= {1, 2, 3, 4}, "the cases should reach paths of several lengths"


def by_hand(parent: list[int], tokens: list[int], targets: list[int], dead: tuple[int, ...] = ()) -> list[int]:
    """The accepted path of one small tree; nodes in `dead` are inert."""
    mask = torch.zeros(len(parent), len(parent), dtype=torch.bool)
    for n, p in enumerate(parent):
        mask[n] = mask[p]
        mask[n, n] = True
    mask[list(dead)] = False

    def row(ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.int32)

    path, n_accepted = verify_tree(row(tokens), row(parent), bits.pack(mask)[None], row(targets), len(parent))
    assert path[0, n_accepted[0] :].eq(-1).all()
    return path[0, : n_accepted[0]].tolist()


def test_cases_by_hand() -> None:
    #        0
    #      /   \
    #     1     2     both hold token 7
    #     |     |
    #     3     4
    parent, tokens = [0, 0, 0, 1, 2], [5, 7, 7, 8, 9]
    assert by_hand(parent, tokens, [6, 0, 0, 0, 0]) == [0]  # nothing matches
    assert by_hand(parent, tokens, [7, 0, 0, 0, 0]) == [0, 1]  # of two equal siblings the first
    assert by_hand(parent, tokens, [7, 0, 9, 0, 0]) == [0, 2, 4]  # unless the second leads deeper
    assert by_hand(parent, tokens, [7, 8, 9, 0, 0]) == [0, 1, 3]  # equally deep: the lowest index
    assert by_hand(parent, tokens, [6, 8, 9, 0, 0]) == [0]  # a match below a mismatch does not stand
    # An inert node holds token 0 and is not accepted, even where the base chooses 0.
    assert by_hand([0, 0, 0], [5, 0, 0], [0, 0, 0], dead=(1, 2)) == [0]
    assert by_hand([0, 0, 0], [5, 0, 0], [0, 0, 0], dead=(1,)) == [0, 2]


def test_a_chain_longer_than_depth_is_cut() -> None:
    """A chain of forced ids may be longer than the drafts are deep."""
    nodes, depth = 9, 3
    tokens = torch.arange(nodes, dtype=torch.int32)[None]
    parent = (tokens - 1).clamp(min=0)
    path, n_accepted = verify_tree(tokens, parent, bits.chain(1, nodes), tokens + 1, depth)
    assert path.tolist() == [[0, 1, 2, 3]]
    assert n_accepted.tolist() == [4]


def test_strided_and_empty_inputs(rng: torch.Generator) -> None:
    tree = random_tree(rng, 6, 20, vocab=2, chain=0.5, inert=0.1)
    targets = torch.randint(0, 2, (6, 20), generator=rng, dtype=torch.int32)
    expected = verify_tree_ref(tree.tokens, tree.parent, tree.visible, targets, 6)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, 77)], -1)[..., 0]

    args = [strided(x) for x in (tree.tokens, tree.parent, tree.visible, targets)]
    for got, want in zip(verify_tree(*args, 6), expected, strict=True):
        assert torch.equal(got, want)
    path, n_accepted = verify_tree(*(x[:0] for x in args), 6)
    assert path.shape == (0, 7)
    assert n_accepted.shape == (0,)


@pytest.mark.parametrize("nodes", [1, 12, 70])
def test_opcheck(rng: torch.Generator, nodes: int) -> None:
    tree = random_tree(rng, 3, nodes, vocab=2, chain=0.5, inert=0.1)
    args = (tree.tokens, tree.parent, tree.visible, tree.tokens.clone(), 7)
    torch.library.opcheck(torch.ops.specexit.verify_tree.default, args)


def valid() -> dict[str, object]:
    ids = torch.zeros(2, 70, dtype=torch.int32)
    return {
        "tokens": ids,
        "parent": ids.clone(),
        "visible": torch.zeros(2, 70, 2, dtype=torch.int64),
        "targets": ids.clone(),
        "depth": 7,
    }


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tokens", [[1]], TypeError),
        ("tokens", torch.zeros(2, 70), TypeError),
        ("tokens", torch.zeros(70, dtype=torch.int32), ValueError),
        ("tokens", torch.zeros(2, 0, dtype=torch.int32), ValueError),
        ("parent", torch.zeros(2, 70, dtype=torch.int64), TypeError),
        ("parent", torch.zeros(2, 69, dtype=torch.int32), ValueError),
        ("parent", torch.zeros(2, 70, dtype=torch.int32, device="meta"), ValueError),
        ("visible", torch.zeros(2, 70, 2, dtype=torch.int32), TypeError),
        ("visible", torch.zeros(2, 70, 1, dtype=torch.int64), ValueError),
        ("visible", torch.zeros(2, 70, dtype=torch.int64), ValueError),
        ("targets", torch.zeros(2, 70), TypeError),
        ("targets", torch.zeros(3, 70, dtype=torch.int32), ValueError),
        ("depth", -1, ValueError),
        ("depth", 7.0, TypeError),
        ("depth", True, TypeError),
        ("implementation", "fortran", ValueError),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        verify_tree(**{**valid(), name: value})  # type: ignore[arg-type]
