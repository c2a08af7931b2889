"""The table of model families: where the MLPs of a family's layers are, and what their weights are called.

To add a family, add an entry to `FAMILIES`; nothing else has to change. An entry says, for every stack of layers,
the path of a layer (``{i}`` stands for its index), the modules of its MLP, and the config's keys for the number of
layers and of neurons per layer. `tests/neurons` proves an entry right: there a model of the family has its neurons
permuted and ablated.

Names are those of transformers 5.23. Where a checkpoint may spell them otherwise, or a model in memory does, the
stack has several spellings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # see layers.py
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Mlp:
    """The modules of one MLP, relative to its layer.

    Attributes:
        up: reads the layer's input; its rows are the neurons' incoming weights. With `fused` the gate's rows come
            first in the same module, then as many of `up`.
        down: writes the layer's output; its columns are the neurons' outgoing weights.
        gate: decides by its activation how much of `up` passes, or None.
        fused: `up` holds the gate, too.
        bias: whether up and gate have a bias: yes, no, or the config's field that says so.
        transposed: weights are stored in_features × out_features (`Conv1D` of GPT-2).
        when: the config's field that must be true for this MLP; None: always.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    bias: bool | str = False
    transposed: bool = False
    when: str | None = None

    @property
    def gated(self) -> bool:
        """Whether a gate decides how much of `up` passes."""
        return self.fused or self.gate is not None


@dataclass(frozen=True)
class Spelling:
    """A path of the layers below the family's prefix, and the modules of the MLP below that.

    Of several `mlps` the first whose `when` holds counts.
    """

    layer: str
    mlps: tuple[Mlp, ...]


