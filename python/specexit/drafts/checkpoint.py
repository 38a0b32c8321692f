"""Read and write EAGLE-3 drafts in the layouts in which they are published.

    file                                    in the draft
    fc.weight                               fc_weight: H rows, then the signals'
    midlayer.{input_layernorm,hidden_norm}  input_norms
    midlayer.self_attn.{q,k,v}_proj         qkv_weight, qkv_bias
    midlayer.self_attn.o_proj               o_weight, o_bias
    midlayer.post_attention_layernorm       mlp_norm
    midlayer.mlp.{gate,up}_proj             gate_up_weight, gate_up_bias
    midlayer.mlp.down_proj                  down_weight, down_bias
    norm, lm_head                           norm, lm_head
    d2t, t2d                                d2t: target id = draft id + d2t[draft id]; t2d marks those target ids
    exit_head.{weight,bias}                 exit_weight, exit_bias: ours, which other loaders ignore

EAGLE-3, AngelSlim and SpecForge use these names; vLLM speculators says `layers.0` for `midlayer` and adds the base's
embedding. What is written is always the table above.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from specexit.drafts.calibration import CALIBRATION, read_calibration, write_calibration
from specexit.drafts.eagle3 import Eagle3Draft, embedding_table
from specexit.drafts.eagle3_config import Eagle3Config, Source
from specexit.drafts.tensor_files import WEIGHTS, read_tensors, resolve
from specexit.files import write_whole
from specexit.identity import draft_fingerprint

EMBEDDING = "embed_tokens.weight"
IGNORED = ("verifier_norm.weight", "verifier_lm_head.weight")  # speculators: the base's, used in training only


@dataclass(frozen=True)
class _Slot:
    """Where a tensor of the file lives in the draft: a view of a parameter, and the config keys that size it."""

    view: Tensor
    keys: str


def load_draft(
    path: str | os.PathLike[str],
    *,
    embedding: nn.Module,
    source: Source | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    calibrated: bool = True,
) -> Eagle3Draft:
    """Load an EAGLE-3 draft from a folder or from the Hugging Face hub.

    embedding       the base's token embedding; the draft uses it unless the checkpoint brings another
    source          where exit signals are read, see `Eagle3Draft`
    device, dtype   None: those of the embedding
    allow_pickle    read pytorch_model.bin where there is no safetensors file: only data is unpickled, never code
    revision        of the hub's repository: a branch, a tag or a commit
    calibrated      False: leave calibration.json alone, as one does to calibrate again

    The exit rules in calibration.json, or an older config.json, become the draft's `calibration`.

    Raises FileNotFoundError where a file is missing, and ValueError where one is corrupt or does not fit: a tensor
    that is missing, unexpected or of another shape than the config says, a draft for another vocabulary, or rules that
    were calibrated for other weights.
    """
    folder = resolve(path, revision, allow_pickle)
    config = Eagle3Config.read(folder / "config.json")
    tensors = _canonical(read_tensors(folder, allow_pickle), folder)
    if config.exit_head is None and "exit_head.weight" in tensors:
        config = replace(config, exit_head={})
    try:
        own = _own_embedding(tensors.pop(EMBEDDING, None), config, embedding, device, dtype)
        draft = Eagle3Draft(
            config,
            embedding if own is None else own,
            own_embedding=own is not None,
            source=source,
            device=device,
            dtype=dtype,
        )
        draft.d2t = _token_map(tensors.pop("d2t", None), tensors.pop("t2d", None), config, draft.lm_head.device)
        _fill(_layout(draft), tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    calibration = read_calibration(folder) if calibrated else None
    if calibration is not None:
        if calibration["draft"] != draft_fingerprint(tensors):  # of the file: in the draft they may be rounded
            raise ValueError(f"{folder / CALIBRATION} belongs to other weights of the draft: calibrate again")
        draft.calibration = calibration
    return draft.eval()


def fingerprint_of(draft: Eagle3Draft) -> str:
    """What tells these weights of a draft from others; a base's embedding is not among them."""
    return draft_fingerprint({name: slot.view for name, slot in _layout(draft).items()})


