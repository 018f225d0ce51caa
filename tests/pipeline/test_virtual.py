"""The whole mesh in one process: the same training as without it, and the same verdicts as on any other mesh."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import lightning_sentinel as ls
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from tests.distributed import tasks, trainer_data_tasks, trainer_tasks

TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}


def virtual(stages: int, replicas: int, **options: Any) -> ls.SentinelStrategy:
    return ls.SentinelStrategy(stages, replicas, micro_batches=2, engine="virtual", **options)


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (3, 2), (5, 8)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.002, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "limit_val_batches": 2, "val_check_interval": 2},
    ],
)
def test_weights_and_logs_equal_a_run_without_it(optimizer: str, stages: int, replicas: int, options: dict[str, Any]) -> None:
    alone = tasks.fit_alone(optimizer, 3, 16, options)
    module = tasks.Classifier(optimizer)
    run = tasks.trainer(virtual(stages, replicas), 1, 3, **options)
    run.fit(module, tasks.loader(16), tasks.loader(16))
    for name, value in module.state_dict().items():
        assert (value - alone["weights"][name]).abs().max() <= TOLERANCE[optimizer], name
    for name, value in alone["metrics"].items():
        assert float(run.callback_metrics[name]) == pytest.approx(value, abs=1e-5), name


def test_hooks_are_given_what_steps_return_and_the_last_batch_may_be_short() -> None:
    """Of 21 samples in batches of 8 the last has 5, for 2 replicas with 4 micro-batches each: one sample is used twice."""

    def run(strategy: Any) -> trainer_data_tasks.Spy:
        spy, module = trainer_data_tasks.Spy(), trainer_data_tasks.Extra()
        data = DataLoader(trainer_tasks.Counted(21), batch_size=8)
        trainer_tasks.trainer(strategy, max_epochs=1, callbacks=[spy]).fit(module, data, data)
        assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
        return spy

    found = run(ls.SentinelStrategy(2, 2, micro_batches=4, engine="virtual", verification=None))
    expected = run("auto")
    for name in ("train", "validation"):
        assert len(found.outputs[name]) == len(expected.outputs[name]) == 3
    for one, other in zip(found.outputs["train"], expected.outputs["train"]):
        torch.testing.assert_close(one["logits"], other["logits"], atol=1e-5, rtol=0)
        assert torch.equal(one["labels"], other["labels"]) and one["note"] == "text"
    for (_, one), (_, other) in zip(found.outputs["validation"][:1], expected.outputs["validation"][:1]):
        assert one["logits"].shape == other["logits"].shape


def test_activation_checkpointing_gives_the_same_weights_and_runs_layers_twice() -> None:
    calls, weights = [], []
    for checkpointing in (False, True):
        module, seen = tasks.Classifier(), 0

        def count(*_: Any) -> None:
            nonlocal seen
            seen += 1

        module.net[1].register_forward_pre_hook(count)
        tasks.trainer(virtual(2, 2, activation_checkpointing=checkpointing), 1, 3).fit(module, tasks.loader(16))
        calls.append(seen)
        weights.append(tasks.local_weights(module))
    assert calls[1] == 2 * calls[0]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-7)


def test_what_was_learned_outlives_a_validation_between_two_fits() -> None:
    strategy = virtual(2, 2, verification=ls.Verification(warmup_steps=4))
    module = tasks.Classifier("adamw")
    run = tasks.trainer(strategy, 1, 6, limit_val_batches=1, num_sanity_val_steps=0)
    run.fit(module, tasks.loader(16))
    run.validate(module, tasks.loader(16), verbose=False)
    run.fit_loop.epoch_loop.max_steps = 8
    run.fit(module, tasks.loader(16))
    assert strategy.step == 8
    assert strategy._run.guard.calibration.steps == 8
    # A boundary where nobody's signals were all in order learns nothing in that step.
    assert all(verifier.references.updates >= 7 for verifier in strategy._run.guard.verifiers.values())


def test_predictions_and_checkpoints_are_those_of_an_ordinary_module(tmp_path: Any) -> None:
    module = tasks.Classifier("adamw")
    run = tasks.trainer(virtual(2, 2), 1, 3)
    run.fit(module, tasks.loader(16))
    run.save_checkpoint(tmp_path / "last.ckpt")
    restored = tasks.Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], value, rtol=0, atol=0)
    again, resumed = tasks.Classifier("adamw"), tasks.trainer(virtual(2, 2), 1, 5)
    resumed.fit(again, tasks.loader(16), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 5


@pytest.mark.parametrize(("direction", "attack"), [("activation", {"name": "scale", "factor": 20.0}), ("gradient", "random")])
def test_malicious_workers_are_banned_and_nobody_else(direction: Any, attack: Any) -> None:
    guilty = {ls.Worker(1, 0), ls.Worker(2, 3), ls.Worker(1, 5)}
    strategy = virtual(4, 8, verification=ls.Verification(warmup_steps=20))
    injector = ls.AttackInjector(attack, workers=sorted(guilty), direction=direction)
    module = tasks.Classifier("adamw", depth=6)
    tasks.trainer(strategy, 1, 35, [injector]).fit(module, tasks.loader(32))
    assert strategy.ledger.banned == guilty
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(("samples", "replicas"), [(8, 2), (9, 3), (10, 4), (3, 2)])
def test_samples_are_dealt_as_a_distributed_sampler_deals_them(samples: int, replicas: int) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(samples))
    parts = BatchSplitter(None).whole(torch.arange(samples)).dealt_to(replicas, 1).replicas
    for replica, part in enumerate(parts):
        sampler = torch.utils.data.DistributedSampler(data, replicas, replica, shuffle=False)
        assert part[0].tolist() == list(sampler)


def test_more_than_one_process_is_refused() -> None:
    with pytest.raises(ls.SentinelError, match=r"virtual mesh is in one process, but the Trainer has 2"):
        tasks.trainer(virtual(2, 2), 2, 1)


def test_a_virtual_mesh_asks_no_cluster_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of SLURM in whose environment there are no ranks of tasks; a plain run on one device does not ask for them either."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    strategy = virtual(2, 2)
    run = tasks.trainer(strategy, 1, 1)
    run.fit(tasks.Classifier(), tasks.loader(32))
    assert (run.global_rank, run.local_rank, run.node_rank, run.world_size) == (0, 0, 0, 1)


def test_the_preset_trains() -> None:
    run = tasks.trainer("sentinel_virtual", 1, 2)
    run.fit(tasks.Classifier(), tasks.loader(32))
    assert run.strategy.mesh == ls.SentinelStrategy(engine="virtual").mesh


def test_more_stages_than_layers_are_refused() -> None:
    run = tasks.trainer(virtual(12, 1), 1, 1)
    with pytest.raises(ls.SentinelError, match=r"Classifier has 7 layers, which cannot be cut into stages=12. Use at most 7"):
        run.fit(tasks.Classifier(), tasks.loader(8))


def test_a_module_that_is_frozen_is_refused() -> None:
    module = tasks.Classifier()
    module.requires_grad_(False)
    with pytest.raises(ls.SentinelError, match="Classifier has no trainable parameters in its layers"):
        tasks.trainer(virtual(2, 1), 1, 1).fit(module, tasks.loader(8))


@pytest.mark.parametrize("frozen", ["01", "35", "01234"])
def test_frozen_stages_pass_gradients_on(frozen: str) -> None:
    """Layer 5 has no parameters at all, and is a stage of its own."""

    def trained(strategy: object) -> dict[str, torch.Tensor]:
        module = tasks.Classifier()
        for place in frozen:
            module.net[int(place)].requires_grad_(False)
        tasks.trainer(strategy, 1, 2).fit(module, tasks.loader(8))
        return module.state_dict()

    expected = trained("auto")
    for name, value in trained(virtual(7, 1, partition="uniform")).items():
        assert (value - expected[name]).abs().max() <= 1e-6, name


def test_a_worker_outside_the_mesh_is_refused() -> None:
    run = tasks.trainer(virtual(2, 2), 1, 1, [ls.AttackInjector("zeros", workers=[ls.Worker(2, 0)])])
    with pytest.raises(ls.SentinelError, match=r"worker \(stage 2, replica 0\) is not in the mesh: it has stages 0..1"):
        run.fit(tasks.Classifier(), tasks.loader(8))


def test_everything_that_was_found_is_logged_and_written(tmp_path: Path) -> None:
    heard: list[ls.Detection] = []

    class Listener(L.Callback):
        def on_sentinel_detection(self, trainer: Any, pl_module: Any, detection: ls.Detection) -> None:
            heard.append(detection)

    strategy = virtual(2, 3, verification=ls.Verification(warmup_steps=10))
    injector = ls.AttackInjector({"name": "scale", "factor": 50.0}, workers=[(0, 1)], direction="activation")
    logger = CSVLogger(tmp_path)
    tasks.trainer(strategy, 1, 20, [injector, Listener()], logger=logger, log_every_n_steps=1).fit(
        tasks.Classifier(), tasks.loader(12)
    )
    assert strategy.ledger.banned == {ls.Worker(0, 1)} == injector.workers
    assert heard == strategy.detections
    lines = [json.loads(line) for line in (Path(logger.log_dir) / "sentinel" / "detections.jsonl").read_text().splitlines()]
    assert len(lines) == len(heard)
    assert ls.Ledger.banned_in(Path(logger.log_dir) / "sentinel" / "ledger.json") == [ls.Worker(0, 1)]
    assert lines[0]["worker"] == {"stage": 0, "replica": 1} and lines[0]["direction"] == "activation"
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["sentinel/flags"]][-1]
    assert float(last["sentinel/banned"]) == 1
    # What an audit dropped was heard of, and is no flag.
    assert float(last["sentinel/flags"]) == sum(one.confirmed is not False for one in heard)


def test_who_was_banned_before_serves_nothing_and_the_batch_is_whole() -> None:
    clean, module = tasks.Classifier("sgd"), tasks.Classifier("sgd")
    tasks.trainer(virtual(3, 4), 1, 3).fit(clean, tasks.loader(16))
    strategy = virtual(3, 4, response=ls.Response(banned=[ls.Worker(1, 0), ls.Worker(1, 3)]))
    tasks.trainer(strategy, 1, 3, [ls.AttackInjector("random", workers=[(1, 0), (1, 3)])]).fit(module, tasks.loader(16))
    assert strategy.ledger.banned == {ls.Worker(1, 0), ls.Worker(1, 3)} and strategy.ledger.total_flags == 0
    for name, value in clean.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("mesh", "steps_known"), [((3, 3), 30), ((2, 4), 0)], ids=["fewer replicas", "another cut"])
def test_a_checkpoint_of_another_mesh_goes_on_and_says_what_it_means(
    mesh: tuple[int, int], steps_known: int, tmp_path: Path
) -> None:
    verification, module = ls.Verification(warmup_steps=20), tasks.Classifier("adamw")
    injector = ls.AttackInjector("random", workers=[(1, 3)], direction="activation")
    strategy = virtual(3, 4, verification=verification)
    run = tasks.trainer(strategy, 1, 30, [injector])
    run.fit(module, tasks.loader(16))
    assert strategy.ledger.banned == {ls.Worker(1, 3)}
    run.save_checkpoint(tmp_path / "last.ckpt")

    again, other = (
        tasks.Classifier("adamw"),
        virtual(*mesh, verification=verification, response=ls.Response(banned=[ls.Worker(1, 0)])),
    )
    resumed = tasks.trainer(other, 1, 32)
    says = r"written on 3 stages x 4 replicas.*Banned there were worker \(stage 1, replica 3\)"
    with pytest.warns(UserWarning, match=says):
        resumed.fit(again, tasks.loader(16), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 32 and other.step == 32
    assert other.ledger.banned == {ls.Worker(1, 0)}
    assert other._run.guard.calibration.steps == steps_known + 2


@pytest.mark.parametrize(("replicas", "recomputed"), [(3, True), (1, False)], ids=["audits", "one replica"])
def test_with_nobody_malicious_the_weights_are_the_plain_runs_whatever_is_flagged(replicas: int, recomputed: bool) -> None:
    """Fences fitted to few values flag honest signals: audits drop such flags, and without audits nothing follows from them."""
    alone, module = tasks.fit_alone("adamw", 18, 12, {}), tasks.Classifier("adamw")
    strategy = virtual(2, replicas, verification=ls.Verification(warmup_steps=4))
    with pytest.warns(UserWarning, match=r"warmup_steps=4\) is short"):
        tasks.trainer(strategy, 1, 18).fit(module, tasks.loader(12))
    assert bool(strategy.ledger.exonerated) == recomputed and not strategy.ledger.total_flags
    for name, value in module.state_dict().items():
        assert (value - alone["weights"][name]).abs().max() <= TOLERANCE["adamw"], name


def test_the_secret_seed_is_not_that_of_the_run_and_a_checkpoint_keeps_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([101, 102, 103])
    monkeypatch.setattr("lightning_sentinel.seeds.secrets.randbits", lambda bits: next(drawn))

    def fit(steps: int, source: Any = None, **settings: Any) -> tuple[Any, Any]:
        strategy = virtual(2, 2, verification=ls.Verification(warmup_steps=20, **settings))
        run = tasks.trainer(strategy, 1, steps)
        run.fit(tasks.Classifier(), tasks.loader(16), ckpt_path=source)
        return run, strategy

    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    run, first = fit(2)
    run.save_checkpoint(tmp_path / "last.ckpt")
    _, second = fit(2)
    _, resumed = fit(3, tmp_path / "last.ckpt")
    _, given = fit(2, seed=7)
    assert [strategy._run.guard.secret for strategy in (first, second, resumed, given)] == [101, 102, 101, 7]
    assert first.verification.seed is None
