"""Checks of prose in the source: openings of docstrings, and words that the glossary replaces.

`python tests/helpers/docstrings.py` prints the share of docstrings that open with a fragment, by package. With paths as
arguments it lists every offender in these files or folders.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("src/aqlm_cli", "kernels/aqlm_kernels")

_OPENINGS = (
    "what whatever of whether how why those they them it its itself this these by for with without where while in that"
    " which to as from who whoever whom whose when into onto over at on through under between before after beside"
    " because since if and or but so than up out"
)
FRAGMENTS = frozenset(_OPENINGS.split())
"""First words that open neither a noun phrase nor an order. "One of" is one more."""

FORBIDDEN: Mapping[str, str] = {
    "pupil": "student",
    "learner": "student",
    "teach": "train, distill",
    "teaching": "distillation",
    "taught": "trained, distilled",
    "team": "world, process group",
    "judge": "validate, evaluate",
    "remedy": "fix, command that rebuilds",
    "mend": "fix",
    "stranger": "untrusted",
    "hostile": "untrusted",
    "adopt": "import",
    "taken over": "imported, copied",
    "begun": "started",
    "is there": "exists",
    "is gone": "is missing",
    "goes on": "resumes, continues",
    "go on": "resume, continue",
    "going on": "resuming, continuing",
    "anew": "again",
    "written out": "dequantized",
    "coded": "quantized",
    "contender": "candidate",
    "window": "sequence",
    "windows": "sequences",
    "windows_at_once": "micro_batch",
    "keep_every": "save_every",
    "second moment": "Hessian",
    "product kernel": "matmul kernel",
    "plane": "LUT bits",
    "put out": "output",
    "at work": "running",
    "survey": "preflight",
    "propagation": "calibration pass",
    "journal": "event log",
    "does not know": "does not support",
    "has no say": "has no effect",
    "the original": "the base model (in distillation: the teacher)",
}
"""Words of earlier versions (last column of docs/develop/glossary.md), and what to say instead."""

PATTERNS: Mapping[str, str] = {
    "is there": r"\bis there\b(?! (?:a|an|any|no)\b)",
    "window": r"(?<!sliding )(?<!sliding_)\bwindow\b",
    "windows": r"(?<!sliding )\bwindows\b",
    "remedy": r"\bremed(?:y|ies)\b",
    "the original": r"\bthe original(?=$|['.,;:)]|\s+(?:is|in|and|or|of|to|has|was|on|from|with|at|as|there|gives?)\b)",
}
"""Where a word has inflections of another kind, or must not match a longer term."""

TESTED = {word: re.compile(PATTERNS.get(word, rf"\b{word}(?:s|es|d|ed|ing)?\b"), re.IGNORECASE) for word in FORBIDDEN}


class Docstring(NamedTuple):
    """The docstring of a module, class or function, or the text under a constant or field."""

    place: str  # path:line
    text: str

    @property
    def is_fragment(self) -> bool:
        words = [word.strip(".,:;") for word in self.text.lower().split()[:2]]
        return bool(words) and (words[0] in FRAGMENTS or words == ["one", "of"])


def files_of(pattern: str) -> list[Path]:
    """Python files that a path or glob relative to the repository names; a folder names all files below it."""
    paths = [
        below for path in sorted(ROOT.glob(pattern)) for below in ([path] if path.is_file() else path.rglob("*.py"))
    ]
    return sorted(path for path in paths if path.suffix == ".py")


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def docstrings(path: Path) -> Iterator[Docstring]:
    """Strings that stand alone as a statement: docstrings proper, and those under constants and fields."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Docstring(place(path, node.lineno), node.value.value.strip())


def prose(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every string of two words or more, with the text of an f-string in one piece: messages of raises
    and events, help texts, labels, docstrings."""
    tree = ast.parse(path.read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            text = "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        else:
            continue
        if len(text.split()) > 1:
            yield place(path, node.lineno), text


def fragments(pattern: str) -> list[str]:
    """One line for each docstring that opens with a fragment."""
    found = [docstring for path in files_of(pattern) for docstring in docstrings(path) if docstring.is_fragment]
    return [f"{docstring.place}: {docstring.text.splitlines()[0]}" for docstring in found]


def forbidden_words(pattern: str) -> list[str]:
    """One line for each forbidden word in a message, help text or docstring."""
    return [
        f"{where}: {' '.join(text[max(0, match.start() - 40) : match.end() + 40].split())!r}: "
        f"for {word!r} say {FORBIDDEN[word]!r}"
        for path in files_of(pattern)
        for where, text in prose(path)
        for word, tested in TESTED.items()
        for match in tested.finditer(text)
    ]


def lost_modules(pattern: str) -> list[str]:
    """One line for each `name.py` in a source file, comments included, that names no file of the repository."""
    folders = ("src", "kernels", "tests", "tools", "examples", "docs")
    names = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return [
        f"{place(path, number)}: there is no {name}"
        for path in files_of(pattern)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for name in re.findall(r"\b(\w+\.py)\b", line)
        if name not in names and "github.com" not in line
    ]


def packages() -> list[str]:
    """Folders of the source that hold Python files, those at the root of a package as a glob."""
    folders = [folder for source in SOURCES for folder in sorted((ROOT / source).iterdir()) if folder.is_dir()]
    named = [str(folder.relative_to(ROOT)) for folder in folders if any(folder.rglob("*.py"))]
    return sorted([*(f"{source}/*.py" for source in SOURCES), *named])


def _print_shares() -> None:
    count = total = 0
    for package in packages():
        every = [docstring for path in files_of(package) for docstring in docstrings(path)]
        bad = sum(docstring.is_fragment for docstring in every)
        count, total = count + bad, total + len(every)
        if every:
            print(f"{package:36} {bad:4} of {len(every):4}  {100 * bad / len(every):5.1f} %")
    print(f"{'all':36} {count:4} of {total:4}  {100 * count / total:5.1f} %")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(*fragments(argument), *forbidden_words(argument), *lost_modules(argument), sep="\n")
    if len(sys.argv) == 1:
        _print_shares()
