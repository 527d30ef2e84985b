from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

from ._native import Diagnostics, Spec
from ._state import State

_T = TypeVar("_T")
_Layout = Literal["bhtd", "bthd", "htd", "thd"]

@overload
def attention(
    q: _T,
    k: _T,
    v: _T,
    *,
    is_causal: bool = ...,
    terms: int = ...,
    series: str | Sequence[float] = ...,
    near: int | Literal["own"] | None = ...,
    block: int = ...,
    sinks: int = ...,
    slopes: Any = ...,
    log_gates: Any = ...,
    scale: float | None = ...,
    key_mask: Any = ...,
    cu_seqlens: Any = ...,
    state: State | None = ...,
    return_state: Literal[False] = ...,
    layout: _Layout = ...,
    diagnostics: Literal[False] = ...,
    spec: Spec | None = ...,
) -> _T: ...
@overload
def attention(
    q: _T,
    k: _T,
    v: _T,
    *,
    is_causal: bool = ...,
    terms: int = ...,
    series: str | Sequence[float] = ...,
    near: int | Literal["own"] | None = ...,
    block: int = ...,
    sinks: int = ...,
    slopes: Any = ...,
    log_gates: Any = ...,
    scale: float | None = ...,
    key_mask: Any = ...,
    cu_seqlens: Any = ...,
    state: State | None = ...,
    return_state: Literal[True],
    layout: _Layout = ...,
    diagnostics: Literal[False] = ...,
    spec: Spec | None = ...,
) -> tuple[_T, State]: ...
@overload
def attention(
    q: _T,
    k: _T,
    v: _T,
    *,
    is_causal: bool = ...,
    terms: int = ...,
    series: str | Sequence[float] = ...,
    near: int | Literal["own"] | None = ...,
    block: int = ...,
    sinks: int = ...,
    slopes: Any = ...,
    log_gates: Any = ...,
    scale: float | None = ...,
    key_mask: Any = ...,
    cu_seqlens: Any = ...,
    state: State | None = ...,
    return_state: Literal[False] = ...,
    layout: _Layout = ...,
    diagnostics: Literal[True],
    spec: Spec | None = ...,
) -> tuple[_T, Diagnostics]: ...
@overload
def attention(
    q: _T,
    k: _T,
    v: _T,
    *,
    is_causal: bool = ...,
    terms: int = ...,
    series: str | Sequence[float] = ...,
    near: int | Literal["own"] | None = ...,
    block: int = ...,
    sinks: int = ...,
    slopes: Any = ...,
    log_gates: Any = ...,
    scale: float | None = ...,
    key_mask: Any = ...,
    cu_seqlens: Any = ...,
    state: State | None = ...,
    return_state: Literal[True],
    layout: _Layout = ...,
    diagnostics: Literal[True],
    spec: Spec | None = ...,
) -> tuple[_T, State, Diagnostics]: ...
@overload
def attention(
    q: _T,
    k: _T,
    v: _T,
    *,
    is_causal: bool = ...,
    terms: int = ...,
    series: str | Sequence[float] = ...,
    near: int | Literal["own"] | None = ...,
    block: int = ...,
    sinks: int = ...,
    slopes: Any = ...,
    log_gates: Any = ...,
    scale: float | None = ...,
    key_mask: Any = ...,
    cu_seqlens: Any = ...,
    state: State | None = ...,
    return_state: bool = ...,
    layout: _Layout = ...,
    diagnostics: bool = ...,
    spec: Spec | None = ...,
) -> Any: ...
