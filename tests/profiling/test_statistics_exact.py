"""Profiles of tiny models against everything computed one sample at a time, unpadded, and kept in full."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers

from neuron_methods.neurons import find_modules, neuron_map
from neuron_methods.profiling import NeuronProfile, Settings, measure_profile
from tests.support import tiny

TOP = 4
TEXT_KINDS = ["llama", "mistral", "phi3", "starcoder2", "t5", "t5-gated"]


class Watched:
    """A model whose MLP activations and gates are kept whole, with the gradients that autograd leaves on them."""

    def __init__(self, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        self.model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
        self.neurons = neuron_map(config)
        self.activations: dict[str, torch.Tensor] = {}
        self.fires: dict[str, torch.Tensor] = {}
        for layer in self.neurons.layers:
            down, gate = find_modules(self.model, layer)
            down.register_forward_pre_hook(self._keep_activation(layer.key))
            if gate is not None:
                gate.register_forward_hook(self._keep_gate(layer.key, layer.neurons))

    def _keep_activation(self, key):
        def hook(_, args):
            args[0].retain_grad()
            self.activations[key] = args[0]
            self.fires.setdefault(key, args[0].detach() > 0)

        return hook

    def _keep_gate(self, key, neurons):
        def hook(_module, _, output):
            self.fires[key] = output.detach()[..., :neurons] > 0

        return hook

    def run(self, **inputs) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Layer -> activations, firing, activation × gradient, each (samples, tokens, neurons)."""
        self.fires.clear()
        self.model(**inputs).loss.backward()
        return {
            key: (a.detach(), self.fires[key].float(), (a.detach() * a.grad).abs())
            for key, a in self.activations.items()
        }


def reference(runs: list[dict], prefixes: dict[str, list] | None = None):
    """Statistics of whole-memory runs, and per neuron the strongest activations of distinct tokens.

    `prefixes` says of each layer's tokens, in order, what their activations depend on; None: they are all distinct.
    """
    result, tops = {}, {}
    for key in runs[0]:
        activations, fires, taylor = (torch.cat([run[key][i].double().flatten(0, 1) for run in runs]) for i in range(3))
        result[key] = {
            "mean_abs": activations.abs().mean(0),
            "second_moment": activations.square().mean(0),
            "firing_rate": fires.mean(0),
            "taylor": taylor.mean(0),
        }
        first: dict = {}
        for index, identity in enumerate(prefixes[key] if prefixes else range(len(activations))):
            first.setdefault(identity, index)
        distinct = activations[list(first.values())]
        strongest = distinct.gather(0, distinct.abs().argsort(dim=0, descending=True)[:TOP])
        tops[key] = [[value for value in column if value != 0] for column in strongest.T.tolist()]
    return result, tops


def assert_profile_is(profile: NeuronProfile, source: str, expected, tokens: dict[str, int], tops=None) -> None:
    """Exemplars are compared by activation: of samples that begin alike any may be named."""
    assert set(profile.layers) == set(expected)
    for layer, statistics in expected.items():
        assert profile.tokens(source, layer) == tokens[layer]
        for name, values in statistics.items():
            measured = profile.statistic(name, source, layer).double()
            torch.testing.assert_close(measured, values, rtol=1e-4, atol=1e-8, msg=f"{name} of {layer}")
        for neuron, strongest in enumerate(tops[layer] if tops else ()):
            found = profile.exemplars(source, layer, neuron)
            assert [e.activation for e in found] == pytest.approx(strongest, rel=1e-4, abs=1e-6)
            assert len({(e.row, e.position) for e in found}) == len(strongest)


