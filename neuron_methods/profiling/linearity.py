"""How far the change of an MLP's output is from linear in the change of its weights.

The claim behind NeuronMerge, 2025.findings-acl.471 (Gu et al., abstract): merging by arithmetic on weights
is right as far as outputs follow weights linearly, and they do so better when neurons of one function move together.
With f the MLP of one layer on inputs that the base model gives it, and Δ the update of its weights,

    error = ‖f(θ₀ + αΔ) − (1 − α) f(θ₀) − α f(θ₀ + Δ)‖ / ‖f(θ₀ + Δ) − f(θ₀)‖,   mean over α = ¼, ½, ¾.

The error grows with the size of Δ. A merge is therefore also compared to plain task arithmetic (Σ_t weight_t τ_t)
scaled to the same ‖Δ‖ in the same layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from neuron_methods.data.making import make_feeder
from neuron_methods.data.sources import SourceReader, parse_source
from neuron_methods.models.reference import ModelName
from neuron_methods.neurons import MlpLayer, NeuronMap, find_modules
from neuron_methods.plugin.updates import PlannedUpdates
from neuron_methods.profiling.measured_model import LoadedModel, load_model
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.targets import beginning_with
from neuron_methods.support.text import columns

FORMAT = "mergekit-neuron linearity"
VERSION = 1
#: Tells a file of `linearity -o`; earlier releases wrote no format.
IS_LINEARITY = beginning_with(rf'\{{\s*("format": "{FORMAT}"|"inputs": [^\n]*\n\s*"alphas": )')
ALPHAS = (0.25, 0.5, 0.75)
TASK_ARITHMETIC = "task_arithmetic"
SAME_SIZE = "task_arithmetic, same size"


@dataclass
class LinearityReport:
    """Relative errors, per layer and variant.

    Attributes:
        variants: experts, plain task arithmetic, the merge, and task arithmetic of the merge's size.
        errors: layer -> {variant: relative error}; a variant that changes nothing is missing.
        sizes: layer -> {variant: ‖Δ‖ / ‖θ₀‖ over the layer's MLP}.
        inputs: what the MLPs read.
    """

    variants: list[str]
    inputs: str
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, dict[str, float]] = field(default_factory=dict)

    def mean(self, variant: str) -> float:
        """Average the error over the layers that the variant changes."""
        found = [errors[variant] for errors in self.errors.values() if variant in errors]
        return sum(found) / len(found) if found else float("nan")

    def lines(self) -> Iterator[str]:
        """Lay out a table: error, and in brackets the relative size of the update, both in percent."""
        yield f"inputs: {self.inputs}"
        yield "relative error in % (size of the update relative to the base weights, in %)"
        rows = [["layer", *self.variants]]
        for layer, errors in self.errors.items():
            sizes = self.sizes[layer]
            cells = (f"{100 * errors[v]:.2f} ({100 * sizes[v]:.2f})" if v in errors else "-" for v in self.variants)
            rows.append([layer, *cells])
        rows.append(["mean", *(f"{100 * self.mean(v):.2f}" for v in self.variants)])
        yield from columns(rows)

    def write(self, path: Path) -> None:
        """Write everything as JSON; raises UserError if it cannot be written."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "inputs": self.inputs,
            "alphas": ALPHAS,
            "mean": {v: self.mean(v) for v in self.variants},
            "errors": self.errors,
            "sizes": self.sizes,
        }
        write_json(path, content, indent=2)


def measure_linearity(
    planned: PlannedUpdates, data: Sequence[str] = (), *, samples: int = 16, tokens: int = 512, seed: int = 0
) -> LinearityReport:
    """Measure every layer's MLP.

    Args:
        planned: the merge.
        data: ``NAME=SOURCE`` each, as in profiles; without any, inputs are standard normal noise, which is about what
            the norm before an MLP lets through.
        samples: read of each source.
        tokens: inputs per layer.
        seed: of the noise and of the order of the samples.

    Raises:
        UserError: the base cannot be loaded, is of an unknown family, or the data cannot be read.
    """
    name = ModelName.parse(str(planned.base))
    with load_model(name, "float32", merged=True) as loaded:
        layers = {layer.key: (layer, *_mlp(loaded.model, layer)) for layer in loaded.neurons.layers}
        if not layers:
            raise UserError(f"{planned.base}: no MLP layers to measure")
        if data:
            inputs = _read_inputs(name, loaded, {k: m for k, (_, m, _) in layers.items()}, data, samples, tokens, seed)
            told = f"{', '.join(text.partition('=')[0] for text in data)}, read by the base"
        else:
            generator = torch.Generator().manual_seed(seed)
            inputs = {k: torch.randn(tokens, width, generator=generator) for k, (_, _, width) in layers.items()}
            told = "standard normal noise (give --data for real ones)"
        report = LinearityReport([], told)
        for key, (layer, mlp, _) in layers.items():
            base, updates = _layer_updates(planned, loaded.neurons, layer, mlp)
            report.variants = list(updates)
            norm = _norm(base)
            report.sizes[key] = {v: _norm(update) / norm for v, update in updates.items()}
            errors = {v: relative_error(mlp, base, update, inputs[key]) for v, update in updates.items()}
            report.errors[key] = {v: error for v, error in errors.items() if error is not None}
        return report


def data_files(data: Sequence[str]) -> list[str]:
    """List the files and folders here that ``NAME=SOURCE`` names; raises UserError where one has another form."""
    return [source.location for source in map(parse_source, data) if source.local]


