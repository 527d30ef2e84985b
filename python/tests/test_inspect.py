"""What a model's own queries and keys say."""

import numpy as np
import pytest
import sata


def layer(spread, seed=0, batch=1, heads=4, kv_heads=2, tokens=500, d=8):
    rng = np.random.default_rng(seed)
    return (
        spread * rng.standard_normal((batch, heads, tokens, d)),
        rng.standard_normal((batch, kv_heads, tokens, d)),
        rng.standard_normal((batch, kv_heads, tokens, d)),
    )


def test_says_what_fits(tmp_path):
    found = sata.inspect({"calm": layer(0.3), "wild": layer(8.0)}, max_error=0.02)
    verdicts = found.verdicts()
    assert [v.layer for v in verdicts] == ["calm"] * 4 + ["wild"] * 4
    assert all(v.word == "works" and v.row.median <= 0.02 for v in verdicts[:4])
    assert not any(v.word == "works" for v in verdicts[4:])
    names = {row.name for row in found.rows}
    assert {"taylor P=4", "gauss P=2, near 1", "window, near 3"} <= names
    assert not any("gauss P=3" in name for name in names)
    # More terms of a calm head are closer; wide logits have wide deviations.
    by = {row.name: row.median for row in found.rows if (row.layer, row.head) == ("calm", 0)}
    assert by["taylor P=4"] < by["taylor P=3"] < by["taylor P=2"]
    assert found.logits["wild", 0][1] > 10 * found.logits["calm", 0][1]
    assert "wild" in str(found) and "works" in str(found)
    pytest.importorskip("matplotlib")
    for quantity in ("median", "p99"):
        path = tmp_path / f"{quantity}.png"
        found.figure(quantity).savefig(path)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="quantity"):
        found.figure("mean")


def test_near_everything_is_exact():
    found = sata.inspect(*layer(2.0, tokens=100), near=(2,), terms=(2,))
    assert all(row.median < 1e-9 for row in found.rows)
    tight = sata.inspect(*layer(2.0), max_state=5_000, near=(0,), terms=(2, 4))
    assert all(v.row.state_bytes <= 5_000 or v.word == "fails" for v in tight.verdicts())


def test_tensors_layouts_and_encoders():
    torch = pytest.importorskip("torch")
    q, k, v = layer(0.3)
    a = sata.inspect(q, k, v, terms=(2,), near=(1,))
    b = sata.inspect(
        *(torch.tensor(x).transpose(1, 2) for x in (q, k, v)), terms=(2,), near=(1,), layout="bthd"
    )
    c = sata.inspect(*(x[0] for x in (q, k, v)), terms=(2,), near=(1,), layout="htd")
    assert a.rows == b.rows == c.rows
    full = sata.inspect(q, k, v, is_causal=False, series=["taylor", "power:2", [1, 1, 0.5]])
    assert {row.near for row in full.rows} == {0}
    assert {row.terms for row in full.rows} == {2, 3, 4}


def test_wrong_input():
    q, k, v = layer(1.0, tokens=20)
    for kind, match, arguments, options in (
        (ValueError, "needed", (q, k), {}),
        (ValueError, "k has shape", (q, k[0], v), {}),
        (TypeError, "floating point", (q.astype(int), k, v), {}),
        (ValueError, "NaN", (q * np.nan, k, v), {}),
        (ValueError, "series", (q, k, v), {"series": ["sine"]}),
        (ValueError, "layout", (q, k, v), {"layout": "qkv"}),
    ):
        with pytest.raises(kind, match=match):
            sata.inspect(*arguments, **options)
