from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.checkpoints.files import AtomicCheckpointIO

PLUGIN = AtomicCheckpointIO()


def content(step: int) -> dict[str, Any]:
    return {"step": step, "state_dict": {"weight": torch.full((100,), float(step))}}


def whole(path: Path, step: int) -> None:
    """Assert that the checkpoint of a step is there, and nothing else."""
    torch.testing.assert_close(PLUGIN.load_checkpoint(path), content(step))
    assert os.listdir(path.parent) == [path.name]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "last.ckpt"


def test_a_checkpoint_is_written_and_replaced(path: Path) -> None:
    for step in (1, 2):
        PLUGIN.save_checkpoint(content(step), path)
        whole(path, step)


def test_a_path_may_be_a_string_or_an_address(path: Path) -> None:
    PLUGIN.save_checkpoint(content(1), str(path))
    whole(path, 1)
    PLUGIN.save_checkpoint(content(2), f"file://{path}")
    whole(path, 2)


def test_other_places_than_the_disk_are_lightnings_business() -> None:
    PLUGIN.save_checkpoint(content(3), "memory://run/last.ckpt")
    torch.testing.assert_close(PLUGIN.load_checkpoint("memory://run/last.ckpt"), content(3))


def test_options_of_a_storage_are_refused_as_in_lightning(path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        PLUGIN.save_checkpoint(content(1), path, storage_options={"a": 1})


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    PLUGIN.save_checkpoint(content(1), path)
    with monkeypatch.context() as patch:
        patch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], full)
        with pytest.raises(OSError, match="No space left on device") as raised:
            PLUGIN.save_checkpoint(content(2), path)
    assert raised.value.errno == errno.ENOSPC
    assert str(path) in str(raised.value)
    whole(path, 1)


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError, match=r"last\.ckpt"):
        PLUGIN.save_checkpoint(content(1), tmp_path / "run" / "last.ckpt")


def test_what_a_killed_process_left_is_written_over(path: Path) -> None:
    path.parent.mkdir()
    (path.parent / ".last.ckpt.part").write_bytes(b"half")
    PLUGIN.save_checkpoint(content(1), path)
    whole(path, 1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_part_of_a_checkpoint_is_refused_and_left_alone(path: Path, share: float) -> None:
    PLUGIN.save_checkpoint(content(1), path)
    part = path.read_bytes()[: int(share * path.stat().st_size)]
    path.write_bytes(part)
    with pytest.raises(ConfigurationError, match=r"last\.ckpt is not a whole checkpoint.*Use an earlier one"):
        PLUGIN.load_checkpoint(path)
    assert path.read_bytes() == part


def test_zeros_are_no_checkpoint(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(bytes(1000))
    with pytest.raises(ConfigurationError, match="is not a whole checkpoint"):
        PLUGIN.load_checkpoint(path)


def test_whole_files_that_cannot_be_loaded_are_another_matter(path: Path) -> None:
    PLUGIN.save_checkpoint({"what": io.StringIO}, path)
    with pytest.raises(Exception, match="Weights only load failed") as raised:
        PLUGIN.load_checkpoint(path, weights_only=True)
    assert not isinstance(raised.value, ConfigurationError)


def test_a_file_that_is_not_there_is_not_a_part_of_one(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PLUGIN.load_checkpoint(path)


class TestStrategy:
    def test_it_is_the_default(self) -> None:
        assert isinstance(ls.SentinelStrategy(2, 2).checkpoint_io, AtomicCheckpointIO)

    def test_the_users_own_wins(self) -> None:
        own = TorchCheckpointIO()
        assert ls.SentinelStrategy(2, 2, checkpoint_io=own).checkpoint_io is own
        strategy = ls.SentinelStrategy(2, 2)
        strategy.checkpoint_io = own
        assert strategy.checkpoint_io is own

    def test_a_plugin_that_wraps_another_wraps_this_one(self) -> None:
        wrapper = AsyncCheckpointIO()
        assert ls.SentinelStrategy(2, 2, checkpoint_io=wrapper).checkpoint_io is wrapper
        assert isinstance(wrapper.checkpoint_io, AtomicCheckpointIO)

    def test_what_the_user_wrapped_stays(self) -> None:
        own = TorchCheckpointIO()
        wrapper = AsyncCheckpointIO(own)
        assert ls.SentinelStrategy(2, 2, checkpoint_io=wrapper).checkpoint_io is wrapper
        assert wrapper.checkpoint_io is own
