"""Measuring the inputs of a model's modules: model in, data sources in, a file of factors out.

All sources are one stream of samples, which go round among the processes of ``accelerate launch``. Every process keeps
sketches of its own, and what is left of an interrupted run lies beside the file, as for profiles of neurons.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_methods import __version__
from neuron_methods.adapters.live import opened_model
from neuron_methods.data.batching import batched
from neuron_methods.data.feeders import Batch, Feeder
from neuron_methods.data.making import make_feeder
from neuron_methods.data.sources import DataSource, Sample, SourceReader
from neuron_methods.data.texts import TextFeeder, TextToTextFeeder
from neuron_methods.methods.inputs_file import FORMAT, InputsFile, InputsInfo, save_inputs
from neuron_methods.models.processes import add_up, collect, process_state
from neuron_methods.models.reference import ModelName
from neuron_methods.profiling.answers import answered_by
from neuron_methods.profiling.checkpoint import Checkpoint
from neuron_methods.profiling.input_recorder import InputRecorder, InputsDiffer, common_groups
from neuron_methods.profiling.measuring import check_place, parse_sources
from neuron_methods.profiling.sketch import InputSketch
from neuron_methods.support.errors import UserError
from neuron_methods.support.progress import progress_bar
from neuron_methods.support.runs import claimed
from neuron_methods.support.text import format_bytes, listed


@dataclass(frozen=True)
class InputSettings:
    """How to measure inputs.

    Attributes:
        samples: how many of each source, 0: all.
        max_length: tokens per text, answers included.
        batch_size: samples per forward pass.
        seed: of the order in which samples are drawn.
        separator: between the two columns of instruction data, as the model was trained.
        dtype: of the model, ``auto``: as stored.
        rows: of a factor at most; more input vectors are compressed, see `sketch`.
        generate: the model's own answers, of up to so many tokens, take the place of the second column; None: not.
        answers_only: of a decoder's inputs only those count at which it says the answer.
        checkpoint_seconds: how often an unfinished run saves its state.
    """

    samples: int = 64
    max_length: int = 512
    batch_size: int = 8
    seed: int = 0
    separator: str = "\n"
    dtype: str = "auto"
    rows: int = 1024
    generate: int | None = None
    answers_only: bool = False
    checkpoint_seconds: float = 300

    @property
    def outcome(self) -> dict[str, Any]:
        """Those that the file depends on."""
        return {k: v for k, v in asdict(self).items() if k not in ("batch_size", "checkpoint_seconds")}


def measure_inputs(
    model: str,
    data: Sequence[str | DataSource],
    output: Path,
    settings: InputSettings = InputSettings(),
    *,
    force: bool = False,
    max_memory: dict[Any, int | str] | None = None,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Measure what the linear modules of a model are given on data sources, and write it as factors.

    Args:
        model: directory, repository of the hub, adapter, or base+adapter; an adapter is merged in memory.
        data: ``NAME=SOURCE`` each, see `sources`, or what that says. The tokens of all of them count alike.
        output: the file to write, ending in ``.safetensors``.
        settings: how to measure.
        force: start anew if `output` exists.
        max_memory: accelerate's bounds per device; by default what is free.
        progress: show a progress bar.
        report: called with lines for the user, in the main process.

    Raises:
        UserError: anything is wrong with model, data or file.
    """
    sources, name = parse_sources(data), ModelName.find(model)
    read = [*name.here(), *(source.location for source in sources if source.local)]
    place = check_place(output, read, FORMAT)
    with claimed(place, f"-o {output}") if process_state().is_main_process else nullcontext():
        _measure_all(name, sources, place, settings, force, max_memory, progress, report)


def _measure_all(
    name: ModelName,
    sources: list[DataSource],
    output: Path,
    settings: InputSettings,
    force: bool,
    max_memory: dict[Any, int | str] | None,
    progress: bool,
    report: Callable[[str], None],
) -> None:
    """Measure what is not in the file yet."""
    state = process_state()
    made_from = {
        "model_fingerprint": name.fingerprint,
        "sources": {source.name: [source.shown, source.fingerprint] for source in sources},
        "settings": settings.outcome,
    }
    finished = not force and output.exists() and _is_finished(output, name, made_from)
    state.wait_for_everyone()  # nobody writes before all have read
    said: Callable[[str], None] = report if state.is_main_process else (lambda line: None)
    if finished:
        said(f"{', '.join(source.name for source in sources)}: already in {output.name}, skipped")
        return
    with opened_model(name, settings.dtype, max_memory, merged=True) as (loaded, device):
        feeder = make_feeder(name, loaded, settings.max_length, 0, settings.separator)
        readers = _opened(sources, feeder, loaded, settings)
        recorder = InputRecorder(loaded, device, feeder, settings.rows, settings.answers_only)
        if not recorder.modules:
            raise UserError(f"model {name.shown}: {type(loaded).__name__} has no linear layers")
        run = _Run(recorder, readers, settings, output, {"model": name.shown, **made_from}, said)
        with recorder.watching():
            run.measure(progress)
        measured = run.total > 0
        run.count_all()
        made_from["samples"] = run.samples
        made_from["made_with"] = {"mergekit-neuron": __version__, "transformers": version("transformers")}
        info = InputsInfo(
            model=name.shown, model_type=loaded.config.model_type, modules={}, tokens={}, made_from=made_from
        )
        factors, unclear = _gathered(recorder, measured, info)
    if state.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_inputs(output, info, factors)
        _tell(recorder, info, factors, unclear, output, run, said)
    state.wait_for_everyone()
    run.forget()


