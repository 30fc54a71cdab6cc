"""Every family of causal language models that transformers builds, as a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers import families
from helpers.examination import Outcome
from helpers.family_table import examining, head, line_of, lines_of
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Mapping[str, Future[Outcome]]]:
    """Of the families whose test was chosen."""
    chosen = [item.callspec.params["family"] for item in request.session.items if "outcomes" in item.fixturenames]
    with examining(chosen) as found:
        yield found


@pytest.mark.parametrize("family", families.ALL)
def test_a_family_is_right_or_refused_and_the_page_of_models_says_so(
    family: str, outcomes: Mapping[str, Future[Outcome]]
) -> None:
    """The walk is the network; what is packed is what the codes stand for, whoever loads it, and in either format."""
    outcome = outcomes[family].result()
    assert outcome.fault is None, outcome.fault
    assert line_of(outcome) in PAGE.read_text().splitlines(), "`make docs-models` writes docs/models.md anew"


def test_the_page_of_models_names_every_family_that_transformers_knows() -> None:
    page = PAGE.read_text()
    assert page.startswith(head())
    assert list(lines_of(page)) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
