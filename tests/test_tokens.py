"""Pieces of text, and tokens with the characters they come from, for the kinds of tokenizers that language models have."""

import copy
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from knnstore.errors import InvalidArgumentError, ModelError
from knnstore.lm import tokens
from knnstore.lm.tokens import PIECE_CHARS, DocumentTokenizer, TokenPiece, cut_pieces

DEFAULT_MODEL = Path(__file__).parents[1] / "knnstore" / "models" / "default-gpt2"
SAMPLE = DEFAULT_MODEL.parents[1] / "samples" / "a-christmas-carol.txt"
SPECIAL = "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyzTé.,<>/|_"

# Characters of one to four bytes, combining marks, line breaks, and the names of special tokens.
parts = st.sampled_from(
    ["the ", "He", " ", "  ", "\r\n", "\n", "\t", "é", "e\u0301", "\u0301", "漢字", "😀", "👩‍👩‍👧", "각", "\u1112\u1161\u11ab", "\0"]
)
names = st.sampled_from([SPECIAL, "<s>", "</s>", "<unk>", "<0x0A>", "▁"])
texts = st.lists(parts | names | st.text(max_size=6), max_size=12).map("".join)


# --- tokenizers of each kind


def byte_level(
    *, normalizer: normalizers.Normalizer | None = None, trim_offsets: bool = True, add_prefix_space: bool = False
) -> PreTrainedTokenizerBase:
    """The default model's (GPT-2 kind), with the parts that others of its kind have."""
    backend = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL, eos_token=SPECIAL)


def llama(kind: str) -> PreTrainedTokenizerBase:
    """A small Llama kind: ▁ for spaces and before the text, by a normalizer or by Metaspace, and bytes for unknown characters."""
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("a", "b")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=kind == "always")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerBase:
    """A Unigram model, in whose vocabulary special tokens are pieces like any other (XGLM kind)."""
    vocab = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0), *((letter, -5.0) for letter in LETTERS)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {
    "gpt2": byte_level(),
    "gpt2-untrimmed": byte_level(trim_offsets=False),
    "gpt2-prefix": byte_level(add_prefix_space=True),
    "gptneox": byte_level(normalizer=normalizers.NFC()),
    "llama-normalizer": llama("normalizer"),
    "llama-first": llama("first"),
    "llama-always": llama("always"),
    "unigram": unigram(),
}
MADE = {kind: DocumentTokenizer(tokenizer) for kind, tokenizer in KINDS.items()}
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def token_bytes(kind: str, token_id: int) -> bytes:
    """A token's own bytes by the rules of its kind, ▁ being a space."""
    token = str(KINDS[kind].convert_ids_to_tokens(token_id))
    if "▁" in KINDS[kind].get_vocab():
        return bytes.fromhex(token[3:5]) if token.startswith("<0x") and len(token) == 6 else token.replace("▁", " ").encode()
    # GPT-2 writes printable bytes as themselves, and the rest, in order, as characters from 256.
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return bytes(byte_of[character] for character in token)


def joined(pieces: Iterable[TokenPiece]) -> tuple[str, list[int], list[int], list[int]]:
    """The document's text, ids, starts and ends."""
    found = list(pieces)
    for piece in found:
        assert [array.dtype.name for array in (piece.ids, piece.starts, piece.ends)] == ["int32", "int64", "int64"]
        assert piece.ids.shape == piece.starts.shape == piece.ends.shape
    return (
        "".join(piece.text for piece in found),
        [i for piece in found for i in piece.ids.tolist()],
        [i for piece in found for i in piece.starts.tolist()],
        [i for piece in found for i in piece.ends.tolist()],
    )


# --- pieces


def pieces_by_hand(text: str, size: int) -> list[str]:
    """One character at a time, on the whole text."""
    found = []
    while len(text) > size:
        places = [i for i in range(1, size + 1) if not text[i - 1].isspace() and text[i].isspace()]
        spaces = [i for i in places if text[i] == " "]
        cut = (spaces or places or [size])[-1]
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text] if text else found