def saved_fingerprint(folder: Path, allow_pickle: bool = False) -> str:
    """`fingerprint_of` the draft in a folder, in the dtype in which it is stored."""
    tensors = _canonical(read_tensors(folder, allow_pickle), folder)
    return draft_fingerprint(
        {name: tensor for name, tensor in tensors.items() if name not in (EMBEDDING, "d2t", "t2d")}
    )


@torch.no_grad()
def save_draft(draft: Eagle3Draft, path: str | os.PathLike[str]) -> None:
    """Write a draft to the folder `path` in the EAGLE-3 layout, in the draft's dtype: config.json, model.safetensors.

    The embedding is the base's and is not written, unless the draft has its own. A calibration.json that belongs to
    these weights is written too; one that is there and belongs to others goes with the weights that it belonged to.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: slot.view for name, slot in _layout(draft).items()}
    config = draft.config.to_dict()
    config.pop("dtype", None)  # transformers' newer name for the same
    config["torch_dtype"] = str(draft.lm_head.dtype).removeprefix("torch.")
    if draft.d2t is not None:
        ids = torch.arange(len(draft.d2t), device=draft.d2t.device)
        tensors["d2t"] = draft.d2t.long()
        tensors["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool).scatter_(
            0, (ids + draft.d2t).cpu(), True
        )
    if draft.own_embedding:
        tensors[EMBEDDING] = embedding_table(draft.embedding)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CALIBRATION).unlink(missing_ok=True)
    if draft.calibration.get("draft") == fingerprint_of(draft):
        write_calibration(folder, draft.calibration)


def _layout(draft: Eagle3Draft) -> dict[str, _Slot]:
    """Every floating tensor of the file, and where it lives in the draft: what loading and saving share."""
    c = draft.config
    H, I = c.hidden_size, c.intermediate_size  # noqa: E741
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layout: dict[str, _Slot] = {}

    def add(name: str, tensor: Tensor | None, keys: str) -> None:
        if tensor is not None:
            layout[name] = _Slot(tensor, keys)

    def add_linear(
        names: tuple[str, ...], rows: tuple[int, ...], weight: Tensor, bias: Tensor | None, keys: str
    ) -> None:
        biases = [None] * len(rows) if bias is None else bias.split(rows)
        for name, part, part_bias in zip(names, weight.split(rows), biases, strict=True):
            add(f"midlayer.{name}.weight", part, keys)
            add(f"midlayer.{name}.bias", part_bias, keys)

    signals = "hidden_size" if not c.fc_signals else f"hidden_size + {len(c.fc_signals)} (early_stop_method)"
    add("fc.weight", draft.fc_weight, f"{signals}, 3 x target_hidden_size")
    add("midlayer.input_layernorm.weight", draft.input_norms[0], "hidden_size")
    add("midlayer.hidden_norm.weight", draft.input_norms[1], "hidden_size")
    add_linear(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        (q, kv, kv),
        draft.qkv_weight,
        draft.qkv_bias,
        "num_attention_heads or num_key_value_heads x head_dim, 2 x hidden_size",
    )
    add_linear(("self_attn.o_proj",), (H,), draft.o_weight, draft.o_bias, "hidden_size, num_attention_heads x head_dim")
    add("midlayer.post_attention_layernorm.weight", draft.mlp_norm, "hidden_size")
    add_linear(
        ("mlp.gate_proj", "mlp.up_proj"),
        (I, I),
        draft.gate_up_weight,
        draft.gate_up_bias,
        "intermediate_size, hidden_size",
    )
    add_linear(("mlp.down_proj",), (H,), draft.down_weight, draft.down_bias, "hidden_size, intermediate_size")
    add("norm.weight", draft.norm, "hidden_size")
    add("lm_head.weight", draft.lm_head, "draft_vocab_size, hidden_size")
    add("exit_head.weight", draft.exit_weight, "exit_head: 3 signals, hidden_size")
    add("exit_head.bias", draft.exit_bias, "exit_head: 3 signals")
    return layout


def _canonical(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Tensors of any layout under EAGLE-3's names; those that play no part here are dropped."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        to = name.removeprefix("model.")
        if to.startswith("layers.0."):
            to = "midlayer." + to.removeprefix("layers.0.")
        if to in renamed:
            raise ValueError(f"{folder}: two tensors stand for {to}")
        if to not in IGNORED:
            renamed[to] = tensor
    return renamed


@torch.no_grad()
def _fill(layout: dict[str, _Slot], tensors: dict[str, Tensor]) -> None:
    """Copy the file's tensors into the draft; ValueError for a missing, unexpected or misshapen one."""
    missing, unexpected = sorted(layout.keys() - tensors.keys()), sorted(tensors.keys() - layout.keys())
    if missing or unexpected:
        wanted = [f"{name} {list(layout[name].view.shape)} ({layout[name].keys})" for name in missing]
        lists = [
            f"{what}: {', '.join(names)}" for what, names in (("missing", wanted), ("unexpected", unexpected)) if names
        ]
        raise ValueError(f"tensors do not fit an EAGLE-3 draft with this config; {'; '.join(lists)}")
    for name, slot in layout.items():
        tensor = tensors[name]
        if tensor.shape != slot.view.shape:
            raise ValueError(
                f"{name} must be {list(slot.view.shape)} ({slot.keys} in config.json), was {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, was {tensor.dtype}")
        slot.view.copy_(tensor)


