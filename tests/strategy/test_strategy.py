from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker


@pytest.fixture(autouse=True)
def _ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer writes its rank into Lightning's globals."""
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for guard in (rank_zero_only, fabric_rank_zero_only):
        monkeypatch.setattr(guard, "rank", getattr(guard, "rank", 0), raising=False)


def trainer(strategy: Any, devices: int, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(strategy=strategy, accelerator="cpu", devices=devices, **quiet, **options)


class TestArguments:
    @pytest.mark.parametrize("micro_batches", [0, -3])
    def test_micro_batches(self, micro_batches: int) -> None:
        with pytest.raises(ConfigurationError, match=rf"micro_batches={micro_batches} cannot work: .*at least one"):
            ls.SentinelStrategy(micro_batches=micro_batches)

    @pytest.mark.parametrize("partition", ["params", "", "type", "Uniform"])
    def test_partition(self, partition: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"partition={partition!r} is unknown\. Use 'parameters', 'uniform'"):
            ls.SentinelStrategy(partition=partition)

    @pytest.mark.parametrize("partition", ["parameters", "uniform", "type:Linear|Conv"])
    def test_known_partitions(self, partition: str) -> None:
        ls.SentinelStrategy(partition=partition)

    @pytest.mark.parametrize("zero_stage", [2, 3])
    def test_zero(self, zero_stage: int) -> None:
        with pytest.raises(ConfigurationError, match=rf"zero_stage={zero_stage} cannot be used.*Use zero_stage=1.*or 0"):
            ls.SentinelStrategy(zero_stage=zero_stage)

    def test_zero_where_a_ban_would_lose_state(self) -> None:
        with pytest.raises(ConfigurationError, match=r"zero_stage=1 contradicts Response\(ban_after=5\).*ban_after=None"):
            ls.SentinelStrategy(zero_stage=1)
        ls.SentinelStrategy(zero_stage=1, response=ls.Response(ban_after=None))

    def test_zero_on_a_virtual_mesh(self) -> None:
        with pytest.raises(ConfigurationError, match=r"zero_stage=1 needs engine='process'.*Use zero_stage=0"):
            ls.SentinelStrategy(zero_stage=1, engine="virtual", verification=None)

    def test_transport(self) -> None:
        with pytest.raises(ConfigurationError, match=r"transport='hots'.*'auto'"):
            ls.SentinelStrategy(transport="hots")  # type: ignore[arg-type]

    @pytest.mark.parametrize("engine", ["process", "virtual"])
    def test_both_engines_audit(self, engine: Any) -> None:
        assert ls.SentinelStrategy(engine=engine, response=ls.Response(audit_rate=0.02)).response.audit_rate == 0.02

    def test_a_virtual_mesh_has_nothing_to_aggregate(self) -> None:
        with pytest.raises(ConfigurationError, match=r"aggregation='krum'\) needs engine='process'"):
            ls.SentinelStrategy(engine="virtual", response=ls.Response(aggregation="krum"))
        assert ls.SentinelStrategy(response=ls.Response(aggregation="krum")).response.aggregation == "krum"

    def test_nothing_has_happened_yet(self) -> None:
        strategy = ls.SentinelStrategy()
        assert strategy.detections == []
        assert strategy.ledger.banned == frozenset()
        assert strategy.table is None
        assert strategy.wiring is None
        assert strategy.adversary is None
        assert strategy.step == 0

    def test_defaults_are_not_shared(self) -> None:
        first, second = ls.SentinelStrategy(), ls.SentinelStrategy()
        assert first.ledger is not second.ledger
        assert first.detections is not second.detections


class TestMesh:
    @pytest.mark.parametrize(
        ("devices", "given", "mesh"),
        [
            (1, {}, Mesh(1, 1)),
            (4, {}, Mesh(2, 2)),
            (6, {}, Mesh(3, 2)),
            (7, {}, Mesh(7, 1)),
            (4, {"stages": 4}, Mesh(4, 1)),
            (4, {"replicas": 4}, Mesh(1, 4)),
            (6, {"stages": 2}, Mesh(2, 3)),
            (6, {"stages": 3, "replicas": 2}, Mesh(3, 2)),
        ],
        ids=str,
    )
    def test_known_once_the_trainer_is_made(self, devices: int, given: dict[str, int], mesh: Mesh) -> None:
        strategy = ls.SentinelStrategy(**given)  # type: ignore[arg-type]
        assert trainer(strategy, devices).strategy is strategy
        assert strategy.mesh == mesh
        assert strategy.worker == Worker(mesh.stages - 1, 0), "where steps run whole"

    def test_with_a_ledger_some_may_be_left_over(self) -> None:
        strategy = ls.SentinelStrategy(stages=2, response=ls.Response(ledger="ledger.json"))
        trainer(strategy, 5)
        assert strategy.mesh == Mesh(2, 2)
        with pytest.raises(ConfigurationError, match="stages=2 does not divide the 5 processes"):
            trainer(ls.SentinelStrategy(stages=2), 5)

    def test_over_nodes(self) -> None:
        strategy = ls.SentinelStrategy()
        trainer(strategy, 3, num_nodes=2)
        assert strategy.mesh == Mesh(3, 2)

    @pytest.mark.parametrize(
        ("devices", "given", "parts"),
        [
            (4, {"stages": 3}, ["stages=3", "4 processes", "devices=...", "[1, 2, 4]"]),
            (4, {"replicas": 3}, ["replicas=3", "4 processes", "[1, 2, 4]"]),
            (8, {"stages": 2, "replicas": 2}, ["stages=2 x replicas=2", "8", "Trainer(devices=4)"]),
        ],
        ids=str,
    )
    def test_an_impossible_one_is_reported_when_the_trainer_is_made(
        self, devices: int, given: dict[str, int], parts: list[str]
    ) -> None:
        with pytest.raises(ConfigurationError) as raised:
            trainer(ls.SentinelStrategy(**given), devices)  # type: ignore[arg-type]
        for part in parts:
            assert part in str(raised.value)


class TestPresets:
    @pytest.mark.parametrize("name", ["sentinel", "sentinel_monitor"])
    def test_registered(self, name: str) -> None:
        assert name in StrategyRegistry.available_strategies()
        strategy = trainer(name, 4).strategy
        assert isinstance(strategy, ls.SentinelStrategy)
        assert strategy.mesh == Mesh(2, 2)
        assert strategy.verification == ls.Verification()

    def test_what_they_do_about_a_flag(self) -> None:
        responses = {name: StrategyRegistry.get(name).response for name in ("sentinel", "sentinel_monitor")}
        assert responses == {
            "sentinel": ls.Response(on_flag="exclude"),
            "sentinel_monitor": ls.Response(on_flag="log", ban_after=None),
        }


@pytest.mark.parametrize("rank", range(6))
def test_samples_are_dealt_by_replica(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    strategy = ls.SentinelStrategy(stages=3, replicas=2)
    trainer(strategy, 6)
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": rank % 2}
    assert strategy.worker == Worker(2 - rank // 2, rank % 2)
    assert strategy.is_distributed
    assert strategy.is_global_zero == (rank == 0)


def test_an_unknown_form_of_checkpoints_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"state_dict_type='whole' is unknown. Use 'full' or 'sharded'"):
        ls.SentinelStrategy(state_dict_type="whole")


def test_checkpoints_are_loaded_without_running_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": L.__version__, "hyper_parameters": Mesh(2, 2)}, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        ls.SentinelStrategy().load_checkpoint(tmp_path / "a.ckpt")
    assert ls.SentinelStrategy().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"] == Mesh(2, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "it is list, without a 'state_dict'"),
        ({"state_dict": {}}, r"it is a dict of 1 entries \('state_dict'\)"),
        ({str(number): number for number in range(9)}, r"it is a dict of 9 entries \('0', '1', '2', '3', ...\)"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(content: object, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match=rf"a\.ckpt can be read, but is no Lightning checkpoint: {says}"):
        ls.SentinelStrategy().load_checkpoint(tmp_path / "a.ckpt")


def test_a_remote_path_is_no_place_for_parts() -> None:
    strategy = ls.SentinelStrategy(state_dict_type="sharded")
    with pytest.raises(
        ConfigurationError, match=r"'s3://bucket/a\.ckpt' is none\. Save to such a path, or use .*state_dict_type='full'"
    ):
        strategy.save_checkpoint({"state_dict": {}}, "s3://bucket/a.ckpt")


def test_a_strategy_has_one_trainer() -> None:
    strategy = ls.SentinelStrategy()
    trainer(strategy, 4)
    with pytest.raises(ConfigurationError, match=r"belongs to another Trainer already.* make a new one for every Trainer"):
        trainer(strategy, 4)


def test_a_notebook_has_the_whole_mesh_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sentinel.strategy.refusals._IS_INTERACTIVE", True)
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    for name in ("sentinel", "sentinel_monitor"):
        with pytest.raises(ConfigurationError, match=r"in a notebook .*strategy='sentinel_virtual', devices=1"):
            trainer(name, 1)
    assert trainer("sentinel_virtual", 1).strategy.mesh == Mesh(2, 4)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="sentinell"):
        L.Trainer(strategy="sentinell", accelerator="cpu", devices=4, logger=False)
