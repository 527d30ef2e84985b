"""The compiled half. Its calls take addresses, which the Python half has checked: leave them to it."""

from collections.abc import Sequence
from typing import Literal, final

__version__: str
EMULATED: int
HAS_EMULATOR: bool

#: Address, batch, heads, tokens, dim, and strides of the first three in elements.
_Tensor = tuple[int, int, int, int, int, int, int, int]
#: Address, batch, keys, elements from one batch row to the next.
_Mask = tuple[int, int, int, int]
#: A GPU's number and the address of a stream.
_Place = tuple[int, int]

@final
class Spec:
    """What an attention is: sizes, terms, series, near blocks, sinks, decay, scale.

    Raises ``ValueError`` or ``TypeError`` naming the argument, where it cannot be.
    """

    def __new__(
        cls,
        d_key: int,
        d_value: int | None = None,
        *,
        terms: int | None = None,
        series: str | Sequence[float] | None = None,
        near: int | Literal["own"] | None = None,
        block: int = 64,
        sinks: int = 0,
        decay: Literal["slopes", "gates", "none"] | None = None,
        scale: float | None = None,
    ) -> Spec: ...
    @staticmethod
    def from_json(text: str) -> Spec: ...
    def to_json(self) -> str: ...
    def cost(self) -> dict[str, int]: ...
    @property
    def d_key(self) -> int: ...
    @property
    def d_value(self) -> int: ...
    @property
    def terms(self) -> int: ...
    @property
    def series(self) -> str | tuple[float, ...]: ...
    @property
    def near(self) -> int | Literal["own"]: ...
    @property
    def block(self) -> int: ...
    @property
    def sinks(self) -> int: ...
    @property
    def decay(self) -> Literal["slopes", "gates"] | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def orders(self) -> list[int]: ...
    def __hash__(self) -> int: ...

@final
class HeadDiagnostics:
    """What one query head's far logits are like, and what to expect of their series."""

    @property
    def queries(self) -> int: ...
    @property
    def non_positive(self) -> int: ...
    @property
    def non_finite(self) -> int: ...
    @property
    def far(self) -> int: ...
    @property
    def mean(self) -> float: ...
    @property
    def deviation(self) -> float: ...
    @property
    def max_deviation(self) -> float: ...
    @property
    def estimate(self) -> float | None: ...
    @property
    def bound(self) -> float | None: ...

@final
class Diagnostics:
    """What a call noticed about its denominators."""

    @property
    def queries(self) -> int: ...
    @property
    def non_positive(self) -> int: ...
    @property
    def non_finite(self) -> int: ...
    @property
    def first(self) -> tuple[int, int, int] | None: ...
    @property
    def heads(self) -> list[HeadDiagnostics]: ...
    @property
    def is_clean(self) -> bool: ...

@final
class State:
    def __new__(
        cls, spec: Spec, sequences: int, kv_heads: int, is_f64: bool, device: _Place | None
    ) -> State: ...
    @staticmethod
    def load(path: str, spec: Spec | None = None) -> State: ...
    @staticmethod
    def from_bytes(spec: Spec, is_f64: bool, bytes: bytes) -> State: ...
    def to_bytes(self) -> bytes: ...
    def save(self, path: str) -> None: ...
    def fork(self) -> State: ...
    def merge(self, next: State) -> None: ...
    def to(self, device: _Place | None) -> State: ...
    def reset(self) -> None: ...
    def positions(self) -> list[int]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def is_f64(self) -> bool: ...
    @property
    def device(self) -> int | None: ...
    @property
    def spec(self) -> Spec: ...

def forward(
    spec: Spec,
    dtype: int,
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    out: _Tensor,
    causal: bool,
    key_mask: _Mask | None,
    packed: tuple[list[int], list[int]] | None,
    slopes: list[float] | None,
    log_gates: _Tensor | None,
    state: State | None,
    diagnose: bool,
    device: _Place | None,
) -> Diagnostics | None: ...
def backward(
    spec: Spec,
    dtype: int,
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    dy: _Tensor,
    dq: _Tensor,
    dk: _Tensor,
    dv: _Tensor,
    causal: bool,
    key_mask: _Mask | None,
    packed: tuple[list[int], list[int]] | None,
    slopes: list[float] | None,
    d_slopes: bool,
    log_gates: _Tensor | None,
    d_log_gates: _Tensor | None,
    device: _Place | None,
) -> list[float] | None: ...
def softmax(
    dtype: int, q: _Tensor, k: _Tensor, v: _Tensor, out: _Tensor, scale: float, causal: bool
) -> None: ...
def kernel_seconds(
    spec: Spec,
    dtype: int,
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    out: _Tensor,
    causal: bool,
    rounds: int,
    calls: int,
    device: _Place | None,
) -> float: ...
def alibi_slopes(heads: int) -> list[float]: ...
def cuda_device_count() -> int: ...
def simd_level() -> str: ...
def get_num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def after_fork() -> None: ...
