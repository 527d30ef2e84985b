"""The operation in plain float64 loops over NumPy arrays: what everything is tested against."""

import math

import numpy as np


def coefficients(series, terms):
    if series == "taylor":
        return [1.0 / math.factorial(p) for p in range(terms)]
    if isinstance(series, str):
        exponent = int(series.removeprefix("power:"))
        return [1e-3] + [0.0] * (exponent - 1) + [1.0]
    return list(series)


def attention(
    q, k, v, *, is_causal=False, terms=4, series="taylor", near=0, block=64, sinks=0, slopes=None,
    log_gates=None, scale=None, key_mask=None,
):
    """All of [batch, heads, tokens, dim]; series whose coefficients are the same for all queries."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    scale = 1 / math.sqrt(d) if scale is None else scale
    a = coefficients(series, terms)
    y = np.empty((batch, heads, queries, v.shape[-1]))
    t, s = np.arange(queries)[:, None], np.arange(keys)[None]
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            x = scale * q[b, h] @ k[b, g].T
            w = sum(c * x**p for p, c in enumerate(a))
            exact = s < sinks
            if near != 0:
                before = 0 if near == "own" else near
                exact = exact | (s >= (t // block - before) * block)
            w = np.where(exact, np.exp(x), w)
            if slopes is not None:
                w = w * np.exp(-np.asarray(slopes)[g] * (t - s)) if is_causal else w * np.exp(
                    -np.asarray(slopes)[g] * (keys - 1 - s)
                )
            if log_gates is not None:
                total = np.cumsum(np.asarray(log_gates, dtype=np.float64)[b, g])
                w = w * np.exp(np.minimum(total[:, None] - total[None], 0))
            if is_causal:
                w = np.where(s <= t, w, 0)
            if key_mask is not None:
                w = np.where(np.asarray(key_mask)[b][None], w, 0)
            y[b, h] = w @ v[b, g] / w.sum(-1, keepdims=True)
    return y
