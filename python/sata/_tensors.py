"""What NumPy and PyTorch have in common here: layouts, arguments, specs, warnings."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np

from ._native import Spec

#: Numbers of the types, as the compiled half counts them.
F32, F64, F16, BF16 = range(4)

#: What a layout calls its dimensions.
LAYOUTS = {
    "bhtd": "[batch, heads, tokens, dim]",
    "bthd": "[batch, tokens, heads, dim]",
    "htd": "[heads, tokens, dim]",
    "thd": "[tokens, heads, dim]",
}


class DenominatorWarning(RuntimeWarning):
    """Some queries' weights do not sum to a positive, finite number: their outputs are no averages.

    A series with an even number of Taylor terms takes negative values. Nothing is hidden or
    replaced; ``diagnostics=True`` says how many queries there are, and which is the first.
    """


def warn(found: Any) -> None:
    warnings.warn(f"attention: {found}", DenominatorWarning, stacklevel=4)


def check_layout(layout: str) -> int:
    """How many dimensions a layout has."""
    if layout not in LAYOUTS:
        names = ", ".join(repr(name) for name in LAYOUTS)
        raise ValueError(f"layout is {layout!r}, but it must be one of {names}")
    return len(layout)


def handed(address, shape, strides, layout):
    """A tensor as the compiled half takes it: address, [batch, heads, tokens, dim], strides."""
    if layout == "bhtd":
        a, b, c, d = shape
        return (address, a, b, c, d, strides[0], strides[1], strides[2])
    if layout == "bthd":
        a, c, b, d = shape
        return (address, a, b, c, d, strides[0], strides[2], strides[1])
    if layout == "htd":
        b, c, d = shape
        return (address, 1, b, c, d, 0, strides[0], strides[1])
    c, b, d = shape
    return (address, 1, b, c, d, 0, strides[1], strides[0])


def handed_gates(address, shape, strides, layout):
    """Gates likewise, which have no dim of their own."""
    return handed(address, (*shape, 1), (*strides, 1), layout)


def sizes(shape, layout):
    """Batch, heads, tokens of a shape."""
    if layout == "bhtd":
        return shape[0], shape[1], shape[2]
    if layout == "bthd":
        return shape[0], shape[2], shape[1]
    if layout == "htd":
        return 1, shape[0], shape[1]
    return 1, shape[1], shape[0]


@functools.lru_cache(maxsize=512)
def make_spec(d_key, d_value, terms, series, near, block, sinks, decay, scale) -> Spec:
    """A spec of an attention's arguments; those made lately are kept, with their plans."""
    # Coefficients and powers say themselves how many terms there are.
    implied = not isinstance(series, str) or series.startswith("power")
    return Spec(
        d_key,
        d_value,
        terms=None if implied and terms == 4 else terms,
        series=series if isinstance(series, str) else list(series),
        near=near,
        block=block,
        sinks=sinks,
        decay=decay,
        scale=scale,
    )


@functools.lru_cache(maxsize=512)
def spec_of_json(text: str) -> Spec:
    return Spec.from_json(text)


def hashable_series(series):
    """A series that specs can be kept by."""
    if isinstance(series, (str, tuple)):
        return series
    try:
        return tuple(float(a) for a in series)
    except TypeError:
        raise TypeError(
            f"series is of type {type(series).__name__}, but it must be a name or a sequence of "
            "coefficients"
        ) from None


def choose_spec(
    spec, state, d_key, d_value, terms, series, near, block, sinks, scale, has_slopes, has_gates
) -> Spec:
    """The spec of a call: the one that is given, the state's own, or that of the arguments."""
    if spec is not None:
        if not isinstance(spec, Spec):
            raise TypeError(f"spec is of type {type(spec).__name__}, but it must be a sata.Spec")
        return spec
    if type(series) is not str:
        series = hashable_series(series)
    if near is None:
        near = 0
    if state is not None:
        own = state.spec
        # What is left unsaid is the state's.
        if series == "taylor" and terms == 4 and near == 0 and block == 64 and sinks == 0:
            if scale is None:
                return own
            series, terms = own.series, own.terms
        elif series == "taylor":
            series = own.series
            terms = own.terms if terms == 4 else terms
        implied = not isinstance(series, str) or series.startswith("power")
        return make_spec(
            own.d_key,
            own.d_value,
            4 if implied and terms == own.terms else terms,
            series,
            own.near if near == 0 else near,
            own.block if block == 64 else block,
            own.sinks if sinks == 0 else sinks,
            own.decay,
            own.scale if scale is None else scale,
        )
    if has_slopes and has_gates:
        raise ValueError("slopes and log_gates are both given, but an attention has one decay")
    decay = "slopes" if has_slopes else "gates" if has_gates else None
    return make_spec(d_key, d_value, terms, series, near, block, sinks, decay, scale)


def list_of(x: Any) -> list:
    """The numbers of a tensor, array or sequence."""
    return x.tolist() if hasattr(x, "tolist") else list(x)


def packed_of(cu_seqlens: Any):
    """`cu_seqlens` as two lists, of queries and of keys: one for both, or a pair."""
    if cu_seqlens is None:
        return None
    try:
        is_pair = (
            isinstance(cu_seqlens, (tuple, list))
            and len(cu_seqlens) == 2
            and all(hasattr(part, "__len__") for part in cu_seqlens)
        )
        both = list(cu_seqlens) if is_pair else [cu_seqlens, cu_seqlens]
        lists = [list_of(part) for part in both]
    except TypeError:
        raise TypeError(
            f"cu_seqlens is of type {type(cu_seqlens).__name__}, but it must be a sequence of "
            "integers, or a pair of them for queries and keys"
        ) from None
    for numbers in lists:
        for n in numbers:
            if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
                raise TypeError(f"cu_seqlens holds {n!r}, but it must hold integers")
            if n < 0:
                raise ValueError(f"cu_seqlens holds {n}, but it must rise from 0")
    return [int(n) for n in lists[0]], [int(n) for n in lists[1]]


def slopes_of(slopes: Any):
    """`slopes` as a list of floats."""
    if slopes is None:
        return None
    shape = getattr(slopes, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"slopes has shape {tuple(shape)}, but it must be [kv_heads]")
    try:
        return [float(m) for m in list_of(slopes)]
    except (TypeError, ValueError):
        raise TypeError("slopes must be a sequence of numbers, one per key/value head") from None


def give(y, state, return_state, found, diagnostics):
    """What a call gives back: outputs, and then state and diagnostics where they were asked for."""
    if return_state:
        return (y, state, found) if diagnostics else (y, state)
    return (y, found) if diagnostics else y
