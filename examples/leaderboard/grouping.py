"""NeuronMerge for the leaderboard: the MLP neurons of a zoo's base, in groups by the task that drives them furthest.

The groups come from a profile of the base on samples of every task's training data, one domain per task: what
`mergekit-neuron profile` and `mergekit-neuron groups` make. Controls (`controls.py`) have other groups in their place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_methods.support.stages import Stages

if TYPE_CHECKING:
    from neuron_methods.methods.groups_file import NeuronGroups

Weights = dict[str, Tensor]

#: What is drawn for the profile, as `mergekit-neuron profile` draws it by default.
ABOUT = {"split": "train", "samples": 1000}
#: Neurons that fire on a smaller share of their domain's tokens are general; the default of `mergekit-neuron groups`.
MIN_FIRING = 0.001
#: What the base reads of a task, by the kind of the task. T5's decoder reads what it is to say: the answers.
READS = {"image-classification": ("image",), "text-to-text": ("input", "target"), "generation": ("input",)}


def measure(zoo: Path, place: Path, stamp: Mapping[str, Any]) -> Path:
    """Measure the profile of a zoo's base, once.

    Args:
        zoo: its directory.
        place: directory for the profile; kept as it is if it was made under the same stamp.
        stamp: what tells this zoo from another.

    Returns:
        The profile's file.
    """
    file = "base.safetensors"

    def build(path: Path) -> list[str]:
        from neuron_methods.evaluation import load_tasks
        from neuron_methods.profiling import Settings, measure_profile

        tasks = load_tasks(zoo / "tasks.yml")
        data = []
        for task in tasks:
            columns = ",".join(task.columns[role] for role in READS[task.kind])
            data.append(f"{task.name}={zoo / 'data' / task.name / ABOUT['split']}.parquet:{columns}")
        # Whatever the base is stored in: a processor computes several times slower in 16 bits.
        settings = Settings(samples=ABOUT["samples"], batch_size=50, dtype="float32")
        measure_profile(str(zoo / "base"), data, path / file, settings)
        return [task.name for task in tasks]

    Stages(place.parent / ".stages", "the leaderboard").run(place, {**stamp, "profile": ABOUT}, build)
    return place / file


def make_groups(profile: str, threshold: float, by: str = "activations") -> NeuronGroups:
    """Put every MLP neuron of a zoo's base into a group.

    Args:
        profile: file of the base's profile; its data sources are the tasks.
        threshold: of the classification by activations.
        by: ``activations``; ``random N``: the same groups, their neurons drawn anew within each layer with seed N;
            ``general``: one group for all; or a file of labels, as `mergekit-neuron groups --import` takes it.

    Raises:
        UserError: the file of labels cannot be read or is of another model.
    """
    from neuron_methods.neurons.profile_file import NeuronProfile
    from neuron_methods.profiling.grouping import classify, import_labels

    measured = NeuronProfile.load(profile)
    found = classify(measured, threshold, MIN_FIRING)
    kind, _, seed = by.partition(" ")
    if kind == "random":
        generator = torch.Generator().manual_seed(int(seed))
        drawn = {key: own[torch.randperm(len(own), generator=generator)] for key, own in found.labels.items()}
        return replace(found, labels=drawn)
    if by == "general":
        return replace(found, labels={key: torch.zeros_like(own) for key, own in found.labels.items()})
    if by == "activations":
        return found
    labelled = import_labels(measured, by)
    # An expert names its group even where no neuron has that label.
    return replace(labelled, groups=(*labelled.groups, *(task for task in found.groups if task not in labelled.groups)))


def merge_by_groups(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run `neuron_merge` with groups made for it, in memory.

    Args:
        base: θ₀, at least all that an expert changed.
        experts: by task; every task is a data source of the profile.
        settings: of the method, and how its groups are made: ``profile``, ``threshold`` and ``by``; see `make_groups`.
            ``digest``, of a file of labels, is for the row's key.
    """
    from mergekit.merge_methods import merge_state_dicts

    given = dict(settings)
    given.pop("digest", None)
    groups = make_groups(given.pop("profile"), given.pop("threshold"), given.pop("by", "activations"))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "groups.json"
        groups.write(path)
        return merge_state_dicts(
            {"the base": base, **experts},
            "neuron_merge",
            base="the base",
            parameters={"groups": str(path), "group": {task: task for task in experts}, **given},
        )
