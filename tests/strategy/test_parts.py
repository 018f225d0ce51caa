"""Parts of the strategy, each made and used without the strategy."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.randomness import SeparateRandomness
from lightning_sentinel.strategy.bans import BanKeeper
from lightning_sentinel.strategy.building import StageBuilder
from lightning_sentinel.strategy.checkpoints import CheckpointWriter
from lightning_sentinel.strategy.data import sampler_arguments
from lightning_sentinel.strategy.loading import CheckpointReader
from lightning_sentinel.strategy.processes import Processes
from lightning_sentinel.strategy.resuming import Resumption
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.strategy.settings import StrategySettings

CPU = torch.device("cpu")


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


def settings(engine: Any = "virtual", **other: Any) -> StrategySettings:
    defaults: dict[str, Any] = {
        "stages": 2,
        "replicas": 3,
        "micro_batches": 2,
        "verification": Verification(seed=0),
        "response": Response(),
        "partition": "uniform",
        "engine": engine,
        "sequential": None,
        "zero_stage": 0,
        "activation_checkpointing": False,
        "transport": "auto",
        "state_dict_type": "full",
        "timeout": timedelta(seconds=5),
    }
    return StrategySettings(**{**defaults, **other})


def run_state(**given: Any) -> RunState:
    return RunState(Processes(settings(**given)))


class TestProcesses:
    def test_a_process_has_its_place_once_it_is_numbered(self) -> None:
        processes = Processes(settings("process"))
        processes.number(4, 6, CPU)
        assert processes.mesh == Mesh(2, 3)
        assert processes.worker == Mesh(2, 3).worker(4)

    def test_a_mesh_that_the_processes_do_not_make_is_refused(self) -> None:
        processes = Processes(settings("process"))
        processes.number(0, 4, CPU)
        with pytest.raises(ConfigurationError, match="but this run has 4"):
            _ = processes.mesh

    def test_a_process_by_itself_waits_for_nobody(self) -> None:
        processes = Processes(settings())
        processes.barrier()
        value = torch.ones(2)
        assert processes.broadcast("word", 3) == "word"
        assert torch.equal(processes.reduce(value, None, "sum"), value)
        assert processes.any_rank(True) and not processes.any_rank(False)
        with processes.watching():
            assert not processes.has_met


class TestRunState:
    def test_a_step_that_fails_is_over(self) -> None:
        run = run_state()
        run.randomness = SeparateRandomness(3, 0, CPU)
        with pytest.raises(ZeroDivisionError), run.stepping():
            assert run.in_a_step
            raise ZeroDivisionError
        assert not run.in_a_step

    def test_one_process_has_all_stages_only_where_nothing_is_cut(self) -> None:
        assert run_state(stages=1).has_all_stages
        assert not run_state().has_all_stages

    @pytest.mark.parametrize(("engine", "expected"), [("virtual", (1, 0)), ("process", (3, 2))])
    def test_stages_of_a_replica_see_the_same_samples(self, engine: Any, expected: tuple[int, int]) -> None:
        run = run_state(engine=engine)
        run.processes.number(Mesh(2, 3).rank(Worker(0, 2)) if engine == "process" else 0, 6 if engine == "process" else 1, CPU)
        assert sampler_arguments(run) == dict(zip(("num_replicas", "rank"), expected))


class TestCheckpoints:
    def test_there_is_nothing_to_save_before_there_is_a_module(self) -> None:
        run = run_state()
        writer = CheckpointWriter(run, StageBuilder(run.settings, run.processes))
        with pytest.raises(ConfigurationError, match=r"called before a run.*in a hook or after trainer\.fit"):
            writer.whole_state(None)

    def test_a_module_that_is_not_cut_is_saved_as_it_is(self) -> None:
        run = run_state()
        writer = CheckpointWriter(run, StageBuilder(run.settings, run.processes))
        module = Net()
        written: list[dict[str, Any]] = []
        assert list(writer.module_state(module)) == list(module.state_dict())
        writer.save({"state_dict": {}}, "anywhere", None, written.append)
        assert written == [{"state_dict": {}}]

    def test_nothing_is_saved_in_the_middle_of_a_step(self) -> None:
        run = run_state(engine="process")
        run.in_a_step = True
        with pytest.raises(ConfigurationError, match="in the middle of a step"):
            CheckpointWriter(run, StageBuilder(run.settings, run.processes)).module_state(Net())

    def test_the_section_of_a_run_is_put_aside(self) -> None:
        run = run_state()
        reader = CheckpointReader(StageBuilder(run.settings, run.processes))
        file = {"state_dict": {}, "lightning_sentinel": {"step": 7}, "pytorch-lightning_version": "2"}
        assert "lightning_sentinel" not in reader.read("file.ckpt", None, True, lambda: dict(file))
        assert reader.section == {"step": 7}


class TestResumption:
    def test_a_run_of_another_strategy_has_a_number_of_batches_and_nothing_else(self) -> None:
        run = run_state()
        bans = BanKeeper(run.settings.response, run.ledger)
        resumption = Resumption(run, StageBuilder(run.settings, run.processes), bans)
        batches = SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(ready=12)))
        trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=batches))
        assert not resumption.is_pending
        resumption.restore_run({}, trainer)
        assert run.step == 12 and resumption.is_pending and not run.ledger.banned

    def test_the_settings_and_the_mesh_of_before_are_compared(self) -> None:
        run = run_state()
        before = settings(response=Response(ban_after=9)).plain
        section = {"step": 5, "mesh": [2, 4], "ledger": run.ledger.state_dict(), "settings": before, "verifiers": {}}
        bans = BanKeeper(run.settings.response, run.ledger)
        resumption = Resumption(run, StageBuilder(run.settings, run.processes), bans)
        with pytest.warns(UserWarning, match=r"ban_after=9 is now 5") as warned:
            resumption.restore_run(section, SimpleNamespace())  # type: ignore[arg-type]
        assert run.step == 5
        assert any("written on 2 stages x 4 replicas. This run has 2 x 3." in str(one.message) for one in warned)