def _is_finished(output: Path, name: ModelName, made_from: dict[str, Any]) -> bool:
    """Tell that a file holds what is asked for; raises UserError if it holds anything else."""
    try:
        there = InputsFile.open(str(output)).info
    except UserError as error:
        raise UserError(f"-o: {error}; or name another file, or give --force") from None
    old = {"model": there.model, **there.made_from}
    for key, value in {"model": name.shown, **made_from}.items():
        if old.get(key) == value:
            continue
        what = key.replace("_fingerprint", "'s place or files")
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            names = [k for k in {**old[key], **value} if value.get(k) != old[key].get(k)]
            what = f"{key}: {listed(names)}"
        raise UserError(
            f"-o {output}: the inputs there were measured otherwise ({what}); name another file, or give --force"
        )
    return True


def _opened(sources: Sequence[DataSource], feeder: Feeder, model: Any, settings: InputSettings) -> list[SourceReader]:
    """Open all sources before the first is measured, and refuse what this kind of model cannot do."""
    if settings.generate is not None:
        if not isinstance(feeder, TextFeeder) or not feeder.causal or not model.can_generate():
            raise UserError(f"--generate: {type(model).__name__} gives no answers of text; leave it away")
        if not model.config.is_encoder_decoder and settings.generate >= feeder.max_length:
            raise UserError(
                f"--generate {settings.generate}: texts have up to {feeder.max_length} tokens, which leaves none for a "
                "prompt; raise --max-length or generate less"
            )
        feeder.columns_needed = 1
    decoder = type(feeder) is TextFeeder and feeder.causal
    if settings.answers_only and not decoder:
        raise UserError(
            f"--answers-only: {type(model).__name__} does not read prompt and answer as one text, as decoders do; "
            "leave it away"
        )
    readers = [SourceReader(source, feeder.columns) for source in sources]
    for reader in readers:
        if settings.generate is None and len(reader.columns) < 2:
            if settings.answers_only:
                raise UserError(
                    f"{reader.label}: --answers-only needs a column of prompts and one of answers, or --generate; name "
                    f"them: --data {reader.source.name}=...:prompt,answer"
                )
            if isinstance(feeder, TextToTextFeeder):
                raise UserError(
                    f"{reader.label}: the decoder has nothing to read; name a column of answers, too, or let the model "
                    "answer by itself: --generate"
                )
        feeder.start(reader, False)
    return readers


