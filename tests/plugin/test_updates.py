"""What a merge would change, tensor by tensor, refuses what the merge itself refuses."""

import shutil

import pytest
import torch

from neuron_methods.plugin.updates import plan_updates
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import build, configuration, edit, read, save

UP = "model.layers.1.mlp.up_proj.weight"

ACCIDENTS = {
    "a path that is not there": (
        lambda folder: shutil.rmtree(folder / "expert-a"),
        "model expert-a: no such directory here",
    ),
    "another layout": (
        lambda folder: save(build("llama-tied", attention_bias=True), folder / "expert-b"),
        "expert-b: its layers have model.layers.{i}.self_attn.q_proj.bias, which those of base lack",
    ),
    "a missing tensor": (
        lambda folder: edit(folder / "expert-b", lambda tensors: tensors.pop(UP)),
        f"expert-b: tensor {UP} is missing from its checkpoint",
    ),
    "another shape": (
        lambda folder: edit(folder / "expert-b", lambda tensors: tensors.update({UP: torch.zeros(3, 16)})),
        f"{UP}: shapes differ: expert-b has [3, 16], base has [24, 16]",
    ),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_what_the_merge_would_refuse_is_refused(workspace, monkeypatch, accident):
    happen, message = ACCIDENTS[accident]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    happen(workspace("llama-tied"))
    with pytest.raises(UserError) as caught:
        plan_updates(configuration(), "merge.yaml")
    assert message in str(caught.value)


def test_without_a_base_there_is_no_update(workspace):
    workspace("llama-tied")
    with pytest.raises(UserError, match=r"merge.yaml: no base_model; an update is the difference to a base"):
        plan_updates(configuration("linear"), "merge.yaml")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_updates_are_those_of_the_weights(workspace, dtype):
    folder = workspace("llama-tied")
    parameters = {"weight": 0.5}
    planned = plan_updates(configuration("task_arithmetic", parameters=parameters, dtype=dtype))
    assert (str(planned.base), planned.method) == ("base", "task_arithmetic")
    base = read(folder / "base")
    assert set(planned.names) == set(base)
    updates = planned.of(UP)
    taken = {name: read(folder / name)[UP] - base[UP] for name in ("expert-a", "expert-b")}
    assert torch.equal(updates.base, base[UP])
    assert updates.weights == {"expert-a": 0.5, "expert-b": 0.5}
    for name, update in taken.items():
        torch.testing.assert_close(updates.experts[name], update)
    torch.testing.assert_close(updates.merged, 0.5 * sum(taken.values()), atol=1e-6, rtol=1e-5)
