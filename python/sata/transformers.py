"""Hugging Face transformers: an attention for models as they are, and a cache of fixed size.

    sata.transformers.register(near=3, sinks=4)
    model.set_attn_implementation("sata")
    model.generate(**inputs, cache=sata.transformers.StateCache())

(Older versions of transformers call a cache ``past_key_values``.)

Rotary embeddings are applied by the model before attention sees queries and keys, so that states
keep rotated keys.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)

from ._native import Spec
from ._state import State
from ._tensors import hashable_series, make_spec
from ._torch import attention as _attention

__all__ = ["StateCache", "StateLayer", "register"]


class StateLayer(CacheLayerMixin):
    """One layer of a ``StateCache``: a ``sata.State``, made at the first tokens."""

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.state: Optional[State] = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, *arguments: Any) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Keeps nothing: attention takes the new keys and values into the state."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        # How attention finds the past that these keys follow.
        key_states._sata_layer = self
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self, *arguments: Any) -> int:
        return self.length

    def get_mask_sizes(self, query_length: Any, *arguments: Any) -> tuple[int, int]:
        if isinstance(query_length, Tensor):
            query_length = query_length.shape[0]
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        if self.state is not None:
            self.state.reset()
        self.length = 0

    def _refuse(self, what: str) -> None:
        raise NotImplementedError(f"a state cannot {what}: it is no list of tokens")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._refuse("be reordered, which beam search needs")

    def crop(self, max_length: int) -> None:
        self._refuse("take tokens back")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse("be repeated")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse("select sequences")

    def offload(self) -> None:
        self._refuse("be offloaded")

    def prefetch(self) -> None:
        self._refuse("be prefetched")


class StateCache(Cache):
    """A cache whose size does not grow: one ``sata.State`` per layer.

    Give it as ``cache`` (``past_key_values`` in older
    versions of transformers) to a model, or to ``generate``, whose attention is one that
    ``register`` added. It continues from where it is, so that a prompt can be read once and
    ``fork`` taken of it.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=StateLayer)

    @property
    def nbytes(self) -> int:
        """Bytes of all states; the same at any length."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)

    def fork(self) -> StateCache:
        """An independent copy."""
        copy = StateCache()
        for layer in self.layers:
            other = StateLayer()
            other.__dict__.update(layer.__dict__)
            other.state = None if layer.state is None else layer.state.fork()
            copy.layers.append(other)
        return copy

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a file per layer, ``layer-0000.safetensors`` and so on, into a folder.

        Raises:
            OSError: What the system refuses.
            ValueError: A cache that has seen nothing yet.
        """
        folder = pathlib.Path(folder)
        if not self.layers or any(layer.state is None for layer in self.layers):
            raise ValueError("the cache has seen no tokens yet")
        folder.mkdir(parents=True, exist_ok=True)
        for number, layer in enumerate(self.layers):
            layer.state.save(folder / f"layer-{number:04}.safetensors")
        for old in folder.glob("layer-*.safetensors"):
            if int(old.stem.removeprefix("layer-")) >= len(self.layers):
                old.unlink()

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: Any = "cpu") -> StateCache:
        """Reads what ``save`` wrote.

        Raises:
            OSError: What the system refuses; no such folder.
            ValueError: Files that are altered, or do not belong together.
        """
        cache = cls()
        paths = sorted(pathlib.Path(folder).glob("layer-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no layer-*.safetensors")
        for number, path in enumerate(paths):
            if path.name != f"layer-{number:04}.safetensors":
                raise ValueError(f"{folder} lacks layer-{number:04}.safetensors")
            layer = StateLayer()
            layer.state = State.load(path, device=device)
            layer.length = layer.state.positions[0]
            layer.dtype = getattr(torch, layer.state.dtype)
            layer.device = torch.device("cpu" if device == "emulated" else device)
            layer.is_initialized = True
            cache.layers.append(layer)
        lengths = {layer.length for layer in cache.layers}
        if len(lengths) > 1:
            raise ValueError(f"{folder} holds layers of different lengths {sorted(lengths)}")
        return cache


def _mask(
    *arguments: Any, mask_function: Any = None, attention_mask: Optional[Tensor] = None,
    **options: Any,
) -> Optional[Tensor]:
    """Which keys exist, ``[batch, keys]``, or None: what attention itself knows is not written out."""
    if mask_function not in (None, causal_mask_function, bidirectional_mask_function):
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise NotImplementedError(
            f"the model masks by {name}, but sata attention is causal or sees everything"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def _forward(options: dict[str, Any]):
    """The attention function of some options, as transformers calls it."""

    def sata_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor],
        dropout: float = 0.0,
        scaling: Optional[float] = None,
        is_causal: Optional[bool] = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        for name in ("softcap", "s_aux", "position_bias", "head_mask", "sliding_window"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"the model's attention has {name}, sata's has not")
        if dropout:
            raise NotImplementedError(
                f"the model's attention has dropout {dropout}, but sata has no weights to drop"
            )
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        keys, queries = key.shape[2], query.shape[2]
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise NotImplementedError(
                    f"attention_mask has shape {list(attention_mask.shape)}, but it must be "
                    "[batch, tokens]: which keys exist"
                )
            # Those of the past are in the state.
            attention_mask = attention_mask[:, -keys:].bool()
        layer = getattr(key, "_sata_layer", None)
        state = None if layer is None else layer.state
        if layer is None and is_causal and queries != keys:
            raise RuntimeError(
                f"{queries} queries came with {keys} keys out of another cache: give the model "
                "cache=sata.transformers.StateCache() (past_key_values= in older transformers)"
            )
        spec = make_spec(
            query.shape[-1],
            value.shape[-1],
            options["terms"],
            options["series"],
            options["near"] if is_causal else 0,
            options["block"],
            options["sinks"],
            None,
            scaling,
        )
        if layer is not None and state is None:
            from . import _torch

            state = layer.state = State(
                spec,
                batch=key.shape[0],
                kv_heads=key.shape[1],
                dtype=key.dtype,
                device="emulated" if _torch._emulate else key.device,
            )
        rows = [x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
                for x in (query, key, value)]
        y = _attention(
            *rows, is_causal, 4, "taylor", 0, 64, 0, None, None, None, attention_mask, None, state,
            False, "bhtd", False, spec, attention_mask is not None,
        )
        if attention_mask is not None and is_causal:
            # Padding on the left sees no key: nobody reads what it answers, but it must be numbers.
            y = torch.where(attention_mask[:, None, :, None], y, 0)
        return y.transpose(1, 2), None

    return sata_attention


def register(
    name: str = "sata",
    *,
    terms: int = 2,
    series: Any = "gauss",
    near: int | str = 3,
    block: int = 64,
    sinks: int = 4,
    spec: Optional[Spec] = None,
) -> None:
    """Adds ``attn_implementation=name`` to transformers.

    Models as they are then run with it: ``from_pretrained(..., attn_implementation=name)`` or
    ``model.set_attn_implementation(name)``; causal ones also with a ``StateCache``. Several names
    can stand for several options, and a name can be registered anew.

    Args:
        name: What models call it.
        terms: How many terms; see ``sata.attention`` for this and the next four.
        series: The default, ``"gauss"``, is for models that were trained with softmax and has no
            gradients; train with ``"taylor"`` and an odd number of terms.
        near: Blocks that stay exact in causal attention. Attention that is not causal has no order,
            and so nothing near.
        block: Tokens in a block.
        sinks: First tokens that stay exact for ever, in both.
        spec: A ``Spec`` whose options are taken in place of these; its sizes are the model's own.

    Raises:
        ValueError: Options that no spec has.
    """
    if spec is not None:
        terms, series, near = spec.terms, spec.series, spec.near
        block, sinks = spec.block, spec.sinks
    series = hashable_series(series)
    # Wrong options are told here, not in the middle of a model.
    of_any = make_spec(2, 2, terms, series, near, block, sinks, None, None)
    options = {
        "terms": of_any.terms, "series": series, "near": near, "block": block, "sinks": sinks,
    }
    AttentionInterface.register(name, _forward(options))
    AttentionMaskInterface.register(name, _mask)
