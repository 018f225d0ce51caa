"""Making runs: what is kept, what is made again, and one small benchmark from end to end."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from lightning_sentinel import cli
from lightning_sentinel.attacks import AttackContext
from lightning_sentinel.benchmarks.detection import command, runs
from lightning_sentinel.benchmarks.detection.attacks import WITHIN
from lightning_sentinel.benchmarks.detection.insiders import INSIDERS
from lightning_sentinel.benchmarks.detection.measures import Measures, measure
from lightning_sentinel.benchmarks.detection.results import Group
from lightning_sentinel.benchmarks.detection.runs import Campaign, Folder
from lightning_sentinel.benchmarks.detection.scenarios import Scenario, Training
from lightning_sentinel.benchmarks.detection.steerers import STEERERS
from lightning_sentinel.benchmarks.detection.text import corpus
from lightning_sentinel.benchmarks.detection.training import (
    LanguageModel,
    Windows,
    fit,
    make_strategy,
    train_warmup,
    validation_loss,
)
from lightning_sentinel.config import Response
from lightning_sentinel.errors import ConfigurationError, SentinelError
from lightning_sentinel.mesh import Direction, Worker
from lightning_sentinel.verification.audit import relative_error
from tests.benchmarks.test_detection_results import measures

TINY = Training(stages=3, replicas=3, micro_batches=1, warmup_steps=10, steps=6, width=16, sequence_length=16)


def attack(method: str = "sentinel", spec: Any = "zeros", **changes: Any) -> Scenario:
    scenario = Scenario(method, 0, TINY, attack="zeros", spec=spec, direction="activation", workers=((1, 1),))
    return replace(scenario, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "results")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are made, without making them; a warm-up is an empty file."""
    names: list[str] = []

    def instead(scenario: Scenario, warmup: Path | None, vectors: Path | None) -> Measures:
        assert (vectors is None) == (not scenario.moves_weights)
        assert (warmup is None) == scenario.remembers
        assert warmup is None or warmup.is_file()
        if scenario.seed == 13:
            raise RuntimeError("out of luck")
        names.append(scenario.name)
        return measures()

    def touch(scenario: Scenario, path: Path) -> None:
        if scenario.seed == 14:
            raise RuntimeError("no warm-up")
        names.append(f"warm-up {scenario.seed}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(runs, "measure", instead)
    monkeypatch.setattr(runs, "train_warmup", touch)
    # There is nothing to collect after a run that was not made, and looking through all that was imported takes a second.
    monkeypatch.setattr(runs.gc, "collect", lambda: 0)
    return names


def test_what_was_made_before_is_not_made_again(folder: Folder, made: list[str]) -> None:
    scenarios = [attack(), attack("audited"), attack("unprotected")]
    Campaign(scenarios[:2], folder, workers=0).run()
    assert made == ["warm-up 0", *(run.name for run in scenarios[:2])]
    made.clear()
    results = Campaign(scenarios, folder, workers=0).run()
    assert made == [scenarios[2].name]
    assert results == {run.key: measures() for run in scenarios}


def test_a_run_with_other_settings_is_made(folder: Folder, made: list[str]) -> None:
    Campaign([attack()], folder, workers=0).run()
    Campaign([attack(training=replace(TINY, steps=7))], folder, workers=0).run()
    assert len(list((folder.path / "runs").iterdir())) == 2
    assert len(list((folder.path / "warmups").iterdir())) == 2


def test_a_run_that_fails_is_reported_and_the_others_are_made(folder: Folder, made: list[str]) -> None:
    reported: dict[str, Measures | str] = {}
    bad, no_warmup = attack(seed=13), attack(seed=14)
    campaign = Campaign([bad, no_warmup, attack()], folder, 0, lambda run, result: reported.update({run.name: result}))
    results = campaign.run()
    assert list(results) == [attack().key]
    assert "out of luck" in campaign.failures[bad.key]
    assert "no warm-up" in campaign.failures[no_warmup.key]
    assert reported[bad.name] == campaign.failures[bad.key]
    assert not folder.run(bad).exists()


def test_a_file_has_all_settings_and_is_never_half_written(folder: Folder) -> None:
    folder.write(attack(), measures())
    record = json.loads(folder.run(attack()).read_text())
    assert record["settings"]["training"]["replicas"] == 3
    assert record["versions"]["torch"] == torch.__version__
    assert folder.read(attack()) == measures()
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write(attack(seed=1), measures(validation_loss=math.nan))
    assert [file.name for file in (folder.path / "runs").iterdir()] == [f"{attack().key}.json"]


def test_a_process_that_dies_is_given_up_after_some_attempts(
    folder: Folder, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    class Dying(runs._ThisProcess):
        def submit(self, *_: Any, **__: Any) -> Any:
            attempts.append(1)
            raise runs.BrokenProcessPool("killed")

    monkeypatch.setattr(Campaign, "_executor", lambda self, count: Dying())
    campaign = Campaign([attack()], folder, workers=2)
    assert campaign.run() == {}
    assert "fewer --workers" in campaign.failures[attack().key]
    assert len(attempts) == 3


@pytest.mark.parametrize("data", ["code", "prose", "code+prose"])
def test_a_step_has_the_same_windows_whenever_it_is_asked_for(data: str) -> None:
    training = replace(TINY, data=data)
    once, more = iter(Windows(training, 3)), iter(Windows(training, 3))
    steps = [next(once) for _ in range(4)]
    for inputs, targets in steps:
        torch.rand(1)
        again = next(more)
        assert torch.equal(inputs, again[0])
        assert torch.equal(targets, again[1])
        assert inputs.shape == (training.batch_size, training.sequence_length)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(steps[0][0], steps[1][0])
    assert not torch.equal(steps[0][0], next(iter(Windows(training, 4)))[0])


def test_the_text_changes_half_way() -> None:
    training = replace(TINY, data="code+prose")
    inputs = [window for window, _ in zip(Windows(training, 0), range(training.total_steps))]
    half = training.total_steps // 2
    for step, name in ((half - 1, "code"), (half, "prose")):
        expected, _ = corpus(name).batch(training.batch_size, training.sequence_length, 0, step)
        assert torch.equal(inputs[step][0], expected)


def test_what_is_validated_on_is_not_trained_on() -> None:
    for name in ("code", "prose"):
        training, (windows, _) = corpus(name).training, corpus(name).validation(64)
        text = bytes(training.tolist())
        # Licences and the like stand in many files.
        assert sum(bytes(window.tolist()) in text for window in windows) < len(windows) / 5


@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_going_on_from_the_warm_up_is_the_same_training(model: str, tmp_path: Path) -> None:
    scenario = attack(training=replace(TINY, model=model), spec=None, workers=None)
    losses = []
    train_warmup(scenario, tmp_path / "warm.ckpt")
    for warmup in (None, tmp_path / "warm.ckpt"):
        module = LanguageModel(scenario.training, scenario.seed)
        fit(scenario, make_strategy(scenario), module, scenario.training.total_steps, warmup=warmup)
        losses.append(validation_loss(module))
    assert losses[0] == losses[1]
    assert losses[0] < validation_loss(LanguageModel(scenario.training, scenario.seed))
    assert "PL_GLOBAL_SEED" not in os.environ


def test_one_pipeline_goes_on_to_the_end_whoever_lies_in_it() -> None:
    training = replace(TINY, replicas=1, micro_batches=4, warmup_steps=40, steps=12)
    found = measure(attack(training=training, workers=((1, 0),), spec={"name": "scale", "factor": 1e4}), None)
    assert not found.banned_at and found.steps == training.steps
    assert found.tampered_flagged == found.tampered_signals > 0 and found.validation_loss is not None


def test_signals_are_counted() -> None:
    training = replace(TINY, warmup_steps=45, steps=8)
    found = measure(attack(spec={"name": "scale", "factor": 1e4}, training=training), None)
    patience = Response().ban_after
    assert patience is not None
    assert found.guilty == [[1, 1]]
    assert (found.steps, found.signals) == (8, 4 * 3 * 1 * 8)
    assert [1, 1, 45 + patience - 1] in found.banned_at
    assert found.iterations == [patience]
    assert found.tampered_flagged == found.tampered_signals == patience
    # Of the honest ones, those behind a tampered signal cannot be verified.
    assert 0 < found.honest_signals <= found.signals - found.tampered_signals
    assert found.false_bans == len(found.banned_at) - 1
    unseen = measure(attack("unprotected"), None)
    assert (unseen.honest_signals, unseen.tampered_signals, unseen.recall, unseen.precision) == (0, 0, 0.0, 1.0)


def test_signals_are_counted_by_who_sent_them_when_others_serve_a_lane() -> None:
    training = replace(TINY, stages=4, replicas=6, warmup_steps=30, steps=24)
    found = measure(attack(spec={"name": "scale", "factor": 1e4}, training=training, workers=None, fraction=0.34), None)
    assert len(found.guilty) == 4 and found.recall == 1.0
    # Nearly every tampered signal that could be verified is flagged, and none is counted that another worker sent.
    assert found.tampered_flagged <= found.tampered_signals <= 1.1 * found.tampered_flagged


# So wide that the directions do not see everything.
WIDE = replace(TINY, stages=4, replicas=5, warmup_steps=8, steps=4, width=64)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measures]:
    """The warm-up of all runs of such a mesh, and a run that nobody attacks."""
    honest, warmup = Scenario("unprotected", 0, WIDE), tmp_path_factory.mktemp("wide") / "warm.ckpt"
    train_warmup(honest, warmup)
    return warmup, measure(honest, warmup)


@pytest.mark.parametrize("name", [*INSIDERS, "false votes", "false notes", "invented rows"])
def test_insiders_do_what_they_say_and_have_nobody_honest_banned(name: str, wide: tuple[Path, Measures]) -> None:
    warmup, honest = wide
    settings = {"training": WIDE, "attack": name, "spec": WITHIN[name], "direction": "both", "workers": ((1, 1), (2, 3))}
    found = measure(attack("duplicated", **settings), warmup)
    # A false vote costs an honest worker nothing, and the third one has its author banned.
    assert found.false_bans == 0 and found.recall == 1.0 and found.steps == 4
    unprotected = measure(attack("unprotected", **settings), warmup)
    # What is sent in place of an honest signal changes the training; a note, a row and a vote do not.
    assert (unprotected.validation_loss != honest.validation_loss) == (name in INSIDERS)
    assert found.validation_loss == pytest.approx(honest.validation_loss, abs=1e-4)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", STEERERS)
def test_who_knows_the_tolerance_errs_by_a_little_less_each_time(name: str, direction: Direction) -> None:
    steerer = STEERERS[name]()
    steerer.strategy = SimpleNamespace(precision_plugin=Precision(), _run=SimpleNamespace(guard=None))  # type: ignore[assignment]
    drawn = torch.Generator().manual_seed(0)
    for step in range(2):
        signals = [torch.randn(2, 8, 16, generator=drawn) for _ in Direction]
        for one, honest in zip(Direction, signals):
            context = AttackContext.seeded(0, Worker(1, 0), one, step=step, received=signals[0])
            sent = steerer(honest, context)
            if one is direction and (name, one) != ("against the momentum", Direction.ACTIVATION):
                # A tenth of what the table allows in float32.
                assert relative_error(sent, honest) == pytest.approx(0.98e-4, rel=0.01)
                if name in ("map of the activation", "by position", "other tokens"):
                    assert (sent - honest).mean(dim=(0, 1)).norm() < 1e-6


def test_audits_let_pass_who_knows_their_tolerance() -> None:
    found = measure(attack("duplicated", spec="map of the signal", direction="both"), None)
    assert not found.banned_at and 0.9e-4 < max(work[4] for work in found.works) <= 1e-4


def run_command(output: Path, **settings: Any) -> None:
    small: dict[str, Any] = {"stages": 3, "replicas": 3, "micro_batches": 1, "warmup_steps": 10, "steps": 6, "seeds": 1}
    command.detection(output=output, workers=0, **(small | settings))


def test_from_the_command_to_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    settings = {"methods": "unprotected,sentinel", "attacks": ["x10"], "directions": "activation"}
    run_command(output, **settings)
    assert {path.name for path in (output / "attacks").iterdir()} == {"results.csv", "results.json", "table.md", "f1.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert len(list((output / "runs").iterdir())) == 4
    assert len(list((output / "warmups").iterdir())) == 1
    entries = json.loads((output / "attacks" / "results.json").read_text())
    assert {(entry["attack"], entry["method"]) for entry in entries} == {
        (attack, method) for attack in ("none", "x10") for method in ("unprotected", "sentinel")
    }
    assert next(e for e in entries if (e["attack"], e["method"]) == ("none", "unprotected"))["loss_gap"] == 0
    capsys.readouterr()
    run_command(output, **settings)
    assert "4 of 4 runs are in" in capsys.readouterr().out


def test_the_quick_suite_fails_if_detection_got_worse(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "misses", lambda groups: ["audited, gradient zeros: f1 is 0.500 and must be at least 0.99"])
    with pytest.raises(SystemExit, match=r"worse than it must be:\n  audited, gradient zeros: f1 is 0.500"):
        run_command(tmp_path, quick=True)
    monkeypatch.setattr(command, "misses", lambda groups: [])
    run_command(tmp_path, quick=True)


def test_failed_runs_are_named_at_the_end(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def fail(*_: Any) -> Measures:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(runs, "measure", fail)
    with pytest.raises(SentinelError, match=r"(?s)4 of 4 runs failed.*unprotected, none, seed 0.*out of luck.*and 1 more"):
        run_command(tmp_path, methods="unprotected,sentinel", attacks="zeros", directions="gradient")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "sentinal"}, "methods='sentinal' is unknown.*audited, duplicated"),
        ({"attacks": "zero,ones"}, "attacks='zero' is unknown.*zeros, ones"),
        ({"directions": ["sideways"]}, "directions='sideways' is unknown.*activation, gradient, both"),
        ({"suite": "atacks"}, "suite='atacks' is unknown"),
        ({"model": "bert"}, "model='bert' is unknown.*llama, gpt"),
        ({"steps": 0}, "steps=0 cannot work"),
        ({"warmup_steps": 0}, "warmup_steps=0 cannot work"),
        ({"seeds": 0}, "seeds=0 cannot work"),
        ({"fraction": 1.5, "attacks": "zeros"}, "fraction=1.5 cannot work"),
        ({"workers": -1}, "workers=-1 cannot work"),
        ({"suite": "mixed", "quick": True}, "quick=True contradicts suite='mixed'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"output": tmp_path, "attacks": "zeros"} | settings
    with pytest.raises(ConfigurationError, match=message):
        command.detection(**arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["benchmark", "detection", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "which question to answer" in text
    assert (
        "{attacks,mixed,share,ablation,replicas,collusion,places,insiders,tolerance,faults,contributions,backdoor,strength,clean,quick}"
        in text
    )


def test_quick_is_a_switch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="quick=True contradicts suite='share'"):
        cli.main(["benchmark", "detection", "--quick", "--suite", "share", "--output", str(tmp_path)])


def test_groups_are_what_bars_are_asked_about() -> None:
    from lightning_sentinel.benchmarks.detection.bars import BARS

    assert all(hasattr(Group, bar.measure) for bar in BARS)
