"""A merge with what goes with it: card, report, and upload. What `mergekit-neuron merge` runs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from neuron_methods.plugin.merging import MergeWitness
from neuron_methods.plugin.run import CONFIG_NAME, MergeRun
from neuron_methods.sharing.card import (
    CardOptions,
    CardSources,
    make_card,
    minimal_card,
    read_evaluation,
    with_evaluation,
)
from neuron_methods.sharing.card_sections import with_section
from neuron_methods.sharing.hub import PushOptions
from neuron_methods.sharing.hub_copy import LOCAL_BASE, known_hub_ids
from neuron_methods.sharing.model_names import ModelNames, is_hub_id
from neuron_methods.sharing.report.collect import ROWS_IN_PASSING, Collector
from neuron_methods.sharing.report.pages import FOLDER, check_folder, require_matplotlib, write_report
from neuron_methods.sharing.report.runs import collector_for, document_of, report_from_files
from neuron_methods.sharing.report.weight_statistics import WeightStatistics
from neuron_methods.sharing.verification import verify_directory
from neuron_methods.support.documents import read_text
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import is_disk_full, write_text
from neuron_methods.support.runs import claimed
from neuron_methods.support.targets import marking
from neuron_methods.support.text import first_line
from neuron_methods.support.yaml_source import YamlSource

LOG = logging.getLogger(__name__)


def merge_witness(report: bool = False, evaluation: Path | None = None) -> MergeWitness:
    """Make the witness that writes card and report beside what a merge writes, and that no merge fails by.

    What they need of others' files is read before the first tensor is merged; what cannot be read, drawn or written is
    told in a note.

    Args:
        report: draw it, from what the merge sees of every tensor.
        evaluation: JSON of `mergekit-neuron evaluate` for the card.

    Raises:
        UserError: the evaluation cannot be read, or the report's drawing library is missing.
    """
    scores = read_evaluation(evaluation) if evaluation is not None else None
    collector: Collector | None = None
    sources = CardSources()
    notes: list[str] = []
    if report:
        require_matplotlib()

    def on_plan(run: MergeRun, planner: Any) -> None:
        nonlocal collector, sources
        if report:
            collector = collector_for(run, ROWS_IN_PASSING)
        if run.options.write_model_card:
            with _noted(notes, "licences and data sets are not on the card"):
                sources = CardSources.read(run.configuration, run.options.transformers_cache)

    def on_tensor(name: str, inputs: Mapping[Hashable, Tensor], merged: Tensor) -> Any:
        failed: list[str] = []
        with _noted(failed, f"no report was drawn, at tensor {name}"):
            found = collector.look(name, inputs, merged) if collector is not None else None
            return found.to_json() if found is not None else None
        return failed[0]

    def recall(name: str, seen: Any) -> None:
        nonlocal collector
        if isinstance(seen, str):
            notes.extend([seen] if collector is not None else [])
            collector = None
        elif collector is not None and seen is not None:
            collector.take(name, WeightStatistics.from_json(seen))

    def finish(run: MergeRun, staging: Path, name: str, state: Any) -> list[str]:
        section = None
        if collector is not None:
            with _noted(notes, "no report was drawn"):
                document = document_of(collector, run, ModelNames(run.configuration), state)
                section = write_report(document, staging, name)
            if section is None:
                shutil.rmtree(staging / FOLDER, ignore_errors=True)
        if not run.options.write_model_card:
            return notes
        text = minimal_card(name, (staging / "adapter_config.json").exists())
        with _noted(notes, "the card says no more than what this is"):
            card = make_card(
                run.configuration, run.recorded, name, staging, CardOptions(section, scores, None, sources)
            )
            text = card.text
            notes.extend(card.warnings)
        (staging / CONFIG_NAME).write_text(run.recorded, encoding="utf-8")
        (staging / "README.md").write_text(text, encoding="utf-8", errors="replace")
        return notes

    return MergeWitness(finish, on_plan, *((on_tensor, recall) if report else ()))


@contextmanager
def _noted(notes: list[str], what: str) -> Iterator[None]:
    """Let nothing that goes wrong in the block end the merge, but for a disk that is full."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise
        LOG.debug(what, exc_info=True)
        notes.append(f"{what}: {first_line(error)}")


def report_directory(
    place: Path,
    *,
    config: Path | None = None,
    rows: int | None = None,
    evaluation: Path | None = None,
    new_card: bool = False,
    progress: bool = True,
) -> Path:
    """Write the report of a merge that is done, put it into the card, and give the place of its HTML page.

    Args:
        place: what `mergekit-neuron merge` or another command of mergekit has written.
        config: the YAML, where it is not the one in the output.
        rows: neurons looked at per weight; None: all.
        evaluation: JSON of `mergekit-neuron evaluate` for the card.
        new_card: write the card anew instead of changing its sections.
        progress: show progress.

    Raises:
        UserError: output, YAML or models are not there or do not belong together, or matplotlib is missing.
    """
    require_matplotlib()
    scores = read_evaluation(evaluation) if evaluation is not None else None
    if not place.is_dir():
        raise UserError(f"{place}: no such directory")
    config = config or place / CONFIG_NAME
    try:
        source = read_text(config)
    except UserError as error:
        raise UserError(f"{error}; name the YAML that the merge was made with: --config FILE") from None
    check_folder(place)
    verify_directory(place)
    target = place.resolve()
    with claimed(target, place):
        _write_report(target, source, str(config), rows, scores, new_card, progress)
    return place / FOLDER / "report.html"


def _write_report(
    place: Path, source: str, config: str, rows: int | None, scores: Any, new_card: bool, progress: bool
) -> None:
    """Look at the models again, and write report and card."""
    run = MergeRun(source, config, None)
    known = known_hub_ids(place)
    names = ModelNames(run.configuration, known)
    document = report_from_files(place, run, names, limit=rows, progress=progress)
    name = place.name
    with marking(place):
        section = write_report(document, place, name)
        _write_card(run, source, place, CardOptions(section, scores, known), new_card)


def _write_card(run: MergeRun, source: str, place: Path, options: CardOptions, new_card: bool) -> None:
    card = place / "README.md"
    if new_card or not card.exists():
        text = make_card(run.configuration, source, place.name, place, options).text
    else:
        text = with_section(read_text(card), options.report_section)
        text = with_evaluation(text, options.evaluation, place.name) if options.evaluation else text
    write_text(card, text)


def check_base_of_route(config: Path, options: PushOptions) -> None:
    """Make sure, before a routed model is made, that the one to be uploaded will have a base that others find.

    Raises:
        UserError: its base is a local directory, and no id is given for it.
    """
    named = str(YamlSource.read(config, "the YAML of a routed model").content.get("base_model"))
    if options.base_model is None and (not is_hub_id(named) or (config.parent / named).exists()):
        raise UserError(LOCAL_BASE.format(config))
