"""adapter_config.json: what an adapter is, and which way it can be read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuron_methods.models.reference import ADAPTER_CONFIG as CONFIG_NAME
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError

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
        raw = read_object(path, again="download or save the adapter again")
        if not isinstance(raw.get("peft_type"), str):
            raise UserError(f"{path}: no peft_type in it, so this is no adapter that peft has saved")
        try:
            return cls(
                where=where,
                peft_type=raw["peft_type"].upper(),
                base_model=raw.get("base_model_name_or_path") or None,
                base_revision=raw.get("revision") or None,
                rank=int(raw.get("r") or 8),
                alpha=float(raw.get("lora_alpha") or 8),
                rank_pattern={k: int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
                alpha_pattern={k: float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
                rslora=bool(raw.get("use_rslora")),
                fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
                target_parameters=tuple(raw.get("target_parameters") or ()),
                token_indices=_token_indices(raw.get("trainable_token_indices")),
                raw=raw,
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: {error}; download or save the adapter again") from None

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


def _token_indices(raw: Any) -> dict[str, tuple[int, ...]]:
    if not raw:
        return {}
    if isinstance(raw, list):
        return {"": tuple(map(int, raw))}
    return {name: tuple(map(int, indices)) for name, indices in raw.items()}


def _pattern_for(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that the end of the module's path matches, as peft looks it up; "" if none does."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), "")
