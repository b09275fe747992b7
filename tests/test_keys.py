"""Laws of key extraction, against tensors taken from the model by hand (no code shared with the package)."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn

from knnstore.errors import InvalidArgumentError, ModelError
from knnstore.lm.keys import KeyExtractor, find_key_layer

VOCAB, WIDTH, DEPTH = 61, 16, 3
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "ffn_dim": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": WIDTH,
}


@dataclass(frozen=True)
class Family:
    """norm: the module whose output enters the last feed-forward net, as each architecture's own forward says."""

    config: str
    settings: dict
    layer: str
    norm: Callable


FAMILIES = {
    "gpt2": Family(
        "GPT2Config",
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4},
        "h.2.mlp",
        lambda m: m.transformer.h[-1].ln_2,
    ),
    "opt": Family("OPTConfig", OPT, "decoder.layers.2.fc1", lambda m: m.model.decoder.layers[-1].final_layer_norm),
    # As OPT-350m: layer norms after each part, and embeddings narrower than the blocks.
    "opt-norm-after": Family(
        "OPTConfig",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
        "decoder.layers.2.fc1",
        lambda m: m.model.decoder.layers[-1].self_attn_layer_norm,
    ),
    "gpt-neox": Family(
        "GPTNeoXConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "layers.2.mlp",
        lambda m: m.gpt_neox.layers[-1].post_attention_layernorm,
    ),
    "llama": Family("LlamaConfig", LLAMA_LIKE, "layers.2.mlp", lambda m: m.model.layers[-1].post_attention_layernorm),
    "mistral": Family(
        "MistralConfig", LLAMA_LIKE | {"sliding_window": 4}, "layers.2.mlp", lambda m: m.model.layers[-1].post_attention_layernorm
    ),
    "qwen2": Family("Qwen2Config", LLAMA_LIKE, "layers.2.mlp", lambda m: m.model.layers[-1].post_attention_layernorm),
    "gemma": Family("GemmaConfig", LLAMA_LIKE, "layers.2.mlp", lambda m: m.model.layers[-1].post_attention_layernorm),
    "gemma2": Family("Gemma2Config", LLAMA_LIKE, "layers.2.mlp", lambda m: m.model.layers[-1].pre_feedforward_layernorm),
    "phi": Family("PhiConfig", LLAMA_LIKE | {"num_key_value_heads": 4}, "layers.2.mlp", lambda m: m.model.layers[-1].input_layernorm),
    "mixtral": Family(
        "MixtralConfig", LLAMA_LIKE | {"num_local_experts": 4}, "layers.2.mlp", lambda m: m.model.layers[-1].post_attention_layernorm
    ),
    "bloom": Family(
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 4},
        "h.2.mlp",
        lambda m: m.transformer.h[-1].post_attention_layernorm,
    ),
}

