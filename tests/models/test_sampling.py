"""Texts that a model writes itself, against models that are rigged to write what is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from aqlm_cli.models import load_network, open_sampling, resolve
from aqlm_cli.models import sampling as module
from aqlm_cli.models.sampling import ATTENTION, LIKELIEST, Sampling, attend

EOS = 257
"""Of the tiny models: after 256 bytes and the token that begins a text."""


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Sampling]:
    """`opened(family)`: a tiny random model, ready to write."""

    def open_tiny(family: str = "llama", **settings: Any) -> Sampling:
        source = resolve(str(tiny_models.save(family, tmp_path / family, **settings)))
        return open_sampling(source, torch.float32)

    return open_tiny


def chances(texts: int, length: int, seed: int = 0) -> Tensor:
    return torch.rand(texts, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def write(sampling: Sampling, drawn: Tensor, opening: Sequence[int] = ()) -> Tensor:
    return sampling.texts(drawn, lambda tokens: None, opening)


def rigged(sampling: Sampling, probabilities: Tensor) -> Sampling:
    """`probabilities` `[vocabulary, vocabulary]` of each token after each other one: no block does anything, each token
    has a direction of its own, and the head knows these."""
    network: Any = sampling.network
    vocabulary, body = len(probabilities), network.model
    for layer in body.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    body.norm.weight.data.fill_(1)
    directions = torch.eye(vocabulary, network.config.hidden_size)
    body.embed_tokens.weight.data = directions
    entering = body.norm(directions)  # [vocabulary, d], again a multiple of the unit matrix
    network.lm_head.weight.data = probabilities.log().clamp(min=-1e4).T @ torch.linalg.pinv(entering).T
    return Sampling(network, torch.arange(vocabulary))


FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt"]


@pytest.mark.parametrize(
    ("family", "opening"), [*((family, []) for family in FAMILIES), ("llama", [256]), ("gemma2", [256, 7])]
)
def test_with_a_cache_come_the_tokens_that_the_whole_text_calls_for(
    family: str, opening: list[int], opened: Callable[..., Sampling], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a sliding window. The reference reads the text from its beginning for every token."""
    monkeypatch.setattr(module, "CAPACITY_STEP", 8)  # which is enlarged several times
    drawn, sampling, given = chances(3, 2 * tiny_models.WINDOW), opened(family), len(opening)
    found = write(sampling, drawn, opening)
    assert found.shape == drawn.shape
    network: Any = load_network(resolve(str(tmp_path / family)), torch.float32)
    for row, text in enumerate(found):
        assert text[: given + 1].tolist() == [*opening, int(drawn[row, given] * 256)]
        for place in range(given + 1, len(text)):
            logits = network(text[None, :place]).logits[0, -1]
            sums = logits.double().softmax(0).cumsum(0)
            drawn_now = int((sums <= drawn[row, place]).sum())
            assert text[place] == (int(logits.argmax()) if place - given <= LIKELIEST else drawn_now), place


def test_every_family_whose_attention_is_torchs_own_takes_the_faster_one(opened: Callable[..., Sampling]) -> None:
    for family, expected in {"llama": ATTENTION, "gemma2": "eager"}.items():
        assert opened(family).network.config._attn_implementation == expected


def test_a_text_depends_on_its_own_chances_alone(opened: Callable[..., Sampling]) -> None:
    sampling, drawn = opened(), chances(5, 24)
    together = write(sampling, drawn)
    assert torch.equal(together, torch.cat([write(sampling, part) for part in drawn.split(2)]))
    others = write(sampling, chances(5, 24, seed=1))
    assert not any(torch.equal(text, other) for text, other in zip(together, others, strict=True))


def test_a_text_follows_the_only_successor_of_each_token(opened: Callable[..., Sampling]) -> None:
    successor = torch.tensor([3, 0, 1, 4, 2])
    sampling = rigged(opened(vocab_size=5), torch.eye(5)[successor])
    for text in write(sampling, chances(20, 30)).tolist():
        assert text[1:] == [int(successor[token]) for token in text[:-1]]