@given(text=st.text(alphabet="ab \n\u3000漢", max_size=60), cuts=st.lists(st.integers(0, 60), max_size=5), size=st.integers(1, 12))
def test_pieces_do_not_depend_on_chunks(text: str, cuts: list[int], size: int) -> None:
    """However the text comes, its pieces are those found by hand on the whole of it."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = list(cut_pieces([text[a:b] for a, b in pairwise(edges)], size))
    assert pieces == pieces_by_hand(text, size)
    assert "".join(pieces) == text
    assert all(1 <= len(piece) <= size for piece in pieces)


def test_a_piece_ends_before_a_space_or_else_a_line_break() -> None:
    """A line break stays with the punctuation before it where there is a space to cut at."""
    assert list(cut_pieces(["one two.\nthree"], 10)) == ["one", " two.", "\nthree"]
    assert list(cut_pieces(["one\ntwo\nthree"], 9)) == ["one\ntwo", "\nthree"]
    assert list(cut_pieces(["onetwothree"], 5)) == ["onetw", "othre", "e"]
    assert list(cut_pieces([], 5)) == list(cut_pieces(["", ""], 5)) == []
    with pytest.raises(InvalidArgumentError, match="piece_chars is 0"):
        list(cut_pieces(["a"], 0))


@pytest.mark.parametrize("unit", ["x", "a\n", *(pytest.param(unit, marks=pytest.mark.slow) for unit in (" ", "\n", "word ", "漢"))])
def test_a_line_of_50_mb_is_cut_in_a_few_seconds(unit: str) -> None:
    """Time is linear, whether the text is one word, one run of spaces, or has no spaces at all."""
    text = unit * (50_000_000 // len(unit.encode()))
    begun = time.perf_counter()
    assert sum(map(len, cut_pieces([text]))) == len(text)
    assert time.perf_counter() - begun < 10  # at most 1.5 s on an idle core


def test_many_small_chunks_are_cut_in_linear_time() -> None:
    """Chunks are joined when there is a piece, not one by one."""
    begun = time.perf_counter()
    assert sum(map(len, cut_pieces("x" for _ in range(2_000_000)))) == 2_000_000
    assert time.perf_counter() - begun < 10


# --- ids


@every_kind
@given(text=texts)
def test_ids_are_those_of_the_tokenizer_for_text_without_special_tokens(kind: str, text: str) -> None:
    """In one piece: what transformers gives for the same text when nothing in it or around it is special; of a query too."""
    if kind == "unigram" and any(name in text for name in ("<s>", "</s>", "<unk>")):
        return  # transformers takes these for special tokens; see below
    expected = KINDS[kind](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert joined(MADE[kind].tokenize([text]))[:2] == (text, expected)
    assert MADE[kind].encode(text).tolist() == expected


@every_kind
def test_names_of_special_tokens_are_text(kind: str) -> None:
    """A text about <|endoftext|> does not end the document; nor do </s> and <s> in any model."""
    made = MADE[kind]
    assert made.bos_id is not None
    assert made.eos_id is not None
    for name in (SPECIAL, "<s>", "</s>"):
        ids = made.encode(f"a{name} b {name}").tolist()
        assert not {made.bos_id, made.eos_id} & set(ids)
        if kind != "unigram":
            assert name in KINDS[kind].decode(ids, clean_up_tokenization_spaces=False)


def test_added_tokens_that_are_not_special_stay_tokens() -> None:
    """They are words of the model's vocabulary, and keep their ids where the special ones had to be renamed."""
    assert MADE["unigram"].encode("the<think></s>").tolist().count(KINDS["unigram"].convert_tokens_to_ids("<think>")) == 1


