"""What a call costs beyond its kernel: the least mean of many short rounds, beside the same call in a loop
of the compiled half, and beside torch's own attention of the same size.

    python benches/overhead.py [--device cuda] [--quick]

With ``--device cuda`` also: the kernels of ``sata bench gpu`` (P = 4, bf16, prefill) reached from torch.
"""

import argparse
import time

import torch

import sata
from sata import _native, _torch


def least(call, rounds=200, calls=100, wait=lambda: None):
    for _ in range(300):
        call()
    wait()
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best


def kernel(q, k, v, spec, rounds, calls):
    y = torch.empty_like(q)
    parts = (_torch._tensor(x, "bhtd") for x in (q, k, v, y))
    place = _torch._place(q)
    return _native.kernel_seconds(spec, _torch.CODES[q.dtype], *parts, True, rounds, calls, place)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    rounds = 20 if options.quick else 200
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {sata.simd_level()}"
    print(f"{name}, torch {torch.__version__}, {dtype}\n")
    print("| call | µs | kernel alone, µs | beyond it, µs | torch's attention, µs |")
    print("|---|---|---|---|---|")

    def row(what, call, alone, other):
        taken = least(call, rounds, wait=wait)
        other = f"{least(other, rounds, wait=wait) * 1e6:.1f}" if other else ""
        beyond = f"**{(taken - alone) * 1e6:.1f}**" if alone is not None else ""
        alone = f"{alone * 1e6:.1f}" if alone is not None else ""
        print(f"| {what} | {taken * 1e6:.1f} | {alone} | {beyond} | {other} |", flush=True)

    for heads, tokens, d in ((1, 1, 8), (4, 16, 16)):
        q, k, v = (torch.randn(1, heads, tokens, d, device=device, dtype=dtype) for _ in range(3))
        spec = sata.Spec(d, terms=3)
        alone = kernel(q, k, v, spec, rounds, 100)
        size = f"{heads} × {tokens} × {d}"

        def forward():
            return sata.attention(q, k, v, is_causal=True, terms=3)

        def softmax():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        with torch.no_grad():
            row(f"attention, {size}", forward, alone, softmax)
            if not on_gpu:
                arrays = [x.numpy() for x in (q, k, v)]
                row(
                    f"attention of arrays, {size}",
                    lambda: sata.attention(*arrays, is_causal=True, terms=3), alone, None,
                )
        leaf = q.clone().requires_grad_()
        row(
            f"attention in a graph of gradients, {size}",
            lambda: sata.attention(leaf, k, v, is_causal=True, terms=3), alone,
            lambda: torch.nn.functional.scaled_dot_product_attention(leaf, k, v, is_causal=True),
        )
    state = sata.State(
        sata.Spec(16, terms=3, near=1), kv_heads=4, device=device, dtype=torch.float32
    )
    q, k, v = (torch.randn(1, 4, 1, 16, device=device, dtype=dtype) for _ in range(3))
    with torch.no_grad():
        row("step of a state, 4 × 1 × 16, P = 3, near 1", lambda: state.step(q, k, v), None, None)
    if not on_gpu:
        return
    print("\n| prefill, P = 4 | heads | tokens | from torch, ns per token and head | "
          "kernel alone | ratio |")
    print("|---|---|---|---|---|---|")
    for d, heads in ((8, 128), (16, 64), (32, 32), (64, 16)):
        for tokens in (1024, 16384, 65536):
            q, k, v = (
                torch.randn(1, heads, tokens, d, device=device, dtype=dtype) for _ in range(3)
            )
            spec = sata.Spec(d)
            calls = 200 if tokens < 4096 else 20
            alone = kernel(q, k, v, spec, 5, calls)
            with torch.no_grad():
                taken = least(
                    lambda: sata.attention(q, k, v, is_causal=True), 5, calls, wait
                )
            of = 1e9 / (tokens * heads)
            print(f"| d = {d} | {heads} | {tokens:,} | {taken * of:.3f} | {alone * of:.3f} | "
                  f"{taken / alone:.3f} |", flush=True)


if __name__ == "__main__":
    main()
