"""Laws of identity: which checkpoints and tokenizers are the same, and that remembering digests never changes the answer."""

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from knnstore.errors import CheckpointMismatchError, ModelError, StorageError
from knnstore.lm import file_digests
from knnstore.lm.checkpoint import check_same_checkpoint, identity_of_files, identity_of_module, tokenizer_identity
from knnstore.lm.models import load_language_model
from knnstore.storage.checkpoint import Checkpoint

SMALL = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

LAST_NORM = "transformer.ln_f"


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(3)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()


def model_of(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    tied = {"tie_word_embeddings": kind.endswith("tied")}
    configs = {
        "gpt2": lambda: gpt2().config,
        "llama": lambda: transformers.LlamaConfig(**SMALL, **tied),
        "llama-tied": lambda: transformers.LlamaConfig(**SMALL, **tied),
        "gpt-neox": lambda: transformers.GPTNeoXConfig(**SMALL, **tied),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=40, hidden_size=8, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8
        ),
        # Kept in memory in another form than in checkpoints: its experts are one tensor.
        "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, **tied),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32).eval()


KINDS = ("gpt2", "llama", "llama-tied", "gpt-neox", "opt", "mixtral")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 checkpoint in a folder, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "gpt2"
    gpt2().save_pretrained(folder)
    return folder


def rewritten(saved: Path, folder: Path, change) -> Path:
    """A copy of the checkpoint in which `change` was done to its dictionary of tensors."""
    shutil.copytree(saved, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in change(dict(tensors)).items()}, folder / "model.safetensors")
    return folder


def identity(folder: Path) -> str:
    return identity_of_files(folder, "transformer")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_in_memory_has_the_identity_of_its_files(kind, dtype, tmp_path):
    """A model, the folder it is saved to, and what is loaded from there in the stored dtype are one checkpoint."""
    model = model_of(kind).to(dtype)
    model.save_pretrained(tmp_path)
    of_files = identity_of_files(tmp_path, model.base_model_prefix)
    assert identity_of_module(model) == of_files
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert identity_of_module(loaded) == of_files


@pytest.mark.parametrize("kind", KINDS)
def test_sharding_and_path_do_not_count(kind, tmp_path):
    """In one file, in many, and copied elsewhere: the same identity."""
    model = model_of(kind)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    shutil.copytree(tmp_path / "many", tmp_path / "copied")
    assert len({identity_of_files(tmp_path / name, model.base_model_prefix) for name in ("one", "many", "copied")}) == 1


def test_compute_dtype_does_not_count(saved):
    """A folder loaded in any dtype is the same checkpoint."""
    assert {load_language_model(saved, dtype=dtype).checkpoint.identity for dtype in ("float32", "bfloat16")} == {identity(saved)}


def test_file_format_does_not_count(saved, tmp_path):
    """Torch's own files, single, sharded or of the old kind that cannot be mapped, have the identity of the safetensors file."""
    tensors = gpt2().state_dict()  # the LM head is in it, tied to the embedding
    assert "lm_head.weight" in tensors
    for name, old in (("new", False), ("old", True)):
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        assert identity(tmp_path / name) == identity(saved)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    places = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name].clone() for name in tensors if places[name] == file}, sharded / file)
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert identity(sharded) == identity(saved)


def test_the_trunks_prefix_does_not_count(saved, tmp_path):
    """GPT-2 on the hub has `h.0…` where save_pretrained writes `transformer.h.0…`."""
    bare = rewritten(saved, tmp_path / "bare", lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    assert set(load_file(bare / "model.safetensors")).isdisjoint(load_file(saved / "model.safetensors"))
    assert identity(bare) == identity(saved)


@pytest.mark.parametrize(
    ("name", "shape", "counts"),
    [
        ("transformer.h.0.attn.bias", (1, 1, 16, 16), False),
        ("transformer.h.0.attn.masked_bias", (), False),
        ("layers.0.attention.bias", (1, 1, 16, 16), False),
        ("layers.1.attention.masked_bias", (), False),
        ("layers.1.attention.rotary_emb.inv_freq", (4,), False),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 16, 4), False),
        ("transformer.h.0.attn.bias", (8,), True),
        ("transformer.h.0.attn.c_attn.bias2", (1, 1, 16, 16), True),
    ],
)
def test_stored_buffers_do_not_count_and_parameters_do(name, shape, counts, saved, tmp_path):
    """Causal masks and rotary frequencies that old checkpoints hold are no part of the identity; a bias vector is."""
    changed = rewritten(saved, tmp_path / "more", lambda tensors: tensors | {name: torch.ones(shape)})
    assert (identity(changed) != identity(saved)) is counts


def test_a_tied_head_counts_once(saved, tmp_path):
    """A stored LM head equal to the embedding is the tied one; one that differs is a parameter."""
    embedding = "transformer.wte.weight"
    tied = rewritten(saved, tmp_path / "tied", lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()})
    untied = rewritten(saved, tmp_path / "untied", lambda tensors: tensors | {"lm_head.weight": tensors[embedding] + 1})
    assert identity(tied) == identity(saved) != identity(untied)