@every_kind
def test_the_tokenizer_given_stays_as_it_was(kind: str) -> None:
    """Its truncation and padding neither matter nor change."""
    tokenizer = copy.deepcopy(KINDS[kind])
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=32)
    before = backend.to_str()
    text = "the abc the abc the abc <s> é"
    assert DocumentTokenizer(tokenizer).encode(text).tolist() == MADE[kind].encode(text).tolist()
    assert backend.to_str() == before
    assert backend.encode_special_tokens is False


def test_random_splits_are_switched_off() -> None:
    """A tokenizer file may have BPE dropout, meant for training."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.model.dropout = 0.9
    made = DocumentTokenizer(tokenizer)
    assert made.encode("the same words").tolist() == MADE["gpt2"].encode("the same words").tolist()


def test_the_rule_names_what_is_put_around_a_document() -> None:
    """BOS and EOS are the caller's to put, if the tokenizer has them and they are wanted."""
    assert MADE["gpt2"].rule == {"piece_chars": PIECE_CHARS, "bos": True, "eos": True}
    assert (MADE["llama-first"].bos_id, MADE["llama-first"].eos_id) == (1, 2)
    without = DocumentTokenizer(KINDS["llama-first"], eos=False)
    assert (without.bos_id, without.eos_id) == (1, None)
    assert without.rule == {"piece_chars": PIECE_CHARS, "bos": True, "eos": False}
    bare = PreTrainedTokenizerFast(tokenizer_object=KINDS["gpt2"].backend_tokenizer)
    assert DocumentTokenizer(bare).rule == {"piece_chars": PIECE_CHARS, "bos": False, "eos": False}


def test_a_slow_tokenizer_is_refused() -> None:
    """Without offsets there are no contexts to show."""

    class Slow:
        is_fast = False
        bos_token_id = eos_token_id = 0

    with pytest.raises(ModelError, match="Slow: not a fast tokenizer"):
        DocumentTokenizer(Slow())  # type: ignore[arg-type]


@every_kind
def test_half_a_character_is_refused(kind: str) -> None:
    """Python strings may hold what no file can."""
    with pytest.raises(InvalidArgumentError, match="lone surrogate"):
        MADE[kind].encode("a\ud800")
    with pytest.raises(InvalidArgumentError, match="lone surrogate"):
        list(MADE[kind].tokenize(["a\udc00"]))


@every_kind
def test_no_text_has_no_tokens(kind: str) -> None:
    """Not even the space that some put before a text."""
    assert list(MADE[kind].tokenize([])) == list(MADE[kind].tokenize(["", ""])) == []
    assert MADE[kind].encode("").tolist() == []
    assert MADE[kind].encode("").dtype == np.int32


# --- offsets


@every_kind
@given(text=texts)
@example(text="😀the 漢 \u1112\u1161\u11ab\u1112\u1161 q\u0323\u0307 e\u0301\u0301")
def test_each_token_has_characters_in_order(kind: str, text: str) -> None:
    """No span is empty or beyond the text, none begins before the one before it; every character is some token's."""
    _, ids, starts, ends = joined(MADE[kind].tokenize([text]))
    assert all(0 <= a < b <= len(text) for a, b in zip(starts, ends, strict=True))
    assert starts == sorted(starts)
    covered = {i for a, b in zip(starts, ends, strict=True) for i in range(a, b)}
    assert covered == set(range(len(text)))
    assert len(ids) == len(starts)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-untrimmed", "llama-normalizer", "llama-first"])
@given(text=texts.filter(lambda text: "▁" not in text))
def test_spans_are_the_characters_that_the_bytes_belong_to(kind: str, text: str) -> None:
    """Counting bytes from the beginning: a token's span is each character of which it has a byte, and no other."""
    character_of = [i for i, character in enumerate(text) for _ in character.encode()]
    _, ids, starts, ends = joined(MADE[kind].tokenize([text]))
    own = [token_bytes(kind, i) for i in ids]
    # The space put before a text belongs to its first character.
    extra = len(b"".join(own)) - len(character_of)
    assert extra in (0, 1)
    character_of = [0] * extra + character_of
    assert b"".join(own) == b" " * extra + text.encode()
    position = 0
    for token, start, end in zip(own, starts, ends, strict=True):
        characters = character_of[position : position + len(token)]
        assert (start, end) == (characters[0], characters[-1] + 1)
        position += len(token)


