"""An adapter that cannot be merged into its base gets one line that says why and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from neuron_methods.support.errors import UserError
from tests.adapters import cases
from tests.adapters.cases import lora, rewrite, save_base, tensors, train


@pytest.fixture
def adapter(tmp_path: Path, made) -> Path:
    """A copy of a sound adapter."""
    return Path(shutil.copytree(made("llama").adapter, tmp_path / "adapter"))


@pytest.fixture
def refused(made) -> Callable[..., str]:
    def refuse(adapter: object, base: Path | None = None) -> str:
        with pytest.raises(UserError) as caught:
            LoaderCache().get(ModelReference.parse(f"{base or made('llama').base}+{adapter}"))
        message = str(caught.value)
        assert str(adapter) in message
        assert "\n" not in message
        assert ";" in message  # what was found; what to do
        return message

    return refuse


def test_another_architecture(adapter: Path, made, refused) -> None:
    message = refused(adapter, made("t5").base)
    assert "an adapter of another architecture: none of its 14 modules" in message
    assert "model.layers.0.mlp.down_proj" in message
    assert str(made("t5").base) in message


def test_another_base_size(adapter: Path, tmp_path: Path, refused) -> None:
    wider = save_base(cases.llama(intermediate_size=32), tmp_path / "wider")
    message = refused(adapter, wider)
    assert "an adapter of another base size" in message
    assert "mlp" in message
    assert "24" in message
    assert "32" in message


def test_target_modules_missing_in_the_base(adapter: Path, tmp_path: Path, refused) -> None:
    shallow = save_base(cases.llama(num_hidden_layers=1), tmp_path / "shallow")
    message = refused(adapter, shallow)
    assert "target modules missing in the base: model.layers.1." in message
    assert "7 of 14" in message


def test_a_head_that_the_base_does_not_have(tmp_path: Path, made, refused) -> None:
    base = made("llama").base
    adapter = train(base, lora(target_modules=["q_proj"])(), tmp_path / "adapter")
    score = torch.randn(3, 16)
    rewrite(adapter, lambda stored: {**stored, "base_model.model.score.weight": score})
    assert "target modules missing in the base: score (1 of 3" in refused(adapter)


def test_a_module_to_save_that_is_not_in_the_file(tmp_path: Path, made, refused) -> None:
    base = made("llama").base
    adapter = train(base, lora(target_modules=["q_proj"], modules_to_save=["lm_head"])(), tmp_path / "adapter")
    rewrite(adapter, lambda stored: {key: value for key, value in stored.items() if "lm_head" not in key})
    assert "adapter_config.json names lm_head, and the file holds no tensors for it" in refused(adapter)


def test_a_targeted_module_that_is_not_in_the_file(adapter: Path, refused) -> None:
    rewrite(adapter, lambda stored: {key: value for key, value in stored.items() if "layers.1.mlp.up_proj" not in key})
    assert "adapter_config.json names model.layers.1.mlp.up_proj, and the file" in refused(adapter)


@pytest.mark.parametrize("options", [{"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.self_attn.q_proj"]}])
def test_what_the_config_leaves_out_is_not_missed(options: dict, tmp_path: Path, made) -> None:
    base = made("llama").base
    saved = lora(target_modules=["q_proj"], modules_to_save=["layernorm"], **options)()
    adapter = train(base, saved, tmp_path / "adapter")
    LoaderCache().get(ModelReference.parse(f"{base}+{adapter}"))


def test_rank_mismatch_between_factors(adapter: Path, refused) -> None:
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    rewrite(adapter, lambda stored: {**stored, key: stored[key][:, :3]})
    message = refused(adapter)
    assert "rank mismatch" in message
    assert key in message
    assert "[16, 3]" in message


def test_a_factor_without_the_other(adapter: Path, refused) -> None:
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    rewrite(adapter, lambda stored: {k: v for k, v in stored.items() if k != key})
    assert "its lora_B is not" in refused(adapter)


def test_a_rank_that_the_config_does_not_know(adapter: Path, refused) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    message = refused(adapter)
    assert "has rank 4, but adapter_config.json says 8" in message


def test_a_config_without_weights(adapter: Path, refused) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused(adapter)


def test_weights_without_a_config(adapter: Path, refused) -> None:
    (adapter / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refused(adapter)


def test_no_adapter_at_all(tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "neither a directory nor a repository" in refused(tmp_path / "nothing")


@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_truncated_file(size: int, adapter: Path, refused) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    message = refused(adapter)
    assert str(file) in message
    assert "truncated or not a safetensors file" in message


def resized(stored: dict[str, Tensor], keys: str) -> dict[str, Tensor]:
    return {k: torch.cat([v, v[:2]]) if keys in k and v.shape[0] == 40 else v for k, v in stored.items()}


def test_a_resized_vocabulary(tmp_path: Path, made, refused) -> None:
    base = made("llama").base
    saved = train(base, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])(), tmp_path / "saved")
    rewrite(saved, lambda stored: resized(stored, "embed_tokens"))
    message = refused(saved)
    assert "trained on a resized vocabulary" in message
    assert "42 tokens" in message
    assert "40" in message


def test_a_resized_vocabulary_as_peft_saves_it(tmp_path: Path, made, refused) -> None:
    """peft stores both embeddings whole once their size differs from the base's config."""
    base = made("llama").base
    model = cases.load(base)
    model.resize_token_embeddings(42)
    adapted = peft.get_peft_model(model, lora(target_modules=["q_proj"])())
    adapted.save_pretrained(tmp_path / "adapter")
    assert tensors(tmp_path / "adapter")["base_model.model.lm_head.weight"].shape[0] == 42
    assert "trained on a resized vocabulary" in refused(tmp_path / "adapter")


def test_lora_on_a_resized_embedding(tmp_path: Path, made, refused) -> None:
    base = made("llama").base
    model = cases.load(base)
    model.resize_token_embeddings(42)
    adapted = peft.get_peft_model(model, lora(target_modules=["embed_tokens"])())
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert "trained on a resized vocabulary" in refused(tmp_path / "adapter")


def test_a_bias_for_a_module_without_one(tmp_path: Path, made, refused) -> None:
    base = made("llama").base
    adapter = train(base, lora(target_modules=["q_proj"], lora_bias=True)(), tmp_path / "adapter")
    assert "a bias for a module without one" in refused(adapter)


def test_tokens_beyond_the_vocabulary(tmp_path: Path, made, refused) -> None:
    adapter = train(
        made("llama").base, lora(target_modules=["q_proj"], trainable_token_indices=[1, 2])(), tmp_path / "a"
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": [1, 99]}))
    assert "trainable_token_indices" in refused(adapter)


def test_more_layers_than_the_base(adapter: Path, refused) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": [[0, 2], [1, 2]]}))
    assert "layer_replication gives the base more layers" in refused(adapter)


def test_an_unknown_type(adapter: Path, refused) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NEXT_YEAR_S"}))
    message = refused(adapter)
    assert "type NEXT_YEAR_S are unknown to this version of peft" in message


def test_a_quantised_base(adapter: Path, tmp_path: Path, made, refused) -> None:
    from safetensors.torch import save_file

    base = Path(shutil.copytree(made("llama").base, tmp_path / "base"))
    stored = {name: t.to(torch.uint8) if "q_proj" in name else t for name, t in tensors(base).items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    message = refused(adapter, base)
    assert "stored as uint8" in message


def test_what_peft_itself_cannot_merge(adapter: Path, refused) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [1, 2]}))
    assert "peft cannot merge this LORA adapter" in refused(adapter)
