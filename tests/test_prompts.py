"""Prompts: padding on either side, and every way to get them wrong."""

from __future__ import annotations

import pytest
import torch

from specexit.prompts import left_padded, pack_prompts


def test_rows_move_to_the_left_from_either_side(rng: torch.Generator) -> None:
    for _ in range(20):
        lengths = torch.randint(1, 9, (4,), generator=rng).tolist()
        width = 9
        ids = torch.randint(1, 50, (4, width), generator=rng)
        mask = torch.zeros_like(ids)
        rows = []
        for row, length in enumerate(lengths):
            start = 0 if row % 2 else width - length
            mask[row, start : start + length] = 1
            rows.append(ids[row, start : start + length].tolist())
        packed = pack_prompts(ids, mask, 50)
        assert packed.lengths == lengths
        assert [packed.row(i) for i in range(4)] == rows
        padded, padded_mask = left_padded(packed, pad=0)
        for row, length in enumerate(lengths):
            assert padded[row, padded.shape[1] - length :].tolist() == rows[row]
            assert padded_mask[row].sum() == length
            assert (padded[row] == 0).sum() == padded.shape[1] - length


def test_no_mask_means_no_padding() -> None:
    packed = pack_prompts(torch.tensor([[0, 3], [4, 0]]), None, 5)
    assert packed.lengths == [2, 2]
    assert packed.tokens.tolist() == [[0, 3], [4, 0]]


def test_no_rows() -> None:
    assert pack_prompts(torch.zeros(0, 4, dtype=torch.long), None, 5).lengths == []


@pytest.mark.parametrize(
    ("ids", "mask", "error", "words"),
    [
        ([1, 2], None, TypeError, "input_ids must be a tensor, was list"),
        (torch.tensor([1, 2]), None, ValueError, r"input_ids must be \[B, P\], was \[2\]"),
        (torch.tensor([[1.0]]), None, TypeError, "input_ids must hold integers, was torch.float32"),
        (torch.zeros(1, 0, dtype=torch.long), None, ValueError, "at least one token a prompt, row 0 was empty"),
        (torch.tensor([[1, 2]]), torch.tensor([[0, 0]]), ValueError, "row 0 was empty"),
        (torch.tensor([[1, 2]]), [[1, 1]], TypeError, "attention_mask must be a tensor, was list"),
        (torch.tensor([[1, 2]]), torch.tensor([[1]]), ValueError, r"attention_mask must be \[1, 2\]"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]), ValueError, "had a hole inside"),
        (torch.tensor([[1, 9]]), None, ValueError, r"in \[0, 5\), the base's vocabulary, was 9 at \[0, 1\]"),
        (torch.tensor([[-1, 1]]), None, ValueError, r"was -1 at \[0, 0\]"),
    ],
)
def test_bad_prompts(ids: object, mask: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pack_prompts(ids, mask, 5)  # type: ignore[arg-type]


def test_padding_may_hold_any_id() -> None:
    packed = pack_prompts(torch.tensor([[-100, 3]]), torch.tensor([[0, 1]]), 5)
    assert packed.row(0) == [3]
