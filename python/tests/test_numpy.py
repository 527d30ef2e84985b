"""NumPy arrays, and what needs no torch: types, strides, specs, states, costs, wrong input, threads."""

import copy
import pathlib
import pickle
import threading

import numpy as np
import pytest
import reference
import sata

TOLERANCE = {np.float64: 1e-11, np.float32: 2e-5, np.float16: 4e-3}


def draw(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def qkv(batch=2, heads=4, kv_heads=2, tokens=50, d=6, d_value=5, dtype=np.float64):
    return (
        draw(batch, heads, tokens, d, dtype=dtype, seed=1),
        draw(batch, kv_heads, tokens, d, dtype=dtype, seed=2),
        draw(batch, kv_heads, tokens, d_value, dtype=dtype, seed=3),
    )


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "terms": 3},
        {"is_causal": True, "near": "own", "block": 8, "terms": 3},
        {"is_causal": True, "near": 1, "block": 8, "sinks": 3, "terms": 5},
        {"is_causal": True, "near": 2, "block": 32},
        {"series": "power:2", "is_causal": True},
        {"series": [1.0, 0.5, 0.75], "is_causal": True, "scale": 0.2},
        {"sinks": 4, "terms": 3},
    ],
)
def test_is_the_operation(dtype, options):
    q, k, v = qkv(dtype=dtype)
    y = sata.attention(q, k, v, **options)
    truth = reference.attention(q, k, v, **options)
    assert y.dtype == dtype and y.shape == truth.shape
    assert rms(y - truth) <= TOLERANCE[dtype] * rms(truth)


def test_decays_and_masks():
    q, k, v = qkv()
    gates = -np.abs(draw(2, 2, 50, seed=4)) * 0.2
    mask = draw(2, 50, seed=5) > -0.5
    mask[:, 0] = True
    for options in (
        {"slopes": [0.1, 0.02], "is_causal": True, "terms": 3, "near": 1, "block": 16},
        {"slopes": np.array([0.1, 0.0]), "is_causal": True, "terms": 3},
        {"log_gates": gates, "is_causal": True, "terms": 3, "near": 1, "block": 16},
        {"key_mask": mask, "is_causal": True, "terms": 3},
        {"key_mask": mask},
    ):
        y = sata.attention(q, k, v, **options)
        np.testing.assert_allclose(y, reference.attention(q, k, v, **options), atol=2e-6)


def test_gauss_and_hermite_take_part():
    q, k, v = qkv()
    exact = reference.attention(q, k, v, is_causal=True, near=9)
    taylor = rms(sata.attention(q, k, v, is_causal=True) - exact)
    for series in ("gauss", "hermite", "hermite:0.8"):
        assert rms(sata.attention(q, k, v, is_causal=True, series=series) - exact) < taylor


@pytest.mark.parametrize("layout", ["bhtd", "bthd", "htd", "thd"])
def test_layouts_and_strides(layout):
    q, k, v = qkv(batch=1)
    truth = sata.attention(q, k, v, is_causal=True, terms=3)
    places = ["bhtd".index(c) for c in layout]

    def turned(x):
        return x[0].transpose([p - 1 for p in places]) if len(layout) == 3 else x.transpose(places)

    y = sata.attention(*map(turned, (q, k, v)), is_causal=True, terms=3, layout=layout)
    np.testing.assert_array_equal(y, turned(truth))
    # Rows inside wider rows, every other token, and one key/value head for all.
    wide = np.zeros((1, 4, 100, 9))
    wide[:, :, ::2, 2:8] = q
    same = np.broadcast_to(k[:, :1], (1, 4, 50, 6))
    y = sata.attention(wide[:, :, ::2, 2:8], same, v[:, [0, 0, 1, 1]], is_causal=True)
    np.testing.assert_array_equal(
        y, sata.attention(q, np.ascontiguousarray(same), v[:, [0, 0, 1, 1]], is_causal=True)
    )


def test_inputs_are_not_touched():
    arrays = qkv()
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    sata.attention(*arrays, is_causal=True)
    for x, y in zip(arrays, before):
        np.testing.assert_array_equal(x, y)


