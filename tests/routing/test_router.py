"""Stage 2: training, held-out figures, scores and the threshold."""

import pytest
import torch

from neuron_methods.routing.route_yaml import RouterSettings
from neuron_methods.routing.routed_files import RouterShape
from neuron_methods.routing.router import Router, axes_for, threshold_for
from neuron_methods.routing.router_training import Inputs, train_router

WIDTH = 12


def inputs(count, seed, spread=0.5, shift=0.0):
    """Three clouds around centres of their own."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.eye(3, WIDTH)
    labels = torch.arange(count) % 3
    noise = torch.randn(count, WIDTH, generator=generator) * spread
    return Inputs(centres[labels] + noise + shift, labels)


SETTINGS = RouterSettings(hidden=16, epochs=60, learning_rate=0.01)


def test_learns_who_an_input_belongs_to_and_tells_on_inputs_it_never_saw():
    router, report = train_router(inputs(120, 0), inputs(80, 1), SETTINGS)
    assert report.accuracy == 1 and report.accuracies == [1, 1, 1]
    assert report.training == 120 and report.held_out in (39, 40)
    probabilities, _ = router(inputs(60, 2).states)
    assert (probabilities.argmax(1) == inputs(60, 2).labels).all()


def test_accuracy_is_that_of_the_half_that_decided_nothing():
    calibration = inputs(80, 1)
    states = calibration.states.clone()
    for expert in range(3):  # every second input of an expert looks like the next one's
        places = (calibration.labels == expert).nonzero().squeeze(1)[1::2]
        states[places] = states[places].roll(1, dims=1)
    router, report = train_router(inputs(120, 0), Inputs(states, calibration.labels), SETTINGS)
    assert report.accuracy < 0.4  # the last expert's look like nobody's
    assert (router(inputs(60, 2).states)[0].argmax(1) == inputs(60, 2).labels).all()


def test_halves_share_every_expert_out():
    first, second = inputs(60, 0).halves()
    assert torch.bincount(first.labels).tolist() == torch.bincount(second.labels).tolist() == [10, 10, 10]


def test_the_same_seed_gives_the_same_router_and_leaves_others_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one, _ = train_router(inputs(60, 0), inputs(40, 1), SETTINGS)
    assert torch.equal(torch.rand(1), before)
    two, _ = train_router(inputs(60, 0), inputs(40, 1), SETTINGS)
    other, _ = train_router(inputs(60, 0), inputs(40, 1), SETTINGS.model_copy(update={"seed": 1}))
    assert torch.equal(one.outer.weight, two.outer.weight)
    assert not torch.equal(one.outer.weight, other.outer.weight)


def test_training_stops_when_held_out_loss_no_longer_falls():
    noise = Inputs(torch.randn(60, WIDTH), torch.arange(60) % 3)  # nothing to learn
    settings = SETTINGS.model_copy(update={"patience": 3, "epochs": 200})
    _, report = train_router(noise, Inputs(torch.randn(40, WIDTH), torch.arange(40) % 3), settings)
    assert report.epochs < 60


def test_few_inputs_of_an_expert_count_as_much_as_many():
    train = inputs(300, 0, spread=1.6)
    kept = (train.labels != 2) | (torch.arange(300) < 24)
    router, _ = train_router(Inputs(train.states[kept], train.labels[kept]), inputs(60, 1, spread=1.6), SETTINGS)
    test = inputs(300, 2, spread=1.6)
    found = router(test.states)[0].argmax(1)
    assert (found[test.labels == 2] == 2).float().mean() > 0.8


@pytest.mark.parametrize("score", ["combined", "distance", "probability", "energy"])
def test_the_threshold_lets_the_share_in_that_was_asked_for(score):
    settings = SETTINGS.model_copy(update={"ood_score": score, "in_domain_share": 0.8})
    calibration = inputs(400, 1, spread=1.2)
    router, report = train_router(inputs(300, 0, spread=1.2), calibration, settings)
    decide, _ = calibration.halves()
    passed = (router(decide.states)[1] >= router.threshold).float().mean()
    assert 0.8 <= passed <= 0.81
    assert abs(report.in_domain - 0.8) < 0.1


def test_threshold_is_the_largest_that_enough_scores_reach():
    scores = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert threshold_for(scores, 1.0) == 1
    assert threshold_for(scores, 0.75) == 2
    assert threshold_for(scores, 0.5) == 3
    assert threshold_for(scores, 0.51) == 2
    assert threshold_for(scores, 1.0, margin=0.5) == 0.5  # the median is 2


def test_distance_knows_what_is_far_from_everything_where_the_softmax_is_sure_of_itself():
    far = torch.zeros(5, WIDTH)
    far[:, 0] = 30  # in the direction of the first expert
    for score, outside in (("distance", True), ("combined", True), ("probability", False)):
        settings = SETTINGS.model_copy(update={"ood_score": score})
        router, _ = train_router(inputs(120, 0), inputs(80, 1), settings)
        probabilities, scores = router(far)
        assert probabilities[:, 0].min() > 0.99
        assert ((scores < router.threshold) == outside).all()


def test_what_lies_between_experts_or_lacks_what_makes_them_is_claimed_by_none():
    settings = SETTINGS.model_copy(update={"ood_score": "energy", "epochs": 200, "patience": 200})
    train = inputs(300, 0, spread=0.3)
    router, report = train_router(train, inputs(200, 1, spread=0.3), settings)
    assert report.in_domain > 0.85
    between = (train.states[train.labels == 0] + train.states[train.labels == 1]) / 2
    assert (router(between)[1] >= router.threshold).float().mean() < 0.1
    assert (router(torch.zeros(1, WIDTH))[1] < router.threshold).all()


def test_background_is_left_to_the_base():
    generator = torch.Generator().manual_seed(3)
    background = torch.randn(200, WIDTH, generator=generator) * 0.5 + 3 * torch.eye(1, WIDTH).roll(5)
    settings = SETTINGS.model_copy(update={"ood_score": "probability"})
    known, _ = train_router(inputs(120, 0), inputs(80, 1), settings, background)
    assert (known(background)[1] < known.threshold).float().mean() > 0.95
    assert known(inputs(60, 2).states)[0].shape == (60, 3)


def test_distance_is_mahalanobis_where_all_axes_are_kept():
    cloud = inputs(400, 0)
    router = Router(RouterShape((0,), "mean", WIDTH, 4, WIDTH - 1, 2, 1.0, "distance"), 3)
    router.fit_scatter(cloud.states, cloud.labels)
    normal = router.standardised(cloud.states)
    within = normal - router.centres[cloud.labels]
    inverse = torch.linalg.inv(within.T @ within / len(within))
    gap = router.standardised(torch.ones(1, WIDTH)) - router.centres
    expected = -((gap @ inverse * gap).sum(1) / WIDTH).sqrt().min()
    scores = router.scores(torch.ones(1, WIDTH), torch.zeros(1, 4), "distance")
    assert torch.allclose(scores, expected, rtol=1e-3)


def test_a_feature_that_never_varied_is_not_blown_up():
    cloud = inputs(60, 0)
    cloud.states[:, -1] = 2.0
    router, _ = train_router(cloud, cloud, SETTINGS)
    moved = cloud.states.clone()
    moved[:, -1] += 1e-4
    logits = torch.zeros(60, 4)
    found, expected = (router.scores(states, logits, "distance") for states in (moved, cloud.states))
    assert torch.allclose(found, expected, atol=0.05)


def test_axes_are_no_more_than_the_inputs_can_tell():
    assert [axes_for(n, w) for n, w in ((4, 100), (80, 100), (10_000, 1000), (10_000, 8))] == [1, 10, 64, 7]
