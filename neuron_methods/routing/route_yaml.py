"""The YAML of `mergekit-neuron route`: what it may say, and one clear error for what it may not.

Relative paths are relative to the YAML. Every key is documented at its field; a key that is not there is refused with
its line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from neuron_methods.support.yaml_source import YamlSource

Importance = Literal["magnitude", "activation", "taylor"]
Pooling = Literal["moments", "mean", "first", "last"]
OodScore = Literal["combined", "distance", "probability", "energy"]
Redundant = Literal["others", "router", "random", "none"]
Select = Literal["best", "smallest"]
Dropped = Literal["discard", "keep"]
#: Of an expert's name, which becomes that of a directory.
EXPERT_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}"
#: What every generator of random numbers takes for a seed.
Seed = Annotated[int, Field(strict=True, ge=0, lt=1 << 32)]


def _located(text: str, info: ValidationInfo) -> str:
    """Make a path that exists beside the YAML absolute; what does not exist is left for the hub to know."""
    place = None if info.context is None else info.context / text
    return str(place) if place is not None and os.path.exists(place) else text


_Location = Annotated[str, Field(min_length=1), AfterValidator(_located)]
# Lists of YAML become tuples, so that strict are the types of single values, not the sections.
_Whole = Annotated[int, Field(strict=True, lt=1 << 31)]
_Real = Annotated[float, Field(strict=True, allow_inf_nan=False, le=1e6)]
_Switch = Annotated[bool, Field(strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """Labelled samples.

    Attributes:
        source: a file (json, jsonl, parquet, csv, tsv), an image folder, a directory of a data set, or a hub id.
        name: the configuration of a data set of the hub.
        split: by default the only one a file has, or ``train``.
        columns: what a sample is made of: ``input`` and ``target`` (or ``text`` alone) for text, ``image`` and
            ``label`` for images, ``text`` (with a second text as ``pair``) and ``label`` for classifiers of texts; by
            default the columns are called so.
        labels: indices of the classes of this expert's task, if the head has more than those; the others do not count
            in the calibration loss.
    """

    source: _Location
    name: str | None = None
    split: str | None = None
    columns: dict[Literal["input", "target", "text", "pair", "image", "label"], str] = Field(default_factory=dict)
    labels: tuple[_Whole, ...] | None = None


class Expert(_Section):
    """One adapter.

    Attributes:
        name: what the routing calls it; of letters, digits, ``_`` and ``-``.
        adapter: a LoRA adapter in peft's format, directory or hub id.
        data: samples of the expert's task, for router and calibration.
        calibration: samples for calibration and held-out accuracy alone; by default ``router.holdout`` of `data` is.
        head_labels: names of the classes of the adapter's own head, in their order; by default those of the data.
    """

    name: str
    adapter: _Location
    data: Data
    calibration: Data | None = None
    head_labels: tuple[Annotated[str, Field(strict=True, min_length=1)], ...] | None = None

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not re.fullmatch(EXPERT_NAME, value):
            raise ValueError(f"{value!r} is no name: use up to 100 letters, digits, '_' and '-'")
        return value


class Text(_Section):
    """How texts become tokens.

    Attributes:
        max_length: of input and target together; longer ones are refused.
        separator: stands between input and target of a decoder, as the experts were trained; tokenized with the target.
        end_of_sequence: whether a decoder's target ends with the end-of-sequence token.
    """

    max_length: _Whole = Field(512, ge=2)
    separator: str = " "
    end_of_sequence: _Switch = True


class Enhancement(_Section):
    """Stage 1; see `enhancement`.

    Attributes:
        enabled: without it every layer of every expert is a core layer.
        select: keep the ``best`` point along the way, that of the lowest calibration loss, or the ``smallest`` that the
            tolerance allows.
        tolerance: how much the calibration loss may rise over the original expert's, in nats.
        patience: greedy dropping ends after so many refused layers.
        density: share of a core layer's neurons whose update is kept, the smallest that is tried; larger ones, up to
            all, where the tolerance or the best point asks for it.
        importance: of neurons and layers: ``magnitude`` of the update relative to the base, mean ``activation`` ×
            norm of the outgoing weights, or ``taylor``: mean |activation × gradient of the loss|.
        samples: of calibration data, per expert; as many more, if there are, have no say in it and tell the difference.
    """

    enabled: _Switch = True
    select: Select = "best"
    tolerance: _Real = Field(0.01, ge=0)
    patience: _Whole = Field(3, ge=1)
    density: _Real = Field(0.5, gt=0, le=1)
    importance: Importance = "magnitude"
    samples: _Whole = Field(64, ge=1)


class RouterSettings(_Section):
    """Stage 2; see `router` and `router_training`.

    Attributes:
        layer: the router reads the hidden states behind so many layers of the base (of the encoder, where there is
            one), one number or several; negative counts from the end; None: 0, a quarter and half of them.
        pooling: ``mean`` over the real tokens, ``moments`` (mean and standard deviation), the ``first`` (class token)
            or the ``last``.
        hidden: width of the MLP.
        top_k: experts chosen per input.
        temperature: divides the logits.
        ood_score: what tells whether an input is in domain: largest ``probability``, ``energy`` of the logits,
            ``distance`` to the nearest expert's inputs, or the lower of the last two, ``combined``.
        in_domain_share: of in-domain calibration inputs, that pass the threshold.
        ood_margin: lowers the threshold by so many times its gap to the calibration inputs' median score.
        samples: of each expert's data.
        holdout: share of them that is kept out of training, where there is no calibration data.
        epochs: at most.
        patience: training ends after so many epochs without a better held-out loss.
        learning_rate: of AdamW.
        seed: of samples, weights and order.
    """

    layer: _Whole | tuple[_Whole, ...] | None = None
    pooling: Pooling = "moments"
    hidden: _Whole = Field(256, ge=1, le=1 << 16)
    top_k: _Whole = Field(2, ge=1)
    temperature: _Real = Field(1.0, ge=1e-3, le=1e3)
    ood_score: OodScore = "combined"
    in_domain_share: _Real = Field(0.95, gt=0, le=1)
    ood_margin: _Real = Field(0.0, ge=0)
    samples: _Whole = Field(400, ge=8)
    holdout: _Real = Field(0.25, gt=0, lt=1)
    epochs: _Whole = Field(200, ge=1)
    patience: _Whole = Field(20, ge=1)
    learning_rate: _Real = Field(1e-3, gt=0, le=1)
    seed: Seed = 0


class Merging(_Section):
    """Stage 3; see `routes`.

    Attributes:
        redundant: what an input's first expert's redundant layers get: the weighted sum of the updates of the
            ``others`` that are chosen and have one there, whose weights sum to 1; the same by the ``router``'s weights
            as they are, which leave little where it is sure of the first; those of one other expert drawn at ``random``
            per layer (ablation), or ``none``.
        dropped: what an expert's own inputs do without, ``discard`` for all, or ``keep`` for inputs of others.
        seed: of ``random``.
    """

    redundant: Redundant = "others"
    dropped: Dropped = "discard"
    seed: Seed = 0


class RouteConfig(_Section):
    """The whole YAML.

    Attributes:
        base_model: directory or hub id.
        experts: two or more.
        dtype: of the base: ``auto`` (as stored), ``float32``, ``bfloat16``, ``float16``.
        check_base: refuse adapters that name another base than `base_model`.
        batch_size: samples per forward pass.
        background: inputs that no expert is for, for the router to learn what to leave to the base; a column is enough.
        text, enhancement, router, merging: see there.
    """

    base_model: _Location
    experts: tuple[Expert, ...]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    check_base: _Switch = True
    batch_size: _Whole = Field(16, ge=1)
    background: tuple[Data, ...] = ()
    text: Text = Text()
    enhancement: Enhancement = Enhancement()
    router: RouterSettings = RouterSettings()
    merging: Merging = Merging()

    @model_validator(mode="after")
    def _experts_make_sense(self) -> RouteConfig:
        names = [expert.name for expert in self.experts]
        if len(names) < 2:
            raise ValueError(f"experts: a router needs two or more to choose from, found {len(names)}")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"experts: two are called {twice!r}; give each a name of its own")
        if self.router.top_k > len(names):
            raise ValueError(f"router.top_k: {self.router.top_k} of {len(names)} experts cannot be chosen")
        return self


def read_config(path: Path) -> RouteConfig:
    """Read and check the YAML; local paths in it become absolute.

    Raises:
        UserError: naming the file, the line and the key.
    """
    source = YamlSource.read(path, "the keys base_model and experts; see mergekit-neuron route --help")
    return source.validated(RouteConfig, context=path.resolve().parent)
