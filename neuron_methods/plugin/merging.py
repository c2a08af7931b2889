"""A whole merge, from YAML to a verified directory: mergekit's `run_merge` with nothing left to chance around it.

Everything that can be refused is refused before the first tensor; the output is complete or absent. The tokenizer is
copied first, as mergekit finds out only after the merge that it cannot be; and what mergekit leaves behind is copied,
too: an image model's preprocessor_config.json, `spiece.model`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mergekit.card
import mergekit.merge
import mergekit.tokenizer.build
from mergekit.architecture import WeightInfo
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from torch import Tensor

from neuron_methods.methods.contract import PreparedMerge
from neuron_methods.methods.neuro_merging import PreparedNeuroMerging
from neuron_methods.methods.trim_profile import TrimProfile
from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.plugin.inputs import opened_models
from neuron_methods.plugin.mergekit_faults import any_dtype_name, quiet_mergekit
from neuron_methods.plugin.output import verify_output
from neuron_methods.plugin.preflight import HeaderCache, MergePlan, check_space, inspect_plan
from neuron_methods.plugin.registration import models_in_order, patch_planner, register
from neuron_methods.plugin.session import MergeSession, merge_session
from neuron_methods.plugin.structure import check_structure, unknown_tensors
from neuron_methods.plugin.tokenizer_sources import check_tokenizer_models, check_tokenizer_sources
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import (
    check_target,
    file_in_place_after,
    give_ordinary_permissions,
    is_disk_full,
    move_into_place,
    staging_directory,
)
from neuron_methods.support.text import first_line, format_bytes, listed

# The YAML of a merge, beside its output.
CONFIG_NAME = "mergekit_config.yml"
# Files beside the weights that a model may need, which mergekit leaves behind.
_COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "generation_config.json",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


@dataclass
class MergeSummary:
    """What a merge did.

    Attributes:
        out_path: where the output is.
        method: the method's name.
        seconds: time from start to the verified output.
        tensors: number of tensors written.
        bytes_read: bytes of tensors read, over all passes.
        bytes_written: bytes of tensors written.
        profile: thresholds, σ and energies, for `neuro_merging`.
        notes: what the user should know.
    """

    out_path: str
    method: str
    seconds: float
    tensors: int
    bytes_read: int
    bytes_written: int
    profile: TrimProfile | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.tensors} tensors, {format_bytes(self.bytes_read)} read, "
            f"{format_bytes(self.bytes_written)} written, {self.seconds:.1f} s",
        ]
        if self.profile is not None:
            for expert in self.profile.experts.values():
                threshold = "per tensor" if expert.threshold is None else f"{expert.threshold:.4g}"
                lines.append(f"  {expert.model}: trim threshold {threshold}, sigma {expert.sigma:.4f}")
            if self.profile.sigma is not None:
                scale = self.profile.automatic_lambda("mean")
                lines.append(f"  sigma {self.profile.sigma:.4f}, automatic lambda_orthogonal {scale:.4f}")
            energy = self.profile.parallel_energy + self.profile.orthogonal_energy
            if energy > 0:
                share = 100 * self.profile.parallel_energy / energy
                lines.append(f"  update energy: {share:.2f} % parallel, {100 - share:.2f} % orthogonal to the neurons")
        lines += [f"  {note}" for note in self.notes]
        lines.append(f"  complete and verified: {self.out_path}")
        return "\n".join(lines)


@dataclass
class Companion:
    """What accompanies a merge: looks at every tensor that is merged, and adds its own to the output.

    Attributes:
        on_plan: called with the run and mergekit's planner once the plan stands, before any tensor is merged.
        on_tensor: called with (name, {model: input}, merged tensor) for every tensor that is merged and not copied.
        finish: called with the run, the written and verified directory before it is moved into place, its name, and
            the merge by a method of ours, if it is one; writes README.md and what else goes beside the weights, and
            returns notes.
    """

    finish: Callable[[MergeRun, Path, str, Any], list[str]]
    on_plan: Callable[[MergeRun, Any], None] | None = None
    on_tensor: Callable[[str, Mapping[Hashable, Tensor], Tensor], None] | None = None


class _PlanOnly(Exception):
    """Ends a dry run once the plan is known."""


def merge_to_directory(
    config_source: str,
    out_path: str | os.PathLike[str],
    *,
    options: MergeOptions | None = None,
    force: bool = False,
    progress: bool = True,
    allow_nonfinite: bool = False,
    profile_out: str | None = None,
    config_name: str = "the configuration",
    companion: Companion | None = None,
) -> MergeSummary:
    """Run any mergekit configuration and leave a complete, verified model directory, or nothing.

    Args:
        config_source: text of the YAML.
        out_path: directory to create.
        options: mergekit's options.
        force: replace `out_path` if it exists, once the new output is verified.
        progress: show progress bars.
        allow_nonfinite: go on where an input holds NaN or Inf.
        profile_out: JSON file for thresholds and σ (`neuro_merging`).
        config_name: file name for messages.
        companion: writes the card, and more; without one mergekit's own card is written.

    Returns:
        What was done, printable.

    Raises:
        UserError: anything the user can put right; `out_path` is as it was before.
    """
    started = time.perf_counter()
    run = MergeRun(config_source, config_name, options)
    target = check_target(out_path, force, run.paths_read())
    profile_place = _profile_place(profile_out, target)

    def look(planner: Any) -> None:
        run.inspect(planner)
        if profile_place is not None:
            _check_profile_wanted(run.plan, session.prepared)
        check_space(run.plan, str(target.parent))
        if companion is not None and companion.on_plan is not None:
            companion.on_plan(run, planner)

    session = MergeSession(
        on_plan=look,
        on_tensor=companion.on_tensor if companion is not None else None,
        allow_nonfinite=allow_nonfinite,
        quiet=not progress,
    )
    with run.opened(), staging_directory(target) as staging:
        try:
            run.copy_companions(staging)
            run.execute(staging, session)
            verify_output(staging, run.plan, aligned=run.builds_tokenizer, options=run.options)
            if companion is None:
                run.write_card(staging, target.name)
            else:
                run.plan.notes += companion.finish(run, staging, target.name, session.prepared)
            profile = session.prepared.profile if isinstance(session.prepared, PreparedNeuroMerging) else None
            with ExitStack() as later:
                if profile_place is not None and profile is not None and target in profile_place.parents:
                    within = staging / profile_place.relative_to(target)
                    within.parent.mkdir(parents=True, exist_ok=True)
                    within.write_text(profile.to_json(), encoding="utf-8")
                elif profile_place is not None and profile is not None:
                    later.enter_context(file_in_place_after(profile_place)).write_text(
                        profile.to_json(), encoding="utf-8"
                    )
                give_ordinary_permissions(staging)
                move_into_place(staging, target, force)
        except Exception as error:
            if is_disk_full(error):
                need = format_bytes(run.plan.bytes_to_write)
                raise UserError(f"{out_path}: no space left on the disk, or for a file ({need} to write)") from error
            raise
    found = session.prepared.findings() if session.prepared is not None else []
    notes = [*found, *run.plan.notes]
    if session.nonfinite:
        notes.append(f"NaN or Inf in the output, as --allow-nonfinite has it: {listed(session.nonfinite)}")
    return MergeSummary(
        out_path=str(out_path),
        method=run.configuration.merge_method,
        seconds=time.perf_counter() - started,
        tensors=sum(1 for _, _, size in run.plan.tensors if size),
        bytes_read=run.plan.bytes_to_read,
        bytes_written=run.plan.bytes_to_write,
        profile=profile,
        notes=notes,
    )


def plan_merge(
    config_source: str, *, options: MergeOptions | None = None, config_name: str = "the configuration"
) -> MergePlan:
    """The plan of a merge, with every check that needs no tensor data; writes nothing.

    Raises:
        UserError: what the merge itself would refuse before it starts.
    """
    run = MergeRun(config_source, config_name, options)
    plan_only(run, run.inspect)
    return run.plan


def plan_only(run: MergeRun, look: Callable[[Any], None], *, quiet: bool = True) -> None:
    """Let mergekit plan a run and show `look` its planner, the models held open; nothing is merged or written.

    Raises:
        UserError: what the merge itself would refuse before it starts, and what `look` refuses.
    """

    def end_there(planner: Any) -> None:
        look(planner)
        raise _PlanOnly

    # mergekit's planner writes nothing; its writer makes the directory when the first task runs.
    with run.opened(), suppress(_PlanOnly):
        run.execute(Path(os.devnull), MergeSession(on_plan=end_there, quiet=quiet))


class MergeRun:
    """One run of mergekit on one configuration, step by step."""

    def __init__(self, source: str, name: str, options: MergeOptions | None) -> None:
        register()
        import mergekit.plan  # noqa: F401 - the patch applies to the loaded module

        patch_planner()
        self.source, self.name = source, name
        self.configuration = read_configuration(source, name)
        check_tokenizer_models(self.configuration, name)
        self.options = options or MergeOptions()
        self.builds_tokenizer = bool(self.configuration.tokenizer or self.configuration.tokenizer_source)
        self.plan = MergePlan(self.configuration.merge_method, None, self.options.out_shard_size)

    def paths_read(self) -> list[str]:
        """Files and directories here that the merge reads."""
        models = models_in_order(self.configuration)
        paths = [self.name, *(part.path for m in models for part in (m.model, m.lora) if part is not None)]
        return [path for path in paths if os.path.exists(path)]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the models open and know how they fit each other."""
        with opened_models(self.configuration, self.options):
            self.architecture = check_structure(self.configuration, self.options, self.name)
            yield

    def inspect(self, planner: Any) -> None:
        """Check the plan against the headers, and plan copies of what mergekit's definition leaves out."""
        self.plan = inspect_plan(planner)
        base = self.configuration.base_model or self.configuration.referenced_models()[0]
        unknown = unknown_tensors(self.configuration, self.architecture, self.options)
        headers = HeaderCache()
        for name in unknown.of_base:
            header = headers.stored(LoaderCache().get(base), name)
            # As it is stored, whatever dtype the merge is written in.
            weight = WeightInfo(name=name, force_dtype=str(header.dtype).removeprefix("torch."))
            planner._tensors.append((weight, LoadTensor(model=base, tensor=name)))
            self.plan.tensors.append((weight, {base: header}, header.bytes))
            self.plan.carried.append(name)
        if unknown.of_base:
            self.plan.notes.append(
                "copied from the base unchanged, as mergekit's definition does not know them: "
                f"{listed(unknown.of_base)}"
            )
        for model, names in unknown.of_experts.items():
            self.plan.notes.append(f"left out, as only {model} stores them and no method merges them: {listed(names)}")

    def execute(self, staging: Path, session: MergeSession) -> None:
        """Let mergekit plan and merge into `staging`."""
        update = {"quiet": True, "write_model_card": False, "copy_tokenizer": False}
        # A chat template goes with a tokenizer: the one mergekit builds, or the one `copy_companions` has copied.
        template = self.configuration.chat_template if self.builds_tokenizer else None
        configuration = self.configuration.model_copy(deep=True, update={"chat_template": template})
        try:
            with merge_session(session), quiet_mergekit(), any_dtype_name():
                mergekit.merge.run_merge(configuration, str(staging), self.options.model_copy(update=update))
        except (RuntimeError, ValueError) as error:
            if session.planned_tensors:
                raise
            # Up to here mergekit has read the YAML and the models' configs, nothing else.
            raise UserError(f"{self.name}: {first_line(error)}") from error

    def copy_companions(self, staging: Path) -> None:
        """Copy the tokenizer and what else belongs to the model that gives the output its config.

        Raises:
            UserError: a tokenizer is there, or needed, but cannot be loaded.
        """
        donor = self.configuration.base_model or self.configuration.referenced_models()[0]
        place = Path(donor.local_path(cache_dir=self.options.transformers_cache, ignore_lora=True))
        has_tokenizer = any((place / name).exists() for name in _TOKENIZER_FILES)
        if not has_tokenizer and (self.builds_tokenizer or self.configuration.chat_template):
            key = "tokenizer" if self.builds_tokenizer else "chat_template"
            raise UserError(f"{self.name}: {key}: {donor} has no tokenizer; put its files (tokenizer.json) there")
        if self.builds_tokenizer:
            check_tokenizer_sources(self.configuration, self.options, self.name)
        try:
            with quiet_mergekit():
                if self.builds_tokenizer:  # mergekit will; here it only has to be there
                    mergekit.tokenizer.build.get_stripped_tokenizer(donor.model, self.options.trust_remote_code)
                elif has_tokenizer and self.options.copy_tokenizer:
                    mergekit.merge._copy_tokenizer(self.configuration, str(staging), self.options)
        except Exception as error:
            if is_disk_full(error):
                raise
            without = "" if self.builds_tokenizer else "; --no-copy-tokenizer merges without"
            raise UserError(f"model {donor}: tokenizer: {first_line(error)}{without}") from error
        for companion in _COMPANIONS:
            if (place / companion).is_file() and not (staging / companion).exists():
                shutil.copy(place / companion, staging / companion)

    def write_card(self, staging: Path, name: str) -> None:
        """Write README.md and mergekit_config.yml, unless the options say not to."""
        if not self.options.write_model_card:
            return
        card = mergekit.card.generate_card(config=self.configuration, config_yaml=self.source.strip(), name=name)
        (staging / "README.md").write_text(card, encoding="utf-8")
        (staging / CONFIG_NAME).write_text(self.source, encoding="utf-8")


def _profile_place(profile_out: str | None, target: Path) -> Path | None:
    """Where `--profile-out` is to be written; within the output, too."""
    if profile_out is None:
        return None
    place = Path(os.path.realpath(profile_out))
    if place.is_dir() or place == target:
        raise UserError(f"--profile-out {profile_out}: a directory; name a JSON file")
    if target not in place.parents and not (place.parent.is_dir() and os.access(place.parent, os.W_OK)):
        raise UserError(f"--profile-out {profile_out}: its directory is missing or cannot be written to")
    return place


def _check_profile_wanted(plan: MergePlan, prepared: PreparedMerge | None) -> None:
    if prepared is None:
        raise UserError(f"--profile-out: {plan.method} measures no trim profile; neuro_merging does")
    if not plan.measures and not any(shared.get("profile") for shared, _ in plan.parameters.values()):
        raise UserError(
            "--profile-out: this merge measures nothing (trim: differing, or trim: tensor with a number for "
            "lambda_orthogonal); leave --profile-out away"
        )
