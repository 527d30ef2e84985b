"""A Hugging Face model writes on from a state that was saved.

    python examples/generate.py                    # a small model with random weights
    python examples/generate.py path/to/model --prompt "It was" --new-tokens 500

A prompt is read once, and what it left is saved: a file per layer, whatever the prompt's length.
The same continuation then comes of the files.
"""

import argparse
import inspect
import tempfile
import time

import torch
import transformers

import sata.transformers
from sata.transformers import StateCache


def model_of(path):
    """The model, and its tokens of a prompt and text of tokens."""
    if path:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="sata")
        return model, lambda text: tokenizer(text, return_tensors="pt").input_ids, tokenizer.decode
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=None, attn_implementation="sata",
    )
    model = transformers.LlamaForCausalLM(config)
    return model, lambda text: torch.tensor([list(text.encode())]), lambda ids: str(ids.tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="a folder with a causal model")
    parser.add_argument("--prompt", default="A past of fixed size, whatever its length. " * 20)
    parser.add_argument("--new-tokens", type=int, default=200)
    options = parser.parse_args()

    sata.transformers.register(series="gauss", terms=2, near=3, sinks=4)
    model, encode, decode = model_of(options.model)
    model.eval()
    name = "cache"
    if name not in inspect.signature(type(model).forward).parameters:
        name = "past_key_values"
    prompt = encode(options.prompt)
    last = prompt[:, -1:]

    def go_on(cache):
        """Greedily, from a cache that holds all of the prompt but its last token."""
        ids, written = last, []
        with torch.no_grad():
            for _ in range(options.new_tokens):
                ids = model(ids, **{name: cache}).logits[:, -1:].argmax(-1)
                written.append(ids)
        return torch.cat(written, 1)[0]

    with tempfile.TemporaryDirectory() as folder:
        cache = StateCache()
        with torch.no_grad():
            model(prompt[:, :-1], **{name: cache})
        cache.save(folder)
        print(f"prompt of {prompt.shape[1]} tokens: a state of {cache.nbytes:,} bytes, saved")
        begin = time.time()
        text = go_on(cache)
        print(f"{options.new_tokens / (time.time() - begin):.0f} tokens/s: {decode(text[:40])} …")
        print(f"{cache.get_seq_length()} tokens later: {cache.nbytes:,} bytes")
        again = go_on(StateCache.load(folder))
        print("from the files:", "the same" if again.equal(text) else "something else")


if __name__ == "__main__":
    main()
