"""After workers were caught: the others do their work, and the weights are those of a run that nobody attacked. And what becomes of
workers that nothing catches, because they corrupt gradients inside their stage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.trust.evidence_files import read_evidence
from lightning_sentinel.trust.verify_evidence import verify_evidence
from tests.distributed import campaign, tasks, world

STAGES, REPLICAS, BATCH, STEPS, START = 3, 4, 6, 6, 2
PROCESSES = Mesh(2, 3)
GUILTY = [ls.Worker(1, 1), ls.Worker(2, 3), ls.Worker(0, 0)]
"""One of them speaks for its stage: to checkpoints, and to the stage that shares a weight with it."""
ATTACKS = ["sign", {"name": "add_noise", "strength": 0.02}, "noise"]


class Sharing(tasks.Classifier):
    """The first stage and the last have a weight in common."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.net[4].linear.weight = self.net[1].linear.weight


OPTIONS = {"gradient_clip_val": 0.05, "limit_val_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": 0}


def attacked(mesh: Mesh, engine: str, folder: Path | None = None, of: dict[ls.Worker, Any] | None = None) -> dict[str, Any]:
    """Everything is recomputed: also what no feature shows, in a warm-up in which nobody is flagged."""
    virtual, response = engine == "virtual", ls.Response(audit_rate=1.0)
    strategy = ls.SentinelStrategy(
        mesh.stages,
        mesh.replicas,
        micro_batches=3,
        response=response,
        engine=engine,  # type: ignore[arg-type]
        timeout=tasks.PATIENCE,
    )
    module, guilty = Sharing("adamw"), of or liars(mesh)
    injector = ls.AttackInjector(list(guilty.values()), workers=list(guilty), start_step=START)
    logger = False if folder is None else CSVLogger(folder, name="")
    run = tasks.trainer(strategy, 1 if virtual else len(mesh.workers), STEPS, [injector], logger=logger, **OPTIONS)
    data = [tasks.loader(BATCH * mesh.replicas) if virtual else tasks.loader(BATCH, mesh.replicas) for _ in range(2)]
    run.fit(module, *data)
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if not name.startswith("sentinel/")}
    assert strategy.wiring is not None
    return {
        "weights": tasks.local_weights(module),
        "metrics": metrics,
        "banned": strategy.ledger.banned_at,
        "lanes": strategy.wiring.lanes,
        "shown": {worker: verify_evidence(evidence).holds for worker, evidence in strategy.evidence.items()},
        "found": {(one.worker, one.feature) for one in strategy.detections if one.confirmed},
    }


def liars(mesh: Mesh) -> dict[ls.Worker, Any]:
    """Those of them that the mesh has, and their attacks."""
    return {worker: attack for worker, attack in zip(GUILTY, ATTACKS) if worker in mesh.workers}


def check_attacked(mesh: Mesh, found: dict[str, Any], alone: dict[str, Any]) -> None:
    # Of three workers of a stage or more one is banned the second time that it is found out; the first time it is left out of the
    # step.
    assert found["banned"] == dict.fromkeys(sorted(liars(mesh)), START + 1)
    # No more than one of each stage: all other pipelines go on, with all of the data.
    assert len(found["lanes"]) == mesh.replicas - 1
    assert found["metrics"].keys() == alone["metrics"].keys()
    for name, value in alone["metrics"].items():
        assert math.isclose(found["metrics"][name], value, abs_tol=1e-5), name


def check_weights(found: dict[str, Any], alone: dict[str, Any]) -> set[str]:
    for name, value in found["weights"].items():
        assert (value - alone["weights"][name]).abs().max() <= 1e-5, name
    return set(found["weights"])


def test_weights_and_metrics_after_bans_are_those_of_a_clean_run_on_the_same_data(tmp_path: Path) -> None:
    """And each ban leaves a file that shows without the run why it was."""
    ranks, seen = world.run(attacked, len(PROCESSES.workers), PROCESSES, "process", tmp_path, timeout=110), set[str]()
    alone = tasks.fit_alone("adamw", STEPS, BATCH * PROCESSES.replicas, OPTIONS, Sharing)
    for number, rank in enumerate(ranks):
        check_attacked(PROCESSES, rank, alone)
        if PROCESSES.worker(number) not in GUILTY:
            seen |= check_weights(rank, alone)
        assert rank["shown"] == dict.fromkeys(liars(PROCESSES), True)
    assert seen == set(alone["weights"])
    folder = tmp_path / "version_0" / "sentinel"
    banned = json.loads((folder / "ledger.json").read_text())["banned"]
    named = {ls.Worker(entry["stage"], entry["replica"]): entry["evidence"] for entry in banned}
    for worker in liars(PROCESSES):
        findings = verify_evidence(read_evidence(folder / named[worker]))
        assert findings.verdict.startswith(f"The evidence holds: {worker} signed the "), findings.verdict


