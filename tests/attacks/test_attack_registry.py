from __future__ import annotations

import pytest

from lightning_sentinel import attacks
from lightning_sentinel.errors import ConfigurationError


def test_available_is_sorted_and_complete():
    names = attacks.available()
    assert list(names) == sorted(names)
    published = {"zeros", "ones", "random", "scale", "sign", "bias", "delay", "noise", "momentum_noise"}
    misplaced, shortcuts = {"permute", "swap"}, {"identity", "received_noise", "flip_residual", "surrogate"}
    subtle, wrappers = {"add_noise", "drift", "local", "frame"}, {"intermittent", "collude", "several"}
    faults = {"bad_rows", "gradient_contribution", "gradient_steering", "non_finite", "own_weights"}
    of_products = {"bit_flip", "misplaced_tile", "silent_corruption", "stuck_tile", "wrong_address"}
    roles = {"equivocate", "false_notes", "false_rows", "false_votes"}
    assert set(names) == published | misplaced | shortcuts | subtle | wrappers | faults | of_products | roles


@pytest.mark.parametrize("name", attacks.available())
def test_every_attack_has_defaults_and_is_exported(name):
    attack = attacks.get(name)
    assert callable(attack)
    assert type(attack).__name__ in attacks.__all__
    assert attack == attacks.get(name)


def test_everything_exported_exists():
    assert all(hasattr(attacks, name) for name in attacks.__all__)


def test_get_sets_the_strength():
    assert attacks.get("delay", steps=7) == attacks.Delay(steps=7)
    assert attacks.get("scale").factor == -1.0
    assert attacks.get("sign").probability == 0.5
    assert attacks.get("delay").steps == 100
    assert attacks.get("noise").fraction == 0.99
    assert attacks.get("random").std == 1.0


def test_unknown_name_says_what_there_is():
    with pytest.raises(ConfigurationError) as error:
        attacks.get("scal")
    text = str(error.value)
    assert "'scal'" in text
    assert "Did you mean 'scale'?" in text
    assert all(name in text for name in attacks.available())


def test_unknown_name_without_a_neighbour():
    with pytest.raises(ConfigurationError, match="no attack 'qqqqqqq'") as error:
        attacks.get("qqqqqqq")
    assert "Did you mean" not in str(error.value)


def test_unknown_parameter_says_what_the_attack_takes():
    with pytest.raises(ConfigurationError) as error:
        attacks.get("scale", facto=2.0)
    assert str(error.value) == ("The attack 'scale' has no parameter 'facto'. Did you mean 'factor'? It takes factor=-1.0.")
    with pytest.raises(ConfigurationError, match=r"'zeros' has no parameter 'std'\. It takes no parameters"):
        attacks.get("zeros", std=1.0)


def test_state_is_no_parameter():
    with pytest.raises(ConfigurationError, match="It takes steps=100"):
        attacks.get("delay", _histories={})


def test_resolve():
    def mine(signal, context):
        return -signal

    scale = attacks.Scale(3.0)
    assert attacks.resolve("zeros") == attacks.Zeros()
    assert attacks.resolve({"name": "scale", "factor": -1.0}) == attacks.Scale(-1.0)
    assert attacks.resolve(mine) is mine
    assert attacks.resolve(scale) is scale


def test_resolve_leaves_the_mapping_as_it_is():
    spec = {"name": "scale", "factor": 2.0}
    attacks.resolve(spec)
    assert spec == {"name": "scale", "factor": 2.0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"factor": 2.0}, "has no name.*under the key 'name'"),
        ({"name": 3}, "has no name"),
        ({"name": "scale", "facto": 2.0}, "'scale' has no parameter 'facto'"),
        (attacks.Zeros, "Zeros is a class.*Pass an instance"),
        (3.0, "3.0 of type float is no attack"),
        (None, "None of type NoneType is no attack"),
    ],
)
def test_resolve_refuses(spec, message):
    with pytest.raises(ConfigurationError, match=message):
        attacks.resolve(spec)
