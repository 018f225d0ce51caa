"""Starts scripts as a shell does, in processes that are forked from the server, in which all that they import is there already.

A new interpreter imports for six seconds before it does anything. What a script can tell is the same: it is ``__main__``, with its
arguments, its environment, its folder and a session of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

from lightning.pytorch.strategies.launchers import subprocess_script
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import elastic_launch

from tests.distributed import world

Process = BaseProcess | subprocess.Popen[bytes]


def clean_environment() -> dict[str, str]:
    """That of this process, without what the server or another test has left in it."""
    left = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in left}
    return environment | {"PYTHONPATH": str(world.ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def start_anew(command: list[str], environment: dict[str, str], directory: Path, said: Path) -> Process:
    """The same for any command, with an interpreter of its own."""
    with said.open("w") as file:
        return subprocess.Popen(
            command, env=environment, cwd=directory, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def start(command: list[str], environment: dict[str, str], directory: Path, said: Path) -> Process:
    """Run a script, or ``torchrun`` with its options and a script; what is said goes to a file. What they start is forked, too."""
    # Not as a daemon: those must not have children.
    process = world.CONTEXT.Process(target=_become, args=(command, environment, directory, said), daemon=False)
    process.start()
    return process


def wait(process: Process, seconds: float) -> int | None:
    """For its end; its exit code, which is that of a signal below zero, or ``None`` where it goes on."""
    if isinstance(process, subprocess.Popen):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.returncode
    process.join(seconds)
    return process.exitcode


def stop(process: Process) -> None:
    """With all that belongs to its session, if it goes on."""
    if wait(process, 0) is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        wait(process, 10)


def _become(command: list[str], environment: dict[str, str], directory: Path, said: Path) -> None:
    os.setsid()
    # The server that this process is of starts more; left to itself multiprocessing would start another one.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    subprocess_script.subprocess = SimpleNamespace(Popen=partial(_Child, said))  # type: ignore[assignment]
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    with said.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if command[0] == "torchrun":
        arguments = torchrun.parse_args(command[1:])
        config, _, _ = torchrun.config_from_args(arguments)
        # In place of the interpreter that it starts anew: a fork of this one.
        config.start_method = "fork"
        # It asks for the whole stack with its sources, for what it records of each turn of a rendezvous: among as many modules as a
        # fork has that is a quarter of a second of work, during which others wait and try anew.
        dynamic_rendezvous.get_method_name = lambda depth=2: "rendezvous"
        elastic_launch(config, _worker)(arguments.training_script, *arguments.training_script_args)
    else:
        _script(*command)


class _Child:
    """What Lightning's launcher starts for the other devices of a machine: in place of a new interpreter one more fork."""

    def __init__(self, said: Path, command: list[str], env: dict[str, str], cwd: str | None) -> None:
        self._process = start(command[1:], env, Path(cwd or os.getcwd()), said)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return wait(self._process, 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


def _script(*command: str) -> None:
    sys.argv = list(command)
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        # An interpreter does that at its end, a fork of one does not.
        atexit._run_exitfuncs()


def _worker(*command: str) -> None:
    """What is torchrun's own in a fork of it goes first: a new interpreter would have its own session, and none of its signals."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, 0)
    for name in os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"].split(","):
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    try:
        _script(*command)
    except SystemExit as end:
        # torchrun takes any end of a function but its return for a failure.
        if end.code:
            raise
