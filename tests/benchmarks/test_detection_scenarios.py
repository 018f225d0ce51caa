"""What is run: keys, references and the lists of suites."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_sentinel import attacks
from lightning_sentinel.attacks.wrappers import parts_of
from lightning_sentinel.benchmarks.detection.attacks import BROKEN, HIDDEN, NAMED, PUBLISHED, attack_named
from lightning_sentinel.benchmarks.detection.scenarios import METHODS, NO_ATTACK, Scenario, Training
from lightning_sentinel.benchmarks.detection.suites import SUITES, Request, scenarios
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.verification.features import FAMILIES, FEATURES

ROOT = Path(__file__).resolve().parents[2]


def request_of(suite: str, **changes: Any) -> Request:
    default = SUITES[suite]
    settings = {
        "training": default.training,
        "fraction": default.fraction,
        "seeds": 1,
        "methods": default.methods,
        "attacks": default.attacks,
        "directions": default.directions,
    }
    return Request(**(settings | changes))


def attack(**changes: Any) -> Scenario:
    return replace(Scenario("sentinel", 0, attack="zeros", spec="zeros", direction="gradient", fraction=0.25), **changes)


@pytest.mark.parametrize("suite", SUITES)
def test_every_run_of_a_suite_has_what_it_is_compared_with(suite: str) -> None:
    runs = scenarios(suite, request_of(suite))
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    for run in runs:
        assert run.clean.key in keys, run.name
        if run.attacked and "unprotected" in SUITES[suite].methods:
            assert run.unprotected.key in keys, run.name


@pytest.mark.parametrize("suite", SUITES)
def test_groups_of_a_table_differ_in_more_than_the_seed(suite: str) -> None:
    runs = scenarios(suite, request_of(suite, seeds=2))
    verified = [run for run in runs if run.method != "unprotected"]
    names = Counter((run.attack, run.direction, run.variant, run.method) for run in verified)
    assert set(names.values()) == {2}


def test_the_attacks_suite_has_every_attack_in_both_directions_under_every_method() -> None:
    runs = scenarios("attacks", request_of("attacks"))
    found = {(run.attack, run.direction, run.method) for run in runs if run.attacked}
    names = PUBLISHED.keys() | HIDDEN.keys()
    assert found == {(n, d, m) for n in names for d in ("activation", "gradient") for m in SUITES["attacks"].methods}
    assert {run.method for run in runs if not run.attacked} == set(SUITES["attacks"].methods)


def test_the_mixed_suite_deals_all_published_attacks() -> None:
    runs = [run for run in scenarios("mixed", request_of("mixed")) if run.attacked]
    assert {run.fraction for run in runs} == {0.25, 0.375}
    assert {run.direction for run in runs} == {"activation", "gradient", "both"}
    assert {run.method for run in runs} == set(METHODS)
    assert all(run.spec == list(PUBLISHED.values()) for run in runs)


def test_the_ablation_changes_the_verification_and_nothing_else() -> None:
    runs = [run for run in scenarios("ablation", request_of("ablation", attacks={"zeros": "zeros"})) if run.method == "sentinel"]
    attacked = {run.variant: run for run in runs if run.attacked and run.direction == "gradient"}
    assert attacked["no momentum"].verification == {"beta_activation": 0.0, "beta_gradient": 0.0}
    assert attacked["only moments"].verification == {"features": ["moments"]}
    assert attacked["without moments"].verification == {"features": ["temporal", "input_output", "extremes"]}
    assert attacked["warm-up of 20 steps"].training == replace(attacked["everything"].training, warmup_steps=20)
    assert attacked["only moments"].unprotected.key == attacked["everything"].unprotected.key


def test_one_worker_lies_however_many_replicas_there_are() -> None:
    runs = [run for run in scenarios("replicas", request_of("replicas")) if run.attacked]
    assert {run.training.replicas for run in runs} == {1, 2, 4, 8, 16}
    assert {run.workers for run in runs} == {((4, 0),)}
    assert {run.fraction for run in runs} == {None}


def test_the_places_suite_has_liars_at_both_ends_in_one_pipeline_and_late() -> None:
    runs = [run for run in scenarios("places", request_of("places")) if run.attacked and run.method == "sentinel"]
    places = {(run.variant, run.direction): run for run in runs}
    assert set(places) == {
        ("first stage", "activation"),
        ("last stage", "gradient"),
        *((variant, direction) for variant in ("one pipeline", "late start") for direction in ("activation", "gradient")),
    }
    assert places["first stage", "activation"].workers == ((0, 0), (0, 1), (0, 2))
    assert places["last stage", "gradient"].workers == ((7, 0), (7, 1), (7, 2))
    assert places["one pipeline", "gradient"].workers == tuple((stage, 0) for stage in range(1, 7))
    late = places["late start", "activation"]
    assert late.make_verification().warmup_steps == 30 and late.training.warmup_steps == 60 and late.fraction == 0.375


def test_one_worker_of_each_middle_stage_is_broken() -> None:
    runs = [run for run in scenarios("faults", request_of("faults")) if run.attacked]
    assert {run.attack for run in runs} == set(BROKEN) and {run.direction for run in runs} == {"both"}
    assert {round(run.fraction * run.training.replicas, 9) for run in runs if run.fraction} == {1}
    assert {attacks.resolve(run.spec).rate for run in runs} == {0.02, 0.002}


def test_the_clean_suite_changes_the_data_under_a_learning_rate_that_decays() -> None:
    runs = scenarios("clean", request_of("clean", seeds=10))
    assert not any(run.attacked for run in runs)
    assert {(run.training.data, run.training.schedule) for run in runs} == {("code", "decay"), ("code+prose", "decay")}
    assert {run.training.steps for run in runs} == {500}
    with pytest.raises(ConfigurationError, match=r"attacks=\['zeros'\] contradicts suite='clean'"):
        scenarios("clean", request_of("clean", attacks={"zeros": "zeros"}))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"method": "paper"},
        {"method": "audited"},
        {"spec": "ones"},
        {"direction": "activation"},
        {"fraction": 0.5},
        {"training": Training(steps=61)},
        {"training": Training(model="gpt")},
        {"verification": {"features": ["moments"]}},
    ],
)
def test_whatever_changes_the_run_changes_its_key(change: dict[str, Any]) -> None:
    assert attack(**change).key != attack().key


def test_names_are_no_part_of_a_key() -> None:
    assert attack(attack="nothing", variant="as ever").key == attack().key
    # Nobody looks on, so it does not matter with what settings.
    assert attack(method="unprotected", verification={"window": 99}).key == attack(method="unprotected").key


def test_keys_are_the_same_in_every_process() -> None:
    code = (
        "from lightning_sentinel.benchmarks.detection.scenarios import Scenario\n"
        "run = Scenario('sentinel', 0, attack='zeros', spec='zeros', direction='gradient', fraction=0.25)\n"
        "print(run.key, run.warmup_key)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT, check=True)
    assert done.stdout.split() == [attack().key, attack().warmup_key]


def test_a_warm_up_is_shared_wherever_it_is_the_same() -> None:
    shared = {attack(method=method).warmup_key for method in ("sentinel", "audited", "duplicated", "unprotected")}
    assert len(shared) == 1
    assert attack(spec="ones", direction="both", fraction=0.5).warmup_key in shared
    others = [attack(method="paper"), attack(seed=1), attack(training=Training(stages=9)), attack(verification={"window": 99})]
    assert len(shared | {other.warmup_key for other in others}) == 1 + len(others)


def test_attacks_that_learn_from_honest_signals_see_the_warm_up() -> None:
    assert attack(spec={"name": "delay", "steps": 10}).remembers
    assert attack(spec=["zeros", {"name": "delay", "steps": 10}]).remembers
    # Who adds wrong weight gradients is compared with what honest ones were, where they are audited.
    for spec in ("gradient_contribution", "bad_rows", {"name": "bit_flip", "phase": "backward_weight"}):
        assert attack(method="audited", spec=spec).remembers and not attack(spec=spec).remembers
    assert not attack().remembers
    assert not attack().clean.remembers


@pytest.mark.parametrize("name", NAMED)
def test_every_attack_is_one_of_the_library(name: str) -> None:
    attacks.resolve(attack_named(name))


def test_the_benchmark_misses_no_attack_of_the_library() -> None:
    used = {type(part) for spec in NAMED.values() for part in (attacks.resolve(spec), *parts_of(attacks.resolve(spec)))}
    assert used == {type(attacks.get(name)) for name in attacks.available()}


def test_what_the_ablation_leaves_out_exists() -> None:
    for run in scenarios("ablation", request_of("ablation", attacks={"zeros": "zeros"})):
        run.make_verification()
        assert set(run.verification.get("features", ())) <= FAMILIES.keys() | set(FEATURES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scenario("sentinal", 0), "method='sentinal' is unknown.*unprotected, paper, sentinel, audited, duplicated"),
        (lambda: attack(fraction=1.0), r"fraction=1.0 cannot work.*between 0 and 1"),
        (lambda: Training(steps=0), "steps=0 cannot work: it must be at least 1"),
        (lambda: Training(warmup_steps=0), "warmup_steps=0 cannot work"),
        (lambda: Training(stages=2), "stages=2 cannot work: the first and the last stage are trusted.*at least 3"),
        (lambda: Training(model="bert"), "model='bert' is unknown.*llama, gpt"),
        (lambda: Training(data="images"), r"data='images' is unknown.*code, prose, code\+prose"),
        (lambda: attack_named("zero"), "attacks='zero' is unknown.*zeros, ones"),
        (lambda: scenarios("atacks", request_of("attacks")), "suite='atacks' is unknown.*attacks, mixed"),
        (lambda: scenarios("attacks", request_of("attacks", seeds=0)), "has no runs"),
    ],
)
def test_bad_settings_are_named_with_the_choices(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_nobody_malicious_is_called_none() -> None:
    assert attack().clean.attack == NO_ATTACK
