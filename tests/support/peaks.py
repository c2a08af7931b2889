"""Peaks of real merges: run as a process of its own, `peaks.py FOLDER`, as a peak is one of a whole process.

Writes a base and experts with an embedding far larger than any other tensor, merges them by every method that there is,
and prints, as JSON, what each plan said and what the kernel saw.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit.merge_methods import registry
from peft import LoraConfig, get_peft_model

from neuron_methods.methods.groups_file import groups_from_labels
from neuron_methods.neurons import neuron_map
from neuron_methods.plugin.merging import MergeWitness, merge_to_directory
from neuron_methods.plugin.preflight import MergePlan
from tests.support.checkpoints import save

CONFIG = transformers.LlamaConfig(
    hidden_size=128,
    intermediate_size=1024,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=24000,
    tie_word_embeddings=True,
)
EXPERTS = 3
WEIGHTED: dict[str, Any] = {"weight": 1.0, "density": 0.5}
#: Name in the tests -> (method, parameters, how many experts).
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "neuro_merging": ("neuro_merging", {}, EXPERTS),
    "neuro_merging differing": ("neuro_merging", {"trim": "differing", "lambda_orthogonal": 1.0}, EXPERTS),
    "neuro_merging spectrum": ("neuro_merging", {"spectral_exponent": 0.5, "trim": "tensor"}, EXPERTS),
    "min_merging": ("min_merging", {}, EXPERTS),
    "min_merging ties": ("min_merging", {"rest": "ties", "density": 0.5}, EXPERTS),
    "neuron_merge": ("neuron_merge", {"groups": "groups.json", "within": "ties"}, EXPERTS),
    **{name: (name, WEIGHTED, EXPERTS) for name in ("linear", "task_arithmetic", "ties", "della", "multislerp")},
    "neuron_response": ("neuron_response", {}, EXPERTS),
    "neuron_response rows": ("neuron_response", {"embeddings": "rows"}, EXPERTS),
    "ramplus_tl": ("ramplus_tl", {}, EXPERTS),
    "slerp": ("slerp", {"t": 0.5}, 1),
    "adapters": ("neuro_merging", {}, EXPERTS),
    "adapters ties": ("ties", WEIGHTED, EXPERTS),
}


def write_models(folder: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    save(model, folder / "base", torch.bfloat16)
    for index in range(EXPERTS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        save(model, folder / f"expert-{index}", torch.bfloat16)
    for index in range(EXPERTS):
        fresh = transformers.LlamaForCausalLM(CONFIG)
        adapted = get_peft_model(fresh, LoraConfig(r=4, target_modules=["embed_tokens", "up_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / f"adapter-{index}")
    groups = ["general", "a", "b", "c"]
    labels = {layer: [groups[i % 4] for i in range(n)] for layer, n in neuron_map(CONFIG).neurons.items()}
    groups_from_labels("base", CONFIG.model_type, labels, {"test": True}).write(folder / "groups.json")


def source(folder: Path, name: str) -> str:
    method, parameters, experts = CASES[name]
    base = str(folder / "base")
    models: list[dict[str, Any]] = []
    for index in range(experts):
        model = f"{base}+{folder}/adapter-{index}" if name.startswith("adapters") else str(folder / f"expert-{index}")
        models.append({"model": model})
        if method == "neuron_merge":
            models[-1]["parameters"] = {"group": "abc"[index]}
    if "groups" in parameters:
        parameters = {**parameters, "groups": str(folder / "groups.json")}
    if parameters is WEIGHTED:  # as far as the method has them
        parameters = {p.name: WEIGHTED[p.name] for p in registry.get(method).spec.parameters if p.name in WEIGHTED}
    content: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
    if method not in ("linear", "multislerp"):
        content["base_model"] = base
    elif method != "linear":
        content["models"] = [{"model": base}, *models]
    return json.dumps(content)  # which is YAML


def resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    write_models(folder)
    merge_to_directory(source(folder, "linear"), folder / "out", progress=False, force=True)  # imports what is needed
    found = {}
    for name in CASES:
        text = source(folder, name)
        gc.collect()
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        plans: list[MergePlan] = []
        look = MergeWitness(lambda *_: [], on_plan=lambda run, _planner, plans=plans: plans.append(run.plan))
        merge_to_directory(text, folder / "out", progress=False, force=True, witness=look)
        (plan,) = plans
        found[name] = (plan.memory.peak + plan.mapped_bytes, resident("VmHWM") - before)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
