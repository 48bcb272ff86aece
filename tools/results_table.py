#!/usr/bin/env python3
"""Makes the tables of docs/figures.md and README.md from the JSON of a benchmark run.

    tools/results_table.py                  prints all figures of benchmarks/results, as Markdown
    tools/results_table.py FOLDER           ... of another folder
    tools/results_table.py FOLDER --write   writes them into both files, between their marks
    tools/results_table.py FOLDER --write FILE ...      ... into these files

A file has one block, between <!-- results --> and <!-- /results --> all figures, between
<!-- chosen results --> and <!-- /chosen results --> the few that say whether it is worth a try.
Needs no package beyond Python. Results of tiny models are refused with --write: they say nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "benchmarks"))

from figures import Results, chosen_rows, rows  # noqa: E402  (the path comes first)
from tables import forward_table  # noqa: E402

# No table is made of these: docs/correctness.md speaks of them.
_NO_SPEEDS = ("compute_sanitizer", "correctness", "coverage", "lane_", "sanitizers", "selfcheck")
_WRITTEN = (_ROOT / "README.md", _ROOT / "docs" / "figures.md")
_GIB = 2**30


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the documents of a results folder by the names of their files.

    Raises:
        SystemExit: If there are none, or they are of a kind that this script does not know.
    """
    documents = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if (
            isinstance(document, dict)
            and "parts" in document
            and not path.stem.startswith(_NO_SPEEDS)
        ):
            documents[path.stem] = document
    if not documents:
        sys.exit(
            f"expected results as JSON in {folder}, found none; run `make bench` on a GPU first"
        )
    if any(document["schema"] != 1 for document in documents.values()):
        sys.exit(f"expected results of schema 1 in {folder}; run the benchmarks of this version")
    return documents


def _markdown_table(header: list[str], lines: list[list[str]], right_from: int) -> list[str]:
    rule = ["---:" if index >= right_from else "---" for index in range(len(header))]
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in (header, rule, *lines)
    ]


def _provenance(documents: dict[str, dict[str, Any]]) -> list[str]:
    """Machine, versions, commits and commands, each said once however many files agree on it."""
    lines: dict[str, None] = {}
    for document in documents.values():
        machine, versions = document["machine"], document["versions"]
        where = f"{machine['cpu']}, {machine['cores']} cores"
        where += f", {machine['host_memory_bytes'] / _GIB:.0f} GiB"
        if machine["gpu"]:
            where = f"{machine['gpu']} (driver {machine['driver']}), {where}"
        packages = f"torch {versions['torch']}, transformers {versions['transformers']}"
        commit, _, changed = document["commit"].partition("+")
        marked = commit[:12] + (" with changes" if changed else "")
        lines[f"{where}; {packages}; commit {marked}; `{document['command']}`."] = None
    return list(lines)


def markdown(documents: dict[str, dict[str, Any]]) -> str:
    """The tables, what was not measured with its reason, and where it all ran."""
    results = Results(documents)
    text = _markdown_table(
        ["figure", "must", "aim", "measured", "reached", "GPU"],
        [
            [row.figure, row.must, row.aim, row.measured, row.verdict, row.machine]
            for row in rows(results)
        ],
        right_from=6,
    )
    header, *lines = forward_table(results)
    if lines:
        text += ["", *_markdown_table(header, lines, right_from=1)]
    if failures := results.failures():
        text += ["", "Not measured:"]
        text += [f"- {name} ({status}): {reason}" for name, status, reason in failures]
    text += ["", "Measured on:"] + [f"- {line}" for line in _provenance(documents)]
    return "\n".join(text)


def chosen(documents: dict[str, dict[str, Any]]) -> str:
    """The table of the README."""
    return "\n".join(
        _markdown_table(
            ["figure", "measured", "must", "met", "GPU"],
            [
                [
                    row.figure,
                    row.measured,
                    row.must,
                    "yes" if row.verdict in ("aim", "must") else row.verdict,
                    row.machine,
                ]
                for row in chosen_rows(Results(documents))
            ],
            right_from=5,
        )
    )


_BLOCKS: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    "results": markdown,
    "chosen results": chosen,
}


def with_results(text: str, documents: dict[str, dict[str, Any]], name: str) -> str:
    """Returns `text` with its block made anew.

    Raises:
        SystemExit: If there is not one block, its marks once each and in their order.
    """
    found = [kind for kind in _BLOCKS if f"<!-- {kind} -->" in text]
    if len(found) == 1:
        begin, end = f"<!-- {found[0]} -->", f"<!-- /{found[0]} -->"
        before, _, rest = text.partition(begin)
        _, is_closed, after = rest.partition(end)
        if is_closed and begin not in rest and end not in after:
            return f"{before}{begin}\n{_BLOCKS[found[0]](documents)}\n{end}{after}"
    sys.exit(f"expected one block of {' or of '.join(_BLOCKS)} in {name}, between its two marks")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the tables of README and docs/figures.md.")
    parser.add_argument("folder", nargs="?", type=Path, default=_ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--write",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="write the blocks of these files (README.md and docs/figures.md)",
    )
    arguments = parser.parse_args()
    documents = load(arguments.folder)
    if arguments.write is None:
        print(markdown(documents))
        return
    if tiny := [name for name, document in documents.items() if document["tiny"]]:
        sys.exit(f"expected real results, got those of tiny models: {', '.join(tiny)}")
    texts = {
        path: with_results(path.read_text(), documents, path.name)
        for path in arguments.write or _WRITTEN
    }
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
