"""docs/models.md: what becomes of every family.

`PYTHONPATH=tests python -m helpers.family_table docs/models.md` writes it again; with names of families after it, the
lines of these alone.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import transformers
from helpers import families
from helpers.examination import SAME, Outcome, examine

PAGE = """# Models

The families that transformers {version} takes for causal language models, each tried as a tiny random model
(`tests/helpers/examination.py`; `make docs-models` writes this page again). Of each family that is quantized:

- the walk through its blocks gives the logits of transformers' own forward in float32, to {same:g} of the largest;
- what is packed gives the logits that the codes stand for: with codes, loaded by stock transformers with the package
  `aqlm` and by `aqlm` itself; in the native format, loaded by transformers after `import aqlm_kernels` and by `aqlm`
  itself; and as an ordinary checkpoint (dense).

`matrices`: how many of those inside the blocks of the tiny model are quantized; `aqlm plan` says why the others stay.

| family | blocks | matrices | packed as | remark |
|---|---|---|---|---|
"""

PROCESSES = 2


def line_of(outcome: Outcome) -> str:
    """That of one family in the table."""
    remark = (outcome.reason or "").replace("|", "/")
    if outcome.fault:
        return f"| {outcome.family} | | | wrong | {outcome.fault.strip().splitlines()[-1]} |"
    if outcome.refused:
        return f"| {outcome.family} | | | refused | {remark} |"
    packed = ", ".join([*(["codes"] if outcome.codes else []), *(["native"] if outcome.native else []), "dense"])
    share = f"{outcome.quantized} of {outcome.matrices}"
    return f"| {outcome.family} | {outcome.blocks} | {share} | {packed} | {remark} |"


def page_of(lines: Mapping[str, str]) -> str:
    """Of lines by family."""
    unbuilt = {family: f"| {family} | | | not tried | {reason} |" for family, reason in families.UNBUILT.items()}
    found = {**lines, **unbuilt}
    return head() + "".join(f"{found[family]}\n" for family in sorted(found))


def lines_of(page: str) -> dict[str, str]:
    """Those of a page, by family."""
    lines = page.split("|---|---|---|---|---|\n")[1].splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def head() -> str:
    return PAGE.format(version=transformers.__version__, same=SAME)


@contextmanager
def examining(chosen: Iterable[str]) -> Iterator[dict[str, Future[Outcome]]]:
    """The outcomes of these families, as they come; in processes of their own, for each uses one thread."""
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        yield {family: pool.submit(examine, family) for family in chosen}


def main(page: Path, chosen: Sequence[str]) -> None:
    lines = lines_of(page.read_text()) if chosen else {}
    with examining(chosen or families.ALL) as outcomes:
        for family, outcome in outcomes.items():
            lines[family] = line_of(outcome.result())
            print(outcome.result().fault or lines[family], flush=True)
    page.write_text(page_of(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
