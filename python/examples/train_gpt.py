"""A small GPT with sata's attention dropped in, trained for a minute on the CPU.

    python examples/train_gpt.py                        # sata: three Taylor terms, near 1, gates
    python examples/train_gpt.py --attention softmax    # the same model as it was
    python examples/train_gpt.py --text novel.txt --seconds 600

It predicts bytes, by default of the Python standard library's own source, and then writes some with
a state of fixed size.
"""

import argparse
import math
import os
import pathlib
import time

import torch
from torch import nn
from torch.nn import functional as F

from sata.torch import TaylorAttention


class Softmax(nn.Module):
    """What was there before: causal softmax attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, attention, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        if attention == "sata":
            # The one line that changes.
            self.attention = TaylorAttention(width, heads, terms=3, near=1, block=32, decay="gates")
        else:
            self.attention = Softmax(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, **past):
        x = x + self.attention(self.norm1(x), **past)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, attention="sata", width=128, heads=8, layers=3, tokens=256):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        # Gates tell near from far; softmax alone needs positions.
        self.positions = nn.Embedding(tokens, width) if attention == "softmax" else None
        self.blocks = nn.ModuleList(Block(attention, width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, ids, states=None):
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x) if states is None else block(x, state=states[i])
        return self.head(self.norm(x))

    @torch.no_grad()
    def write(self, prompt, count):
        """Byte after byte; the states do not grow."""
        states = [block.attention.new_state(1) for block in self.blocks]
        ids = torch.tensor([list(prompt)])
        text = bytearray(prompt)
        for _ in range(count):
            logits = self(ids, states)[0, -1]
            ids = torch.multinomial((logits / 0.8).softmax(-1), 1)[None]
            text.append(int(ids))
        return bytes(text), sum(state.nbytes for state in states)


def corpus(path):
    """The text, as bytes."""
    if path:
        return pathlib.Path(path).read_bytes()
    folder = pathlib.Path(os.__file__).parent
    return b"\n".join(file.read_bytes() for file in sorted(folder.glob("*.py")))[:4_000_000]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--attention", choices=["sata", "softmax"], default="sata")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--text", help="a file; the standard library's source where none is named")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(0)
    text = torch.tensor(list(corpus(options.text)))
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    model = GPT(options.attention, tokens=options.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(text):,} bytes of text")

    def draw(of):
        at = torch.randint(len(of) - options.tokens - 1, (options.batch,)).tolist()
        both = torch.stack([of[i : i + options.tokens + 1] for i in at])
        return both[:, :-1], both[:, 1:]

    def loss_of(of):
        x, y = draw(of)
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    begin, step = time.time(), 0
    while (passed := time.time() - begin) < options.seconds:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * passed / options.seconds)
        loss = loss_of(train)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            print(f"{passed:5.0f} s  step {step:4}  {loss.item() / math.log(2):.3f} bits per byte")
        step += 1
    model.eval()
    with torch.no_grad():
        bits = sum(loss_of(held_out).item() for _ in range(16)) / 16 / math.log(2)
    print(f"after {step} steps: {bits:.3f} bits per byte held out")
    if options.attention == "sata":
        written, size = model.write(b"def ", 400)
        print(f"\n{written.decode(errors='replace')}\n\n(a state of {size:,} bytes, at any length)")


if __name__ == "__main__":
    main()
