"""Attention of torch tensors: called at once where nothing watches, else an operation of torch."""

from __future__ import annotations

import inspect
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _native
from ._checks import (
    CODES,
    check_gates,
    check_mask,
    check_tensors,
    refuse_non_finite,
    refuse_tangents,
)
from ._state import State
from ._tensors import (
    LAYOUTS,
    choose_spec,
    give,
    handed,
    handed_gates,
    make_spec,
    packed_of,
    sizes,
    slopes_of,
    spec_of_json,
    warn,
)

_PLAIN = (Tensor, torch.nn.Parameter)

# Tests send tensors of the CPU to the emulator of GPU kernels by this.
_emulate = False


def is_tensor(x) -> bool:
    return isinstance(x, Tensor)


# The compiled half


def _quick(q, k, v, layout: str):
    """q, k and v as the compiled half takes them, if they are plain and nothing is wrong with them.

    What `check_tensors` looks at, in as few steps as can be: small calls are made of this.
    """
    if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN:
        return None
    dtype = q.dtype
    if k.dtype is not dtype or v.dtype is not dtype or dtype not in CODES:
        return None
    if not (q.is_cpu and k.is_cpu and v.is_cpu):
        if not (q.is_cuda and k.device == q.device == v.device and dtype is not torch.float64):
            return None
    try:
        of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    except RuntimeError:
        return None
    if not len(of_q) == len(of_k) == len(of_v) == len(layout):
        return None
    if of_q[-1] != 1 or of_k[-1] != 1 or of_v[-1] != 1:
        return None
    if q.is_neg() or k.is_neg() or v.is_neg():
        return None
    return (
        handed(q.data_ptr(), q.shape, of_q, layout),
        handed(k.data_ptr(), k.shape, of_k, layout),
        handed(v.data_ptr(), v.shape, of_v, layout),
    )


def _tensor(x: Tensor, layout: str):
    return handed(x.data_ptr(), x.shape, x.stride(), layout)


def _stream(ordinal: int) -> int:
    return torch.cuda.current_stream(ordinal).cuda_stream


# The same, without making an object of it, where torch has that.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _stream)


def _place(q: Tensor):
    if q.device.type == "cpu":
        return (_native.EMULATED, 0) if _emulate else None
    ordinal = q.get_device()
    return (ordinal, _raw_stream(ordinal))


def _forward(
    q, k, v, key_mask, packed, slopes, log_gates, spec, is_causal, layout, state, diagnostics,
    quick=None,
):
    """Outputs, and what was noticed."""
    if quick is None:
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
        quick = _tensor(q, layout), _tensor(k, layout), _tensor(v, layout)
    mask = gates = None
    if key_mask is not None:
        if key_mask.shape[-1] > 1 and key_mask.stride(-1) != 1:
            key_mask = key_mask.contiguous()
        mask = (key_mask.data_ptr(), *key_mask.shape, key_mask.stride(0))
    if log_gates is not None:
        log_gates = log_gates.detach().to(torch.float32).resolve_neg()
        gates = handed_gates(log_gates.data_ptr(), log_gates.shape, log_gates.stride(), layout)
    d_value = v.shape[-1]
    if d_value == q.shape[-1] and q.is_contiguous():
        y = torch.empty_like(q)
    else:
        y = q.new_empty((*q.shape[:-1], d_value))
    found = _native.forward(
        spec,
        CODES[q.dtype],
        *quick,
        handed(y.data_ptr(), y.shape, y.stride(), layout),
        is_causal,
        mask,
        packed,
        slopes,
        gates,
        state,
        diagnostics,
        _place(q),
    )
    return y, found


