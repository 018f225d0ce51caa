"""Checkpoints of real processes, in parts and in one file: kept by ModelCheckpoint, and whole when a process or a disk fails."""

from __future__ import annotations

import os
import resource
import signal as signals
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_sentinel as ls
from lightning_sentinel.pipeline.checkpoints.files import part_of
from lightning_sentinel.pipeline.checkpoints.sharded import ShardedCheckpoint
from tests.distributed import tasks, world

FAILS = 2
"""The rank of stage 0 that writes its part."""


def strategy(form: Any = "sharded") -> ls.SentinelStrategy:
    return ls.SentinelStrategy(2, 2, micro_batches=2, timeout=tasks.PATIENCE, verification=None, state_dict_type=form)


class SavesTwice(L.Callback):
    """To one path; before the second time something happens to one rank."""

    def __init__(self, path: Path, happens: Callable[[Path], None] | None = None) -> None:
        self.path, self.happens = path, happens

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == FAILS and self.happens is not None:
            self.happens(self.path)
        if trainer.global_step in (2, 3):
            trainer.save_checkpoint(self.path)


def saving(path: Path, happens: Callable[[Path], None] | None) -> None:
    tasks.trainer(strategy(), 4, 4, [SavesTwice(path, happens)]).fit(tasks.Classifier("adamw"), tasks.loader(4, 2))


def limit_files(path: Path) -> None:
    """No file of this process may be longer than half its part."""
    size = max(file.stat().st_size for file in path.glob("stage-0-*"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))


def disk_is_full(path: Path) -> None:
    signals.signal(signals.SIGXFSZ, signals.SIG_IGN)
    limit_files(path)


def kill_in_the_middle_of_the_part(path: Path) -> None:
    signals.signal(signals.SIGXFSZ, signals.SIG_DFL)
    limit_files(path)


def step_of(path: Path) -> int:
    return ShardedCheckpoint(path).whole()["global_step"]


def assert_named(failures: dict[int, world.Failure], worker: str) -> None:
    for failure in failures.values():
        assert failure.kind == "WorkerLostError"
        assert worker in failure.message, failure.message