def test_packed_sequences():
    q, k, v = qkv(batch=1)
    ends = [0, 7, 7, 31, 50]
    for cu in (ends, np.array(ends), (ends, ends)):
        y = sata.attention(q, k, v, is_causal=True, near=1, block=4, cu_seqlens=cu)
        for a, b in zip(ends, ends[1:]):
            if a < b:
                part = (x[:, :, a:b] for x in (q, k, v))
                alone = sata.attention(*part, is_causal=True, near=1, block=4)
                np.testing.assert_allclose(y[:, :, a:b], alone, atol=1e-13)
    queries, keys = [0, 3, 50], [0, 20, 50]
    y = sata.attention(q, k, v, cu_seqlens=(queries, keys))
    np.testing.assert_allclose(
        y[:, :, :3], sata.attention(q[:, :, :3], k[:, :, :20], v[:, :, :20]), atol=1e-13
    )


def test_states_in_any_split(tmp_path):
    q, k, v = qkv()
    options = {"is_causal": True, "terms": 3, "near": 1, "block": 8, "sinks": 2}
    whole, final = sata.attention(q, k, v, return_state=True, **options)
    np.testing.assert_allclose(whole, sata.attention(q, k, v, **options), atol=1e-13)
    spec = sata.Spec(6, 5, terms=3, near=1, block=8, sinks=2)
    state = sata.State(spec, batch=2, kv_heads=2, dtype=np.float64)
    size = state.nbytes
    parts = [(0, 1), (1, 2), (2, 20), (20, 49), (49, 50)]
    for a, b in parts:
        part = (x[:, :, a:b] for x in (q, k, v))
        y = state.step(*part) if b - a == 1 else state.extend(*part)
        np.testing.assert_allclose(y, whole[:, :, a:b], atol=1e-13)
    assert state.positions == final.positions == [50, 50]
    assert state.nbytes == size == final.nbytes
    # What comes after is the same from forks, copies, files and pickles.
    state.save(tmp_path / "past.safetensors")
    others = [
        state.fork(),
        copy.deepcopy(state),
        sata.State.load(tmp_path / "past.safetensors"),
        sata.State.load(str(tmp_path / "past.safetensors"), spec),
        pickle.loads(pickle.dumps(state)),
        state.to("cpu").fork(),
    ]
    more = qkv(tokens=9)
    y = state.extend(*more)
    for other in others:
        assert other.positions == [50, 50]
        np.testing.assert_array_equal(other.extend(*more), y)
    assert others[2].spec == spec and others[2].dtype == "float64"
    state.reset()
    assert state.positions == [0, 0]


def test_states_merge():
    q, k, v = qkv(tokens=48)
    spec = sata.Spec(6, 5, terms=3, near=1, block=8, decay="slopes")
    slopes = [0.1, 0.01]

    def past(a, b):
        state = sata.State(spec, batch=2, kv_heads=2, dtype="float64")
        state.extend(*(x[:, :, a:b] for x in (q, k, v)), slopes=slopes)
        return state

    merged = past(0, 16).merge(past(16, 48))
    more = qkv(tokens=5)
    np.testing.assert_allclose(
        merged.extend(*more, slopes=slopes), past(0, 48).extend(*more, slopes=slopes), atol=1e-12
    )


def test_a_state_serves_other_series():
    q, k, v = qkv()
    _, state = sata.attention(q, k, v, is_causal=True, terms=4, return_state=True)
    one = qkv(tokens=1)
    y = sata.attention(*one, is_causal=True, series="gauss", terms=2, state=state.fork())
    assert y.shape == (2, 4, 1, 5)
    with pytest.raises(ValueError, match="orders"):
        sata.attention(*one, is_causal=True, spec=sata.Spec(6, 5, terms=5), state=state)


