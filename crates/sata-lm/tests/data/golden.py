"""Numbers that crates/sata-lm/tests/pretrained*.rs compare with: numpy in f64 and the package `gguf`.

    python golden.py > golden.json      # needs numpy and gguf
"""
import json
import numpy as np
from math import erf
import gguf

def weights(seed, *shape, scale=0.5):
    """The same numbers as `weights` in the tests."""
    i = np.arange(int(np.prod(shape)), dtype=np.uint64)
    x = (i * np.uint64(2654435761) + np.uint64(seed) * np.uint64(40503) + np.uint64(12345)) & np.uint64(0xFFFFFFFF)
    x = (x ^ (x >> np.uint64(15))) * np.uint64(2246822519) & np.uint64(0xFFFFFFFF)
    x = (x ^ (x >> np.uint64(13))) & np.uint64(0xFFFF)
    return ((x.astype(np.float64) / 65536 - 0.5) * scale).astype(np.float32).astype(np.float64).reshape(shape)

def llama():
    vocab, layers, width, mlp, heads, kv, d, T = 40, 2, 24, 40, 4, 2, 6, 20
    seed = [0]
    def w(*shape, **k):
        seed[0] += 1
        return weights(seed[0], *shape, **k)
    rms = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * g
    embed = w(vocab, width, scale=2.0)
    def rope(x):
        f = 10000.0 ** (-2.0 * np.arange(d // 2) / d)
        a = np.arange(T)[:, None] * f[None]
        c, s = np.cos(a)[:, None], np.sin(a)[:, None]
        p, q = x[..., :d // 2], x[..., d // 2:]
        return np.concatenate([p * c - q * s, q * c + p * s], -1)
    ids = [(7 * t * t + 3 * t + 1) % vocab for t in range(T)]
    x = embed[ids]
    for _ in range(layers):
        n1 = 1 + w(width)
        q, k, v = w(heads * d, width, scale=2.0), w(kv * d, width, scale=2.0), w(kv * d, width)
        o, n2 = w(width, heads * d), 1 + w(width)
        gate, up, down = w(mlp, width), w(mlp, width), w(width, mlp)
        n = rms(x, n1)
        Q, K, V = rope((n @ q.T).reshape(T, heads, d)), rope((n @ k.T).reshape(T, kv, d)), (n @ v.T).reshape(T, kv, d)
        y = np.zeros((T, heads, d))
        for h in range(heads):
            s = Q[:, h] @ K[:, h // 2].T / np.sqrt(d)
            s[np.triu_indices(T, 1)] = -np.inf
            p = np.exp(s - s.max(1, keepdims=True)); p /= p.sum(1, keepdims=True)
            y[:, h] = p @ V[:, h // 2]
        x = x + y.reshape(T, -1) @ o.T
        n = rms(x, n2)
        g = n @ gate.T
        x = x + (g / (1 + np.exp(-g)) * (n @ up.T)) @ down.T
    logits = rms(x, 1 + w(width)) @ embed.T
    return {"ids": ids, "logits": [[round(float(z), 6) for z in row] for row in logits[[0, 7, T - 1]]]}

def bert():
    vocab, layers, width, mlp, heads, positions, T = 30, 2, 24, 40, 3, 32, 17
    d = width // heads
    seed = [100]
    def w(*shape, **k):
        seed[0] += 1
        return weights(seed[0], *shape, **k)
    def ln(x, g, b):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * g + b
    word, pos, kind = w(vocab, width), w(positions, width), w(2, width)
    g, b = 1 + w(width), w(width)
    ids = [(5 * t * t + t + 2) % vocab for t in range(T)]
    x = ln(word[ids] + pos[:T] + kind[0], g, b)
    for _ in range(layers):
        q, qb, k, kb, v, vb = w(width, width, scale=2.0), w(width), w(width, width, scale=2.0), w(width), w(width, width), w(width)
        o, ob, g1, b1 = w(width, width), w(width), 1 + w(width), w(width)
        u, ub, dn, db, g2, b2 = w(mlp, width), w(mlp), w(width, mlp), w(width), 1 + w(width), w(width)
        Q, K, V = [(x @ m.T + c).reshape(T, heads, d) for m, c in ((q, qb), (k, kb), (v, vb))]
        s = np.einsum('thd,shd->hts', Q, K) / np.sqrt(d)
        p = np.exp(s - s.max(-1, keepdims=True)); p /= p.sum(-1, keepdims=True)
        y = np.einsum('hts,shd->thd', p, V).reshape(T, width)
        x = ln(y @ o.T + ob + x, g1, b1)
        h = x @ u.T + ub
        h = 0.5 * h * (1 + np.vectorize(erf)(h / np.sqrt(2)))
        x = ln(h @ dn.T + db + x, g2, b2)
    e = x.mean(0)
    return {"ids": ids, "embedding": [round(float(z), 6) for z in e / np.linalg.norm(e)]}

def blocks():
    rng = np.random.default_rng(5)
    out = {}
    for name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"):
        kind = gguf.GGMLQuantizationType[name]
        size, width = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (2, width), dtype=np.uint8)
        # Scales that are ordinary numbers: f16 of exponent 2^-5 to 2^-2.
        half = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "F16": [0]}.get(name, [0])
        for at in half:
            if name == "BF16":
                raw[:, 1] = 0x3e
            else:
                raw[:, at + 1] = 0x28 + raw[:, at + 1] % 12
        values = gguf.dequantize(raw.reshape(-1) if size == 1 else raw, kind) if name != "F16" else raw.reshape(-1).view(np.float16).astype(np.float32)
        out[name] = {"bytes": raw.tobytes().hex(), "values": [float(np.float32(v)) for v in np.asarray(values).reshape(-1)]}
    return out

print(json.dumps({"llama": llama(), "bert": bert(), "blocks": blocks()}))