def test_the_same_of_one_liar_in_each_of_three_stages() -> None:
    """On the virtual mesh."""
    mesh = Mesh(STAGES, REPLICAS)
    found, alone = attacked(mesh, "virtual"), tasks.fit_alone("adamw", STEPS, BATCH * REPLICAS, OPTIONS, Sharing)
    check_attacked(mesh, found, alone)
    assert check_weights(found, alone) == set(alone["weights"])


ROLES = {"name": "several", "attacks": [{"name": "false_rows", "hide": None, "invent": 1.0}, "false_notes"]}
IN_ROLES = {ls.Worker(0, 2): ROLES, ls.Worker(2, 1): ROLES}
"""Each receives from the other's direction, and makes notes for the other's stage."""


def test_who_lies_about_signals_is_banned_between_processes() -> None:
    """In rows and notes, while what it sends is honest."""
    mesh = Mesh(3, 3)
    ranks = world.run(attacked, len(mesh.workers), mesh, "process", None, IN_ROLES, timeout=150)
    alone = tasks.fit_alone("adamw", STEPS, BATCH * mesh.replicas, OPTIONS, Sharing)
    for number, rank in enumerate(ranks):
        assert rank["banned"] == dict.fromkeys(sorted(IN_ROLES), START + 1)
        assert rank["found"] == {(worker, feature) for worker in IN_ROLES for feature in ("row", "note")}
        assert rank["shown"] == dict.fromkeys(IN_ROLES, True)
        if mesh.worker(number) not in IN_ROLES:
            check_weights(rank, alone)


