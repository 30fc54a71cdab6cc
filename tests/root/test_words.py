"""Prose of the source follows docs/develop/glossary.md; `python tests/helpers/docstrings.py PATH` lists offenders."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import pages
from helpers.docstrings import (
    FORBIDDEN,
    ROOT,
    TESTED,
    Docstring,
    files_of,
    forbidden_words,
    fragments,
    lost_modules,
    packages,
)

PACKAGES = (*packages(), "tools", "examples", "docs")
"""Every package of the source, what lies at its root, and the programs beside it."""

EXCEPTIONS = {
    "quantization/training/optimizers.py": ("second moment", "Adam's running mean of squared gradients has this name"),
}
"""File, and the word that it may use, with the reason."""


def excepted(offender: str) -> bool:
    return any(f"/{path}:" in offender and f"for {word!r} say" in offender for path, (word, _) in EXCEPTIONS.items())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_docstring_opens_with_a_verb_or_a_noun_phrase(package: str) -> None:
    offenders = fragments(package)
    assert not offenders, "\n".join(["", *offenders])


@pytest.mark.parametrize("package", PACKAGES)
def test_messages_and_docstrings_use_the_words_of_the_glossary(package: str) -> None:
    offenders = [offender for offender in forbidden_words(package) if not excepted(offender)]
    assert not offenders, "\n".join(["", *offenders])


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_that_a_comment_names_exists(package: str) -> None:
    offenders = lost_modules(package)
    assert not offenders, "\n".join(["", *offenders])


def test_every_forbidden_word_is_in_the_last_column_of_the_glossary() -> None:
    table = [line for line in (ROOT / "docs/develop/glossary.md").read_text().splitlines() if line.count("|") == 4]
    earlier = " ".join(line.split("|")[3] for line in table)
    assert [word for word in FORBIDDEN if word not in earlier] == []


@pytest.mark.parametrize(
    "opening", ["What is left.", "Of a run.", "Whether it fits.", "One of the blocks.", "By name."]
)
def test_a_fragment_is_recognised(opening: str) -> None:
    assert Docstring("", opening).is_fragment


@pytest.mark.parametrize("opening", ["The layers.", "y = x W^T", "Write a file.", "One block.", "`path` of a file."])
def test_a_noun_phrase_or_an_order_is_no_fragment(opening: str) -> None:
    assert not Docstring("", opening).is_fragment


PAGES = [page for page in pages.PAGES if page.name not in ("glossary.md", "CHANGELOG.md")]
"""Every page but those that list the earlier words."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_the_words_of_the_glossary(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), 1)
    offenders = [(number, word) for number, line in lines for word in TESTED if TESTED[word].search(line)]
    assert not offenders, "\n".join(
        f"{page}:{number}: for {word!r} say {FORBIDDEN[word]!r}" for number, word in offenders
    )


def test_every_file_of_the_source_is_checked() -> None:
    checked = [path for package in PACKAGES for path in files_of(package)]
    assert len(checked) == len(set(checked)), "a file is checked twice"
    assert set(checked) >= {path for source in ("src", "kernels") for path in (ROOT / source).rglob("*.py")}
