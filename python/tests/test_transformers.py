"""Hugging Face models, small and randomly initialised: against their own eager attention, beyond their
window, and what is refused."""

import inspect

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import sata
import sata.transformers
from sata.transformers import StateCache

# What models call their cache, by the version of transformers.
CACHE = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in CACHE else "past_key_values"


def with_cache(cache):
    return {CACHE: cache}


def llama(device, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **options,
    )
    return transformers.LlamaForCausalLM(config).to(device).eval()


def bert(device):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return transformers.BertModel(config).to(device).eval()


def ids(batch, tokens, device):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, 97, (batch, tokens), generator=generator).to(device)


@pytest.fixture(autouse=True)
def registered():
    sata.transformers.register()
    # Everything exact: in a causal model by near blocks, in an encoder by sinks.
    sata.transformers.register("sata-exact", near=9, block=16, sinks=128)
    sata.transformers.register("sata-near", near=8, block=16, sinks=0, terms=3, series="taylor")
    sata.transformers.register("sata-small", near=1, block=16, sinks=4, terms=2)


@torch.no_grad()
def test_llama_prefill_is_eager(device):
    model, tokens = llama(device), ids(2, 50, device)
    model.set_attn_implementation("eager")
    truth = model(tokens).logits
    for name in ("sata-exact", "sata-near"):
        model.set_attn_implementation(name)
        assert (model(tokens, use_cache=False).logits - truth).abs().max() <= 1e-4
        cache = StateCache()
        assert (model(tokens, **with_cache(cache)).logits - truth).abs().max() <= 1e-4
        assert cache.get_seq_length() == 50
        # In pieces, with the cache.
        cache = StateCache()
        parts = [
            model(part, **with_cache(cache)).logits for part in tokens.split([20, 1, 29], dim=1)
        ]
        assert (torch.cat(parts, 1) - truth).abs().max() <= 1e-4


@torch.no_grad()
def test_llama_generates_as_eager(device):
    model, tokens = llama(device), ids(2, 12, device)
    options = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True,
               "output_logits": True}
    model.set_attn_implementation("eager")
    truth = model.generate(tokens, **options)
    model.set_attn_implementation("sata-near")
    found = model.generate(tokens, **with_cache(StateCache()), **options)
    assert found.sequences.equal(truth.sequences)
    for a, b in zip(found.logits, truth.logits):
        assert (a - b).abs().max() <= 1e-4


@torch.no_grad()
def test_llama_generates_from_padded_prompts(device):
    model, tokens = llama(device), ids(2, 12, device)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    tokens[0, :5] = 0
    options = {"do_sample": False, "max_new_tokens": 20, "attention_mask": mask}
    model.set_attn_implementation("eager")
    truth = model.generate(tokens, **options)
    model.set_attn_implementation("sata-near")
    assert model.generate(tokens, **with_cache(StateCache()), **options).equal(truth)


@torch.no_grad()
def test_llama_generates_beyond_its_window(device, tmp_path):
    """250 tokens of a model of 64, in a cache that does not grow; and on from a saved one."""
    model, tokens = llama(device), ids(1, 50, device)
    for name in ("sata", "sata-small"):
        model.set_attn_implementation(name)
        cache = StateCache()
        model(tokens, **with_cache(cache))
        size = cache.nbytes
        y = model.generate(tokens, **with_cache(StateCache()), do_sample=False, max_new_tokens=200)
        assert y.shape == (1, 250)
        cache = StateCache()
        y = model.generate(tokens, **with_cache(cache), do_sample=False, max_new_tokens=30)
        model.generate(y, **with_cache(cache), do_sample=False, max_new_tokens=100)
        assert cache.nbytes == size and cache.get_seq_length() >= 170
    # What follows is the same from a fork and from files.
    cache.save(tmp_path / "past")
    one = ids(1, 1, device)
    forked, loaded = cache.fork(), StateCache.load(
        tmp_path / "past", device=cache.layers[0].state.device
    )
    y = model(one, **with_cache(cache)).logits
    assert torch.isfinite(y).all()
    for other in (forked, loaded):
        assert (model(one, **with_cache(other)).logits - y).abs().max() <= 1e-5


@torch.no_grad()
def test_bert_is_eager(device):
    model, tokens = bert(device), ids(3, 40, device)
    mask = torch.ones_like(tokens)
    mask[1, 30:] = 0
    mask[2, 7:] = 0
    for masked in (None, mask):
        model.set_attn_implementation("eager")
        truth = model(tokens, attention_mask=masked).last_hidden_state
        model.set_attn_implementation("sata-exact")
        y = model(tokens, attention_mask=masked).last_hidden_state
        assert (y - truth).abs().max() <= 1e-4
        # And near it by a series alone.
        sata.transformers.register("sata-series", terms=6, sinks=0)
        model.set_attn_implementation("sata-series")
        y = model(tokens, attention_mask=masked).last_hidden_state
        assert (y - truth).abs().max() <= 0.05


def test_training(device):
    """The same gradients as eager attention's."""
    tokens = ids(2, 40, device)
    gradients = []
    for name in ("eager", "sata-near"):
        model = llama(device).train()
        model.set_attn_implementation(name)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(a.abs().max()))


@torch.no_grad()
def test_what_is_refused(device, tmp_path):
    model, tokens = llama(device), ids(1, 10, device)
    model.set_attn_implementation("sata")
    with pytest.raises(RuntimeError, match="StateCache"):
        model.generate(tokens, do_sample=False, max_new_tokens=5)
    with pytest.raises(NotImplementedError, match="attention_mask"):
        model(tokens, attention_mask=torch.ones(1, 1, 10, 10, device=device), use_cache=False)
    cache = StateCache()
    with pytest.raises(ValueError, match="no tokens"):
        cache.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        StateCache.load(tmp_path / "none")
    model(tokens, **with_cache(cache))
    with pytest.raises(NotImplementedError, match="beam"):
        cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(NotImplementedError, match="take tokens back"):
        cache.crop(3)
    # A state of another attention.
    model.set_attn_implementation("sata-small")
    with pytest.raises(ValueError, match="near|block"):
        model(tokens, **with_cache(cache))
    for arguments in ({"terms": 3}, {"near": -1}, {"series": "sine"}):
        with pytest.raises(ValueError):
            sata.transformers.register("sata-wrong", **arguments)
    windowed = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
        )
    ).to(device)
    windowed.set_attn_implementation("sata")
    with pytest.raises(NotImplementedError, match="masks by"):
        windowed(tokens, use_cache=False)
