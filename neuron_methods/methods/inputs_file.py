"""Inputs of a model's modules as a file: a factor F per module, FᵀF being the second moment of what it was given.

Safetensors, made by `mergekit-neuron profile --inputs`. Modules that read the same inputs, as the projections of one
attention layer do, share a factor. The metadata holds, as JSON under ``inputs``:

    {"model": "expert", "model_type": "llama", "modules": {"model.layers.0.self_attn.q_proj": "0", …},
     "tokens": {"0": 5120, …}, "lost": {"0": 0.0, …}, "made_from": {…}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuron_methods.support.documents import Given, parse_json, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import file_in_place_after

FORMAT = "mergekit-neuron inputs"
VERSION = "1"
_DTYPES = ("BF16", "F16", "F32", "F64")
_AGAIN = "measure it again with mergekit-neuron profile --inputs"


class InputsInfo(Given):
    """What a file of inputs says of itself.

    Attributes:
        model: the expert, as its user named it.
        model_type: of its config.
        modules: {path of a module in memory: its factor}.
        tokens: {factor: number of input vectors it was made of}.
        lost: {factor: share of ‖F‖² that FᵀF may fall short by in any direction, where rows were compressed}.
        made_from: data sources, rows and options, for people.
    """

    model: str
    model_type: str
    modules: dict[str, str]
    tokens: dict[str, int]
    lost: dict[str, float] = Field(default_factory=dict)
    made_from: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class InputsFile:
    """An open file of inputs; factors are read when they are asked for.

    Attributes:
        path: of the file.
        info: what it says of itself.
    """

    path: str
    info: InputsInfo
    _file: Any

    @classmethod
    def open(cls, path: str) -> InputsFile:
        """Open a file.

        Raises:
            UserError: it is missing, truncated, or holds no inputs.
        """
        if not Path(path).is_file():
            missing = "a directory; name a file in it, or" if Path(path).is_dir() else "no such file;"
            raise UserError(f"profile {path}: {missing} make it with mergekit-neuron profile --inputs")
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"profile {path}: no complete safetensors file ({error}); {_AGAIN}") from None
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            found = f"a file of the format {metadata['format']!r}" if "format" in metadata else "it says no format"
            raise UserError(f"profile {path}: holds no inputs of modules ({found}); {_AGAIN}")
        if metadata.get("version") != VERSION:
            raise UserError(f"profile {path}: version {metadata.get('version')!r}, expected {VERSION}; {_AGAIN}")
        shown = f"profile {path}"
        info = validated(parse_json(metadata.get("inputs", ""), shown, _AGAIN), InputsInfo, shown, _AGAIN)
        missing = sorted(set(info.modules.values()) - set(file.keys()))
        if missing:
            raise UserError(f"{shown}: factor {missing[0]} is missing; {_AGAIN}")
        for factor in dict.fromkeys(info.modules.values()):
            found = file.get_slice(factor)
            if len(found.get_shape()) != 2 or found.get_dtype() not in _DTYPES:
                raise UserError(f"{shown}: factor {factor} is no matrix of floating-point numbers; {_AGAIN}")
        return cls(path, info, file)

    def factor_of(self, module: str) -> str | None:
        """Find the factor of a module by its path, be it with or without the first part; None where it has none."""
        modules = self.info.modules
        if module in modules:
            return modules[module]
        found = {
            factor
            for path, factor in modules.items()
            if path.endswith(f".{module}") and "." not in path.removesuffix(f".{module}")
        }
        if not found and (rest := module.partition(".")[2]) in modules:
            return modules[rest]
        return found.pop() if len(found) == 1 else None

    def width(self, factor: str) -> int:
        """Tell how many inputs a factor's modules have."""
        return int(self._file.get_slice(factor).get_shape()[-1])

    def rows(self, factor: str) -> int:
        """Tell how many rows a factor has."""
        return int(self._file.get_slice(factor).get_shape()[0])

    def read(self, factor: str) -> Tensor:
        """Read a factor, (rows, inputs), in its stored dtype.

        Raises:
            UserError: it holds NaN or Inf.
        """
        found = self._file.get_tensor(factor)
        if not bool(torch.isfinite(found).all()):
            module = next(path for path, of in self.info.modules.items() if of == factor)
            raise UserError(f"profile {self.path}: the inputs of {module} hold NaN or Inf; {_AGAIN}, in float32")
        return found


def save_inputs(path: str | Path, info: InputsInfo, factors: Mapping[str, Tensor]) -> None:
    """Write a file of inputs beside its place and move it there."""
    metadata = {"format": FORMAT, "version": VERSION, "inputs": json.dumps(info.model_dump())}
    with file_in_place_after(path) as beside:
        save_file(dict(factors), beside, metadata=metadata)
