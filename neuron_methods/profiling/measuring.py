"""Measuring a profile: model in, data sources in, file out; resumable, on one process or several.

Samples go round among the processes of ``accelerate launch`` (sample i to process i mod n), every process measures its
own, and sums and exemplars are merged at the end of a source: the number of processes does not change the outcome but
by float rounding. A finished source is in the file; an unfinished one leaves its state beside it now and then.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from neuron_methods import __version__
from neuron_methods.data.batching import batched
from neuron_methods.data.feeders import Feeder
from neuron_methods.data.making import make_feeder
from neuron_methods.data.sources import DataSource, SourceReader, parse_source
from neuron_methods.models.processes import add_up, collect, process_state
from neuron_methods.models.reference import ModelName
from neuron_methods.models.states import weights_digest
from neuron_methods.neurons.profile_file import (
    FORMAT,
    IS_EXEMPLARS,
    NeuronProfile,
    ProfileInfo,
    SourceInfo,
    exemplars_path,
    read_exemplars,
)
from neuron_methods.profiling.checkpoint import Checkpoint
from neuron_methods.profiling.measured_model import LoadedModel, load_model, read_neurons
from neuron_methods.profiling.recorder import Recorder
from neuron_methods.profiling.results import describe_source
from neuron_methods.support.errors import UserError
from neuron_methods.support.progress import progress_bar
from neuron_methods.support.runs import claimed
from neuron_methods.support.targets import check_file, safetensors_of


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        samples: how many of each source, 0: all.
        max_length: tokens per text.
        batch_size: samples per forward pass.
        seed: of the order in which samples are drawn.
        gradients: measure activation × gradient, too.
        top: exemplars per neuron.
        context: tokens shown on either side of an exemplar.
        separator: between the two columns of instruction data, as the model was trained.
        dtype: of the model, ``auto``: as stored.
        checkpoint_seconds: how often an unfinished source saves its state.
    """

    samples: int = 1000
    max_length: int = 512
    batch_size: int = 8
    seed: int = 0
    gradients: bool = False
    top: int = 10
    context: int = 8
    separator: str = "\n"
    dtype: str = "auto"
    checkpoint_seconds: float = 300

    @property
    def outcome(self) -> dict[str, Any]:
        """Those that the profile depends on."""
        return {k: v for k, v in asdict(self).items() if k not in ("batch_size", "checkpoint_seconds")}


