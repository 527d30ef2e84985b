"""Would it work for a model? Its own queries, keys and values say so, per layer and head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from . import _native
from ._numpy import attention as _attention
from ._numpy import tensor as _tensor
from ._tensors import F64, check_layout, hashable_series, make_spec

#: The worst hundredth of queries must not be further off than this times the output itself.
_TAIL = 1.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate for one head."""

    #: Which layer, by its name.
    layer: str
    #: Which query head.
    head: int
    #: Its series, or None where what is far is dropped: the near window alone.
    series: Any
    #: How many terms; 0 for the window alone.
    terms: int
    #: What is exact: as ``sata.attention`` takes it.
    near: Any
    #: Relative error |y - softmax| / |softmax| of the median query.
    median: float
    #: That of the 99th percentile.
    p99: float
    #: Share of queries whose denominator is not positive and finite.
    unusable: float
    #: Bytes of the state of one key/value head, float32 with compensation.
    state_bytes: int

    @property
    def name(self) -> str:
        """As it is called in tables and figures."""
        far = "window" if self.series is None else f"{_series_name(self.series)} P={self.terms}"
        return far if self.near == 0 else f"{far}, near {self.near}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is recommended for one head."""

    layer: str
    head: int
    #: ``"works"``, ``"mostly"`` (but one query in a hundred is off by more than its output),
    #: ``"near"`` (the window alone is enough) or ``"fails"`` (the least error that was met).
    word: str
    row: Row


def _series_name(series: Any) -> str:
    return series if isinstance(series, str) else "coefficients"


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What ``sata.inspect`` found.

    ``rows`` holds every candidate of every head, ``logits`` the deviation of each head's logits
    ``{(layer, head): (mean, deviation, largest)}``.
    """

    rows: list[Row]
    logits: dict[tuple[str, int], tuple[float, float, float]]
    max_error: float
    max_state: Optional[int]

    def verdicts(self) -> list[Verdict]:
        """The smallest state within the budgets, per head; the least error where none is."""
        found = []
        for layer, head in self.logits:
            rows = [row for row in self.rows if (row.layer, row.head) == (layer, head)]
            fits = [
                row
                for row in rows
                if row.median <= self.max_error
                and (self.max_state is None or row.state_bytes <= self.max_state)
            ]
            good = [row for row in fits if row.p99 <= _TAIL and not row.unusable]
            if good or fits:
                row = min(good or fits, key=lambda row: (row.state_bytes, row.median))
                word = "mostly" if not good else "near" if row.series is None else "works"
            else:
                within = [
                    row
                    for row in rows
                    if self.max_state is None or row.state_bytes <= self.max_state
                ]
                row = min(within or rows, key=lambda row: row.median)
                word = "fails"
            found.append(Verdict(layer, head, word, row))
        return found

    def __str__(self) -> str:
        lines = [f"{'layer':<12} {'head':>4} {'logits':>7}  {'verdict':<7} setting, error, state"]
        for v in self.verdicts():
            deviation = self.logits[v.layer, v.head][1]
            lines.append(
                f"{v.layer:<12} {v.head:>4} {deviation:>7.2f}  {v.word:<7} {v.row.name}: "
                f"{v.row.median:.2%} (99th percentile {v.row.p99:.2%}), {v.row.state_bytes:,} bytes"
            )
        return "\n".join(lines)

    def figure(self, quantity: str = "median") -> Any:
        """A matplotlib figure: the error of every candidate (right) of every head (down).

        Args:
            quantity: ``"median"`` or ``"p99"``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: Another quantity.
        """
        if quantity not in ("median", "p99"):
            raise ValueError(f"quantity is {quantity!r}, but it must be 'median' or 'p99'")
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        heads = list(self.logits)
        names = list(dict.fromkeys(row.name for row in self.rows))
        errors = np.full((len(heads), len(names)), np.nan)
        for row in self.rows:
            place = heads.index((row.layer, row.head)), names.index(row.name)
            errors[place] = getattr(row, quantity)
        size = (3 + 0.45 * len(names), 2.2 + 0.3 * len(heads))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(
            np.clip(errors, 1e-4, 10), norm=LogNorm(1e-4, 10), cmap="viridis_r", aspect="auto"
        )
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(heads)), [f"{layer} · {head}" for layer, head in heads])
        axes.set_ylabel("layer · head")
        for number, verdict in enumerate(self.verdicts()):
            mark = "x" if verdict.word == "fails" else "o"
            axes.plot(names.index(verdict.row.name), number, mark, color="white", mec="black")
        what = "median" if quantity == "median" else "99th percentile"
        axes.set_title(f"error against softmax, {what} query\n(o recommended, x nothing within budget)")
        figure.colorbar(image, ax=axes, label="|y − softmax| / |softmax|")
        return figure


def _array(name: str, x: Any) -> np.ndarray:
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    x = np.asarray(x)
    if x.dtype.kind not in "fV" and x.dtype.name != "bfloat16":
        raise TypeError(f"{name} has dtype {x.dtype}, but it must be of floating point")
    return np.ascontiguousarray(x, dtype=np.float64)


def _softmax(q, k, v, scale, is_causal):
    y = np.empty((*q.shape[:-1], v.shape[-1]))
    parts = (_tensor(name, x, "bhtd") for name, x in (("q", q), ("k", k), ("v", v), ("out", y)))
    _native.softmax(F64, *parts, scale, is_causal)
    return y


def _window(q, k, v, scale, near, block, sinks):
    """Softmax over a query's own block, those before it, and the sinks."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    y = np.empty((*q.shape[:-1], v.shape[-1]))
    before = 0 if near == "own" else near
    for first in range(0, q.shape[2], block):
        last = min(first + block, q.shape[2])
        begin = max(first - before * block, 0)
        keys = np.r_[: min(sinks, begin), begin:last]
        x = scale * q[:, :, first:last] @ k[:, :, keys].swapaxes(-1, -2)
        x = np.where(keys[None] <= np.arange(first, last)[:, None], x, -np.inf)
        w = np.exp(x - x.max(-1, keepdims=True))
        y[:, :, first:last] = w @ v[:, :, keys] / w.sum(-1, keepdims=True)
    return y


