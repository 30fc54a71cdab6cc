"""Every family of causal language models that transformers builds, as a tiny random model."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest
from helpers import families
from helpers.examination import examine
from helpers.family_table import head, line_of, lines_of
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def examiner() -> Iterator[Executor]:
    """A process of its own: an examination sets the threads and the warnings of the whole process it runs in."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


OFTEN = {*families.ALL[::3], "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "phi3", "opt", "gpt_oss"}
"""What `make test` examines: those that most people have, and a third of the alphabet. `make soak` has the others."""


@pytest.mark.parametrize(
    "family", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.soak) for name in families.ALL]
)
def test_a_family_is_right_or_refused_and_the_page_of_models_says_so(family: str, examiner: Executor) -> None:
    """The walk is the network; what is packed is what the codes stand for, whoever loads it, and in either format."""
    outcome = examiner.submit(examine, family).result()
    assert outcome.fault is None, outcome.fault
    assert line_of(outcome) in PAGE.read_text().splitlines(), "`make docs-models` writes docs/models.md anew"


def test_the_page_of_models_names_every_family_that_transformers_knows() -> None:
    page = PAGE.read_text()
    assert page.startswith(head())
    assert list(lines_of(page)) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
