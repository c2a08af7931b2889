"""`mergekit-neuron route`: enhancement, router, threshold, and one directory that holds it all, complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from neuron_methods import __version__
from neuron_methods.adapters.config import AdapterConfig
from neuron_methods.adapters.live import save_adapter, stored_dtype
from neuron_methods.adapters.own_head import OwnHead
from neuron_methods.adapters.parting import Parts, trained_biases
from neuron_methods.models.loading import device_map, load_processor
from neuron_methods.models.loading import read_config as read_model_config
from neuron_methods.models.reference import Place
from neuron_methods.models.states import model_files, watched
from neuron_methods.neurons import layer_of
from neuron_methods.routing.account import describe_enhancement, describe_plan, describe_router
from neuron_methods.routing.base import load_base, routable_kind
from neuron_methods.routing.data import SampleDrawer, Samples, fingerprint_of_samples, labels_of
from neuron_methods.routing.enhancement import Enhanced, enhance_expert, kept_paths, untouched
from neuron_methods.routing.experts import (
    adapter_directories,
    check_adapter,
    check_bases,
    factors_alone,
    load_experts,
    parts_of_experts,
)
from neuron_methods.routing.heads import Classes, HeadBank
from neuron_methods.routing.mixing import AdapterMixer
from neuron_methods.routing.model import NeuronRoutedModel
from neuron_methods.routing.pooling import pooled_states, resolve_layers
from neuron_methods.routing.route_yaml import RouteConfig, read_config
from neuron_methods.routing.routed_files import (
    ADAPTERS,
    ENHANCEMENT_NAME,
    ROUTER_NAME,
    RoutedConfig,
    RoutedExpert,
    bias_file,
    reference_to,
)
from neuron_methods.routing.router import Router
from neuron_methods.routing.router_training import Inputs, RouterReport, train_router
from neuron_methods.routing.stored import save_biases
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import check_space, staging_directory, write_json
from neuron_methods.support.finite import check_finite, is_finite
from neuron_methods.support.progress import progress_bar
from neuron_methods.support.runs import claimed
from neuron_methods.support.stages import Stage, Stages
from neuron_methods.support.targets import check_target, deliver


def build_routed_model(
    configuration: Path,
    out: Path,
    *,
    dry_run: bool = False,
    force: bool = False,
    device: str | None = None,
    work_dir: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Make a routed model.

    Args:
        configuration: the YAML; see `route_yaml`.
        out: directory to write. What is there before is replaced at the very end, and with `force` only.
        dry_run: say what would be done, and write nothing.
        force: replace an earlier output.
        device: where to compute: ``cpu``, ``cuda``, ``auto``, …
        work_dir: where finished stages are kept, also after the run; None: beside `out`, and removed with success.
        report: called with texts for the user.

    Raises:
        UserError: anything is wrong with the configuration, the models, the data or `out`.
    """
    config = read_config(configuration)
    directories = adapter_directories({expert.name: expert.adapter for expert in config.experts})
    sources = [d.source for e in config.experts for d in (e.data, e.calibration) if d is not None]
    sources += [data.source for data in config.background]
    named = (configuration, config.base_model, *directories.values(), *sources)
    inputs = [path for path in map(str, named) if os.path.exists(path)]
    if dry_run:
        _planned(config, configuration, directories, device, report)
        return
    target = check_target(out, force, inputs)
    with claimed(target, out):
        watch = watched(inputs)
        run = _planned(config, configuration, directories, device, report)
        # Once as stages, once in the output.
        check_space(target.parent, 2 * sum(os.path.getsize(f) for d in directories.values() for f in model_files(d)))
        work = Stages(work_dir or target.parent / f".{target.name}.work", "mergekit-neuron route")
        with work.alone():
            train, calibration = run.inputs(work)
            router, figures = train_router(train, calibration, config.router, run.background_inputs(work), run.read)
            report(describe_router(figures, run.samples, config.router, router.threshold))
            enhanced = {name: run.enhance(name, work) for name in run.samples}
            with staging_directory(target) as staging:
                run.write(staging, target, router, figures, enhanced)
                _verify(staging, config, calibration, router)
                watch.check()
                deliver(staging, target, force)
        if work_dir is None:
            work.remove()
    report(f"complete and verified: {out}")


def _planned(
    config: RouteConfig,
    configuration: Path,
    directories: dict[str, str],
    device: str | None,
    report: Callable[[str], None],
) -> _Run:
    """Load and check everything, and tell the plan."""
    run = _Run(config, configuration, directories, device, report)
    counts = [(len(parts["train"]), len(parts["calibration"])) for parts in run.samples.values()]
    report(describe_plan(config, run.mixer.layers, counts, run.read, run.labels))
    return run