@dataclass(frozen=True)
class Stack:
    """A run of like layers: one for decoders and image classifiers, two for T5 and CLIP.

    Attributes:
        spellings: the one on disk first.
        depth: the config's key for the number of layers.
        width: the config's key for the number of neurons per layer, or a function of the config.
        config: name of the sub-config that holds both, "" for the model's own.
        absent_in: ends of architecture names that lack this stack.
    """

    spellings: tuple[Spelling, ...]
    depth: str = "num_hidden_layers"
    width: str | Callable[[PretrainedConfig], int] = "intermediate_size"
    config: str = ""
    absent_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The stacks of a family, and what precedes their paths.

    `prefixes` are (end of the architecture's name, prefix): the first that fits is the spelling transformers writes
    for that architecture; all of them are understood.
    """

    stacks: tuple[Stack, ...]
    prefixes: tuple[tuple[str, str], ...] = (("", ""),)


def _decoder(mlp: Mlp, layer: str = "layers.{i}", prefix: str = "model.", **keys) -> Family:
    """A decoder whose body stands below `prefix`, but in the bare model without head."""
    heads = (("LMHeadModel", prefix), ("Model", ""), ("", prefix))
    return Family((Stack((Spelling(layer, (mlp,)),), **keys),), heads)


def _lfm2_width(config: PretrainedConfig) -> int:
    """LFM2's width follows from three more fields of its config, as its modelling code computes it."""
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            width = int(config.block_ffn_dim_multiplier * width)
            width = config.block_multiple_of * -(-width // config.block_multiple_of)
    return width


# ------------------------------------------------------------------------------------------------- Decoders

_GATED = Mlp(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", bias="mlp_bias")
_FUSED = Mlp(up="mlp.gate_up_proj", down="mlp.down_proj", fused=True)
_UNGATED = Mlp(up="mlp.up_proj", down="mlp.down_proj", bias="mlp_bias")

_DECODERS: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
            *("stablelm", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "granite", "smollm3", "seed_oss"),
            *("exaone4", "helium", "hunyuan_v1_dense"),
            # Known by mergekit, in no module of transformers: by the names of their checkpoints alone.
            *("baichuan", "solar", "stablelm_epoch"),
        ),
        _decoder(_GATED),
    ),
    "ernie4_5": _decoder(Mlp(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", bias="use_bias")),
    **dict.fromkeys(("phi3", "glm", "glm4"), _decoder(_FUSED)),
    **dict.fromkeys(("arcee", "apertus", "nemotron"), _decoder(_UNGATED)),
    "lfm2": _decoder(Mlp(gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2"), width=_lfm2_width),
    "internlm2": _decoder(Mlp(gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2")),
    "exaone": _decoder(Mlp(gate="mlp.c_fc_0", up="mlp.c_fc_1", down="mlp.c_proj"), "h.{i}", "transformer."),
    "qwen": _decoder(
        Mlp(gate="mlp.w2", up="mlp.w1", down="mlp.c_proj"),
        *("h.{i}", "transformer."),
        width=lambda config: config.intermediate_size // 2,
    ),
    "phi": _decoder(Mlp(up="mlp.fc1", down="mlp.fc2", bias=True)),
    "starcoder2": _decoder(Mlp(up="mlp.c_fc", down="mlp.c_proj", bias="use_bias")),
    "gpt_neox": _decoder(Mlp(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", bias=True), prefix="gpt_neox."),
    "gpt2": _decoder(
        Mlp(up="mlp.c_fc", down="mlp.c_proj", bias=True, transposed=True),
        *("h.{i}", "transformer."),
        depth="n_layer",
        width=lambda config: 4 * config.n_embd if config.n_inner is None else config.n_inner,
    ),
}

# ------------------------------------------------------------------------------------------------------- T5


def _t5_stack(stack: str, sublayer: int, depth: str, absent_in: tuple[str, ...] = ()) -> Stack:
    dense = f"layer.{sublayer}.DenseReluDense"
    mlps = (
        Mlp(gate=f"{dense}.wi_0", up=f"{dense}.wi_1", down=f"{dense}.wo", when="is_gated_act"),
        Mlp(up=f"{dense}.wi", down=f"{dense}.wo"),
    )
    return Stack((Spelling(stack + ".block.{i}", mlps),), depth=depth, width="d_ff", absent_in=absent_in)


_T5 = Family(
    (
        _t5_stack("encoder", 1, "num_layers"),
        _t5_stack("decoder", 2, "num_decoder_layers", absent_in=("EncoderModel", "ForTokenClassification")),
    ),
    (("ForTokenClassification", "transformer."), ("ForSequenceClassification", "transformer."), ("", "")),
)

# ------------------------------------------------------------------------------------------- ViT, DeiT, CLIP

# transformers 5 renames the modules of ViT and DeiT in memory, and stores what it renamed under the old names.
_VIT_STACK = Stack(
    (
        Spelling("encoder.layer.{i}", (Mlp(up="intermediate.dense", down="output.dense", bias=True),)),
        Spelling("layers.{i}", (Mlp(up="mlp.fc1", down="mlp.fc2", bias=True),)),
    )
)


def _clip_stack(tower: str, config: str = "", absent_in: tuple[str, ...] = ()) -> Stack:
    layer = Spelling(tower + "encoder.layers.{i}", (Mlp(up="mlp.fc1", down="mlp.fc2", bias=True),))
    return Stack((layer,), config=config, absent_in=absent_in)


# A single tower is stored with its prefix by transformers 4 and by its variants with projection, else without.
_CLIP: dict[str, Family] = {
    "clip": Family(
        (
            _clip_stack("text_model.", "text_config", absent_in=("ForImageClassification",)),
            _clip_stack("vision_model.", "vision_config"),
        )
    ),
    "clip_text_model": Family((_clip_stack(""),), (("Model", ""), ("", "text_model."))),
    "clip_vision_model": Family((_clip_stack(""),), (("Model", ""), ("", "vision_model."))),
}

FAMILIES: dict[str, Family] = {
    **_DECODERS,
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    "vit": Family((_VIT_STACK,), (("Model", ""), ("", "vit."))),
    "deit": Family((_VIT_STACK,), (("Model", ""), ("", "deit."))),
    **_CLIP,
}
