"""From what was recorded of one data source to the tensors and lines of a profile."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_methods.neurons.profile_file import TOP_ACTIVATION, TOP_EXEMPLAR
from neuron_methods.profiling.exemplars import NOBODY
from neuron_methods.profiling.recorder import Recorder


def source_tensors(recorder: Recorder, source: str, lines: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the tensors of one source in a profile; `lines` comes from `describe_exemplars`."""
    tensors = {}
    for key, record in recorder.records.items():
        for name, values in record.sums.means().items():
            tensors[f"{source}/{key}/{name}"] = values
        tensors[f"{source}/{key}/{TOP_ACTIVATION}"] = record.top.entries["activation"].cpu()
        tensors[f"{source}/{key}/{TOP_EXEMPLAR}"] = lines[key]
    return tensors


def describe_exemplars(
    recorder: Recorder, source: str, first_line: int
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Describe every exemplar once, and for each layer which of them its neurons have.

    Returns:
        Layer -> line numbers, int32 (neurons, top), -1 in empty places; and the lines themselves, numbered from
        `first_line` on.
    """
    exemplars: list[dict[str, Any]] = []
    line_of: dict[tuple[str, int, int], int] = {}
    lines = {}
    for key, record in recorder.records.items():
        entries = {field: values.cpu() for field, values in record.top.entries.items()}
        order, position = entries["order"].flatten().numpy(), entries["position"].flatten().numpy()
        filled = (order != NOBODY).nonzero()[0]
        # Each token once, with the place of one of its entries and which entries are the same.
        places = np.stack((order[filled], position[filled]), axis=1)
        unique, first, inverse = np.unique(places, axis=0, return_index=True, return_inverse=True)
        tokens = [(record.stream, int(o), int(p)) for o, p in unique]
        unknown = [(token, filled[at]) for token, at in zip(tokens, first, strict=True) if token not in line_of]
        where = torch.tensor(np.array([at for _, at in unknown], dtype=np.int64))
        payloads = entries["payload"].flatten(0, 1)[where]
        texts = recorder.feeder.describe(record.stream, payloads) if len(where) else []
        rows = entries["row"].flatten()[where].tolist()
        for (token, _), row, text in zip(unknown, rows, texts, strict=True):
            line_of[token] = first_line + len(exemplars)
            exemplars.append({"source": source, "row": row, "position": token[2], **text})
        result = np.full(order.shape, -1, dtype=np.int32)
        result[filled] = np.array([line_of[token] for token in tokens], dtype=np.int32)[inverse.reshape(-1)]
        lines[key] = torch.from_numpy(result).view(entries["order"].shape)
    return lines, exemplars
