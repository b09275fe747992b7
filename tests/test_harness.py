"""lm-evaluation-harness and `Trainer.evaluate` score the model with the datastore: against numpy and the model, and the page's own recipe.

The oracle cuts texts into the harness's windows in a loop, and takes log p of each window from `mixtures.log_p`.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lms
import mixtures
import numpy as np
import pytest
import torch
import transformers
from doc_pages import Made, Reader
from mixtures import Kind

from knnstore.lm.create import create
from knnstore.lm.knnlm import KnnLM

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra: harness)")
pytest.importorskip("lm_eval.tasks")
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="what lm_eval runs models with is not installed (extra: harness)")

PAGE = Path(__file__).parents[1] / "docs" / "harness.md"
WINDOW = 24  # tokens of a forward pass in these tests
CLOSE = {"rtol": 1e-4, "atol": 1e-3}  # of sums over a few hundred tokens in float32

# One token, less than a window, exactly one, one more, and many.
TEXTS = ["a", "Marley was dead: to begin with.", *(lms.book()[at : at + n] for at, n in ((0, 61), (500, 90), (900, 400), (4_000, 333)))]
CLOZE = [
    ("Scrooge knew he was", " dead"),
    ("Old Marley was as dead as a door", "nail"),
    (lms.book()[2_000:2_120], "x"),  # longer than a window
    ("Of course he", " did"),
    ("a", " merry Christmas"),
]


@pytest.fixture(params=["gpt2", "llama"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return mixtures.build(request.param)


@pytest.fixture
def lm(kind: Kind, tmp_path: Path, datasets_cache: Path) -> Iterator[KnnLM]:
    with mixtures.loaded(kind, tmp_path) as made:
        yield made


def harness(lm: KnnLM, **options: Any) -> Any:
    return huggingface.HFLM(**{"pretrained": lm.model, "tokenizer": lm.tokenizer, "max_length": WINDOW} | options)


def task(folder: Path, output_type: str, rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A task over a file of rows."""
    path = folder / f"{output_type}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return {"task": output_type, "output_type": output_type, **dataset, **fields}


def scores(model: Any, given: dict[str, Any], **options: Any) -> tuple[dict[str, float], list[Any]]:
    """Metrics of a task, and the harness's answer for each row."""
    manager = lm_eval.tasks.TaskManager(include_defaults=False)  # reading its thousands of tasks takes half a minute
    found = lm_eval.simple_evaluate(model=model, tasks=[given], task_manager=manager, bootstrap_iters=0, **options)
    metrics = {name.removesuffix(",none"): value for name, value in found["results"][given["task"]].items()}
    rows = sorted(found["samples"][given["task"]], key=lambda row: row["doc_id"])
    return metrics, [row["filtered_resps"] for row in rows]


# --- the oracle


LogP = Callable[[Sequence[int]], np.ndarray]
"""log p after each token of one text, (n, vocab)."""


def rolled(log_p: LogP, ids: Sequence[int], window: int = WINDOW) -> float:
    """log p of all tokens but the first: windows side by side, the input of each being the `window` tokens before its last."""
    total, begin = 0.0, 1
    while begin < len(ids):
        end = min(begin + window, len(ids))
        rows = log_p(ids[max(0, end - 1 - window) : end - 1])[-(end - begin) :]
        total += sum(row[token] for row, token in zip(rows, ids[begin:end], strict=True))
        begin = end
    return total


def continued(log_p: LogP, tokenizer: Any, context: str, continuation: str, window: int = WINDOW) -> tuple[float, bool]:
    """log p of a continuation, and whether each of its tokens is the most probable one."""
    ids = lms.token_ids(tokenizer, context + continuation)
    gold = ids[len(lms.token_ids(tokenizer, context)) :]
    rows = log_p(ids[:-1][-window:])[-len(gold) :]
    return sum(row[token] for row, token in zip(rows, gold, strict=True)), [int(row.argmax()) for row in rows] == gold