def profile_of(folder: Path, data: str, tmp_path: Path, **settings) -> NeuronProfile:
    output = tmp_path / "profile.safetensors"
    measure_profile(str(folder), [data], output, Settings(gradients=True, top=TOP, samples=0, **settings))
    return NeuronProfile.load(output)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_text_models(kind, tmp_path):
    folder = tiny.save_model(kind, tmp_path / "model", bos=True)
    data = tiny.write_texts(tmp_path / "texts.jsonl", 11)
    watched, tokenizer = Watched(folder), tiny.build_tokenizer(bos=True)
    texts, targets = tiny.sentences(11, 0), tiny.sentences(11, 1)
    runs, prefixes = [], defaultdict(list)
    for text, target in zip(texts, targets, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        labels = tokenizer(target, return_tensors="pt")["input_ids"] if kind.startswith("t5") else ids
        run = watched.run(input_ids=ids, labels=labels)
        runs.append(run)
        for layer, (activations, *_) in run.items():
            length = activations.shape[1]
            if layer.startswith("encoder"):
                prefixes[layer] += [(text, p) for p in range(length)]
            elif layer.startswith("decoder"):
                prefixes[layer] += [(text, *labels[0, :p].tolist()) for p in range(length)]
            else:
                prefixes[layer] += [tuple(ids[0, : p + 1].tolist()) for p in range(length)]
    columns = "input,target" if kind.startswith("t5") else "text"
    expected, tops = reference(runs, prefixes)
    profile = profile_of(folder, f"words={data}:{columns}", tmp_path, batch_size=3)
    assert_profile_is(profile, "words", expected, {layer: len(p) for layer, p in prefixes.items()}, tops)


def test_instructions_lose_on_their_targets_alone(tmp_path):
    folder = tiny.save_model("llama", tmp_path / "model")
    data = tiny.write_texts(tmp_path / "texts.jsonl", 7)
    watched, tokenizer = Watched(folder), tiny.build_tokenizer()
    runs = []
    for text, target in zip(tiny.sentences(7, 0), tiny.sentences(7, 1), strict=True):
        prompt, answer = tokenizer(text + " or ")["input_ids"], tokenizer(target)["input_ids"]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        runs.append(watched.run(input_ids=ids, labels=labels))
    expected, _ = reference(runs)
    profile = profile_of(folder, f"qa={data}:input,target", tmp_path, batch_size=4, separator=" or ")
    count = sum(run["layers.0"][0].shape[1] for run in runs)
    assert_profile_is(profile, "qa", expected, dict.fromkeys(expected, count))


def pixels(paths: list[Path]) -> torch.Tensor:
    from PIL import Image

    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    return processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]


def test_vit(tmp_path):
    folder = tiny.save_model("vit", tmp_path / "model")
    images = tiny.write_images(tmp_path / "images", 3)
    paths = sorted(images.rglob("*.png"))
    watched = Watched(folder)
    runs = [
        watched.run(pixel_values=pixels([path]), labels=torch.tensor([tiny.LABELS[path.parent.name]])) for path in paths
    ]
    expected, tops = reference(runs)
    profile = profile_of(folder, f"pictures={images}", tmp_path, batch_size=4)
    assert_profile_is(profile, "pictures", expected, dict.fromkeys(expected, 5 * len(paths)), tops)
    best = profile.exemplars("pictures", "encoder.layer.1", 3)[0]
    activations = runs[best.row]["encoder.layer.1"][0][0]
    assert activations[best.position, 3] == pytest.approx(best.activation, rel=1e-4)
    assert best.text == {"image": "/".join(paths[best.row].parts[-2:])}


def test_clip_watches_both_towers(tmp_path):
    folder = tiny.save_model("clip", tmp_path / "model")
    images = tiny.write_images(tmp_path / "images", 2)
    paths = sorted(images.rglob("*.png"))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    from PIL import Image

    values = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    tokenizer, watched = tiny.build_tokenizer(), Watched(folder)
    ids = tokenizer([f"a photo of a {path.parent.name}" for path in paths], return_tensors="pt")["input_ids"]
    # One batch: the contrastive loss is over all pairs in it; ours adds up over samples, theirs is the mean.
    run = watched.run(input_ids=ids, pixel_values=values, return_loss=True)
    run = {key: (a, fires, taylor * len(paths)) for key, (a, fires, taylor) in run.items()}
    expected, _ = reference([run])
    profile = profile_of(folder, f"pairs={images}:image,label", tmp_path, batch_size=len(paths))
    tokens = {key: 5 * len(paths) if key.startswith("vision") else ids.numel() for key in expected}
    assert_profile_is(profile, "pairs", expected, tokens)
    assert "token" in profile.exemplars("pairs", "text_model.encoder.layers.1", 0)[0].text
    assert "image" in profile.exemplars("pairs", "vision_model.encoder.layers.1", 0)[0].text