def _logits(q, k, scale, is_causal):
    """Mean, deviation and largest of each head's logits, over some of its queries."""
    group = q.shape[1] // k.shape[1]
    t = np.unique(np.linspace(0, q.shape[2] - 1, 256).astype(int))
    found = []
    for head in range(q.shape[1]):
        x = scale * q[:, head, t] @ k[:, head // group].swapaxes(-1, -2)
        x = x[:, np.arange(k.shape[2])[None] <= t[:, None]] if is_causal else x
        found.append((float(x.mean()), float(x.std()), float(abs(x).max())))
    return found


def inspect(
    q: Any,
    k: Any = None,
    v: Any = None,
    *,
    is_causal: bool = True,
    series: Sequence[Any] = ("taylor", "gauss", "hermite"),
    terms: Sequence[int] = (2, 3, 4),
    near: Sequence[Any] = (0, 1, 3),
    block: int = 64,
    sinks: int = 4,
    scale: Optional[float] = None,
    max_error: float = 0.1,
    max_state: Optional[int] = None,
    layout: str = "bhtd",
) -> Inspection:
    """Says, per layer and head, how far candidates are from softmax, and which to take.

    Args:
        q: Captured queries ``[batch, heads, tokens, d_key]`` of one layer, rotary embedding
            already applied, as an array or a tensor; or all layers as ``{name: (q, k, v)}``.
        k: Keys ``[batch, kv_heads, tokens, d_key]``.
        v: Values ``[batch, kv_heads, tokens, d_value]``.
        is_causal: Whether the model is.
        series: Which series to try.
        terms: Which numbers of terms (gauss takes the even ones).
        near: Which near windows; only 0 where the model is not causal.
        block: Tokens in a block.
        sinks: First tokens that stay exact, where anything is near.
        scale: What q.k is multiplied by; 1/sqrt(d_key) where it is None.
        max_error: Relative error of the median query up to which a candidate is good.
        max_state: Most bytes of one key/value head's state; any where it is None.
        layout: Of all three, as for ``sata.attention``.

    Returns:
        An ``Inspection``: print it, or save its ``figure()``.

    Raises:
        ValueError: Shapes that do not fit, NaN, options that no spec has.
        TypeError: Arguments that are no arrays or tensors of floating point.
    """
    check_layout(layout)
    layers = q if isinstance(q, Mapping) else {"layer": (q, k, v)}
    rows: list[Row] = []
    logits: dict[tuple[str, int], tuple[float, float, float]] = {}
    places = ["bhtd".index(c) for c in layout.rjust(4, "b")]
    for layer, parts in layers.items():
        if len(parts) != 3 or any(x is None for x in parts):
            raise ValueError(f"{layer}: q, k and v are needed")
        arrays = []
        for name, x in zip("qkv", parts):
            x = _array(name, x)
            if x.ndim != len(layout):
                raise ValueError(f"{layer}: {name} has shape {x.shape}, but layout is {layout!r}")
            x = x if x.ndim == 4 else x[None]
            arrays.append(np.ascontiguousarray(x.transpose(np.argsort(places))))
        q, k, v = arrays
        d_key, d_value = q.shape[-1], v.shape[-1]
        factor = 1 / np.sqrt(d_key) if scale is None else scale
        exact = _softmax(q, k, v, factor, is_causal)
        length = np.maximum(np.linalg.norm(exact, axis=-1), np.finfo(np.float64).tiny)
        for head, of_head in enumerate(_logits(q, k, factor, is_causal)):
            logits[str(layer), head] = of_head

        def add(y, series, terms, near, state_bytes, layer=layer):
            errors = np.linalg.norm(y - exact, axis=-1) / length
            for head in range(errors.shape[1]):
                # No number counts as infinitely wrong: in the quantiles, and in `unusable` beside them.
                of_head = errors[:, head].ravel()
                of_head = np.where(np.isnan(of_head), np.inf, of_head)
                rows.append(
                    Row(
                        str(layer), head, series, terms, near, float(np.median(of_head)),
                        float(np.quantile(of_head, 0.99, method="higher")),
                        float(np.mean(~np.isfinite(of_head))), state_bytes,
                    )
                )

        for window in near if is_causal else (0,):
            kept = 0 if window == 0 else sinks
            blocks = 1 if window in (0, "own") else window + 1
            raw = (blocks * block + kept) * (d_key + d_value + 1) * 4
            if window != 0:
                y = _window(q, k, v, factor, window, block, kept)
                add(y, None, 0, window, raw)
            for one in series:
                one = hashable_series(one)
                implied = not isinstance(one, str) or one.startswith("power")
                for p in terms[:1] if implied else terms:
                    if one == "gauss" and p % 2:
                        continue
                    spec = make_spec(
                        d_key, d_value, 4 if implied else p, one, window, block, kept, None, factor
                    )
                    y, found = _attention(
                        q, k, v, is_causal, 4, "taylor", 0, 64, 0, None, None, None, None, None,
                        None, False, "bhtd", True, spec,
                    )
                    add(y, one, spec.terms, window, spec.cost()["state_bytes"] + raw)
    return Inspection(rows, logits, max_error, max_state)
