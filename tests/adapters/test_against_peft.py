"""Every tensor of base + adapter is the one that peft's `merge_and_unload` saves."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from neuron_methods.adapters.loader import AdapterLoader
from tests.adapters import cases
from tests.adapters.cases import CASES, Made, lora, merge, rewrite, save_base, tensors, train


def open_made(made: Made) -> AdapterLoader:
    loader = LoaderCache().get(ModelReference.parse(str(made)))
    assert isinstance(loader, AdapterLoader)
    return loader


def check(made: Made, base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor], rounding: float = 1e-6) -> None:
    loader = open_made(made)
    assert set(loader.index.tensor_paths) == set(merged)
    for name, expected in merged.items():
        origin = base[loader.origin(name)]
        found = loader.get_tensor(name)
        assert loader.header(name) == (tuple(found.shape), found.dtype)
        torch.testing.assert_close(found.float(), expected.float(), rtol=rounding, atol=rounding)
        changed = not torch.equal(origin, expected)
        assert loader.touches(name) == (changed or name not in base), name
        task_vector = loader.task_vector(name)
        if changed:
            assert task_vector.dtype == torch.float32
            difference = expected.double() - origin.double()
            torch.testing.assert_close(task_vector.double(), difference, rtol=0, atol=rounding)
        else:
            assert task_vector is None
            assert torch.equal(found, origin)
            assert found.dtype == origin.dtype


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_peft(name: str, made) -> None:
    case, saved = CASES[name], made(name)
    check(saved, tensors(saved.base), tensors(saved.merged))
    # Told in the merge's notes where peft itself has to merge the adapter first.
    assert bool(open_made(saved).by_peft) != case.lazy


def test_untied_tensors_are_named(made) -> None:
    assert open_made(made("llama-tied-head-saved")).untied == {"lm_head.weight": "model.embed_tokens.weight"}
    # The embedding has values of its own now; the head keeps the base's.
    loader = open_made(made("llama-tied-embedding-saved"))
    assert loader.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    base = tensors(made("llama-tied-embedding-saved").base)["model.embed_tokens.weight"]
    assert torch.equal(loader.get_tensor("lm_head.weight"), base)
    assert not torch.equal(loader.get_tensor("model.embed_tokens.weight"), base)
    assert open_made(made("llama-ties-kept")).untied == {}


def test_task_vector_keeps_what_a_difference_of_weights_loses(tmp_path: Path) -> None:
    base = save_base(cases.llama(), tmp_path / "base", torch.bfloat16)
    adapter = train(base, lora(target_modules=["q_proj"])(), tmp_path / "adapter", scale=1e-3)
    loader = open_made(Made(base, adapter, base))
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = tensors(adapter)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    factors = [stored[f"{module}.lora_{part}.weight"].double() for part in "BA"]
    exact = factors[0] @ factors[1] * (6 / 4)
    relative = (loader.task_vector(name).double() - exact).norm() / exact.norm()
    by_difference = (loader.get_tensor(name) - tensors(base)[name].float()).double()
    assert relative < 1e-6
    assert (by_difference - exact).norm() / exact.norm() > 20 * relative


def test_bfloat16_base(tmp_path: Path) -> None:
    base = save_base(cases.llama(), tmp_path / "base", torch.bfloat16)
    adapter = train(base, lora(target_modules="all-linear")(), tmp_path / "adapter")
    merged = tensors(merge(base, adapter, tmp_path / "merged"))
    loader = open_made(Made(base, adapter, base))
    for name, expected in merged.items():
        found = loader.get_tensor(name)
        assert expected.dtype == torch.bfloat16
        assert found.dtype == (torch.float32 if loader.touches(name) else torch.bfloat16)
        # peft has rounded to bfloat16 what is handed out in float32 here.
        torch.testing.assert_close(found.to(torch.bfloat16), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adapter_saved_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(cases.llama(), tmp_path / "base")
    adapter = train(base, lora(target_modules=["q_proj"])(), tmp_path / "adapter")
    rewrite(adapter, lambda stored: {key: value.to(dtype) for key, value in stored.items()})
    saved = Made(base, adapter, merge(base, adapter, tmp_path / "merged"))
    check(saved, tensors(base), tensors(saved.merged))


def test_sharded_base(tmp_path: Path, made) -> None:
    saved = made("llama")
    cases.load(saved.base).save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    check(Made(tmp_path / "sharded", saved.adapter, saved.merged), tensors(saved.base), tensors(saved.merged))


def test_vit_adapter_with_the_names_of_transformers_4(tmp_path: Path, made) -> None:
    saved = made("vit")
    old = {
        "layers.": "encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "mlp.fc1": "intermediate.dense",
    }

    def rename(key: str) -> str:
        for new, name in old.items():
            key = key.replace(new, name)
        return key

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in saved.adapter.iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    rewrite(adapter, lambda stored: {rename(key): value for key, value in stored.items()})
    check(Made(saved.base, adapter, saved.merged), tensors(saved.base), tensors(saved.merged))


def test_vit_base_saved_with_the_names_in_memory(tmp_path: Path, made) -> None:
    saved = made("vit-dora")
    for model, path in ((saved.base, "base"), (saved.merged, "merged")):
        cases.load(model).save_pretrained(tmp_path / path, save_original_format=False)
    stored = tensors(tmp_path / "base")
    assert "vit.layers.0.attention.k_proj.weight" in stored
    check(Made(tmp_path / "base", saved.adapter, tmp_path / "merged"), stored, tensors(tmp_path / "merged"))


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("clip-vision", "")])
def test_checkpoint_without_or_with_another_prefix(name: str, prefix: str, tmp_path: Path, made) -> None:
    from safetensors.torch import save_file

    saved, other = made(name), tmp_path / "base"
    added = "" if prefix else "vision_model."

    def rename(path: Path) -> dict[str, torch.Tensor]:
        return {added + key.removeprefix(prefix): value for key, value in tensors(path).items()}

    other.mkdir()
    (other / "config.json").write_bytes((saved.base / "config.json").read_bytes())
    save_file(rename(saved.base), other / "model.safetensors", metadata={"format": "pt"})
    check(Made(other, saved.adapter, saved.merged), rename(saved.base), rename(saved.merged))


def test_copies_of_a_tied_tensor_change_together(tmp_path: Path, made) -> None:
    from safetensors.torch import save_file

    saved, other = made("llama-tokens"), tmp_path / "base"
    other.mkdir()
    (other / "config.json").write_bytes((saved.base / "config.json").read_bytes())

    def doubled(path: Path) -> dict[str, torch.Tensor]:
        stored = tensors(path)
        return {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}

    save_file(doubled(saved.base), other / "model.safetensors", metadata={"format": "pt"})
    check(Made(other, saved.adapter, saved.merged), doubled(saved.base), doubled(saved.merged))


def test_pickled_adapter_only_if_allowed(tmp_path: Path, made) -> None:
    from neuron_methods.support.errors import UserError

    saved, adapter = made("llama"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((saved.adapter / "adapter_config.json").read_bytes())
    torch.save(tensors(saved.adapter), adapter / "adapter_model.bin")
    pickled = Made(saved.base, adapter, saved.merged)
    with pytest.raises(UserError, match=r"adapter_model\.bin: a pickle file.*--lazy-unpickle"):
        open_made(pickled)
    LoaderCache().lazy_unpickle = True
    try:
        check(pickled, tensors(saved.base), tensors(saved.merged))
    finally:
        LoaderCache().lazy_unpickle = False


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING"),
        (peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "P_TUNING"),
    ],
)
def test_types_without_weights_to_merge_are_refused_by_name(config, kind: str, tmp_path: Path, made) -> None:
    from neuron_methods.support.errors import UserError

    base = made("llama").base
    adapter = train(base, config, tmp_path / "adapter")
    with pytest.raises(UserError, match=f"adapters of type {kind} change no weights"):
        open_made(Made(base, adapter, base))
