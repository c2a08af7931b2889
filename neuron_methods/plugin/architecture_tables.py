"""The tensors of T5, ViT, DeiT and CLIP checkpoints, as tables that need neither mergekit nor transformers.

A table lists what is on disk, in the spelling that transformers 5.23 writes for a model built from its
config. Where checkpoints exist in another spelling, the entry carries it in `also`. In a layer's names
``{i}`` stands for the index of the layer. `when` names a field of the config that must be true ("not field":
false) for the tensor to exist.

Spellings differ in two places. Every version so far stores ViT and DeiT as
``encoder.layer.0.attention.attention.query``, but transformers 5 holds them in memory as
``layers.0.attention.q_proj`` and stores that when asked to (``save_original_format=False``).
`CLIPVisionModel` and `CLIPTextModel` are stored with the prefix of their tower by transformers 4, and by
transformers 5 when it has loaded them so; built afresh, transformers 5 stores them without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: its name on disk, ``{i}`` for the index of the layer.
        also: other spellings of the same tensor in other checkpoints.
        tied: tensors that hold the same values where this one is not stored, because the model ties them.
        when: field of the config that decides whether the tensor exists, or ``"not "`` and a field.
        optional: a valid checkpoint may lack it although the config does not say so.
        base_decides: kept if the base stores it, left out if the base does not, whatever the experts store.
            For what a model can do without: a pooler, buffers and copies that older versions stored.
        first_layer_only: required in layer 0, not expected in the others.
        vocabulary_axis: the axis indexed by tokens.
        force_dtype: mergekit's name of the dtype that a ``dtype:`` in the YAML must not change.
    """

    name: str
    also: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    when: str | None = None
    optional: bool = False
    base_decides: bool = False
    first_layer_only: bool = False
    vocabulary_axis: int | None = None
    force_dtype: str | None = None


Tensors = tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Table:
    """One module of a model: what comes before its layers, what each layer holds, what comes after.

    `depth` is the config's key for the number of layers (dots lead into sub-configs), None if there are none.
    """

    before: Tensors = ()
    layer: Tensors = ()
    after: Tensors = ()
    depth: str | None = None


@dataclass(frozen=True)
class Definition:
    """One architecture name of transformers and the modules its checkpoints are made of."""

    architecture: str
    model_type: str
    modules: tuple[tuple[str, Table], ...]
    vocab_size_key: str | None = None
    copied_files: tuple[str, ...] = ()


def weight_and_bias(name: str, *also: str, bias: str | None = None, **fields) -> Tensors:
    """List ``name.weight`` and ``name.bias``; `bias` is the field of the config that says whether it exists."""
    return (
        StoredTensor(f"{name}.weight", tuple(f"{a}.weight" for a in also), **fields),
        StoredTensor(f"{name}.bias", tuple(f"{a}.bias" for a in also), when=bias, **fields),
    )


def respelled(table: Table, prefix: str = "", also_prefix: str | None = None) -> Table:
    """Give `table` with `prefix` before all names, each known with `also_prefix` before it, too."""

    def respell(tensor: StoredTensor) -> StoredTensor:
        spellings = (tensor.name, *tensor.also)
        also = [prefix + s for s in tensor.also]
        if also_prefix is not None:
            also += [also_prefix + s for s in spellings]
        tied = tuple(prefix + t for t in tensor.tied)
        return replace(tensor, name=prefix + tensor.name, also=tuple(also), tied=tied)

    return replace(
        table,
        before=tuple(map(respell, table.before)),
        layer=tuple(map(respell, table.layer)),
        after=tuple(map(respell, table.after)),
    )


# -------------------------------------------------------------------------------------------------------- T5

_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def _tied_embedding(name: str, **fields) -> StoredTensor:
    """A tensor that equals the shared embedding wherever a checkpoint does not store it."""
    tied = tuple(other for other in _T5_EMBEDDINGS if other != name)
    return StoredTensor(name, tied=tied, vocabulary_axis=0, **fields)


T5_SHARED = (_tied_embedding("shared.weight"),)

# Tied to `shared` in most checkpoints and then not stored. The config cannot tell: transformers 5 sets
# tie_word_embeddings for the whole family and looks whether the checkpoint has a head that differs.
T5_LM_HEAD = (_tied_embedding("lm_head.weight", optional=True),)