@given(place=st.integers(min_value=0), bit=st.integers(0, 31))
def test_every_bit_of_every_parameter_counts(place, bit, saved):
    """One bit changed anywhere is another checkpoint, in the files and in memory; changed back it is the first again."""
    model = _MODEL
    parameters = [parameter for _, parameter in model.named_parameters()]
    place %= sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        if place < parameter.numel():
            break
        place -= parameter.numel()
    numbers = parameter.data.view(torch.int32).view(-1)
    mask = torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    numbers[place] ^= mask
    changed = identity_of_module(model)
    numbers[place] ^= mask
    assert changed != identity_of_module(model) == identity(saved)


_MODEL = gpt2()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {f"{LAST_NORM}.weight": t[f"{LAST_NORM}.bias"] + 0, f"{LAST_NORM}.bias": t[f"{LAST_NORM}.weight"] + 0},
        lambda t: {("transformer.ln_g.bias" if name == f"{LAST_NORM}.bias" else name): tensor for name, tensor in t.items()},
        lambda t: {name: tensor for name, tensor in t.items() if name != f"{LAST_NORM}.bias"},
        lambda t: t | {"transformer.wpe.weight": t["transformer.wpe.weight"].reshape(8, 16)},
        lambda t: {name: tensor.double() for name, tensor in t.items()},
        lambda t: t | {f"{LAST_NORM}.weight": t[f"{LAST_NORM}.weight"].view(torch.int32)},
    ],
    ids=["swapped", "renamed", "left out", "shape", "values the same in another dtype", "bytes the same in another dtype"],
)
def test_name_shape_and_stored_dtype_count(change, saved, tmp_path):
    """What differs in more than buffers, prefix or tied head is another checkpoint."""
    assert identity(rewritten(saved, tmp_path / "changed", change)) != identity(saved)


def test_a_transposed_view_in_memory_is_hashed_as_it_would_be_stored():
    """Digest of a tensor with strides = digest of its contiguous copy, also in pieces."""
    tensor = torch.randn(30, 7, 5)
    for view in (tensor.transpose(0, 2), tensor[::3], tensor[:, 2], torch.tensor(3.0)):
        assert file_digests.tensor_digest(view) == file_digests.tensor_digest(view.clone(memory_format=torch.contiguous_format))


def test_parameters_that_are_not_in_memory_are_refused():
    """A model whose parameters were offloaded has no bytes to hash."""
    with pytest.raises(ModelError, match="no bytes to hash"):
        identity_of_module(gpt2().to("meta"))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), ModelError, "no parameters found"),
        (lambda f: os.truncate(f / "model.safetensors", 900), ModelError, "not a whole safetensors file"),
        (lambda f: _index(f, {"a": "gone.safetensors"}), StorageError, "gone.safetensors: cannot be read"),
        (lambda f: _index(f, {"a": "part.safetensors"}), ModelError, "does not hold a"),
        (lambda f: _index(f, {"a": "../elsewhere/part.safetensors"}), ModelError, "not an index"),
        (lambda f: _index(f, []), ModelError, "not an index"),
    ],
)
def test_damaged_checkpoints_are_named(damage, error, words, saved, tmp_path):
    """Each way in which files can be missing or cut is an error that names the file."""
    folder = shutil.copytree(saved, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(error, match=words) as raised:
        identity(folder)
    assert str(folder) in str(raised.value)


def _index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def kept(saved, tmp_path, monkeypatch) -> Path:
    """A checkpoint whose digests are kept however small it is, and were kept."""
    monkeypatch.setattr(file_digests, "_KEPT_FROM_BYTES", 0)
    monkeypatch.setattr(file_digests, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(file_digests, "_SETTLED_S", 0.0)
    folder = shutil.copytree(saved, tmp_path / "model")
    past = time.time_ns() - 10**12
    os.utime(folder / "model.safetensors", ns=(past, past))
    time.sleep(0.02)
    identity(folder)
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    assert not list((tmp_path / "cache").rglob("*.part"))
    return folder


def test_a_large_file_is_hashed_once(kept, saved, monkeypatch):
    """The second time no tensor is read; under a link as well, since it is the same file."""
    monkeypatch.setattr(file_digests, "_stored_tensors", lambda path: pytest.fail("read again"))
    linked = kept.parent / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(kept / "model.safetensors")
    assert identity(kept) == identity(linked)
    monkeypatch.undo()
    assert identity(kept) == identity(saved)


def test_a_file_changed_in_place_is_hashed_again(kept, saved):
    """Same length, same modification time, other bytes: another identity, since the change time tells."""
    file = kept / "model.safetensors"
    stat = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert identity(kept) != identity(saved)


@pytest.mark.parametrize("damage", ["cut", "empty", "other digest", "other stamp", "not an object"])
def test_a_damaged_memory_is_as_none(damage, kept, saved):
    """Whatever is in the cache folder, the identity is right."""
    place = next((kept.parent / "cache").rglob("*.json"))
    content = json.loads(place.read_text())
    if damage == "other digest":
        content["found"]["transformer.wte.weight"][2] = "0" * 64
    if damage == "other stamp":
        content["stamp"][-1] += 1
    text = json.dumps([] if damage == "not an object" else content)
    place.write_text({"cut": text[:-9], "empty": ""}.get(damage, text))
    assert identity(kept) == identity(saved)


def test_a_cache_folder_that_cannot_be_used_is_as_none(kept, saved, monkeypatch):
    """A file where the folder should be: nothing is kept, nothing fails."""
    shutil.rmtree(kept.parent / "cache")
    (kept.parent / "cache").write_text("")
    assert identity(kept) == identity(saved)


def test_a_file_changed_a_moment_ago_is_not_kept(saved, tmp_path, monkeypatch):
    """Two changes within the resolution of time stamps could look like one."""
    monkeypatch.setattr(file_digests, "_KEPT_FROM_BYTES", 0)
    monkeypatch.setattr(file_digests, "cache_folder", lambda: tmp_path / "cache")
    identity(shutil.copytree(saved, tmp_path / "model"))
    assert not (tmp_path / "cache").exists()


def word_tokenizer(words: str = "<s> </s> <unk> a b c", **settings) -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings)
    )


