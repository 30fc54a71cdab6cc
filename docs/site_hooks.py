"""Hooks of mkdocs that put files of the repository into the site, and point links to them there.

The front page is README.md. CHANGELOG.md, CONTRIBUTING.md and SECURITY.md become pages, and so does every other file
that a page links to, as a listing: a run file, an example, a table. Links in the sources stay those that work in the
repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LANGUAGES = {".yaml": "yaml", ".py": "python", ".csv": "text"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to."""
    sources = [ROOT / name for name in PAGES]
    sources += sorted(path for path in DOCS.rglob("*.md"))
    listings = {target for source in sources for target in _linked_files(source) if target.suffix in LANGUAGES}
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in sorted(listings):
        text = f"# {path.name}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8').rstrip()}\n```\n"
        files.append(File.generated(config, _page_of(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of one page to the pages of this site, and keep a number and its error on one line."""
    source = next((ROOT / name for name, src in PAGES.items() if src == page.file.src_uri), DOCS / page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if not target.is_file():
            return match[1]
        return os.path.relpath(_page_of(target), PurePosixPath(page.file.src_uri).parent)

    return LINK.sub(rewritten, re.sub(r"(?<=\d) ± (?=\d)", "\u00a0±\u00a0", markdown))


def _linked_files(source: Path) -> set[Path]:
    targets = (source.parent / link for link in LINK.findall(source.read_text(encoding="utf-8")))
    return {target.resolve() for target in targets if target.is_file()}


def _page_of(path: Path) -> str:
    """The page or file of the site that shows this file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    inside = name.removeprefix("docs/")
    return PAGES.get(name) or (f"{inside}.md" if path.suffix in LANGUAGES else inside)