def t5_stack(stack: str, bias_in_every_layer: bool) -> Table:
    """Describe the encoder or decoder of T5 (`stack`), whose config says by `is_gated_act` which feed-forward it has.

    T5 and MT5 keep one relative attention bias per stack, in layer 0; UMT5 has one in every layer.
    """

    def attention(sublayer: int, kind: str) -> Tensors:
        return tuple(StoredTensor(f"{block}.layer.{sublayer}.{kind}.{part}.weight") for part in "qkvo")

    def norm(sublayer: int) -> Tensors:
        return (StoredTensor(f"{block}.layer.{sublayer}.layer_norm.weight"),)

    def feed_forward(sublayer: int) -> Tensors:
        dense = f"{block}.layer.{sublayer}.DenseReluDense"
        return (
            StoredTensor(f"{dense}.wi.weight", when="not is_gated_act"),
            StoredTensor(f"{dense}.wi_0.weight", when="is_gated_act"),
            StoredTensor(f"{dense}.wi_1.weight", when="is_gated_act"),
            StoredTensor(f"{dense}.wo.weight"),
        )

    block = stack + ".block.{i}"
    # Written by older versions and in pickled checkpoints; no version computes with them.
    leftovers: Tensors = (_tied_embedding(f"{stack}.embed_tokens.weight", optional=True, base_decides=True),)
    relative_bias = StoredTensor(
        f"{block}.layer.0.SelfAttention.relative_attention_bias.weight",
        first_layer_only=not bias_in_every_layer,
    )
    layer = (*attention(0, "SelfAttention"), relative_bias, *norm(0))
    if stack == "decoder":
        leftovers += (
            StoredTensor(
                "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
                optional=True,
                base_decides=True,
            ),
        )
        layer += (*attention(1, "EncDecAttention"), *norm(1), *feed_forward(2), *norm(2))
    else:
        layer += (*feed_forward(1), *norm(1))
    return Table(
        before=leftovers,
        layer=layer,
        after=(StoredTensor(f"{stack}.final_layer_norm.weight"),),
        depth="num_decoder_layers" if stack == "decoder" else "num_layers",
    )


# What follows the family's name: the stacks, the prefix of everything but the head, the head.
T5_MODELS: dict[str, tuple[tuple[str, ...], str, Tensors]] = {
    "Model": (("encoder", "decoder"), "", ()),
    "EncoderModel": (("encoder",), "", ()),
    "ForConditionalGeneration": (("encoder", "decoder"), "", T5_LM_HEAD),
    "ForQuestionAnswering": (("encoder", "decoder"), "", weight_and_bias("qa_outputs")),
    "ForTokenClassification": (("encoder",), "transformer.", weight_and_bias("classifier")),
    "ForSequenceClassification": (
        ("encoder", "decoder"),
        "transformer.",
        (*weight_and_bias("classification_head.dense"), *weight_and_bias("classification_head.out_proj")),
    ),
}


def t5_definitions() -> list[Definition]:
    """Define every model of T5_MODELS for T5, MT5 and UMT5; modules are named as in mergekit's own definition."""
    definitions = []
    for family, model_type in (("T5", "t5"), ("MT5", "mt5"), ("UMT5", "umt5")):
        for suffix, (stacks, prefix, head) in T5_MODELS.items():
            modules = [(stack, respelled(t5_stack(stack, family == "UMT5"), prefix)) for stack in stacks]
            shared = respelled(Table(before=T5_SHARED), prefix)
            modules.append(("shared", replace(shared, after=head)))
            definitions.append(
                Definition(family + suffix, model_type, tuple(modules), copied_files=("generation_config.json",))
            )
    return definitions


# ------------------------------------------------------------------------------------------------- ViT, DeiT

# On disk                                                     In memory since transformers 5
_VIT_PROJECTIONS = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
)
_VIT_REST = (
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("layernorm_before", "layernorm_before"),
    ("layernorm_after", "layernorm_after"),
)
VIT_LAYER: Tensors = tuple(
    tensor
    for pairs, bias in ((_VIT_PROJECTIONS, "qkv_bias"), (_VIT_REST, None))
    for on_disk, in_memory in pairs
    for tensor in weight_and_bias("encoder.layer.{i}." + on_disk, "layers.{i}." + in_memory, bias=bias)
)

# Not in the config: ViTModel(config, add_pooling_layer=False) has none.
VIT_POOLER = weight_and_bias("pooler.dense", optional=True, base_decides=True)
VIT_CLASSIFIER = tuple(
    StoredTensor(f"classifier.{part}", when="num_labels") for part in ("weight", "bias")
)  # num_labels: 0 means features, without a head


def vit_body(tokens: tuple[str, ...]) -> Table:
    """Describe ViT without pooler and head; `tokens` are the learned ones before the patches."""
    return Table(
        before=(
            *(StoredTensor(f"embeddings.{token}") for token in tokens),
            StoredTensor("embeddings.position_embeddings"),
            *weight_and_bias("embeddings.patch_embeddings.projection"),
        ),
        layer=VIT_LAYER,
        after=weight_and_bias("layernorm"),
        depth="num_hidden_layers",
    )


def vit_definitions() -> list[Definition]:
    """Define the models of ViT and DeiT, each one module."""
    vit, deit = ("cls_token",), ("cls_token", "distillation_token")
    mask = ("mask_token",)
    pixels = weight_and_bias("decoder.0")
    two_heads = (*weight_and_bias("cls_classifier"), *weight_and_bias("distillation_classifier"))
    models = (  # tokens, prefix of the body, what follows the body
        ("ViTModel", vit, "", VIT_POOLER),
        ("ViTForImageClassification", vit, "vit.", VIT_CLASSIFIER),
        ("ViTForMaskedImageModeling", vit + mask, "vit.", pixels),
        ("DeiTModel", deit, "", VIT_POOLER),
        ("DeiTForImageClassification", deit, "deit.", VIT_CLASSIFIER),
        ("DeiTForImageClassificationWithTeacher", deit, "deit.", two_heads),
        ("DeiTForMaskedImageModeling", deit + mask, "deit.", pixels),
    )
    definitions = []
    for architecture, tokens, prefix, head in models:
        body = respelled(vit_body(tokens), prefix)
        table = replace(body, after=body.after + head)
        model_type = "deit" if architecture.startswith("DeiT") else "vit"
        definitions.append(
            Definition(architecture, model_type, (("default", table),), copied_files=IMAGE_PROCESSOR_FILES)
        )
    return definitions


