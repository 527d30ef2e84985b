"""PyTorch: the operation, and a layer."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ._call import attention
from ._native import Spec, alibi_slopes
from ._state import State
from ._tensors import make_spec
from ._torch import _traced

__all__ = ["TaylorAttention", "attention"]


class TaylorAttention(nn.Module):
    """Self-attention with its projections: the layer of the Rust crate ``sata-candle``.

    Weights have the same names and shapes as there: ``qkv.weight``
    ``[(heads + kv_heads)*d_key + kv_heads*d_value, width]`` (all queries, then keys, then values,
    head by head), ``out.weight`` ``[width, heads*d_value]``; with forget gates ``gate.weight``
    ``[kv_heads, width]`` and ``gate.bias`` ``[kv_heads]``; with q/k norms ``q_norm.weight`` and
    ``k_norm.weight`` ``[d_key]``. Slopes are ``sata.alibi_slopes``, not learnt.

    Args:
        width: Of what comes in and goes out.
        heads: Query heads.
        kv_heads: Key/value heads, of which ``heads`` is a multiple; as many where it is None.
        spec: What attention: a ``sata.Spec``. Where it is None, the next eight arguments say it.
        d_key: Elements of a key; ``width // heads`` where it is None.
        d_value: Elements of a value; ``d_key`` where it is None.
        terms: How many terms. Odd numbers of Taylor terms have positive weights only.
        series: See ``sata.attention``; trained are those whose coefficients are the same for all
            queries (``"taylor"``, ``"power:P"``, coefficients).
        near: What is exact: 0, ``"own"`` or n blocks before a query's own.
        block: Tokens in a block.
        sinks: First tokens that stay exact for ever.
        decay: ``"gates"`` (learnt forget gates), ``"slopes"`` (ALiBi) or None.
        qk_norm: RMS norms of each query and key, with learnt scales and this eps.
        rotary: Rotary embedding of queries and keys, with this base.
        is_causal: Whether a token sees only itself and those before it.
        device: Of the weights.
        dtype: Of the weights.

    Raises:
        ValueError: Sizes that do not fit each other.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: Optional[int] = None,
        *,
        spec: Optional[Spec] = None,
        d_key: Optional[int] = None,
        d_value: Optional[int] = None,
        terms: int = 3,
        series: Any = "taylor",
        near: int | str = 1,
        block: int = 64,
        sinks: int = 0,
        decay: Optional[str] = "gates",
        qk_norm: Optional[float] = None,
        rotary: Optional[float] = None,
        is_causal: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"heads is {heads}, but it must be a multiple of the {kv_heads} key/value heads"
            )
        if spec is None:
            if d_key is None:
                if width % heads:
                    raise ValueError(f"width is {width}, but d_key is not said for {heads} heads")
                d_key = width // heads
            if not isinstance(series, str):
                series = tuple(series)
            spec = make_spec(
                d_key, d_key if d_value is None else d_value, terms, series,
                near if is_causal else 0, block, sinks, decay, None,
            )
        d_key, d_value = spec.d_key, spec.d_value
        if rotary is not None and d_key % 2:
            raise ValueError(f"d_key is {d_key}, but it must be even for a rotary embedding")
        self.width, self.heads, self.kv_heads = width, heads, kv_heads
        self.d_key, self.d_value = d_key, d_value
        self.is_causal = is_causal
        self.rotary = rotary
        self.spec = spec
        self._decay = spec.decay
        self._json = spec.to_json()
        kind = {"device": device, "dtype": dtype}
        packed = (heads + kv_heads) * d_key + kv_heads * d_value
        self.qkv = nn.Linear(width, packed, bias=False, **kind)
        self.out = nn.Linear(heads * d_value, width, bias=False, **kind)
        self.gate = nn.Linear(width, kv_heads, **kind) if spec.decay == "gates" else None
        self.q_norm = nn.RMSNorm(d_key, eps=qk_norm, **kind) if qk_norm is not None else None
        self.k_norm = nn.RMSNorm(d_key, eps=qk_norm, **kind) if qk_norm is not None else None
        self._slopes = tuple(alibi_slopes(kv_heads)) if spec.decay == "slopes" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights: N(0, 0.02**2), and gates that forget little."""
        for linear in (self.qkv, self.out, self.gate):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, 3.0)

    def new_state(self, batch: int = 1, *, dtype: Any = None, device: Any = None) -> State:
        """An empty past for ``forward``: of ``batch`` sequences, like the weights."""
        weight = self.qkv.weight
        return State(
            self.spec,
            batch=batch,
            kv_heads=self.kv_heads,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
        )

    def _turned(self, x: Tensor, first: int) -> Tensor:
        """Rotary embedding of ``[batch, tokens, heads, d]``, the first token at ``first``."""
        half = self.d_key // 2
        at = torch.arange(half, device=x.device, dtype=torch.float64)
        turns = self.rotary ** (at * (-2.0 / self.d_key))
        places = torch.arange(x.shape[1], device=x.device, dtype=torch.float64) + first
        angles = places[:, None] * turns
        cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(
        self,
        x: Tensor,
        *,
        state: Optional[State] = None,
        key_mask: Optional[Tensor] = None,
        cu_seqlens: Optional[Tensor] = None,
    ) -> Tensor:
        """x ``[batch, tokens, width]`` to the same shape.

        With a state (of ``new_state``) the tokens follow its past, without gradients; its sequences
        must be of one length where there is a rotary embedding. ``key_mask`` ``[batch, tokens]`` and
        ``cu_seqlens`` as for ``sata.attention``; a rotary embedding counts on through packed
        sequences, which changes nothing but rounding.
        """
        batch, tokens, _ = x.shape
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv(x)
        q, k, v = qkv.split(
            [heads * self.d_key, kv_heads * self.d_key, kv_heads * self.d_value], dim=-1
        )
        q = q.view(batch, tokens, heads, self.d_key)
        k = k.view(batch, tokens, kv_heads, self.d_key)
        v = v.view(batch, tokens, kv_heads, self.d_value)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            first = state.positions[0] if state is not None else 0
            q, k = self._turned(q, first), self._turned(k, first)
        log_gates = None
        if self.gate is not None:
            log_gates = nn.functional.logsigmoid(self.gate(x).float())
        if state is not None:
            y = state.extend(
                q, k, v, slopes=self._slopes, log_gates=log_gates, key_mask=key_mask,
                cu_seqlens=cu_seqlens, layout="bthd",
            ) if self.is_causal else attention(
                q, k, v, slopes=self._slopes, log_gates=log_gates, key_mask=key_mask,
                cu_seqlens=cu_seqlens, layout="bthd", state=state,
            )
        elif torch.compiler.is_compiling():
            y = _traced(
                q, k, v, key_mask, cu_seqlens, self._slopes, log_gates, self._json, self.is_causal,
                "bthd",
            )
        else:
            y = attention(
                q, k, v, is_causal=self.is_causal, spec=self.spec, slopes=self._slopes,
                log_gates=log_gates, key_mask=key_mask, cu_seqlens=cu_seqlens, layout="bthd",
            )
        return self.out(y.reshape(batch, tokens, heads * self.d_value))

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, heads={self.heads}, kv_heads={self.kv_heads}, spec={self.spec!r}"
        )
