from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.runtime.pipe.engine
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import TrainSchedule

from lightning_sentinel.errors import ConfigurationError, UnsupportedVersionError
from lightning_sentinel.pipeline import deepspeed_setup
from lightning_sentinel.pipeline.boundaries import StageBoundaries
from lightning_sentinel.pipeline.deepspeed_setup import check_private_names, local_rank_of, prepare
from lightning_sentinel.pipeline.engine import SentinelEngine

MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    yield
    logger.setLevel(level)


class TestPrivateNames:
    def test_the_installed_version_has_all(self) -> None:
        check_private_names()

    @pytest.mark.parametrize(
        ("owner", "name", "path"),
        [
            (PipelineEngine, "_exec_optimizer_step", "deepspeed.runtime.pipe.engine.PipelineEngine._exec_optimizer_step"),
            (PipelineEngine, "_INSTRUCTION_MAP", "deepspeed.runtime.pipe.engine.PipelineEngine._INSTRUCTION_MAP"),
            (TrainSchedule, "_step_to_micro_batch", "deepspeed.runtime.pipe.schedule.TrainSchedule._step_to_micro_batch"),
        ],
        ids=lambda value: value if isinstance(value, str) and "." not in value else "",
    )
    def test_one_that_is_gone_is_named(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, path: str) -> None:
        monkeypatch.delattr(owner, name)
        with pytest.raises(UnsupportedVersionError) as raised:
            check_private_names()
        message = str(raised.value)
        assert message.startswith(f"DeepSpeed {deepspeed.__version__} has no {path}, on which")
        assert "Install a version" in message

    def test_all_that_are_gone_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deepspeed_setup, "_PRIVATE_NAMES", {"deepspeed.ops": {"nothing": (), "adam": ("nor",)}})
        with pytest.raises(UnsupportedVersionError, match=r"deepspeed\.ops\.nothing, deepspeed\.ops\.adam\.nor"):
            check_private_names()

    def test_all_that_the_engine_touches_is_named(self) -> None:
        """Private attributes of DeepSpeed's engines that ours uses, read from the sources."""
        theirs = inspect.getsource(deepspeed.runtime.engine) + inspect.getsource(deepspeed.runtime.pipe.engine)
        ours = inspect.getsource(SentinelEngine) + inspect.getsource(StageBoundaries)
        used = set(re.findall(r"(?:self|PipelineEngine|DeepSpeedEngine)\.(_[A-Za-z]\w*)", ours))
        private = {name for name in used if re.search(rf"(self\.|def ){name}\b", theirs)}
        assert "_exec_schedule" in private
        assert [name for name in sorted(private) if name not in inspect.getsource(deepspeed_setup)] == []


@pytest.mark.parametrize("before", [None, "0", "3"])
def test_deepspeed_is_told_the_device_that_the_trainer_chose(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody else: the process stays the one that it is on its machine, after an error too."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if before is not None:
        monkeypatch.setenv("LOCAL_RANK", before)
    with pytest.raises(ArithmeticError), local_rank_of(torch.device("cuda", 1)):
        assert os.environ["LOCAL_RANK"] == "1"
        raise ArithmeticError
    assert os.environ.get("LOCAL_RANK") == before
    with local_rank_of(torch.device("cpu")):
        assert os.environ.get("LOCAL_RANK") == before


class TestPrepare:
    def test_another_accelerator(self) -> None:
        actual = get_accelerator().device_name()
        wanted = "cpu" if actual != "cpu" else "xpu"
        with pytest.raises(ConfigurationError) as raised:
            prepare(torch.device(wanted), MINUTE)
        message = str(raised.value)
        assert f"uses {wanted!r}, but DeepSpeed was imported for {actual!r}" in message
        assert f"DS_ACCELERATOR={wanted}" in message

    @pytest.mark.parametrize("probed", [False, True])
    def test_it_connects_without_compiling(self, probed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[dict[str, Any]] = []
        built: list[Any] = []

        def init_distributed(**options: Any) -> None:
            calls.append(options)
            built.append(build_shm_op())

        monkeypatch.setattr(deepspeed, "init_distributed", init_distributed)
        monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
        if probed:
            monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {"deepspeed_shm_comm": True})
        else:
            monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
        monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: {"deepspeed_shm_comm": "asked"})
        prepare(torch.device(get_accelerator().device_name()), MINUTE)
        assert built == [None]
        # The compilers run for whoever asks afterwards.
        assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": True if probed else "asked"}
        assert len(calls) == 1
        assert calls[0]["dist_backend"] == "gloo"
        assert calls[0]["timeout"] == MINUTE
        assert calls[0]["auto_mpi_discovery"] is False

    def test_a_version_that_lacks_a_name_is_refused_before_it_connects(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(PipelineEngine, "_exec_optimizer_step")
        monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: pytest.fail("connected"))
        with pytest.raises(UnsupportedVersionError, match="_exec_optimizer_step"):
            prepare(torch.device(get_accelerator().device_name()), MINUTE)