def test_specs():
    spec = sata.Spec(8, 4, terms=5, series="hermite:0.8", near=2, block=32, sinks=4, decay="gates")
    assert (spec.d_key, spec.d_value, spec.terms, spec.series) == (8, 4, 5, "hermite:0.8")
    assert (spec.near, spec.block, spec.sinks, spec.decay) == (2, 32, 4, "gates")
    assert sata.Spec(8).near == 0 and sata.Spec(8, near="own").near == "own"
    assert sata.Spec(9).scale == pytest.approx(1 / 3) and sata.Spec(8).d_value == 8
    assert sata.Spec(8, series=[1, 0, 2]).series == (1.0, 0.0, 2.0)
    same = sata.Spec.from_json(spec.to_json())
    assert same == spec and hash(same) == hash(spec) and pickle.loads(pickle.dumps(spec)) == spec
    assert spec != sata.Spec(8) and "hermite:0.8" in repr(spec) and spec != 3
    for arguments, names in (
        ({"terms": 0}, "terms"),
        ({"near": -1}, "near"),
        ({"near": "far"}, "near"),
        ({"block": 0}, "block"),
        ({"sinks": -1}, "sinks"),
        ({"series": "sine"}, "series"),
        ({"series": "power:3"}, "series"),
        ({"decay": "slow"}, "decay"),
        ({"scale": float("nan")}, "scale"),
    ):
        with pytest.raises(ValueError, match=names):
            sata.Spec(8, **arguments)
    with pytest.raises(TypeError, match="near"):
        sata.Spec(8, near=1.5)


def test_costs():
    cost = sata.cost(16, terms=4)
    assert cost["features"] == 969 and cost["state_elements"] == 969 * 17
    assert cost["state_bytes"] == 969 * 17 * 8
    assert cost["break_even_memory_tokens"] == 515
    assert sata.cost(sata.Spec(16, terms=4)) == cost
    assert sata.cost(8, series="power:2")["features"] == 37
    with pytest.raises(ValueError, match="terms"):
        sata.cost(8, terms=0)


def test_diagnostics():
    q, k, v = qkv()
    y, found = sata.attention(q, k, v, is_causal=True, diagnostics=True)
    np.testing.assert_allclose(y, sata.attention(q, k, v, is_causal=True), atol=1e-13)
    assert found.is_clean and found.queries == 2 * 4 * 50 and len(found.heads) == 4
    assert found.heads[0].deviation > 0.5 and found.heads[0].estimate > 0
    with pytest.warns(sata.DenominatorWarning, match="not positive"):
        y = sata.attention(q * 9, k * 9, v, terms=2)
    _, found = sata.attention(q * 9, k * 9, v, terms=2, diagnostics=True)
    assert not found.is_clean and found.non_positive > 0 and len(found.first) == 3
    _, state, found = sata.attention(
        q, k, v, is_causal=True, diagnostics=True, return_state=True
    )
    assert state.positions == [50, 50] and found.is_clean


def wrong(kind, match, *arguments, **options):
    with pytest.raises(kind, match=match):
        sata.attention(*arguments, **options)


def test_states_of_the_program_are_states_here(tmp_path):
    data = pathlib.Path(__file__).parent / "data"
    whole = np.load(data / "continued.npz")
    state = sata.State.load(data / "past.safetensors")
    assert state.positions == [41]
    rest = [whole[name][None, :, 41:] for name in ("q", "k", "v", "log_gates")]
    y = sata.attention(*rest[:3], log_gates=rest[3], is_causal=True, state=state)
    np.testing.assert_allclose(y[0], whole["y"][:, 41:], rtol=0, atol=2e-6)
    # And one made here is the same file.
    spec = state.spec
    own = sata.State(spec, kv_heads=1)
    past = [whole[name][None, :, :41] for name in ("q", "k", "v", "log_gates")]
    y = sata.attention(*past[:3], log_gates=past[3], is_causal=True, state=own)
    np.testing.assert_allclose(y[0], whole["y"][:, :41], rtol=0, atol=2e-6)
    sata.State.load(data / "past.safetensors").save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (data / "past.safetensors").read_bytes()


