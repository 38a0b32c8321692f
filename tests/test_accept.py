"""Acceptance against its own description, row by row in plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch
from exit_harness import Settings, chain_trees, ids, make_state
from torch._subclasses.fake_tensor import FakeTensorMode

from specexit_kernels import bits
from specexit_kernels.accept import accept, accept_ref
from specexit_kernels.state import DecodeState, Finish, Tree

V = 4  # few ids: drafts match by chance, siblings tie, stop ids are met


def integers(rng: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=rng, dtype=torch.int32)


def number(rng: torch.Generator, low: int, high: int) -> int:
    """In [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def random_tree(rng: torch.Generator, batch: int, nodes: int) -> Tree:
    """Random trees; some of the last nodes are inert."""
    tokens, parent, depth = (torch.zeros(batch, nodes, dtype=torch.int32) for _ in range(3))
    mask = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    for row in range(batch):
        real = number(rng, 1, nodes)
        tokens[row, :real] = integers(rng, 0, V, real)
        mask[row, 0, 0] = True
        depth[row, real:] = 1
        for n in range(1, real):
            above = number(rng, max(0, n - 3), n - 1)
            parent[row, n], depth[row, n] = above, depth[row, above] + 1
            mask[row, n] = mask[row, above]
            mask[row, n, n] = True
    return Tree(tokens, parent, depth, bits.pack(mask))


def random_state(rng: torch.Generator, tree: Tree, depth: int, forced: int) -> DecodeState:
    batch = tree.tokens.shape[0]
    state = make_state(batch, Settings(force=range(forced)), depth=depth)
    state.lengths.copy_(integers(rng, 0, 30, batch))
    state.limits.copy_(state.lengths + integers(rng, 1, 9, batch))
    state.root.copy_(tree.tokens[:, 0])
    state.finished.copy_(integers(rng, -4, 3, batch).clamp(min=0))
    if forced:
        state.n_forced.copy_(integers(rng, -2, forced + 1, batch).clamp(min=0))
        for row in range(batch):
            n = int(state.n_forced[row])
            state.forced[row, :n] = integers(rng, 0, V, n)
            if n:
                state.forced[row, 0] = state.root[row]
    for junk in (state.run, state.n_pending, state.output, state.n_output):
        junk.copy_(integers(rng, 0, 99, *junk.shape))
    return state


def expected_row(tree: Tree, targets: list[int], stop: list[int], state: DecodeState, row: int) -> dict[str, object]:
    """What `accept` makes of one row, by walking every path of its tree."""
    tokens, parent, depth = (x[row].tolist() for x in tree[:3])
    seen = bits.unpack(tree.visible[row], len(tokens))
    columns = state.depth + 1
    forced = state.forced[row, : int(state.n_forced[row])].tolist()
    for n, d in enumerate(depth):
        if d + 1 < len(forced):
            targets[n] = forced[d + 1]
    best = [0]
    for n in range(1, len(tokens)):
        path = [n]
        while path[0]:
            path.insert(0, parent[path[0]])
        stands = all(tokens[c] == targets[p] for p, c in itertools.pairwise(path))
        if seen[n, n] and stands and len(path) > len(best):
            best = path
    best = best[:columns]
    emitted = [tokens[n] for n in best[1:]] + [targets[best[-1]]]
    length, limit = int(state.lengths[row]), int(state.limits[row])
    finished = int(state.finished[row])
    m = 0
    if not finished:
        while m < len(emitted) and length + m < limit - 1:
            m += 1
            if emitted[m - 1] in stop:
                break
        if m and emitted[m - 1] in stop:
            finished = Finish.STOP
        elif length + m == limit - 1:
            finished = Finish.LENGTH
    root = int(state.root[row])
    forced = forced[m:]
    return {
        "path": best[:m] + [-1] * (columns - m),
        "m": m,
        "run": [root, *emitted[:m]] + [0] * (columns - m),
        "root": emitted[m - 1] if m else root,
        "lengths": length + m,
        "n_pending": m,
        "finished": finished,
        "forced": forced + [0] * (state.forced.shape[1] - len(forced)),
        "n_forced": len(forced),
    }


def test_accept_is_what_it_says(rng: torch.Generator) -> None:
    met = {"stop": 0, "length": 0, "forced": 0, "deep": 0}
    for case in range(60):
        batch, nodes, forced = number(rng, 1, 6), number(rng, 1, 12), number(rng, 0, 4)
        tree = random_tree(rng, batch, nodes)
        depth = max(int(tree.depth.max()), 1) + number(rng, 0, 2)
        state = random_state(rng, tree, depth, forced)
        targets = integers(rng, 0, V, batch, nodes)
        for row in range(0, batch, 2):  # a base that agrees with the last child of every node
            for n in range(1, nodes):
                targets[row, tree.parent[row, n]] = tree.tokens[row, n]
        stop = [[], [3], [2, 3]][case % 3]
        expected = [expected_row(tree, targets[row].tolist(), stop, state, row) for row in range(batch)]
        untouched = {"limits", "prompt_lengths", "thinking", "thinking_tokens", "tail", "smoothed", "seen", "history"}
        untouched |= {"exit_position", "exit_reason", "output", "n_output", "trace"}
        before = {name: getattr(state, name).clone() for name in untouched}
        given = [x.clone() for x in (*tree, targets)]

        path, m, root = accept(tree, targets, ids(*stop), state)

        for row, want in enumerate(expected):
            assert path[row].tolist() == want["path"]
            assert m[row] == want["m"]
            assert root[row] == want["root"]
            for name in ("run", "root", "lengths", "n_pending", "finished", "forced", "n_forced"):
                assert getattr(state, name)[row].tolist() == want[name], name
            met["stop"] += want["finished"] == Finish.STOP
            met["length"] += want["finished"] == Finish.LENGTH
            met["deep"] += want["m"] > 2
            met["forced"] += want["n_forced"] > 0
        for name, value in before.items():
            torch.testing.assert_close(getattr(state, name), value, rtol=0, atol=0, equal_nan=True, msg=name)
        assert all(torch.equal(a, b) for a, b in zip(given, (*tree, targets), strict=True))
        assert root.data_ptr() != state.root.data_ptr()
    assert all(met.values()), met


def test_forced_ids_override_the_base_and_may_outlast_the_tree() -> None:
    shared = Settings(force=(2, 9, 8, 7, 6))
    state = make_state(1, shared, depth=3)
    state.limits.fill_(100)
    state.root.fill_(2)
    state.forced.copy_(ids(2, 9, 8, 7, 6))
    state.n_forced.fill_(5)
    tree = chain_trees([[2, 9, 8]], 3)
    _, m, root = accept(tree, ids(5, 5, 5).view(1, 3), ids(), state)
    assert (m.item(), root.item()) == (3, 7)
    assert state.run.tolist() == [[2, 9, 8, 7, 0]]
    assert (state.forced.tolist(), state.n_forced.item()) == ([[7, 6, 0, 0, 0]], 2)
    _, m, root = accept(chain_trees([[7, 6]], 3), ids(5, 5, 5).view(1, 3), ids(), state)
    assert (m.item(), root.item()) == (2, 5)  # 6 was the last forced id; 5 is the base's own
    assert (state.forced.tolist(), state.n_forced.item()) == ([[0, 0, 0, 0, 0]], 0)


def test_a_stop_id_among_the_forced_ids_ends_the_row() -> None:
    state = make_state(1, Settings(force=(2, 3, 9)), depth=3)
    state.limits.fill_(100)
    state.root.fill_(2)
    state.forced.copy_(ids(2, 3, 9))
    state.n_forced.fill_(3)
    accept(chain_trees([[2, 3, 9]], 3), ids(5, 5, 5).view(1, 3), ids(3), state)
    assert (state.run.tolist(), state.finished.item()) == ([[2, 3, 0, 0, 0]], Finish.STOP)


def test_a_row_without_room_ends_instead_of_idling() -> None:
    state = make_state(1, Settings(), depth=1)
    state.lengths.fill_(7)
    state.limits.fill_(8)
    _, m, _ = accept(chain_trees([[5]], 2), ids(5, 5).view(1, 2), ids(3), state)
    assert (m.item(), state.lengths.item(), state.finished.item()) == (0, 7, Finish.LENGTH)


def test_no_rows() -> None:
    state = make_state(0, Settings(force=(2, 9)), depth=3)
    path, m, root = accept(chain_trees([], 5), torch.zeros(0, 5, dtype=torch.int32), ids(3, 4), state)
    assert (path.shape, m.shape, root.shape) == ((0, 4), (0,), (0,))


@pytest.mark.parametrize("stop", [(), (3,), (2, 3)])
@pytest.mark.parametrize("forced", [0, 1, 3])
def test_no_value_is_asked_for(rng: torch.Generator, stop: tuple[int, ...], forced: int) -> None:
    """Fake tensors have no values: a read of one, which on a GPU waits for it, would raise."""
    tree = random_tree(rng, 3, 6)
    state = random_state(rng, tree, 6, forced)
    with FakeTensorMode() as mode:
        *arguments, fake = (
            [mode.from_tensor(x) for x in xs] for xs in (tree, (tree.tokens, ids(*stop)), state.tensors())
        )
        path, m, root = accept_ref(*arguments[0], *arguments[1], fake)
    assert (path.shape, m.shape, root.shape) == ((3, 7), (3,), (3,))


@pytest.mark.parametrize(("stop", "forced"), [((), 1), ((2, 3), 3)])
def test_opcheck(rng: torch.Generator, stop: tuple[int, ...], forced: int) -> None:
    tree = random_tree(rng, 3, 6)
    state = random_state(rng, tree, 6, forced)
    args = (*tree, integers(rng, 0, V, 3, 6), ids(*stop), state.tensors())
    torch.library.opcheck(torch.ops.specexit.accept.default, args)


def test_bad_arguments(rng: torch.Generator) -> None:
    tree = random_tree(rng, 2, 5)
    targets, stop = integers(rng, 0, V, 2, 5), ids(3)
    state = random_state(rng, tree, 4, 1)
    cases = [
        ({"tree": tuple(tree)}, TypeError, "tree must be a Tree, was tuple"),
        ({"state": state.tensors()}, TypeError, "state must be a DecodeState, was list"),
        ({"tree": tree._replace(tokens=tree.tokens.long())}, TypeError, "tree.tokens must be int32"),
        ({"tree": tree._replace(tokens=tree.tokens[:1])}, ValueError, r"tree.tokens must be \[B=2, T\]"),
        ({"tree": Tree(*(x[:, :0] for x in tree[:3]), tree.visible)}, ValueError, "at least one node"),
        ({"tree": tree._replace(parent=tree.parent[:, 1:])}, ValueError, r"tree.parent must be \[B=2, T=5\]"),
        ({"tree": tree._replace(depth=tree.depth[0])}, ValueError, "tree.depth must be"),
        ({"tree": tree._replace(visible=tree.visible.int())}, TypeError, "tree.visible must be int64"),
        ({"tree": tree._replace(visible=tree.visible.repeat(1, 1, 2))}, ValueError, "tree.visible must be"),
        ({"targets": targets.long()}, TypeError, "targets must be int32"),
        ({"targets": targets[:, :4]}, ValueError, r"targets must be \[B=2, T=5\], was \[2, 4\]"),
        ({"stop_ids": [3]}, TypeError, "stop_ids must be a tensor, was list"),
        ({"stop_ids": torch.tensor(3, dtype=torch.int32)}, ValueError, r"stop_ids must be \[n\]"),
        ({"implementation": "cude"}, ValueError, "implementation: accept has torch"),
    ]
    for change, error, words in cases:
        arguments = {"tree": tree, "targets": targets, "stop_ids": stop, "state": state} | change
        with pytest.raises(error, match=words):
            accept(**arguments)
