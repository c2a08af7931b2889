"""The files of a model: which tensors lie in which, decided by the plan, and put together from what is merged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from neuron_methods.plugin.shards import ShardWriter
from neuron_methods.plugin.work import Work, put, stored_in


def packed(sizes: Iterable[tuple[str, int]], most: int) -> list[list[str]]:
    """Fill shards in order, as mergekit's writer does.

    Args:
        sizes: (tensor, its bytes).
        most: bytes of a shard; one tensor may have more.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes:
        if not shards or filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(work: Work, directory: Path, *, safe: bool) -> None:
    """Write the files of a model and, where there are several, their index.

    Args:
        work: finished; a shard that is one piece is not copied.
        directory: exists.
        safe: write safetensors, else pickles.
    """
    stored = {number: stored_in(work.pieces[name] for name in names) for number, names in enumerate(work.groups)}
    # An optional tensor that comes to nothing is in no file.
    shards = [(names, {n: stored[i][n] for n in names if n in stored[i]}) for i, names in enumerate(work.groups)]
    shards = [(names, tensors) for names, tensors in shards if tensors]
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    weight_map, total = {}, 0
    for number, (names, tensors) in enumerate(shards, 1):
        file = f"{stem}.{ending}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}"
        pieces = {work.pieces[name] for name in names}
        if not safe:
            torch.save({name: tensor.clone() for name, tensor in tensors.items()}, directory / file)
        elif len(pieces) == 1:
            put(pieces.pop().file, directory / file)
        else:
            writer = ShardWriter(directory / file, [work.shapes[name] for name in names])
            for name, tensor in tensors.items():
                writer.save_tensor(name, tensor)
            writer.finish()
            writer.close()
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        about = {"total_size": total, "mergekit_version": version("mergekit")}
        index = {"metadata": about, "weight_map": weight_map}
        (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
