"""Describing neurons: profile and describer in, labels and a page out; resumable, on one process or several.

Gu et al., Findings of ACL 2025, 2025.findings-acl.471, "employ neuron description methods to analyze and classify
neurons" (abstract). No source was found for how, so this is ours. The describer, asked as `prompts` has it, answers
with a name, whose likelihood P(name) is measured among the names there are. A small describer likes some names better,
whatever it reads; so with `prior: even` P(name) is divided by its mean over all neurons described (as batch calibration
does, Zhou et al., 2023, arXiv:2309.17249), and `own` leaves it. The largest share is the label, and its confidence.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from neuron_methods import __version__
from neuron_methods.data.batching import batched
from neuron_methods.models.processes import process_state
from neuron_methods.models.reference import ModelName
from neuron_methods.neurons.profile_file import NeuronProfile, exemplars_path
from neuron_methods.profiling.agreement import by_activations, describe_agreement
from neuron_methods.profiling.describer import Describer, opened_describer
from neuron_methods.profiling.journal import Journal, Judgement, Neuron
from neuron_methods.profiling.labels_file import FORMAT, NeuronLabel, NeuronLabels
from neuron_methods.profiling.neuron_page import IS_PAGE, write_with_page
from neuron_methods.profiling.prompts import (
    WORDING,
    Reading,
    contexts_of,
    described,
    description_in,
    names_to_choose_from,
    to_choose,
    to_describe,
)
from neuron_methods.support.errors import UserError
from neuron_methods.support.progress import progress_bar
from neuron_methods.support.quiet import quiet_transformers
from neuron_methods.support.runs import claimed
from neuron_methods.support.targets import check_file, json_of
from neuron_methods.support.text import columns, shortened

Prior = Literal["even", "own"]


@dataclass(frozen=True)
class Selection:
    """Which neurons to describe.

    Attributes:
        layers: keys, numbers or ranges of numbers with commas between; None: all.
        limit: of each layer, so many drawn at random; None: all. A higher limit draws the same and more.
        seed: of the draw.
        contexts: how many each is shown in.
    """

    layers: str | None = None
    limit: int | None = None
    seed: int = 0
    contexts: int = 8

    def of(self, profile: NeuronProfile) -> dict[Neuron, list[str]]:
        """List the neurons, each with its contexts; those that never fire have none and are left out.

        Raises:
            UserError: there is no such layer, or nothing that fires.
        """
        drawn: list[tuple[int, Neuron]] = []
        for layer in self._layers(profile):
            order = list(range(profile.layers[layer]))
            random.Random(f"{self.seed} {layer}").shuffle(order)
            drawn += [(place, (layer, neuron)) for place, neuron in enumerate(order[: self.limit])]
        # All layers by turns, so that what has been done so far serves a lower limit, too.
        drawn.sort(key=lambda one: one[0])
        found = {n: shown for _, n in drawn if (shown := contexts_of(profile, *n, self.contexts))}
        if not found:
            raise UserError(f"{profile.path}: none of the chosen neurons ever fires, so there is nothing to describe")
        return found

    def _layers(self, profile: NeuronProfile) -> list[str]:
        if self.layers is None:
            return list(profile.layers)
        chosen = []
        for part in map(str.strip, self.layers.split(",")):
            numbers = re.fullmatch(r"(\d{1,6})-(\d{1,6})", part)
            names = map(str, range(int(numbers[1]), int(numbers[2]) + 1)) if numbers else [part]
            chosen += [profile.find_layer(name, f"--layers {shortened(self.layers, quote=False)}") for name in names]
        if not chosen:
            raise UserError(f"--layers {self.layers}: no layer; the first number comes first")
        return [layer for layer in profile.layers if layer in chosen]


def check_place(output: Path, force: bool, inputs: Iterable[str | Path]) -> tuple[Path, Path]:
    """Give the absolute paths of labels and page.

    Raises:
        UserError: one of them may not be written, see `support.targets`.
    """
    if output.suffix != ".json":
        raise UserError(f"-o {output}: expected a file name that ends in .json")
    read = list(inputs)
    place = check_file(output, f"-o {output}", json_of(FORMAT), force, read)
    page = place.with_suffix(".html")
    return place, check_file(page, f"-o {output}: {page.name}", IS_PAGE, True, read)


def inputs_of(profile: Path) -> list[Path]:
    """List the files of a profile."""
    return [profile, exemplars_path(profile)]


def describe_neurons(
    profile: Path,
    describer: str,
    output: Path,
    selection: Selection = Selection(),
    *,
    choose_by: Reading = "both",
    prior: Prior = "even",
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Describe and label neurons, and write labels and page.

    Args:
        profile: of the base, measured on texts.
        describer: a causal model with a chat template: directory, repository of the hub, adapter, or base+adapter.
        output: the file of labels, ending in ``.json``; the page goes beside.
        selection: which neurons.
        choose_by: what the describer sees as it chooses a name.
        prior: see this module.
        batch_size: neurons per forward pass.
        dtype: of the describer, see `models.loading.computing_dtype`.
        device: where it goes; None: where accelerate finds room.
        force: replace labels at `output`; of what they say nothing is asked again, if it would be asked the same way.
        report: called with lines for the user, in the main process.

    Raises:
        UserError: anything is wrong with profile, describer or file.
    """
    name, state = ModelName.find(describer), process_state()
    place, page = check_place(output, force, [*inputs_of(profile), *name.here()])
    measured = NeuronProfile.load(profile)
    names = names_to_choose_from(measured)
    neurons = selection.of(measured)
    with claimed(place, f"-o {output}", pair=page) if state.is_main_process else nullcontext():
        belongs_to = {
            "profile": measured.digest,
            "describer": name.fingerprint,
            "contexts": selection.contexts,
            "choose_by": choose_by,
            "dtype": dtype,
            "wording": WORDING,
        }
        asked = hashlib.sha256(json.dumps(belongs_to, sort_keys=True).encode()).hexdigest()[:16]
        journal = Journal(place, asked, len(names))
        journal.open(_judged_before(place, asked, names))
        said: Callable[[str], None] = report if state.is_main_process else (lambda line: None)
        kept = len(neurons.keys() & journal.found.keys())
        told = f", {kept} of them kept from an earlier run" if kept else ""
        said(f"{len(neurons)} neurons in {len({layer for layer, _ in neurons})} layers{told}")
        todo = [batch for batch in batched(neurons, batch_size) if not journal.found.keys() >= set(batch)]
        if todo:
            with opened_describer(name, dtype, device) as opened:
                _judge_all(todo, neurons, names, choose_by, opened, journal, said)
        judged = _of_all_processes({n: j for n, j in journal.found.items() if n in neurons})
        if state.is_main_process:
            made_from = {
                "profile": measured.digest,
                "asked": asked,
                "describer": name.shown,
                "choose_by": choose_by,
                "prior": prior,
                "contexts": selection.contexts,
                "made_with": __version__,
            }
            labels = label(measured, names, judged, prior, made_from)
            finish(measured, labels, neurons, place, said)
        state.wait_for_everyone()
        journal.remove()