def test_tokens_are_drawn_as_often_as_the_model_says(opened: Callable[..., Sampling]) -> None:
    probabilities = torch.tensor(
        [[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.0, 0.5], [0.7, 0.1, 0.1, 0.1]]
    )
    found = write(rigged(opened(vocab_size=4), probabilities), chances(400, 40))
    before, after = found[:, LIKELIEST:-1].flatten(), found[:, LIKELIEST + 1 :].flatten()
    for token, expected in enumerate(probabilities):
        followers = after[before == token]
        counts = torch.bincount(followers, minlength=4)
        spread = (len(followers) * expected * (1 - expected)).sqrt()
        assert len(followers) > 1000
        assert bool(((counts - len(followers) * expected).abs() <= 4 * spread).all()), (token, counts)
    greedy = found[:, 1 : LIKELIEST + 1]
    assert torch.equal(greedy, probabilities.argmax(1)[found[:, :LIKELIEST]]), "the first few are the likeliest"


def test_the_least_and_the_greatest_chance_draw_no_token_that_is_impossible(opened: Callable[..., Sampling]) -> None:
    """Two of four tokens may follow, whatever came before."""
    sampling = rigged(opened(vocab_size=4), torch.tensor([0.0, 0.5, 0.5, 0.0]).repeat(4, 1))
    drawn = torch.tensor([0.0, 0.4, 0.6, 1 - 2**-53], dtype=torch.float64)
    found = write(sampling, drawn[:, None].repeat(1, LIKELIEST + 4))
    assert found[:, LIKELIEST + 1 :].T.tolist() == [[1, 1, 2, 2]] * 3


def test_texts_start_with_any_token_but_special_ones(opened: Callable[..., Sampling]) -> None:
    sampling = opened()
    assert torch.equal(sampling.first_tokens, torch.arange(256))
    counts = torch.bincount(write(sampling, chances(256 * 100, 1))[:, 0], minlength=256)
    assert len(counts) == 256 and bool(((counts - 100).abs() < 50).all()), "five standard deviations"


def test_a_text_continues_after_its_end_token(opened: Callable[..., Sampling]) -> None:
    sampling = opened()
    network: Any = sampling.network
    network.lm_head.register_forward_hook(
        lambda head, inputs, logits: F.one_hot(torch.tensor(EOS), 258) * 1e4 + 0 * logits
    )
    assert bool((write(sampling, chances(2, 12))[:, 1:] == EOS).all())


def test_written_tokens_are_counted(opened: Callable[..., Sampling]) -> None:
    told: list[int] = []
    opened().texts(chances(3, 8), told.append)
    assert told == [3] * 8


# ----------------------------------------------------------------------------------------------------------- attention


def test_attention_of_new_tokens_is_torchs_own() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, length, 8, generator=draw) for heads, length in ((6, 1), (2, 7), (2, 7)))
    whole = {"key": key.repeat_interleave(3, 1), "value": value.repeat_interleave(3, 1)}
    for scaling in (None, 0.1):
        wanted = F.scaled_dot_product_attention(query, **whole, scale=scaling).transpose(1, 2)  # [b, 1, h, e]
        found, _ = attend(torch.nn.Identity(), query, key, value, None, scaling=scaling, dropout=0.0)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)
        assert not torch.allclose(
            attend(torch.nn.Identity(), query, key.flip(2), value, None, scaling=scaling)[0], wanted
        )


@pytest.mark.parametrize(("places", "mask", "said"), [(1, True, {}), (2, False, {}), (1, False, {"softcap": 30.0})])
def test_everything_else_is_left_to_torch(
    places: int, mask: bool, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *tensors, **settings: asked.append(settings))
    query, key = torch.zeros(1, 2, places, 4), torch.zeros(1, 1, 3, 4)
    attend(SimpleNamespace(), query, key, key, torch.ones(1, 1, places, 3) if mask else None, **said)  # type: ignore[arg-type]
    assert asked == [{"scaling": None, **said}]
    assert module.UNDERSTOOD.isdisjoint(said)