def test_a_full_disk_of_one_stage_leaves_the_sharded_one_before(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    results, failures = world.outcomes(saving, 4, path, disk_is_full, timeout=40)
    assert not results
    assert failures[FAILS].kind == "OSError"
    assert f"File too large: '{path}/stage-0-" in failures[FAILS].message
    for rank in {0, 1, 3}:
        assert failures[rank].kind == "WorkerLostError"
        assert f"rank 2, worker (stage 0, replica 0), could not save the checkpoint {path}" in failures[rank].message
        assert "File too large" in failures[rank].message
    assert os.listdir(tmp_path) == [path.name]
    assert len(os.listdir(path)) == 3
    assert step_of(path) == 2


def test_a_kill_of_one_stage_while_saving_leaves_the_sharded_one_before(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    results, failures = world.outcomes(saving, 4, path, kill_in_the_middle_of_the_part, timeout=40, answers=3)
    assert not results
    assert set(failures) == {0, 1, 3}
    assert_named(failures, "rank 2, worker (stage 0, replica 0)")
    assert list(path.glob(".stage-0-*.part")), "it was killed while it wrote"
    assert step_of(path) == 2
    world.run(saving, 4, path, None)
    assert len(os.listdir(path)) == 3
    assert step_of(path) == 3


def kept_by_model_checkpoint(directory: Path) -> dict[str, Any]:
    callback = ModelCheckpoint(
        directory,
        "{step}",
        monitor="train_loss",
        save_top_k=2,
        save_last="link",
        every_n_train_steps=1,
        save_on_train_epoch_end=False,
    )
    run = tasks.trainer(strategy(), 4, 5, [callback], enable_checkpointing=True)
    run.fit(tasks.Classifier(), tasks.loader(4, 2))
    again = tasks.trainer(strategy(), 4, 7, [])
    again.fit(tasks.Classifier(), tasks.loader(4, 2), ckpt_path=directory / "last.ckpt")
    return {"best": callback.best_model_path, "kept": sorted(callback.best_k_models), "steps": again.global_step}


def test_model_checkpoint_keeps_links_and_removes_directories(tmp_path: Path) -> None:
    (found, *_) = world.run(kept_by_model_checkpoint, 4, tmp_path)
    names = {Path(path).name for path in found["kept"]}
    assert len(names) == 2
    last = (tmp_path / "last.ckpt").resolve()
    assert set(os.listdir(tmp_path)) == {*names, last.name, "last.ckpt"}
    assert all(ShardedCheckpoint(path).whole()["state_dict"] for path in found["kept"])
    assert found["steps"] == 7


def loading(path: Path, width: int) -> None:
    module = tasks.Classifier("sgd", depth=3 if width else 4)
    tasks.trainer(strategy(), 4, 4).fit(module, tasks.loader(4, 2), ckpt_path=path)


def refusal(path: Path, another_model: bool = False) -> str:
    """What all ranks say of a checkpoint that they are to go on from."""
    before = {file: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}
    results, failures = world.outcomes(loading, 4, path, int(another_model), timeout=40)
    assert not results
    # Each finds it out by itself. One that is slow may hear of the end of another first, and names that.
    refused = {failure.message for failure in failures.values() if failure.kind == "ConfigurationError"}
    assert {failure.kind for failure in failures.values()} <= {"ConfigurationError", "WorkerLostError"}
    assert {file: file.read_bytes() for file in before} == before
    (message,) = refused
    return message


def test_what_cannot_be_loaded_is_refused_by_all_ranks_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    world.run(saving, 4, path, None)
    assert "does not fit Classifier: 2 key(s) missing (first: ['net.5.bias'," in refusal(path, another_model=True)
    os.truncate(next(path.glob("stage-0-*")), 700)
    assert "is not a whole checkpoint: its part stage-0-" in refusal(path)
    (tmp_path / "text.ckpt").write_text("weights, weights, weights")
    assert "was cut off while it was written or copied, or another kind of file" in refusal(tmp_path / "text.ckpt")
    torch.save({"model": torch.ones(2)}, tmp_path / "torch.ckpt")
    assert "is no Lightning checkpoint: it is a dict of 1 entries ('model')" in refusal(tmp_path / "torch.ckpt")
    assert "is a directory, but no sharded checkpoint" in refusal(tmp_path)
    assert not part_of(path).exists()


# --------------------------------------------------------------------------------------------------------- one file

BATCH = 2
"""Before which a file is saved over another."""


class SavesFile(L.Callback):
    """Saves twice to one path; before the second time something happens to the disk of rank zero."""

    def __init__(self, path: Path, happens: Callable[[Path], None] | None = None) -> None:
        self.path, self.happens = path, happens

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == BATCH and trainer.is_global_zero and self.happens is not None:
            self.happens(self.path)
        if batch_idx in (BATCH - 1, BATCH):
            trainer.save_checkpoint(self.path)


def no_space_at_all(path: Path) -> None:
    part_of(path).symlink_to("/dev/full")


def kill_in_the_middle_of_the_file(path: Path) -> None:
    """The kernel does, as soon as the file is longer than half the previous one."""
    signals.signal(signals.SIGXFSZ, signals.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2,) * 2)


def fit_saving(path: Path, happens: Callable[[Path], None]) -> None:
    tasks.trainer(strategy("full"), 4, 6, [SavesFile(path, happens)]).fit(tasks.Classifier(), tasks.loader(4, 2))


def step_of_file(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    results, failures = world.outcomes(fit_saving, 4, path, no_space_at_all, timeout=40)
    assert not results
    assert failures[0].kind == "OSError"
    assert f"No space left on device: '{path}'" in failures[0].message
    for rank in (1, 2, 3):
        assert failures[rank].kind == "WorkerLostError"
        assert f"rank 0, worker (stage 1, replica 0), could not save the checkpoint {path}" in failures[rank].message
        assert "No space left on device" in failures[rank].message
    assert os.listdir(tmp_path) == [path.name]
    assert step_of_file(path) == BATCH - 1


def resume_file(path: Path) -> None:
    tasks.trainer(strategy("full"), 4, 6, [SavesFile(path)]).fit(tasks.Classifier(), tasks.loader(4, 2), ckpt_path=path)


def test_a_kill_while_saving_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    results, failures = world.outcomes(fit_saving, 4, path, kill_in_the_middle_of_the_file, timeout=40, answers=3)
    assert not results
    assert set(failures) == {1, 2, 3}
    assert_named(failures, "rank 0, worker (stage 1, replica 0)")
    assert 0 < part_of(path).stat().st_size < path.stat().st_size
    assert step_of_file(path) == BATCH - 1
    world.run(resume_file, 4, path)
    assert os.listdir(tmp_path) == [path.name]
    assert step_of_file(path) == BATCH


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_part_of_a_checkpoint_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": tasks.Classifier().state_dict()}, path)
    content = path.read_bytes()[: int(share * path.stat().st_size)]
    path.write_bytes(content)
    results, failures = world.outcomes(resume_file, 4, path, timeout=40)
    assert not results
    assert len(failures) == 4
    for failure in failures.values():
        assert failure.kind == "ConfigurationError"
        assert f"{path} is not a whole checkpoint" in failure.message
        assert "Use an earlier one" in failure.message
    assert path.read_bytes() == content
