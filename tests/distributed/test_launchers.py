"""The same script, started as users start it, on one machine and on several, in new processes; and what it leaves behind."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed import starting, world
from tests.distributed.tasks import Classifier

Start = tuple[list[str], dict[str, str]]
"""A command in front of the script, if any, and what it has in its environment."""
# A process imports for six seconds before it does anything, so each way of starting has no more of them than show it, and only
# those of torchrun on one machine are as users start them. The others are forked. The test of examples/huggingface has Lightning
# start a new interpreter.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def one_machine() -> list[Start]:
    return [([], {"DEVICES": "2"})]


def one_machine_by_torchrun() -> list[Start]:
    return [([*TORCHRUN, "--nproc-per-node=2", f"--master-port={world.free_port()}"], {"DEVICES": "2"})]


def two_machines() -> list[Start]:
    """The script is started once on each; Lightning starts the other process of each machine."""
    meet = {"NODES": "2", "DEVICES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(world.free_port())}
    return [([], meet | {"NODE_RANK": str(node)}) for node in range(2)]


def two_machines_by_torchrun() -> list[Start]:
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{world.free_port()}"]
    return [
        (["torchrun", *meet, "--rdzv-id=two", f"--rdzv-conf=is_host={1 - node}"], {"NODES": "2", "DEVICES": "1"})
        for node in range(2)
    ]


def two_machines_by_slurm() -> list[Start]:
    """What srun tells the tasks of ``--nodes=2 --ntasks-per-node=2``."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "2",
    }
    job |= {"SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(world.free_port()), "NODES": "2", "DEVICES": "2"}
    places = [{"SLURM_PROCID": str(task), "SLURM_NODEID": str(task // 2), "SLURM_LOCALID": str(task % 2)} for task in range(4)]
    return [([], job | place) for place in places]


LAUNCHERS = {one_machine: 2, one_machine_by_torchrun: 2, two_machines: 4, two_machines_by_torchrun: 2, two_machines_by_slurm: 4}
"""Of how many processes."""


def said_by_all(starts: list[Start], directory: Path) -> str:
    """Start all, wait for all, and let none of them outlive the test."""
    script = [str(world.ROOT / "tests" / "distributed" / "script.py"), str(directory)]
    outputs = [directory / f"{number}.out" for number in range(len(starts))]
    processes = []
    try:
        for (command, extra), out in zip(starts, outputs):
            begin = starting.start_anew if command[:1] == [sys.executable] else starting.start
            processes.append(begin([*command, *script], starting.clean_environment() | extra, directory, out))
        codes = [starting.wait(process, 140) for process in processes]
    finally:
        for process in processes:
            starting.stop(process)
    said = "".join(out.read_text() for out in outputs)
    assert codes == [0] * len(starts), said
    return said


@pytest.mark.timeout(150)
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_a_script_trains_logs_and_leaves_a_checkpoint_for_plain_lightning(
    launcher: Callable[[], list[Start]], tmp_path: Path
) -> None:
    said = said_by_all(launcher(), tmp_path)

    assert f"2 stages x {LAUNCHERS[launcher] // 2} replicas" in said
    with next(tmp_path.glob("lightning_logs/version_0/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    logged = set(rows[0])
    assert {"train_loss_step", "train_loss_epoch", "train_accuracy", "val_loss"} <= logged
    assert {"sentinel/anomaly_score", "sentinel/flags", "sentinel/banned", "sentinel/audits"} <= logged
    assert {"sentinel/anomaly_score/stage0/activation", "sentinel/anomaly_score/stage1/gradient"} <= logged

    (checkpoint,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    module = Classifier.load_from_checkpoint(checkpoint, map_location="cpu")
    assert list(saved["state_dict"]) == list(Classifier().state_dict())
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(saved["optimizer_states"][0])
    moments = {name: optimizer.state[parameter]["exp_avg"].shape for name, parameter in module.named_parameters()}
    assert moments == {name: parameter.shape for name, parameter in module.named_parameters()}