def test_a_tokenizer_keeps_its_identity_in_use_and_when_saved(tmp_path):
    """Cutting, padding and being saved and loaded again do not make another tokenizer."""
    tokenizer = word_tokenizer(pad_token="</s>")
    first = tokenizer_identity(tokenizer)
    tokenizer(["a b c", "a"], truncation=True, max_length=2, padding=True)
    assert tokenizer_identity(tokenizer) == first
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_identity(transformers.AutoTokenizer.from_pretrained(tmp_path)) == first


@pytest.mark.parametrize(
    "other",
    [
        lambda: word_tokenizer("<s> </s> <unk> a c b"),
        lambda: word_tokenizer("<s> </s> <unk> a b c d"),
        lambda: word_tokenizer(eos_token="<s>"),
        lambda: word_tokenizer(bos_token=None),
        lambda: _with_added(word_tokenizer()),
        lambda: _without_pre_tokenizer(word_tokenizer()),
    ],
    ids=["ids swapped", "a word more", "another EOS", "no BOS", "a token added", "no pre-tokenizer"],
)
def test_what_decides_on_tokens_counts(other):
    """Vocabulary, pre-tokenizer, added tokens, BOS and EOS are the tokenizer's identity."""
    assert tokenizer_identity(other()) != tokenizer_identity(word_tokenizer())


def _with_added(tokenizer):
    tokenizer.add_tokens(["ab"])
    return tokenizer


def _without_pre_tokenizer(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def test_a_tokenizer_without_a_fast_version_is_refused():
    """Only fast tokenizers know the characters of a token."""
    with pytest.raises(ModelError, match="not a fast tokenizer"):
        tokenizer_identity(transformers.ByT5Tokenizer())


def checkpoint(identity: str = "a", tokenizer: str | None = "t", name: str = "first") -> Checkpoint:
    return Checkpoint(
        name=name,
        revision=None,
        identity=identity * 64,
        tokenizer=tokenizer and tokenizer * 64,
        architecture="GPT2LMHeadModel",
        vocab_size=40,
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (checkpoint("b", name="second"), ["checkpoint aaaaaaaaaaaa (first)", "bbbbbbbbbbbb (second)", "Load the first"]),
        (checkpoint(tokenizer="u", name="second"), ["tokenizer tttttttttttt (first)", "uuuuuuuuuuuu (second)", "checkpoints are the same"]),
    ],
)
def test_another_checkpoint_or_tokenizer_is_refused_by_name(given, words):
    """The error names both and the store; where the mismatch is allowed, a warning does."""
    with pytest.raises(CheckpointMismatchError) as raised:
        check_same_checkpoint(checkpoint(), given, at="law.knn")
    with pytest.warns(UserWarning, match=r"law\.knn: built with .*second"):
        check_same_checkpoint(checkpoint(), given, at="law.knn", allow_model_mismatch=True)
    for word in [*words, "law.knn: built with"]:
        assert word in str(raised.value)


@pytest.mark.parametrize("given", [checkpoint(name="copy"), checkpoint(tokenizer=None)])
def test_the_same_checkpoint_passes_in_silence(given):
    """Names do not count, and a tokenizer that one of the two lacks cannot differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_checkpoint(checkpoint(), given, at="law.knn")
        check_same_checkpoint(given, checkpoint(), at="law.knn", allow_model_mismatch=True)
