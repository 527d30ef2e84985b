"""Torch: the operation on tensors, gradients, compilation, autocast, the layer."""

import gc

import numpy as np
import pytest
import reference

torch = pytest.importorskip("torch")
import sata
from sata.torch import TaylorAttention

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCE = {
    torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2,
}


def draw(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def qkv(batch=2, heads=4, kv_heads=2, tokens=50, d=8, d_value=8, dtype=torch.float32, device="cpu"):
    of = {"dtype": dtype, "device": device}
    return (
        draw(batch, heads, tokens, d, seed=1, **of),
        draw(batch, kv_heads, tokens, d, seed=2, **of),
        draw(batch, kv_heads, tokens, d_value, seed=3, **of),
    )


def array(x):
    return x.detach().double().cpu().numpy()


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def close(y, truth, tolerance):
    truth = truth if isinstance(truth, np.ndarray) else array(truth)
    assert rms(array(y) - truth) <= tolerance * rms(truth)


OPTIONS = [
    {},
    {"is_causal": True, "terms": 3},
    {"is_causal": True, "near": "own", "block": 16, "terms": 3},
    {"is_causal": True, "near": 1, "block": 16, "sinks": 3, "terms": 5},
    {"series": "power:2", "is_causal": True},
    {"sinks": 4, "terms": 3},
    {"slopes": [0.1, 0.02], "is_causal": True, "terms": 3, "near": 1, "block": 16},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_is_the_operation(dtype, options, device, on_cpu):
    if dtype == torch.float64 and not on_cpu:
        pytest.skip("GPUs take no float64")
    q, k, v = qkv(dtype=dtype, device=device)
    y = sata.attention(q, k, v, **options)
    truth = reference.attention(array(q), array(k), array(v), **options)
    assert y.dtype == dtype and y.device == q.device and y.shape == truth.shape
    close(y, truth, TOLERANCE[dtype])
    if on_cpu and dtype in (torch.float32, torch.float64):
        same = sata.attention(q.numpy(), k.numpy(), v.numpy(), **options)
        np.testing.assert_array_equal(y.numpy(), same)


def test_near_everything_is_softmax(device):
    q, k, v = qkv(device=device)
    y = sata.attention(q, k, v, is_causal=True, near=1)
    truth = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    close(y, truth, 2e-5)


@pytest.mark.parametrize("layout", ["bhtd", "bthd", "htd", "thd"])
def test_layouts_and_strides(layout, device):
    q, k, v = qkv(batch=1, device=device)
    truth = sata.attention(q, k, v, is_causal=True, terms=3)
    places = ["bhtd".index(c) for c in layout]

    def turned(x):
        return x[0].permute([p - 1 for p in places]) if len(layout) == 3 else x.permute(places)

    y = sata.attention(*map(turned, (q, k, v)), is_causal=True, terms=3, layout=layout)
    close(y, turned(truth), 1e-6)
    wide = torch.zeros(1, 4, 100, 12, device=device)
    wide[:, :, ::2, 4:] = q
    y = sata.attention(wide[:, :, ::2, 4:], k[:, :1].expand(1, 2, 50, 8), v, is_causal=True)
    close(y, sata.attention(q, k[:, [0, 0]], v, is_causal=True), 1e-6)


def test_packed_and_masked(device):
    q, k, v = qkv(batch=1, device=device)
    ends = torch.tensor([0, 7, 31, 50], dtype=torch.int32)
    for cu in (ends, ends.to(device), ends.tolist(), (ends, ends)):
        y = sata.attention(q, k, v, is_causal=True, near=1, block=4, cu_seqlens=cu)
        alone = sata.attention(
            *(x[:, :, 7:31] for x in (q, k, v)), is_causal=True, near=1, block=4
        )
        close(y[:, :, 7:31], alone, 1e-6)
    mask = torch.ones(1, 50, dtype=torch.bool, device=device)
    mask[:, 40:] = False
    close(
        sata.attention(q, k, v, key_mask=mask),
        sata.attention(q, k[:, :, :40], v[:, :, :40]),
        1e-5,
    )


def test_states(device, state_device, tmp_path):
    q, k, v = qkv(device=device)
    options = {"is_causal": True, "terms": 3, "near": 1, "block": 8, "sinks": 2}
    with torch.no_grad():
        whole = sata.attention(q, k, v, **options)
        spec = sata.Spec(8, terms=3, near=1, block=8, sinks=2)
        state = sata.State(spec, batch=2, kv_heads=2, device=state_device)
        assert state.device.startswith(state_device)
        for a, b in [(0, 1), (1, 2), (2, 20), (20, 49), (49, 50)]:
            part = (x[:, :, a:b] for x in (q, k, v))
            y = state.step(*part) if b - a == 1 else state.extend(*part)
            close(y, whole[:, :, a:b], 2e-5)
        assert state.positions == [50, 50]
        y, final = sata.attention(q, k, v, return_state=True, **options)
        close(y, whole, 2e-5)
        assert final.device == state.device
        final.save(tmp_path / "past")
        more = qkv(tokens=7, device=device)
        y = final.extend(*more)
        again = sata.State.load(tmp_path / "past", device=state_device)
        close(again.extend(*more), y, 1e-6)
        host = sata.State.load(tmp_path / "past")
        assert host.to("cpu") is host and host.to(state_device).positions == [50, 50]
        with sata_on_cpu():
            close(host.extend(*(x.cpu() for x in more)), y, 2e-5)
        merged = final.fork()
        with pytest.raises(ValueError, match="position"):
            merged.merge(final)


def sata_on_cpu():
    """Where the emulator is at work: not for this."""
    import contextlib

    from sata import _torch

    @contextlib.contextmanager
    def out():
        before, _torch._emulate = _torch._emulate, False
        try:
            yield
        finally:
            _torch._emulate = before

    return out()


def test_states_fade(device, state_device):
    q, k, v = qkv(device=device)
    gates = -draw(2, 2, 50, seed=9, device=device).abs() * 0.1
    with torch.no_grad():
        whole, state = sata.attention(
            q, k, v, log_gates=gates, is_causal=True, terms=3, near=1, block=8, return_state=True
        )
        truth = reference.attention(
            array(q), array(k), array(v), log_gates=array(gates), is_causal=True, terms=3, near=1,
            block=8,
        )
        close(whole, truth, 2e-5)
        state.reset()
        for t in range(50):
            part = (x[:, :, t : t + 1] for x in (q, k, v))
            y = state.step(*part, log_gates=gates[:, :, t : t + 1])
            close(y, whole[:, :, t : t + 1], 3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_the_formula(dtype, options, device):
    q, k, v = (x.requires_grad_() for x in qkv(dtype=dtype, device=device))
    y = sata.attention(q, k, v, **options)
    dy = draw(*y.shape, dtype=dtype, seed=7, device=device)
    y.backward(dy)
    with sata_on_cpu():
        exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
        sata.attention(*exact, **options).backward(dy.cpu().double())
    for x, truth in zip((q, k, v), exact):
        assert x.grad.dtype == dtype and x.grad.shape == x.shape
        close(x.grad, truth.grad, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_gradcheck(layout, on_cpu):
    if not on_cpu:
        pytest.skip("GPUs take no float64")
    q, k, v = qkv(batch=1, heads=2, kv_heads=1, tokens=7, d=3, d_value=2, dtype=torch.float64)
    if layout == "bthd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    for options in (
        {"is_causal": True, "terms": 3},
        {"is_causal": True, "terms": 3, "near": "own", "block": 2, "sinks": 1},
        {"terms": 5},
        {"terms": 3, "key_mask": torch.tensor([[True] * 5 + [False] * 2])},
        {"terms": 3, "is_causal": True, "cu_seqlens": [0, 3, 7]},
    ):
        def f(q, k, v):
            return sata.attention(q, k, v, layout=layout, **options)

        assert torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in (q, k, v)])
    slopes = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)

    def by_slopes(slopes):
        return sata.attention(q, k, v, slopes=slopes, is_causal=True, terms=3, layout=layout)

    assert torch.autograd.gradcheck(by_slopes, [slopes])
    gates = (-draw(*k.shape[:-1], dtype=torch.float64, seed=4).abs() - 0.1).requires_grad_()

    def by_gates(gates):
        return sata.attention(
            q, k, v, log_gates=gates, is_causal=True, terms=3, near="own", block=2, layout=layout
        )

    # Gates are rounded to float32, so that small differences say nothing.
    assert torch.autograd.gradcheck(by_gates, [gates], eps=1e-3, atol=1e-4)


