"""What a strategy is made with: what is no setting, and what can be read of those that are."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.strategy.settings import differences

GIVEN: dict[str, Any] = {
    "stages": 2,
    "replicas": 3,
    "micro_batches": 5,
    "verification": ls.Verification(window=64),
    "response": ls.Response(ban_after=7),
    "partition": "uniform",
    "engine": "virtual",
    "sequential": "net",
    "zero_stage": 0,
    "activation_checkpointing": True,
    "transport": "host",
    "state_dict_type": "sharded",
    "timeout": timedelta(seconds=90),
}


def test_settings_are_read_and_shown() -> None:
    strategy = ls.SentinelStrategy(**GIVEN)
    assert {name: getattr(strategy, name) for name in GIVEN} == GIVEN
    for name, value in GIVEN.items():
        assert f"{name}={value!r}" in repr(strategy)
        with pytest.raises(AttributeError):
            setattr(strategy, name, value)


def test_what_goes_into_a_checkpoint_is_plain_and_has_no_secret() -> None:
    plain = ls.SentinelStrategy(**GIVEN)._settings.plain
    assert plain["timeout"] == 90 and plain["response"]["ban_after"] == 7 and plain["verification"]["window"] == 64
    assert "seed" not in plain["verification"]


class Named(BoringModel):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Linear(8, 2))  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("wanted", [True, False])
def test_loggers_are_given_them_beside_the_modules(kind: Any, wanted: bool, tmp_path: Path) -> None:
    strategy = ls.SentinelStrategy(2, 1, engine="virtual", verification=None, micro_batches=1)
    logger = kind(tmp_path)
    quiet: Any = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "enable_autolog_hparams": wanted}
    run = L.Trainer(strategy=strategy, logger=logger, **quiet)
    run.fit(Named())
    logger.save()
    file = Path(logger.log_dir) / "hparams.yaml"
    logged = (yaml.safe_load(file.read_text()) if file.exists() else None) or {}
    assert logged == ({"width": 32, "sentinel": strategy._settings.plain} if wanted else {})


WRONG = [
    ({"verification": True}, "verification=True is no Verification", "Verification(...), or leave it out"),
    ({"verification": "paper"}, "verification='paper' is no Verification", "Verification(method='paper')"),
    ({"verification": "on"}, "verification='on' is no Verification", "None turns verification off"),
    ({"verification": {"window": 9}}, "verification={'window': 9} is no Verification", "Verification(window=9)"),
    ({"verification": ls.Response()}, "is no Verification", "None turns verification off"),
    ({"response": "log"}, "response='log' is no Response", "Response(on_flag='log', ban_after=None)"),
    ({"response": None}, "response=None is no Response", "leave it out"),
    ({"response": {"ban_after": 3}}, "is no Response", "response=Response(ban_after=3)"),
    ({"identity": 3}, "identity=3 cannot work", "the path of a file"),
    ({"identity": "worker.key", "engine": "virtual"}, "identity='worker.key' needs engine='process'", "Leave identity out"),
    ({"known_workers": "known"}, "known_workers='known' admits workers by their keys", "lightning-sentinel identity worker.key"),
    ({"timeout": 60}, "timeout=60 cannot work", "timedelta(seconds=60)"),
    ({"timeout": "5m"}, "timeout='5m' cannot work", "timedelta(seconds=300)"),
    ({"timeout": timedelta()}, "cannot work", "above zero"),
    ({"micro_batches": 2.5}, "micro_batches=2.5 cannot work", "whole number"),
    ({"micro_batches": True}, "micro_batches=True cannot work", "whole number"),
    ({"stages": 2.0}, "stages=2.0 cannot work", "whole number"),
    ({"stages": 0}, "stages=0 cannot work", "at least 1"),
    ({"replicas": "2"}, "replicas='2' cannot work", "whole number"),
    ({"replicas": math.nan}, "replicas=nan cannot work", "whole number"),
    ({"partition": 3}, "partition=3 is unknown", "'uniform'"),
    ({"engine": None}, "engine=None is unknown", "'virtual'"),
    ({"sequential": 1}, "sequential=1 cannot work", "name of an attribute"),
    ({"zero_stage": True}, "zero_stage=True cannot work", "0 or 1"),
    ({"activation_checkpointing": "yes"}, "activation_checkpointing='yes' cannot work", "True or False"),
]


@pytest.mark.parametrize(("given", "says", "remedy"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_no_setting_is_refused_with_its_remedy(given: dict[str, Any], says: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        ls.SentinelStrategy(**given)
    assert says in str(raised.value) and remedy in str(raised.value)


def test_a_misspelt_argument_is_no_argument() -> None:
    with pytest.raises(TypeError, match=r"SentinelStrategy.__init__\(\) got an unexpected keyword argument 'stage'"):
        ls.SentinelStrategy(stage=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ["b=2 is now 3"]),
        ({"a": 1}, {"a": 1, "new": 2}, []),
        (None, None, []),
    ],
)
def test_differences(before: Any, now: Any, told: list[str]) -> None:
    assert differences(before, now) == told


def test_verification_that_comes_or_goes_is_a_difference() -> None:
    assert re.search("nothing was verified", differences(None, {"a": 1})[0])
    assert re.search("verified", differences({"a": 1}, None)[0])