def of_kind(kind: Kind, lmbda: float) -> LogP:
    return lambda ids: mixtures.log_p(kind, ids, lmbda)


def begun(kind: Kind, text: str, *, times: int = 1) -> list[int]:
    """The tokens of a text after BOS."""
    return [kind.tokenizer.bos_token_id] * times + lms.token_ids(kind.tokenizer, text)


# --- laws


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_have_the_log_probability_of_the_mixture(lm, kind, tmp_path, batch_size):
    """log p of texts of unequal lengths, in rolling windows, alone and in padded batches: the oracle's, with the datastore and without."""
    given = task(
        tmp_path,
        "loglikelihood_rolling",
        [{"text": text} for text in TEXTS],
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    model = harness(lm, batch_size=batch_size)
    plain = scores(model, given)
    with lm.attached():
        mixed = scores(model, given)
    again = scores(model, given)
    assert again == plain
    n_words, n_bytes = (sum(map(count, TEXTS)) for count in (lambda text: len(re.split(r"\s+", text)), lambda text: len(text.encode())))
    for (metrics, found), lmbda in ((plain, 0.0), (mixed, mixtures.LMBDA)):
        wanted = [rolled(of_kind(kind, lmbda), begun(kind, text)) for text in TEXTS]
        np.testing.assert_allclose([float(one) for (one,) in found], wanted, **CLOSE)
        assert metrics["word_perplexity"] == pytest.approx(math.exp(-sum(wanted) / n_words), rel=1e-3)
        assert metrics["bits_per_byte"] == pytest.approx(-sum(wanted) / n_bytes / math.log(2), rel=1e-4)
    assert abs(plain[0]["bits_per_byte"] - mixed[0]["bits_per_byte"]) > 0.1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_continuations_have_the_log_probability_of_the_mixture(lm, kind, tmp_path, batch_size):
    """log p of words after contexts shorter and longer than a window, and whether they come first: the oracle's."""
    given = task(
        tmp_path,
        "loglikelihood",
        [{"context": context, "word": word} for context, word in CLOZE],
        doc_to_text="{{context}}",
        doc_to_target="{{word}}",
        target_delimiter="",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    model = harness(lm, batch_size=batch_size)
    plain = scores(model, given)
    with lm.attached():
        mixed = scores(model, given)
    for (metrics, found), lmbda in ((plain, 0.0), (mixed, mixtures.LMBDA)):
        wanted = [continued(of_kind(kind, lmbda), kind.tokenizer, context, word) for context, word in CLOZE]
        np.testing.assert_allclose([float(one) for ((one, _),) in found], [one for one, _ in wanted], **CLOSE)
        assert [str(first) for ((_, first),) in found] == [str(first) for _, first in wanted]
        assert metrics["perplexity"] == pytest.approx(math.exp(-np.mean([one for one, _ in wanted])), rel=1e-3)
        assert metrics["acc"] == np.mean([first for _, first in wanted])


def test_choices_that_share_a_pass_have_their_own_log_probability(lm, kind, tmp_path):
    """The harness runs one pass for choices of one token after the same context; each has its own log p."""
    choices = [" the", " a", " he", " merry Christmas"]
    rows = [{"question": question, "gold": i % 4} for i, question in enumerate(["Scrooge was", "Marley and", "It is in"])]
    given = task(
        tmp_path, "multiple_choice", rows, doc_to_text="{{question}}", doc_to_choice=choices, doc_to_target="gold", target_delimiter=""
    )
    with lm.attached():
        metrics, found = scores(harness(lm, batch_size=3), given)
    log_p = of_kind(kind, mixtures.LMBDA)
    wanted = [[continued(log_p, kind.tokenizer, row["question"], choice)[0] for choice in choices] for row in rows]
    np.testing.assert_allclose([[float(one) for one, _ in row] for row in found], wanted, **CLOSE)
    assert metrics["acc"] == pytest.approx(np.mean([np.argmax(one) == row["gold"] for one, row in zip(wanted, rows, strict=True)]))


def test_generated_text_is_the_mixtures(lm, kind, tmp_path):
    """Greedy text after prompts of unequal lengths, padded on the left by the harness: the oracle's, token by token."""
    prompts, n = ["Scrooge was", "I", "Marley was dead, and"], 6
    arguments = {"until": ["☃"], "max_gen_toks": n, "do_sample": False}
    given = task(
        tmp_path,
        "generate_until",
        [{"prompt": prompt} for prompt in prompts],
        doc_to_text="{{prompt}}",
        doc_to_target="",
        generation_kwargs=arguments,
        metric_list=[{"metric": "exact_match"}],
    )
    model = harness(lm, batch_size=3, max_length=mixtures.LENGTH)
    with lm.attached():
        answers = [one for (one,) in scores(model, given)[1]]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = lms.token_ids(kind.tokenizer, prompt)
        new: list[int] = []
        while len(new) < n and kind.model.generation_config.eos_token_id not in new:
            new.append(int(mixtures.log_p(kind, ids + new)[-1].argmax()))
        assert answer == kind.tokenizer.decode(new, skip_special_tokens=True)


def test_the_harness_s_own_cache_knows_no_datastore(lm, tmp_path):
    """As docs/harness.md warns: its cache of answers goes by request, so that a second run gets the first one's."""
    given = task(tmp_path, "loglikelihood", [{"a": "Scrooge", "b": " was"}], doc_to_text="{{a}}", doc_to_target="{{b}}")
    given |= {"target_delimiter": "", "metric_list": [{"metric": "perplexity"}]}
    model, cache = harness(lm), str(tmp_path / "answers")
    plain = scores(model, given, use_cache=cache)[0]
    with lm.attached():
        assert scores(model, given, use_cache=cache)[0] == plain
        assert scores(model, given)[0]["perplexity"] != pytest.approx(plain["perplexity"], rel=0.01)


def test_a_tokenizer_that_adds_bos_needs_to_be_told_not_to(lm, kind, tmp_path, monkeypatch):
    """As docs/harness.md says: else BOS is scored after BOS in rolling windows."""
    from tokenizers import processors

    bos = kind.tokenizer.bos_token
    adding = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, kind.tokenizer.bos_token_id)])
    monkeypatch.setattr(lm.tokenizer.backend_tokenizer, "post_processor", adding)
    text = TEXTS[1]
    given = task(tmp_path, "loglikelihood_rolling", [{"text": text}], doc_to_text="", doc_to_target="{{text}}")
    given |= {"metric_list": [{"metric": "bits_per_byte"}]}
    with lm.attached():
        ((told,),) = scores(harness(lm, add_bos_token=False), given)[1]
        ((not_told,),) = scores(harness(lm), given)[1]
    log_p = of_kind(kind, mixtures.LMBDA)
    assert float(told) == pytest.approx(rolled(log_p, begun(kind, text)), abs=1e-3)
    assert float(not_told) == pytest.approx(rolled(log_p, begun(kind, text, times=2)), abs=1e-3)
    assert float(told) - float(not_told) > 0.1