def _token_map(d2t: Tensor | None, t2d: Tensor | None, config: Eagle3Config, device: torch.device) -> Tensor | None:
    """[Vd] int32, the target id minus the draft id; None: the vocabularies are the same, and the file says nothing."""
    if d2t is None:
        if config.draft_vocab_size != config.vocab_size:
            raise ValueError(
                f"d2t is missing: a draft with draft_vocab_size {config.draft_vocab_size} of vocab_size "
                f"{config.vocab_size} needs the map of its ids"
            )
        return None
    for name, tensor, size, key in (
        ("d2t", d2t, config.draft_vocab_size, "draft_vocab_size"),
        ("t2d", t2d, config.vocab_size, "vocab_size"),
    ):
        if tensor is not None and list(tensor.shape) != [size]:
            raise ValueError(f"{name} must be {[size]} ({key} in config.json), was {list(tensor.shape)}")
        if tensor is not None and tensor.is_floating_point():
            raise ValueError(f"{name} must hold integers, was {tensor.dtype}")
    target = torch.arange(config.draft_vocab_size) + d2t.long()
    if target.min() < 0 or target.max() >= config.vocab_size:
        raise ValueError(
            f"d2t must map to ids below vocab_size {config.vocab_size}, "
            f"maps to {int(target.min())} .. {int(target.max())}"
        )
    if t2d is not None and not torch.equal(t2d.bool(), torch.zeros(config.vocab_size).bool().scatter_(0, target, True)):
        raise ValueError("t2d must mark the ids that d2t maps to: they are maps of different vocabularies")
    return d2t.to(device, torch.int32)


def _own_embedding(
    table: Tensor | None,
    config: Eagle3Config,
    embedding: nn.Module,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Embedding | None:
    """The embedding that the checkpoint brings, where it is not just a copy of the base's."""
    if table is None:
        return None
    if list(table.shape) != [config.vocab_size, config.hidden_size]:
        raise ValueError(
            f"{EMBEDDING} must be {[config.vocab_size, config.hidden_size]} (vocab_size, hidden_size in config.json), "
            f"was {list(table.shape)}"
        )
    base = embedding_table(embedding)
    own = table.to(device or base.device, dtype or base.dtype)
    if own.shape == base.shape and torch.equal(own, base.to(own.device, own.dtype)):
        return None
    return nn.Embedding.from_pretrained(own)
