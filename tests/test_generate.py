"""`generate`: what it takes, what it returns, what holds around the mixture. That its texts are right: see test_generate_oracle.py."""

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lms
import mixtures
import numpy as np
import pytest
import torch
import transformers
from mixtures import VOCAB, bare, build, in_threads, log_p

import knnstore
from knnstore.errors import InvalidArgumentError
from knnstore.lm import generation
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import load_language_model

KIND = build("gpt2")
EOS = 0
LOVED = 42  # the token that every entry of `fond` has


@pytest.fixture
def lm(tmp_path: Path) -> Iterator[KnnLM]:
    with mixtures.loaded(KIND, tmp_path) as made:
        yield made


@pytest.fixture
def fond(tmp_path: Path) -> Iterator[KnnLM]:
    """A datastore whose neighbours all say one token, and nearly all of p is theirs."""
    with mixtures.loaded(replace(KIND, values=np.full(len(KIND.values), LOVED)), tmp_path, lmbda=0.99) as made:
        yield made


def new_ids(lm: KnnLM, prompt: list[int], **options: object) -> list[int]:
    """Ids of what is generated, from transformers' own output."""
    return lm.generate(prompt, return_dict_in_generate=True, **options).sequences[0, len(prompt) :].tolist()


# --- what is given and what comes back


def test_a_prompt_gives_a_text_and_prompts_give_a_list(lm):
    """Several sequences of a prompt are a list; of several prompts, a list of lists; the same as one by one."""
    options = {"max_new_tokens": 5}
    texts = ["Marley was", "Scrooge", "the"]
    one = [lm.generate(text, **options) for text in texts]
    assert all(isinstance(text, str) for text in one)
    assert lm.generate(texts, **options) == one
    assert lm.generate(texts[:1], **options) == one[:1]
    beams = {"num_beams": 3, "num_return_sequences": 2} | options
    two = [lm.generate(text, **beams) for text in texts]
    assert [len(found) for found in two] == [2, 2, 2]
    assert lm.generate(texts, **beams) == two


def test_the_text_begins_with_the_prompt(lm):
    """As it was given, also where the tokenizer would not give it back; then what the new tokens say, without special tokens."""
    for prompt in ("Marley was dead", " \n two  spaces ", "naïve 漢字", f"a {lms.END} b"):
        ids = lm.encode(prompt).tolist()
        new = new_ids(lm, ids, max_new_tokens=6)
        assert lm.generate(prompt, max_new_tokens=6) == prompt + lm.tokenizer.decode([*ids, *new], skip_special_tokens=True)[len(prompt) :]


def test_pieces_with_leading_spaces_keep_them(tmp_path):
    """A word piece at the beginning of the new tokens keeps the space that it stands for."""
    kind = build("llama")
    piece = kind.tokenizer.convert_tokens_to_ids("▁the")
    with mixtures.loaded(replace(kind, values=np.full(len(kind.values), piece)), tmp_path, lmbda=0.999) as made:
        assert made.generate("Marley", max_new_tokens=2) == "Marley the the"


def test_ids_may_be_given_for_text(lm):
    """As a list, an array or a tensor, also several; they are what the model sees, so no BOS is added."""
    prompt, seen = "Marley was", []
    ids = lm.encode(prompt)
    assert ids[0] == lm.tokenizer.bos_token_id
    hook = lm.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    text = lm.generate(prompt, max_new_tokens=4)
    assert seen[0] == [ids.tolist()]
    hook.remove()
    for given in (ids.tolist(), ids, torch.from_numpy(ids)):
        assert lm.generate(given, max_new_tokens=4) == text
    assert lm.generate(np.stack([ids, ids]), max_new_tokens=4) == [text, text]
    assert lm.generate([ids.tolist(), prompt], max_new_tokens=4) == [text, text]


