"""What tree attention is compared with: ours, PyTorch's SDPA and FlexAttention, FlashInfer.

Each implementation gets what suits it, prepared outside the timed region: a dense mask of q's dtype (a bool mask would
be converted in every call), K and V cut to L + T slots, a block mask that names the prefix as full blocks. What cannot
do a cell says why, by raising.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_cells import Problem
from benchmarks.harness import Peer, Prepared, Unavailable
from specexit_kernels import tree_attention


def ours(implementation: str | None = None) -> Callable[[Problem], Prepared]:
    """The op: the best implementation for the device, or the one of this name."""

    def prepare(problem: Problem) -> Prepared:
        model = problem.cell.model

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tree_attention(
                q,
                k,
                v,
                problem.lengths,
                problem.positions,
                problem.visible,
                scale=problem.scale,
                window=model.window,
                softcap=model.softcap,
                sinks=problem.sinks,
                implementation=implementation,
            )

        return Prepared([partial(attend, *copy) for copy in problem.copies], lambda result: result)

    return prepare


# ---- scaled_dot_product_attention with a dense mask


def sdpa(backend: SDPBackend | None, packed: bool = False) -> Callable[[Problem], Prepared]:
    """SDPA, its backend pinned or (None) its own choice.

    It is asked for grouped heads first, and where the backend refuses those, for repeated ones. `packed`: the query
    heads that share a KV head become query rows of it, so that no backend sees groups.
    """

    def prepare(problem: Problem) -> Prepared:
        if problem.cell.model.softcap or problem.cell.model.sinks:
            raise Unavailable("no softcap" if problem.cell.model.softcap else "no sinks")
        forms = (_packed,) if packed else (_grouped, _repeated)
        refusals = []
        for form in forms:
            try:
                with _reasons():
                    prepared = form(problem, backend)
                    prepared.calls[0]()
                return prepared
            except Unavailable as error:
                refusals.append(str(error))
        raise Unavailable("; ".join(dict.fromkeys(refusals)))

    return prepare


def _grouped(problem: Problem, backend: SDPBackend | None) -> Prepared:
    grouped = problem.cell.model.heads != problem.cell.model.kv_heads
    inputs = [(q.transpose(1, 2), k, v) for q, k, v in problem.copies]
    return _sdpa_calls(problem, backend, inputs, problem.bias, grouped, _heads_last, "")


def _repeated(problem: Problem, backend: SDPBackend | None) -> Prepared:
    group = problem.cell.model.heads // problem.cell.model.kv_heads
    inputs = [(q.transpose(1, 2), *(x.repeat_interleave(group, 1) for x in (k, v))) for q, k, v in problem.copies]
    note = "KV heads repeated beforehand"
    return _sdpa_calls(problem, backend, inputs, problem.bias, False, _heads_last, note)


def _packed(problem: Problem, backend: SDPBackend | None) -> Prepared:
    cell = problem.cell
    kv_heads, group = cell.model.kv_heads, cell.model.heads // cell.model.kv_heads

    def pack(q: Tensor) -> Tensor:
        return q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def unpack(result: Tensor) -> Tensor:
        return result.unflatten(2, (group, cell.nodes)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    inputs = [(pack(q), k, v) for q, k, v in problem.copies]
    aligned = problem.bias.new_empty(cell.batch, 1, group * cell.nodes, problem.bias.stride(2))
    bias = aligned[..., : problem.slots].copy_(problem.bias.repeat(1, 1, group, 1))
    return _sdpa_calls(problem, backend, inputs, bias, False, unpack, "query rows packed by KV head beforehand")


def _sdpa_calls(
    problem: Problem,
    backend: SDPBackend | None,
    inputs: list[Any],
    bias: Tensor,
    grouped: bool,
    finish: Callable[[Tensor], Tensor],
    note: str,
) -> Prepared:
    cut = [(q, k[:, :, : problem.slots], v[:, :, : problem.slots]) for q, k, v in inputs]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _pinned(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=problem.scale, enable_gqa=grouped)

    if backend is None:
        note = "; ".join(filter(None, (f"picked {_picked(*cut[0], bias, problem.scale, grouped)}", note)))
    return Prepared([partial(attend, *copy) for copy in cut], finish, note)


def _heads_last(result: Tensor) -> Tensor:
    return result.transpose(1, 2)


def _pinned(backend: SDPBackend | None) -> AbstractContextManager[Any]:
    return nullcontext() if backend is None else sdpa_kernel(backend)


def _picked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, grouped: bool) -> str:
    """The backend that SDPA chooses for these arguments."""
    try:
        choice = torch._fused_sdp_choice(q, k, v, bias, 0.0, False, scale=scale, enable_gqa=grouped)
        return str(SDPBackend(int(choice)).name)
    except Exception:  # a private function: it may change or go
        return "an unknown backend"


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn "no available kernel" into Unavailable with the reasons, which PyTorch gives as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            given = [str(warning.message).partition(" (Triggered")[0] for warning in caught]
            given = [text for text in given if "not used because" not in text and "runtime disabled" not in text]
            raise Unavailable("; ".join(dict.fromkeys(given)) or str(error).partition("\n")[0]) from error


# ---- FlexAttention, with the tree as its mask_mod


def flex(force_main: bool = False, tile: int | None = None) -> Callable[[Problem], Prepared]:
    """FlexAttention, compiled for the cell's shapes.

    Below 128 queries it takes its decode path, where one tile holds all query rows of a KV head unless BLOCK_M (`tile`)
    says otherwise; the block mask's query block must be a multiple of that (flex_decoding.py of torch's inductor).
    `force_main` asks for the main path, which splits no KV and reads it for every query head.
    """

    def prepare(problem: Problem) -> Prepared:
        from torch.nn.attention import flex_attention as module

        cell = problem.cell
        model, group = cell.model, cell.model.heads // cell.model.kv_heads
        main = cell.nodes >= 128 or group & (group - 1) != 0  # what the decode path does not take
        if tile is not None and (main or cell.rows <= tile):
            raise Unavailable(f"no tile of {tile} rows: {'not the decode path' if main else 'all rows fit in one'}")
        if force_main and main:
            raise Unavailable("the main path is taken anyway")
        options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True} if force_main else {}
        if tile is not None:
            options |= {"BLOCK_M": tile, "num_warps": 4}
        block_mask = tree_block_mask(problem)
        softcap = model.softcap
        sinks = None if problem.sinks is None else problem.sinks.float().view(1, -1, 1)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            assert softcap is not None
            return softcap * torch.tanh(score / softcap)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            arguments = {"block_mask": block_mask, "scale": problem.scale, "enable_gqa": group > 1}
            arguments |= {"score_mod": score_mod if softcap else None, "kernel_options": options or None}
            if sinks is None:
                return module.flex_attention(q, k, v, **arguments)
            result, aux = module.flex_attention(q, k, v, **arguments, return_aux=module.AuxRequest(lse=True))
            # A sink is a slot that adds nothing: it takes exp(sink) of the sum of weights.
            return (result * torch.sigmoid(aux.lse - sinks).unsqueeze(-1)).to(q.dtype)

        torch._dynamo.reset()  # each shape is compiled anew, and past a few of them dynamo would run it uncompiled
        compiled = torch.compile(attend, dynamic=False, fullgraph=True)
        copies = [(q.transpose(1, 2), k[:, :, : problem.slots], v[:, :, : problem.slots]) for q, k, v in problem.copies]
        return Prepared([partial(compiled, *copy) for copy in copies], _heads_last, "main path" if main else "")

    return prepare


def tree_block_mask(problem: Problem, block: int = 128) -> Any:
    """The tree as a BlockMask: KV blocks that all queries see whole need no mask_mod, those that none sees are absent.

    `create_block_mask` would find no full block: it pads the queries to a query block with rows that see nothing.
    """
    from torch.nn.attention.flex_attention import BlockMask

    lengths, positions, visible, window = problem.lengths, problem.positions, problem.visible, problem.cell.model.window

    def mask_mod(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        node = (n - lengths[b]).clamp(min=0)
        own = (visible[b, m, node >> 6] >> (node & 63)) & 1 != 0
        committed = n < lengths[b]
        inside = committed if window is None else committed & (n > positions[b, m] - window)
        return inside | (~committed & own)

    blocks = -(-problem.slots // block)
    seen = F.pad(problem.seen, (0, blocks * block - problem.slots)).unflatten(2, (blocks, block))
    full = seen.all(3).all(1)
    partly = seen.any(3).any(1) & ~full

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
        return chosen.sum(-1).int().view(-1, 1, 1), order.view(-1, 1, 1, blocks)

    rows = 1 << (problem.cell.rows - 1).bit_length()  # the decode path's tile: a power of two
    return BlockMask.from_kv_blocks(
        *listed(partly),
        *listed(full),
        BLOCK_SIZE=(max(256, rows), block),
        mask_mod=mask_mod,
        seq_lengths=(problem.cell.nodes, problem.slots),
    )


# ---- FlashInfer


def flashinfer(problem: Problem) -> Prepared:
    """FlashInfer's batch prefill with a custom mask, K and V in its own layout [tokens, Hkv, hd]."""
    if importlib.util.find_spec("flashinfer") is None:
        raise Unavailable("flashinfer is not installed")
    module: Any = importlib.import_module("flashinfer")
    cell, (first, _, _) = problem.cell, problem.copies[0]
    model = cell.model
    if model.sinks:
        raise Unavailable("no sinks with a custom mask")
    workspace = torch.empty(2**28, dtype=torch.uint8, device=first.device)
    wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(cell.batch + 1, dtype=torch.int32, device=first.device)
    wrapper.plan(
        starts * cell.nodes,
        starts * problem.slots,
        model.heads,
        model.kv_heads,
        model.head_dim,
        custom_mask=problem.seen.flatten(),
        logits_soft_cap=model.softcap,
        sm_scale=problem.scale,
        q_data_type=first.dtype,
    )

    def tokens_first(cache: Tensor) -> Tensor:
        return cache[:, :, : problem.slots].transpose(1, 2).flatten(0, 1).contiguous()

    copies = [(q.flatten(0, 1), tokens_first(k), tokens_first(v)) for q, k, v in problem.copies]
    return Prepared([partial(wrapper.run, *copy) for copy in copies], lambda result: result.view_as(first))


SDPA = (
    Peer("SDPA", sdpa(None)),
    Peer("SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("SDPA efficient", sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("SDPA math", sdpa(SDPBackend.MATH)),
    Peer("SDPA packed", sdpa(None, packed=True)),
)
FLEX = (  # the one that should be fastest first: each compiles for seconds
    Peer("Flex, 64-row tiles", flex(tile=64)),
    Peer("Flex, main path", flex(force_main=True)),
    Peer("Flex", flex()),
)
PEERS = {"sdpa": SDPA, "flex": FLEX, "flashinfer": (Peer("FlashInfer", flashinfer),)}
