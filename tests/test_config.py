from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

import lightning_sentinel as ls
from lightning_sentinel.callbacks import AttackInjector
from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification import Calibration
from lightning_sentinel.verification.features import FAMILIES, FEATURES, watched

INVALID_VERIFICATION = [
    ("method", "tukey"),
    ("method", ""),
    ("method", None),
    ("warmup_steps", 0),
    ("warmup_steps", -5),
    ("window", 7),
    ("window", 0),
    ("window", -512),
    ("false_positive_rate", 0),
    ("false_positive_rate", 1),
    ("false_positive_rate", 1.0),
    ("false_positive_rate", -0.01),
    ("false_positive_rate", 5),
    ("false_positive_rate", math.nan),
    ("beta_activation", 1),
    ("beta_activation", 1.0),
    ("beta_activation", -0.1),
    ("beta_activation", math.nan),
    ("beta_gradient", 1.5),
    ("beta_gradient", -1e-9),
    ("beta_gradient", math.inf),
    ("projections", 0),
    ("projections", -16),
    ("seed", 2**63),
    *((name, value) for name in ("warmup_steps", "window", "projections", "seed") for value in (10.5, True, "12", math.nan)),
    *((name, value) for name in ("false_positive_rate", "beta_activation", "beta_gradient") for value in (False, "0.5", None, 0j)),
    ("features", "norm"),
    ("features", 3),
    ("features", [1]),
]
INVALID_RESPONSE = [
    ("on_flag", "ban"),
    ("on_flag", "LOG"),
    ("on_flag", None),
    ("ban_after", 0),
    ("ban_after", -1),
    ("false_accusations", 0),
    ("audit_rate", 0),
    ("audit_rate", -1),
    ("audit_rate", 1.5),
    ("audit_rate", math.nan),
    ("audit_rate", math.inf),
    ("ledger", ""),
    ("ledger", "/"),
    ("ledger", True),
    *((name, value) for name in ("ban_after", "false_accusations", "tolerated") for value in (2.5, True, "3", math.nan)),
    ("audit_rate", True),
    ("audit_rate", "0.1"),
    ("banned", Worker(1, 0)),
    ("banned", "(1, 0)"),
    ("banned", 3),
]


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [(Verification, *case) for case in INVALID_VERIFICATION] + [(Response, *case) for case in INVALID_RESPONSE],
)
def test_what_cannot_work_is_refused_by_name_and_value(owner: type, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"{owner.__name__}.{name}={value!r}")) as caught:
        owner(**{name: value})
    assert "must be" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "paper"},
        {"warmup_steps": 1},
        {"window": 8},
        {"false_positive_rate": 1e-6},
        {"false_positive_rate": 0.999},
        {"beta_activation": 0},
        {"beta_activation": 0.999},
        {"beta_gradient": 0.0},
        {"projections": 1},
        {"seed": -3},
    ],
    ids=str,
)
def test_what_is_just_possible_is_accepted(settings: dict[str, Any]) -> None:
    verification = Verification(**settings)
    assert {name: getattr(verification, name) for name in settings} == settings


@pytest.mark.parametrize("written", [Worker(1, 0), (1, 0), [1, 0], {"stage": 1, "replica": 0}], ids=str)
def test_workers_are_written_in_any_way(written: Any) -> None:
    assert Response(banned=[written]) == Response(banned=(Worker(1, 0),))
    assert ls.AttackInjector("zeros", workers=[written]).workers == {Worker(1, 0)}


@pytest.mark.parametrize("written", [1, (1,), (1, 0, 2), (1.0, 0), (-1, 0), (True, 0), "10", {"stage": 1}, None], ids=str)
def test_what_is_no_worker_is_said(written: Any) -> None:
    says = rf"contains {re.escape(repr(written))}, which is no worker.*pair \(1, 0\)"
    with pytest.raises(ConfigurationError, match=rf"Response\.banned {says}"):
        Response(banned=[written])
    with pytest.raises(ConfigurationError, match=rf"AttackInjector\(workers=\.\.\.\) {says}"):
        AttackInjector("zeros", workers=[written])


