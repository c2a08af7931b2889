"""Verify what a merge has written against its plan."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

from neuron_methods.plugin.preflight import Header, HeaderCache, MergePlan, header_of, open_safetensors
from neuron_methods.support.errors import UserError


def verify_output(path: str | os.PathLike[str], plan: MergePlan, *, aligned: bool, options: MergeOptions) -> None:
    """Make sure that a written model is whole: every planned tensor there, with the base's shape.

    That every value is finite was checked on each tensor before it was written.

    Args:
        path: the directory.
        plan: what was to be written; it holds every tensor of the base.
        aligned: whether vocabularies were aligned, so that their axis may have another length than the base's.
        options: mergekit's.

    Raises:
        UserError: naming the tensor that is missing or wrong, or the file that is damaged.
    """
    config = Path(path) / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError("verification failed: config.json was not written completely") from None
    written = written_headers(Path(path), options.safe_serialization)
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


def written_headers(path: Path, safe: bool = True) -> dict[str, Header]:
    """Headers of all tensors of a model directory, by its index or its single file.

    Args:
        path: the directory.
        safe: safetensors files, else pickles.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    stem = "model.safetensors" if safe else "pytorch_model.bin"
    index, whole = path / f"{stem}.index.json", path / stem
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif whole.exists():
        names = open_safetensors(str(whole)).keys() if safe else _unpickled(whole)
        weight_map = dict.fromkeys(names, stem)
    else:
        raise UserError(f"verification failed: {stem} was not written")
    if not safe:
        tensors: dict[str, Any] = {}
        for file in set(weight_map.values()):
            tensors |= _unpickled(path / file)
        return {name: header_of(tensors[name]) for name in weight_map if name in tensors}
    headers = HeaderCache()
    return {name: headers.in_file(str(path / file), name) for name, file in weight_map.items()}


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """Tensors without data."""
    try:
        return torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise UserError(f"verification failed: {file.name} cannot be read back ({type(error).__name__})") from None