@torch.no_grad()
def relative_error(
    mlp: nn.Module, base: dict[str, Tensor], update: dict[str, Tensor], inputs: Tensor, alphas: Sequence[float] = ALPHAS
) -> float | None:
    """Measure the error of interpolating outputs instead of weights; see the module's formula.

    Args:
        mlp: computes f.
        base: θ₀ by the names of the module's parameters.
        update: Δ likewise.
        inputs: shape (tokens, width), on any device.
        alphas: where between the end points.

    Returns:
        The mean relative error; None where the update changes no output.
    """

    def output(alpha: float) -> Tensor:
        # float64 from the sum on: at small updates the curvature is a small difference of large numbers.
        weights = {k: v.double() + alpha * update[k].double() for k, v in base.items()}
        return functional_call(mlp, weights, (inputs,))

    mlp, inputs = mlp.double(), inputs.to(next(iter(base.values())).device, torch.float64)
    start, end = output(0.0), output(1.0)
    change = (end - start).norm()
    if not change > 0:
        return None
    errors = [(output(a) - torch.lerp(start, end, a)).norm() / change for a in alphas]
    return float(torch.stack(errors).mean())


def _layer_updates(
    planned: PlannedUpdates, neurons: NeuronMap, layer: MlpLayer, mlp: nn.Module
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(θ₀, {variant: Δ}) of one MLP, by the names of the module's parameters."""
    base = {name: value.detach().float() for name, value in mlp.named_parameters()}
    zero = {name: torch.zeros_like(value) for name, value in base.items()}
    updates: dict[str, dict[str, Tensor]] = {}
    own = [n for n in planned.names if (o := neurons.owner_of(n)) is not None and o.layer.key == layer.key]
    for name in own:
        parameter = _parameter_of(name, neurons, layer, base)
        tensor = planned.of(name)
        device = base[parameter].device  # of the model; what is planned has been read to the CPU
        base[parameter] = tensor.base.to(device)
        arithmetic = sum((tensor.weights[e] * t for e, t in tensor.experts.items()), torch.zeros_like(tensor.base))
        variants = {**tensor.experts, TASK_ARITHMETIC: arithmetic, f"merge by {planned.method}": tensor.merged}
        for variant, update in variants.items():
            updates.setdefault(variant, dict(zero))[parameter] = update.to(device)
    merged, plain = updates[f"merge by {planned.method}"], updates[TASK_ARITHMETIC]
    scale = _norm(merged) / max(_norm(plain), 1e-30)
    updates[SAME_SIZE] = {name: scale * value for name, value in plain.items()}
    return base, updates


def _parameter_of(name: str, neurons: NeuronMap, layer: MlpLayer, parameters: dict[str, Tensor]) -> str:
    """Name of the module's parameter that a stored tensor becomes."""
    roles = neurons.owner_of(name).roles
    places = [path.rpartition(".")[0] for path in layer.down]

    def fits(parameter: str) -> bool:
        owners = (neurons.owner_of(f"{place}.{parameter}") for place in places)
        return any(owner is not None and owner.roles == roles for owner in owners)

    fitting = list(filter(fits, parameters))
    exact = [p for p in fitting if name.endswith("." + p)]
    if not fitting or (len(fitting) > 1 and not exact):
        raise UserError(f"{name}: the module of {layer.key} has no parameter for it (it has: {', '.join(parameters)})")
    return (exact or fitting)[0]


def _mlp(model: PreTrainedModel, layer: MlpLayer) -> tuple[nn.Module, int]:
    """The module that holds a layer's projections, and how many features it reads: as many as it writes."""
    down = find_modules(model, layer).down
    path = next(name for name, module in model.named_modules() if module is down)
    width = getattr(down, "out_features", None) or down.nf
    return model.get_submodule(path.rsplit(".", 1)[0]), int(width)


def _norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt())


def _read_inputs(
    name: ModelName,
    loaded: LoadedModel,
    mlps: dict[str, nn.Module],
    data: Sequence[str],
    samples: int,
    tokens: int,
    seed: int,
) -> dict[str, Tensor]:
    """What each MLP reads while the base reads the data: up to `tokens` inputs, as many from each source."""
    feeder = make_feeder(name, loaded.model, 512, 0)
    kept: dict[str, list[Tensor]] = {key: [] for key in mlps}
    share = max(1, tokens // len(data))
    for text in data:
        reader = SourceReader(parse_source(text), feeder.columns)
        feeder.start(reader, False)
        seen: dict[str, list[Tensor]] = {key: [] for key in mlps}
        with _capturing(mlps, seen), torch.no_grad():
            for sample in itertools.islice(reader.samples(samples, seed), samples):
                # One sample at a time: no padding to tell apart.
                batch = feeder.batch([sample]).to(loaded.device)
                loaded.forward(batch.inputs, with_head=False)
        for key, rows in seen.items():
            if not rows:
                raise UserError(f"{reader.label}: all its rows are empty")
            kept[key].append(torch.cat(rows)[:share])
    return {key: torch.cat(rows) for key, rows in kept.items()}


@contextmanager
def _capturing(mlps: dict[str, nn.Module], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    def hook(key: str):
        def before(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[key].append(arguments[0].detach().float().reshape(-1, arguments[0].shape[-1]).cpu())

        return before

    with ExitStack() as hooks:
        for key, mlp in mlps.items():
            hooks.enter_context(mlp.register_forward_pre_hook(hook(key)))
        yield