def measure_profile(
    model: str,
    data: Sequence[str],
    output: Path,
    settings: Settings = Settings(),
    *,
    force: bool = False,
    max_memory: dict[Any, int | str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Measure the neurons of a model on data sources and write the profile.

    Sources that the file already holds, measured with the same settings, are not measured again.

    Args:
        model: directory, repository of the hub, adapter, or base+adapter.
        data: ``NAME=SOURCE`` each; see `sources`.
        output: the file to write, ending in ``.safetensors``.
        settings: how to measure.
        force: forget the profile at `output` and start anew.
        max_memory: accelerate's bounds per device; by default what is free.
        report: called with lines for the user, in the main process.

    Raises:
        UserError: anything is wrong with model, data or file.
    """
    sources = parse_sources(data)
    name = ModelName.find(model)
    inputs = [*name.here(), *(source.location for source in sources if source.local)]
    place = check_place(output, inputs)
    beside = exemplars_path(place)
    check_file(beside, f"-o {output}: {beside.name}", IS_EXEMPLARS, True, inputs)
    alone = claimed(place, f"-o {output}", pair=beside)
    with alone if process_state().is_main_process else nullcontext():
        _measure_all(name, sources, place, settings, force, max_memory, report)


def _measure_all(
    name: ModelName,
    sources: list[DataSource],
    output: Path,
    settings: Settings,
    force: bool,
    max_memory: dict[Any, int | str] | None,
    report: Callable[[str], None],
) -> None:
    """Measure what is not in the file yet."""
    state = process_state()
    neurons = read_neurons(name)
    fresh = NeuronProfile(
        ProfileInfo(
            model=name.shown,
            model_fingerprint=name.fingerprint,
            model_type=neurons.model_type,
            layers=neurons.neurons,
            gated=[layer.key for layer in neurons.layers if layer.gated],
            settings=settings.outcome,
            made_with={"mergekit-neuron": __version__, "transformers": version("transformers")},
            weights=weights_digest(*name.directories()),
        ),
        {},
    )
    profile = _continued(fresh, sources, output, force)
    pending = [source for source in sources if source.name not in profile.sources]
    for source in sources:
        if source not in pending and state.is_main_process:
            report(f"{source.name}: already in {output.name}, skipped")
    state.wait_for_everyone()  # nobody writes before all have read
    if not pending:
        return
    with load_model(name, settings.dtype, max_memory) as loaded:
        feeder = make_feeder(name, loaded.model, settings.max_length, settings.context, settings.separator)
        readers = [SourceReader(source, feeder.columns) for source in pending]
        for reader in readers:  # all of them before the first is measured
            feeder.start(reader, settings.gradients)
        for reader in readers:
            profile = _measure_source(reader, loaded, feeder, settings, profile, output)
            if state.is_main_process:
                info = profile.info.sources[reader.source.name]
                processes = f", {state.num_processes} processes" if state.num_processes > 1 else ""
                report(f"{reader.source.name}: {info.samples} samples, {max(info.tokens.values())} tokens{processes}")


def parse_sources(data: Sequence[str | DataSource]) -> list[DataSource]:
    """Read ``NAME=SOURCE`` each; raises UserError for one that is wrong, or a name given twice."""
    sources = [parse_source(text) if isinstance(text, str) else text for text in data]
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            raise UserError(f"--data {name}=...: two data sources have this name")
    return sources


def check_place(output: Path, inputs: list[str], kind: str = FORMAT) -> Path:
    """Give the absolute path of a file of measurements.

    Args:
        output: as the user gave it.
        inputs: files and directories that are read.
        kind: format of the file, which may be there: it is added to, or found finished.

    Raises:
        UserError: the place is taken by something else, or is no name for such a file.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"-o {output}: expected a file name that ends in .safetensors")
    return check_file(output, f"-o {output}", safetensors_of(kind), True, inputs)


def _continued(fresh: NeuronProfile, sources: list[DataSource], output: Path, force: bool) -> NeuronProfile:
    """Read what `output` holds already, `fresh` if nothing; raises UserError if that was made in another way."""
    if force or not output.exists():
        return fresh
    there = NeuronProfile.load(output)
    read_exemplars(output, there.info.exemplars)  # new ones are going to stand behind them
    new, old = asdict(fresh.info), asdict(there.info)
    for key in ("model", "model_fingerprint", "model_type", "layers", "settings"):
        if new[key] != old[key]:
            what = key.replace("_fingerprint", "'s place or files")
            if key == "settings":
                changed = [k for k in new[key] if new[key][k] != old[key].get(k)]
                what = ", ".join(f"{k} {old[key].get(k)}, now {new[key][k]}" for k in changed)
            raise UserError(
                f"-o {output}: the profile there was made otherwise ({what}); name another file, or give --force"
            )
    for source in sources:
        known = there.info.sources.get(source.name)
        if known and known.state and known.fingerprint == source.fingerprint and known.state != source.state:
            raise UserError(
                f"-o {output}: {source.shown} has changed since {source.name!r} was measured on it; give the source "
                "another name, or give --force"
            )
        if known is not None and known.fingerprint != source.fingerprint:
            raise UserError(
                f"-o {output}: the profile there measured {source.name!r} on {known.source}, now it is {source.shown}; "
                "give it another name, or give --force"
            )
    return there


def _measure_source(
    reader: SourceReader,
    loaded: LoadedModel,
    feeder: Feeder,
    settings: Settings,
    profile: NeuronProfile,
    output: Path,
) -> NeuronProfile:
    """Measure one source and write `profile` with it; returns that."""
    state = process_state()
    recorder = Recorder(loaded, feeder, settings.top, settings.gradients)
    feeder.start(reader, settings.gradients)
    belongs_to = {**asdict(replace(profile.info, sources={}, exemplars=0)), "batch_size": settings.batch_size}
    checkpoint = Checkpoint(
        output,
        {**belongs_to, "source": reader.source.fingerprint, "data": reader.source.state},
        settings.checkpoint_seconds,
    )
    samples = int(add_up(torch.tensor(_measure(reader, settings, recorder, checkpoint))))
    for record in recorder.records.values():
        record.sums.reduce(add_up)
        record.top.gather(collect)
    if not samples:
        raise UserError(f"{reader.label}: all its rows are empty")
    recorder.check_finite(reader.label)
    tokens = {key: record.sums.tokens for key, record in recorder.records.items()}
    source = SourceInfo(reader.source.shown, reader.source.fingerprint, samples, tokens, reader.source.state)
    info = replace(profile.info, sources={**profile.info.sources, reader.source.name: source})
    if state.is_main_process:
        tensors, exemplars = describe_source(recorder, reader.source.name, profile.info.exemplars)
        info = replace(info, exemplars=profile.info.exemplars + len(exemplars))
        kept = profile.info.exemplars
        profile = NeuronProfile(info, {**profile.tensors, **tensors})
        profile.save(output, kept, exemplars)
    else:
        profile = NeuronProfile(info, profile.tensors)
    state.wait_for_everyone()
    checkpoint.remove()
    return profile


def _measure(reader: SourceReader, settings: Settings, recorder: Recorder, checkpoint: Checkpoint) -> int:
    """Let this process's share of the samples through the model; returns how many they are."""
    state = process_state()
    done = checkpoint.load(recorder)  # batches that were measured before are only counted
    own = itertools.islice(
        reader.samples(settings.samples, settings.seed), state.process_index, None, state.num_processes
    )
    count = 0
    share = -(-settings.samples // state.num_processes) or None
    bar = progress_bar(total=share, what=reader.source.name, unit="sample", shown=state.is_main_process)
    with bar, recorder.watching():
        for number, samples in enumerate(batched(own, settings.batch_size)):
            count += len(samples)
            if number >= done:
                recorder.run(recorder.feeder.batch(samples))
                checkpoint.save_if_due(recorder, number + 1)
            bar.update(len(samples))
    return count