def _rows(x: Tensor) -> Tensor:
    """With rows that are contiguous, and computed."""
    x = x.resolve_neg()
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _backward(
    dy, q, k, v, key_mask, packed, slopes, log_gates, spec, is_causal, layout, want_slopes,
    want_gates,
):
    """dq, dk, dv, and those of slopes (a list) and gates where they are wanted."""
    dtype = q.dtype
    place = _place(q)
    if place is None and dtype in (torch.float16, torch.bfloat16):
        # On the CPU gradients are taken in float32.
        dy, q, k, v = (x.to(torch.float32) for x in (dy, q, k, v))
    dy, q, k, v = _rows(dy), _rows(q), _rows(k), _rows(v)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    mask = gates = d_log_gates = d_gates = None
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        mask = (key_mask.data_ptr(), *key_mask.shape, key_mask.stride(0))
    if log_gates is not None:
        log_gates = log_gates.to(torch.float32).resolve_neg()
        gates = handed_gates(log_gates.data_ptr(), log_gates.shape, log_gates.stride(), layout)
        if want_gates:
            of = q.dtype if place is None else torch.float32
            d_log_gates = torch.empty(log_gates.shape, dtype=of, device=q.device)
            d_gates = handed_gates(
                d_log_gates.data_ptr(), d_log_gates.shape, d_log_gates.stride(), layout
            )
    d_slopes = _native.backward(
        spec,
        CODES[q.dtype],
        _tensor(q, layout),
        _tensor(k, layout),
        _tensor(v, layout),
        _tensor(dy, layout),
        _tensor(dq, layout),
        _tensor(dk, layout),
        _tensor(dv, layout),
        is_causal,
        mask,
        packed,
        slopes,
        want_slopes,
        gates,
        d_gates,
        place,
    )
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), d_slopes, d_log_gates


# The operation of torch


def _packed(cu_queries: Optional[Tensor], cu_keys: Optional[Tensor]):
    if cu_queries is None:
        return None
    return packed_of((cu_queries, cu_queries if cu_keys is None else cu_keys))



# Graphs of CUDA cannot hold what waits for copies; strides are to be as they came.
_TAGS = {}
if "tags" in inspect.signature(torch.library.custom_op).parameters:
    names = ("cudagraph_unsafe", "needs_exact_strides")
    _TAGS["tags"] = [getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name)]


@torch.library.custom_op("sata::attention", mutates_args=(), **_TAGS)
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Optional[Tensor],
    cu_queries: Optional[Tensor],
    cu_keys: Optional[Tensor],
    slopes: Optional[Tensor],
    log_gates: Optional[Tensor],
    spec: str,
    is_causal: bool,
    layout: str,
) -> Tensor:
    check_tensors(q, k, v, layout)
    y, found = _forward(
        q,
        k,
        v,
        key_mask,
        _packed(cu_queries, cu_keys),
        slopes_of(slopes),
        log_gates,
        spec_of_json(spec),
        is_causal,
        layout,
        None,
        False,
    )
    if found is not None:
        warn(found)
    return y


