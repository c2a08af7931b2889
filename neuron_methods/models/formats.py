"""What is no plain checkpoint of transformers: quantised weights, and those of other libraries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron_methods.models.model_files import CONFIG_NAME, read_model_config
from neuron_methods.support.errors import UserError

_QUANTISERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "fp8", "fbgemm_fp8": "fp8"}
_NO_CONFIG = (
    ("*.gguf", "weights quantised as GGUF", "name the model that the file was made from, in bfloat16"),
    ("open_clip*", "a checkpoint of open_clip", "name the same model as transformers saves it (CLIPModel)"),
    ("consolidated.*", "a model in its maker's own layout", "name the same model as transformers saves it (-hf)"),
    (
        "*.pt|*.pth|*.ckpt|*.pth.tar|*.tar",
        "a training checkpoint, without a config of transformers",
        "load it into its class of transformers and save that: model.load_state_dict(...); model.save_pretrained(DIR)",
    ),
)


def quantised_with(config: Any) -> str | None:
    """Say with what the weights of a config are quantised, as in "GPTQ, 4 bit"; None where they are not.

    Args:
        config: of transformers, or the content of a config.json.
    """
    found = (
        config.get("quantization_config") if isinstance(config, Mapping) else vars(config).get("quantization_config")
    )
    if not found:
        return None
    facts: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = facts.get("quant_method")
    method = str(getattr(method, "value", method) or "an unknown method")
    bits = 4 if facts.get("load_in_4bit") else 8 if facts.get("load_in_8bit") else facts.get("bits", facts.get("w_bit"))
    return _QUANTISERS.get(method, method) + (f", {bits} bit" if bits else "")


def refuse_quantised(config: Any, where: str, instead: str = "name the model it was made from, in bfloat16") -> None:
    """Refuse weights that no arithmetic can take.

    Args:
        config: as for `quantised_with`.
        where: how messages call the model.
        instead: what to do.

    Raises:
        UserError: they are quantised.
    """
    if (how := quantised_with(config)) is not None:
        raise UserError(f"{where}: its weights are quantised ({how}), and cannot be computed with; {instead}")


def refuse_other_formats(path: str, where: str) -> None:
    """Refuse what is here and no checkpoint of transformers, calling it by its name.

    Args:
        path: of a directory or a file; one that is not here is left to whoever loads it.
        where: how messages call the model.

    Raises:
        UserError: saying what it is and what to do.
    """
    if path.lower().endswith(".gguf"):
        raise UserError(f"{where}: its weights are quantised (GGUF), and cannot be computed with; {_NO_CONFIG[0][2]}")
    if not os.path.isdir(path):
        return
    place = Path(path)
    if not (place / "config.json").is_file() or not _holds_weights(place):
        for patterns, what, cure in _NO_CONFIG:
            if found := [file.name for pattern in patterns.split("|") for file in place.glob(pattern)]:
                raise UserError(f"{where}: {what} ({found[0]}); {cure}")
        return
    raw = read_model_config(place / CONFIG_NAME)
    if "model_type" not in raw and "architecture" in raw:
        raise UserError(
            f"{where}: a checkpoint of timm ({raw['architecture']}), whose config.json has no model_type; name the "
            "same model as transformers saves it"
        )


def _holds_weights(place: Path) -> bool:
    stems = ("model.safetensors", "pytorch_model.bin")
    return any((place / name).is_file() for stem in stems for name in (stem, f"{stem}.index.json"))