def test_wrong_arrays():
    q, k, v = qkv()
    wrong(TypeError, "q is of type list", [1.0], k, v)
    wrong(TypeError, "k is of type list", q, [1.0], v)
    wrong(TypeError, "int64", q.astype(int), k, v)
    wrong(TypeError, r"k with shape \(2, 2, 50, 6\) has dtype float32", q, k.astype("f"), v)
    wrong(TypeError, "complex", q + 0j, k, v)
    wrong(TypeError, "byte order", *(x.astype(">f8") for x in (q, k, v)))
    wrong(ValueError, r"q has shape \(4, 50, 6\)", q[0], k, v)
    wrong(ValueError, "layout is 'tdhb'", q, k, v, layout="tdhb")
    wrong(ValueError, r"k has shape \[2, 2, 50, 5\].*d_key", q, k[..., :5], v)
    wrong(ValueError, r"v has shape \[2, 2, 49, 5\]", q, k, v[:, :, :49])
    wrong(ValueError, "heads must be a multiple", q[:, :3], k, v)
    wrong(ValueError, "causal attention needs", q[:, :, :9], k, v, is_causal=True)
    wrong(ValueError, "last dimension must be contiguous", q[..., ::2], k[..., ::2], v)
    wrong(ValueError, "must not be negative", q[:, :, ::-1], k, v)
    wrong(ValueError, "batch and heads", q[:0], k[:0], v[:0])
    for name, place in (("q", 0), ("k", 1), ("v", 2)):
        bad = [q.copy(), k.copy(), v.copy()]
        bad[place][1, 1, 2, 3] = np.nan
        wrong(ValueError, rf"{name} holds NaN at \[1, 1, 2, 3\]", *bad)
        wrong(ValueError, name, *bad, diagnostics=True)
    raw = np.frombuffer(bytearray(q.nbytes + 1), dtype=np.uint8)[1:].view(np.float64)
    wrong(ValueError, "multiples of their size", raw.reshape(q.shape), k, v)


def test_wrong_options():
    q, k, v = qkv()
    wrong(ValueError, "terms", q, k, v, terms=0)
    wrong(ValueError, "series", q, k, v, series="sine")
    wrong(TypeError, "series", q, k, v, series=3)
    wrong(ValueError, "even number of terms", q, k, v, series="gauss", terms=3)
    wrong(NotImplementedError, "near", q, k, v, near=1)
    wrong(ValueError, r"slopes has shape \[3\]", q, k, v, slopes=[0.1] * 3, is_causal=True)
    wrong(ValueError, "slopes is -1", q, k, v, slopes=[0.1, -1], is_causal=True)
    wrong(TypeError, "slopes", q, k, v, slopes=["steep", 1], is_causal=True)
    wrong(ValueError, "one decay", q, k, v, slopes=[0, 0], log_gates=np.zeros((2, 2, 50)))
    wrong(ValueError, r"log_gates has shape", q, k, v, log_gates=np.zeros((2, 50)))
    wrong(ValueError, r"log_gates", q, k, v, log_gates=np.zeros((2, 4, 50)), is_causal=True)
    wrong(ValueError, "log_gates is 1", q, k, v, log_gates=np.ones((2, 2, 50)), is_causal=True)
    wrong(TypeError, "key_mask", q, k, v, key_mask=np.ones((2, 50)))
    wrong(ValueError, r"key_mask has shape \(2, 49\)", q, k, v, key_mask=np.ones((2, 49), bool))
    wrong(ValueError, "batch of 1", q, k, v, cu_seqlens=[0, 50])
    wrong(ValueError, "rise from 0", q[:1], k[:1], v[:1], cu_seqlens=[0, 30])
    wrong(ValueError, "rise from 0", q[:1], k[:1], v[:1], cu_seqlens=[0, -1, 50])
    wrong(TypeError, "cu_seqlens", q[:1], k[:1], v[:1], cu_seqlens=[0, 5.5, 50])
    wrong(TypeError, "cu_seqlens", q[:1], k[:1], v[:1], cu_seqlens=7)
    wrong(TypeError, "spec", q, k, v, spec="taylor")
    wrong(TypeError, "state", q, k, v, state="past")
    with pytest.raises(ValueError, match="D = .* features"):
        sata.State(sata.Spec(1024, terms=9))


