"""Every architecture of ours, merged by mergekit's own methods and loaded by plain transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import mergekit.architecture.auto
import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from neuron_methods.plugin.patches import register

StateDict = dict[str, torch.Tensor]

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**LAYERS, "image_size": 8, "patch_size": 4}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3}
CLIP_TEXT = {**LAYERS, "vocab_size": 32, "max_position_embeddings": 8, "projection_dim": 8}
CLIP_VISION = {**VISION, "num_hidden_layers": 3, "projection_dim": 8}
LLAMA = {**LAYERS, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1}

TOKENS = torch.tensor([[3, 4, 5, 1], [6, 7, 8, 1]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
SEQ2SEQ = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


@dataclass
class Case:
    """A kind of checkpoint: the class, the config it is built from, and what its forward takes."""

    architecture: str
    config: transformers.PretrainedConfig
    inputs: dict[str, torch.Tensor]
    arguments: dict = field(default_factory=dict)
    untied: bool = False
    label: str = ""

    def __str__(self) -> str:
        return f"{self.architecture}{'-' if self.label else ''}{self.label}"

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.architecture)

    def build(self, seed: int) -> transformers.PreTrainedModel:
        """A model whose every parameter is random, biases and norms too, and depends on `seed`."""
        model = self.model_class(self.config, **self.arguments)
        if self.untied:
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.eval()


def t5(architecture: str, feed_forward: str = "gated-gelu", **case) -> Case:
    family = architecture[: architecture.index("T5") + 2]
    config = getattr(transformers, f"{family}Config")(vocab_size=32, feed_forward_proj=feed_forward, **T5)
    one_input = "Encoder" in architecture or "Token" in architecture
    return Case(architecture, config, {"input_ids": TOKENS} if one_input else SEQ2SEQ, **case)


def vit(architecture: str, label: str = "", arguments: dict | None = None, **config) -> Case:
    config_class = transformers.DeiTConfig if architecture.startswith("DeiT") else transformers.ViTConfig
    values = {**VISION, "encoder_stride": 4, "num_labels": 3, **config}
    return Case(architecture, config_class(**values), {"pixel_values": PIXELS}, arguments or {}, label=label)


def clip(architecture: str) -> Case:
    both = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=8)
    if "Vision" in architecture:
        return Case(architecture, both.vision_config, {"pixel_values": PIXELS})
    if "Text" in architecture:
        return Case(architecture, both.text_config, {"input_ids": TOKENS})
    inputs = {"pixel_values": PIXELS} | ({"input_ids": TOKENS} if architecture == "CLIPModel" else {})
    return Case(architecture, both, inputs)


def decoder(architecture: str, label: str, **config) -> Case:
    name = architecture.split("For")[0].replace("Gemma3", "Gemma3Text") + "Config"
    values = {**LLAMA, "vocab_size": 32, "tie_word_embeddings": False, **config}
    return Case(architecture, getattr(transformers, name)(**values), {"input_ids": TOKENS}, label=label)


T5_CASES = [
    t5(family + suffix)
    for family in ("T5", "MT5", "UMT5")
    for suffix in (
        "ForConditionalGeneration",
        "EncoderModel",
        "Model",
        "ForQuestionAnswering",
        "ForTokenClassification",
        "ForSequenceClassification",
    )
] + [
    t5("T5ForConditionalGeneration", "relu", label="v1.0"),
    t5("T5ForConditionalGeneration", "gated-gelu", label="untied", untied=True),
    t5("MT5ForConditionalGeneration", "relu", label="ungated"),
    t5("UMT5ForConditionalGeneration", "gated-gelu", label="untied", untied=True),
    t5("T5EncoderModel", "relu", label="v1.0"),
]
VIT_CASES = [
    vit("ViTModel"),
    vit("ViTModel", "no-pooler", {"add_pooling_layer": False}),
    vit("ViTModel", "no-qkv-bias", qkv_bias=False),
    vit("ViTForImageClassification"),
    vit("ViTForImageClassification", "no-head", num_labels=0),
    vit("ViTForMaskedImageModeling"),
    vit("DeiTModel"),
    vit("DeiTModel", "no-pooler", {"add_pooling_layer": False}),
    vit("DeiTForImageClassification"),
    vit("DeiTForImageClassification", "no-qkv-bias", qkv_bias=False),
    vit("DeiTForImageClassificationWithTeacher"),
    vit("DeiTForMaskedImageModeling"),
]
CLIP_CASES = [
    clip("CLIPModel"),
    clip("CLIPForImageClassification"),
    clip("CLIPVisionModel"),
    clip("CLIPVisionModelWithProjection"),
    clip("CLIPTextModel"),
    clip("CLIPTextModelWithProjection"),
]
DECODER_CASES = [
    decoder("LlamaForCausalLM", "plain"),
    decoder("LlamaForCausalLM", "attention-bias", attention_bias=True),
    decoder("LlamaForCausalLM", "all-biases-tied", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    decoder("LlamaForSequenceClassification", "attention-bias", attention_bias=True),
    decoder("Qwen3ForCausalLM", "attention-bias", attention_bias=True),
    decoder("GemmaForCausalLM", "untied", attention_bias=True),
    decoder("GemmaForCausalLM", "tied", tie_word_embeddings=True),
    decoder("Gemma2ForCausalLM", "attention-bias", attention_bias=True),
    decoder("Gemma3ForCausalLM", "attention-bias", attention_bias=True),
    decoder("Phi3ForCausalLM", "untied"),
    decoder("Phi3ForCausalLM", "tied", tie_word_embeddings=True),
]


@pytest.fixture(autouse=True)
def _our_definitions_only(monkeypatch):
    """Our definitions, no loader left from an earlier merge, and no inference where a definition is wanted."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("mergekit inferred the architecture")

    register()
    monkeypatch.setattr(mergekit.architecture, "infer_architecture_info", refuse)
    LoaderCache.loaders.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a few hundred numbers
    yield
    torch.set_num_threads(threads)
    LoaderCache.loaders.clear()


