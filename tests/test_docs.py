"""The pages: every block runs or says why not, what they show is what is printed, links lead somewhere, references are complete."""

import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from doc_pages import Made, Reader, Shown, differences, needs, needs_modules, outputs_of, python_path, read_blocks, rewritten
from numpy.typing import ArrayLike

import knnstore
from knnstore import errors

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINKED = [*PAGES, ROOT / "CHANGELOG.md"]
STAVE_ONE = 350  # lines of the sample book

pages = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return python_path(tmp_path_factory.mktemp("bin"))


@pytest.fixture
def reader(made: Made, path: str, tmp_path: Path, sample_book: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Someone in an empty folder that has, as a clone does, the sample book."""
    folder = tmp_path / "reader"
    (folder / "knnstore" / "samples").mkdir(parents=True)
    shutil.copy(sample_book, folder / "knnstore" / "samples")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("KNNSTORE", raising=False)
    return Reader(folder, "", path, made)


def lay_out(reader: Reader, name: str, default_model: Path) -> None:
    """Puts what a page needs into the reader's folder."""
    book = reader.folder / "knnstore" / "samples" / "a-christmas-carol.txt"
    stave_one = reader.folder / "stave-one.txt"
    stave_one.write_bytes(b"".join(book.read_bytes().splitlines(keepends=True)[:STAVE_ONE]))
    if name == "store.knn":
        assert reader.type("knnstore create stave-one.txt")
    elif name == "other-model":
        other_model(reader.folder / name, default_model)
    else:
        assert name == "stave-one.txt", f"a page needs {name}, which nothing here makes"


def other_model(folder: Path, default_model: Path) -> None:
    """A model that is not the default one, with its tokenizer."""
    config = transformers.GPT2Config.from_pretrained(default_model)
    config.n_layer = 1
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(default_model).save_pretrained(folder)


def skip_without_modules(page: Path, request: pytest.FixtureRequest) -> None:
    """Skips a page whose blocks need modules that are not installed; gives data sets a folder of the test's own."""
    names = needs_modules(page.read_text(encoding="utf-8"))
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{page.name}: {', '.join(missing)} not installed (an extra)")
    if "lm_eval" in names:
        request.getfixturevalue("datasets_cache")


def follow(page: Path, reader: Reader, default_model: Path, *, slow: bool) -> list[str]:
    """What of a page is not as it says."""
    reader.name = str(page.relative_to(ROOT))
    text = page.read_text(encoding="utf-8")
    for name in needs(text):
        lay_out(reader, name, default_model)
    shown = list(reader.follow(text, slow=slow))
    other = [one for one in shown if differences(one, reader.folder)]
    if os.environ.get("WRITE_DOCS"):  # puts what is printed now in the place of what is not so; read the diff before it is committed
        page.write_text(rewritten(text, other, reader.folder), encoding="utf-8")
    return [difference for one in other for difference in differences(one, reader.folder)]


# Blocks


@pages
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    """A block has a kind that runs, is an output or a picture, or has a comment with the reason before it."""
    text = page.read_text(encoding="utf-8")
    blocks = read_blocks(text)
    assert not re.search(r"^[ \t>]+```", text, re.MULTILINE), "a block that is set in would not be seen"
    assert len(re.findall(r"^<!-- (?!needs:|needs modules:)", text, re.MULTILINE)) == sum(bool(block.mark) for block in blocks), (
        "a comment that marks no block"
    )
    outputs = {block.line for block in outputs_of(blocks).values()}
    for block in blocks:
        at = f"{page.name}:{block.line}"
        assert not block.mark or len(block.said.split()) >= (1 if block.mark in ("signature", "message") else 3), f"{at}: why not?"
        if block.mark == "not run":
            print(f"{at}: {block.said}")
        elif block.tag == "json":
            assert block.line in outputs, f"{at}: JSON that no block before it prints"
        else:
            assert block.tag in ("console", "sh", "python", "text"), f"{at}: a block of kind {block.tag or '(none)'} is not run"


@pages
@pytest.mark.timeout(240)
def test_pages_do_what_they_show(page: Path, reader: Reader, default_model_dir: Path, request: pytest.FixtureRequest) -> None:
    """The blocks of a page, in order, in a folder that has what the page needs, print what it shows."""
    skip_without_modules(page, request)
    if any(block.tag in ("console", "sh", "python") and not block.mark for block in read_blocks(page.read_text(encoding="utf-8"))):
        assert "\n".join(follow(page, reader, default_model_dir, slow=False)) == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- slow" in page.read_text(encoding="utf-8")], ids=lambda page: page.name)
def test_pages_do_what_they_show_slowly(page: Path, reader: Reader, default_model_dir: Path, request: pytest.FixtureRequest) -> None:
    """The same with the blocks that take long."""
    skip_without_modules(page, request)
    assert "\n".join(follow(page, reader, default_model_dir, slow=True)) == ""


PAGE = """\
knnstore 9,954 entries, 1.1 MB in 0.3 s (1,200/s)
λ 0.22, temperature 32.9741

␣do 0.2325 #### ␣Lord 0.0664 ##
␣man 0.0391 # ␣child 0.0144
at 2026-11-24T07:48:12Z, 8 well
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("0.3 s (1,200/s)", "1 min 3 s", True),
        ("32.9741", "30.1", True),
        ("####", "##", True),
        ("␣child", "␣woman", True),
        ("2026-11-24T07:48:12Z", "2030-01-01T00:00:00Z", True),
        ("\n\n", "\n", True),
        ("32.9741", "90.0", False),
        ("9,954", "995", False),
        ("entries", "keys", False),
        ("λ 0.22, temperature 32.9741\n", "", False),
        ("␣man 0.0391 # ␣child 0.0144\n", "", False),
        ("␣do 0.2325 #### ␣Lord 0.0664 ##\n␣man 0.0391 # ␣child", "a 0.1111 b 0.2222\nc 0.3333 d", False),
        ("8 well", "8 well\nwarning: more", False),
        ("at 2026", "in 2026", False),
    ],
)
def test_differences_are_found(old: str, new: str, same: bool, tmp_path: Path) -> None:
    """What may differ from machine to machine may differ; anything else on a page that is not so is found."""
    changed = PAGE.replace(old, new)
    assert changed != PAGE
    for one, other in ((PAGE, changed), (changed, PAGE)):
        assert (differences(Shown("", one, other, 0, 0), tmp_path) == []) is same


def test_lines_left_out_are_no_difference(tmp_path: Path) -> None:
    """A line `…` stands for any lines; those beside it must be there, in order."""
    for shown, same in (("a\n…\nc", True), ("…\nd", True), ("a\n…\ne", False), ("c\n…\na", False)):
        assert (differences(Shown("", shown, "a\nb\nc\nd", 0, 0), tmp_path) == []) is same


def test_outputs_on_a_page_can_be_written_anew(tmp_path: Path) -> None:
    """Outputs are put in their places, also where a page had none; the rest of the page stays."""
    page = "x\n```python\nprint(1)\n```\n\n```text\n```\ny\n```console\n$ echo a\n$ echo b\nc\n```\nz\n"
    reader = Reader(tmp_path, "page", os.environ["PATH"], Made(tmp_path))
    written = rewritten(page, list(reader.follow(page)), tmp_path)
    assert written == page.replace("text\n", "text\n1\n").replace("echo a\n", "echo a\na\n").replace("b\nc\n", "b\nb\n")


# Links


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings that a page links to are there."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://")):
            name, _, anchor = target.partition("#")
            linked = (page.parent / name) if name else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in slugs(linked.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_readme_links_every_page() -> None:
    """Each page of docs/ is linked from the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


# The Python reference


PYTHON = ROOT / "docs" / "python.md"


def sections(text: str, level: str) -> dict[str, str]:
    """Heading → what stands below it."""
    parts = re.split(rf"^{level} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def found_object(name: str) -> Any:
    """`Datastore.search` → the function."""
    found: Any = knnstore
    for part in name.split("."):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
        found = found.__func__ if isinstance(found, classmethod) else found
    return found


def signature_of(found: Any) -> str:
    """`inspect.signature`, with ArrayLike by its name."""
    said = inspect.signature(found)
    named = [one.replace(annotation="ArrayLike") if one.annotation == ArrayLike else one for one in said.parameters.values()]
    return str(said.replace(parameters=named))


def plain_signature(text: str) -> str:
    """A signature without spaces, quotes, self and the places of types."""
    text = re.sub(r"['\"\s]", "", text).replace(",)", ")")
    text = re.sub(r"<(\w+\.)*_?Silentobjectat0x\w+>", "SILENT", text)
    text = re.sub(r"numpy\.ndarray\[tuple\[(?:typing\.)?Any,\.\.\.\],numpy\.dtype\[(?:numpy\.|typing\.)?(\w+)\]\]", r"NDArray[\1]", text)
    text = re.sub(r"\b(?:np\.|(?:[a-z_]+\.)+(?=[A-Z]))", "", text)
    return re.sub(r"\((?:self|cls),?", "(", text)


SIGNATURES = [block for block in read_blocks(PYTHON.read_text(encoding="utf-8")) if block.mark == "signature"]


@pytest.mark.parametrize("block", SIGNATURES, ids=lambda block: block.said)
def test_signatures_are_those_of_the_code(block: Any) -> None:
    """A signature on the page is what `inspect.signature` says."""
    name = block.said
    shown = block.code.removeprefix("class ").removeprefix("def ")
    assert plain_signature(shown) == plain_signature(f"{name.rpartition('.')[2]}{signature_of(found_object(name))}")


def public_methods(kind: type) -> list[str]:
    """Methods that a class itself defines for its users."""
    return [name for name, found in vars(kind).items() if inspect.isfunction(getattr(found, "__func__", found)) and name[0] != "_"]


@pytest.mark.parametrize("name", [name for name in knnstore.__all__ if name not in ("__version__", "errors")])
def test_every_name_is_explained(name: str) -> None:
    """Each exported name has a section; a function and each method their signature, a record each of its fields."""
    section = sections(PYTHON.read_text(encoding="utf-8"), "##").get(f"`{name}`")
    assert section is not None, f"no section `{name}`"
    found = getattr(knnstore, name)
    signed = {block.said for block in SIGNATURES}
    if not inspect.isclass(found):
        assert name in signed
        return
    assert [method for method in public_methods(found) if f"{name}.{method}" not in signed] == []
    if is_dataclass(found):
        assert [one.name for one in fields(found) if f"`{one.name}`" not in section and not re.search(rf"\b{one.name}:", section)] == []
    properties = [name for name, one in vars(found).items() if isinstance(one, property) and name[0] != "_"]
    assert [one for one in properties if f"`{one}`" not in section] == []


def test_version_and_errors_are_explained() -> None:
    """The two names that are neither function nor class."""
    text = PYTHON.read_text(encoding="utf-8")
    assert "`knnstore.__version__`" in text
    assert "`knnstore.errors`" in text


# Errors


ERRORS = ROOT / "docs" / "errors.md"


def test_error_table_is_that_of_the_code() -> None:
    """Every class with its exit code, its base and its meaning, in the order of exit codes."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (?:`(\w+)`)? ?\| (.+?) \|", ERRORS.read_text(encoding="utf-8"), re.MULTILINE)
    classes = [getattr(errors, name) for name in errors.__all__ if name != "KnnstoreError"]
    bases = {one: one.__bases__[0] for one in classes}
    meant = {
        (str(one.exit_code), one.__name__, "" if base is errors.KnnstoreError else base.__name__, one.__doc__.strip())
        for one, base in bases.items()
    }
    assert set(rows) == meant
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)


def test_every_error_is_shown() -> None:
    """Each class has a section with a message: from a command that runs, or one that a test here provokes."""
    parts = sections(ERRORS.read_text(encoding="utf-8"), "###")
    assert set(parts) == {f"`{name}`" for name in errors.__all__ if name != "KnnstoreError"}
    provoked = {f"`{name}`" for name in PROVOKED}
    for name, part in parts.items():
        assert "<!-- message:" in part if name in provoked else "\n```console\n" in part, name


def an_entry_store(path: Path, *, seed: int = 0, then: Callable[[], None] = lambda: None) -> None:
    """A datastore of one entry. then: called while it is built."""
    checkpoint = knnstore.Checkpoint(name="m", revision=None, identity="0" * 64, tokenizer=None, architecture="A", vocab_size=9)

    def batches() -> Iterator[tuple[Any, Any, list[knnstore.EntryDocument]]]:
        yield np.ones((1, 4)), [1], [knnstore.EntryDocument(id="a", n_entries=1)]
        then()

    options = knnstore.IndexOptions(seed=seed)
    knnstore.create_from_entries(path, batches(), checkpoint=checkpoint, dim=4, vocab_size=9, options=options)


def conflict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others add the same document while an append is built."""
    an_entry_store(folder / "store.knn")

    def batch(value: int) -> tuple[Any, Any, list[knnstore.EntryDocument]]:
        return np.ones((1, 4)), [value], [knnstore.EntryDocument(id="b", n_entries=1)]

    def batches() -> Iterator[tuple[Any, Any, list[knnstore.EntryDocument]]]:
        yield batch(1)
        knnstore.append_entries(folder / "store.knn", [batch(2)])

    knnstore.append_entries(folder / "store.knn", batches())


def locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is at the same work: here, the same process holds the lock a second time."""
    an_entry_store(folder / "store.knn", then=lambda: an_entry_store(folder / "store.knn"))


def missing_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file where nothing that reads it is installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (folder / "smollm2-135m.gguf").write_bytes(b"GGUF")
    (folder / "text.txt").write_text("Marley was dead.", encoding="utf-8")
    knnstore.create(folder / "store.knn", folder / "text.txt", model=folder / "smollm2-135m.gguf")


PROVOKED: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "ConflictError": conflict,
    "LockedError": locked,
    "MissingExtraError": missing_extra,
}


@pytest.mark.parametrize("name", PROVOKED)
def test_messages_are_real(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message on the page that needs more than a command is what the library says."""
    (block,) = [block for block in read_blocks(ERRORS.read_text(encoding="utf-8")) if block.mark == "message" and block.said == name]
    with pytest.raises(getattr(errors, name)) as caught:
        PROVOKED[name](tmp_path, monkeypatch)
    varying = re.compile(r"\b[0-9a-f]{32}\b|\d{4}-\d\d-\d\dT[\d:]+Z|(?<=process )\d+")
    said = str(caught.value).replace(f"{tmp_path}{os.sep}", "")
    assert varying.sub("*", block.code.removeprefix("error: ")) == varying.sub("*", said)


# Words


def test_glossary_has_the_words() -> None:
    """Each word of the project is in the glossary, once."""
    words = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    promised = "datastore entry key value document domain segment space snapshot manifest calibration k nlist nprobe temperature distance"
    assert len(set(words)) == len(words)
    assert {*promised.split(), "coarse quantizer", "λ"} <= {word for entry in words for word in entry.split(", ")}