def test_wrong_states(tmp_path):
    q, k, v = qkv()
    spec = sata.Spec(6, 5, terms=3)
    state = sata.State(spec, batch=2, kv_heads=2, dtype="float64")
    wrong(RuntimeError, "float64 sums", *(x.astype("f") for x in (q, k, v)), state=state)
    wrong(ValueError, "sequences = 2", q[:1], k[:1], v[:1], state=state, is_causal=True)
    wrong(ValueError, "kv_heads = 2", q, k[:, :1], v[:, :1], state=state, is_causal=True)
    wrong(ValueError, "near", q, k, v, state=state, near=1, is_causal=True)
    assert state.positions == [0, 0]
    with pytest.raises(ValueError, match="step takes 1 token"):
        state.step(q, k, v)
    with pytest.raises(ValueError, match="dtype"):
        state.merge(sata.State(spec, batch=2, kv_heads=2))
    with pytest.raises(ValueError, match="d_value"):
        state.merge(sata.State(sata.Spec(6, 6, terms=3), batch=2, kv_heads=2, dtype="float64"))
    with pytest.raises(TypeError, match="next"):
        state.merge(3)
    for arguments, kind, match in (
        ({"batch": 0}, ValueError, "batch"),
        ({"kv_heads": 0}, ValueError, "kv_heads"),
        ({"dtype": "int8"}, TypeError, "int8"),
        ({"device": "tpu"}, ValueError, "tpu"),
        ({"device": "cuda:x"}, ValueError, "cuda:x"),
    ):
        with pytest.raises(kind, match=match):
            sata.State(spec, **arguments)
    path = tmp_path / "past.safetensors"
    with pytest.raises(FileNotFoundError):
        sata.State.load(path)
    state.save(path)
    data = bytearray(path.read_bytes())
    with pytest.raises(ValueError, match="orders"):
        sata.State.load(path, sata.Spec(6, 5, terms=4))
    path.write_bytes(data[:-5])
    with pytest.raises(ValueError, match="truncated"):
        sata.State.load(path)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError):
        sata.State.load(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError):
        sata.State.load(path)
    with pytest.raises(OSError):
        state.save(tmp_path / "none" / "past.safetensors")


def test_threads():
    """Calls of several threads are those of one; a state takes one call at a time."""
    q, k, v = qkv(dtype=np.float32)
    truth = sata.attention(q, k, v, is_causal=True, near=1, block=16)
    state = sata.State(sata.Spec(6, 5, terms=3), batch=2, kv_heads=2)
    failures = []

    def work():
        try:
            for _ in range(30):
                y = sata.attention(q, k, v, is_causal=True, near=1, block=16)
                np.testing.assert_array_equal(y, truth)
                state.extend(q[:, :, :7], k[:, :, :7], v[:, :, :7])
                with pytest.raises(ValueError):
                    sata.attention(q[:, :3], k, v)
                state.fork().merge(state)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and state.positions == [840, 840]


def test_number_of_threads():
    before = sata.get_num_threads()
    q, k, v = qkv()
    truth = sata.attention(q, k, v, is_causal=True)
    for n in (1, 3, before):
        sata.set_num_threads(n)
        assert sata.get_num_threads() == n
        np.testing.assert_allclose(sata.attention(q, k, v, is_causal=True), truth, atol=1e-13)
    with pytest.raises(ValueError, match="threads"):
        sata.set_num_threads(0)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_forked_processes():
    """A fork has none of the threads that were at work before."""
    import multiprocessing

    q, k, v = qkv(dtype=np.float32, tokens=300)
    truth = sata.attention(q, k, v, is_causal=True, terms=3)
    context = multiprocessing.get_context("fork")
    ends, given = context.Pipe()

    def work():
        given.send(sata.attention(q, k, v, is_causal=True, terms=3))

    process = context.Process(target=work)
    process.start()
    assert ends.poll(60), "the fork does not answer"
    np.testing.assert_allclose(ends.recv(), truth, atol=1e-6)
    process.join(60)


def test_no_gpu_is_said():
    try:
        from sata import _native

        _native.cuda_device_count()
    except RuntimeError as failure:
        assert "driver" in str(failure)
        with pytest.raises(RuntimeError, match="driver"):
            sata.State(sata.Spec(8), device="cuda")


def test_alibi_slopes():
    assert sata.alibi_slopes(4) == [0.25, 0.0625, 0.015625, 0.00390625]
