"""Loading models: each source gives a model that runs, with its identity; what cannot be used is refused by name."""

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from knnstore.errors import InvalidArgumentError, MissingExtraError, ModelError, NotFoundError
from knnstore.lm import dequantize, devices
from knnstore.lm.checkpoint import identity_of_files, identity_of_module, tokenizer_identity
from knnstore.lm.devices import choose_device, choose_dtype
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.models import default_model_folder, load_language_model

VOCAB = 40


def llama(**settings) -> transformers.LlamaForCausalLM:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(BPE({word: i for i, word in enumerate(byte_words())}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_words() -> list[str]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    return ["<s>", "</s>", "<unk>", "Ġ", *letters, *(f"<{n}>" for n in range(VOCAB - 30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as saved by transformers."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_the_default_model_is_the_one_that_ships(default_model_dir):
    """No source: the shipped model, whole, with tokenizer, sizes and identity."""
    if not default_model_dir.is_dir():
        pytest.skip("the default model is not in this checkout")
    lm = load_language_model(dtype="float32")
    assert load_language_model("default-gpt2").checkpoint == lm.checkpoint
    assert default_model_folder() == default_model_dir
    assert (lm.checkpoint.name, lm.checkpoint.architecture, lm.checkpoint.revision) == ("default-gpt2", "GPT2LMHeadModel", None)
    assert (lm.vocab_size, lm.checkpoint.vocab_size, lm.max_positions) == (8192, 8192, 512)
    assert lm.checkpoint.identity == identity_of_files(default_model_dir, "transformer")
    assert lm.tokenizer is not None
    assert lm.checkpoint.tokenizer == tokenizer_identity(lm.tokenizer)
    ids = lm.tokenizer("It was the best of times, it was the worst of times.", return_tensors="pt")["input_ids"]
    assert float(lm.model(input_ids=ids, labels=ids).loss) < 6 < math.log(lm.vocab_size)


def test_a_folder_is_loaded_as_transformers_does(folder):
    """Parameters, logits and tokens are those of transformers' own loading; the model is frozen and without dropout."""
    lm = load_language_model(folder, dtype="float32", device="cpu")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(lm.model(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert lm.checkpoint.name == str(folder)
    assert lm.checkpoint.identity == identity_of_files(folder, "model")
    assert (lm.device.type, lm.dtype, lm.max_positions, lm.vocab_size) == ("cpu", torch.float32, 32, VOCAB)
    assert lm.tokenizer is not None
    assert lm.tokenizer("b a")["input_ids"] == byte_tokenizer()("b a")["input_ids"]
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_a_folder_without_a_tokenizer_has_none(folder, tmp_path):
    """A model may come without a tokenizer; another may be given as an object or by its folder."""
    llama().save_pretrained(tmp_path)
    assert load_language_model(tmp_path).tokenizer is None
    own = byte_tokenizer()
    assert load_language_model(tmp_path, tokenizer=own).tokenizer is own
    by_folder = load_language_model(tmp_path, tokenizer=folder)
    assert by_folder.checkpoint == load_language_model(tmp_path, tokenizer=own).checkpoint


def test_a_model_in_memory_is_used_as_it_is():
    """The very object, where and as it was; its identity is that of its parameters now."""
    model = llama().to(torch.bfloat16)
    model.model.embed_tokens.weight.data[3, 3] = 0.25
    lm = load_language_model(model)
    assert lm.model is model
    assert (lm.dtype, lm.device.type, lm.tokenizer, lm.checkpoint.tokenizer) == (torch.bfloat16, "cpu", None, None)
    assert lm.checkpoint.identity == identity_of_module(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_converting_a_model_in_memory_keeps_its_identity(folder):
    """dtype converts the object given, after it was hashed, to what loading in that dtype gives; a LanguageModel keeps its checkpoint."""
    model = llama()
    before = identity_of_module(model)
    lm = load_language_model(model, dtype="bfloat16", device="cpu")
    assert (lm.model.dtype, lm.checkpoint.identity) == (torch.bfloat16, before)
    ids = torch.arange(30)[None]
    assert torch.equal(lm.model(input_ids=ids).logits, load_language_model(folder, dtype="bfloat16").model(input_ids=ids).logits)
    assert load_language_model(lm) is lm
    again = load_language_model(lm, tokenizer=byte_tokenizer(), dtype="float32")
    assert (again.checkpoint.identity, again.dtype, again.checkpoint.tokenizer is None) == (before, torch.float32, False)


def test_a_cached_hub_model_has_its_commit_and_identity(folder, tmp_path):
    """A hub name is found in the hub's cache; the revision is the commit, the identity that of the files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny-llama"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    lm = load_language_model("someone/tiny-llama", cache_dir=tmp_path)
    assert (lm.checkpoint.name, lm.checkpoint.revision) == ("someone/tiny-llama", commit)
    assert lm.checkpoint.identity == identity_of_files(folder, "model")
    assert lm.tokenizer is not None


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("someone/not-there", ModelError, "someone/not-there: its configuration cannot be loaded: .*Check the name and the network"),
        ("./not-there", NotFoundError, "no such folder or GGUF file"),
        ("not/a/hub-name", NotFoundError, "no such folder or GGUF file"),
        ("not-there.gguf", NotFoundError, "no such folder or GGUF file"),
        (Path("not-there"), NotFoundError, "no such folder or GGUF file"),
        (Path(__file__), ModelError, "neither a folder nor a GGUF file"),
        (Path(__file__).parent, ModelError, "has no config.json"),
        (17, InvalidArgumentError, "a int is no hub name"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, error, words, tmp_path):
    """Each message has the source as given and says what to do."""
    with pytest.raises(error, match=words):
        load_language_model(source, cache_dir=tmp_path)


def test_a_revision_is_for_the_hub_only(folder):
    """A local folder has no revisions: asking for one is an error, not ignored."""
    with pytest.raises(InvalidArgumentError, match="revision 'v2'"):
        load_language_model(folder, revision="v2")


def small(config: str, **settings):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return getattr(transformers, config)(**(sizes | settings))


def save_t5(folder: Path) -> None:
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(folder)


def save_bert(folder: Path) -> None:
    transformers.BertForMaskedLM(small("BertConfig")).save_pretrained(folder)


def save_trunk(folder: Path) -> None:
    llama().model.save_pretrained(folder)


def save_adapter(folder: Path) -> None:
    llama().save_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")


def save_unknown(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))


def save_cut(folder: Path) -> None:
    llama().save_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (save_t5, "an encoder-decoder"),
        (save_bert, "a masked LM"),
        (save_trunk, "the checkpoint lacks 1 parameters of LlamaForCausalLM, lm_head.weight"),
        (save_adapter, "a PEFT adapter"),
        (save_unknown, "configuration cannot be loaded: .*no-such-type"),
        (save_cut, "cannot be loaded"),
    ],
)
def test_a_checkpoint_that_is_no_whole_causal_lm_is_refused(save, words, tmp_path):
    """Other kinds of model, missing heads, adapters and cut files are errors that name the folder, before anything is built."""
    save(tmp_path / "other")
    with pytest.raises(ModelError, match=words) as raised:
        load_language_model(tmp_path / "other")
    assert str(tmp_path / "other") in str(raised.value)


def test_a_model_that_looks_ahead_is_refused():
    """Whatever its configuration says: a model that sees later tokens would put each value into its key."""
    torch.manual_seed(0)
    bert = transformers.BertLMHeadModel(small("BertConfig", initializer_range=0.5, architectures=[]))
    with pytest.raises(ModelError, match="BertLMHeadModel sees tokens that come later"):
        load_language_model(bert)


def test_a_trunk_without_a_head_is_refused():
    """A model in memory that gives no logits is no causal LM."""
    with pytest.raises(ModelError, match="LlamaModel does not run as a causal LM"):
        load_language_model(llama().model)


def write_gguf(path: Path, model: transformers.LlamaForCausalLM, words: list[str]) -> None:
    """A GGUF file as llama.cpp writes one: matrices in Q8_0, queries and keys with their rotary halves interleaved."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<") else 1 for word in words])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for name, parameter in model.state_dict().items():
        array = parameter.float().numpy()
        if name in outer:
            stored = outer[name]
        else:
            _, _, block, part = name.removesuffix(".weight").split(".", 3)
            stored = f"blk.{block}.{names[part]}.weight"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if part == "self_attn.q_proj" else config.num_key_value_heads
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_eight_bits(model: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    """The model with each matrix rounded to what Q8_0 can hold."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    kind = gguf.GGMLQuantizationType.Q8_0
    for parameter in model.parameters():
        if parameter.ndim == 2:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind)
            parameter.data = torch.from_numpy(rounded.reshape(parameter.shape))
    return model


def gguf_words() -> list[str]:
    words = byte_words()
    words[-1] = "ab"
    return words


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path, in_eight_bits(llama(tie_word_embeddings=True)), gguf_words())
    return path


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the extra gguf is not installed")
def test_a_gguf_file_is_dequantized_once_and_stays_the_same_model(gguf_file, tmp_path, monkeypatch, capfd):
    """The logits of the model it was made from, to float16 precision; identity = the file's; the second load only reads the folder."""
    lm = load_language_model(gguf_file, cache_dir=tmp_path, dtype="float32")
    assert capfd.readouterr().err == ""
    ids = torch.arange(12)[None]
    expected = in_eight_bits(llama(tie_word_embeddings=True))(input_ids=ids).logits.detach()
    assert float((lm.model(input_ids=ids).logits - expected).norm() / expected.norm()) < 2e-3
    assert lm.checkpoint.identity == dequantize.file_digest(gguf_file)
    assert (lm.checkpoint.name, lm.vocab_size, lm.max_positions) == (str(gguf_file), VOCAB, 32)
    assert lm.tokenizer is not None
    assert lm.tokenizer("ab c", add_special_tokens=False)["input_ids"] == [gguf_words().index(word) for word in ("ab", "Ġ", "c")]
    assert (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id) == (0, 1)
    assert KeyExtractor(lm.model).key.layer == "layers.1.mlp"

    made = next(tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == [f"gguf-1-{lm.checkpoint.identity}"]
    assert sum(file.stat().st_size for file in made.glob("*.safetensors")) < 3 * sum(p.numel() for p in lm.model.parameters())
    monkeypatch.setattr(dequantize, "_dequantize", lambda *_: pytest.fail("de-quantized again"))
    moved = shutil.copy(gguf_file, tmp_path / "elsewhere.gguf")
    again = load_language_model(moved, cache_dir=tmp_path, dtype="float32")
    assert (again.checkpoint.identity, again.checkpoint.tokenizer) == (lm.checkpoint.identity, lm.checkpoint.tokenizer)
    torch.testing.assert_close(again.model(input_ids=ids).logits, lm.model(input_ids=ids).logits)


def test_a_gguf_file_that_cannot_be_read_leaves_nothing(gguf_file, tmp_path):
    """A cut file is an error that names it; no half-made folder is left to be taken for a whole one."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:700])
    with pytest.raises(ModelError, match=r"cut\.gguf: transformers .* cannot load"):
        load_language_model(cut, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_the_extra_a_gguf_file_names_it(gguf_file, tmp_path, monkeypatch):
    """The message is the command that installs what is missing."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    with pytest.raises(MissingExtraError, match=r'pip install "knnstore\[gguf\]"'):
        load_language_model(gguf_file, cache_dir=tmp_path)


def test_devices_are_chosen_or_refused_by_name(monkeypatch):
    """CUDA, then MPS, then CPU; a device that is not there is an error that says what is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(None) == choose_device("cpu") == torch.device("cpu")
    for name, words in (("cuda", "no CUDA device"), ("mps", "no MPS device"), ("tpu9", "not a device"), ("meta", "not supported")):
        with pytest.raises(InvalidArgumentError, match=words):
            choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(None) == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device(None) == torch.device("cuda")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(InvalidArgumentError, match="1 CUDA device"):
        choose_device("cuda:1")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx512_f", torch.float32), ("neon", torch.float32)],
)
def test_bfloat16_is_chosen_where_the_cpu_computes_in_it(capability, expected, monkeypatch):
    """Automatic dtype on a CPU: bfloat16 with native instructions, float32 without; a named one always holds."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    cpu = torch.device("cpu")
    assert choose_dtype(None, cpu) == choose_dtype("auto", cpu) == expected
    assert [choose_dtype(name, cpu) for name in devices.DTYPES] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(InvalidArgumentError, match="dtype 'int8'"):
        choose_dtype("int8", cpu)


@pytest.mark.slow
def test_a_real_gguf_file_is_loaded(tmp_path):
    """The language model in the file that KNNSTORE_TEST_GGUF names knows the capital of France."""
    path = os.environ.get("KNNSTORE_TEST_GGUF")
    if not path:
        pytest.skip("KNNSTORE_TEST_GGUF does not name a GGUF file")
    lm = load_language_model(path, dtype="float32", cache_dir=tmp_path)
    assert lm.tokenizer is not None
    ids = lm.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert lm.tokenizer.decode(lm.model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"
