"""Files that look odd and are sound: what users really have is not refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from neuron_methods.adapters.config import AdapterConfig
from neuron_methods.data.classes import class_index
from tests.support.formats import instead, run, said

MERGE, SCORE = ("merge", "merge.yml", "out"), ("evaluate", "base+adapter", "--task", "tasks.yml", "--force")
ADAPTED = (("merge", "adapters.yml", "out"), SCORE, ("verify", "adapter"))
CONFIG, LORA = "base/config.json", "adapter/adapter_config.json"


pytestmark = pytest.mark.usefixtures("among_formats")


def passes(*command: str) -> None:
    result = run(*command)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [MERGE, SCORE])
@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("label2id",), {"cat": "0", "dog": "1"}),  # as transformers' own example of image classification writes it
        (("time_step_limit",), [0.0, float("inf")]),  # of Mamba
        (("tokenizer_model_max_length",), 10**30),  # of the first LLaVA
    ],
)
def test_what_sound_configs_say(keys: tuple[str, ...], value: Any, command: tuple[str, ...]) -> None:
    with instead(CONFIG, said(CONFIG, *keys, value=value)):
        passes(*command)


def test_labels_are_found_whose_numbers_are_texts() -> None:
    config = transformers.ViTConfig(id2label={0: "cat", 1: "dog"}, label2id={"cat": "0", "dog": "1"})
    assert [class_index(label, None, config) for label in ("dog", 1, "cow", "1")] == [1, 1, None, None]


@pytest.mark.parametrize("name", ["/models/ein Modell", "/模型/基\u3000础", "/a\u00a0b"])
def test_names_of_bases_may_hold_spaces_of_any_kind(name: str) -> None:
    with instead(LORA, said(LORA, "base_model_name_or_path", value=name)):
        for command in ADAPTED:
            passes(*command)


def test_an_adalora_is_read_with_the_ranks_that_are_left(tmp_path: Path) -> None:
    """Its rank_pattern holds lists, which peft alone reads."""
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10)
    adapted = peft.get_peft_model(model, config)
    names = [name for name, _ in adapted.base_model.model.named_parameters() if "lora_E" in name]
    left = {name: [True, False, True, False] for name in names}
    adapted.peft_config["default"].rank_pattern = left
    adapted.save_pretrained(tmp_path / "adapter")
    read = AdapterConfig.read(str(tmp_path / "adapter"))
    assert read.peft_type == "ADALORA" and "merged by peft itself" in str(read.needs_peft()) and not read.rank_pattern


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.bin", "notes.txt", "LICENSE.txt", "trainer_state.json"]
)
def test_links_among_what_no_library_opens_are_in_nobodys_way(name: str) -> None:
    link = Path("expert-a", name)
    link.symlink_to("/nowhere/to/be/found")
    try:
        for command in (MERGE, ("evaluate", "expert-a", "--task", "tasks.yml", "--force"), ("verify", "expert-a")):
            passes(*command)
    finally:
        link.unlink()
