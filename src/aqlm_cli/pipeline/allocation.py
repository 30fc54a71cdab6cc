"""The allocation of a model's bytes: its layers and sizes on one side, scores and their solution on the other."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from aqlm_cli.errors import PlanError
from aqlm_cli.export import Layout, exporter_for
from aqlm_cli.export.writer import checkpoint_bytes
from aqlm_cli.formatting import readable_bytes
from aqlm_cli.models import Network
from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.models.experts import expert_place
from aqlm_cli.quantization.sensitivity import fit_effects
from aqlm_cli.runs.files import TensorLayout
from aqlm_cli.spec.allocate import within_file
from aqlm_cli.spec.allocation_record import AllocationRecord, single_schemes
from aqlm_cli.spec.choices import OpenLayer, open_layers, read_beside
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.plan import EXPERT, Layer, Plan, make_plan
from aqlm_cli.spec.scores import Effects, Goal, Scores, Solution
from aqlm_cli.spec.treatment import Treatment
from aqlm_cli.spec.units import parse_bytes
from aqlm_kernels import read_bandwidth


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """A model without weights: its network, the layouts of its files, and its layers for the plan."""

    network: Network
    stored: Mapping[str, TensorLayout]
    layers: tuple[Layer, ...]
    parameters: int

    def plan(self, config: RunConfig, allocated: Mapping[str, Treatment | None]) -> Plan:
        """The plan of the settings, with what an allocation decided. Raises as `make_plan` does."""
        return make_plan(self.layers, self.parameters, replace(config.quantize.selection, allocated=allocated))

    def layout(self, config: RunConfig, plan: Plan) -> Layout:
        """Every tensor of the packed model. PlanError where the format cannot hold it."""
        exporter = exporter_for(config.pack.format, plan)
        return exporter.layouts(self.network, self.stored, plan.schemes, self.fitted(plan))

    def packed_bytes(self, config: RunConfig, plan: Plan) -> int:
        """Bytes of all safetensors files of the packed model. PlanError where the format cannot hold it."""
        return checkpoint_bytes(self.layout(config, plan).tensors)

    def fitted(self, plan: Plan) -> set[str]:
        """Norms and biases of the blocks in which anything is quantized; those of experts are one parameter."""
        blocks = find_blocks(self.network)
        inside = tuple(f"{path}." for path in blocks.paths if any(one.startswith(f"{path}.") for one in plan.schemes))
        experts = [target.path for target in plan.targets if target.kind == EXPERT and target.path.startswith(inside)]
        places = (expert_place(self.network, f"{path}.bias") for path in experts)
        return {place.parameter for place in places if place is not None} | {
            f"{prefix}.{name}"
            for prefix, block in zip(blocks.paths, blocks.modules, strict=True)
            if f"{prefix}." in inside
            for name, parameter in block.named_parameters()
            if parameter.ndim == 1
        }

    def open_layers(self, config: RunConfig) -> dict[str, OpenLayer]:
        """The layers that the target decides about, by path. Raises as `spec.choices.open_layers` does."""
        section, native = config.quantize, config.pack.format in ("auto", "native")
        paths, share = find_blocks(self.network).paths, _expert_share(self.network.config)
        return open_layers(self.layers, self.parameters, section.selection, section.target, paths, native, share)

    def goal(self, config: RunConfig, layers: Mapping[str, OpenLayer]) -> Goal:
        """The question of the settings; that of a speed measures the memory bandwidth of this machine.

        PlanError for a speed that the weights which are not decided about already exceed.
        """
        target = config.quantize.target
        if target.size is not None:
            return Goal("size", parse_bytes(target.size))
        if target.bits is not None:
            return Goal("size", int(target.bits * self.parameters / 8))
        if target.kl is not None:
            return Goal("kl", target.kl)
        assert target.speed is not None
        bandwidth = read_bandwidth()
        plan = self.plan(config, {path: layer.choices[0].treatment for path, layer in layers.items()})
        left = bandwidth / target.speed - read_beside(plan, layers)
        if left <= 0:
            raise PlanError(
                f"{target.speed:g} tokens/s are out of reach: memory gives {readable_bytes(int(bandwidth))} a second; "
                "ask for less"
            )
        return Goal("speed", left)

    def solve(self, config: RunConfig, scores: Scores, effects: Effects, goal: Goal) -> Solution:
        """The best choice of every layer; the file of one for a size is compared with that to the byte.

        PlanError where nothing keeps the limit, and where the model in 16 bits does.
        """
        smallest = self.plan(config, scores.smallest().treatments)
        decides_all = all(target.path in scores.layers for target in smallest.quantized)

        def in_16_bits(solution: Solution) -> bool:
            return decides_all and all(treatment is None for treatment in solution.treatments.values())

        def solved(limit: float) -> Solution:
            return scores.solve(effects, replace(goal, limit=limit))

        def size_of(solution: Solution) -> int:
            if in_16_bits(solution):
                return solution.bytes + beside
            return self.packed_bytes(config, self.plan(config, solution.treatments))

        if goal.question == "size":
            least = self.packed_bytes(config, smallest)
            if least > goal.limit:
                raise PlanError(
                    f"the smallest choice of schemes makes a file of {least} bytes, and {config.quantize.target} "
                    f"({goal.limit:.0f} bytes) is asked for; raise the target, or name smaller schemes with --among"
                )
            beside = least - scores.smallest().bytes
            solution = within_file(solved, size_of, int(goal.limit))
        else:
            solution = solved(goal.limit)
        if in_16_bits(solution):
            way_out = {"size": "; ask for less", "speed": "; ask for more", "kl": " alone; raise the target"}
            raise PlanError(f"the model keeps the target {config.quantize.target} in 16 bits{way_out[goal.question]}")
        return solution

    def best_single(self, config: RunConfig, scores: Scores, goal: Goal) -> Solution | None:
        """The largest single scheme for the blocks that keeps the target, with its best tables; None: none does.

        What it leaves of a size or a speed goes to better choices for single layers.
        """
        section = config.quantize
        words = [str(one) for one in section.target.treatments(section.default.method)]
        for one in single_schemes(scores, words):
            with suppress(PlanError):
                single = self.solve(config, one, Effects(), goal)
                return single if goal.question == "kl" else self.solve(config, scores.above(single), Effects(), goal)
        return None

    def replayed(self, config: RunConfig, record: AllocationRecord) -> Mapping[str, str]:
        """The choices of the chosen candidate, solved for again from the scores and mixes of the record."""
        chosen = record.chosen
        if chosen.mixes is None:
            single = self.best_single(config, record.scores, record.goal)
            return {} if single is None else single.choices
        effects = fit_effects(*record.loads(chosen.mixes))
        return self.solve(config, record.scores, effects, replace(record.goal, limit=chosen.asked)).choices


def _expert_share(config: Any) -> float:
    """The share of its experts that a token is sent to, as far as config.json tells; 1 where it does not."""
    counts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    experts = next((count for count in counts if isinstance(count, int) and count > 0), 1)
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / experts) if isinstance(chosen, int) and chosen > 0 else 1.0