class ShowsNoSeal(L.Callback):
    """A worker that would like to choose what it audits once it has seen what others say.

    And one that hands other weights to a checkpoint than it has worked with, for its stage.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        run = trainer.strategy._run  # type: ignore[attr-defined]
        if batch_idx == START and run.processes.worker == ls.Worker(1, 1):
            run.engine._audits.draws.seal = lambda plan: None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        speaker = trainer.strategy._run.mesh.worker(trainer.strategy._run.speakers[0])  # type: ignore[attr-defined]
        if trainer.strategy._run.processes.worker == speaker:  # type: ignore[attr-defined]
            for parameter in pl_module.parameters():
                parameter.data += 1
        trainer.save_checkpoint(self.path)


def unsealed(mesh: Mesh, path: Path) -> dict[str, Any]:
    strategy = ls.SentinelStrategy(mesh.stages, mesh.replicas, micro_batches=3, timeout=tasks.PATIENCE)
    module = Sharing("adamw")
    run = tasks.trainer(strategy, len(mesh.workers), STEPS, [ShowsNoSeal(path)], **OPTIONS)
    run.fit(module, *[tasks.loader(BATCH, mesh.replicas) for _ in range(2)])
    reasons = {worker: str(evidence.reason) for worker, evidence in strategy.evidence.items()}
    return {"weights": tasks.local_weights(module), "banned": strategy.ledger.banned_at, "reasons": reasons}


def test_who_shows_no_seal_of_what_it_draws_is_banned_at_once_and_an_odd_copy_of_weights_is_not_saved(tmp_path: Path) -> None:
    ranks = world.run(unsealed, len(PROCESSES.workers), PROCESSES, tmp_path / "last.ckpt", timeout=110)
    alone = tasks.fit_alone("adamw", STEPS, BATCH * PROCESSES.replicas, OPTIONS, Sharing)
    for number, rank in enumerate(ranks):
        assert rank["banned"] == {ls.Worker(1, 1): START}
        assert rank["reasons"] == {ls.Worker(1, 1): "did not open its seal"}
        if PROCESSES.worker(number) not in (ls.Worker(1, 1), ls.Worker(0, 0)):
            check_weights(rank, alone)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert check_weights({"weights": saved}, alone) == set(alone["weights"])


MIXED = {ls.Worker(0, 1): "zeros", ls.Worker(1, 2): {"name": "scale", "factor": -1.0}, ls.Worker(2, 3): "random"}
"""One of four workers of every stage, each with an attack of its own, in both directions."""
WARMUP = 60


def unaudited(directory: Path, callbacks: list[L.Callback]) -> dict[str, Any]:
    """Goes on from the end of a warm-up, which is there after the first call."""
    steps, warm = WARMUP + 20, directory / "warm.ckpt"

    def strategy() -> ls.SentinelStrategy:
        verification, response = ls.Verification(warmup_steps=WARMUP, seed=0), ls.Response(audit_rate=None)
        return ls.SentinelStrategy(STAGES, REPLICAS, 2, verification, response, engine="virtual")

    data = campaign.Text(0, batch_size=12 * REPLICAS, replicas=1)
    if not warm.exists():
        first = tasks.trainer(strategy(), 1, WARMUP)
        first.fit(campaign.Model(0, steps), data)
        first.save_checkpoint(warm)
    ours, module = strategy(), campaign.Model(0, steps)
    run = tasks.trainer(ours, 1, steps, callbacks, limit_val_batches=1.0, check_val_every_n_epoch=None)
    run.fit(module, data, ckpt_path=warm)
    loss = run.validate(module, data, verbose=False)[0]["val_loss"]
    assert ours.wiring is not None
    return {"banned": dict(ours.ledger.banned_at), "lanes": ours.wiring.lanes, "loss": loss}


def test_mixed_attacks_without_audits(tmp_path: Path) -> None:
    """On the virtual mesh, which bans whom the processes ban, as ``test_engines`` shows; on the same samples, from one warm-up."""
    clean = unaudited(tmp_path, [])
    attacked = unaudited(tmp_path, [ls.AttackInjector(list(MIXED.values()), workers=list(MIXED), start_step=WARMUP)])
    assert clean["banned"] == {}
    assert set(attacked["banned"]) == set(MIXED)
    assert len(attacked["lanes"]) == 3, "they share one pipeline"
    assert attacked["loss"] == pytest.approx(clean["loss"], rel=0.01)


CORRUPTED_STEPS = 3


class CorruptsGradients(L.Callback):
    """One worker is honest at the boundaries, and adds something else to its stage's gradients."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ls.SentinelStrategy)
        if strategy.worker == ls.Worker(1, 2):
            gradients = strategy._run.engine.gradients  # type: ignore[union-attr]
            reduce, parameters = gradients.reduce, gradients.parameters

            def corrupted(*arguments: Any) -> None:
                for parameter in parameters:
                    parameter.grad = -1e3 * parameter.grad
                reduce(*arguments)

            gradients.reduce = corrupted


def corrupted(rules: list[str]) -> dict[str, Any]:
    found = {}
    for rule in rules:
        response = ls.Response(aggregation=rule)  # type: ignore[arg-type]
        strategy = ls.SentinelStrategy(2, 3, micro_batches=2, verification=None, response=response, timeout=tasks.PATIENCE)
        module = tasks.Classifier("sgd")
        run = tasks.trainer(strategy, 6, CORRUPTED_STEPS, [CorruptsGradients()])
        run.fit(module, tasks.loader(8, 3))
        found[rule] = (float(run.callback_metrics["train_loss_step"]), tasks.local_weights(module))
    return found


def test_a_worker_that_corrupts_its_stages_gradients_is_outvoted_by_every_robust_rule() -> None:
    rules = ["median", "trimmed_mean", "krum", "multi_krum", "centred_clipping"]
    ranks = world.run(corrupted, 6, [*rules, "mean"])
    clean = tasks.fit_alone("sgd", CORRUPTED_STEPS, 24, {})["metrics"]["train_loss_step"]
    for rule in rules:
        losses = [rank[rule][0] for rank in ranks]
        assert losses == [losses[0]] * 6
        assert losses[0] == pytest.approx(clean, abs=0.25), rule
        for stage in (0, 1):
            one, *others = (ranks[Mesh(2, 3).rank(ls.Worker(stage, replica))][rule][1] for replica in range(3))
            assert all(value.equal(other[name]) for other in others for name, value in one.items()), "replicas differ"
    assert not abs(ranks[0]["mean"][0] - clean) < 1
