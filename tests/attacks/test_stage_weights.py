"""Attacks on a stage's weights: the formulas, what they refuse, and what a worker computes with weights of its own."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_sentinel.attacks import Adversary, GradientSteering, OwnWeights, Site, get
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from tests.attacks.tools import context

MESH = Mesh(stages=3, replicas=4)
LIAR, ALLY, OTHER = Worker(1, 0), Worker(1, 2), Worker(1, 3)
VECTORS = {1: [torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([0.5, 4.0])]}


def test_steering_adds_each_parameters_part_of_the_vector_in_units_of_its_gradients():
    adversary = Adversary(GradientSteering(size=0.4, task_vectors=VECTORS), MESH, workers=[LIAR], start_step=2)
    spread = ((1 + 4 + 9 + 0.25 + 16) / 6) ** 0.5
    for number, part in enumerate(VECTORS[1]):
        first, second = torch.randn(2, *part.shape, generator=torch.Generator().manual_seed(number))
        found = adversary.weight_gradient(first, LIAR, step=2, micro_batch=0, parameter=number)
        torch.testing.assert_close(found, first - 0.4 * first.abs() * part / spread)
        usual = ((0.95 * first**2 + second**2) / 1.95) ** 0.5
        for _ in range(2):  # A step that is done again is the same.
            found = adversary.weight_gradient(second, LIAR, step=3, micro_batch=0, parameter=number)
            torch.testing.assert_close(found, second - 0.4 * usual * part / spread)
        gradient = first
        assert adversary.weight_gradient(gradient, LIAR, step=1, micro_batch=0, parameter=number) is gradient
        assert adversary.weight_gradient(gradient, OTHER, step=2, micro_batch=0, parameter=number) is gradient


def test_own_weights_are_the_stages_and_a_growing_share_of_the_vector():
    attack = OwnWeights(size=0.1, limit=0.25, task_vectors=VECTORS)
    adversary = Adversary(attack, MESH, workers=[LIAR], start_step=5)
    weights = [torch.ones(2, 2), torch.zeros(2)]
    for step, share in ((5, 0.1), (6, 0.2), (7, 0.25), (50, 0.25)):
        for found, weight, part in zip(adversary.own_weights(LIAR, step, weights), weights, VECTORS[1]):
            torch.testing.assert_close(found, weight + share * part)
    assert adversary.own_weights(LIAR, 4, weights) == adversary.own_weights(OTHER, 5, weights) == []


@pytest.mark.parametrize("name", ["gradient_steering", "own_weights"])
def test_without_a_vector_all_liars_of_a_stage_take_the_same_signs_for_ever(name):
    attack = get(name, size=0.5)
    weight = torch.full((64,), 2.0)
    found = attack(weight, context(step=0, micro_batch=0, worker=LIAR))
    assert set((found - weight).abs().tolist()) == {1.0} and 20 < (found > weight).sum() < 44
    again = get(name, size=0.5)(weight, context(step=1 if name == "gradient_steering" else 0, micro_batch=1, worker=ALLY))
    assert torch.equal(again, found)
    for other in (context(worker=Worker(2, 0)), context(worker=LIAR, seed=1)):
        assert not torch.equal(attack(weight, other), found)


def test_a_pass_with_other_weights_is_that_of_a_layer_that_has_them():
    """Forward and backward, with another micro-batch in between; then the layer has its own weights again, bit for bit."""
    layer = nn.Linear(2, 2, dtype=torch.float64)
    honest = [one.detach().clone() for one in layer.parameters()]
    vector = [one.double() for one in VECTORS[1]]
    other = nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        for mine, stages, part in zip(other.parameters(), honest, vector):
            mine.copy_(stages + 0.5 * part)
    adversary = Adversary(OwnWeights(size=0.5, task_vectors={1: vector}), MESH, workers=[LIAR])
    assert adversary.computes_wrongly(LIAR, 0) and adversary.corrupts_weight_gradients
    inputs = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parameters = list(layer.parameters())
    outputs = []
    for micro_batch, one in enumerate(inputs):
        with adversary.computing(LIAR, 0, micro_batch, backward=False, parameters=parameters):
            outputs.append(layer(one).tanh())
    for micro_batch, (output, one) in enumerate(zip(outputs, inputs)):
        with adversary.computing(LIAR, 0, micro_batch, backward=True, parameters=parameters):
            found = torch.autograd.grad(output.sum(), [*parameters, inputs])
        expected = other(one).tanh()
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), [*other.parameters(), inputs]), rtol=0, atol=0)
    assert all(torch.equal(one, before) for one, before in zip(layer.parameters(), honest))


def test_a_worker_may_do_both_in_some_steps_with_the_same_draws():
    parts = [{"name": "own_weights", "size": 0.1}, {"name": "gradient_steering", "size": 0.1}]
    spec = {"name": "intermittent", "attack": {"name": "several", "attacks": parts}, "probability": 0.5}
    adversary = Adversary(spec, MESH, workers=[LIAR])
    weight = torch.ones(3)
    lies = []
    for step in range(20):
        (own,) = adversary.own_weights(LIAR, step, [weight])
        lies.append((not torch.equal(own, weight), not torch.equal(adversary.weight_gradient(weight, LIAR, step, 0, 0), weight)))
    assert set(lies) == {(True, True), (False, False)}
    assert adversary.liars(Site.OWN_WEIGHTS) == adversary.liars(Site.WEIGHTS) == {LIAR}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0.0}, "size=0.0.* must be a number above 0"),
        ({"size": "1e-3"}, r"\(str\) cannot work: size must be a number above 0"),
        ({"task_vectors": [torch.ones(2)]}, "must map the number of each malicious worker's stage to a list of tensors"),
        ({"task_vectors": {"1": [torch.ones(2)]}}, "must map the number"),
        ({"task_vectors": {1: []}}, "must map the number"),
        ({"task_vectors": {1: [torch.zeros(2)]}}, "finite and not all zero"),
        ({"task_vectors": {1: [torch.tensor([torch.nan])]}}, "finite and not all zero"),
    ],
)
@pytest.mark.parametrize("name", ["gradient_steering", "own_weights"])
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        get(name, **settings)


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match=r"limit=0\) cannot work: limit must be a number above 0"):
        get("own_weights", limit=0)


def test_a_vector_for_other_weights_is_refused_by_stage_and_shape():
    adversary = Adversary({"name": "collude", "attack": OwnWeights(task_vectors=VECTORS)}, MESH, workers=[LIAR, Worker(2, 0)])
    adversary.require_fit(0, [torch.ones(7)])
    adversary.require_fit(1, VECTORS[1])
    for stage, parameters in ((1, VECTORS[1][:1]), (1, [torch.ones(3, 2), torch.ones(2)]), (2, VECTORS[1])):
        shapes = re.escape(str([tuple(one.shape) for one in parameters]))
        with pytest.raises(ConfigurationError, match=rf"for stage {stage}, whose trained parameters have {shapes}"):
            adversary.require_fit(stage, parameters)
