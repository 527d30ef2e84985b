"""The past, of fixed size."""

from __future__ import annotations

import os
import sys
from typing import Any

from . import _native
from ._native import Spec


def place_of(device: Any) -> tuple[int, int] | None:
    """A device as the compiled half takes it: None for the CPU, else its number and stream."""
    if device is None:
        return None
    text = str(device)
    if text == "cpu":
        return None
    if text == "emulated":
        return (_native.EMULATED, 0)
    kind, _, number = text.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"device is {text!r}, but it must be 'cpu', 'cuda' or 'cuda:N'")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        ordinal = int(number) if number else torch.cuda.current_device()
        return (ordinal, torch.cuda.current_stream(ordinal).cuda_stream)
    return (int(number or 0), 0)


def _is_f64(dtype: Any) -> bool:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.removeprefix("torch.")
    if name in ("float32", "float16", "bfloat16"):
        return False
    if name == "float64":
        return True
    raise TypeError(
        f"dtype is {name}, but it must be float32, float16, bfloat16 (whose states are float32) or "
        "float64"
    )


class State:
    """The past of some sequences: sums over all that is far, and the tokens that are near.

    Its size is fixed when it is made, whatever the length of the text. It serves every series whose
    orders it holds. Several threads may use one at once: each waits for its turn.

    Args:
        spec: What attention it is the past of.
        batch: How many sequences.
        kv_heads: How many key/value heads each has.
        dtype: Of the inputs it will be given: float64, or float32, float16 and bfloat16, whose
            sums are float32. A name, or a NumPy or torch dtype.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or a torch.device.

    Raises:
        ValueError: No sequences or heads, a device of another kind, or a state larger than memory.
        TypeError: Another type of numbers, or float64 on a GPU.
        RuntimeError: No GPU, or none with enough memory.
    """

    __slots__ = ("__weakref__", "_native", "_spec")

    def __init__(
        self,
        spec: Spec,
        *,
        batch: int = 1,
        kv_heads: int = 1,
        dtype: Any = "float32",
        device: Any = "cpu",
    ) -> None:
        if not isinstance(spec, Spec):
            raise TypeError(f"spec is of type {type(spec).__name__}, but it must be a sata.Spec")
        for name, n in (("batch", batch), ("kv_heads", kv_heads)):
            if n < 1:
                raise ValueError(f"{name} is {n}, but it must be at least 1")
        self._native = _native.State(spec, batch, kv_heads, _is_f64(dtype), place_of(device))
        self._spec = spec

    @classmethod
    def _of(cls, native: _native.State, spec: Spec | None = None) -> State:
        state = cls.__new__(cls)
        state._native = native
        state._spec = native.spec if spec is None else spec
        return state

    def extend(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        slopes: Any = None,
        log_gates: Any = None,
        key_mask: Any = None,
        cu_seqlens: Any = None,
        layout: str = "bhtd",
        diagnostics: bool = False,
    ) -> Any:
        """Answers any number of tokens that follow the past, and takes them into it.

        In any split the answers are those of one call over all. See ``sata.attention`` for the
        arguments (q ``[batch, heads, tokens, d_key]`` and so on) and what is raised.
        """
        from ._call import attention

        return attention(
            q,
            k,
            v,
            is_causal=True,
            slopes=slopes,
            log_gates=log_gates,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=self,
            layout=layout,
            diagnostics=diagnostics,
        )

    def step(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        slopes: Any = None,
        log_gates: Any = None,
        key_mask: Any = None,
        layout: str = "bhtd",
        diagnostics: bool = False,
    ) -> Any:
        """One token of every sequence: ``extend`` with q ``[batch, heads, 1, d_key]``.

        On a GPU it is one launch that waits for nothing.
        """
        shape = tuple(getattr(q, "shape", ()))
        place = layout.find("t")
        if place < len(shape) and shape[place] != 1:
            raise ValueError(f"q has shape {shape}, but a step takes 1 token (extend takes any)")
        return self.extend(
            q,
            k,
            v,
            slopes=slopes,
            log_gates=log_gates,
            key_mask=key_mask,
            layout=layout,
            diagnostics=diagnostics,
        )

    def fork(self) -> State:
        """An independent copy."""
        return State._of(self._native.fork(), self._spec)

    def merge(self, next: State) -> State:
        """Appends the past of ``next``, a state of the tokens that follow this one's; gives itself.

        Raises:
            ValueError: Another spec, sequences, heads or type; or, with near blocks, a past of this
                one that is no whole number of blocks.
        """
        if not isinstance(next, State):
            raise TypeError(f"next is of type {type(next).__name__}, but it must be a sata.State")
        self._native.merge(next._native)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, as the Rust library and the program ``sata`` read it.

        Whatever happens, the file holds either what it held before or all of the new state.

        Raises:
            OSError: What the system refuses.
        """
        self._native.save(os.fspath(path))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], spec: Spec | None = None, *, device: Any = "cpu"
    ) -> State:
        """Reads a file that ``save``, or Rust's ``State::save``, wrote.

        Args:
            path: The file.
            spec: What it must serve; whatever it is of where it is None.
            device: Where it shall be.

        Raises:
            ValueError: No such file, altered, truncated, or of another spec.
            OSError: What the system refuses, such as ``FileNotFoundError``.
        """
        state = cls._of(_native.State.load(os.fspath(path), spec))
        place = place_of(device)
        return state if place is None else cls._of(state._native.to(place))

    def to(self, device: Any) -> State:
        """The same past on another device: itself where it is there already, else a copy."""
        place = place_of(device)
        if (None if place is None else place[0]) == self._native.device:
            return self
        return State._of(self._native.to(place), self._spec)

    def cpu(self) -> State:
        """``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> State:
        """``to("cuda")``, or to GPU ``device``."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def reset(self) -> None:
        """Forgets everything."""
        self._native.reset()

    @property
    def spec(self) -> Spec:
        """What it is the past of."""
        return self._spec

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers; the same at any length of the text."""
        return self._native.nbytes

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self._native.sequences

    @property
    def kv_heads(self) -> int:
        """How many key/value heads each has."""
        return self._native.kv_heads

    @property
    def positions(self) -> list[int]:
        """Tokens that each sequence has seen. On a GPU, asking waits for it."""
        return self._native.positions()

    @property
    def dtype(self) -> str:
        """Of its sums: ``"float32"`` or ``"float64"``."""
        return "float64" if self._native.is_f64 else "float32"

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:N"``."""
        number = self._native.device
        if number == _native.EMULATED:
            return "emulated"
        return "cpu" if number is None else f"cuda:{number}"

    def __copy__(self) -> State:
        return self.fork()

    def __deepcopy__(self, memo: Any) -> State:
        return self.fork()

    def __reduce__(self):
        spec = self._spec.to_json()
        return (_unpickle, (spec, self._native.is_f64, bytes(self._native.to_bytes()), self.device))

    def __repr__(self) -> str:
        return (
            f"sata.State(batch={self.batch}, kv_heads={self.kv_heads}, positions={self.positions}, "
            f"dtype={self.dtype}, device={self.device}, nbytes={self.nbytes}, spec={self._spec!r})"
        )


def _unpickle(spec: str, is_f64: bool, data: bytes, device: str) -> State:
    state = State._of(_native.State.from_bytes(Spec.from_json(spec), is_f64, data))
    return state if device == "cpu" else state.to(device)
