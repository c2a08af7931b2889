"""NaN and Inf where scores are computed: one line that names the model and what of it, in every command."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuron_methods.cli import main
from neuron_methods.support.finite import check_finite, is_finite, largest
from tests.support.byte_llama import byte_llama, byte_tokenizer
from tests.support.checkpoints import configuration, edit, fine_tune

UP = "model.layers.1.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
TASKS = {
    "perplexity": "",
    "multiple-choice": ", columns: {input: text, label: answer, choices: choices}",
    "generation": ", columns: {input: text, target: answer}",
}


def adapter(name: str) -> None:
    adapted = get_peft_model(byte_llama(), LoraConfig(r=2, target_modules=["up_proj"]))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """base, expert-a, expert-b; nan and inf hold such an entry, huge overflows as it computes; adapters; rows."""
    folder, before = tmp_path_factory.mktemp("nan"), Path.cwd()
    os.chdir(folder)
    for number, name in enumerate(("base", "expert-a", "expert-b")):
        (fine_tune(byte_llama(), number) if number else byte_llama()).save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    for name in ("nan", "inf", "huge"):
        shutil.copytree("base", name)
    edit(Path("nan"), lambda tensors: tensors[UP].__setitem__((2, 3), math.nan))
    edit(Path("inf"), lambda tensors: tensors[UP].__setitem__((2, 3), math.inf))
    edit(Path("huge"), lambda tensors: tensors.update({k: v * 1e30 for k, v in tensors.items() if "mlp" in k}))
    for name in ("lora-a", "lora-b"):
        adapter(name)
    shutil.copytree("lora-a", "lora-nan")
    weights = load_file("lora-nan/adapter_model.safetensors")
    weights[LORA][0, 0] = math.nan
    save_file(weights, "lora-nan/adapter_model.safetensors", {"format": "pt"})
    row = {"text": "the cat sat on the mat", "answer": "cat", "choices": ["cat", "dog"]}
    Path("rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    for kind, columns in TASKS.items():
        Path(f"{kind}.yml").write_text(f"tasks:\n- {{name: x, kind: {kind}, data: rows.jsonl{columns}}}\n")
    yield folder
    os.chdir(before)


def error_of(*arguments: str) -> str:
    before = os.listdir()
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 1, result.output
    assert {name for name in os.listdir() if not name.endswith(".work")} == {*before}  # work to go on with may stay
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "unexpected" not in line
    return line


BROKEN = [
    ("nan", f"model nan: {UP} holds NaN or Inf"),
    ("inf", f"model inf: {UP} holds NaN or Inf"),
    ("base+lora-nan", f"model base+lora-nan: the adapter: {LORA} holds NaN or Inf"),
]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize(
    ("model", "said"), [*BROKEN, ("huge", "task 'x': in the batch that begins with row 1 the model's output is NaN")]
)
def test_no_score_is_made_of_nan(models: Path, kind: str, model: str, said: str) -> None:
    assert said in error_of("evaluate", model, "--task", f"{kind}.yml")


@pytest.mark.parametrize("gradients", [[], ["--gradients"]])
@pytest.mark.parametrize(("model", "said"), [*BROKEN, ("huge", "'x' (rows.jsonl): neuron 0 of layers.0 came out")])
def test_no_statistic_is_made_of_nan(models: Path, gradients: list[str], model: str, said: str) -> None:
    assert said in error_of("profile", model, "--data", "x=rows.jsonl", "-o", "p.safetensors", *gradients)


@pytest.mark.parametrize("method", ["neuro_merging", "min_merging", "linear", "ties", "linearity"])
@pytest.mark.parametrize("model", ["nan", "inf", "base+lora-nan"])
def test_no_merge_is_made_of_nan(models: Path, method: str, model: str) -> None:
    of_all = {"weight": 1.0, "density": 0.5} if method == "ties" else {}
    command = ("linearity",) if method == "linearity" else ("merge",)
    source = configuration("neuro_merging" if method == "linearity" else method, parameters=of_all)
    Path("merge.yml").write_text(source.replace("expert-a", model))
    line = error_of(*command, "merge.yml", *(() if method == "linearity" else ("out",)))
    assert model in line
    assert ("layers.0" if "lora" in model else UP) in line


@pytest.mark.parametrize(
    ("base", "expert", "said"),
    [
        ("nan", "lora-a", f"r.yml: base_model: {UP} holds NaN or Inf"),
        ("base", "lora-nan", f"{LORA} holds NaN or Inf"),
        ("huge", "lora-a", "r.yml: base_model: on sample 1 of a its hidden states are NaN or Inf"),
    ],
)
def test_no_router_is_trained_on_nan(models: Path, base: str, expert: str, said: str) -> None:
    data = {"source": "rows.jsonl", "columns": {"text": "text"}}
    experts = [{"name": "a", "adapter": expert, "data": data}, {"name": "b", "adapter": "lora-b", "data": data}]
    Path("r.yml").write_text(json.dumps({"base_model": base, "check_base": False, "experts": experts}))
    assert said in error_of("route", "r.yml", "routed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_largest_magnitude(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, -5.0], [2.0, 0.0]], dtype=dtype, requires_grad=True)
    assert largest(tensor) == 5.0
    for broken in (math.nan, math.inf, -math.inf):
        for place in range(4):
            values: Tensor = tensor.detach().clone()
            values.view(-1)[place] = broken
            assert not is_finite(values)
    assert largest(tensor[:0]) == largest(torch.tensor([1, 2])) == 0.0
    check_finite([("elsewhere", torch.empty(3, device="meta"))], "x")
