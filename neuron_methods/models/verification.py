"""Would transformers load it whole? A checkpoint held against the model class that its config names.

The class is built on the meta device and shown the headers of what is stored; transformers itself converts the names
and says what is missing, unexpected or of another shape. No weights are read, a 7B config takes a tenth of a second.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig

from neuron_methods.models.formats import quantised_with
from neuron_methods.models.headers import (
    Header,
    HeaderFiles,
    headers_of,
    open_safetensors,
    stored_count,
    stored_names,
    weight_files,
)
from neuron_methods.models.model_files import CONFIG_NAME, HEADS, check_files, foreign_reading, read_model_config
from neuron_methods.models.skeleton import Skeleton, cannot_be_built, model_class
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.quiet import quiet_transformers
from neuron_methods.support.text import listed


@dataclass(frozen=True)
class LoadReport:
    """What transformers says of a checkpoint.

    Attributes:
        missing: parameters of the class that nothing stored becomes; transformers would make them up.
        unexpected: stored tensors, by the names they would get, that the class does not read.
        mismatched: (parameter, shape stored, shape that the config asks for).
        errors: what could not be converted.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def load_report(model: type, config: PretrainedConfig, headers: Mapping[str, Header], **built: Any) -> LoadReport:
    """Ask transformers what it would make of tensors with these headers.

    Args:
        model: class of transformers, or of custom code.
        config: its config.
        headers: stored name -> header.
        built: what else the class is built with.

    Raises:
        UserError: the class cannot be built from this config.
    """
    stored = {name: torch.empty(h.shape, dtype=h.dtype, device="meta") for name, h in headers.items()}
    with quiet_transformers():
        try:
            _, found = model.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=stored,
                trust_remote_code=False,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **built,
            )
        except Exception as error:  # whatever building the class of a foreign config raises
            if "conversion of the weights" not in str(error):
                raise cannot_be_built(model, config, error) from error
            return LoadReport(errors=[_what_does_not_fit(Skeleton.build(model, config), headers)])
    return LoadReport(
        missing=sorted(found["missing_keys"]),
        unexpected=sorted(found["unexpected_keys"]),
        mismatched=sorted((name, tuple(has), tuple(wants)) for name, has, wants in found["mismatched_keys"]),
        errors=[str(error) for error in found["error_msgs"]],
    )


def _what_does_not_fit(skeleton: Skeleton, headers: Mapping[str, Header]) -> str:
    """Name the parts of a packed parameter that differ in number, as where an expert of a mixture is missing."""
    parts: dict[str, Counter[str]] = {}
    for name, new in skeleton.renamed(headers).items():
        if new.converted:
            parts.setdefault(new.path, Counter())[re.sub(r"\.\d+\.(?!.*\.\d+\.)", ".*.", name)] += 1
    for path, counts in parts.items():
        if len(set(counts.values())) > 1:
            few, many = min(counts, key=counts.__getitem__), max(counts.values())
            return f"of {few} it has {counts[few]}, and {path} needs {many}: some are missing"
    return "tensors that it packs into one are of different shapes"


@dataclass(frozen=True)
class Verified:
    """A directory that was found whole.

    Attributes:
        kind: `model`, `adapter` or `routed`.
        tensors: how many are stored.
        by: what it was held against: "LlamaForCausalLM of transformers 5.23.0".
        notes: what could not be checked, and what a reader should know.
    """

    kind: str
    tensors: int
    by: str
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.kind}, {self.tensors} tensors, complete by {self.by}", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)


