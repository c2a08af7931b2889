"""What a merge is written as, step by step; first of all a model, verified against its plan."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mergekit.tokenizer.build
import torch
import transformers
from mergekit.architecture import WeightInfo
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.options import MergeOptions
from torch import Tensor

from neuron_methods.models.companions import (
    code_files,
    companions_of,
    is_of_tokenizer,
    makes_tokenizer,
    names_code,
    settle_code,
)
from neuron_methods.models.headers import headers_of
from neuron_methods.models.tokenizer_files import check_tokenizer
from neuron_methods.models.verification import correct_config, verify_model
from neuron_methods.plugin.layout import packed, write_shards
from neuron_methods.plugin.planning import carried
from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.plugin.seam import copy_tokenizer, planned_tasks, quiet_mergekit, replan
from neuron_methods.plugin.session import session_of
from neuron_methods.plugin.shards import PlannedShape
from neuron_methods.plugin.token_maps import tokenizer_place
from neuron_methods.plugin.tokenizer_sources import check_tokenizer_sources
from neuron_methods.plugin.work import Work
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import is_disk_full
from neuron_methods.support.text import first_line, format_bytes, listed

if TYPE_CHECKING:
    from neuron_methods.adapters.export import AdapterSummary
    from neuron_methods.plugin.run import MergeRun


class StoreTensor(Task[None], arbitrary_types_allowed=True):
    """Hand a tensor of the output to what is finished of it; mergekit's writer gets nothing."""

    name: str
    merge: Task
    dtype: str | None
    optional: bool
    work: Any

    def arguments(self) -> dict[str, Task]:
        """Ask for the tensor."""
        return {"tensor": self.merge}

    def priority(self) -> int:
        """Come as soon as it is there."""
        return 1000

    def group_label(self) -> str | None:
        """Stay with its inputs."""
        return self.merge.group_label()

    def execute(self, tensor: Tensor | None) -> None:
        """Hand it over in the dtype that it is stored in."""
        if tensor is None and not self.optional:
            raise RuntimeError(f"No value for required tensor {self.name}")
        stored = {}
        if tensor is not None:
            # mergekit 0.1.5's own table of dtypes ends at int64.
            dtype = getattr(torch, (self.dtype or "").removeprefix("torch."), None) or dtype_from_name(self.dtype)
            stored[self.name] = tensor.to("cpu", dtype or tensor.dtype).contiguous()
        self.work.take(self.name, stored)


class Output:
    """What `merging.merge_to_directory` writes; its steps are called in the order in which they stand here.

    Attributes:
        library: that loads the output, as cards name it.
        adapter: what an adapter keeps of the merge; None for a model.
    """

    library = "transformers"
    adapter: AdapterSummary | None = None

    def configure(self, run: MergeRun) -> None:
        """Change the configuration, or refuse it, before any model is opened."""

    def plan(self, run: MergeRun, planner: Any, work: Work) -> None:
        """Make the checked plan one of what will be written, in `run.plan`, in mergekit's planner and in `work`."""

    def begin(self, run: MergeRun, staging: Path) -> None:
        """Write what does not depend on the merge, and may fail, before it begins."""

    def made_from(self) -> dict[str, Any]:
        """Say what else but models and configuration the output depends on, by the options' names; for JSON."""
        return {}

    def finish(self, run: MergeRun, staging: Path, work: Work) -> None:
        """Write what mergekit has not written, from all that is finished."""

    def verify(self, run: MergeRun, staging: Path) -> None:
        """Make sure that the directory holds what was to be written.

        Raises:
            UserError: naming what is missing, wrong or damaged.
        """

    def headline(self, run: MergeRun) -> str:
        """Say in a few words what was written."""
        tensors = sum(1 for _, _, size in run.plan.tensors if size)
        return f"{tensors} tensors, {format_bytes(run.plan.bytes_to_read)} read"