def save(models: list[transformers.PreTrainedModel], directory: Path) -> list[Path]:
    paths = [directory / name for name in ("base", "expert_1", "expert_2")]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path)
    return paths


def merge(method: str, paths: list[Path], out: Path, **keys) -> StateDict:
    """Merge the experts with weights 0.5 and 0.25 (normalized to 2/3 and 1/3 by `linear`); the tensors on disk."""
    base, *experts = map(str, paths)
    if method != "linear":
        keys["base_model"] = base
    models = [
        {"model": expert, "parameters": {"weight": weight}} for expert, weight in zip(experts, (0.5, 0.25), strict=True)
    ]
    config = MergeConfiguration.model_validate({"merge_method": method, "models": models, **keys})
    run_merge(config, str(out), MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True))
    return on_disk(out)


def on_disk(path: Path) -> StateDict:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def shapes(tensors: StateDict) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def expected(method: str, models: list[transformers.PreTrainedModel]) -> StateDict:
    """What `merge` must give, computed from the models in memory: no name on disk is involved."""
    base, first, second = (model.state_dict() for model in models)
    if method == "linear":
        return {name: (2 * first[name] + second[name]) / 3 for name in base}
    return {name: base[name] + 0.5 * (first[name] - base[name]) + 0.25 * (second[name] - base[name]) for name in base}


def check_loads(case: Case, out: Path, values: StateDict) -> transformers.PreTrainedModel:
    """Plain transformers finds everything it wants and nothing else, computes, and holds `values`."""
    model, info = case.model_class.from_pretrained(out, output_loading_info=True, dtype=torch.float32, **case.arguments)
    assert {kind: found for kind, found in info.items() if found} == {}
    loaded = model.state_dict()
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=1e-6, msg=name)
    with torch.no_grad():
        result = model.eval()(**case.inputs)
    assert all(torch.isfinite(t).all() for t in result.values() if isinstance(t, torch.Tensor))
    if "lm_head.weight" in loaded:
        tied = model.config.tie_word_embeddings and not case.untied
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return model


