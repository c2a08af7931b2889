"""Which neurons does an expert need? Remove the most important 5 % by its profile, and 5 % at random, and compare.

    mergekit-neuron profile ./expert --data task=train.jsonl:input,target --gradients -o expert.safetensors
    python examples/ablation/ablate_neurons.py ./expert expert.safetensors --data task=test.jsonl:input,target

A neuron is removed by zeroing its outgoing weights, its column of the down projection. What that costs is the rise of
the loss on held-out data, in nats per sample's mean target token, and for text the share of samples whose every target
token is predicted, given those before it. Removal at random is the mean over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from neuron_methods.data.feeders import Batch, Feeder
from neuron_methods.data.making import make_feeder
from neuron_methods.data.sources import Sample, SourceReader, parse_source
from neuron_methods.data.texts import TextFeeder
from neuron_methods.kernels.select import keep_threshold
from neuron_methods.models.reference import ModelName
from neuron_methods.neurons import find_modules
from neuron_methods.profiling import NeuronProfile
from neuron_methods.profiling.measured_model import LoadedModel, load_model
from neuron_methods.support.errors import UserError

Masks = dict[str, Tensor]


def importance(profile: NeuronProfile, loaded: LoadedModel, kind: str) -> dict[str, Tensor]:
    """Importance of every neuron, by layer: the statistic of the profile, its sources weighted by tokens."""
    found = {}
    for layer in loaded.neurons.layers:
        tokens = {s: profile.tokens(s, layer.key) for s in profile.sources}
        name = "taylor" if kind == "taylor" else "mean_abs"
        values = sum(n * profile.statistic(name, s, layer.key).double() for s, n in tokens.items())
        if kind == "activation":
            values = values * outgoing(loaded, layer).float().norm(dim=0)
        found[layer.key] = values / sum(tokens.values())
    return found


def outgoing(loaded: LoadedModel, layer) -> Tensor:
    """A layer's outgoing weights, a view of shape (features, neurons)."""
    weight = find_modules(loaded.model, layer).down.weight.data
    return weight if weight.shape[1] == layer.neurons else weight.T


def most_important(scores: dict[str, Tensor], share: float) -> Masks:
    """The top share of all neurons of the model."""
    threshold = keep_threshold(torch.cat(list(scores.values())), share)
    return {key: values >= threshold for key, values in scores.items()}


def at_random(like: Masks, seed: int) -> Masks:
    """As many neurons of the model as in `like`, drawn at random."""
    sizes = [len(mask) for mask in like.values()]
    drawn = torch.zeros(sum(sizes), dtype=torch.bool)
    count = sum(int(mask.sum()) for mask in like.values())
    drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))[:count]] = True
    return dict(zip(like, drawn.split(sizes), strict=True))


@contextmanager
def without(loaded: LoadedModel, neurons: Masks) -> Iterator[None]:
    """Inside, these neurons write nothing."""
    kept = []
    for layer in loaded.neurons.layers:
        weight = outgoing(loaded, layer)
        kept.append((weight, weight.clone()))
        weight[:, neurons[layer.key]] = 0
    try:
        yield
    finally:
        for weight, values in kept:
            weight.copy_(values)


def joined(feeder: TextFeeder, samples: list[Sample], separator: str) -> Batch:
    """Prompts and answers in one sequence each, put together as the expert was trained on them."""
    prompts = feeder.tokenize([text + separator for text in feeder.texts(samples, 0)])
    answers = feeder.tokenize(feeder.texts(samples, 1), special=False)
    both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return feeder.sequences(both, [len(prompt) for prompt in prompts], samples)


@torch.no_grad()
def score(loaded: LoadedModel, feeder: Feeder, batches: list[Batch], samples: int) -> tuple[float, float | None]:
    """(mean loss, share of samples whose every target token is predicted)."""
    total, right, known = 0.0, 0, False
    for batch in batches:
        output = loaded.forward(batch.inputs, with_head=True)
        total += float(feeder.loss(output, batch))
        logits = getattr(output, "logits", None)
        if logits is not None and batch.targets is not None:
            known = True
            wanted = batch.targets if batch.targets.ndim > 1 else batch.targets[:, None]
            predicted = logits.argmax(-1).reshape(len(wanted), -1)[:, : wanted.shape[1]]
            right += int(((predicted == wanted) | (wanted == -100)).all(dim=1).sum())
    return total / samples, right / samples if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the expert: a directory, a hub id, or base+adapter")
    parser.add_argument("profile", help="its profile on its own task")
    parser.add_argument("--data", required=True, metavar="NAME=SOURCE", help="held-out data of the task")
    parser.add_argument("--separator", help="of a decoder's two columns, if not a line break")
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="write JSON, too")
    options = parser.parse_args()
    try:
        report = ablate(options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def ablate(options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Print and return what each removal costs."""
    profile = NeuronProfile.load(options.profile)
    name = ModelName.find(options.model)
    report: dict[str, dict[str, float | None]] = {}
    with load_model(name, "float32") as loaded:
        profile.check_model(loaded.neurons)
        feeder = make_feeder(name, loaded.model, 512, 0)
        reader = SourceReader(parse_source(options.data), feeder.columns)
        feeder.start(reader, True)
        read = reader.samples(options.samples, 0)
        batches, samples = [], 0
        while some := list(itertools.islice(read, options.batch_size)):
            batch = feeder.batch(some) if options.separator is None else joined(feeder, some, options.separator)
            batches.append(batch.to(loaded.device))
            samples += len(some)
        print(
            f"{name.shown}: {samples} samples of {options.data.partition('=')[0]}, {options.share:.0%} of the neurons"
        )
        intact, right = score(loaded, feeder, batches, samples)
        report["intact"] = show("intact", intact, right, intact, None)
        removals = {}
        for kind in ("activation", "taylor"):
            if kind == "activation" or "taylor" in profile.info.statistics:
                removals[kind] = most_important(importance(profile, loaded, kind), options.share)
        rises, rights = [], []
        for seed in range(options.seeds):
            with without(loaded, at_random(removals["activation"], seed)):
                loss, right = score(loaded, feeder, batches, samples)
            rises.append(loss - intact)
            rights.append(right or 0.0)
        chance = sum(rises) / len(rises)
        report["random"] = show("random", intact + chance, sum(rights) / len(rights), intact, None)
        report["random"]["rises"] = rises
        for kind, neurons in removals.items():
            with without(loaded, neurons):
                loss, right = score(loaded, feeder, batches, samples)
            report[kind] = show(kind, loss, right, intact, chance)
    return report


def show(label: str, loss: float, right: float | None, intact: float, chance: float | None) -> dict[str, float | None]:
    """Print one line of the table."""
    ratio = (loss - intact) / chance if chance else None
    line = f"  {label:<11} loss {loss:7.4f}  rise {loss - intact:+8.4f}"
    line += f"  right {right:6.1%}" if right is not None else ""
    print(line + (f"  {ratio:6.1f} times random" if ratio is not None else ""))
    return {"loss": loss, "rise": loss - intact, "right": right, "times_random": ratio}


if __name__ == "__main__":
    main()
