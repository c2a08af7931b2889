"""The table of families, proven on tiny models: what it calls a neuron's is all of the neuron and nothing else."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from neuron_methods.neurons import NeuronMap, find_modules, neuron_map
from neuron_methods.neurons.families import FAMILIES
from neuron_methods.support.errors import UserError

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
DECODER = {**LAYERS, **TOKENS, "num_key_value_heads": 1, "head_dim": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3, "vocab_size": 32}
VISION = {**LAYERS, "image_size": 8, "patch_size": 4, "num_labels": 3, "encoder_stride": 4}
CLIP_TEXT = {**LAYERS, **TOKENS, "max_position_embeddings": 8, "projection_dim": 8}
CLIP_VISION = {**VISION, "intermediate_size": 20, "num_hidden_layers": 3, "projection_dim": 8}

IDS = torch.tensor([[3, 4, 5, 1], [6, 7, 8, 1]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
TEXT, IMAGE = {"input_ids": IDS}, {"pixel_values": PIXELS}
SEQ2SEQ = {"input_ids": IDS, "decoder_input_ids": IDS.flip(0)}
INNER = {"mlp_bias": True, "use_bias": True}

StateDict = dict[str, torch.Tensor]


@dataclass
class Case:
    """A kind of model: its class, its config, what its forward takes, and how its saved weights are spelled."""

    architecture: str
    config: transformers.PretrainedConfig
    inputs: dict[str, torch.Tensor]
    label: str = ""
    save: dict = field(default_factory=dict)
    renamed: tuple[str, str] | None = None  # part of the names on disk -> its other spelling

    def __str__(self) -> str:
        return self.architecture + self.label

    def build(self) -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        model = getattr(transformers, self.architecture)(deepcopy(self.config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
        return model.eval()

    def checkpoint(self, folder: Path) -> StateDict:
        """Save the model as this kind is stored, and read its tensors back."""
        self.build().save_pretrained(folder, **self.save)
        tensors = load_file(folder / "model.safetensors")
        if self.renamed:
            tensors = {name.replace(*self.renamed): tensor for name, tensor in tensors.items()}
        return tensors


def decoder(name: str, config_name: str = "", architecture: str = "", **config) -> Case:
    config_class = getattr(transformers, (config_name or name) + "Config")
    return Case(
        architecture or name + "ForCausalLM", config_class(**{**DECODER, **config}), TEXT, "-bias" if config else ""
    )


def t5(architecture: str, feed_forward: str) -> Case:
    family = architecture[: architecture.index("T5") + 2]
    config = getattr(transformers, family + "Config")(**T5, feed_forward_proj=feed_forward)
    return Case(architecture, config, TEXT if "Encoder" in architecture or "Token" in architecture else SEQ2SEQ)


def vit(architecture: str, **how) -> Case:
    config_class = transformers.DeiTConfig if architecture.startswith("DeiT") else transformers.ViTConfig
    return Case(architecture, config_class(**VISION), IMAGE, "-renamed" if how else "", **how)


def clip(architecture: str, **how) -> Case:
    both = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=8, num_labels=3)
    label = "-prefixed" if how else ""
    if "Text" in architecture:
        return Case(architecture, both.text_config, TEXT, label, **how)
    if "Vision" in architecture:
        return Case(architecture, both.vision_config, IMAGE, label, **how)
    return Case(architecture, both, {**IMAGE, **TEXT} if architecture == "CLIPModel" else IMAGE)


CASES = [
    *(decoder(name) for name in ("Llama", "Mistral", "Ministral", "Ministral3", "Qwen2", "Qwen3", "Gemma", "Gemma2")),
    decoder("Gemma3", "Gemma3Text"),
    *(decoder(name) for name in ("StableLm", "Cohere", "Cohere2", "Olmo", "Olmo2", "Olmo3", "Granite", "SmolLM3")),
    *(decoder(name) for name in ("SeedOss", "Exaone4", "Helium", "HunYuanDenseV1", "Ernie4_5", "Phi3", "Glm", "Glm4")),
    *(decoder(name) for name in ("Arcee", "Apertus", "Nemotron", "Lfm2", "Phi", "Starcoder2", "GPTNeoX")),
    *(decoder(name, **INNER) for name in ("Llama", "Granite", "Arcee", "Nemotron", "Ernie4_5", "Starcoder2")),
    decoder("Llama", architecture="LlamaModel"),
    decoder("Llama", architecture="LlamaForSequenceClassification"),
    decoder("Lfm2", intermediate_size=40, block_auto_adjust_ff_dim=True, block_multiple_of=8),
    decoder("GPT2", architecture="GPT2LMHeadModel"),
    decoder("GPT2", architecture="GPT2Model"),
    *(t5("T5ForConditionalGeneration", form) for form in ("relu", "gated-gelu")),
    *(t5(f"{family}T5ForConditionalGeneration", "gated-gelu") for family in ("M", "UM")),
    *(t5(f"T5{head}", "relu") for head in ("Model", "EncoderModel", "ForTokenClassification", "ForQuestionAnswering")),
    *(vit(name) for name in ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling")),
    *(vit(name) for name in ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")),
    vit("ViTForImageClassification", save={"save_original_format": False}),
    *(clip(name) for name in ("CLIPModel", "CLIPForImageClassification", "CLIPVisionModel", "CLIPTextModel")),
    *(clip(name) for name in ("CLIPVisionModelWithProjection", "CLIPTextModelWithProjection")),
    clip("CLIPVisionModel", renamed=("encoder.layers", "vision_model.encoder.layers")),
]
everyone = pytest.mark.parametrize("case", CASES, ids=str)


def outputs(model: transformers.PreTrainedModel, case: Case) -> torch.Tensor:
    """Everything the model answers, as one vector."""
    with torch.no_grad():
        answer = model(**case.inputs, **({"use_cache": False} if "input_ids" in case.inputs else {}))
    assert all(torch.isfinite(value).all() for value in answer.to_tuple() if isinstance(value, torch.Tensor))
    return torch.cat([value.flatten() for value in answer.to_tuple() if isinstance(value, torch.Tensor)])


def from_disk(case: Case, tensors: StateDict, folder: Path) -> transformers.PreTrainedModel:
    """The model that transformers makes of edited tensors, spelled as they are."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return getattr(transformers, case.architecture).from_pretrained(folder).eval()


