"""adapter_config.json: what an adapter is, and which way it can be read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuron_methods.models.adapter_config import ADAPTER_CONFIG as CONFIG_NAME
from neuron_methods.models.adapter_config import AdapterConfigFile, read_adapter_config
from neuron_methods.support.errors import UserError, explained_by

_AGAIN = "download or save the adapter again"
# Written by peft 0.4 to 0.21, and either handled here or without influence on the merged weights.
_KNOWN = frozenset(
    (
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    )
)
# Initialisations that leave the base weights alone. The others (pissa, olora, corda, loftq, lora_ga) take something out
# of them when peft loads the adapter, and only peft knows how much.
_HARMLESS_INITS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """The parts of adapter_config.json that decide what an adapter does to its base.

    Attributes:
        where: the adapter as the user named it, for messages.
        peft_type: LORA, IA3, … as peft spells it.
        base_model: the base the adapter was trained on, None where the file does not say.
        base_revision: its revision, None for the default.
        rank: r.
        alpha: lora_alpha.
        rank_pattern: {regular expression on the module's path: r}.
        alpha_pattern: likewise.
        rslora: scaling is α/√r instead of α/r.
        fan_in_fan_out: the layers keep their weights transposed; where shapes tell otherwise, the shapes are believed.
        target_parameters: parameters, rather than modules, that carry LoRA.
        token_indices: rows trained whole, {module name or "": indices}.
        raw: the file's content.
    """

    where: str
    peft_type: str
    base_model: str | None = None
    base_revision: str | None = None
    rank: int = 8
    alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    fan_in_fan_out: bool = False
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    @explained_by("adapters")
    def read(cls, directory: str, where: str | None = None) -> AdapterConfig:
        """Read a directory's adapter_config.json.

        Args:
            directory: local.
            where: how to call the adapter in messages.

        Raises:
            UserError: the file cannot be read, or is none that peft writes.
        """
        path = Path(directory) / CONFIG_NAME
        where = where or directory
        raw = read_adapter_config(directory)
        found = AdapterConfigFile.model_validate(raw)
        peft_type, zero = found.peft_type.upper(), [k for k, v in (found.rank_pattern or {}).items() if v == 0]
        if peft_type == "LORA" and (found.r == 0 or zero):
            raise UserError(
                f"{path}: {f'rank_pattern: {zero[0]}' if zero else 'r'}: found 0, expected 1 or more; {_AGAIN}"
            )
        return cls(
            where=where,
            peft_type=peft_type,
            base_model=found.base_model_name_or_path or None,
            base_revision=found.revision or None,
            rank=found.r,
            alpha=float(found.lora_alpha),
            rank_pattern=found.rank_pattern or {},
            alpha_pattern={key: float(value) for key, value in (found.alpha_pattern or {}).items()},
            rslora=bool(found.use_rslora),
            fan_in_fan_out=bool(found.fan_in_fan_out),
            target_parameters=tuple(found.target_parameters or ()),
            token_indices=_token_indices(found.trainable_token_indices),
            raw=raw,
        )

    def rank_of(self, module: str) -> int:
        """Look up rank r of the module at this path."""
        return self.rank_pattern.get(_pattern_for(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """Compute scaling s of the module at this path: α/r, or α/√r with rslora."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_pattern_for(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def needs_peft(self) -> str | None:
        """Say why the adapter cannot be formed tensor by tensor here; None if it can."""
        if self.peft_type != "LORA":
            return f"adapters of type {self.peft_type} are merged by peft itself"
        init = self.raw.get("init_lora_weights", True)
        if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
            return f"init_lora_weights: {init} changes the base weights"
        options = sorted(key for key, value in self.raw.items() if value and key not in _KNOWN)
        if options:
            return f"{', '.join(options)} in its {CONFIG_NAME} is left to peft"
        return None


@explained_by("adapters")
def refuse_unknown(config: AdapterConfig) -> None:
    """Refuse the types of adapters that peft does not know, by name.

    Raises:
        UserError: peft has no such type.
    """
    from peft import PeftType

    if config.peft_type not in PeftType.__members__:
        raise UserError(
            f"{config.where}: adapters of type {config.peft_type} are unknown to this version of peft; update peft"
        )


def _token_indices(found: list[int] | dict[str, list[int]] | None) -> dict[str, tuple[int, ...]]:
    if isinstance(found, list):
        return {"": tuple(found)}
    return {name: tuple(indices) for name, indices in (found or {}).items()}


def _pattern_for(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that the end of the module's path matches, as peft looks it up; "" if none does."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), "")