@pytest.mark.parametrize("batch_size", [2, 8])
def test_the_trainers_loss_is_the_mixtures(lm, kind, tmp_path, batch_size):
    """`Trainer.evaluate` on windows of one length: the mean of -log p of the tokens with a label."""
    from transformers import Trainer, TrainingArguments

    rng = np.random.default_rng(0)
    windows = rng.integers(3, mixtures.VOCAB, (8, 20))
    labels = windows.copy()
    labels[:, :7] = -100  # not scored
    rows = [{"input_ids": ids, "labels": gold} for ids, gold in zip(windows, labels, strict=True)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=batch_size, prediction_loss_only=True, use_cpu=True)
    trainer = Trainer(lm.model, arguments, eval_dataset=rows)
    found = [trainer.evaluate()["eval_loss"]]
    with lm.attached():
        found.append(trainer.evaluate()["eval_loss"])
    found.append(trainer.evaluate()["eval_loss"])
    for loss, lmbda in zip(found, (0.0, mixtures.LMBDA, 0.0), strict=True):
        golds = [mixtures.log_p(kind, ids, lmbda)[np.arange(6, 19), ids[7:]] for ids in windows]
        assert loss == pytest.approx(-np.mean(golds), rel=1e-4)


# --- the page


def test_the_pages_recipe_gives_what_is_computed_by_hand(tmp_path, monkeypatch, sample_book, default_model_dir, datasets_cache):
    """The blocks of docs/harness.md on a short book, in float32: every figure is that of numpy, the model and a search by brute force."""
    book = sample_book.read_text(encoding="utf-8")[2_000:20_000]
    folder = tmp_path / "reader"
    lms.write_texts(folder, {f"knnstore/samples/{sample_book.name}": book})
    cut = book.rindex("\n\n", 0, len(book) * 4 // 5) + 2
    lms.write_texts(folder, {"known.txt": book[:cut]})
    monkeypatch.chdir(folder)
    with create("carol.knn", "known.txt", dtype="float32", keep_keys="f32") as store:  # the page's own command will leave it as it is
        content = lms.content_of(store)
    assert len(content.values) < 4_096  # keys, not codes, are searched
    reader = Reader(folder, PAGE.name, os.environ["PATH"], Made(tmp_path))
    list(reader.follow(PAGE.read_text(encoding="utf-8"), slow=True))

    lm, window = reader.names["lm"], 512
    k, temperature = lm.settings.k, lm.settings.temperature
    assert 0 < k < len(content.values)
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(default_model_dir, dtype=torch.float32).eval()

    def log_p(ids: Sequence[int], lmbda: float) -> np.ndarray:
        keys, logits = mixtures.states(model, model.transformer.h[3].mlp, ids)
        out = mixtures.log_softmax(logits)
        for i, key in enumerate(keys if lmbda else ()):
            distances = np.square(content.keys - key).sum(axis=1, dtype=np.float64)
            nearest = np.argpartition(distances, k)[:k]
            weights = np.exp((distances.min() - distances[nearest]) / temperature)
            p_knn = np.zeros(out.shape[1])
            np.add.at(p_knn, content.values[nearest], weights / weights.sum())
            out[i] = np.log(lmbda * p_knn + (1 - lmbda) * np.exp(out[i]))
        return out

    texts, cloze = ([json.loads(line) for line in Path(f"tasks/{name}.jsonl").read_text().splitlines()] for name in ("pieces", "cloze"))
    held_out = "".join(f"\n\n{row['text']}" for row in texts).strip()
    assert held_out == book[cut:].strip()  # nothing is scored twice or left out
    n_words = sum(len(re.split(r"\s+", row["text"])) for row in texts)
    n_bytes = sum(len(row["text"].encode()) for row in texts)
    assert len(texts) > 1
    assert len(cloze) > 5
    for name, lmbda, loss in zip(("plain", "mixed"), (0.0, lm.settings.lmbda), reader.names["losses"], strict=True):
        found = reader.names[name]
        of_text = partial(log_p, lmbda=lmbda)
        total = sum(rolled(of_text, [0, *lms.token_ids(tokenizer, row["text"])], window) for row in texts)
        assert found["held_out"]["word_perplexity,none"] == pytest.approx(math.exp(-total / n_words), rel=1e-3)
        assert found["held_out"]["bits_per_byte,none"] == pytest.approx(-total / n_bytes / math.log(2), rel=1e-4)
        words = [continued(of_text, tokenizer, row["context"], f" {row['word']}", window) for row in cloze]
        assert found["cloze"]["perplexity,none"] == pytest.approx(math.exp(-np.mean([one for one, _ in words])), rel=1e-3)
        assert found["cloze"]["acc,none"] == np.mean([first for _, first in words])
        ids = [0, *lms.token_ids(tokenizer, book[cut:])]
        windows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
        gold = np.concatenate([of_text(one)[np.arange(window - 1), one[1:]] for one in windows])
        assert loss == pytest.approx(-gold.mean(), rel=1e-4)
