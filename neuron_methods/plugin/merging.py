"""A whole merge, from YAML to a verified directory: mergekit's `run_merge` with nothing left to chance around it.

The output is written beside its place, checked, and moved into place; a run that fails or is interrupted leaves no
output. What is worked around here, for mergekit 0.1.5:

- its model card asks the Hub about every model path of the form `a/b`, even where it exists locally, and without a
  network the run ends in a traceback after the weights are written: the card is made afterwards, by our rules;
- it copies the tokenizer but not what an image model needs (preprocessor_config.json), nor `spiece.model`, and logs a
  traceback where a model has no tokenizer at all;
- its loaders stay open in a table of the class for the life of the process: they are closed after the merge.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mergekit.card
import mergekit.merge
import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions

from neuron_methods.errors import UserError
from neuron_methods.methods.contract import MergeContext
from neuron_methods.methods.trim_profile import TrimProfile
from neuron_methods.plugin import configuration as configurations
from neuron_methods.plugin.preflight import (
    HeaderCache,
    MergePlan,
    check_space,
    format_bytes,
    inspect_plan,
    read_index,
)
from neuron_methods.plugin.registration import patch_planner, register
from neuron_methods.plugin.session import MergeSession, merge_session

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
) -> MergeSummary:
    """Run any mergekit configuration and leave a complete, verified model directory, or nothing.

    Args:
        config_source: text of the YAML.
        out_path: directory to create.
        options: mergekit's options.
        force: replace `out_path` if it exists.
        progress: show progress bars.
        allow_nonfinite: go on where an input holds NaN or Inf.
        profile_out: JSON file for thresholds and σ (`neuro_merging`).
        config_name: file name for messages.

    Returns:
        What was done, printable.

    Raises:
        UserError: anything the user can put right; `out_path` is as it was before.
    """
    started = time.perf_counter()
    target = Path(out_path)
    _check_target(target, force)
    options, configuration = _prepare(config_source, config_name, options, progress)
    plan: MergePlan | None = None

    def look(planner: Any) -> None:
        nonlocal plan
        plan = inspect_plan(planner)
        check_space(plan, str(target.parent))
        _carry_leftovers(planner, plan)

    session = MergeSession(on_plan=look, allow_nonfinite=allow_nonfinite, quiet=not progress)
    with _staging(target) as staging:
        _run(configuration, config_source, str(staging), options, session)
        assert plan is not None
        verify_output(str(staging), plan, aligned=configuration.tokenizer is not None, options=options)
        _write_card(configuration, config_source, staging, target.name, options)
        profile = _profile(session.context)
        if profile_out is not None:
            _write_profile(profile_out, profile, configuration.merge_method)
        _move_into_place(staging, target, force)
    return MergeSummary(
        out_path=str(target),
        method=configuration.merge_method,
        seconds=time.perf_counter() - started,
        tensors=sum(1 for _, _, size in plan.tensors if size),
        bytes_read=plan.bytes_to_read,
        bytes_written=plan.bytes_to_write,
        profile=profile,
        notes=plan.notes,
    )


def plan_merge(
    config_source: str, *, options: MergeOptions | None = None, config_name: str = "the configuration"
) -> MergePlan:
    """The plan of a merge, with every check that needs no tensor data; writes nothing.

    Raises:
        UserError: what the merge itself would refuse before it starts.
    """
    options, configuration = _prepare(config_source, config_name, options, progress=False)
    plan: MergePlan | None = None

    def look(planner: Any) -> None:
        nonlocal plan
        plan = inspect_plan(planner)
        _carry_leftovers(planner, plan)
        raise _PlanOnly

    # mergekit's planner writes nothing; its writer makes the directory when the first task runs.
    with suppress(_PlanOnly):
        _run(configuration, config_source, os.devnull, options, MergeSession(on_plan=look, quiet=True))
    assert plan is not None
    return plan


def _check_target(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise UserError(f"{target}: exists already; choose another name, or --force to replace it")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: exists and is not a directory; choose another name")
    if target.resolve() == Path.cwd() or target.resolve() in Path.cwd().parents:
        raise UserError(f"{target}: is or holds the current directory; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)


def _prepare(
    source: str, name: str, options: MergeOptions | None, progress: bool
) -> tuple[MergeOptions, MergeConfiguration]:
    register()
    import mergekit.plan  # noqa: F401 - the patch applies to the loaded module

    patch_planner()
    configuration = configurations.read_configuration(source, name)
    options = (options or MergeOptions()).model_copy(update={"quiet": True, "write_model_card": False})
    configurations.check_models(configuration, options.trust_remote_code)
    if not _has_tokenizer(configuration, options):
        options = options.model_copy(update={"copy_tokenizer": False})
    return options, configuration


def _run(
    configuration: MergeConfiguration, source: str, out_path: str, options: MergeOptions, session: MergeSession
) -> None:
    LoaderCache.loaders.clear()
    try:
        with merge_session(session), _model_card_without_network():
            mergekit.merge.run_merge(configuration, out_path, options=options, config_source=source)
    except RuntimeError as error:
        if "Must specify --allow-crimes" in str(error):
            raise UserError(
                "the models are of different architectures; merge models of one architecture, or --allow-crimes"
            ) from None
        if "Unable to find model files" in str(error):
            raise UserError(f"{error}: no model.safetensors or pytorch_model.bin, whole or with an index") from None
        raise
    finally:
        LoaderCache.loaders.clear()


@contextmanager
def _model_card_without_network() -> Iterator[None]:
    """Replace mergekit 0.1.5's `card.is_hf`, which asks the Hub about paths that exist locally."""

    def is_hub_id(path: str) -> bool:
        return not os.path.exists(path) and not configurations.looks_local(path)

    original = mergekit.card.is_hf
    mergekit.card.is_hf = is_hub_id
    try:
        yield
    finally:
        mergekit.card.is_hf = original