def test_return_dict_in_generate_gives_transformers_output(lm):
    """With log p as logits, whatever else was asked for, and the scores of beams."""
    found = lm.generate("Marley", max_new_tokens=3, return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
    assert isinstance(found, transformers.generation.GenerateDecoderOnlyOutput)
    assert found.logits[0].exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert len(found.hidden_states) == 3
    config = transformers.GenerationConfig(max_new_tokens=3, return_dict_in_generate=True)
    torch.testing.assert_close(lm.generate("Marley", generation_config=config).sequences, found.sequences)


def test_attribution_is_asked_for_whole_sequences(lm, monkeypatch):
    """Each sequence goes to `trace` once, without padding and without what stands after its end."""
    asked = []
    monkeypatch.setattr("knnstore.lm.attribution.trace", lambda lm, ids, n_prompt: asked.append((ids.tolist(), n_prompt)) or len(asked))
    prompts = mixtures.prompts(3)
    eos = int(np.bincount(KIND.values).argmax())
    options = {"max_new_tokens": 9, "eos_token_id": eos, "pad_token_id": eos}
    assert lm.generate(prompts, attribute=True, **options) == [1, 2, 3]
    for prompt, (ids, n_prompt) in zip(prompts, asked, strict=True):
        new = new_ids(lm, prompt, **options)
        assert (ids, n_prompt) == (prompt + new, len(prompt))
        assert eos not in new[:-1]
    assert lm.generate(prompts[0], attribute=True, num_return_sequences=2, num_beams=2, **options) == [4, 5]


# --- how long


def test_forty_tokens_where_nobody_says(lm):
    """Or as many as there are positions for; what the model's own config or a given one says comes first."""
    end = {"eos_token_id": None}
    assert len(new_ids(lm, [5, 6], **end)) == generation.NEW_TOKENS
    assert len(new_ids(lm, [5] * 60, **end)) == 5  # 64 positions: the last token is not run
    for name in ("max_new_tokens", "max_length"):
        given = transformers.GenerationConfig(**{name: 7})
        assert len(new_ids(lm, [5, 6], generation_config=given, **end)) == (7 if name == "max_new_tokens" else 5)
        assert (given.disable_compile, given.pad_token_id) == (transformers.GenerationConfig().disable_compile, None)  # it is the caller's
    defaults, lm.model.generation_config = lm.model.generation_config, copy.deepcopy(lm.model.generation_config)
    try:
        lm.model.generation_config.max_new_tokens = 3
        assert len(new_ids(lm, [5, 6], **end)) == 3
        assert len(new_ids(lm, [5, 6], max_new_tokens=4, **end)) == 4
    finally:
        lm.model.generation_config = defaults


def test_what_does_not_fit_the_model_is_refused(lm):
    """With the numbers, and what would fit. The context that keys were made with is no limit."""
    assert len(new_ids(lm, [5] * 64, max_new_tokens=1)) == 1
    for prompt, options, words in (
        ([5] * 60, {"max_new_tokens": 6}, r"60 tokens and 6 new ones: the model has 64 positions.*max_new_tokens=5 at most"),
        ([5] * 60, {"max_length": 66}, r"60 tokens and 6 new ones"),
        ([5] * 65, {}, r"65 tokens: the model has 64 positions\. Give a shorter prompt\."),
        ([[5] * 3, [5] * 60], {"max_new_tokens": 6}, "60 tokens and 6"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            lm.generate(prompt, **options)


def test_texts_end_at_the_tokenizers_eos(tmp_path):
    """Where the model's generation config has none; given as None there is none."""
    model = lms.gpt2_model()
    model.generation_config.eos_token_id = None
    kind = replace(KIND, language_model=load_language_model(model, tokenizer=KIND.tokenizer), values=np.full(len(KIND.values), EOS))
    with mixtures.loaded(kind, tmp_path, lmbda=0.99) as made:
        assert new_ids(made, [5, 6], max_new_tokens=5) == [EOS]
        assert new_ids(made, [5, 6], max_new_tokens=5, eos_token_id=None) == [EOS] * 5
        assert made.generate([[5, 6], [5]], max_new_tokens=5) == [made.tokenizer.decode([5, 6]), made.tokenizer.decode([5])]


# --- before processors and warpers


def test_a_banned_token_stays_banned(fond):
    """However much the neighbours want it: the mixture comes before transformers' processors."""
    assert new_ids(fond, [5, 6], max_new_tokens=8) == [LOVED] * 8
    for ban in (
        {"bad_words_ids": [[LOVED]]},
        {"suppress_tokens": [LOVED]},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [token for token in range(VOCAB) if token != LOVED]},
        {"logits_processor": transformers.LogitsProcessorList([transformers.SuppressTokensLogitsProcessor([LOVED], device="cpu")])},
        {"sequence_bias": [[[LOVED], -1e4]]},
    ):
        for mode in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}, {"prompt_lookup_num_tokens": 2}):
            assert LOVED not in new_ids(fond, [5, 6, LOVED, 5, 6], max_new_tokens=8, **ban, **mode)
    first = new_ids(fond, [5, 6], max_new_tokens=8, begin_suppress_tokens=[LOVED])
    assert first[0] != LOVED
    assert first[1:] == [LOVED] * 7
    twice = new_ids(fond, [5, 6], max_new_tokens=8, no_repeat_ngram_size=2)
    assert all(pair.count(LOVED) < 2 for pair in [twice[i : i + 2] for i in range(3, 7)])


