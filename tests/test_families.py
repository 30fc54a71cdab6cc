"""Every family of causal language models that transformers builds, as a tiny random model."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

ELSEWHERE = {"emu3": "AutoModelForCausalLM finds none of the names in the files of the model with eyes"}
"""Families that transformers itself does not load as it saved them."""


@torch.no_grad()
@pytest.mark.parametrize("family", families.ALL)
def test_a_tiny_model_is_loaded_as_it_was_saved(family: str, tmp_path: Path) -> None:
    network = families.save(family, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tiny_models.token_ids()
    same = torch.equal(network(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits)
    assert same == (family not in ELSEWHERE)
