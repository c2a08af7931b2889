"""From what was recorded of one data source to the tensors and lines of a profile."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_methods.neurons.profile_file import TOP_ACTIVATION, TOP_EXEMPLAR
from neuron_methods.profiling.exemplars import NOBODY
from neuron_methods.profiling.recorder import Recorder


def describe_source(recorder: Recorder, source: str, first_line: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Make the tensors of one source in a profile, and describe every exemplar of its neurons once.

    Returns:
        Name -> tensor, as `profile_file` has them; and the lines of the exemplars, numbered from `first_line` on.
    """
    tensors: dict[str, Tensor] = {}
    exemplars: list[dict[str, Any]] = []
    line_of: dict[tuple[str, int, int], int] = {}
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
        found = {
            **record.sums.means(),
            TOP_ACTIVATION: entries["activation"],
            TOP_EXEMPLAR: torch.from_numpy(result).view(entries["order"].shape),
        }
        tensors |= {f"{source}/{key}/{name}": values for name, values in found.items()}
    return tensors, exemplars