def permuted(neurons: NeuronMap, tensors: StateDict, roles: set[str]) -> StateDict:
    """The tensors with the neurons of every layer in another order, in the slices of the given roles."""
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        owner = neurons.owner_of(name)
        if owner is None:
            continue
        order = torch.randperm(owner.layer.neurons, generator=torch.Generator().manual_seed(owner.layer.index))
        for role, offset in owner.roles:
            if role in roles:
                target = torch.arange(owner.layer.neurons) + offset
                result[name].index_copy_(owner.axis, target, tensor.index_select(owner.axis, order + offset))
    return result


def zeroed(neurons: NeuronMap, tensors: StateDict, ablated: list[int], without: tuple[str, ...] = ()) -> StateDict:
    """The tensors with every slice zeroed that the neurons `ablated` of each layer own."""
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in result.items():
        owner = neurons.owner_of(name)
        if owner is not None and owner.role not in without:
            for _, offset in owner.roles:
                tensor.index_fill_(owner.axis, torch.tensor(ablated) + offset, 0)
    return result


def in_memory(case: Case) -> tuple[transformers.PreTrainedModel, NeuronMap]:
    model = case.build()
    return model, neuron_map(model.config, case.architecture)


@everyone
def test_permuting_neurons_of_a_checkpoint_leaves_the_model_unchanged(case, tmp_path):
    before = outputs(case.build(), case)
    tensors = case.checkpoint(tmp_path)
    neurons = neuron_map(transformers.AutoConfig.from_pretrained(tmp_path))

    whole = permuted(neurons, tensors, {"gate", "up", "bias", "down"})
    torch.testing.assert_close(outputs(from_disk(case, whole, tmp_path), case), before, rtol=1e-4, atol=1e-5)

    owned = {name for name in tensors if neurons.owner_of(name)}
    parts = {part.tensor for layer in neurons.layers for part in layer.parts}
    if case.save or case.renamed:
        assert len(owned) == len(parts)
    else:  # the spelling that transformers writes for this architecture comes first
        assert owned == parts
    for name in owned:
        owner = neurons.owner_of(name)
        assert tensors[name].shape[owner.axis] == owner.layer.neurons * len(owner.roles)


@everyone
def test_each_role_matters_to_the_permutation(case):
    model, neurons = in_memory(case)
    before, intact = outputs(model, case), model.state_dict()
    intact = {name: tensor.clone() for name, tensor in intact.items()}
    for role in {part.role for layer in neurons.layers for part in layer.parts}:
        model.load_state_dict(permuted(neurons, intact, {role}))
        assert (outputs(model, case) - before).abs().max() > 1e-3, role


