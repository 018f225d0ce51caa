"""Directories with a part of each stage: whole or not there, whatever happens to the process that writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.checkpoints.files import AtomicCheckpointIO, part_of
from lightning_sentinel.pipeline.checkpoints.sharded import Destination, ShardedCheckpoint, consolidate

NAMES = ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"]
STAGES = [NAMES[:2], NAMES[2:]]
FULL = AtomicCheckpointIO()
OPTIONS = [{"lr": 0.1}, {"lr": 0.2}]


def weights(step: int) -> dict[str, Tensor]:
    return {name: torch.full((index + 1, 3), float(step)) for index, name in enumerate(NAMES)}


def save(path: Path, step: int) -> None:
    destination = Destination.prepare(path)
    state, parts = weights(step), []
    for stage, names in enumerate(STAGES):
        tensors = {f"{name}/momentum_buffer": state[name] + 0.5 for name in names}
        groups = [[name for name in names if kind in name] for kind in ("weight", "bias")]
        optimizer = ({"groups": groups, "numbers": [], "options": OPTIONS}, tensors)
        parts.append(destination.write_part(stage, {"state_dict": {name: state[name] for name in names}}, [optimizer]))
    index = {"state_names": NAMES, "parameter_names": NAMES, "options": [OPTIONS]}
    checkpoint = {"pytorch-lightning_version": "2.6.0", "global_step": step, "lightning_sentinel": {"step": step}}
    destination.publish(checkpoint, parts, index)


def whole(path: Path, step: int) -> None:
    """Assert that the checkpoint of a step is there, and nothing else."""
    found = ShardedCheckpoint(path).whole()
    assert found["global_step"] == step
    torch.testing.assert_close(found["state_dict"], weights(step), rtol=0, atol=0)
    assert list(found["state_dict"]) == NAMES
    assert os.listdir(path.parent) == [path.name]
    assert len(os.listdir(path)) == 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "last.ckpt"


def test_a_checkpoint_is_written_and_replaced(path: Path) -> None:
    for step in (1, 2):
        save(path, step)
        whole(path, step)


def test_only_what_is_asked_for_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, 1)
    opened: list[str] = []
    load = torch.load
    monkeypatch.setattr("torch.load", lambda file, **how: (opened.append(file.name), load(file, **how))[1])
    saved = ShardedCheckpoint(path)
    assert list(saved.states({"net.1.weight", "net.1.bias"})["state_dict"]) == ["net.1.weight", "net.1.bias"]
    (state,), groups = saved.optimizer_states({"net.1.weight", "net.1.bias"})
    assert groups == [["net.1.weight"], ["net.1.bias"]]
    assert state["param_groups"] == [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]
    torch.testing.assert_close(state["state"][1]["momentum_buffer"], weights(1)["net.1.bias"] + 0.5)
    # A stage that trains nothing has a part in no group.
    assert saved.optimizer_states(set()) == (
        [{"state": {}, "param_groups": [{**option, "params": []} for option in OPTIONS]}],
        [[], []],
    )
    assert {name.split("-")[0] + name.split("-")[1] for name in opened[1:]} == {"stage1"}


def test_what_a_view_is_a_view_of_is_not_written(path: Path) -> None:
    part = Destination.prepare(path).write_part(0, {"state_dict": {"a": torch.zeros(10**6)[:2]}}, [])
    assert part["bytes"] < 10**4


class TestKilled:
    """A process is killed at every call by which it changes something on the disk, one after the other."""

    CALLS = [
        (Path, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (torch, "save"),
    ]

    def killed_at(self, call: int, work: Callable[[], None]) -> bool:
        """Whether a process that does the work was killed before that call, and not done before."""
        child = os.fork()
        if child == 0:
            left = [call]
            for owner, name in self.CALLS:
                original = getattr(owner, name)

                def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                    if left[0] == 0:
                        os._exit(9)
                    left[0] -= 1
                    return original(*args, **kwargs)

                setattr(owner, name, counted)
            work()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    def test_the_one_before_or_the_new_one_is_whole(self, path: Path) -> None:
        save(path, 1)
        kept = path.with_name("kept")
        shutil.copytree(path, kept)
        found, call = [], 0
        while self.killed_at(call, lambda: save(path, 2)):
            found.append(ShardedCheckpoint(path).whole()["global_step"])
            torch.testing.assert_close(ShardedCheckpoint(path).whole()["state_dict"], weights(found[-1]), rtol=0, atol=0)
            shutil.rmtree(path)
            shutil.copytree(kept, path)
            call += 1
        assert found == sorted(found) and set(found) == {1, 2}
        assert found.count(1) > 8

    def test_what_was_left_is_removed_by_the_next_save(self, path: Path) -> None:
        save(path, 1)
        call = 0
        while self.killed_at(call, lambda: save(path, 2)):
            save(path, 3)
            whole(path, 3)
            call += 1

    def test_the_first_one_is_there_when_it_is_whole(self, path: Path) -> None:
        call = 0
        while self.killed_at(call, lambda: save(path, 1)):
            if path.exists():
                assert ShardedCheckpoint(path).whole()["global_step"] == 1
            save(path, 2)
            whole(path, 2)
            shutil.rmtree(path.parent)
            call += 1
        whole(path, 1)


class TestOtherKinds:
    def test_a_file_is_replaced(self, path: Path) -> None:
        FULL.save_checkpoint({"step": 1}, path)
        save(path, 2)
        whole(path, 2)

    def test_by_a_file(self, path: Path) -> None:
        save(path, 1)
        FULL.save_checkpoint({"step": 2}, path)
        assert FULL.load_checkpoint(path) == {"step": 2}
        assert os.listdir(path.parent) == [path.name]

    def test_parts_that_the_other_kind_left_are_no_hindrance(self, path: Path) -> None:
        Destination.prepare(path)
        FULL.save_checkpoint({"step": 1}, path)
        assert os.listdir(path.parent) == [path.name]
        part_of(path).write_text("half")
        save(path, 2)
        whole(path, 2)

    @pytest.mark.parametrize(
        "save_one", [save, lambda path, step: FULL.save_checkpoint({"step": step}, path)], ids=["parts", "file"]
    )
    def test_a_directory_of_the_users_is_not_replaced(self, path: Path, save_one: Callable[[Path, int], None]) -> None:
        path.mkdir(parents=True)
        (path / "thesis.tex").write_text("years of work")
        with pytest.raises(ConfigurationError, match=r"last\.ckpt is a directory and no checkpoint, so it is not replaced"):
            save_one(path, 1)
        assert (path / "thesis.tex").read_text() == "years of work"

    def test_files_of_the_users_beside_the_parts_stay(self, path: Path) -> None:
        save(path, 1)
        (path / "notes.txt").write_text("the good one")
        save(path, 2)
        assert (path / "notes.txt").exists()
        assert ShardedCheckpoint(path).whole()["global_step"] == 2

    def test_removed_it_is_gone(self, path: Path) -> None:
        save(path, 1)
        FULL.remove_checkpoint(path)
        assert os.listdir(path.parent) == []


def test_a_save_that_failed_leaves_the_one_before(path: Path) -> None:
    save(path, 1)
    destination = Destination.prepare(path)
    destination.write_part(0, {"state_dict": weights(2)}, [])
    destination.abandon()
    whole(path, 1)


def test_a_part_that_rank_zero_cannot_see(path: Path) -> None:
    destination = Destination.prepare(path)
    part = destination.write_part(0, {"state_dict": weights(1)}, [])
    (Path(destination.folder) / part["file"]).unlink()
    with pytest.raises(ConfigurationError, match=r"needs a path that all machines share.*state_dict_type='full'"):
        destination.publish({}, [part], {"state_names": NAMES, "parameter_names": NAMES, "options": []})


@pytest.mark.parametrize(
    "said",
    [
        {"file": "../elsewhere.pt"},
        {"file": "stage-0-another.pt"},
        {"file": None},
        {"bytes": "10"},
        {"state_names": None},
        {"parameter_names": [1]},
    ],
    ids=str,
)
def test_what_a_stage_says_of_its_part_is_believed_only_of_its_own(path: Path, said: dict[str, object]) -> None:
    destination = Destination.prepare(path)
    part = destination.write_part(1, {"state_dict": weights(1)}, [])
    believed = destination.believed(1, part, lambda name: name in STAGES[1])
    assert believed == {**part, "state_names": STAGES[1]}
    with pytest.raises(ConfigurationError, match="What stage 1 says that it has written is no part of this checkpoint"):
        destination.believed(1, part | said, lambda name: True)


class TestRefused:
    def part(self, path: Path) -> Path:
        return sorted(path.glob("stage-1-*.pt"))[0]

    def missing(self, path: Path) -> None:
        self.part(path).unlink()

    def truncated(self, path: Path) -> None:
        os.truncate(self.part(path), 500)

    def of_another_save(self, path: Path) -> None:
        save(path.with_name("other.ckpt"), 2)
        shutil.copy(self.part(path.with_name("other.ckpt")), self.part(path))
        shutil.rmtree(path.with_name("other.ckpt"))

    def without_index(self, path: Path) -> None:
        (path / "checkpoint.pt").unlink()

    def cut_index(self, path: Path) -> None:
        os.truncate(path / "checkpoint.pt", 500)

    def foreign_index(self, path: Path) -> None:
        torch.save({"state_dict": {}}, path / "checkpoint.pt")

    def newer(self, path: Path) -> None:
        index = torch.load(path / "checkpoint.pt", weights_only=True)
        index["lightning_sentinel"]["sharded"]["format"] = 7
        torch.save(index, path / "checkpoint.pt")

    CASES = {
        missing: r"not a whole checkpoint: its part stage-1-\w+\.pt is missing",
        truncated: r"not a whole checkpoint: its part stage-1-\w+\.pt has 500 bytes instead of",
        of_another_save: r"stage-1-\w+\.pt belongs to another checkpoint than checkpoint\.pt beside it",
        without_index: r"is a directory, but no sharded checkpoint: there is no checkpoint\.pt in it",
        cut_index: r"checkpoint\.pt cannot be read \(RuntimeError",
        foreign_index: r"not the index of a sharded checkpoint of format 1, but of None",
        newer: r"not the index of a sharded checkpoint of format 1, but of 7",
    }

    @pytest.mark.parametrize(("spoil", "says"), CASES.items(), ids=lambda value: getattr(value, "__name__", ""))
    def test_with_the_reason_and_left_alone(self, path: Path, spoil: Callable[[Any, Path], None], says: str) -> None:
        save(path, 1)
        spoil(self, path)
        before = {file: file.read_bytes() for file in path.iterdir()}
        with pytest.raises(ConfigurationError, match=says):
            consolidate(path, path.with_name("out.ckpt"))
        assert {file: file.read_bytes() for file in path.iterdir()} == before
        assert not path.with_name("out.ckpt").exists()


class TestConsolidate:
    def test_one_ordinary_file(self, path: Path) -> None:
        save(path, 1)
        consolidate(path, path.with_name("out.ckpt"))
        found = torch.load(path.with_name("out.ckpt"), weights_only=True)
        torch.testing.assert_close(found["state_dict"], weights(1), rtol=0, atol=0)
        parameters = [torch.nn.Parameter(weights(0)[name]) for name in NAMES]
        optimizer = torch.optim.SGD([{"params": parameters[::2], "lr": 1.0}, {"params": parameters[1::2], "lr": 1.0}], momentum=0.9)
        optimizer.load_state_dict({**found["optimizer_states"][0]})
        for parameter, name in zip(parameters, NAMES):
            torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], weights(1)[name] + 0.5)
        assert found["lightning_sentinel"]["optimizer_groups"] == [NAMES[::2], NAMES[1::2]]
        assert "sharded" not in found["lightning_sentinel"]

    def test_nothing_is_overwritten(self, path: Path) -> None:
        save(path, 1)
        out = path.with_name("out.ckpt")
        out.write_text("mine")
        with pytest.raises(ConfigurationError, match=r"out\.ckpt exists, and nothing is overwritten"):
            consolidate(path, out)
        assert out.read_text() == "mine"

    def test_what_is_not_a_directory(self, path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"last\.ckpt does not exist"):
            consolidate(path, path.with_name("out.ckpt"))
        FULL.save_checkpoint({"step": 1}, path)
        with pytest.raises(ConfigurationError, match=r"last\.ckpt is a file: perhaps it is an ordinary checkpoint already"):
            consolidate(path, path.with_name("out.ckpt"))
