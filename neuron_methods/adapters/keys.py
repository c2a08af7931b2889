"""The keys of an adapter's file, as peft writes them: `base_model.model.<path of the module>.lora_A.weight` and kin."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_FACTOR = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.(weight|bias)$")
_EMBEDDING_FACTOR = re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.default)?$")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?$")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta$")
# What peft puts between a module's path and the parameter it stores whole.
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)")


@dataclass
class AdaptedModule:
    """A module that carries factors.

    Attributes:
        path: of the module in memory, without what peft puts in between.
        keys: {what: key}, where what is A, B, embedding_A, embedding_B, bias (of B), magnitude or tokens.
    """

    path: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def factors(self) -> tuple[str, str]:
        """What the two factors are called in `keys`, whether they are there or not."""
        embedding = "embedding_A" in self.keys or "embedding_B" in self.keys
        return ("embedding_A", "embedding_B") if embedding else ("A", "B")


def sort_keys(keys: Iterable[str]) -> tuple[list[AdaptedModule], dict[str, str]]:
    """Sort an adapter's keys.

    Returns:
        (modules that carry factors, {parameter's path: key of the values that replace it}). A module of which several
        parameters carry factors is listed once for each.
    """
    modules: dict[str, AdaptedModule] = {}
    replaced: dict[str, str] = {}
    for key in keys:
        name = key.removeprefix("base_model.").removeprefix("model.") if key.startswith("base_model.") else key
        if match := _FACTOR.match(name):
            path, part, kind = match.groups()
            what = part if kind == "weight" else "bias"
        elif match := _EMBEDDING_FACTOR.match(name):
            path, what = match.group(1), f"embedding_{match.group(2)}"
        elif match := _MAGNITUDE.match(name):
            path, what = match.group(1), "magnitude"
        elif match := _TOKENS.match(name):
            path, what = match.group(1), "tokens"
        else:
            replaced[_unwrapped(name)] = key
            continue
        # Nested parameters of one module differ in the number of `base_layer` in their paths.
        modules.setdefault(path, AdaptedModule(_unwrapped(path))).keys[what] = key
    return list(modules.values()), replaced


def _unwrapped(path: str) -> str:
    return _WRAPPERS.sub("", f"{path}.").removesuffix(".")
