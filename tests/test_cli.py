"""The command, as far as one process shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_sentinel as ls
from lightning_sentinel import cli
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.trust.identity import Identity

ROOT = Path(__file__).resolve().parents[1]


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--print_config"])
    assert ended.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def test_the_examples_config_is_read_with_its_settings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = printed_config(capsys, "fit", "--config", "examples/shakespeare/config.yaml", "--trainer.max_steps", "7")
    trainer = config["trainer"]
    assert trainer["max_steps"] == 7
    assert trainer["strategy"]["class_path"] == "lightning_sentinel.SentinelStrategy"
    assert trainer["strategy"]["init_args"]["verification"]["warmup_steps"] == 60
    # What is not said has the default.
    response = trainer["strategy"]["init_args"]["response"]
    assert ls.Response(**{**response, "banned": tuple(response["banned"])}) == ls.Response()
    assert trainer["strategy"]["init_args"]["verification"] == asdict(ls.Verification(warmup_steps=60))


@pytest.mark.parametrize("preset", ["sentinel", "sentinel_monitor"])
def test_a_preset_is_named_in_yaml(preset: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"trainer: {{strategy: {preset}, accelerator: cpu, devices: 4}}\n")
    config = printed_config(capsys, "fit", "--model", "lightning.pytorch.demos.boring_classes.BoringModel", "--config", str(file))
    assert config["trainer"]["strategy"] == preset


def test_the_help_of_the_strategy_explains_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--trainer.strategy.help", "lightning_sentinel.SentinelStrategy"])
    text = " ".join(capsys.readouterr().out.split())
    assert "how many micro-batches a replica's batch is dealt into" in text
    assert "--trainer.strategy.verification.help" in text


BORING = "--model=lightning.pytorch.demos.boring_classes.BoringModel"


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        (
            {"strategy": {"init_args": {"verification": {"false_positive_rate": 2}}}},
            "Verification.false_positive_rate=2.0 cannot work: it must be a rate between 0 and 1, both excluded.",
        ),
        (
            {"strategy": {"init_args": {"micro_batches": 0}}},
            "micro_batches=0 cannot work: a batch is at least one micro-batch, and a whole number of them.",
        ),
        (
            {"strategy": {"init_args": {"response": {"on_flag": "log"}}}},
            "Response(on_flag='log', ban_after=5) contradicts itself: a run that only reports bans nobody. Set ban_after=None, or"
            " on_flag='exclude'.",
        ),
        (
            {"strategy": {"init_args": {"stages": 3}}, "devices": 4},
            "stages=3 does not divide the 4 processes of this run. Set Trainer(devices=...) to a multiple of 3, or choose stages"
            " from [1, 2, 4].",
        ),
    ],
    ids=["verification", "micro_batches", "response", "mesh"],
)
def test_a_setting_that_cannot_work_is_one_sentence(trainer: dict[str, Any], says: str, tmp_path: Path) -> None:
    trainer["strategy"]["class_path"] = "lightning_sentinel.SentinelStrategy"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", **trainer}}))
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", BORING, "--config", str(file)])
    assert str(ended.value) == f"ConfigurationError: {says}"


def said_by(make: Callable[[], Any]) -> str:
    with pytest.raises(ConfigurationError) as error:
        make()
    return str(error.value)


WRONG: dict[str, tuple[dict[str, Any], Callable[[], Any] | str]] = {
    "text for a number": ({"micro_batches": "abc"}, lambda: ls.SentinelStrategy(micro_batches="abc")),
    "text for a group": ({"verification": "paper"}, lambda: ls.SentinelStrategy(verification="paper")),
    "text for the other": ({"response": "strict"}, lambda: ls.SentinelStrategy(response="strict")),
    "a list for a number": ({"response": {"ban_after": [1]}}, lambda: ls.Response(ban_after=[1])),
    "part of a step": ({"verification": {"warmup_steps": 10.5}}, lambda: ls.Verification(warmup_steps=10.5)),
    "none of the words": ({"verification": {"method": "papr"}}, lambda: ls.Verification(method="papr")),
    "none of the engines": ({"engine": "proces"}, lambda: ls.SentinelStrategy(engine="proces")),
    "text for a count": ({"stages": "two"}, lambda: ls.SentinelStrategy(stages="two")),
    "seconds": ({"timeout": 60}, lambda: ls.SentinelStrategy(timeout=60)),
    "a typing mistake": ({"stage": 2}, "SentinelStrategy has no setting 'stage'. Did you mean 'stages'?"),
    "in a group": ({"verification": {"warmup": 2}}, "Verification has no setting 'warmup'. Did you mean 'warmup_steps'?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_of_the_wrong_type_is_told_as_in_a_script(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, says = WRONG[name]
    file = tmp_path / "config.yaml"
    strategy = {"class_path": "lightning_sentinel.SentinelStrategy", "init_args": settings}
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", BORING, "--config", str(file)])
    assert str(ended.value) == f"ConfigurationError: {says if isinstance(says, str) else said_by(says)}"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "make"),
    [
        ("micro_batches=abc", lambda: ls.SentinelStrategy(micro_batches="abc")),
        ("response.ban_after=[1]", lambda: ls.Response(ban_after=[1])),
    ],
)
def test_so_is_one_on_the_command_line(given: str, make: Callable[[], Any]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", BORING, "--trainer.strategy=lightning_sentinel.SentinelStrategy", f"--trainer.strategy.{given}"])
    assert str(ended.value) == f"ConfigurationError: {said_by(make)}"


def test_a_mistake_elsewhere_is_shown_without_all_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", BORING, "--trainer.max_steps=abc"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "trainer.max_steps" in said and "abc" in said and len(said.splitlines()) < 6


def test_a_strategy_that_there_is_not_is_told_by_name() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", BORING, "--trainer.strategy=sentinell", "--trainer.accelerator=cpu"])
    assert str(ended.value).startswith("ConfigurationError: There is no strategy 'sentinell'. Did you mean 'sentinel'?")


def test_the_help_offers_no_internals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    text = "".join(capsys.readouterr().out.split())
    for offered in ("SentinelStrategy", "AttackInjector", "SentinelMonitor"):
        assert f"lightning_sentinel.{offered}" in text
    assert "lightning_sentinel.strategy" not in text and "lightning_sentinel.pipeline" not in text
    assert ",)" not in text and ",," not in text


def test_banned_workers_and_the_timeout_are_written_in_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"response": {"banned": [[1, 0], {"stage": 1, "replica": 1}]}, "timeout": "0:01:30"}
    file = tmp_path / "config.yaml"
    strategy = {"class_path": "lightning_sentinel.SentinelStrategy", "init_args": settings}
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    read = printed_config(capsys, "fit", BORING, "--config", str(file))["trainer"]["strategy"]["init_args"]  # type: ignore[index]
    assert ls.Response(**read["response"]) == ls.Response(banned=[(1, 0), (1, 1)])
    assert read["timeout"] == "0:01:30"


def test_without_its_extra_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"needs the package 'jsonargparse'.*pip install 'lightning-sentinel\[cli\]'"):
        cli.main(["fit"])


class TestConsolidate:
    def sharded(self, tmp_path: Path) -> Path:
        strategy = ls.SentinelStrategy(2, 2, micro_batches=1, engine="virtual", state_dict_type="sharded")
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(strategy=strategy, accelerator="cpu", max_steps=3, **quiet)
        trainer.fit(Small(), DataLoader(torch.randn(24, 4), batch_size=4))
        trainer.save_checkpoint(tmp_path / "parts.ckpt")
        return tmp_path / "parts.ckpt"

    def test_it_makes_a_file_for_plain_lightning(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        directory, output = self.sharded(tmp_path), tmp_path / "whole.ckpt"
        assert directory.is_dir()
        cli.main(["consolidate", str(directory), str(output)])
        assert f"{output} is an ordinary checkpoint of {output.stat().st_size:,} bytes" in capsys.readouterr().out
        trainer = L.Trainer(accelerator="cpu", max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.fit(Small(), DataLoader(torch.randn(24, 4), batch_size=4), ckpt_path=output)
        assert trainer.global_step == 6

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda directory, output: (directory / "checkpoint.pt").unlink(), r"is a directory, but no sharded checkpoint"),
            (lambda directory, output: next(directory.glob("stage-*")).unlink(), r"its part stage-0-\w+\.pt is missing"),
            (lambda directory, output: output.touch(), r"whole\.ckpt exists, and nothing is overwritten"),
        ],
        ids=["not one of ours", "missing part", "output exists"],
    )
    def test_what_cannot_be_done_is_said(self, spoil: Callable[[Path, Path], None], says: str, tmp_path: Path) -> None:
        directory, output = self.sharded(tmp_path), tmp_path / "whole.ckpt"
        spoil(directory, output)
        with pytest.raises(SystemExit, match=f"ConfigurationError: .*{says}"):
            cli.main(["consolidate", str(directory), str(output)])


def test_the_throughput_benchmark_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["benchmark", "throughput", "--help"])
    assert "--workload.width" in capsys.readouterr().out


def test_identity_prints_the_key_of_a_file_and_makes_a_missing_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "worker.key"
    for _ in range(2):
        cli.main(["identity", str(file)])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == str(Identity.kept(file).public)
    file.chmod(0o644)
    with pytest.raises(SystemExit, match=r"ConfigurationError: Others than its owner may use the key file .*chmod 600"):
        cli.main(["identity", str(file)])
