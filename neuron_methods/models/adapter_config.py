"""adapter_config.json as peft writes it: what is read of it, here and in `adapters/`."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from neuron_methods.support.documents import Foreign, read_object, validated
from neuron_methods.support.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_AGAIN = "download or save the adapter again"
_MOST_RANK = 1 << 20

Rank = Annotated[int, Field(ge=0, le=_MOST_RANK)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0, le=1 << 31)]


def _plain(name: str) -> str:
    """Refuse what no path or name of a repository holds, and no terminal shows."""
    if not all(c.isprintable() or unicodedata.category(c) == "Zs" for c in name):
        raise ValueError("a name with characters that no path has")
    return name


def _of_ranks(value: Any, info: ValidationInfo) -> Any:
    """Pass over what AdaLoRA keeps there, which of each module's ranks are left; only peft reads that."""
    return None if str(info.data.get("peft_type")).upper() == "ADALORA" else value


class AdapterConfigFile(Foreign):
    """What is read of adapter_config.json before peft reads all of it; None as peft writes it for what is not set."""

    peft_type: str
    base_model_name_or_path: Annotated[str, AfterValidator(_plain)] | None = None
    revision: Annotated[str, AfterValidator(_plain)] | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    r: Rank = 8
    lora_alpha: Finite = 8
    rank_pattern: Annotated[dict[str, Rank] | None, BeforeValidator(_of_ranks)] = None
    alpha_pattern: dict[str, Finite] | None = None
    lora_dropout: Finite | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = True
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[Index] | dict[str, list[Index]] | None = None


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a directory's adapter_config.json.

    Raises:
        UserError: it cannot be read, a key is of a wrong type, or a number is none that a trained adapter has.
    """
    path = Path(directory) / ADAPTER_CONFIG
    raw = read_object(path, again=_AGAIN)
    if "peft_type" not in raw:
        raise UserError(f"{path}: no peft_type in it, so this is no adapter that peft has saved")
    validated(raw, AdapterConfigFile, str(path), _AGAIN)
    return raw