def label(
    profile: NeuronProfile,
    names: Sequence[str],
    judged: Mapping[Neuron, Judgement],
    prior: Prior,
    made_from: Mapping[str, Any],
) -> NeuronLabels:
    """Turn what a describer says into labels; see this module."""
    order = [(layer, neuron) for layer in profile.layers for neuron in range(profile.layers[layer])]
    order = [neuron for neuron in order if neuron in judged]
    likely = torch.tensor([judged[neuron].likelihoods for neuron in order], dtype=torch.float64).softmax(dim=1)
    if prior == "even":
        likely = likely / likely.mean(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        likely = likely / likely.sum(dim=1, keepdim=True)
    confidence, chosen = (values.tolist() for values in likely.max(dim=1))
    labels = [
        NeuronLabel(*n, names[i], round(sure, 4), described(judged[n].description), judged[n].likelihoods)
        for n, i, sure in zip(order, chosen, confidence, strict=True)
    ]
    info = profile.info
    return NeuronLabels(info.model, info.model_type, info.weights, tuple(names), labels, made_from)


def finish(
    profile: NeuronProfile,
    labels: NeuronLabels,
    contexts: Mapping[Neuron, Sequence[str]],
    place: Path,
    report: Callable[[str], None],
) -> None:
    """Write labels and page, and say how many neurons each group has and how often activations agree."""
    activations = by_activations(profile, labels)
    agreement = describe_agreement(labels, activations)
    write_with_page(labels, contexts, activations, agreement, place)
    counts = labels.counts()
    rows = [
        [layer, *(str(counts[layer, group]) for group in labels.groups)]
        for layer in profile.layers
        if any(counts[layer, group] for group in labels.groups)
    ]
    totals = [str(sum(of == group for _, of in counts.elements())) for group in labels.groups]
    for line in columns([["layer", *labels.groups], *rows, ["all", *totals]]):
        report(line)
    report(agreement)


def _judge_all(
    todo: list[list[Neuron]],
    contexts: Mapping[Neuron, Sequence[str]],
    names: Sequence[str],
    choose_by: Reading,
    describer: Describer,
    journal: Journal,
    report: Callable[[str], None],
) -> None:
    """Describe this process's share of the batches, and keep each as it is finished."""
    state = process_state()
    own = todo[state.process_index :: state.num_processes]
    left = sum(map(len, own))
    started = time.perf_counter()
    bar = progress_bar(total=left, what="describing", unit="neuron", shown=state.is_main_process)
    with bar, quiet_transformers():
        for number, batch in enumerate(own):
            found = _judge([contexts[neuron] for neuron in batch], names, choose_by, describer)
            journal.add(dict(zip(batch, found, strict=True)))
            left -= len(batch)
            if number == 0 and left:
                each = (time.perf_counter() - started) / len(batch)
                report(f"about {_duration(each * left)} to go, by the first {len(batch)}: {each:.1f} s a neuron")
            bar.update(len(batch))


def _judge(
    contexts: Sequence[Sequence[str]], names: Sequence[str], choose_by: Reading, describer: Describer
) -> list[Judgement]:
    said = describer.answers([to_describe(shown) for shown in contexts])
    lines = [description_in(answer) for answer in said]
    asked = [to_choose(shown, line, names, choose_by) for shown, line in zip(contexts, lines, strict=True)]
    likelihoods = [[round(min(v, 0.0), 4) for v in row] for row in describer.likelihoods(asked, names).tolist()]
    return [Judgement(description=d, likelihoods=values) for d, values in zip(lines, likelihoods, strict=True)]


def _judged_before(place: Path, asked: str, names: Sequence[str]) -> dict[Neuron, Judgement]:
    """What labels that are to be replaced say, if the describer was asked the same way; damaged ones say nothing."""
    try:
        found = NeuronLabels.read(place)
    except UserError:
        return {}
    if found.made_from.get("asked") != asked:
        return {}
    return {
        (one.layer, one.neuron): Judgement(description=one.description, likelihoods=one.likelihoods)
        for one in found.labels
        if one.likelihoods is not None and len(one.likelihoods) == len(names)
    }


def _of_all_processes(judged: dict[Neuron, Judgement]) -> dict[Neuron, Judgement]:
    if process_state().num_processes == 1:
        return judged
    from accelerate.utils import gather_object

    return dict(gather_object(list(judged.items())))


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
