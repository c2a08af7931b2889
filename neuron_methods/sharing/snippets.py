"""How to load what lies in a directory: a model, an adapter or a routed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuron_methods.models.kinds import KindFacts, facts_of
from neuron_methods.models.model_files import HEADS
from neuron_methods.routing.routed_files import is_routed
from neuron_methods.support.documents import read_object
from neuron_methods.support.text import listed

_INPUT_FILES = {
    "AutoTokenizer": ("tokenizer_config.json", "tokenizer.json", "spiece.model"),
    "AutoImageProcessor": ("preprocessor_config.json", "processor_config.json"),
    "AutoProcessor": ("preprocessor_config.json", "processor_config.json"),
}


def _kind(place: Path) -> KindFacts | None:
    config = _config(place / "config.json")
    architectures = config.get("architectures") or [""]
    return facts_of(str(architectures[0]), bool(config.get("is_encoder_decoder", True)))


def pipeline_tag(place: Path) -> str | None:
    """Tell the task of the Hub that a model serves; None where its class does not."""
    facts = _kind(place)
    return facts.hub_task if facts else None


def loading_snippet(place: Path) -> str:
    """Write a Python block that loads the directory; `model_id` is to be replaced where it is uploaded."""
    if is_routed(place):
        lines = ["from neuron_methods.routing import NeuronRoutedModel", "", _MODEL_ID]
        return _block([*lines, "model = NeuronRoutedModel.from_pretrained(model_id)"])
    if (place / "adapter_config.json").exists():
        return _block(_adapter(place))
    facts = _kind(place)
    auto, inputs = (facts.auto_class, facts.processor) if facts else ("AutoModel", "")
    found = inputs if any((place / name).exists() for name in _INPUT_FILES.get(inputs, ())) else ""
    lines = [f"from transformers import {', '.join(sorted(filter(None, (auto, found))))}", "", _MODEL_ID]
    lines.append(f'model = {auto}.from_pretrained(model_id, dtype="auto")')
    if found:
        variable = "tokenizer" if found == "AutoTokenizer" else "processor"
        lines.append(f"{variable} = {found}.from_pretrained(model_id)")
    return _block(lines)


_MODEL_ID = 'model_id = "."  # this directory'


def heads_section(place: Path) -> str | None:
    """Write a card's section on the heads beside a model, and how to attach one; None where there are none."""
    configs = {file.stem: _config(file) for file in sorted((place / HEADS).glob("*.json"))}
    if not configs:
        return None
    rows = [f"| `{name}` | {config['architectures'][0]} | {_labels(config)} |" for name, config in configs.items()]
    name, config = next(iter(configs.items()))
    auto = config["architectures"][0]
    code = [
        "from huggingface_hub import snapshot_download",
        "from safetensors.torch import load_file",
        f"from transformers import AutoConfig, {auto}",
        "",
        _MODEL_ID,
        'place = "." if model_id == "." else snapshot_download(model_id)',
        f'config = AutoConfig.from_pretrained(f"{{place}}/{HEADS}/{name}.json")',
        f"model = {auto}.from_pretrained(place, config=config)  # without a head: it comes next",
        f'model.load_state_dict(load_file(f"{{place}}/{HEADS}/{name}.safetensors"), strict=False)',
    ]
    table = "\n".join(["| head | class | labels |", "|---|---|---|", *rows])
    return (
        f"## Heads\n\nThe body is merged. Each expert's own head is in `{HEADS}/`, with the config to load it "
        f"by:\n\n{table}\n\n{_block(code)}"
    )


def _labels(config: dict[str, Any]) -> str:
    labels = [str(label).replace("|", "\\|") for label in (config.get("id2label") or {}).values()]
    return listed(labels, 10) if labels else ""


def _adapter(place: Path) -> list[str]:
    task = {
        "CAUSAL_LM": "AutoPeftModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
        "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    }.get(str(_config(place / "adapter_config.json").get("task_type")))
    if task is not None:
        return [f"from peft import {task}", "", _MODEL_ID, f"model = {task}.from_pretrained(model_id)"]
    return [
        "from peft import PeftModel",
        "",
        _MODEL_ID,
        "model = PeftModel.from_pretrained(base, model_id)  # base: the model that the adapter was made for, loaded",
    ]


def _block(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _config(file: Path) -> dict[str, Any]:
    return read_object(file, again="merge again") if file.exists() else {}