@given(text=st.lists(parts, max_size=12).map("".join))
@example(text="e\u0301x \u1112\u1161\u11ab end e\u0301")
def test_composed_characters_have_all_their_parts(text: str) -> None:
    """Under a normalizer that makes é of e and an accent, the token's span has the accent too."""
    _, ids, starts, ends = joined(MADE["gptneox"].tokenize([text]))
    own = [token_bytes("gptneox", i) for i in ids]
    assert b"".join(own) == unicodedata.normalize("NFC", text).encode()
    for token, start, end in zip(own, starts, ends, strict=True):
        assert token in unicodedata.normalize("NFC", text[start:end]).encode()


@every_kind
@given(text=texts, size=st.integers(3, 20))
def test_offsets_run_through_the_document(kind: str, text: str, size: int) -> None:
    """Tokens of later pieces are those of the piece by itself, moved by the text before; only the first may have a space put before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "cut_pieces", lambda chunks: cut_pieces(chunks, size))
        pieces = list(MADE[kind].tokenize([text]))
        assert MADE[kind].encode(text).tolist() == joined(pieces)[1]
    assert [piece.text for piece in pieces] == pieces_by_hand(text, size)
    offset = 0
    for piece in pieces:
        assert all((offset <= piece.starts) & (piece.starts < piece.ends) & (piece.ends <= offset + len(piece.text)))
        offset += len(piece.text)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_a_cut_before_a_space_changes_no_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary text has the same tokens and spans in pieces as whole."""
    text = 'The the he.\nabc  "the"  the, the\r\n\r\n  abc café 漢字 the 😀 the <s> the. The'
    whole = joined(MADE[kind].tokenize([text]))
    for size in range(14, len(text)):
        monkeypatch.setattr(tokens, "cut_pieces", lambda chunks, size=size: cut_pieces(chunks, size))
        pieces = list(MADE[kind].tokenize([text]))
        assert len(pieces) > 1
        assert joined(pieces) == whole


# --- size


def test_a_long_text_streams_through() -> None:
    """Chunks are taken as pieces are asked for; a line of 3 MB without a space takes its linear time."""
    taken = 0

    def chunks() -> Iterable[str]:
        nonlocal taken
        for _ in range(40):
            taken += 1
            yield "xyzé漢" * 15_000

    begun = time.perf_counter()
    pieces = MADE["gpt2"].tokenize(chunks())
    first = next(iter(pieces))
    assert taken <= 2
    n_chars = len(first.text) + sum(len(piece.text) for piece in pieces)
    assert n_chars == 40 * 75_000
    assert time.perf_counter() - begun < 20  # 2 s on an idle core


def test_a_real_book_is_covered() -> None:
    """The sample book: every character in some token, between three and five characters to a token."""
    text = SAMPLE.read_text(encoding="utf-8")
    whole, ids, starts, ends = joined(MADE["gpt2"].tokenize([text]))
    assert whole == text
    assert 3 < len(text) / len(ids) < 5
    assert (starts[0], ends[-1]) == (0, len(text))
    assert all(end >= start for end, start in zip(ends, starts[1:], strict=False))


def test_neither_torch_nor_transformers_is_loaded_by_import() -> None:
    """Listing a corpus and planning windows need no model."""
    modules = ", ".join(f"knnstore.lm.{name}" for name in ("corpus", "tokens", "windows"))
    program = f"import sys, {modules}; print({{'torch', 'transformers', 'tokenizers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=DEFAULT_MODEL.parents[2])
    assert done.stdout.strip() == "set()"
