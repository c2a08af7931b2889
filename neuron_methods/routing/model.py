"""The routed model: base, adapters and router in one, used like a model of transformers."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuron_methods.adapters.config import CONFIG_NAME
from neuron_methods.adapters.live import save_adapter
from neuron_methods.adapters.weights_file import SAFETENSORS_NAME
from neuron_methods.models.kinds import text_limit
from neuron_methods.models.loading import input_device
from neuron_methods.neurons import layer_of
from neuron_methods.routing.base import load_base, routable_kind
from neuron_methods.routing.experts import load_experts
from neuron_methods.routing.heads import HeadBank
from neuron_methods.routing.mixing import AdapterMixer
from neuron_methods.routing.pooling import pooled_states, resolve_layers
from neuron_methods.routing.routed_files import (
    ADAPTERS,
    CLASSIFIERS,
    ROUTER_NAME,
    RoutedConfig,
    reference_to,
    routed_directory,
)
from neuron_methods.routing.routed_files import CONFIG_NAME as ROUTED_CONFIG
from neuron_methods.routing.router import Router
from neuron_methods.routing.routes import Routing, chosen_weights, layer_coefficients
from neuron_methods.routing.stored import load_biases, save_biases
from neuron_methods.support.documents import open_file
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import file_in_place_after, staging_directory, within
from neuron_methods.support.text import shortened

# What a router can look at; the rest of a model's inputs (labels, caches, what was generated so far) is not the prompt.
_PROMPT = ("input_ids", "inputs_embeds", "attention_mask", "pixel_values")

_OF_THE_BASE = ("generation_config", "main_input_name", "dtype", "can_generate")


class NeuronRoutedModel(nn.Module):
    """MIN-Merging's routed model (Liang, arXiv:2510.17890): every sample is computed with experts of its own.

    `forward` and `generate` take what the base's take. Both route first, on the base alone, and hold that routing: what
    is generated does not change it. Give `routing` (of `route`) to use one made before.

    Attributes:
        peft_model: the base with all adapters.
        mixer: the seam that mixes them per sample.
        router: the MLP.
        routed_config: what is stored about all of it.
        heads: of the experts, where they have heads of their own; see `heads`.
        kind: ``causal``, ``text-to-text``, ``image-classification`` or ``text-classification``.
    """

    def __init__(
        self,
        peft_model: Any,
        router: Router,
        routed_config: RoutedConfig,
        base: str,
        heads: HeadBank | None = None,
        biases: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Put together what `experts.load_experts` made, a router, where the base came from, heads and biases."""
        super().__init__()
        self.heads = heads
        self.peft_model = peft_model
        self.router = router
        self.routed_config = routed_config
        self.base_reference = base
        names = [expert.name for expert in routed_config.experts]
        self.mixer = AdapterMixer(peft_model, names, biases)
        self.kind = routable_kind(self.base).kind
        redundant = [expert.redundant_layers for expert in routed_config.experts]
        modules = {name for name, _ in self.base.named_modules()}
        for expert in routed_config.experts:
            if strange := [layer for layer in expert.redundant_layers if layer not in modules]:
                problem = f"redundant_layers: the base has no layer {shortened(strange[0])}"
                raise UserError(f"expert {expert.name}: {problem}; name the base it was made for")
        self._core = torch.tensor([[layer not in layers for layers in redundant] for layer in self.mixer.layers])
        having = [{*map(layer_of, (*self.mixer.paths_of(name), *self.mixer.biases[name]))} for name in names]
        self._there = torch.tensor([[layer in layers for layers in having] for layer in self.mixer.layers])
        self.router.to(input_device(self.base))
        self._config = None if heads is None else heads.classes.config(self.base.config)

    @property
    def config(self) -> Any:
        """The base's config; where experts have heads of their own, its labels are those of all heads."""
        return self._config or self.base.config

    @property
    def base(self) -> Any:
        """The base model, with peft's layers in it; by itself it computes without any expert."""
        return self.peft_model.get_base_model()

    def __getattr__(self, name: str) -> Any:
        """Ask the base for what callers ask of any model of transformers."""
        return getattr(self.base, name) if name in _OF_THE_BASE else super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.base)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts."""
        return self.mixer.experts

    @torch.no_grad()
    def route(self, **inputs: Any) -> Routing:
        """Route a batch; one pass through the lower layers of the base.

        Args:
            **inputs: ``input_ids`` (B, tokens) with ``attention_mask``, or ``pixel_values`` (B, channels, height,
                width), as the base takes them. Without a mask, padding tokens are told by their id, as `generate` does.

        Raises:
            UserError: nothing in `inputs` can be routed by, or the prompt is longer than the model's context.
        """
        prompt = {key: inputs[key] for key in _PROMPT if inputs.get(key) is not None}
        if not prompt.keys() & {"input_ids", "inputs_embeds", "pixel_values"}:
            raise UserError("a routed model routes on input_ids or pixel_values; give them, or routing=")
        if "attention_mask" not in prompt and "input_ids" in prompt:
            mask = self._mask_of(prompt["input_ids"])
            if mask is not None:
                prompt["attention_mask"] = mask
        self._refuse_long(prompt)
        shape = self.routed_config.router
        with self.mixer.using(None):
            states = pooled_states(self.base, prompt, shape.layers, shape.pooling)
        if states.shape[1] != shape.width:
            raise UserError(f"the router reads {shape.width} numbers, and this base gives it {states.shape[1]}")
        probabilities, scores = self.router(states)
        # A base without a head has no answer of its own: then the nearest expert has to give one.
        inside = scores >= self.router.threshold
        claimed = inside | (self.heads is not None and self.heads.classes.own is None)
        weights = chosen_weights(probabilities.float(), shape.top_k, claimed)
        config = self.routed_config
        coefficients = layer_coefficients(weights, self._core, self._there, config.redundant, config.seed)
        return Routing(self.experts, probabilities.float(), weights, scores, self.router.threshold, coefficients)

    def forward(self, *, routing: Routing | None = None, return_routing: bool = False, **inputs: Any) -> Any:
        """Run the base's forward, each sample with its experts.

        Where experts have heads of their own, ``logits`` are (B, classes of all heads): those of a sample's head at its
        places, -Inf elsewhere; `config.id2label` names them all. The output has two attributes more, lists of B names:
        ``heads``, whose head it is, and ``labels``, the likeliest label.

        Args:
            routing: of `route`; by default the inputs are routed (all tokens of them: to score an answer behind a
                prompt, route the prompt and give its routing).
            return_routing: return (output, routing) instead of the output.
            **inputs: as the base takes them, by keyword; ``labels`` are classes of all heads.

        Raises:
            UserError: as `route`; or a cache of earlier tokens is given, and no routing that goes with it.
        """
        if routing is None:
            if inputs.get("past_key_values") is not None or inputs.get("encoder_outputs") is not None:
                raise UserError("what follows a prompt is not routed anew: give the prompt's routing=model.route(...)")
            routing = self.route(**inputs)
        with self.mixer.using(routing.coefficients):
            output = self.base(**inputs) if self.heads is None else self._answer(self.heads, routing, inputs)
        return (output, routing) if return_routing else output

    def _answer(self, heads: HeadBank, routing: Routing, inputs: dict[str, Any]) -> Any:
        """Run the base's forward, each sample through the head of its own."""
        chosen, labels = heads.classes.chosen(routing.weights), inputs.pop("labels", None)
        with heads.using(chosen):
            output = self.base(**{**inputs, "return_dict": True})
        if labels is not None:
            output["loss"] = functional.cross_entropy(output.logits.float(), labels.to(output.logits.device))
        output.heads = [heads.classes.heads[number] for number in chosen.tolist()]
        output.labels = [heads.classes.names[number] for number in output.logits.argmax(dim=1).tolist()]
        return output

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        routing: Routing | None = None,
        return_routing: bool = False,
        **options: Any,
    ) -> Any:
        """Run the base's generate: routes once on the prompt, then holds.

        Args:
            inputs: ``input_ids``, if not given by name.
            routing: of `route`; by default the prompt is routed.
            return_routing: return (what `generate` returns, routing).
            **options: as the base's `generate` takes them. Beams and several sequences per prompt follow its routing.

        Raises:
            UserError: as `route`; or the base does not generate, or the prompt fills the context.
        """
        if self.kind in CLASSIFIERS:
            what = self.kind.partition("-")[0]
            raise UserError(f"{type(self.base).__name__} classifies {what}s and generates nothing; call forward")
        if inputs is not None:
            options["input_ids"] = inputs
        self._refuse_long(options, room=1)
        routing = self.route(**options) if routing is None else routing
        with self.mixer.using(routing.coefficients):
            output = self.base.generate(**options)
        return (output, routing) if return_routing else output

    @torch.no_grad()
    def as_static(self, weights: Mapping[str, float] | Tensor, *, head: str | None = None) -> Any:
        """Make the plain model of fixed coefficients: θ₀ + Σ_e c_e τ_e; no adapter, no router, no routing.

        Args:
            weights: one coefficient per expert, the same in all layers; or float (L, E), one per layer and expert, such
                as a sample's ``routing.coefficients[i]``.
            head: whose it has, where experts have heads of their own; by default that of the only expert in it.

        Returns:
            A model of transformers, with weights of its own.

        Raises:
            UserError: an expert that is not there, a tensor of another shape, no head or an unknown one, or a quantised
                base.
        """
        if isinstance(weights, Mapping):
            unknown = sorted(set(weights) - set(self.experts))
            if unknown:
                raise UserError(f"as_static: no expert {unknown[0]!r}; the model has: {', '.join(self.experts)}")
            row = torch.tensor([float(weights.get(name, 0)) for name in self.experts])
            weights = row.expand(len(self.mixer.layers), -1)
        expected = (len(self.mixer.layers), len(self.experts))
        if tuple(weights.shape) != expected:
            raise UserError(f"as_static: coefficients of shape {tuple(weights.shape)}, expected {expected}")
        if getattr(self.base, "is_quantized", False):
            raise UserError("as_static: the base is quantised; load the routed model with a base that is not")
        if self.heads is not None and head is None:
            used = [name for name, share in zip(self.experts, weights.any(dim=0).tolist(), strict=True) if share]
            head = used[0] if len(used) == 1 else None
        plain = copy.deepcopy(self.peft_model).unload()
        for path in self.mixer.modules:
            target = plain.get_submodule(path).weight
            merged = target.float()
            for name, value in zip(self.experts, weights[self.mixer.layer_index[path]].tolist(), strict=True):
                delta = self.mixer.delta(path, name) if value else None
                if delta is not None:
                    merged = merged + value * delta.to(merged.device)
            target.copy_(merged)
        for number, name in enumerate(self.experts):
            for path, bias in self.mixer.biases[name].items():
                plain.get_submodule(path).bias.add_(weights[self.mixer.layer_index[path], number] * bias)
        if self.heads is not None:
            self.heads.fix(plain, head, "as_static: head")
        return plain.eval()

    def save_pretrained(self, directory: str | os.PathLike[str], *, base_model: str | None = None) -> None:
        """Write the routed model; the base stays where it is and is named.

        Args:
            directory: is made where it is not there; of what is in it, files of these names are replaced.
            base_model: how to name the base; by default where it was loaded from.

        Raises:
            UserError: an adapter's directory there is a link that leads elsewhere.
        """
        from dataclasses import replace

        from safetensors.torch import save_file

        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for name in self.experts:
            place = within(target, ADAPTERS, name)
            with staging_directory(place) as staging:
                save_adapter(self.peft_model, name, staging / name, self.mixer.paths_of(name))
                place.mkdir(exist_ok=True)
                for file in (staging / name).iterdir():
                    os.replace(file, place / file.name)
            save_biases(target, name, self.mixer.biases[name])
        if self.heads is not None:
            self.heads.save(target)
        state = {key: value.detach().cpu().contiguous() for key, value in self.router.state_dict().items()}
        with file_in_place_after(target / ROUTER_NAME) as beside:
            save_file(state, beside, metadata={"format": "pt"})
        replace(self.routed_config, base_model=base_model or reference_to(self.base_reference, target)).write(target)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload routed model",
    ) -> str:
        """Upload the routed model to a repository of the hub, which is made where it is not there.

        `base_model` is the base's hub id, where it was loaded from a directory; `token` by default that of the login.

        Returns:
            The commit's address.

        Raises:
            UserError: the base is a directory of this machine, and no `base_model` is given.
        """
        import tempfile

        from huggingface_hub import create_repo, upload_folder

        if base_model is None and os.path.isdir(self.base_reference):
            raise UserError(
                f"push_to_hub: the base is the local directory {self.base_reference}, which nobody else has; name its "
                "repository: base_model="
            )
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, base_model=base_model)
            create_repo(repo_id, private=private, token=token, exist_ok=True)
            done = upload_folder(repo_id=repo_id, folder_path=folder, token=token, commit_message=commit_message)
        return done.commit_url

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        device_map: Any = None,
        dtype: str = "auto",
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> NeuronRoutedModel:
        """Load a routed model and its base.

        Args:
            path_or_repo: what `save_pretrained` or `mergekit-neuron route` wrote, or a repository of the hub.
            base_model: another place of the base than the one that is noted: directory or hub id.
            device_map: where the base goes, as transformers takes it; the adapters follow.
            dtype: of the base; ``auto``: as stored.
            revision: of the repository.
            cache_dir: of the hub.

        Raises:
            UserError: there is no routed model, of a format that is known here, or its base is not to be had.
        """
        where = os.fspath(path_or_repo)
        directory = routed_directory(where, revision, cache_dir)
        config = RoutedConfig.read(directory)
        reference = base_model or config.base_reference(directory)
        if base_model is None and config.base_is_local and not os.path.isdir(reference):
            raise UserError(
                f"{where}: its base model was the directory {config.base_model}, which is not there; name "
                "another place: base_model="
            )
        options = {"dtype": dtype, "device_map": device_map, "architecture": config.architecture}
        base = load_base(reference, f"{where}: base {reference}", **options)
        directories = {expert.name: str(within(directory, ADAPTERS, expert.name)) for expert in config.experts}
        for name, file in itertools.product(directories, (CONFIG_NAME, SAFETENSORS_NAME)):
            place = within(directory, ADAPTERS, name, file)
            open_file(place, str(place)).close()  # safetensors waits for a pipe
        resolve_layers(base, config.router.layers, f"{directory / ROUTED_CONFIG}: router.layers")
        router = Router.load(within(directory, ROUTER_NAME), config.router, len(config.experts))
        biases = {e.name: load_biases(directory, e.name, base) for e in config.experts if e.biases}
        peft_model = load_experts(base, directories, where)
        heads = HeadBank.load(base, config, directory)
        return cls(peft_model, router.requires_grad_(False), config, reference, heads, biases).eval()

    def _mask_of(self, input_ids: Tensor) -> Tensor | None:
        pad = getattr(getattr(self.base, "generation_config", None), "pad_token_id", None)
        pad = getattr(self.config, "pad_token_id", None) if pad is None else pad
        if pad is None or pad == getattr(self.config, "eos_token_id", None) or not bool((input_ids == pad).any()):
            return None
        return (input_ids != pad).long()

    def _refuse_long(self, inputs: Mapping[str, Any], room: int = 0) -> None:
        limit = text_limit(self.config)
        if limit is None or inputs.get("input_ids") is None:
            return
        mask = inputs.get("attention_mask")
        length = int(mask.sum(1).max()) if mask is not None else inputs["input_ids"].shape[1]
        if length + room > limit:
            raise UserError(
                f"the prompt is {length} tokens long, and the context of {type(self.base).__name__} has {limit}; "
                "shorten it"
            )
