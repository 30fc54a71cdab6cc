"""AQLM as its authors publish it (arXiv 2401.06118), for comparison: the preset `paper`.

Plain residual k-means, then in alternation a hundred Adam steps on codebooks and scales, and one greedy pass that
takes for one code at a time the entry which lowers its row's error most, groups and codebooks in random order. It ends
when a pass improves the error by less than the tolerance. The published settings have beam 1, and so has this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aqlm_cli.quantization.solvers.code_search import CodeSearch, code_search
from aqlm_cli.quantization.solvers.codebooks import Approximation, starting_scales
from aqlm_cli.quantization.solvers.hessian import Feedback, LayerStatistics, diagonal_blocks
from aqlm_cli.quantization.solvers.kmeans import residual_kmeans
from aqlm_cli.quantization.solvers.ldlq import sweep
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.schemes import AdditiveScheme


def quantize_reference(
    weight: Tensor, statistics: LayerStatistics, scheme: AdditiveScheme, rng: torch.Generator, settings: AqlmSettings
) -> Approximation:
    """Quantize W `[out, in]` float32; of the settings the last three and the k-means iterations count."""
    search = code_search(weight.device)
    second_moment = statistics.second_moment
    present = _start(weight, scheme, rng, settings, search)
    loss = torch.inf
    while True:
        present = _train(weight, second_moment, present, settings, search)
        present = _greedy_pass(weight, second_moment, present, rng, search)
        before, loss = loss, _loss(weight, second_moment, present, search)
        if not loss < before * (1 - settings.tolerance):  # NaN ends it, too
            return present


def _start(
    weight: Tensor, scheme: AdditiveScheme, rng: torch.Generator, settings: AqlmSettings, search: CodeSearch
) -> Approximation:
    scales = starting_scales(weight)
    rows = (weight / scales[:, None]).view(len(weight), -1, scheme.group_size)  # [out, n, g]
    codes, codebooks = residual_kmeans(
        rows,
        torch.ones_like(scales),
        torch.ones_like(rows[0]),
        scheme.num_codebooks,
        scheme.codebook_size,
        settings.kmeans_iterations,
        search,
        rng,
    )
    return Approximation(codes, codebooks, scales)


def _approximate(present: Approximation, search: CodeSearch) -> Tensor:
    return present.scales[:, None] * search.expand(present.codebooks, present.codes)  # [out, in]


def _loss(weight: Tensor, second_moment: Tensor, present: Approximation, search: CodeSearch) -> float:
    """tr((W^ - W) H (W^ - W)^T) / out."""
    difference = _approximate(present, search) - weight
    return float((difference @ second_moment * difference).sum(dtype=torch.float64)) / len(weight)


def _train(
    weight: Tensor, second_moment: Tensor, present: Approximation, settings: AqlmSettings, search: CodeSearch
) -> Approximation:
    """Adam on codebooks and scales with the codes fixed."""
    codebooks, scales = present.codebooks.clone(), present.scales.clone()
    optimizer = torch.optim.Adam([codebooks, scales], settings.adam_learning_rate, betas=(0.0, 0.95), amsgrad=True)
    for _ in range(settings.adam_steps):
        difference = _approximate(Approximation(present.codes, codebooks, scales), search) - weight
        gradient = 2 / len(weight) * difference @ second_moment  # of the loss by W^, [out, in]
        codebooks.grad, scales.grad = search.gradients(gradient, present.codes, codebooks, scales)
        optimizer.step()
    return Approximation(present.codes, codebooks, scales)


def _greedy_pass(
    weight: Tensor, second_moment: Tensor, present: Approximation, rng: torch.Generator, search: CodeSearch
) -> Approximation:
    """Every code once, the others held."""
    num_codebooks, _, group = present.codebooks.shape
    order = torch.randperm(present.codes.shape[1], generator=rng).to(weight.device)
    columns = (order[:, None] * group + torch.arange(group, device=order.device)).flatten()
    metric = second_moment[columns][:, columns]
    base = search.expand(present.codebooks, present.codes)[:, columns]
    state = ((weight / present.scales[:, None])[:, columns] - base) @ metric
    codes = present.codes[:, order].contiguous()

    def round_group(j: int, corner: Tensor, targets: Tensor) -> Tensor:
        entries = [book[codes[:, j, m]] for m, book in enumerate(present.codebooks)]
        for m in torch.randperm(num_codebooks, generator=rng).tolist():
            held = sum((entry for other, entry in enumerate(entries) if other != m), torch.zeros_like(targets))
            book = present.codebooks[m : m + 1]
            codes[:, j, m] = search.choose(corner, targets - held @ corner, book, codes[:, j, m : m + 1], 2)[:, 0]
            entries[m] = book[0][codes[:, j, m]]
        return torch.stack(entries).sum(0)

    sweep(state, base, Feedback(diagonal_blocks(metric, group), metric, forward=False), round_group)
    return Approximation(codes[:, order.argsort()].contiguous(), present.codebooks, present.scales)
