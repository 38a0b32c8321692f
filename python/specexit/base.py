"""The base model: an unmodified transformers decoder, driven over token trees.

While a `BaseModel` is attached, the model uses our attention function and forward pre-hooks read the inputs of a few
layers, the *features* that a draft conditions on. Detached, the model is as it was.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from specexit import attention
from specexit.attention import TreeContext, chain_context
from specexit.cache import LayerForm, SlotCache
from specexit.capture import Waits
from specexit_kernels import bits

_LOCKS: WeakKeyDictionary[PreTrainedModel, RLock] = WeakKeyDictionary()


class BaseModel:
    """A transformers causal language model and the layers whose inputs are its features.

    model           any model that passes `check_supported`
    feature_layers  indices of the layers whose inputs are read: of none where no draft reads them; None: EAGLE-3's
                    three, one low, one middle, one high
    """

    def __init__(self, model: PreTrainedModel, feature_layers: Sequence[int] | None = ()) -> None:
        check_supported(model)
        self.model = model
        self.lock = _LOCKS.setdefault(model, RLock())  # it can be attached to one batch at a time, whoever decodes
        self.config: PretrainedConfig = model.config.get_text_config(decoder=True)
        self.layers = decoder_layers(model)
        count = len(self.layers)
        self.feature_layers = (2, count // 2, count - 3) if feature_layers is None else tuple(feature_layers)
        for index in self.feature_layers:
            if not 0 <= index < count:
                raise ValueError(
                    f"feature_layers must be layers of the base (0 to {count - 1}), was {self.feature_layers}"
                )
        self._features: dict[int, Tensor] = {}  # by layer, of the last forward
        self._forms: list[LayerForm | None] = [None] * count  # of the layers' caches, as `probe` finds them in
        self._probed: torch.dtype | None = None  # this dtype of the model
        self._waits: set[str] = set()  # operations of its forward that wait for the device, as `probe` finds them
        self._check = True  # what the model gives the attention, in the first forward of an `attached` block
        self._can_leave_logits_out = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def feature_size(self) -> int:
        """n H: numbers that a position's features hold."""
        return len(self.feature_layers) * int(self.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """Positions before a rotary embedding changes for all of them at once (longrope), which makes the logits of a
        token depend on how far the forward reaches; None where it never does."""
        sizes = [
            parameters.get("original_max_position_embeddings") or self.config.original_max_position_embeddings
            for parameters in rope_parameters(self.config)
            if parameters.get("rope_type") == "longrope"
        ]
        return min(sizes, default=None)

    @property
    def slot_bytes(self) -> int:
        """Bytes that a position takes in the cache; 0 before `probe` has seen what the layers keep."""
        return sum(form.nbytes for form in self._forms if form is not None)

    @property
    def uncapturable(self) -> str | None:
        """Why a CUDA graph cannot hold the forward, as far as `probe` has seen; None: nothing speaks against it."""
        if not self._waits:
            return None
        reason = f"the forward of {type(self.model).__name__} waits for the device ({', '.join(sorted(self._waits))})"
        if getattr(self.config, "_experts_implementation", None) == "eager":
            reason += '; experts_implementation="grouped_mm" stays on the device, in bfloat16 on a recent GPU'
        return reason

    def new_cache(self, lengths: Tensor, slots: int) -> SlotCache:
        forms = self._forms
        if self.dtype != self._probed:  # the model has been cast since
            forms = [form and form._replace(dtype=self.dtype) for form in forms]
        return SlotCache(forms, lengths, slots)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Use our attention, in evaluation mode, and read features inside the block; restore the model after it,
        whatever happens."""
        attention.register()
        with evaluation_mode(self.model), attention_implementation(self.model, attention.NAME):
            handles = [
                self.layers[index].register_forward_pre_hook(partial(self._read_feature, index), with_kwargs=True)
                for index in set(self.feature_layers)
            ]
            self._check = True
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def forward(
        self, tokens: Tensor, context: TreeContext, cache: SlotCache, last_logits: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One pass over T nodes a row, whose keys and values go to the scratch slots. Inside `attached()`.

        tokens    [B, T] int32
        logits    [B, T, V]; with `last_logits` only the last node's, where the model can leave the others out
        features  [B, T, n H]: the inputs of the n feature layers side by side, in their order; n may be 0
        """
        self._features.clear()
        cache.begin()
        context.check, self._check = self._check, False
        options = {"logits_to_keep": 1} if last_logits and self._can_leave_logits_out else {}
        output = self.model(
            input_ids=tokens.long(),
            position_ids=context.positions.long(),
            attention_mask=context.visible.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
            specexit=context,
            **options,
        )
        # Taken now: a logits processor may run the model again.
        features = [self._features[index] for index in self.feature_layers]  # a layer may be named twice
        return output.logits, torch.cat(features, -1) if features else output.logits.new_empty(*tokens.shape, 0)

    def _read_feature(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._features[index] = args[0] if args else kwargs["hidden_states"]


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout inside the block, nor gradient checkpointing, which would leave the cache out."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let `model` use the attention called `name` inside the block.

    The setting lives in the configuration, which models may share, so the block works on a copy.
    """
    holders = [module for module in model.modules() if "config" in vars(module)]
    shared = {id(m.config): m.config for m in holders if isinstance(m, PreTrainedModel)}
    copies = {key: copy.deepcopy(config) for key, config in shared.items()}
    replaced = [(module, module.config) for module in holders if id(module.config) in copies]
    try:
        for module, config in replaced:
            module.config = copies[id(config)]
        model.set_attn_implementation(name)
        yield
    finally:
        for module, config in replaced:
            module.config = config


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    decoder = model.get_decoder()
    for name in ("layers", "h", "blocks"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(f"{type(model).__name__} cannot be driven: its decoder has no list of layers")


def check_supported(model: object) -> None:
    """Refuse, by name and reason, a model that the decoder cannot drive exactly. Raises TypeError or ValueError."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"base must be a transformers model, was {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    reason = None
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif not model.can_generate():
        reason = "it has no language-model head"
    elif getattr(model, "_is_stateful", False):
        reason = "it keeps a recurrent state, which cannot follow the branches of a tree"
    elif len({parameter.device for parameter in model.parameters()}) > 1:
        reason = "its layers are on several devices"
    elif not model._supports_attention_backend:
        reason = "transformers gives it no pluggable attention"
    else:
        other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if other:
            reason = f"it has layers of type {', '.join(sorted(other))}; full and sliding attention are supported"
        elif "dynamic" in rope_types(config):
            reason = "its rotary embedding is rescaled by the length reached so far (dynamic NTK)"
    if reason:
        raise ValueError(f"{type(model).__name__} is not supported: {reason}")


def rope_types(config: PretrainedConfig) -> set[str]:
    """The rotary embeddings that a model uses."""
    return {parameters.get("rope_type", "default") for parameters in rope_parameters(config)}


def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Those of each rotary embedding of a model; some have one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [nested for nested in parameters.values() if isinstance(nested, dict)] or [parameters]


def check_windows(base: BaseModel, given: Mapping[int, int | None]) -> None:
    """Refuse a model whose sliding window reaches its attention through a mask alone: we bring our own mask, and a text
    shorter than the window, as the probe's is, would not show it. Raises ValueError.

    given  by layer, the window that its attention was called with
    """
    config = base.config
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or getattr(config, "use_sliding_window", None) is False:
        return
    if window >= (getattr(config, "max_position_embeddings", None) or math.inf):
        return  # longer than any text
    for layer in range(len(base.layers)):
        if given.get(layer) is None and (types is None or types[layer] == "sliding_attention"):
            raise ValueError(
                f"{type(base.model).__name__} is not supported: the sliding window of {window} is not given to the "
                f"attention of layer {layer}"
            )


# How far the logits of a tree may lie from those of a linear forward, relative to the largest logit. A wrong mask or
# position moves them by tenths; rounding by less than this.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def probe(base: BaseModel) -> None:
    """Compare a small tree with a linear forward of the same tokens, so that a model which would silently ignore the
    tree is refused when it is loaded. Raises ValueError.

    A model in training mode is compared as it would be in evaluation mode.
    """
    model, device = base.model, base.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(base.vocab_size, (1, 12), generator=generator).to(device)
    # After eight tokens of prompt: 8 - 9 - 11 and 8 - 10, two branches from the root.
    prompt, nodes, branch = tokens[:, :8], tokens[:, 8:], [0, 1, 3]
    depth = torch.tensor([[0, 1, 1, 2]], dtype=torch.int32, device=device)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool, device=device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    with evaluation_mode(model):
        linear = model(torch.cat([prompt, nodes[:, branch]], 1), use_cache=False).logits[0, 8:]
    try:
        with base.attached():
            cache = base.new_cache(lengths, 16)
            first = chain_context(lengths, 8, start=0)
            base.forward(prompt, first, cache, last_logits=True)
            lengths += 8
            positions = lengths.unsqueeze(1) + depth
            context = TreeContext(lengths, positions, bits.pack(mask).unsqueeze(0), span=2)
            with Waits(device.type) as watch:
                logits, _ = base.forward(nodes, context, cache)
            tree = logits[0, branch]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as failure:
        raise ValueError(f"{type(model).__name__} is not supported: it fails over a token tree: {failure}") from failure
    check_windows(base, first.windows)
    base._forms, base._probed = cache.forms(), base.dtype
    base._waits = watch.found
    error = ((tree - linear).abs().max() / linear.abs().max()).item()
    if not error <= PROBE_TOLERANCE[linear.dtype]:
        raise ValueError(
            f"{type(model).__name__} is not supported: over a token tree its logits differ from those of a linear "
            f"forward by {error:.1e} of the largest (at most {PROBE_TOLERANCE[linear.dtype]:.0e} is rounding)"
        )