@pytest.mark.parametrize("ban_after", [1, 5, 1000])
def test_a_run_that_only_reports_bans_nobody(ban_after: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Response(on_flag="log", ban_after=ban_after)
    message = str(caught.value)
    assert "on_flag='log'" in message and f"ban_after={ban_after}" in message
    assert "Set ban_after=None" in message


def test_that_contradiction_is_named_even_where_ban_after_was_left_out() -> None:
    with pytest.raises(ConfigurationError, match="ban_after=5"):
        Response(on_flag="log")


@pytest.mark.parametrize(
    "settings",
    [
        {"on_flag": "log", "ban_after": None},
        {"ban_after": None},
        {"ban_after": 1},
        {"false_accusations": None},
        {"false_accusations": 1},
        {"audit_rate": 1e-9},
        {"audit_rate": 1},
        {"on_flag": "log", "ban_after": None, "audit_rate": 0.02},
        {"audit_rate": None},
        {"audit_rate": 0.02, "ban_after": None},
    ],
    ids=str,
)
def test_responses_that_work(settings: dict[str, Any]) -> None:
    response = Response(**settings)
    assert {name: getattr(response, name) for name in settings} == settings


def test_the_defaults_are_the_published_decays_and_a_rate_of_one_percent() -> None:
    assert dataclasses.asdict(Verification()) == {
        "method": "sentinel",
        "warmup_steps": 100,
        "window": 512,
        "false_positive_rate": 0.01,
        "beta_activation": 0.9,
        "beta_gradient": 0.8,
        "projections": 16,
        "features": None,
        "seed": None,
    }
    assert Response() == Response(on_flag="exclude", ban_after=5, audit_rate=0.01)


def test_settings_are_public_and_do_not_change() -> None:
    assert (ls.Verification, ls.Response) == (Verification, Response)
    for settings, name in ((Verification(), "window"), (Response(), "ban_after")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, name, 9)


def test_a_valid_setting_cannot_be_replaced_by_an_invalid_one() -> None:
    with pytest.raises(ConfigurationError, match=r"Verification\.window=3"):
        dataclasses.replace(Verification(), window=3)


# --- Names of features


def test_all_features_of_the_method_are_watched_unless_some_are_named() -> None:
    assert watched(Verification()).tolist() == [True] * len(FEATURES)
    paper = watched(Verification(method="paper"))
    assert [name for name, is_watched in zip(FEATURES, paper) if is_watched] == list(FAMILIES["temporal"][:4])


@pytest.mark.parametrize(
    ("method", "names", "expected"),
    [
        ("sentinel", ["norm"], {"norm"}),
        ("sentinel", ("moments", "norm", "l1"), {*FAMILIES["moments"], "l1"}),
        ("sentinel", list(FAMILIES), set(FEATURES)),
        ("paper", ["temporal"], set(FAMILIES["temporal"][:4])),
        ("paper", ["sign_flip_ratio"], {"sign_flip_ratio"}),
    ],
)
def test_features_are_chosen_by_name_or_family(method: Any, names: Any, expected: set[str]) -> None:
    mask = watched(Verification(method=method, features=names))
    assert {name for name, is_watched in zip(FEATURES, mask) if is_watched} == expected


@pytest.mark.parametrize(
    ("method", "names", "wrong"),
    [
        ("sentinel", ["l3"], "l3"),
        ("sentinel", ["l1", "Norm"], "Norm"),
        ("sentinel", [""], ""),
        ("paper", ["norm"], "norm"),
        ("paper", ["moments"], "moments"),
        ("paper", ["l1", "channel_l2"], "channel_l2"),
    ],
)
def test_a_feature_that_the_method_lacks_is_named_beside_those_it_has(method: Any, names: Any, wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=r"Verification\.features names") as caught:
        Calibration(Mesh(2, 2), Verification(method=method, features=names))
    message = str(caught.value)
    assert repr(wrong) in message and f"method={method!r}" in message
    assert all(name in message for name in (FEATURES if method == "sentinel" else FAMILIES["temporal"][:4]))
    assert ("or a family" in message) == (method == "sentinel")


def test_watching_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"features=\(\) watches nothing"):
        watched(Verification(features=()))
