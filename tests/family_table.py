"""docs/models.md: what becomes of every family. `python tests/family_table.py docs/models.md` writes it anew."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import families
import transformers
from examination import Outcome, examine

PAGE = """# Models

The families that transformers {version} takes for causal language models, each tried as a tiny random model
(`tests/examination.py`; `make docs-models` writes this page anew). Of each family that is quantized:

- the walk through its blocks gives the logits of transformers' own forward in float32, to {same:g} of the largest;
- what is packed gives the logits that the codes stand for: with codes, loaded by stock transformers with the package
  `aqlm` and by `aqlm` itself, and as an ordinary checkpoint (dense).

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
    packed = "codes, dense" if outcome.codes else "dense"
    share = f"{outcome.quantized} of {outcome.matrices}"
    return f"| {outcome.family} | {outcome.blocks} | {share} | {packed} | {remark} |"


def page_of(outcomes: Iterable[Outcome]) -> str:
    lines = {outcome.family: line_of(outcome) for outcome in outcomes}
    lines |= {family: f"| {family} | | | not tried | {reason} |" for family, reason in families.UNBUILT.items()}
    return head() + "".join(f"{lines[family]}\n" for family in sorted(lines))


def head() -> str:
    from examination import SAME

    return PAGE.format(version=transformers.__version__, same=SAME)


@contextmanager
def examining(chosen: Iterable[str]) -> Iterator[dict[str, Future[Outcome]]]:
    """The outcomes of these families, as they come; in processes of their own, for each uses one thread."""
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        yield {family: pool.submit(examine, family) for family in chosen}


def main() -> None:
    with examining(families.ALL) as outcomes:
        found = [outcome.result() for outcome in outcomes.values()]
    Path(sys.argv[1]).write_text(page_of(found))
    for outcome in found:
        if outcome.fault:
            print(f"{outcome.family}:\n{outcome.fault}", file=sys.stderr)


if __name__ == "__main__":
    main()
