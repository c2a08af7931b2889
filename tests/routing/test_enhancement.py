"""Stage 1: the greedy split on a loss that is known, neurons kept whole, and the promise about the tolerance."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from pydantic import TypeAdapter

from neuron_methods.adapters.live import save_adapter
from neuron_methods.neurons import layer_of
from neuron_methods.routing.account import describe_enhancement
from neuron_methods.routing.base import load_base
from neuron_methods.routing.enhancement import Enhanced, HeldOut, enhance_expert, kept_paths, untouched
from neuron_methods.routing.experts import load_experts
from neuron_methods.routing.importance import factor_masks, keep_masks, measure_importance, neurons_of
from neuron_methods.routing.mixing import AdapterMixer
from neuron_methods.routing.route_yaml import Enhancement
from tests.support.routed import EXPERTS

KINDS = ["llama", "t5", "vit"]


@pytest.fixture
def load(made):
    """`load("llama")`: (base with adapters, mixer); a fresh one, to be changed at will."""

    def get(kind):
        folder = made(kind)
        base = load_base(str(folder / "base"), "base")
        peft_model = load_experts(base, {name: str(folder / "adapters" / name) for name in EXPERTS}, "test")
        return peft_model, AdapterMixer(peft_model, EXPERTS)

    return get


class Loss:
    """A loss of what is in force: the sum over layers of a price for what is missing of each."""

    samples = 5

    def __init__(self, mixer, prices, expert=0):
        self.mixer, self.prices, self.expert = mixer, prices, expert
        self.factors = {
            path: (module.lora_A[EXPERTS[expert]].weight, module.lora_B[EXPERTS[expert]].weight)
            for path, module in mixer.modules.items()
            if EXPERTS[expert] in module.lora_A
        }
        self.norms = {path: self.norm(path) for path in self.factors}

    def norm(self, path):
        a, b = self.factors[path]
        return float((b @ a).square().sum())

    def __call__(self, _model):
        mixture = self.mixer._mixture.get()
        total = 0.0
        for layer, price in self.prices.items():
            there = 0.0 if mixture is None else mixture.coefficients[0, self.mixer.layers.index(layer), self.expert]
            paths = [path for path in self.factors if layer_of(path) == layer]
            left = sum(map(self.norm, paths)) / sum(self.norms[path] for path in paths)
            total += price * (1 - there * left)
        return float(total)


def order_of(peft_model, mixer):
    importance = measure_importance(peft_model.get_base_model(), mixer, EXPERTS[0], "magnitude", None, by_neuron=False)
    return sorted(BLOCKS, key=importance.layers.get)


BLOCKS = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_drops_from_the_least_important_up_and_stops_at_the_refusals(load):
    peft_model, mixer = load("t5")
    assert set(mixer.layers) == set(BLOCKS)
    order = order_of(peft_model, mixer)
    # Free to drop, too dear, within the tolerance together with the first, and never tried.
    prices = dict(zip(order, (0.004, 1.0, 0.005, 0.0), strict=True))
    settings = Enhancement(select="smallest", tolerance=0.01, patience=1, density=1)
    one = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], Loss(mixer, prices), settings)
    assert [(s.layer, s.kept) for s in one.trace if s.what == "drop"] == [(order[0], True), (order[1], False)]
    assert one.redundant == (order[0],)

    settings = settings.model_copy(update={"patience": 2})
    two = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], Loss(mixer, prices), settings)
    assert set(two.redundant) == {order[0], order[2], order[3]}
    losses = [round(step.loss, 6) for step in two.trace]
    assert losses == [1.009, 0.0, 0.004, 1.004, 0.009, 0.009, 0.009]
    assert [step.what for step in two.trace] == ["base", "original", *["drop"] * 4, "enhanced"]


def test_the_tolerance_is_over_the_original_not_over_the_last_step(load):
    peft_model, mixer = load("t5")
    prices = dict.fromkeys(BLOCKS, 0.008)
    settings = Enhancement(select="smallest", tolerance=0.01, patience=9, density=1)
    enhanced = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], Loss(mixer, prices), settings)
    assert len(enhanced.redundant) == 1


def test_the_best_point_of_the_path_is_kept_and_what_was_dropped_behind_it_is_given_back(load):
    peft_model, mixer = load("t5")
    order = order_of(peft_model, mixer)
    # Dropping helps, costs a little, and would help again: by less than it cost.
    prices = dict(zip(order, (-0.02, 0.008, -0.002, 1.0), strict=True))
    model, settings = peft_model.get_base_model(), Enhancement(tolerance=0.01, patience=9, density=1)
    best = enhance_expert(model, mixer, EXPERTS[0], Loss(mixer, prices), settings)
    assert best.redundant == (order[0],) and best.density == 1
    drops = [(step.layer, step.kept, step.passed) for step in best.trace if step.what == "drop"]
    assert drops == [(order[0], True, True), (order[1], False, True), (order[2], False, True)]
    assert math.isclose(best.trace[-1].loss, -0.02, abs_tol=1e-6)
    smallest = settings.model_copy(update={"select": "smallest"})
    assert len(enhance_expert(model, mixer, EXPERTS[0], Loss(mixer, prices), smallest).redundant) == 3


def test_where_nothing_helps_the_best_is_the_original(load):
    peft_model, mixer = load("t5")
    loss = Loss(mixer, dict.fromkeys(BLOCKS, 0.001))
    before = {path: b.clone() for path, (_, b) in loss.factors.items()}
    best = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], loss, Enhancement(tolerance=1.0, density=0.4))
    assert (best.redundant, best.density, best.trace[-1].loss) == ((), 1.0, best.trace[1].loss)
    assert all(torch.equal(b, before[path]) for path, (_, b) in loss.factors.items())


def test_over_densities_the_one_of_the_lowest_loss_is_kept(load):
    """A loss with its valley between the densities that are tried."""
    peft_model, mixer = load("t5")
    loss = Loss(mixer, {})
    whole = sum(loss.norms.values())

    class Valley(Loss):
        def __call__(self, _model):
            return abs(sum(map(self.norm, self.factors)) / whole - 0.85)

    valley = Valley(mixer, {})
    settings = Enhancement(tolerance=-0.0, density=0.4, patience=1)
    best = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], valley, settings)
    tried = {step.density: step for step in best.trace if step.what == "density"}
    assert list(tried) == pytest.approx([0.4, 0.7, 0.85, 0.925])
    assert best.trace[-1].loss == min(step.loss for step in tried.values()) < best.trace[1].loss
    assert tried[best.density].kept and sum(step.kept for step in tried.values()) == 1
    assert 0.4 < best.density < 1


def test_on_samples_that_had_no_say_both_are_compared_in_pairs(load):
    peft_model, mixer = load("t5")
    order = order_of(peft_model, mixer)
    loss = Loss(mixer, {order[0]: -0.05, order[1]: 1.0})
    noise = torch.linspace(-3, 3, 40, dtype=torch.float64)  # between samples, not between the two experts

    class OfSamples(Loss):
        def of_samples(self, model):
            return noise + 2 * self(model)

    settings = Enhancement(density=1, patience=1)
    held = OfSamples(mixer, loss.prices)
    enhanced = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], loss, settings, held)
    found = enhanced.held_out
    assert (found.samples, found.verdict) == (40, "better")
    assert math.isclose(found.enhanced - found.original, -0.1, abs_tol=1e-6)
    assert math.isclose(found.low, -0.1, abs_tol=1e-6) and math.isclose(found.high, -0.1, abs_tol=1e-6)
    assert "on 40 other samples: loss" in describe_enhancement(enhanced)
    assert describe_enhancement(enhanced).endswith("by -0.1000 (-0.1000 to -0.1000): better")
    one, other = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert HeldOut.compared(one, other).verdict == "no difference that can be told"


def test_samples_that_decide_and_samples_that_do_not(made):
    from neuron_methods.routing.data import Samples

    class Counting(Samples):
        def _loss(self, samples):
            return samples

    for there, wanted, expected in ((100, 64, (64, 36)), (15, 8, (8, 7)), (4, 64, (3, 1)), (90, 20, (20, 20))):
        deciding, held = Counting(None, list(range(there)), 1).losses(wanted)
        assert (len(deciding), len(held)) == expected and not {*deciding} & {*held}


def test_an_expert_keeps_one_layer_at_least(load):
    peft_model, mixer = load("t5")
    settings = Enhancement(select="smallest", tolerance=0.01, density=1)
    prices = dict.fromkeys(BLOCKS, 0.0)
    enhanced = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], Loss(mixer, prices), settings)
    assert len(enhanced.core) == 1


def test_density_is_raised_until_the_loss_allows_it_and_all_are_kept_if_nothing_does(load):
    peft_model, mixer = load("t5")
    prices = dict.fromkeys(BLOCKS, 1.0)
    loss = Loss(mixer, prices)
    before = {path: (a.clone(), b.clone()) for path, (a, b) in loss.factors.items()}
    settings = Enhancement(select="smallest", tolerance=0.0, density=0.3)
    enhanced = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], loss, settings)
    tried = [(step.density, step.kept) for step in enhanced.trace if step.what == "density"]
    assert enhanced.density == 1 and len(tried) == 4 and not any(kept for _, kept in tried)
    for path, (a, b) in loss.factors.items():
        assert torch.equal(a, before[path][0]) and torch.equal(b, before[path][1])

    settings = Enhancement(select="smallest", tolerance=3.8, density=0.3, patience=1)
    peft_model, mixer = load("t5")
    enhanced = enhance_expert(peft_model.get_base_model(), mixer, EXPERTS[0], Loss(mixer, prices), settings)
    original = next(step.loss for step in enhanced.trace if step.what == "original")
    assert enhanced.density < 1
    assert enhanced.trace[-1].loss <= original + settings.tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["magnitude", "activation", "taylor"])
def test_never_worse_than_the_original_by_more_than_the_tolerance(load, made, kind, importance):
    import yaml

    from neuron_methods.models.loading import load_processor
    from neuron_methods.models.reference import Place
    from neuron_methods.routing.base import routable_kind
    from neuron_methods.routing.data import SampleDrawer
    from neuron_methods.routing.route_yaml import RouteConfig

    folder = made(kind)
    config = RouteConfig.model_validate(yaml.safe_load((folder / "routed.yaml").read_text()))
    expert = config.experts[0]
    source = str(folder / expert.data.source)
    expert = expert.model_copy(update={"data": expert.data.model_copy(update={"source": source})})
    peft_model, mixer = load(kind)
    base = peft_model.get_base_model()
    kind = routable_kind(base)
    processor = load_processor(kind.processor, Place(str(folder / "base")), "base")
    loss = SampleDrawer(config, base, processor, kind.kind).of_expert(expert)["calibration"].losses(8)[0]
    settings = Enhancement(select="smallest", tolerance=0.02, importance=importance, samples=8)
    enhanced = enhance_expert(base, mixer, expert.name, loss, settings)
    coefficients = mixer.only(expert.name).clone()
    for layer in enhanced.redundant:
        coefficients[0, mixer.layers.index(layer)] = 0
    with mixer.using(coefficients):
        measured = loss(base)
    assert math.isclose(measured, enhanced.trace[-1].loss, abs_tol=1e-6)
    assert measured <= enhanced.trace[1].loss + settings.tolerance
    assert TypeAdapter(Enhanced).validate_python(json.loads(json.dumps(asdict(enhanced)))) == enhanced


# ------------------------------------------------------------------------------------------ neurons


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_are_kept_whole_and_others_lose_all_of_their_update(load, kind):
    peft_model, mixer = load(kind)
    base = peft_model.get_base_model()
    expert = EXPERTS[0]
    importance = measure_importance(base, mixer, expert, "magnitude", None, by_neuron=True)
    neurons, rows = keep_masks(importance, 0.25)
    before = {path: mixer.delta(path, expert) for path in mixer.modules}
    for path, (factor, mask) in factor_masks(importance, 0.25, mixer).items():
        module = mixer.modules[path]
        weight = (module.lora_B if factor == "B" else module.lora_A)[expert].weight
        weight.data.mul_(mask.unsqueeze(1 if factor == "B" else 0))
    owners = neurons_of(base)
    seen = set()
    for path, delta in before.items():
        owner = owners.owner_of(f"{path}.weight")
        mask = rows[path] if owner is None else neurons[layer_of(path)]
        axis = 0 if owner is None else owner.axis
        seen.add((owner is not None, axis))
        assert mask.sum() == len(mask) - math.floor(0.75 * len(mask)) + 1  # as everywhere: ties with the threshold
        expected = delta * mask.unsqueeze(1 - axis)
        assert torch.allclose(mixer.delta(path, expert), expected, atol=1e-6)
    assert seen == {(False, 0), (True, 0), (True, 1)}


def test_magnitude_of_a_neuron_counts_all_that_it_owns(load):
    peft_model, mixer = load("llama")
    importance = measure_importance(peft_model.get_base_model(), mixer, EXPERTS[0], "magnitude", None, by_neuron=True)
    mlp = "model.layers.1.mlp."
    parts = [(f"{mlp}gate_proj", 0), (f"{mlp}up_proj", 0), (f"{mlp}down_proj", 1)]
    update = sum(mixer.delta(path, EXPERTS[0]).square().sum(1 - axis) for path, axis in parts)
    base = sum(mixer.modules[path].get_base_layer().weight.square().sum(1 - axis) for path, axis in parts)
    assert torch.allclose(importance.neurons["model.layers.1"].float(), (update / base).sqrt(), rtol=1e-4)


def test_layers_weigh_as_their_update_does_against_the_base(load):
    peft_model, mixer = load("llama")
    importance = measure_importance(peft_model.get_base_model(), mixer, EXPERTS[1], "magnitude", None, by_neuron=False)
    paths = [path for path in mixer.modules if layer_of(path) == "model.layers.0"]
    update = sum(float(mixer.delta(path, EXPERTS[1]).square().sum()) for path in paths)
    base = sum(float(mixer.modules[path].get_base_layer().weight.square().sum()) for path in paths)
    assert math.isclose(importance.layers["model.layers.0"], math.sqrt(update / base), rel_tol=1e-4)


# ------------------------------------------------------------------------------------------ what is left


@pytest.mark.parametrize("kind", KINDS)
def test_an_enhanced_expert_is_a_plain_adapter_of_what_is_left(load, made, tmp_path, kind):
    peft_model, mixer = load(kind)
    name = EXPERTS[1]
    whole = untouched(mixer, name)
    dropped = whole.core[0]
    enhanced = Enhanced(name, whole.core[1:], (dropped,), 1.0, 0, ())
    save_adapter(peft_model, name, tmp_path / "adapter", kept_paths(mixer, enhanced), torch.float32)

    base = load_base(str(made(kind) / "base"), "base")
    again = AdapterMixer(load_experts(base, {name: str(tmp_path / "adapter")}, "test"), [name])
    assert dropped not in again.layers and len(again.layers) == len(mixer.layers) - 1
    for path in again.modules:
        assert torch.equal(again.delta(path, name), mixer.delta(path, name))