def test_a_text_is_not_ended_too_early(fond):
    """With min_new_tokens an EOS is not taken, though the neighbours all have it."""
    options = {"max_new_tokens": 9, "eos_token_id": LOVED}
    assert new_ids(fond, [5, 6], **options) == [LOVED]
    found = new_ids(fond, [5, 6], min_new_tokens=6, **options)
    assert len(found) == 7
    assert LOVED not in found[:6]


def test_penalties_are_of_log_p(lm):
    """Repetition penalty as transformers has it: log p of a token that was there is multiplied."""
    ids = [5, 6, 7]
    for _ in range(10):
        scores = log_p(KIND, ids)[-1]
        scores[list(set(ids))] *= 1.8
        ids = [*ids, int(scores.argmax())]
    assert new_ids(lm, [5, 6, 7], max_new_tokens=10, repetition_penalty=1.8, eos_token_id=None) == ids[3:]
    assert new_ids(lm, [5, 6, 7], max_new_tokens=10, eos_token_id=None) != ids[3:]


def test_guidance_is_over_mixtures(lm):
    """Both passes of classifier-free guidance are the mixture's."""
    ids, bare_ids = [5, 6, 7], [7]
    for _ in range(4):
        with_prompt, without = log_p(KIND, ids)[-1], log_p(KIND, bare_ids)[-1]
        token = int((without + 1.7 * (with_prompt - without)).argmax())
        ids, bare_ids = [*ids, token], [*bare_ids, token]
    assert new_ids(lm, [5, 6, 7], max_new_tokens=4, guidance_scale=1.7, eos_token_id=None) == ids[3:]


# --- stopping and streaming


def test_stop_strings_need_no_tokenizer(fond):
    """It is there already. What stopped early is not padded in the text of a batch."""
    stop = fond.tokenizer.decode([LOVED])
    options = {"max_new_tokens": 8, "stop_strings": [stop * 3]}
    assert fond.generate("Marley", **options) == "Marley" + stop * 3
    assert fond.generate(["Marley", f"a{stop}{stop}"], pad_token_id=9, **options) == ["Marley" + stop * 3, f"a{stop}{stop}{stop}"]


def test_stopping_criteria_and_streamers_are_taken(lm):
    """A criterion of one's own ends the text; a streamer sees prompt and tokens as they come."""

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.seen, self.ended = [], False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    class Three(transformers.StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 5)

    streamer = Streamer()
    found = new_ids(lm, [5, 6], streamer=streamer, stopping_criteria=transformers.StoppingCriteriaList([Three()]), max_new_tokens=9)
    assert len(found) == 3
    assert streamer.seen == [5, 6, *found]
    assert streamer.ended