def _carry_leftovers(planner: Any, plan: MergePlan) -> None:
    """Plan copies of what the base stores and mergekit's definition of its architecture does not know.

    Raises:
        UserError: an expert holds other values there, which no method would merge.
    """
    base = planner.config.base_model or next(iter(planner.config.referenced_models()), None)
    if base is None or any(len(module.slices) != 1 for module in planner.config.modules.values()):
        return
    loader = LoaderCache().get(base)
    known: set[str] = set()
    for weight, _ in planner._tensors:
        known.update((weight.name, *(weight.aliases or ()), *(weight.tied_names or ())))
    headers = HeaderCache()
    for name in sorted(set(loader.index.tensor_paths) - known):
        for model in planner.config.referenced_models():
            other = LoaderCache().get(model)
            if model == base or name not in other.index.tensor_paths:
                continue
            if not torch.equal(other.get_tensor(name), loader.get_tensor(name)):
                raise UserError(
                    f"{model}: tensor {name} differs from the base's, but mergekit's definition of this architecture "
                    "does not know it, so no method would merge it"
                )
        header = headers.stored(loader, name)
        dtype = None if header.dtype.is_floating_point else str(header.dtype).removeprefix("torch.")
        weight = WeightInfo(name=name, force_dtype=dtype)
        planner._tensors.append((weight, LoadTensor(model=base, tensor=name)))
        plan.tensors.append((weight, {base: header}, header.bytes))
        plan.carried.append(name)
    if plan.carried:
        shown = ", ".join(plan.carried[:3]) + (", …" if len(plan.carried) > 3 else "")
        plan.notes.append(f"copied from the base, as mergekit's definition does not know them: {shown}")


def verify_output(path: str, plan: MergePlan, *, aligned: bool, options: MergeOptions) -> None:
    """Make sure that a written model is whole: every planned tensor there, with the base's shape.

    That every value is finite was checked on each tensor before it was written.

    Raises:
        UserError: naming the tensor that is missing or wrong.
    """
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{path}: config.json was not written")
    if not options.safe_serialization:
        return
    index = read_index(path)
    headers = HeaderCache()

    class _Written:
        base_path = path
        tensor_paths = index

    for weight, inputs, size in plan.tensors:
        if not size:
            continue
        if weight.name not in index:
            raise UserError(f"verification failed: tensor {weight.name} is missing from the output")
        shape = headers.stored(type("_Loader", (), {"index": _Written}), weight.name).shape
        expected = (inputs.get(plan.base) or next(iter(inputs.values()))).shape
        vocabulary_may_differ = weight.vocabulary_axis is not None and (aligned or options.unsafe_truncate_embeddings)
        if shape != expected and not vocabulary_may_differ:
            raise UserError(f"verification failed: {weight.name} has shape {list(shape)}, the base {list(expected)}")


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target.parent}: cannot write here ({error.strerror})") from None
    staging.chmod(0o777 & ~_umask())
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _move_into_place(staging: Path, target: Path, force: bool) -> None:
    if not target.exists():
        staging.rename(target)
        return
    if not force:  # it appeared while the merge ran
        raise UserError(f"{target}: exists already; choose another name, or --force to replace it")
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / target.name)
    try:
        staging.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _donor(configuration: MergeConfiguration) -> ModelReference:
    return configuration.base_model or configuration.referenced_models()[0]


def _has_tokenizer(configuration: MergeConfiguration, options: MergeOptions) -> bool:
    path = _donor(configuration).model.path
    if not os.path.isdir(path):
        return options.copy_tokenizer
    return options.copy_tokenizer and any(os.path.exists(os.path.join(path, name)) for name in _TOKENIZER_FILES)


def _write_card(
    configuration: MergeConfiguration, source: str, staging: Path, name: str, options: MergeOptions
) -> None:
    donor = Path(_donor(configuration).local_path(cache_dir=options.transformers_cache, ignore_lora=True))
    for companion in _COMPANIONS:
        if (donor / companion).is_file() and not (staging / companion).exists():
            shutil.copy(donor / companion, staging / companion)
    with _model_card_without_network():
        card = mergekit.card.generate_card(config=configuration, config_yaml=source.strip(), name=name)
    (staging / "README.md").write_text(card, encoding="utf-8")
    (staging / "mergekit_config.yml").write_text(source, encoding="utf-8")


def _profile(context: MergeContext | None) -> TrimProfile | None:
    return context.state if context is not None and isinstance(context.state, TrimProfile) else None


def _write_profile(path: str, profile: TrimProfile | None, method: str) -> None:
    if profile is None:
        raise UserError(f"--profile-out: {method} measures no trim profile; neuro_merging does")
    if not profile.experts:
        raise UserError("--profile-out: this merge measured nothing (trim: tensor with a number for lambda_orthogonal)")
    temporary = f"{path}.partial"
    Path(temporary).write_text(profile.to_json(), encoding="utf-8")
    os.replace(temporary, path)