# ------------------------------------------------------------------------------------------------------ CLIP

IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

CLIP_LAYER: Tensors = tuple(
    tensor
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
        "layer_norm1",
        "layer_norm2",
    )
    for tensor in weight_and_bias("encoder.layers.{i}." + name)
)

# An int64 count from 0 that transformers before 4.31 stored; later ones compute it.
_CLIP_POSITION_IDS = StoredTensor("embeddings.position_ids", optional=True, base_decides=True, force_dtype="int64")
CLIP_TEXT = Table(
    before=(
        StoredTensor("embeddings.token_embedding.weight", vocabulary_axis=0),
        StoredTensor("embeddings.position_embedding.weight"),
        _CLIP_POSITION_IDS,
    ),
    layer=CLIP_LAYER,
    after=weight_and_bias("final_layer_norm"),
    depth="num_hidden_layers",
)
CLIP_VISION = Table(
    before=(
        StoredTensor("embeddings.class_embedding"),
        StoredTensor("embeddings.patch_embedding.weight"),
        StoredTensor("embeddings.position_embedding.weight"),
        _CLIP_POSITION_IDS,
        *weight_and_bias("pre_layrnorm"),  # so spelled in every checkpoint
    ),
    layer=CLIP_LAYER,
    after=weight_and_bias("post_layernorm"),
    depth="num_hidden_layers",
)


def clip_definitions() -> list[Definition]:
    """Define CLIP's two towers, together and apart; together they are two modules, and `projection` joins them."""
    text, vision = respelled(CLIP_TEXT, "text_model."), respelled(CLIP_VISION, "vision_model.")
    bare_text = respelled(CLIP_TEXT, also_prefix="text_model.")
    bare_vision = respelled(CLIP_VISION, also_prefix="vision_model.")
    text_projection, visual_projection = (
        StoredTensor("text_projection.weight"),
        StoredTensor("visual_projection.weight"),
    )
    vision_in_clip = replace(vision, depth="vision_config.num_hidden_layers")
    both = (
        ("text_model", replace(text, depth="text_config.num_hidden_layers")),
        ("vision_model", vision_in_clip),
        # logit_scale is 0-dimensional
        ("projection", Table(before=(text_projection, visual_projection, StoredTensor("logit_scale")))),
    )

    def one(table: Table, *head: StoredTensor) -> tuple[tuple[str, Table], ...]:
        return (("default", replace(table, after=table.after + head)),)

    images = {"copied_files": IMAGE_PROCESSOR_FILES}
    vision_type, text_type = "clip_vision_model", "clip_text_model"
    return [
        Definition("CLIPModel", "clip", both, "text_config.vocab_size", **images),
        Definition("CLIPForImageClassification", "clip", one(vision_in_clip, *VIT_CLASSIFIER), **images),
        Definition("CLIPVisionModel", vision_type, one(bare_vision), **images),
        Definition("CLIPVisionModelWithProjection", vision_type, one(vision, visual_projection), **images),
        Definition("CLIPTextModel", text_type, one(bare_text)),
        Definition("CLIPTextModelWithProjection", text_type, one(text, text_projection)),
    ]


# ----------------------------------------------------------------------------------------------- Llama's kin

_ATTENTION_BIASES: Tensors = tuple(
    StoredTensor("model.layers.{i}.self_attn." + part + "_proj.bias", when="attention_bias") for part in "qkvo"
)
_MLP_BIASES: Tensors = tuple(
    StoredTensor("model.layers.{i}.mlp." + part + "_proj.bias", when="mlp_bias") for part in ("gate", "up", "down")
)
_LM_HEAD: Tensors = (
    StoredTensor("lm_head.weight", tied=("model.embed_tokens.weight",), optional=True, vocabulary_axis=0),
)

# What mergekit 0.1.5's own definitions of these lack, or (Phi3's head) demand although it may be tied.
AMENDMENTS: dict[str, Table] = {
    "LlamaForCausalLM": Table(layer=_ATTENTION_BIASES + _MLP_BIASES),
    "LlamaForSequenceClassification": Table(layer=_ATTENTION_BIASES + _MLP_BIASES),
    "Qwen3ForCausalLM": Table(layer=_ATTENTION_BIASES),
    "GemmaForCausalLM": Table(layer=_ATTENTION_BIASES, after=_LM_HEAD),
    "Gemma2ForCausalLM": Table(layer=_ATTENTION_BIASES),
    "Gemma3ForCausalLM": Table(layer=_ATTENTION_BIASES),
    "Phi3ForCausalLM": Table(after=_LM_HEAD),
}
