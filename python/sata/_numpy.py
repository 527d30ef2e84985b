"""Attention of NumPy arrays, on the CPU."""

from __future__ import annotations

import numpy as np

from . import _native
from ._tensors import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    check_layout,
    choose_spec,
    give,
    handed,
    handed_gates,
    packed_of,
    sizes,
    slopes_of,
    warn,
)

_CODES = {np.dtype(np.float32): F32, np.dtype(np.float64): F64, np.dtype(np.float16): F16}


def code_of(name: str, x: np.ndarray) -> int:
    code = _CODES.get(x.dtype)
    if code is not None:
        return code
    if x.dtype.name == "bfloat16" and x.dtype.itemsize == 2:
        return BF16
    raise TypeError(
        f"{name} with shape {x.shape} has dtype {x.dtype}, but it must be float32, float64, "
        "float16 or bfloat16, in this machine's byte order"
    )


def check(name: str, x, layout: str, dims: int, dtype) -> None:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} is of type {type(x).__name__}, but q is a numpy.ndarray")
    if x.ndim != dims:
        raise ValueError(f"{name} has shape {x.shape}, but layout {layout!r} is {LAYOUTS[layout]}")
    if x.dtype != dtype:
        raise TypeError(f"{name} with shape {x.shape} has dtype {x.dtype}, but q has {dtype}")


def tensor(name: str, x: np.ndarray, layout: str):
    size = x.itemsize
    flags = x.flags
    if flags.c_contiguous and flags.aligned and x.size:
        return handed(x.ctypes.data, x.shape, [s // size for s in x.strides], layout)
    if x.size == 0:
        return handed(0, x.shape, (0,) * x.ndim, layout)
    if x.shape[-1] > 1 and x.strides[-1] != size:
        raise ValueError(
            f"{name} has shape {x.shape} and strides {x.strides} in bytes, but its last dimension "
            "must be contiguous"
        )
    if not flags.aligned or any(n > 1 and s % size for n, s in zip(x.shape, x.strides)):
        raise ValueError(
            f"{name} has shape {x.shape} and strides {x.strides} in bytes, but its elements must "
            "lie at multiples of their size"
        )
    return handed(x.ctypes.data, x.shape, [s // size for s in x.strides], layout)


def gates_of(log_gates, layout: str, dims: int) -> np.ndarray:
    gates = np.asarray(log_gates)
    if gates.dtype.kind not in "fiu":
        raise TypeError(f"log_gates has dtype {gates.dtype}, but it must hold numbers")
    if gates.ndim != dims - 1:
        wants = LAYOUTS[layout].replace(", dim", "").replace("heads", "kv_heads")
        raise ValueError(f"log_gates has shape {gates.shape}, but it must be {wants}")
    return np.ascontiguousarray(gates, dtype=np.float32)


def mask_of(key_mask, batch: int, keys: int) -> np.ndarray:
    mask = np.asarray(key_mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"key_mask with shape {mask.shape} has dtype {mask.dtype}, not bool")
    if mask.shape != (batch, keys) and not (batch == 1 and mask.shape == (keys,)):
        raise ValueError(f"key_mask has shape {mask.shape}, but it must be {(batch, keys)}")
    return np.ascontiguousarray(mask).reshape(batch, keys)


def attention(
    q, k, v, is_causal, terms, series, near, block, sinks, slopes, log_gates, scale, key_mask,
    cu_seqlens, state, return_state, layout, diagnostics, spec,
):
    dims = check_layout(layout)
    code = code_of("q", q)
    check("q", q, layout, dims, q.dtype)
    check("k", k, layout, dims, q.dtype)
    check("v", v, layout, dims, q.dtype)
    spec = choose_spec(
        spec, state, q.shape[-1], v.shape[-1], terms, series, near, block, sinks, scale,
        slopes is not None, log_gates is not None,
    )
    packed = None if cu_seqlens is None else packed_of(cu_seqlens)
    batch, kv_heads, keys = sizes(k.shape, layout)
    mask = gates = None
    if key_mask is not None:
        key_mask = mask_of(key_mask, batch, keys)
        mask = (key_mask.ctypes.data, batch, keys, keys)
    if log_gates is not None:
        log_gates = gates_of(log_gates, layout, dims)
        strides = [s // 4 for s in log_gates.strides]
        gates = handed_gates(log_gates.ctypes.data, log_gates.shape, strides, layout)
    if state is None and return_state:
        from ._state import State

        sequences = len(packed[0]) - 1 if packed else batch
        state = State(
            spec, batch=sequences, kv_heads=kv_heads, dtype="float64" if code == F64 else "float32"
        )
    y = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    found = _native.forward(
        spec,
        code,
        tensor("q", q, layout),
        tensor("k", k, layout),
        tensor("v", v, layout),
        tensor("out", y, layout),
        is_causal,
        mask,
        packed,
        None if slopes is None else slopes_of(slopes),
        gates,
        None if state is None else state._native,
        diagnostics,
        None,
    )
    if found is not None and not diagnostics:
        warn(found)
    return give(y, state, return_state, found, diagnostics)