def _refuse_bias_of_head(adapters: dict[str, AdapterConfig], parts: dict[str, Parts]) -> None:
    """Refuse an expert that changed the base's head a little, where others have heads of their own."""
    of_heads = {path.partition(".")[0] for found in parts.values() if found.head for path in found.head.keys}
    for name, found in parts.items():
        if wrong := [path for path in found.biases if path.partition(".")[0] in of_heads]:
            raise UserError(
                f"{adapters[name].where}: it trained the bias of {wrong[0]}, the base's head, and others have heads "
                "of their own; train it with modules_to_save, too"
            )


class _Run:
    """One run: the models in memory, the samples, and the stages."""

    def __init__(
        self,
        config: RouteConfig,
        where: Path,
        directories: dict[str, str],
        device: str | None,
        report: Callable[[str], None],
    ) -> None:
        self.config, self.where, self.directories = config, str(where), directories
        self.report = report
        adapters = {name: check_adapter(d, f"{where}: adapter of {name}") for name, d in directories.items()}
        if config.check_base:
            for note in check_bases(adapters, directories, config.base_model, self.where):
                report(note)
        place, base_where = Place.parse(config.base_model), f"{where}: base_model"
        parts = parts_of_experts(adapters, directories, read_model_config(place, base_where))
        heads = {name: found.head for name, found in parts.items() if found.head is not None}
        self.architecture = next((head.model.__name__ for head in heads.values()), None)
        options = {"dtype": config.dtype, "device_map": device_map(device), "architecture": self.architecture}
        base = load_base(config.base_model, base_where, **options)
        kind = routable_kind(base)
        self.read = resolve_layers(base, config.router.layer, f"{where}: router.layer")
        self.processor = load_processor(kind.processor, place, base_where)
        _refuse_bias_of_head(adapters, parts)
        biases = {n: trained_biases(adapters[n], directories[n], found, base) for n, found in parts.items()}
        with factors_alone(adapters, directories, parts) as factors:
            self.peft_model = load_experts(base, factors, self.where)
        self.mixer = AdapterMixer(self.peft_model, list(directories), biases)
        self.base = base
        self.labels: dict[str, tuple[str, ...]] = {}
        for expert in config.experts:
            if expert.name in heads:
                classes = heads[expert.name].config.num_labels
                self.labels[expert.name] = tuple(labels_of(expert, kind.kind, classes, self.where))
            elif expert.head_labels is not None:
                raise UserError(
                    f"{where}: expert {expert.name!r}: head_labels: its adapter stores no head; leave it out"
                )
        self.heads = self._bank(heads) if heads else None
        of_experts = {} if self.heads is None else self.heads.configs(base.config)
        drawer = SampleDrawer(config, base, self.processor, kind.kind, of_experts)
        self.samples = {expert.name: drawer.of_expert(expert) for expert in config.experts}
        self.background = [drawer.of_background(number, data) for number, data in enumerate(config.background)]
        self.models_key = [place.state(), config.dtype]

    def _bank(self, heads: dict[str, OwnHead]) -> HeadBank:
        """Put the adapters' heads into the base."""
        experts = [RoutedExpert(name, (), self.labels.get(name)) for name in self.directories]
        classes = Classes.of(experts, str(self.architecture), self.base.config, self.where)
        tensors = {name: {path: head.tensor(path) for path in head.keys} for name, head in heads.items()}
        for name, values in tensors.items():
            check_finite(values.items(), f"{self.where}: adapter of {name}")
        return HeadBank(self.base, classes, tensors)

    def inputs(self, work: Stages) -> tuple[Inputs, Inputs]:
        """Pool hidden states of all training and all calibration samples."""
        states = [self._states(name, parts, work) for name, parts in self.samples.items()]

        def joined(part: str) -> Inputs:
            labels = [torch.full((len(of_expert[part]),), number) for number, of_expert in enumerate(states)]
            return Inputs(torch.cat([of_expert[part] for of_expert in states]), torch.cat(labels))

        return joined("train"), joined("calibration")

    def background_inputs(self, work: Stages) -> torch.Tensor | None:
        """Pool hidden states of what no expert is for, None if there is nothing."""
        found = [self._states(f"background-{i}", p, work)["train"] for i, p in enumerate(self.background)]
        return torch.cat(found) if found else None

    def _states(self, name: str, parts: dict[str, Samples], work: Stages) -> dict[str, torch.Tensor]:
        pooling = self.config.router.pooling
        key = [*self.models_key, fingerprint_of_samples(parts), self.read, pooling]

        def build(place: Path) -> dict[str, Any]:
            tensors = {}
            with progress_bar(total=sum(map(len, parts.values())), what=f"{name}: inputs", unit="sample") as bar:
                for part, samples in parts.items():
                    pooled = []
                    for inputs in samples.inputs():
                        pooled.append(pooled_states(self.base, inputs, self.read, pooling).cpu())
                        if not is_finite(pooled[-1]):
                            first = sum(map(len, pooled[:-1])) + int((~pooled[-1].isfinite()).any(dim=1).nonzero()[0])
                            raise UserError(
                                f"{self.where}: base_model: on sample {first + 1} of {name} its hidden states are NaN "
                                "or Inf, though its weights are finite; set dtype: float32"
                            )
                        bar.update(len(pooled[-1]))
                    tensors[part] = torch.cat(pooled)
            place.mkdir()
            save_file(tensors, place / "states.safetensors")
            return {}

        return load_file(_stage(work, f"inputs-{name}", key, build).place / "states.safetensors")

    def enhance(self, name: str, work: Stages) -> tuple[Enhanced, Path]:
        """Make or take the expert's enhancement and the directory of its adapter."""
        settings = self.config.enhancement
        key = [
            *self.models_key,
            Place(self.directories[name]).state(),
            settings.model_dump(),
            self.config.text.model_dump(),
            fingerprint_of_samples(self.samples[name]),
            [getattr(part.feeder, "classes", None) for part in self.samples[name].values()],
            self.labels.get(name),
            self.config.merging.dropped,
        ]

        def build(place: Path) -> dict[str, Any]:
            if settings.enabled:
                deciding, held_out = self.samples[name]["calibration"].losses(settings.samples)
                with nullcontext() if self.heads is None else self.heads.using(name):
                    enhanced = enhance_expert(self.base, self.mixer, name, deciding, settings, held_out)
            else:
                enhanced = untouched(self.mixer, name)
            paths = kept_paths(self.mixer, enhanced, self.config.merging.dropped)
            save_adapter(self.peft_model, name, place / "adapter", paths, stored_dtype(self.directories[name]))
            gone = set() if self.config.merging.dropped == "keep" else set(enhanced.redundant)
            save_biases(place, name, {p: b for p, b in self.mixer.biases[name].items() if layer_of(p) not in gone})
            return asdict(enhanced)

        stage = _stage(work, f"expert-{name}", key, build)
        enhanced = TypeAdapter(Enhanced).validate_python(stage.result)
        if settings.enabled:
            self.report(("" if stage.built else "(done before) ") + describe_enhancement(enhanced))
        return enhanced, stage.place / "adapter"

    def write(
        self,
        staging: Path,
        target: Path,
        router: Router,
        figures: RouterReport,
        enhanced: dict[str, tuple[Enhanced, Path]],
    ) -> None:
        """Fill the output directory."""
        versions = {name: version(name) for name in ("transformers", "peft", "torch")}
        config = RoutedConfig(
            base_model=reference_to(self.config.base_model, target),
            experts=tuple(
                RoutedExpert(name, found.redundant, self.labels.get(name), bias_file(stage.parent, name).is_file())
                for name, (found, stage) in enhanced.items()
            ),
            router=replace(router.shape, ood_threshold=router.threshold),
            redundant=self.config.merging.redundant,
            seed=self.config.merging.seed,
            architecture=self.architecture,
            report={"router": asdict(figures), "made_with": {"mergekit-neuron": __version__, **versions}},
        )
        for name, (_, adapter) in enhanced.items():
            shutil.copytree(adapter, staging / ADAPTERS / name)
            if bias_file(adapter.parent, name).is_file():
                bias_file(staging, name).parent.mkdir(exist_ok=True)
                shutil.copy(bias_file(adapter.parent, name), bias_file(staging, name))
        if self.heads is not None:
            self.heads.save(staging)
        save_file(dict(router.state_dict()), staging / ROUTER_NAME, metadata={"format": "pt"})
        trace = {
            "settings": self.config.enhancement.model_dump(),
            "experts": [asdict(e) for e, _ in enhanced.values()],
        }
        write_json(staging / ENHANCEMENT_NAME, trace, indent=1)
        self.processor.save_pretrained(staging)
        config.write(staging)


def _stage(work: Stages, name: str, key: Any, build: Callable[[Path], Any]) -> Stage:
    """Make or take a stage; runs with other settings have places of their own."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return work.run(work.records / f"{name}-{digest}", key, build)


def _verify(staging: Path, config: RouteConfig, calibration: Inputs, router: Router) -> None:
    """Load what was written, and make sure that its router says what the trained one says.

    Raises:
        UserError: it does not.
    """
    loaded = NeuronRoutedModel.from_pretrained(staging, base_model=config.base_model, dtype=config.dtype)
    some = calibration.states[:: max(1, len(calibration) // 16)]
    with torch.no_grad():
        (expected, scores), (found, found_scores) = router(some), loaded.router.cpu()(some)
    same = torch.allclose(expected, found, atol=1e-5) and torch.allclose(scores, found_scores, atol=1e-4)
    if not same:
        raise UserError("verification failed: the routed model does not route as it was trained to; run again")