def test_opcheck(device, on_cpu):
    from sata import _torch

    q, k, v = (x.requires_grad_() for x in qkv(tokens=9, device=device))
    spec = sata.Spec(8, terms=3).to_json()
    masks = torch.ones(2, 9, dtype=torch.bool, device=device)
    slopes = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    gates = (-draw(2, 2, 9, device=device).abs()).requires_grad_()
    ends = torch.tensor([0, 4, 9])
    one = [x.detach()[:1].requires_grad_() for x in (q, k, v)]
    fading = [sata.Spec(8, terms=3, decay=decay).to_json() for decay in ("slopes", "gates")]
    for arguments in (
        (q, k, v, None, None, None, None, None, spec, True, "bhtd"),
        (q, k, v, masks, None, None, None, None, spec, False, "bhtd"),
        (*one, None, ends, None, None, None, spec, True, "bhtd"),
        (q, k, v, None, None, None, slopes, None, fading[0], True, "bhtd"),
        (q, k, v, None, None, None, None, gates, fading[1], True, "bhtd"),
    ):
        torch.library.opcheck(_torch.attention_op, arguments)
    dy = draw(2, 4, 9, 8, device=device)
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(
        _torch.attention_backward_op,
        (dy, q, k, v, None, None, None, None, gates.detach(), fading[1], True, "bhtd", False, True),
    )