class _Run:
    """This process's share of the samples through the model.

    Attributes:
        samples: source -> how many there were.
    """

    def __init__(
        self,
        recorder: InputRecorder,
        readers: Sequence[SourceReader],
        settings: InputSettings,
        output: Path,
        belongs_to: dict[str, Any],
        report: Callable[[str], None],
    ) -> None:
        self.recorder, self.readers, self.settings = recorder, readers, settings
        self.samples: dict[str, int] = {}
        self._output, self._belongs_to, self._report = output, belongs_to, report
        self._checkpoint: Checkpoint | None = None

    @property
    def total(self) -> int:
        """Count the samples."""
        return sum(self.samples.values())

    def measure(self, progress: bool) -> None:
        """Measure all samples, once more from the first if modules that shared their inputs do so no longer."""
        while True:
            try:
                return self._measure(progress)
            except InputsDiffer:
                continue

    def count_all(self) -> None:
        """Count the samples of all processes from here on; raises UserError if a source has none."""
        own = torch.tensor([self.samples[reader.source.name] for reader in self.readers])
        for reader, count in zip(self.readers, add_up(own).tolist(), strict=True):
            if not count:
                raise UserError(f"{reader.label}: all its rows are empty")
            self.samples[reader.source.name] = count

    def forget(self) -> None:
        """Remove the state of an unfinished run."""
        if self._checkpoint is not None:
            self._checkpoint.remove()

    def _measure(self, progress: bool) -> None:
        state, settings = process_state(), self.settings
        self.samples = {reader.source.name: 0 for reader in self.readers}
        share = -(-settings.samples * len(self.readers) // state.num_processes) or None
        done, shown = 0, progress and state.is_main_process
        with progress_bar(total=share, what="inputs", unit="sample", shown=shown) as bar:
            for number, (reader, samples) in enumerate(self._batches()):
                self.samples[reader.source.name] += len(samples)
                if number >= done:
                    batch = self._batch(samples)
                    if number == 0:
                        done = self._start(batch)
                    if number >= done:
                        self.recorder.run(batch)
                        self._save(number + 1)
                bar.update(len(samples))

    def _batches(self) -> Iterator[tuple[SourceReader, list[Sample]]]:
        state, settings = process_state(), self.settings
        for reader in self.readers:
            self.recorder.feeder.start(reader, False)
            own = itertools.islice(
                reader.samples(settings.samples, settings.seed), state.process_index, None, state.num_processes
            )
            for samples in batched(own, settings.batch_size):
                yield reader, samples

    def _batch(self, samples: list[Sample]) -> Batch:
        recorder, new_tokens = self.recorder, self.settings.generate
        if new_tokens is None:
            return recorder.feeder.batch(samples)
        assert isinstance(recorder.feeder, TextFeeder)
        return answered_by(recorder.model, recorder.feeder, samples, new_tokens, recorder.device)

    def _start(self, batch: Batch) -> int:
        """Find the groups, unless that is done; returns how many batches an interrupted run has measured."""
        if self._checkpoint is None:
            self.recorder.find_groups(batch)
            self._report(_size(self.recorder))
        belongs_to = {**self._belongs_to, "batch_size": self.settings.batch_size, "groups": self.recorder.groups()}
        self._checkpoint = Checkpoint(self._output, belongs_to, self.settings.checkpoint_seconds)
        return self._checkpoint.load(self.recorder)

    def _save(self, batches: int) -> None:
        if self._checkpoint is not None:
            self._checkpoint.save_if_due(self.recorder, batches)


def _size(recorder: InputRecorder) -> str:
    """Say what there is to measure, and what it takes at most."""
    sketches = recorder.records.values()
    widths = [sketch.width for sketch in sketches]
    numbers = sum(sketch.rows * sketch.width for sketch in sketches)
    return (
        f"inputs of {len(recorder.modules)} linear modules, {len(widths)} of them different, {min(widths)} to "
        f"{max(widths)} wide: up to {max(sketch.rows for sketch in sketches)} rows of each, at most "
        f"{format_bytes(2 * numbers)} on disk and {format_bytes(8 * numbers)} in memory"
    )


def _gathered(recorder: InputRecorder, measured: bool, info: InputsInfo) -> tuple[dict[str, Tensor], list[str]]:
    """Put the sketches of all processes together; fills the modules, tokens and losses of `info` in.

    Returns:
        The factors by their names in the file, bfloat16, on the CPU, in the main process only; and the modules whose
        inputs could not be told to tokens.
    """
    state = process_state()
    paths = list(recorder.modules)
    # A process without a sample knows no difference between modules.
    own = torch.tensor([recorder.group_of[path] if measured else 0 for path in paths])
    numbers = common_groups(collect(own).view(-1, len(paths)).tolist())
    members: dict[int, list[str]] = {}
    for path, number in zip(paths, numbers, strict=True):
        members.setdefault(number, []).append(path)
    factors: dict[str, Tensor] = {}
    unclear: list[str] = []
    for these in members.values():
        sketch = recorder.records[str(recorder.group_of[these[0]])]
        if state.num_processes > 1:
            shared, sketch = sketch, InputSketch(sketch.width, sketch.rows, sketch.device)
            sketch.load_state(shared.state())
            sketch.merge(add_up, collect)
        if sketch.missing:
            unclear += these
        if sketch.missing or not sketch.tokens or not state.is_main_process:
            continue
        name = str(len(factors))
        factors[name] = sketch.factor().to("cpu", torch.bfloat16)
        info.modules.update(dict.fromkeys(these, name))
        info.tokens[name] = sketch.tokens
        info.lost[name] = sketch.loss / sketch.energy if sketch.energy else 0.0
    return factors, unclear


def _tell(
    recorder: InputRecorder,
    info: InputsInfo,
    factors: dict[str, Tensor],
    unclear: Sequence[str],
    output: Path,
    run: _Run,
    report: Callable[[str], None],
) -> None:
    """Say what was measured, and what was not."""
    processes = process_state().num_processes
    for source, count in run.samples.items():
        report(f"{source}: {count} samples" + (f", {processes} processes" if processes > 1 else ""))
    unseen = [path for path in recorder.modules if path not in info.modules and path not in unclear]
    if unseen:
        report(f"left out, as no sample comes there: {listed(unseen)}")
    if unclear:
        report(
            f"left out, as their inputs cannot be told from padding: {listed(unclear)}; --batch-size 1 measures them"
        )
    size = sum(factor.numel() * factor.element_size() for factor in factors.values())
    lost = max(info.lost.values(), default=0.0)
    kept = f"compressed, less than {lost:.2g} of ‖F‖² lost in any direction" if lost else "nothing lost but bfloat16"
    report(
        f"{output.name}: {len(info.modules)} modules, {len(factors)} factors of {max(info.tokens.values())} tokens at "
        f"most, {format_bytes(size)}, {kept}"
    )
