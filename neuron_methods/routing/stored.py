"""Tensors of a routed model, read once they are known to be what its config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuron_methods.routing.routed_files import AGAIN
from neuron_methods.support.documents import open_file
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line, shortened


def read_tensors(path: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Read a safetensors file of a routed model, once it is known to hold tensors of these names and shapes.

    Raises:
        UserError: it cannot be read, has other tensors, or holds what is no number.
    """
    open_file(path, str(path)).close()  # safetensors waits for a pipe
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
            wrong = next((key for key in {**expected, **found} if expected.get(key) != found.get(key)), None)
            if wrong is not None:
                problem = f"{shortened(wrong)} is of shape {found.get(wrong)}, expected {expected.get(wrong)}"
                raise UserError(f"{path}: {problem}; {AGAIN}")
            tensors = {key: file.get_tensor(key) for key in expected}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {AGAIN}") from None
    strange = next((key for key, value in tensors.items() if not bool(value.isfinite().all())), None)
    if strange is not None:
        raise UserError(f"{path}: {strange} holds values that are no numbers; {AGAIN}")
    return tensors