# --- what is refused


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "no prompt was given"),
        ([5, VOCAB], {}, "the vocabulary has 400"),
        ([[]], {}, "give text, or a row of token ids"),
        ("a", {"assistant_early_exit": 1}, "assistant_early_exit cannot be used with a datastore"),
        ("a", {"dola_layers": "high"}, "dola_layers cannot be used with a datastore"),
        ("a", {"use_mtp": True}, "use_mtp cannot be used with a datastore"),
        ("a", {"generation_config": transformers.GenerationConfig(assistant_early_exit=1)}, "assistant_early_exit cannot be used"),
        ("a", {"cache_implementation": "paged"}, "'paged' runs the model in a thread"),
        ("a", {"input_ids": torch.tensor([[5]])}, "input_ids is made from the prompts"),
        ("a", {"attention_mask": torch.tensor([[1]])}, "attention_mask is made from the prompts"),
        ("a", {"attribute": True, "return_dict_in_generate": True}, "Give one of them"),
        (["a", "b"], {"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens takes one prompt at a time, and 2 were given"),
        (["a", "b"], {"assistant_model": KIND.model}, "assistant_model takes one prompt"),
    ],
)
def test_what_cannot_be_is_refused_by_name(lm, prompts, options, words):
    """Before anything is run, and nothing is left behind."""
    with pytest.raises(InvalidArgumentError, match=words):
        lm.generate(prompts, **options)
    assert bare(lm)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": KIND.model}, {"guidance_scale": 1.5}],
    ids=lambda options: next(iter(options)),
)
def test_pointers_follow_one_text(lm, options):
    """What sorts or splits texts between tokens cannot be used with them; greedy decoding can, and one search is made at least."""
    other = KnnLM(lm.store, lm.language_model, lm.extractor, replace(lm.settings, retrieval="pointers"), lm.context)
    with pytest.raises(InvalidArgumentError, match=f"{next(iter(options))} cannot be used with retrieval 'pointers'"):
        other.generate("a", **options)
    assert isinstance(other.generate("a", max_new_tokens=3), str)


def test_a_misspelt_option_is_said_by_transformers(lm):
    """As by the model's own generate."""
    with pytest.raises(ValueError, match="max_new_token"):
        lm.generate("a", max_new_token=5)


# --- coming and going


def test_nothing_is_left_behind(lm):
    """Also where the caller's own code fails in the middle: no hook, and the model's own generate gives its own text."""
    own = {
        "input_ids": torch.tensor([[5, 6]]),
        "attention_mask": torch.ones(1, 2),
        "max_new_tokens": 5,
        "eos_token_id": None,
        "pad_token_id": 7,
    }
    before = lm.model.generate(**own)
    lm.generate([5, 6], max_new_tokens=5)

    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lm.generate([5, 6], max_new_tokens=5, logits_processor=transformers.LogitsProcessorList([broken]))
    assert bare(lm)
    torch.testing.assert_close(lm.model.generate(**own), before)


def test_inside_attached_it_is_the_same(lm):
    """The mixture is made once, and stays attached afterwards."""
    text = lm.generate("Marley was", max_new_tokens=8)
    with lm.attached():
        assert lm.generate("Marley was", max_new_tokens=8) == text
        assert not bare(lm)
    assert bare(lm)


def test_threads_decode_from_one_model_at_once(lm):
    """Two that generate, each with its own settings, and one that predicts."""
    lms_ = [lm, KnnLM(lm.store, lm.language_model, lm.extractor, replace(lm.settings, lmbda=0.9), lm.context)]
    prompts = mixtures.prompts(4)
    wanted = [[one.generate(prompt, max_new_tokens=6) for prompt in prompts] for one in lms_]
    assert wanted[0] != wanted[1]
    p = lm.predict(prompts).p
    start = threading.Barrier(3, timeout=60)

    def work(i: int) -> None:
        start.wait()
        for _ in range(4):
            assert [lms_[i].generate(prompt, max_new_tokens=6) for prompt in prompts] == wanted[i]

    def predict() -> None:
        start.wait()
        for _ in range(60):
            np.testing.assert_allclose(lm.predict(prompts).p, p, rtol=0, atol=1e-6)

    in_threads(lambda: work(0), lambda: work(1), predict)
    assert bare(lm)


def test_a_datastore_of_text_is_decoded_from(tmp_path):
    """The design's example, with the store of a corpus: a passage that it has is continued as it stands there."""
    corpus = lms.write_texts(tmp_path / "corpus", {"carol.txt": lms.book()[:600]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knnstore.lm.calibrate.HELD_OUT_TOKENS", 256)
        store = knnstore.create(tmp_path / "made.knn", corpus, model=lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())
    with store:
        made = KnnLM.load(store, lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer(), lmbda=0.99, temperature=0.01, exact=True)
        text = made.generate(made.encode(lms.book()[:600])[:20], max_new_tokens=15)
        assert lms.book().startswith(text)
        assert len(text) > len(made.decode(made.encode(lms.book()[:600])[1:35].tolist())) - 1
