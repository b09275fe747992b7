"""Writes docs/cli.md, the command-line reference, from the help of every command.

python tools/cli_reference.py            write it
python tools/cli_reference.py --check    exit 1 where it is not what would be written
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import click

REFERENCE = Path(__file__).parent.parent / "docs" / "cli.md"
WIDTH = 100  # columns of the help pages in the reference

HEAD = """\
# Command line

Written by `make docs` from the help of each command; change that, not this page.
"""

TAIL = """\
## Output

Results go to stdout; progress, notes, warnings and errors go to stderr. With `--json` a command prints one JSON object and a
newline on stdout. Without, it prints tables: in colour on a terminal, plain where stdout is piped.

In tables a newline is shown as ⏎, a tab as ⇥, a space at either end of a token as ␣, other control characters as a sign or an
escape. Distances are squared Euclidean distances.

## Environment

| variable | meaning |
|---|---|
| `KNNSTORE` | the datastore, where `--store` is not given |
| `KNNSTORE_DEBUG=1` | errors with a traceback, and what the model libraries log |
| `NO_COLOR=1` | no colours |
| `COLUMNS` | width of the tables; where stdout is piped 120 without it |
| `HF_HUB_OFFLINE=1` | no network: models from the hub's cache only |

## Exit codes

| code | meaning |
|---|---|
| 0 | it went well |
| 1 | unexpected: a bug of knnstore's |
| 2 | usage: an option, an argument, a document or a model that cannot be taken |
| 3 | not found: a datastore, snapshot, document, domain or file |
| 4 | exists already: a datastore, or an unfinished one begun with other arguments |
| 5 | conflict with another commit, or locked by another process |
| 6 | checkpoint mismatch: not the model that the datastore was built with |
| 7 | the datastore's format is not supported by this version |
| 8 | damage found |
| 9 | input/output error, or no space |
| 130 | interrupted (Ctrl-C) |
| 141 | the reader of stdout went away, as `head` does |
| 143 | terminated (SIGTERM) |
"""


def reference() -> str:
    """The page, from the installed command."""
    group: click.Group = import_module("knnstore_cli.main").cli
    root = click.Context(group, info_name="knnstore", terminal_width=WIDTH, **group.context_settings)
    sections = [HEAD, section("knnstore", group.get_help(root))]
    for name in group.list_commands(root):
        command = group.commands[name]
        ctx = click.Context(command, info_name=name, parent=root, terminal_width=WIDTH)
        sections.append(section(f"knnstore {name}", command.get_help(ctx)))
    return "\n".join([*sections, TAIL])


def section(title: str, text: str) -> str:
    """A heading and a help page."""
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    check = parser.parse_args().check
    page = reference()
    if not check:
        REFERENCE.write_text(page, encoding="utf-8")
        return 0
    if REFERENCE.exists() and REFERENCE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{REFERENCE.name}: not what --help says now. Write it again with `make docs`.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
