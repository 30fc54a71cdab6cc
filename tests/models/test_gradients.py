"""Gradients by the embeddings, block by block, against those of the whole network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.walks import walk_of
from torch.nn import functional as F

from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.blocks import linears
from aqlm_cli.models.gradients import OutputGradients, embedding_gradients


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_they_are_those_of_the_whole_network(family: str, tmp_path: Path) -> None:
    network = load_network(resolve(str(tiny_models.save(family, tmp_path / "model"))), torch.float32)
    ids = tiny_models.token_ids(2, 12)
    passed: list[int] = []
    walk = walk_of(network, ids)
    found = embedding_gradients(walk, ids, tmp_path, torch.Generator().manual_seed(3), passed.append)
    assert passed == list(range(1, 2 * len(walk.paths) + 1))

    rng = torch.Generator().manual_seed(3)
    for number, row in enumerate(ids):
        entering = walk.entering(row[None]).detach()
        first, taken = walk.blocks.modules[0], list[torch.Tensor]()

        def replaced(module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> object:
            leaf = entering.clone().requires_grad_()  # noqa: B023 - called at once
            taken.append(leaf)  # noqa: B023
            return ((leaf, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf})

        hook = first.register_forward_pre_hook(replaced, with_kwargs=True)
        logits = network(input_ids=row[None], use_cache=False).logits[0]
        hook.remove()
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=rng)[:, 0]
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        expected = taken[0].grad
        assert expected is not None and float(expected.norm()) > 1e-3
        assert torch.allclose(found[torch.tensor([number])], expected, atol=1e-5 * float(expected.abs().max()))


def sensitivities(network: Any, ids: torch.Tensor, directory: Path, weights: bool = True) -> dict[str, float]:
    walk, layers = walk_of(network, ids), OutputGradients(weights)
    rng = torch.Generator().manual_seed(3)
    embedding_gradients(walk, ids, directory, rng, watch=layers.watch)
    return layers.sensitivities(ids.numel())


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sensitivities_are_those_of_the_gradients_of_the_whole_network(
    family: str, weights: bool, tmp_path: Path
) -> None:
    network = load_network(resolve(str(tiny_models.save(family, tmp_path / "model"))), torch.float32)
    ids = tiny_models.token_ids(2, 12)
    found = sensitivities(network, ids, tmp_path, weights)
    walk = walk_of(network, ids)
    layers = {
        path: layer
        for prefix, block in zip(walk.paths, walk.blocks.modules, strict=True)
        for path, layer in linears(block, prefix).items()
    }
    assert found.keys() == layers.keys()
    outputs: dict[str, list[torch.Tensor]] = {path: [] for path in layers}

    def kept(path: str) -> Any:
        def hook(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            output.retain_grad()
            outputs[path].append(output)
            return output

        return hook

    hooks = [layer.register_forward_hook(kept(path)) for path, layer in layers.items()]
    rng = torch.Generator().manual_seed(3)
    network.requires_grad_(True)
    for row in ids:
        logits = network(input_ids=row[None], use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=rng)[:, 0]
        F.cross_entropy(logits, drawn, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    for path, layer in layers.items():
        bias = 0 if layer.bias is None else layer.bias.detach()
        values = torch.cat([(output.detach() - bias)[0] for output in outputs[path]]).double()
        gradients = torch.cat([output.grad[0] for output in outputs[path] if output.grad is not None]).double()
        squares, slopes = values.square().sum(1), gradients.square().sum(1)
        alike = (squares * slopes).mean() / (2 * layer.out_features)
        apart = squares.mean() * slopes.mean() / (2 * layer.out_features)
        wanted = alike if weights and path.endswith(("k_proj", "v_proj")) else (alike * apart).sqrt()
        assert found[path] == pytest.approx(float(wanted), rel=1e-3), path


def test_a_sensitivity_foretells_what_a_small_error_costs(tmp_path: Path) -> None:
    """Within a factor of two for every layer, and a quarter on average."""
    network = load_network(resolve(str(tiny_models.save("llama", tmp_path / "model"))), torch.float32)
    network.requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(3 if parameter.ndim > 1 else 1)  # predictions that are not all alike
    ids, draw = tiny_models.token_ids(8, 32), torch.Generator().manual_seed(0)
    found = sensitivities(network, ids, tmp_path)
    base = network(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    ratios = []
    for path, sensitivity in found.items():
        weight = network.get_parameter(f"{path}.weight")
        original, costs, inputs = weight.clone(), [], list[torch.Tensor]()
        hook = network.get_submodule(path).register_forward_hook(lambda m, x, y: inputs.append(x[0]))  # noqa: B023
        network(input_ids=ids, use_cache=False)
        hook.remove()
        for _ in range(6):
            noise = torch.randn(weight.shape, generator=draw)
            error = 0.03 * noise * original.norm() / noise.norm()
            relative = (inputs[0] @ error.T).square().sum() / (inputs[0] @ original.T).square().sum()
            weight.copy_(original + error)
            own = network(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            costs.append(float((base.exp() * (base - own)).sum(-1).mean() / relative))
        weight.copy_(original)
        ratios.append(sum(costs) / len(costs) / sensitivity)
    assert min(ratios) > 0.5 and max(ratios) < 2
    assert 0.75 < sum(ratios) / len(ratios) < 1.33
