"""From a profile of the base, or from labels made elsewhere, to the functional group of every MLP neuron.

Step 2 of NeuronMerge, 2025.findings-acl.471, in a form of ours that needs no language model to read descriptions: a
neuron belongs to the domain with the largest share of its top activations, corrected for how many tokens each domain
contributed, if that share passes a threshold; else it is general. The profile's data sources are the domains.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from neuron_methods.kernels.groups import domain_shares, label_neurons
from neuron_methods.methods.groups_file import FORMAT, GENERAL, NeuronGroups, groups_from_labels
from neuron_methods.neurons.profile_file import NeuronProfile, exemplars_path
from neuron_methods.profiling.labels_file import NeuronLabels, read_labels
from neuron_methods.support.errors import UserError
from neuron_methods.support.targets import check_file, json_of
from neuron_methods.support.text import columns


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
        path: of `mergekit-neuron describe`, or another form that `labels_file.read_labels` reads.

    Raises:
        UserError: as `labels_file.read_labels`.
    """
    return groups_of_labels(profile, read_labels(profile, path))


def groups_of_labels(profile: NeuronProfile, found: NeuronLabels, min_confidence: float = 0.0) -> NeuronGroups:
    """Make groups of labels; a neuron without one is general.

    Args:
        profile: of the base; says which neurons there are.
        found: the labels.
        min_confidence: a label of lower confidence makes its neuron general; one that tells no confidence counts.
    """
    labels = {layer: [GENERAL] * count for layer, count in profile.layers.items()}
    for label in found.labels:
        if label.confidence is None or label.confidence >= min_confidence:
            labels[label.layer][label.neuron] = label.group
    made_from = {**found.made_from, "labelled": len(found.labels), "weights": profile.info.weights}
    if min_confidence:
        made_from["min_confidence"] = min_confidence
    return groups_from_labels(profile.info.model, profile.info.model_type, labels, made_from, found.groups)


def describe_groups(groups: NeuronGroups) -> Iterator[str]:
    """List how many neurons each group has, a line per layer; and the sums."""
    counts = {**groups.counts(), "all": groups.totals()}
    rows = [[layer, *(str(of_group[name]) for name in groups.groups)] for layer, of_group in counts.items()]
    yield from columns([["layer", *groups.groups], *rows])
