"""A merge whose tensors stay in memory: planned, checked and verified as one that is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_methods.models.processes import check_room_of_all, process_state
from neuron_methods.models.states import watched
from neuron_methods.plugin.dealing import plan_reads
from neuron_methods.plugin.output import ModelOutput
from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.plugin.run import MergeRun
from neuron_methods.plugin.session import MergeSession
from neuron_methods.plugin.work import HeldWork
from neuron_methods.support.kept import Kept
from neuron_methods.support.runs import workplace


@dataclass(frozen=True)
class HeldModel:
    """A model that was merged.

    Attributes:
        place: directory of all that belongs to it but its weights, as long as it is there.
        tensors: its weights, by their names in files, in the dtypes that they would be written in.
    """

    place: Path
    tensors: dict[str, Tensor]


@contextmanager
def merged_in_memory(
    config_source: str,
    *,
    config_name: str = "the configuration",
    seed: int = 0,
    dtype: str = "auto",
    common: Kept | None = None,
    within: Path | None = None,
) -> Iterator[HeldModel]:
    """Run any mergekit configuration, and give the complete model that `merge_to_directory` would have written.

    Args:
        config_source: text of the YAML.
        config_name: file name for messages.
        seed: that methods go by which leave something to chance; of the same seed a merge is the same to the last bit.
        dtype: that the model will be loaded in, see `models.loading.load_weights`; it needs room beside the tensors.
        common: what this merge shares with others of the same models.
        within: where the directory of what is no weights is made, for as long as the block lasts.

    Raises:
        NoRoom: the tensors would not fit into memory, here or in another process; nothing was merged.
        UserError: what `merge_to_directory` refuses.
    """
    run, output, work = MergeRun(config_source, config_name), ModelOutput(), HeldWork()
    watch = watched(run.paths_read())

    def check(planner: Any) -> None:
        run.inspect(planner)
        output.plan(run, planner, work)
        _check_room(run.plan, dtype)
        run.plan.memory.check(config_name)
        plan_reads(run, planner, {name for names in work.groups for name in names}, session.share)

    session = MergeSession(check, quiet=True, traces=work.told, common=common, seed=seed)
    with workplace("mergekit-neuron-held", within) as place:
        with run.opened():
            output.begin(run, place)
            with closing(session):
                run.execute(place, session)
            output.finish(run, place, work)
            output.verify(run, place)
            watch.check()
        held, work.held = work.held, None
        yield HeldModel(place, held or {})


def _check_room(plan: MergePlan, dtype: str) -> None:
    """Make sure that what is merged fits, first beside the merge, then beside the model that is made of it.

    Raises:
        NoRoom: it does not, in this process or in another.
    """
    computing = getattr(torch, dtype, None)
    loaded = 0
    if computing is not None and process_state().device.type == "cpu":  # what is in the same dtype shares its memory
        for _, inputs, size in plan.tensors:
            entries = next((header.entries for header in inputs.values()), 0)
            loaded += entries * computing.itemsize if entries * computing.itemsize != size else 0
    check_room_of_all(plan.bytes_to_write + max(plan.memory.peak, loaded), "a merge in memory")