def verify_model(
    place: Path,
    *,
    trust_remote_code: bool = False,
    like: Mapping[str, Header] | None = None,
    stem: str = "model.safetensors",
    held: Mapping[str, torch.Tensor] | None = None,
) -> Verified:
    """Make sure that transformers would load a directory as the model that its config says.

    Args:
        place: the directory.
        trust_remote_code: whether custom code may be run to build the class.
        like: headers of the model that it was made from; what that one lacks or stores unread is told in a note.
        stem: of the files of weights; a pickle's ends in `.bin`.
        held: the model's tensors, where they are in memory and not in files.

    Raises:
        UserError: naming the file and what is missing, left over, damaged, of another shape or dtype.
    """
    config = _read_config(place / "config.json", trust_remote_code, held)
    architecture = (config.architectures or ["the class"])[0]
    checked = _unbuilt(config, place, architecture, trust_remote_code)
    if checked is not None:
        count = len(stored_names(place, stem) if held is None else held)
        return Verified("model", count, "its index and headers", [checked])
    headers = headers_of(place, stem, held)
    model = model_class(config, place, trust_remote_code=trust_remote_code)
    report, poolerless = load_report(model, config, headers), []
    if _is_of_pooler(report.missing) and "add_pooling_layer" in inspect.signature(model).parameters:
        # Whole, but for what a class with a head builds its backbone without; no config says so.
        without = load_report(model, config, headers, add_pooling_layer=False)
        if without.unexpected == report.unexpected:
            report = without
            poolerless = [f"no pooler is stored: load it with add_pooling_layer=False, or {architecture} makes one up"]
    excused = LoadReport() if like is None else load_report(model, config, like)
    missing = [name for name in report.missing if name not in excused.missing]
    if missing:
        raise UserError(
            f"{place}: {len(missing)} parameters of {architecture} are missing from its weights, and transformers "
            f"would make them up: {listed(missing)}; merge or download it again"
        )
    if report.mismatched:
        name, has, wants = report.mismatched[0]
        raise UserError(
            f"{place}: {name} is stored as {list(has)}, but by config.json {architecture} needs {list(wants)} "
            f"({len(report.mismatched)} such); merge or download it again"
        )
    if report.errors:
        raise UserError(f"{place}: transformers cannot load its weights: {report.errors[0]}")
    left = [name for name in report.unexpected if name not in excused.unexpected]
    if left:
        raise UserError(
            f"{place}: {architecture} reads {len(left)} of its tensors nowhere: {listed(left)}; does its config.json "
            "name another class than the one that wrote them?"
        )
    notes = poolerless + _check_dtype(place, config, headers)
    pair = untied(place, Skeleton.build(model, config), headers, held) if stem.endswith(".safetensors") else None
    # Not of the class's config: T5's takes no other word for it than "tied".
    if pair is not None and read_object(place / "config.json").get("tie_word_embeddings") is not False:
        raise UserError(
            f"{place}: {' and '.join(pair)} differ, but config.json says that they are tied, so readers that obey it "
            'drop one of them; set "tie_word_embeddings": false in it'
        )
    if report.missing:
        notes.append(f"missing, as in the base, so that transformers makes it up: {listed(report.missing)}")
    heads = [_verify_head(file, headers) for file in sorted((place / HEADS).glob("*.json"))]
    notes += [f"with a head in {HEADS}/ it is a whole model: {listed(heads)}"] if heads else []
    return Verified("model", len(headers), f"{architecture} of transformers {transformers.__version__}", notes)


def _verify_head(file: Path, body: Mapping[str, Header]) -> str:
    """Make sure that a model's body and a head beside it are a whole model; gives the head's name."""
    config = _read_config(file)
    architecture = (config.architectures or [""])[0]
    model = model_class(config)
    weights = file.with_suffix(".safetensors")
    if model is None:
        raise UserError(f"{file}: transformers {transformers.__version__} has no {architecture!r}; merge again")
    report = load_report(model, config, {**body, **HeaderFiles().all_of(str(weights))})
    if report.missing or report.mismatched or report.errors:
        wrong = report.missing or [name for name, _, _ in report.mismatched] or report.errors
        raise UserError(f"{weights}: {architecture} does not get {listed(wrong)} from it and its model; merge again")
    return file.stem


def _is_of_pooler(names: list[str]) -> bool:
    return bool(names) and all("pooler" in name.split(".") for name in names)