@pytest.mark.parametrize("case", T5_CASES + VIT_CASES + CLIP_CASES + DECODER_CASES, ids=str)
def test_checkpoints_of_transformers_5_merge_whole(case: Case, tmp_path: Path) -> None:
    models = [case.build(seed) for seed in range(3)]
    paths = save(models, tmp_path)
    for method in ("linear", "task_arithmetic"):
        merged = merge(method, paths, tmp_path / method)
        assert shapes(merged) == shapes(on_disk(paths[0]))
        check_loads(case, tmp_path / method, expected(method, models))


def test_no_tensor_of_a_vit_is_lost(tmp_path: Path) -> None:
    # mergekit 0.1.5 with transformers 5.23 writes 8 of the 40 on its own, and exits normally.
    case = vit("ViTForImageClassification")
    paths = save([case.build(seed) for seed in range(3)], tmp_path)
    assert len(merge("linear", paths, tmp_path / "out")) == 40


# How checkpoints of other versions differ: rewrites in place what transformers 5.23 has saved.


def make_old(path: Path, architecture: str) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    if "T5" in architecture:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        if "Encoder" not in architecture:
            tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
            unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
            tensors[unused] = torch.full((32, 2), 7.0)
        if "Generation" in architecture:
            tensors.setdefault("lm_head.weight", tensors["shared.weight"].clone())
    elif "CLIP" in architecture:
        for model_class, prefix in (("CLIPVisionModel", "vision_model."), ("CLIPTextModel", "text_model.")):
            if architecture == model_class:
                tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        for name in [name for name in tensors if name.endswith("position_embedding.weight")]:
            ids = torch.arange(len(tensors[name])).unsqueeze(0)
            tensors[name.replace("position_embedding.weight", "position_ids")] = ids
    else:
        model = getattr(transformers, architecture).from_pretrained(path)
        model.save_pretrained(path, save_original_format=False)
        return
    save_file(tensors, file, metadata={"format": "pt"})


OLD_CASES = [
    t5("T5ForConditionalGeneration", "relu", label="v1.0"),
    t5("T5ForConditionalGeneration", label="untied", untied=True),
    t5("T5EncoderModel"),
    vit("ViTForImageClassification"),
    vit("ViTModel"),
    vit("DeiTForImageClassificationWithTeacher"),
    *CLIP_CASES,
]


@pytest.mark.parametrize("old", [(0, 1, 2), (0,), (1, 2)], ids=["all", "base", "experts"])
@pytest.mark.parametrize("case", OLD_CASES, ids=str)
def test_old_and_new_checkpoints_merge_in_any_mixture(case: Case, old: tuple[int, ...], tmp_path: Path) -> None:
    models = [case.build(seed) for seed in range(3)]
    paths = save(models, tmp_path)
    for index in old:
        make_old(paths[index], case.architecture)
    merged = merge("task_arithmetic", paths, tmp_path / "out")
    # A head that only an expert stores is merged with the embedding that serves the others as head.
    allowed = {"lm_head.weight"} if case.architecture == "T5ForConditionalGeneration" else set()
    assert merged.keys() - allowed == on_disk(paths[0]).keys() - allowed
    assert merged.keys() >= on_disk(paths[0]).keys()
    check_loads(case, tmp_path / "out", expected("task_arithmetic", models))
    for name in merged.keys() & {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}:
        assert torch.equal(merged[name], merged["shared.weight"])


