"""The one function, for arrays and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._native import Spec
from ._state import State


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    is_causal: bool = False,
    terms: int = 4,
    series: Any = "taylor",
    near: int | str = 0,
    block: int = 64,
    sinks: int = 0,
    slopes: Any = None,
    log_gates: Any = None,
    scale: float | None = None,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    state: State | None = None,
    return_state: bool = False,
    layout: str = "bhtd",
    diagnostics: bool = False,
    spec: Spec | None = None,
) -> Any:
    """Attention whose cost per token does not grow with the context.

    Every query weighs the keys that are *near* by exp(x), x = scale * q.k, exactly, and all others
    by a short series in x, out of sums of a fixed size; both under one denominator.

    Args:
        q: Queries ``[batch, heads, tokens, d_key]``: a numpy.ndarray, or a torch.Tensor on the CPU
            or a CUDA device, of float32, float16, bfloat16, or (on the CPU) float64. Any strides;
            the last dimension must be contiguous. Nothing is copied.
        k: Keys ``[batch, kv_heads, keys, d_key]``. ``heads`` must be a multiple of ``kv_heads``:
            query head h reads key/value head h // (heads // kv_heads).
        v: Values ``[batch, kv_heads, keys, d_value]``.
        is_causal: Query t sees keys 0 to t, of which there must be as many as queries; otherwise
            every query sees all keys. With a state, both see all of its past as well.
        terms: How many terms the series has. Coefficients and powers say so themselves.
        series: ``"taylor"``, ``"gauss"``, ``"hermite"``, ``"hermite:TAU"``, ``"power:P"``,
            ``"power:P:FLOOR"``, or the coefficients of 1, x, x**2, ... as a sequence.
        near: What is exact, for causal calls: 0 for nothing, n >= 1 for a query's own block and the
            n blocks before it, ``"own"`` for its own block alone.
        block: Tokens in a block.
        sinks: First tokens that stay exact for ever.
        slopes: ALiBi slopes ``[kv_heads]``, each >= 0: weights fade by exp(-slope) per token. A
            sequence, array or tensor; differentiable as a tensor. See ``sata.alibi_slopes``.
        log_gates: Logarithms of forget gates, each <= 0, shaped as k without its last dimension
            (``[batch, kv_heads, keys]``); they are rounded to float32. Differentiable.
        scale: What q.k is multiplied by; 1/sqrt(d_key) where it is None.
        key_mask: Which keys exist, bool ``[batch, keys]``: False marks padding. A query that sees no
            key gives NaN.
        cu_seqlens: Sequences of different lengths side by side in a batch of one: their ends as
            integers rising from 0, one more than sequences; or a pair of such, for queries and keys.
        state: A past to continue from; it is moved on by this call's keys. Options left as they
            are are then the state's own. Such calls have no gradients.
        return_state: Whether the state is given back: the one that was passed, or a new one.
        layout: ``"bhtd"``, ``"bthd"``, or without a batch ``"htd"``, ``"thd"``: of q, k, v, the
            output and (without d) of log_gates.
        diagnostics: Whether a ``Diagnostics`` is given back. Without it, denominators that are not
            positive and finite bring a ``DenominatorWarning`` on the CPU (a CUDA device is not
            waited for).
        spec: A ``Spec`` in place of terms, series, near, block, sinks and scale.

    Returns:
        Outputs like q with ``d_value`` in place of ``d_key``; or a tuple of outputs, then the
        state, then the diagnostics, of which were asked for.

    Raises:
        ValueError: Shapes, sizes, devices or numbers that do not fit, naming the argument and its
            shape; NaN or infinity in an argument (on CUDA devices only with ``diagnostics``).
        TypeError: Arguments of other types, mixed types of numbers.
        RuntimeError: What is not supported (``NotImplementedError``), a state of another device
            or type, no GPU, what a device reports.
    """
    if state is not None and not isinstance(state, State):
        raise TypeError(f"state is of type {type(state).__name__}, but it must be a sata.State")
    if isinstance(q, np.ndarray):
        from ._numpy import attention as run
    else:
        run = _tensors_attention(q)
    return run(
        q, k, v, is_causal, terms, series, near, block, sinks, slopes, log_gates, scale, key_mask,
        cu_seqlens, state, return_state, layout, diagnostics, spec,
    )


def _tensors_attention(q):
    try:
        from . import _torch
    except ImportError:
        _torch = None
    if _torch is None or not _torch.is_tensor(q):
        raise TypeError(
            f"q is of type {type(q).__name__}, but it must be a numpy.ndarray or a torch.Tensor"
        )
    return _torch.attention