@everyone
def test_zeroing_what_neurons_own_equals_ablating_their_activation(case):
    model, neurons = in_memory(case)
    before, ablated = outputs(model, case), [1, 5, 6]

    handles = [
        find_modules(model, layer).down.register_forward_pre_hook(
            lambda _, args: (args[0].index_fill(-1, torch.tensor(ablated), 0), *args[1:])
        )
        for layer in neurons.layers
    ]
    expected = outputs(model, case)
    for handle in handles:
        handle.remove()
    model.load_state_dict(zeroed(neurons, model.state_dict(), ablated))

    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(outputs(model, case), expected, rtol=1e-4, atol=1e-5)


@everyone
def test_an_activation_depends_on_what_its_own_neuron_reads_with(case):
    """Zeroing gate, up and bias of neuron 2 silences feature 2 of the first layer's down projection, no other."""
    model, neurons = in_memory(case)
    first, seen = neurons.layers[0], []
    modules = find_modules(model, first)
    assert (modules.gate is not None) == first.gated
    modules.down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).clone()))

    outputs(model, case)
    model.load_state_dict(zeroed(neurons, model.state_dict(), [2], without=("down",)))
    outputs(model, case)

    before, after = seen
    assert before.shape[-1] == first.neurons
    assert (before != after).any(0).nonzero().flatten().tolist() == [2]
    assert after[:, 2].abs().max() < 1e-5  # xIELU is 0 at 0 but for its epsilon


def test_the_table_is_tested():
    """Families that transformers itself can build all occur above."""
    known_by_name_alone = {"baichuan", "solar", "stablelm_epoch", "internlm2", "exaone", "qwen"}
    assert {case.config.model_type for case in CASES} == set(FAMILIES) - known_by_name_alone


def test_families_without_a_transformers_model_are_known_by_name():
    for model_type, up in (
        ("baichuan", "model.layers.1.mlp.up_proj.weight"),
        ("solar", "model.layers.1.mlp.up_proj.weight"),
        ("stablelm_epoch", "model.layers.1.mlp.up_proj.weight"),
        ("internlm2", "model.layers.1.feed_forward.w3.weight"),
        ("exaone", "transformer.h.1.mlp.c_fc_1.weight"),
        ("qwen", "transformer.h.1.mlp.w1.weight"),
    ):
        config = transformers.PretrainedConfig(**LAYERS)
        config.model_type = model_type
        owner = neuron_map(config).owner_of(up)
        assert (owner.layer.index, owner.role, owner.axis) == (1, "up", 0)
        assert owner.layer.neurons == (12 if model_type == "qwen" else 24)


def test_keys_and_order():
    keys = [layer.key for layer in neuron_map(transformers.T5Config(**T5)).layers]
    assert keys == [f"encoder.block.{i}" for i in range(2)] + [f"decoder.block.{i}" for i in range(3)]
    clip_config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION)
    assert neuron_map(clip_config).neurons == {
        **{f"text_model.encoder.layers.{i}": 24 for i in range(2)},
        **{f"vision_model.encoder.layers.{i}": 20 for i in range(3)},
    }
    llama = neuron_map(transformers.LlamaConfig(**DECODER)).layers
    assert [(layer.key, layer.index) for layer in llama] == [("layers.0", 0), ("layers.1", 1)]


def test_what_belongs_to_no_neuron_has_no_owner():
    vit_map = neuron_map(transformers.ViTConfig(**VISION))
    assert vit_map.owner_of("vit.encoder.layer.0.output.dense.bias") is None
    assert vit_map.owner_of("vit.encoder.layer.0.attention.output.dense.weight") is None
    assert vit_map.owner_of("vit.encoder.layer.2.output.dense.weight") is None
    assert neuron_map(transformers.LlamaConfig(**DECODER)).owner_of("model.layers.0.mlp.up_proj.bias") is None


def test_an_unknown_family_is_told_how_to_become_known():
    with pytest.raises(UserError, match=r"'mamba' has no entry in neuron_methods/neurons/families\.py.*FAMILIES"):
        neuron_map(transformers.MambaConfig())


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_mixtures_of_experts_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match="mixtures of experts"):
        neuron_map(getattr(transformers, name + "Config")())
