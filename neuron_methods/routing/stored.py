"""Tensors of a routed model, read once they are known to be what its config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuron_methods.routing.routed_files import AGAIN, bias_file
from neuron_methods.support.documents import open_file
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import file_in_place_after
from neuron_methods.support.text import first_line, shortened


def save_biases(directory: Path, expert: str, biases: Mapping[str, Tensor]) -> None:
    """Write what an expert adds to biases, by their modules; without any there is no file."""
    if not biases:
        return
    place = bias_file(directory, expert)
    place.parent.mkdir(exist_ok=True)
    with file_in_place_after(place) as beside:
        save_file({path: value.contiguous() for path, value in biases.items()}, beside, metadata={"format": "pt"})


def load_biases(directory: Path, expert: str, model: Any) -> dict[str, Tensor]:
    """Read what an expert adds to biases of `model`; errors as for `read_tensors`."""
    shapes = {path: getattr(getattr(module, "bias", None), "shape", None) for path, module in model.named_modules()}
    return read_tensors(
        bias_file(directory, expert), {p: list(s) for p, s in shapes.items() if s is not None}, some=True
    )


def read_tensors(path: Path, expected: Mapping[str, Sequence[int]], *, some: bool = False) -> dict[str, Tensor]:
    """Read a safetensors file of a routed model, once it is known to hold tensors of these names and shapes.

    Args:
        path: of the file.
        expected: name -> shape.
        some: it may hold some of these alone.

    Raises:
        UserError: it cannot be read, has other tensors, or holds what is no number.
    """
    open_file(path, str(path)).close()  # safetensors waits for a pipe
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
            if some:
                expected = {key: shape for key, shape in expected.items() if key in found}
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