@attention_op.register_fake
def _(q, k, v, key_mask, cu_queries, cu_keys, slopes, log_gates, spec, is_causal, layout):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("sata::attention_backward", mutates_args=(), **_TAGS)
def attention_backward_op(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Optional[Tensor],
    cu_queries: Optional[Tensor],
    cu_keys: Optional[Tensor],
    slopes: Optional[Tensor],
    log_gates: Optional[Tensor],
    spec: str,
    is_causal: bool,
    layout: str,
    want_slopes: bool,
    want_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, d_slopes, d_gates = _backward(
        dy,
        q,
        k,
        v,
        key_mask,
        _packed(cu_queries, cu_keys),
        slopes_of(slopes),
        log_gates,
        spec_of_json(spec),
        is_causal,
        layout,
        want_slopes,
        want_gates,
    )
    none = q.new_empty(0)
    if d_slopes is not None:
        d_slopes = torch.tensor(d_slopes, dtype=slopes.dtype, device=slopes.device)
    if d_gates is not None:
        d_gates = d_gates.to(log_gates.dtype)
    return (
        dq,
        dk,
        dv,
        none if d_slopes is None else d_slopes,
        (q.new_empty(0) if d_gates is None else d_gates),
    )


@attention_backward_op.register_fake
def _(
    dy, q, k, v, key_mask, cu_queries, cu_keys, slopes, log_gates, spec, is_causal, layout,
    want_slopes, want_gates,
):
    def like(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return (
        like(q),
        like(k),
        like(v),
        like(slopes) if want_slopes and slopes is not None else q.new_empty(0),
        like(log_gates) if want_gates and log_gates is not None else q.new_empty(0),
    )


def _setup(ctx, inputs, output):
    q, k, v, key_mask, cu_queries, cu_keys, slopes, log_gates, spec, is_causal, layout = inputs
    ctx.save_for_backward(q, k, v, key_mask, cu_queries, cu_keys, slopes, log_gates)
    ctx.spec, ctx.is_causal, ctx.layout = spec, is_causal, layout


def _gradients(ctx, dy, reverse=None):
    # Asked for once: hooks of checkpoints take no more.
    saved = ctx.saved_tensors
    slopes, log_gates = saved[6:]
    want_slopes = slopes is not None and ctx.needs_input_grad[6]
    want_gates = log_gates is not None and ctx.needs_input_grad[7]
    reverse = attention_backward_op if reverse is None else reverse
    dq, dk, dv, d_slopes, d_gates = reverse(
        dy, *saved, ctx.spec, ctx.is_causal, ctx.layout, want_slopes, want_gates
    )
    return (
        dq,
        dk,
        dv,
        None,
        None,
        None,
        d_slopes if want_slopes else None,
        d_gates if want_gates else None,
        None,
        None,
        None,
    )


attention_op.register_autograd(_gradients, setup_context=_setup)


def _no_double(ctx, *grads):
    raise NotImplementedError(
        "double backward through sata.attention is not supported: its gradients have none"
    )


attention_backward_op.register_autograd(_no_double)


class _Eager(torch.autograd.Function):
    """The operation where nothing watches: it costs a tenth of what torch's own way to it does."""

    @staticmethod
    def forward(ctx, q, k, v, options, key_mask=None, slopes=None, log_gates=None):
        packed, spec, is_causal, layout, quick, quiet = options
        of_slopes = None if slopes is None else slopes_of(slopes)
        y, found = _forward(
            q, k, v, key_mask, packed, of_slopes, log_gates, spec, is_causal, layout, None, False,
            quick,
        )
        if found is not None and not quiet:
            warn(found)
        if key_mask is slopes is log_gates is None:
            ctx.save_for_backward(q, k, v)
        else:
            ctx.save_for_backward(q, k, v, key_mask, slopes, log_gates)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        # Asked for once: hooks of checkpoints take no more.
        saved = ctx.saved_tensors
        q, k, v = saved[:3]
        key_mask, slopes, log_gates = saved[3:] or (None, None, None)
        packed, spec, is_causal, layout, _, _ = ctx.options
        want_slopes = slopes is not None and ctx.needs_input_grad[5]
        want_gates = log_gates is not None and ctx.needs_input_grad[6]
        if torch.is_grad_enabled():
            # A graph of gradients is wanted: the operation says that they have none.
            ends = (None, None) if packed is None else tuple(torch.tensor(x) for x in packed)
            dq, dk, dv, d_slopes, d_gates = attention_backward_op(
                dy, q, k, v, key_mask, *ends, slopes, log_gates, spec.to_json(), is_causal, layout,
                want_slopes, want_gates,
            )
        else:
            of_slopes = None if slopes is None else slopes_of(slopes)
            dq, dk, dv, d_slopes, d_gates = _backward(
                dy, q, k, v, key_mask, packed, of_slopes, log_gates, spec, is_causal, layout,
                want_slopes, want_gates,
            )
            if want_slopes:
                d_slopes = torch.tensor(d_slopes, dtype=slopes.dtype, device=slopes.device)
            if want_gates:
                d_gates = d_gates.to(log_gates.dtype)
        return (
            dq, dk, dv, None, None, d_slopes if want_slopes else None,
            d_gates if want_gates else None,
        )


# Past what torch's own way to it does for classes and transforms that this is not, which takes longer
# than all else of a small call.
_eager = super(torch.autograd.Function, _Eager).apply


class _Transformed(torch.autograd.Function):
    """The operation under torch.func, which takes no other gradients than those of such a class."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return attention_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy, _TransformedBackward.apply)


class _TransformedBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return attention_backward_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        return _no_double(ctx, *grads)


# The function


@torch.compiler.assume_constant_result
def _json(d_key, d_value, terms, series, near, block, sinks, decay, scale):
    return make_spec(d_key, d_value, terms, series, near, block, sinks, decay, scale).to_json()


_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.maybe_current_level
_tracing = torch._C._get_tracing_state


def _is_seen() -> bool:
    """Whether torch must see the operation: for transforms, modes, forward gradients, tracing."""
    return (
        _modes() > 0
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or _tracing() is not None
    )


def _is_watched(q, k, v) -> bool:
    """The same, also for the tensors' own sake."""
    return (
        type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or q.device.type == "meta"
        or _is_seen()
    )


def _needs_gradient(q, k, v, slopes, log_gates) -> bool:
    if not torch.is_grad_enabled():
        return False
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (isinstance(slopes, Tensor) and slopes.requires_grad)
        or (log_gates is not None and log_gates.requires_grad)
    )


def _as_slopes(slopes) -> Optional[Tensor]:
    if slopes is None or isinstance(slopes, Tensor):
        return slopes
    return torch.tensor(slopes_of(slopes), dtype=torch.float64)


def _ends(cu_seqlens):
    """For the operation: two tensors."""
    if cu_seqlens is None:
        return None, None
    if isinstance(cu_seqlens, Tensor):
        return cu_seqlens, None
    if (
        isinstance(cu_seqlens, (tuple, list))
        and len(cu_seqlens) == 2
        and isinstance(cu_seqlens[0], Tensor)
        and isinstance(cu_seqlens[1], Tensor)
    ):
        return cu_seqlens[0], cu_seqlens[1]
    queries, keys = packed_of(cu_seqlens)
    return torch.tensor(queries), torch.tensor(keys)


def _autocast(q, k, v):
    kind = q.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if q.dtype != torch.float64:
            q, k, v = (
                x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
                for x in (q, k, v)
            )
    return q, k, v


def _traced(q, k, v, key_mask, cu_seqlens, slopes, log_gates, spec, is_causal, layout):
    """The operation, in a graph."""
    q, k, v = _autocast(q, k, v)
    dims = check_tensors(q, k, v, layout)
    batch, _, keys = sizes(k.shape, layout)
    if key_mask is not None:
        key_mask = check_mask(key_mask, q, batch, keys)
    if log_gates is not None:
        log_gates = check_gates(log_gates, q, k, layout)
    del dims
    cu_queries, cu_keys = _ends(cu_seqlens)
    inputs = (
        q, k, v, key_mask, cu_queries, cu_keys, _as_slopes(slopes), log_gates, spec, is_causal,
        layout,
    )
    if not torch.compiler.is_compiling() and _transforms() is not None:
        return _Transformed.apply(*inputs)
    return attention_op(*inputs)


def attention(
    q, k, v, is_causal, terms, series, near, block, sinks, slopes, log_gates, scale, key_mask,
    cu_seqlens, state, return_state, layout, diagnostics, spec, quiet=False,
):
    if torch.compiler.is_compiling():
        if state is None and not return_state and not diagnostics and spec is None:
            if not isinstance(series, str):
                series = tuple(series)
            if slopes is not None and log_gates is not None:
                raise ValueError("slopes and log_gates are both given, but there is one decay")
            decay = None if slopes is None else "slopes"
            decay = decay if log_gates is None else "gates"
            text = _json(
                int(q.shape[-1]), int(v.shape[-1]), terms, series, near, block, sinks, decay, scale
            )
            return _traced(q, k, v, key_mask, cu_seqlens, slopes, log_gates, text, is_causal, layout)
        return _outside_graphs(
            q, k, v, is_causal, terms, series, near, block, sinks, slopes, log_gates, scale,
            key_mask, cu_seqlens, state, return_state, layout, diagnostics, spec, quiet,
        )
    if torch._C._is_any_autocast_enabled() and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = _autocast(q, k, v)
    quick = _quick(q, k, v, layout) if layout in LAYOUTS and not _is_seen() else None
    if quick is None:
        check_tensors(q, k, v, layout)
    spec = choose_spec(
        spec, state, q.shape[-1], v.shape[-1], terms, series, near, block, sinks, scale,
        slopes is not None, log_gates is not None,
    )
    if key_mask is not None:
        batch, _, keys = sizes(k.shape, layout)
        key_mask = check_mask(key_mask, q, batch, keys)
    if log_gates is not None:
        log_gates = check_gates(log_gates, q, k, layout)
    with_state = state is not None or return_state
    needs_gradient = _needs_gradient(q, k, v, slopes, log_gates)
    if with_state and needs_gradient:
        raise RuntimeError(
            "a call with a state has no gradients, but an argument requires them: call it under "
            "torch.no_grad(), or detach q, k and v"
        )
    if forward_ad._current_level >= 0:
        refuse_tangents(q=q, k=k, v=v, slopes=slopes, log_gates=log_gates)
    if needs_gradient or (quick is None and _is_watched(q, k, v)):
        if with_state:
            raise RuntimeError("a call with a state cannot be traced or transformed")
        if quick is not None:
            packed = None if cu_seqlens is None else packed_of(cu_seqlens)
            options = packed, spec, is_causal, layout, quick, quiet
            if key_mask is slopes is log_gates is None:
                y = _eager(q, k, v, options)
            else:
                y = _eager(q, k, v, options, key_mask, _as_slopes(slopes), log_gates)
        else:
            y = _traced(
                q, k, v, key_mask, cu_seqlens, slopes, log_gates, spec.to_json(), is_causal, layout
            )
        if not diagnostics:
            return y
        with torch.no_grad():
            found = _found(
                q, k, v, key_mask, packed_of(cu_seqlens), slopes, log_gates, spec, is_causal, layout
            )
        return y, found
    packed = None if cu_seqlens is None else packed_of(cu_seqlens)
    if state is None and return_state:
        batch, kv_heads, _ = sizes(k.shape, layout)
        sequences = len(packed[0]) - 1 if packed else batch
        device = "emulated" if _emulate else q.device
        state = State(spec, batch=sequences, kv_heads=kv_heads, dtype=q.dtype, device=device)
    y, found = _forward(
        q, k, v, key_mask, packed, None if slopes is None else slopes_of(slopes), log_gates, spec,
        is_causal, layout, None if state is None else state._native, diagnostics, quick,
    )
    if found is not None:
        if diagnostics:
            refuse_non_finite(found, q=q, k=k, v=v, log_gates=log_gates)
        elif not quiet:
            warn(found)
    return give(y, state, return_state, found, diagnostics)


def _found(q, k, v, key_mask, packed, slopes, log_gates, spec, is_causal, layout):
    _, found = _forward(
        q.detach(), k.detach(), v.detach(), key_mask, packed, slopes_of(slopes), log_gates, spec,
        is_causal, layout, None, True,
    )
    refuse_non_finite(found, q=q, k=k, v=v, log_gates=log_gates)
    return found


@torch.compiler.disable
def _outside_graphs(*arguments):
    return attention(*arguments)
