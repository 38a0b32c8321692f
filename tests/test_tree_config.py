import pytest
import torch

from specexit.config import TreeConfig


@pytest.mark.parametrize(
    ("tree", "max_depth", "is_chain", "candidates"),
    [
        (TreeConfig(), 7, False, 10 + 100 * 6),
        (TreeConfig(nodes=4, depth=9, top_k=2), 3, False, 2 + 4 * 2),
        (TreeConfig(nodes=2, depth=9, top_k=3), 1, False, 3),
        (TreeConfig(nodes=9, depth=3, top_k=1), 3, False, 3),
        (TreeConfig.chain(5), 5, True, 5),
        (TreeConfig.none(), 0, True, 0),
        (TreeConfig(nodes=1, depth=7, top_k=10), 0, True, 0),
        (TreeConfig(nodes=256, depth=1, top_k=16), 1, False, 16),
    ],
)
def test_what_follows_from_the_shape(tree, max_depth, is_chain, candidates):
    assert (tree.max_depth, tree.is_chain, tree.candidates) == (max_depth, is_chain, candidates)


def test_chain_has_its_length_below_the_root():
    assert TreeConfig.chain(3) == TreeConfig(nodes=4, depth=3, top_k=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": 0}, "nodes must be between 1 and 256, was 0"),
        ({"nodes": 257}, "nodes must be between 1 and 256, was 257"),
        ({"depth": 0}, "depth must be at least 1, was 0"),
        ({"top_k": 0}, "top_k must be between 1 and 16, was 0"),
        ({"top_k": 17}, "top_k must be between 1 and 16, was 17"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TreeConfig(**fields)


@pytest.mark.parametrize("name", ["nodes", "depth", "top_k"])
@pytest.mark.parametrize("value", [2.0, "2", True, None])
def test_other_types_are_refused(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an int, was {type(value).__name__}"):
        TreeConfig(**{name: value})


@pytest.mark.parametrize("length", [0, 256])
def test_chain_of_no_possible_length_is_refused(length):
    with pytest.raises(ValueError, match=f"length must be between 1 and 255, was {length}"):
        TreeConfig.chain(length)


def test_chain_length_must_be_an_int():
    with pytest.raises(TypeError, match="length must be an int, was str"):
        TreeConfig.chain("3")


@pytest.mark.parametrize(
    ("batch", "nodes"), [(0, 60), (1, 60), (3, 60), (4, 46), (8, 23), (16, 11), (32, 5), (64, 2), (92, 2), (93, 1)]
)
def test_on_a_gpu_the_whole_batch_shares_the_free_rows(batch, nodes):
    tree = TreeConfig.suited_to(torch.device("cuda"), batch)
    assert tree.nodes == nodes
    assert tree.is_chain == (nodes <= 8)
    assert tree.candidates >= nodes - 1, "no node is inert"


def test_on_a_cpu_a_chain_pays_best():
    for batch in (1, 8):
        assert TreeConfig.suited_to(torch.device("cpu"), batch) == TreeConfig.chain(8)