class ModelOutput(Output):
    """A model like the base, in the files of transformers."""

    _tokenizer_notes: Sequence[str] = ()
    _held: Mapping[str, Tensor] | None = None

    def plan(self, run: MergeRun, planner: Any, work: Work) -> None:
        """Copy what the base stores and mergekit's definition of its architecture does not know."""
        headers = run.unknown_of_base()
        copied = carried(run.donor, headers)
        for weight, _ in copied:
            header = headers[weight.name]
            run.plan.tensors.append((weight, {run.donor: header}, header.bytes))
            run.plan.carried.append(weight.name)
        heads, session = [], session_of(planner.options)
        if run.heads is not None:
            dtype = planner.config.out_dtype or planner.config.dtype
            heads = run.heads.tasks(run.plan, dtype, session)
        tasks = sorted([*planned_tasks(planner), *copied, *heads], key=lambda planned: planned[1].group_label() or "")
        sizes = {weight.name: size for weight, _, size in run.plan.tensors}
        shapes = {w.name: next((h.shape for h in inputs.values()), ()) for w, inputs, _ in run.plan.tensors}
        work.shapes = {weight.name: PlannedShape(weight.name, shapes[weight.name]) for weight, _ in tasks}
        work.groups = packed(((w.name, sizes[w.name]) for w, _ in tasks), run.options.out_shard_size)
        stored = [
            StoreTensor(
                name=weight.name,
                merge=task,
                dtype=weight.force_dtype or planner.config.out_dtype,
                optional=weight.optional,
                work=work,
            )
            for weight, task in tasks
        ]
        replan(planner, [(optional(weight), task) for (weight, _), task in zip(tasks, stored, strict=True)])
        if tokenizer_place(run.donor) is None:
            others = run.configuration.referenced_models()
            if found := next((str(model) for model in others if tokenizer_place(model) is not None), None):
                run.plan.notes.append(f"{run.donor} has no tokenizer, so none is written; {found} has one to copy")
        if copied:
            names = listed(run.plan.carried)
            run.plan.notes.insert(
                0, f"copied from the base unchanged, as mergekit's definition does not know them: {names}"
            )

    def begin(self, run: MergeRun, staging: Path) -> None:
        """Copy the tokenizer and what else belongs to the model that gives the output its config.

        mergekit finds out only after the merge that a tokenizer cannot be copied.

        Raises:
            UserError: a tokenizer is there, or needed, but cannot be loaded.
        """
        self.place = place = Path(run.donor.local_path(cache_dir=run.options.transformers_cache, ignore_lora=True))
        files = companions_of(place, str(run.donor))
        has_tokenizer = any(map(makes_tokenizer, files))
        if not has_tokenizer and (run.builds_tokenizer or run.configuration.chat_template):
            key = "tokenizer" if run.builds_tokenizer else "chat_template"
            raise UserError(f"{run.name}: {key}: {run.donor} has no tokenizer; put its files (tokenizer.json) there")
        if run.builds_tokenizer:
            check_tokenizer_sources(run.configuration, run.options, run.name)
        try:
            if has_tokenizer and run.options.copy_tokenizer and not run.builds_tokenizer:
                self._tokenizer_notes = check_tokenizer(place, trust_remote_code=run.options.trust_remote_code)
            with quiet_mergekit():
                if run.builds_tokenizer:  # mergekit will; here it only has to be there
                    mergekit.tokenizer.build.get_stripped_tokenizer(run.donor.model, run.options.trust_remote_code)
                elif has_tokenizer and run.options.copy_tokenizer:
                    if not run.options.trust_remote_code and names_code(place / "tokenizer_config.json"):
                        transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
                    copy_tokenizer(run.configuration, str(staging), run.options)
        except Exception as error:
            if is_disk_full(error):
                raise
            if "trust_remote_code=True" in str(error):
                what = "its tokenizer is custom code, which is run only with --trust-remote-code"
                raise UserError(f"model {run.donor}: {what}") from None
            without = "" if run.builds_tokenizer else "; --no-copy-tokenizer merges without"
            raise UserError(f"model {run.donor}: tokenizer: {first_line(error)}{without}") from error
        if run.builds_tokenizer or not run.options.copy_tokenizer:
            files = [name for name in files if not is_of_tokenizer(name)]
        elif run.configuration.chat_template:
            files = [name for name in files if "chat_template" not in name]
        if run.options.trust_remote_code:
            files += code_files(place, str(run.donor))
        for name in files:
            if not (staging / name).exists():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(place / name, staging / name)

    def finish(self, run: MergeRun, staging: Path, work: Work) -> None:
        """Write the weights, unless they stay in memory, let config.json say what they are, and write kept heads.

        Raises:
            UserError: a head that is kept is not sound.
        """
        self._held = work.held
        if work.held is None:
            write_shards(work, staging, safe=run.options.safe_serialization)
        if run.heads is not None:
            run.heads.write(staging)
        run.plan.notes += self._tokenizer_notes
        run.plan.notes += settle_code(staging, self.place, code=run.options.trust_remote_code)
        if run.options.safe_serialization:
            run.plan.notes += correct_config(staging, trust_remote_code=run.options.trust_remote_code, held=self._held)

    def verify(self, run: MergeRun, staging: Path) -> None:
        """Compare what is stored with the plan, and with what the model's class would load."""
        verify_output(staging, run.plan, aligned=run.builds_tokenizer, options=run.options, held=self._held)
        try:
            found = verify_model(
                staging,
                trust_remote_code=run.options.trust_remote_code,
                like=run.headers_of_donor() if run.heads is None else None,
                stem="model.safetensors" if run.options.safe_serialization else "pytorch_model.bin",
                held=self._held,
            )
        except UserError as error:
            raise UserError(f"verification failed: {str(error).removeprefix(f'{staging}: ')}") from None
        run.plan.notes += found.notes


def optional(weight: WeightInfo) -> WeightInfo:
    """Let mergekit's writer do without a tensor."""
    return weight.model_copy(update={"optional": True})


def verify_output(
    path: Path,
    plan: MergePlan,
    *,
    aligned: bool,
    options: MergeOptions,
    held: Mapping[str, Tensor] | None = None,
) -> None:
    """Make sure that a written model is whole: every planned tensor there, with the base's shape.

    That every value is finite was checked on each tensor before it was written.

    Args:
        path: the directory.
        plan: what was to be written; it holds every tensor of the base.
        aligned: whether vocabularies were aligned, so that their axis may have another length than the base's.
        options: mergekit's.
        held: the tensors, where they are in memory.

    Raises:
        UserError: naming the tensor that is missing or wrong, or the file that is damaged.
    """
    try:
        read_object(path / "config.json")
    except UserError:
        raise UserError("verification failed: config.json was not written completely") from None
    try:
        written = headers_of(path, "model.safetensors" if options.safe_serialization else "pytorch_model.bin", held)
    except UserError as error:
        raise UserError(f"verification failed: {error}") from None
    vocabulary: int | None = None
    for weight, inputs, size in plan.tensors:
        if not size:
            continue
        if weight.name not in written:
            raise UserError(f"verification failed: tensor {weight.name} is missing from the output")
        shape = list(written[weight.name].shape)
        expected = list((inputs.get(plan.base) or next(iter(inputs.values()))).shape)
        axis = weight.vocabulary_axis
        if axis is not None and (aligned or options.unsafe_truncate_embeddings) and axis < len(shape):
            vocabulary = shape[axis] if vocabulary is None else vocabulary
            expected[axis] = vocabulary
        if shape != expected:
            raise UserError(f"verification failed: {weight.name} has shape {shape}, expected {expected}")