every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    config = getattr(transformers, FAMILIES[family].config)(
        **FAMILIES[family].settings, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.4
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def output_of(module: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """What `module` gives during `run`, by a hook of the test's own."""
    seen = []
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        run()
    hook.remove()
    assert len(seen) == 1
    return seen[0]


@every_family
def test_default_key_is_the_normalized_state_that_enters_the_last_feed_forward_net(family):
    """The default key is what the last feed-forward net gets: the output of the layer norm before it, at each position."""
    model, ids = build(family), tokens(2, 9)
    extractor = KeyExtractor(model)
    expected = output_of(FAMILIES[family].norm(model), lambda: model(input_ids=ids))
    assert extractor.key.layer == FAMILIES[family].layer
    assert extractor.key.dim == expected.shape[-1] == WIDTH
    keys = extractor.keys(ids)
    assert keys.shape == (2, 9, WIDTH)
    torch.testing.assert_close(keys, expected.reshape(2, 9, WIDTH))


@every_family
def test_final_key_is_what_the_lm_head_multiplies(family):
    """The LM head's own weights times the `final` keys are the logits (Gemma 2 caps them afterwards)."""
    model, ids = build(family), tokens(2, 9)
    extractor = KeyExtractor(model, "final")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        head = model.get_output_embeddings()
        product = extractor.keys(ids) @ head.weight.T + (0 if head.bias is None else head.bias)
    cap = getattr(model.config, "final_logit_softcapping", None)
    torch.testing.assert_close(torch.tanh(product / cap) * cap if cap else product, logits)
    assert extractor.key.dim == head.weight.shape[1]


@every_family
@pytest.mark.parametrize("layer", [None, "final"])
def test_keys_and_logits_are_those_of_the_whole_pass(family, layer):
    """For each number of last positions: the same keys as `keys`, the same logits as the model itself."""
    model, ids = build(family), tokens(2, 7)
    extractor = KeyExtractor(model, layer)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for last in (1, 3, 7):
        some_keys, some_logits = extractor.keys_and_logits(ids, last=last)
        torch.testing.assert_close(some_keys, extractor.keys(ids)[:, -last:])
        torch.testing.assert_close(some_logits, logits[:, -last:])
        assert some_logits.dtype == torch.float32


@every_family
def test_padding_on_the_right_changes_no_key(family):
    """A text's keys are the same alone and in a batch with a longer one, with the mask and without."""
    model, long, short = build(family), tokens(1, 11), tokens(1, 5, seed=1)
    extractor = KeyExtractor(model)
    batch = torch.cat([long, torch.cat([short, torch.zeros((1, 6), dtype=torch.long)], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, 5:] = 0
    for given in (None, mask):
        keys = extractor.keys(batch, given)
        torch.testing.assert_close(keys[:1], extractor.keys(long), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(keys[1:, :5], extractor.keys(short), rtol=1e-4, atol=1e-4)


def test_the_pass_ends_at_the_key_layer_and_leaves_no_hook():
    """Neither the key layer nor anything after it is run for keys, and the model is as it was, also after an error."""
    model = build("llama")
    extractor = KeyExtractor(model)
    ran = []
    for module in (model.model.layers[-1].mlp, model.model.norm, model.lm_head):
        module.register_forward_hook(lambda module, args, output: ran.append(type(module).__name__))
    extractor.keys(tokens(1, 4))
    assert ran == []
    extractor.keys_and_logits(tokens(1, 4), last=1)
    assert len(ran) == 3
    with pytest.raises(IndexError):
        extractor.keys(torch.full((1, 4), VOCAB + 5))
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert model.config.use_cache


def test_threads_get_their_own_keys():
    """Two threads that share one model at the same time each get the keys of their own tokens."""
    model = build("gpt2")
    extractor = KeyExtractor(model)
    texts = [tokens(1, 5 + n, seed=n) for n in range(8)]
    expected = [extractor.keys(text) for text in texts]
    wrong: list[int] = []

    def work(mine: range) -> None:
        for _ in range(20):
            wrong.extend(n for n in mine if not torch.equal(extractor.keys(texts[n]), expected[n]))

    threads = [threading.Thread(target=work, args=(range(start, 8, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.0.mlp", "layers.0.mlp"),
        ("model.layers.1.mlp", "layers.1.mlp"),
        ("layers.2.mlp.down_proj", "layers.2.mlp.down_proj"),
        ("lm_head", "final"),
        ("final", "final"),
    ],
)
def test_a_layer_may_be_named_below_the_trunk_or_from_the_root(name, layer):
    """Either form of a path finds the module, and the key layer is known by one name; its width is the true one."""
    model, ids = build("llama"), tokens(1, 6)
    key, module = find_key_layer(model, name)
    assert key.layer == layer
    entering = []
    hook = module.register_forward_pre_hook(lambda module, args: entering.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    assert key.dim == entering[0].shape[-1] == (24 if "down_proj" in name else WIDTH)
    torch.testing.assert_close(KeyExtractor(model, name).keys(ids), entering[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.2.mlpp", ["no such module", "layers.2.mlp,", "final"]),
        ("", ["no such module"]),
        ("layers", ["a forward pass does not run it"]),
        ("embed_tokens", ["not a hidden state"]),
    ],
)
def test_a_layer_that_cannot_be_is_refused_with_names_that_can(name, words):
    """The message says why, and lists the parts of the last block."""
    with pytest.raises(ModelError) as raised:
        find_key_layer(build("llama"), name)
    for word in [*words, "--key-layer", "layers.2.self_attn"]:
        assert word in str(raised.value)


def test_a_list_of_experts_is_not_taken_for_the_blocks():
    """The blocks are the longest list of modules that is in no other list."""
    model = build("llama")
    model.model.layers[-1].mlp.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    assert find_key_layer(model)[0].layer == "layers.2.mlp"


def test_a_model_without_feed_forward_nets_needs_a_name():
    """Nothing is guessed where there is no feed-forward net; `final` works."""
    model = build("llama")
    del model.model.layers[-1].mlp
    with pytest.raises(ModelError, match=r"no feed-forward net found.*final"):
        find_key_layer(model)


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float16, "float32"), (torch.float32, "damaged")])
def test_keys_that_are_not_finite_are_refused(dtype, advice):
    """A key that is infinite or not a number is an error that names dtype, layer and number, unless it is of padding."""
    model = build("gpt2").to(dtype)
    extractor = KeyExtractor(model)
    with torch.no_grad():
        model.transformer.wte.weight[5] = torch.inf
    ids = torch.tensor([[7], [5]])  # one token each: attention spreads what is not finite over its text
    with pytest.raises(ModelError, match=rf"1 of 2 keys at layer h\.2\.mlp are not finite in {str(dtype)[6:]}.*{advice}"):
        extractor.keys(ids)
    with pytest.raises(ModelError, match="1 of 2 keys"):
        extractor.keys_and_logits(ids, last=1)
    assert extractor.keys(ids, torch.tensor([[1], [0]])).shape == (2, 1, WIDTH)


def test_last_out_of_range_is_refused():
    """`last` counts positions that were given."""
    extractor = KeyExtractor(build("gpt2"))
    for last in (0, 5):
        with pytest.raises(InvalidArgumentError, match="from 1 to the 4 positions"):
            extractor.keys_and_logits(tokens(1, 4), last=last)