def test_buffers_of_positions_stay_integers_and_logit_scale_a_scalar(tmp_path: Path) -> None:
    case = clip("CLIPModel")
    paths = save([case.build(seed) for seed in range(3)], tmp_path)
    for path in paths:
        make_old(path, case.architecture)
    merged = merge("task_arithmetic", paths, tmp_path / "out", dtype="bfloat16")
    buffers = {name: merged.pop(f"{name}_model.embeddings.position_ids") for name in ("text", "vision")}
    assert {buffer.dtype for buffer in buffers.values()} == {torch.int64}
    assert torch.equal(buffers["text"], torch.arange(8)[None])
    assert torch.equal(buffers["vision"], torch.arange(5)[None])
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert merged["logit_scale"].shape == ()


def test_a_pickled_t5_with_all_its_tied_copies(tmp_path: Path) -> None:
    case = t5("T5ForConditionalGeneration", "relu")
    models = [case.build(seed) for seed in range(3)]
    paths = save(models, tmp_path)
    for model, path in zip(models, paths, strict=True):
        (path / "model.safetensors").unlink()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    merged = merge("task_arithmetic", paths, tmp_path / "out")
    assert merged.keys() == models[0].state_dict().keys()
    check_loads(case, tmp_path / "out", expected("task_arithmetic", models))


def test_an_embedding_stored_under_the_encoders_name_only(tmp_path: Path) -> None:
    case = t5("T5EncoderModel")
    models = [case.build(seed) for seed in range(3)]
    paths = save(models, tmp_path)
    for path in paths[1:]:
        tensors = load_file(path / "model.safetensors")
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    merged = merge("task_arithmetic", paths, tmp_path / "out")
    assert merged.keys() == on_disk(paths[0]).keys()
    check_loads(case, tmp_path / "out", expected("task_arithmetic", models))


@pytest.mark.parametrize("base_has_it", [True, False])
def test_the_base_decides_about_the_pooler(base_has_it: bool, tmp_path: Path) -> None:
    with_pooler, without = vit("ViTModel"), vit("ViTModel", arguments={"add_pooling_layer": False})
    kinds = (with_pooler, without, with_pooler) if base_has_it else (without, with_pooler, with_pooler)
    models = [kind.build(seed) for seed, kind in enumerate(kinds)]
    paths = save(models, tmp_path)
    merged = merge("task_arithmetic", paths, tmp_path / "out")
    assert shapes(merged) == shapes(on_disk(paths[0]))
    if base_has_it:
        base, expert = (models[index].pooler.dense.weight.detach() for index in (0, 2))
        torch.testing.assert_close(merged["pooler.dense.weight"], base + 0.25 * (expert - base))


@pytest.mark.parametrize("kinds", [("relu", "gated-gelu"), ("gated-gelu", "relu")], ids=str)
def test_gated_and_ungated_t5_are_not_mixed_up(kinds: tuple[str, str], tmp_path: Path) -> None:
    # As many rows as columns, so that no shape gives the mistake away.
    cases = [t5("T5ForConditionalGeneration", kind) for kind in (kinds[0], *kinds)]
    for case in cases:
        case.config.d_ff = case.config.d_model
    paths = save([case.build(seed) for seed, case in enumerate(cases)], tmp_path)
    with pytest.raises(RuntimeError, match=r"DenseReluDense.wi.* required but not present"):
        merge("task_arithmetic", paths, tmp_path / "out")


def test_layers_of_a_vit_can_be_restacked(tmp_path: Path) -> None:
    case = vit("ViTForImageClassification")
    model = case.build(0)
    model.save_pretrained(tmp_path / "base")
    source = str(tmp_path / "base")
    slices = [{"sources": [{"model": source, "layer_range": r}]} for r in ([0, 2], [1, 2])]
    config = MergeConfiguration.model_validate({"merge_method": "passthrough", "slices": slices})
    run_merge(config, str(tmp_path / "out"), MergeOptions(write_model_card=False, copy_tokenizer=False))
    values = model.state_dict()
    values |= {n.replace(".1.", ".2."): value for n, value in values.items() if n.startswith("vit.layers.1.")}
    assert len(check_loads(case, tmp_path / "out", values).vit.layers) == 3
