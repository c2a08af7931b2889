"""From a profile of the base, or from labels made elsewhere, to the functional group of every MLP neuron.

Gu et al., Findings of ACL 2025, 2025.findings-acl.471, step 2, without a language model that reads the descriptions: a
neuron belongs to the domain with the largest share of its top activations, corrected for how many tokens each domain
contributed, if that share passes a threshold; else it is general. The profile's data sources are the domains.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from neuron_methods.kernels.groups import domain_shares, label_neurons
from neuron_methods.methods.groups_file import FORMAT, GENERAL, NeuronGroups, groups_from_labels
from neuron_methods.neurons.profile_file import NeuronProfile, exemplars_path
from neuron_methods.support.documents import parse_json, read_lines, read_text
from neuron_methods.support.errors import UserError
from neuron_methods.support.targets import check_file, json_of
from neuron_methods.support.text import columns, shortened

# One label: (layer, neuron, group), and where it was read, for messages.
Label = tuple[str, Any, str, str]


def check_place(output: Path, force: bool, profile: Path, labels: Path | None) -> Path:
    """Give the absolute path of the groups to write; raises UserError where they may not be written, see `targets`."""
    inputs = [profile, exemplars_path(profile), *([labels] if labels else [])]
    return check_file(output, f"-o {output}", json_of(FORMAT), force, inputs)


def classify(profile: NeuronProfile, threshold: float, min_firing: float) -> NeuronGroups:
    """Classify every neuron by the domain that drives it furthest.

    Args:
        profile: of the base, with exemplars and one data source per domain; one called `general` is no domain, and
            what it drives furthest is general.
        threshold: smallest share of its top activations that makes a neuron a domain's.
        min_firing: a neuron that fires on a smaller share of its domain's tokens is general.

    Raises:
        UserError: fewer than two domains, or the profile was made without exemplars.
    """
    domains = [source for source in profile.sources if source != GENERAL]
    sources = list(profile.sources)
    if len(sources) < 2:
        raise UserError(
            f"{profile.path}: one data source ({', '.join(sources)}) is nothing to compare with; measure the base "
            "on one source per domain: --data math=... --data code=..."
        )
    labels = {}
    for layer in profile.layers:
        top = [profile.top_activations(source, layer) for source in sources]
        if not all(values.shape[1] for values in top):
            raise UserError(f"{profile.path}: made with --top 0, without the top activations that tell domains apart")
        shares = domain_shares(top, [profile.tokens(source, layer) for source in sources])
        firing = torch.stack([profile.statistic("firing_rate", source, layer) for source in sources], dim=1)
        found = label_neurons(shares, firing, threshold, min_firing)
        labels[layer] = [sources[i] if i >= 0 else GENERAL for i in found.tolist()]
    measured = {"profile": profile.info.model, "weights": profile.info.weights}
    made_from = {**measured, "threshold": threshold, "min_firing": min_firing, "domains": domains}
    return groups_from_labels(profile.info.model, profile.info.model_type, labels, made_from, domains)


def import_labels(profile: NeuronProfile, path: str | os.PathLike[str]) -> NeuronGroups:
    """Take labels made elsewhere; a neuron without one is general.

    Args:
        profile: of the base; says which neurons there are.
        path: JSON ({layer: [group per neuron]}, {layer: {neuron: group}} or a list of records), JSON lines or CSV of
            records with `layer`, `neuron` and `group`. A layer is given by its key or, where that is clear, its number.

    Raises:
        UserError: the file cannot be read, or a label is of no neuron of the model.
    """
    labels = {layer: [GENERAL] * count for layer, count in profile.layers.items()}
    seen: set[tuple[str, int]] = set()
    for name, neuron, group, where in _read_labels(Path(path)):
        layer = profile.find_layer(name, where)
        whole = type(neuron) is int or (isinstance(neuron, str) and re.fullmatch("[0-9]{1,15}", neuron.strip()))
        index = int(neuron) if whole else -1
        if not 0 <= index < profile.layers[layer]:
            raise UserError(f"{where}: {layer} has neurons 0 to {profile.layers[layer] - 1}, not {shortened(neuron)}")
        if (layer, index) in seen:
            raise UserError(f"{where}: {layer}, neuron {index} has a label already; give each neuron one")
        seen.add((layer, index))
        labels[layer][index] = group
    if not seen:
        raise UserError(f"{path}: no labels in it; expected records with layer, neuron and group")
    made_from = {"labels": Path(path).name, "labelled": len(seen), "weights": profile.info.weights}
    return groups_from_labels(profile.info.model, profile.info.model_type, labels, made_from)


def describe_groups(groups: NeuronGroups) -> Iterator[str]:
    """List how many neurons each group has, a line per layer; and the sums."""
    counts = {**groups.counts(), "all": groups.totals()}
    rows = [[layer, *(str(of_group[name]) for name in groups.groups)] for layer, of_group in counts.items()]
    yield from columns([["layer", *groups.groups], *rows])


def _read_labels(path: Path) -> Iterator[Label]:
    for where, record in _read_records(path):
        missing = [key for key in ("layer", "neuron", "group") if not isinstance(record, Mapping) or key not in record]
        if missing:
            raise UserError(f"{where}: no {missing[0]!r}; a label has layer, neuron and group")
        group = record["group"]
        if not isinstance(group, str) or not group.strip() or not group.strip().isprintable():
            raise UserError(f"{where}: a group is a name, found {shortened(group)}")
        if not isinstance(record["layer"], (str, int)):
            raise UserError(f"{where}: a layer is a key or a number, found {shortened(record['layer'])}")
        yield record["layer"], record["neuron"], group.strip(), where


def _read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Where a record stands, and what it is: of a whole layer's labels, each as a record of its own."""
    ending, again = path.suffix.lower(), "mend the file"
    try:
        if ending == ".csv":
            reader = csv.DictReader(read_text(path).splitlines(), strict=True)
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
        elif ending == ".jsonl":
            yield from read_lines(path, again=again)
        elif ending == ".json":
            content = parse_json(read_text(path), str(path), again)
            if isinstance(content, list):
                yield from ((f"{path}, record {number}", record) for number, record in enumerate(content))
                return
            if not isinstance(content, dict):
                raise UserError(
                    f"{path}: expected {{layer: [group, …]}} or a list of records with layer, neuron and group"
                )
            for layer, values in content.items():
                where = f"{path}, {layer}"
                if not isinstance(values, (list, dict)):
                    raise UserError(f"{where}: expected one group per neuron, found {type(values).__name__}")
                for neuron, group in values.items() if isinstance(values, dict) else enumerate(values):
                    yield where, {"layer": layer, "neuron": neuron, "group": group}
        else:
            raise UserError(f"{path}: labels are read from .json, .jsonl and .csv files")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; {again}") from None
