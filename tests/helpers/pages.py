"""The documentation as a reader gets it: pages, their code blocks, and the commands typed there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md")))


@dataclass(frozen=True)
class Session:
    """One command behind a `$`, and what the page shows of its output."""

    arguments: tuple[str, ...]
    output: tuple[str, ...]


def blocks(page: Path, language: str | None = None) -> Iterator[str]:
    """The code blocks of a page in this language; None: all."""
    for found in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8")):
        if language in (None, found[1]):
            yield found[2]


def sessions(page: Path) -> Iterator[Session]:
    """The commands of the console blocks, in order."""
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *output = part.rstrip("\n").split("\n")
            yield Session(tuple(shlex.split(command, comments=True)), tuple(output))


def commands(page: Path) -> Iterator[tuple[str, ...]]:
    """Every command `aqlm ...` that stands on a line of its own in a code block."""
    for block in blocks(page):
        for line in block.splitlines():
            if line.removeprefix("$ ").startswith("aqlm "):
                yield tuple(shlex.split(line.removeprefix("$ "), comments=True))


def labels(output: tuple[str, ...]) -> Iterator[str]:
    """Titles of the tables in an output, labels of their first column and names of their columns, up to a digit."""
    yield from (re.split(r"\d", label)[0].strip() for label in _labels(output))


def _labels(output: tuple[str, ...]) -> Iterator[str]:
    for above, line in zip(("", *output), output, strict=False):
        if line.startswith(("┌", "┏")):
            yield above
        elif line.startswith("┃"):
            yield from (cell.strip() for cell in line.strip("┃").split("┃"))
        elif line.startswith("│") and line.count("│") == 3:
            yield line.split("│")[1].strip()


def links(page: Path) -> Iterator[str]:
    """Targets inside the repository, anchors included; none of what a code block shows."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    yield from (target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target))


def anchors(page: Path) -> set[str]:
    """The anchor of every heading."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
