"""Faults of whole layers, by themselves; what runs make of them is in tests/pipeline/test_computation_faults.py."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_sentinel.attacks import Adversary, BadRows, GradientContribution, NonFinite, Site, get
from lightning_sentinel.attacks.faults import site_of
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh, Worker
from tests.attacks.tools import SHAPES, context, signal_of

LIAR, OTHER = Worker(1, 0), Worker(1, 1)
MESH = Mesh(3, 4)


@pytest.mark.parametrize(
    ("name", "site"), [("zeros", "message"), ("non_finite", "layer"), ("bit_flip", "product"), ("gradient_contribution", "weights")]
)
def test_where_an_attack_strikes_is_seen_through_what_is_around_it(name, site):
    assert site_of(get(name)).value == site
    assert site_of(get("collude", attack={"name": "intermittent", "attack": name})).value == site


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_for_some_steps(value):
    attack = NonFinite(value, steps=2)
    for step, expected in ((3, False), (4, False), (5, True)):
        sent = attack(torch.ones(2, 3), context(step=step, start_step=3))
        assert bool(sent.isfinite().all()) is expected
    assert not NonFinite(value, steps=None)(torch.ones(1), context(step=10**6)).isfinite()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("garbled", [False, True])
def test_some_rows_are_wrong_as_a_whole(shape, garbled):
    signal = signal_of(shape)
    channels = 1 if signal.ndim == 4 else -1
    rows = (BadRows(0.5, garbled)(signal, context()) != signal).movedim(channels, -1).reshape(-1, signal.shape[channels])
    assert (rows.all(dim=1) == rows.any(dim=1)).all()
    assert int(rows.any(dim=1).sum()) == round(0.5 * len(rows))


@pytest.mark.parametrize("name", ["bad_rows", "non_finite"])
def test_a_fault_is_part_of_the_graph(name):
    signal = signal_of((4, 6)).requires_grad_()
    sent = get(name)(signal, context())
    assert sent.requires_grad and not torch.equal(sent, signal)
    sent.sum().backward()
    assert signal.grad is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NonFinite(1.0), "value must be NaN or an infinity"),
        (lambda: NonFinite(steps=0), "steps must be an integer above 0"),
        (lambda: BadRows(0.0), "share must be a number above 0"),
        (lambda: GradientContribution("1e-3"), r"\(str\) cannot work: factor must be a number"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


class TestAdversary:
    def test_who_fails_when_and_where(self):
        adversary = Adversary("non_finite", MESH, workers=[LIAR], start_step=5)
        assert adversary.fails(LIAR, 5) is Site.LAYER
        assert adversary.fails(LIAR, 4) is adversary.fails(OTHER, 5) is None
        assert Adversary("zeros", MESH, workers=[LIAR]).fails(LIAR, 0) is None

    def test_messages_are_sent_as_they_were_computed(self):
        signal = torch.ones(2, 3)
        for name in ("bad_rows", "gradient_contribution"):
            adversary = Adversary(name, MESH, workers=[LIAR])
            assert adversary.tamper(signal, LIAR, Direction.ACTIVATION, 0, 0) is signal

    @pytest.mark.parametrize(("direction", "forward", "backward"), [("activation", 1, 1), ("gradient", 0, 1), ("both", 1, 1)])
    def test_the_direction_says_whether_the_way_back_is_hit(self, direction, forward, backward):
        adversary = Adversary({"name": "bad_rows", "share": 1.0}, MESH, workers=[LIAR], direction=direction)
        weight = torch.ones(2, 3, requires_grad=True)
        output = adversary.layer_output(weight * 2, LIAR, step=0, micro_batch=0)
        assert bool((output == 0).all()) is bool(forward)
        output.sum().backward()
        assert bool((weight.grad == 0).all()) is bool(backward)

    def test_weight_gradients_of_others_are_left_alone(self):
        adversary, gradient = Adversary("gradient_contribution", MESH, workers=[LIAR]), torch.ones(2)
        assert adversary.weight_gradient(gradient, OTHER, 0, 0, 0) is gradient
        assert adversary.weight_gradient(gradient, LIAR, 0, 0, 0).isnan().all()
        assert Adversary("bad_rows", MESH, workers=[LIAR]).weight_gradient(gradient, LIAR, 0, 0, 0) is gradient

    def test_a_layer_that_returns_something_else_is_refused(self):
        def shorter(signal, context):
            return signal[:1]

        shorter.site = Site.LAYER
        adversary = Adversary(shorter, MESH, workers=[LIAR])
        with pytest.raises(ConfigurationError, match=r"The attack shorter of worker .* returned a tensor of shape \(1,\)"):
            adversary.layer_output(torch.ones(2), LIAR, 0, 0)