def test_the_operation_itself_passes_gradcheck(on_cpu):
    """What graphs are made of: without a graph gradients go another way."""
    from sata import _torch

    if not on_cpu:
        pytest.skip("GPUs take no float64")
    q, k, v = (
        x.requires_grad_()
        for x in qkv(batch=1, heads=2, kv_heads=1, tokens=7, d=3, d_value=2, dtype=torch.float64)
    )
    slopes = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    spec = sata.Spec(3, 2, terms=3, near=1, block=2, decay="slopes").to_json()

    def f(q, k, v, slopes):
        return _torch.attention_op(q, k, v, None, None, None, slopes, None, spec, True, "bhtd")

    assert torch.autograd.gradcheck(f, [q, k, v, slopes])


def test_double_backward_is_refused(device):
    q, k, v = (x.requires_grad_() for x in qkv(device=device))
    y = sata.attention(q, k, v, is_causal=True, terms=3)
    (dq,) = torch.autograd.grad(y.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dq.sum().backward()
    # And in the operation itself.
    spec = sata.Spec(8, terms=3).to_json()
    from sata import _torch

    y = _torch.attention_op(q, k, v, None, None, None, None, None, spec, True, "bhtd")
    (dq,) = torch.autograd.grad(y.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dq.sum().backward()


def test_series_without_gradients_say_so(device):
    q, k, v = (x.requires_grad_() for x in qkv(device=device))
    y = sata.attention(q, k, v, is_causal=True, series="gauss")
    with pytest.raises(NotImplementedError, match="gauss"):
        y.sum().backward()


def test_transforms(device):
    """What torch.func makes of it is right, or refused."""
    q, k, v = qkv(tokens=10, device=device)

    def f(q, k, v):
        return sata.attention(q, k, v, is_causal=True, terms=3)

    each = torch.func.vmap(lambda *x: f(*(y[None] for y in x))[0])(q, k, v)
    close(each, f(q, k, v), 1e-6)
    by_q = torch.func.grad(lambda q: f(q, k, v).square().sum())(q)
    leaf = q.clone().requires_grad_()
    f(leaf, k, v).square().sum().backward()
    close(by_q, leaf.grad, 1e-5)
    one = lambda *x: f(*(y[None] for y in x)).square().sum()
    close(torch.func.vmap(torch.func.grad(one))(q, k, v), leaf.grad, 1e-5)
    with pytest.raises(RuntimeError):
        torch.func.hessian(lambda q: f(q, k, v).sum())(q)
    with pytest.raises(NotImplementedError, match="forward gradient"):
        torch.func.jvp(lambda q: f(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward gradient"):
            f(dual, k, v)


def test_autocast(device):
    q, k, v = (x.requires_grad_() for x in qkv(device=device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = sata.attention(q, k.bfloat16(), v, is_causal=True, terms=3)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert q.grad.dtype == torch.float32
    layer = TaylorAttention(32, 4, 2, rotary=10000.0, qk_norm=1e-6, device=device)
    x = draw(2, 40, 32, device=device)
    truth = layer(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    close(y, truth, 5e-2)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())


def layers(device):
    torch.manual_seed(0)
    of = {"device": device}
    return [
        TaylorAttention(32, 4, 2, **of),
        TaylorAttention(32, 4, 2, decay="slopes", rotary=1e4, qk_norm=1e-6, block=16, **of),
        TaylorAttention(32, 4, decay=None, near=0, terms=5, is_causal=False, **of),
    ]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend, device):
    for layer in layers(device):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for tokens in (20, 33):
            x = draw(2, tokens, 32, device=device).requires_grad_()
            y = compiled(x)
            truth = layer(x)
            torch.testing.assert_close(y, truth, atol=1e-5, rtol=1e-4)
            (by_x,) = torch.autograd.grad(y.square().sum(), x)
            (of_truth,) = torch.autograd.grad(truth.square().sum(), x)
            torch.testing.assert_close(by_x, of_truth, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_function_compiles(backend, device):
    torch._dynamo.reset()
    mask = torch.ones(2, 50, dtype=torch.bool, device=device)

    @torch.compile(fullgraph=True, backend=backend)
    def f(q, k, v):
        y = sata.attention(q * 2, k, v, is_causal=True, terms=3, near=1, block=16)
        return y + sata.attention(q, k, v, key_mask=mask, terms=3)

    q, k, v = qkv(device=device)
    truth = sata.attention(q * 2, k, v, is_causal=True, terms=3, near=1, block=16)
    truth = truth + sata.attention(q, k, v, key_mask=mask, terms=3)
    torch.testing.assert_close(f(q, k, v), truth, atol=1e-5, rtol=1e-4)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    f(*leaves).sum().backward()
    assert all(x.grad is not None for x in leaves)


def test_inductor(device):
    """With the compiler that torch.compile takes by itself, where it works."""
    torch._dynamo.reset()
    layer = layers(device)[0]
    x = draw(2, 20, 32, device=device)
    with torch.no_grad():
        truth = layer(x)
    try:
        y = torch.compile(layer, fullgraph=True)(x)
    except Exception as failure:
        if "sata" in str(failure):
            raise
        pytest.skip(f"inductor does not work here: {type(failure).__name__}")
    torch.testing.assert_close(y, truth, atol=1e-5, rtol=1e-4)


def test_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    y = sata.attention(*(x.to("meta") for x in qkv()), is_causal=True)
    assert y.device.type == "meta" and y.shape == (2, 4, 50, 8)
    with FakeTensorMode():
        y = sata.attention(*(torch.empty(2, 4, 50, 8) for _ in range(3)), is_causal=True)
        assert y.shape == (2, 4, 50, 8)


def test_layer_trains_and_goes_on(device, state_device):
    for layer in layers(device):
        x = draw(2, 40, 32, device=device)
        y = layer(x)
        assert y.shape == x.shape
        y.square().sum().backward()
        for name, p in layer.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name
        if layer.is_causal:
            with torch.no_grad():
                state = layer.new_state(2, device=state_device)
                parts = [layer(part, state=state) for part in x.split([25, 1, 14], dim=1)]
                close(torch.cat(parts, dim=1), y, 3e-5)


def test_layer_has_the_weights_of_rust():
    layer = TaylorAttention(32, 4, 2, d_key=6, d_value=10, qk_norm=1e-6)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "qkv.weight": (4 * 6 + 2 * 6 + 2 * 10, 32), "out.weight": (32, 40), "gate.weight": (2, 32),
        "gate.bias": (2,), "q_norm.weight": (6,), "k_norm.weight": (6,),
    }
    for arguments, match in (
        ({"heads": 3, "kv_heads": 2}, "multiple"),
        ({"heads": 5}, "d_key"),
        ({"heads": 4, "d_key": 5, "rotary": 1e4}, "even"),
        ({"heads": 4, "terms": 0}, "terms"),
    ):
        with pytest.raises(ValueError, match=match):
            TaylorAttention(32, **arguments)


def test_diagnostics(device, on_cpu):
    q, k, v = qkv(device=device)
    y, found = sata.attention(q, k, v, is_causal=True, terms=3, diagnostics=True)
    assert found.is_clean and found.queries == 400
    leaf = q.clone().requires_grad_()
    y, found = sata.attention(leaf, k, v, is_causal=True, terms=3, diagnostics=True)
    y.sum().backward()
    assert found.is_clean and leaf.grad is not None
    k[0, 1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="k .*NaN"):
        sata.attention(q, k, v, terms=3, diagnostics=True)


def test_wrong_tensors(device):
    def wrong(kind, match, *arguments, **options):
        with pytest.raises(kind, match=match):
            sata.attention(*arguments, **options)

    q, k, v = qkv(device=device)
    wrong(TypeError, "k is of type ndarray", q, k.cpu().numpy(), v)
    wrong(TypeError, "q with shape .*int64", q.long(), k, v)
    wrong(TypeError, r"v with shape \[2, 2, 50, 8\] has dtype torch.float16", q, k, v.half())
    wrong(TypeError, "sparse|strided", q.to_sparse(), k, v)
    wrong(ValueError, r"k with shape \[2, 2, 50, 8\] is on meta", q, k.to("meta"), v)
    wrong(ValueError, r"q has shape \[4, 50, 8\]", q[0], k, v)
    wrong(ValueError, r"k has shape \[2, 2, 50, 7\]", q, k[..., :7], v)
    wrong(ValueError, "last dimension must be contiguous", q.mT.contiguous().mT, k, v)
    wrong(ValueError, r"key_mask has shape \[2, 49\]", q, k, v, key_mask=torch.ones(2, 49) > 0)
    wrong(TypeError, "key_mask", q, k, v, key_mask=torch.ones(2, 50, device=device))
    wrong(ValueError, r"log_gates has shape \[2, 50\]", q, k, v, log_gates=q.new_zeros(2, 50))
    wrong(ValueError, "slopes has shape", q, k, v, slopes=q.new_zeros(2, 1), is_causal=True)
    state = sata.State(sata.Spec(8), batch=2, kv_heads=2, dtype=torch.float64)
    wrong(RuntimeError, "state has float64", q, k, v, state=state, is_causal=True)
    leaf = q.clone().requires_grad_()
    wrong(RuntimeError, "no gradients", leaf, k, v, return_state=True, is_causal=True)
    assert state.positions == [0, 0]


def test_gradients_through_odd_ways(device):
    """Views, expanded output gradients, checkpoints, several uses."""
    q, k, v = (x.requires_grad_() for x in qkv(device=device))
    y = sata.attention(q, k, v, is_causal=True, terms=3)
    y.sum().backward()
    first = q.grad.clone()
    q.grad = None
    y = torch.utils.checkpoint.checkpoint(
        lambda q: sata.attention(q, k, v, is_causal=True, terms=3), q, use_reentrant=False
    )
    y.sum().backward()
    torch.testing.assert_close(q.grad, first)
    with torch.no_grad():
        assert not sata.attention(q, k, v).requires_grad
    with torch.inference_mode():
        sata.attention(q, k, v)


def test_memory_is_given_back(device):
    q, k, v = qkv(device=device)
    with torch.no_grad():
        for _ in range(3):
            y, state = sata.attention(q, k, v, is_causal=True, terms=3, return_state=True)
            del y, state
    gc.collect()


def test_threads(device):
    import threading

    q, k, v = (x.requires_grad_() for x in qkv(device=device))
    y = sata.attention(q, k, v, is_causal=True, terms=3)
    truth = torch.autograd.grad(y.square().sum(), q)[0]
    failures = []

    def work():
        try:
            for _ in range(10):
                y = sata.attention(q, k, v, is_causal=True, terms=3)
                torch.testing.assert_close(torch.autograd.grad(y.square().sum(), q)[0], truth)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_gpus():
    """Work on one GPU leaves the thread's current one as it was; states and calls must be together."""
    q, k, v = qkv(device="cuda:1")
    with torch.cuda.device(0), torch.no_grad():
        y, state = sata.attention(q, k, v, is_causal=True, return_state=True)
        assert torch.cuda.current_device() == 0 and y.device.index == 1
        assert torch.empty(1, device="cuda").device.index == 0
        with pytest.raises(RuntimeError, match="cuda:1"):
            sata.attention(*(x.to("cuda:0") for x in (q, k, v)), state=state, is_causal=True)
        moved = state.to("cuda:0")
        close(moved.extend(*(x.to("cuda:0") for x in (q, k, v))), state.extend(q, k, v), 1e-6)
        del state, moved
        assert torch.empty(1, device="cuda").device.index == 0