def correct_config(
    place: Path, *, trust_remote_code: bool = False, held: Mapping[str, torch.Tensor] | None = None
) -> list[str]:
    """Let a directory's config.json say what its weights are, where it says something else.

    Args:
        place: directory of safetensors files.
        trust_remote_code: whether custom code may be run to build the class.
        held: as for `verify_model`.

    Returns:
        What was changed, in words.
    """
    config = _read_config(place / "config.json", trust_remote_code, held)
    headers = headers_of(place, held=held)
    content, notes = read_object(place / "config.json"), []
    dtypes: Counter[torch.dtype] = Counter()
    for header in headers.values():
        if header.dtype.is_floating_point:
            dtypes[header.dtype] += header.entries
    if dtypes and (most := dtypes.most_common(1)[0][0]) != config.dtype:
        written = _spelled(most)
        notes.append(f"written in {written}, and config.json says so (the base's says {_spelled(config.dtype)})")
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            if part is content or "dtype" in part:
                part["dtype"] = written
                part.pop("torch_dtype", None)
    model = model_class(config, place, trust_remote_code=trust_remote_code)
    pair = untied(place, Skeleton.build(model, config), headers, held) if model is not None else None
    if pair is not None and content.get("tie_word_embeddings") is not False:
        notes.append(f"{' and '.join(pair)} differ now, so config.json says that they are not tied")
        content["tie_word_embeddings"] = False
        if isinstance(content.get("text_config"), dict):
            content["text_config"]["tie_word_embeddings"] = False
    if notes:
        write_json(place / "config.json", content, indent=2)
    return notes


def _spelled(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _read_config(
    file: Path, trust_remote_code: bool = False, held: Mapping[str, torch.Tensor] | None = None
) -> PretrainedConfig:
    if not file.is_file():
        raise UserError(f"{file.parent}: no {file.name} in it, so this is no model; merge or download it again")
    check_files(file.parent, str(file.parent))
    read_model_config(file, stored_count(file.parent) if held is None else len(held))
    # By the directory where it can be: transformers looks for custom code beside it.
    place = file.parent if file.name == CONFIG_NAME else file
    with foreign_reading(str(file)):
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)


def _unbuilt(config: PretrainedConfig, place: Path, architecture: str, trust_remote_code: bool) -> str | None:
    """Why the class cannot be built and what was checked instead; None where it can."""
    instead = "so it was not built; checked: that every file is whole and holds what the index says"
    if (how := quantised_with(config)) is not None:
        return f"quantised ({how}), {instead}"
    if not config.architectures:
        return f"config.json names no class (architectures), {instead}"
    if model_class(config, place, trust_remote_code=trust_remote_code) is not None:
        return None
    if getattr(config, "auto_map", None) and not trust_remote_code:
        return f"{architecture} is custom code, which --trust-remote-code would run, {instead}"
    return f"transformers {transformers.__version__} has no {architecture}, {instead}"


def _check_dtype(place: Path, config: PretrainedConfig, headers: Mapping[str, Header]) -> list[str]:
    """Hold the dtype that the config names against those that are stored; a mixture is told in a note."""
    named = getattr(config, "dtype", None)
    stored = {header.dtype for header in headers.values() if header.dtype.is_floating_point}
    if not isinstance(named, torch.dtype) or not stored or stored == {named}:  # a dict of them, of parts
        return []
    found, said = ", ".join(sorted(map(_spelled, stored))), _spelled(named)
    if named not in stored:
        raise UserError(f"{place}: config.json says dtype {said}, but its tensors are stored as {found}; correct it")
    return [f"stored in several dtypes ({found}); config.json says {said}"]


def untied(
    place: Path, skeleton: Skeleton, headers: Mapping[str, Header], held: Mapping[str, torch.Tensor] | None = None
) -> tuple[str, str] | None:
    """Find two stored tensors with values of their own whose names the config ties to one; only such are read.

    Args:
        place: directory of safetensors files.
        skeleton: of the class that its config names.
        headers: of what is stored.
        held: as for `verify_model`.

    Returns:
        Their names; None where there are none.
    """
    stored = {new.path: name for name, new in skeleton.renamed(headers).items() if not new.converted}
    for source, *tied in skeleton.ties:
        for path in tied:
            if source in stored and path in stored and not _equal(place, stored[source], stored[path], held):
                return stored[path], stored[source]
    return None


def _equal(place: Path, one: str, other: str, held: Mapping[str, torch.Tensor] | None) -> bool:
    found = dict(held or {})
    for path in weight_files(place) if held is None else ():
        file = open_safetensors(path)
        found |= {name: file.get_tensor(name) for name in (one, other) if name in file.keys()}  # noqa: SIM118
    return torch.equal(found[one], found[other])
