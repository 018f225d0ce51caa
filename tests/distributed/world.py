"""Runs a function on many ranks, each a process of its own.

Ranks are forked from a fork server, in which torch, Lightning and DeepSpeed are there already, and start in milliseconds. So is the
server itself, from the process that runs the tests, before the first of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing as mp
import os
import pickle
import socket
import stat
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = mp.get_context("forkserver")
# Wherever ranks are asked for: with a server without these imports each rank imports them itself. ``DS_ACCELERATOR`` decides what
# DeepSpeed is imported for.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
sys.path.insert(0, str(ROOT))
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


def start_server() -> None:
    """Start the server, as a fork of this process unless that has looked at GPUs, which no fork of it could use then."""
    import torch

    if torch.cuda.is_initialized() or torch.cuda.device_count():
        return
    # The resource tracker is a process of its own.
    resource_tracker.ensure_running()
    launch = forkserver.util.spawnv_passfds
    forkserver.util.spawnv_passfds = _fork
    try:
        forkserver.ensure_running()
    finally:
        forkserver.util.spawnv_passfds = launch


def _fork(path: str, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """Like ``multiprocessing.util.spawnv_passfds`` without a new interpreter: the code behind ``-c`` runs in a fork of this one."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        _leave_pytest()
        # Whoever waits for the end of this process waits for that of its pipes. Of the rest some object here may know the number.
        for number in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):
                mode = os.fstat(number).st_mode
                if number > 2 and number not in kept and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                    os.close(number)
        exec(arguments[-1], {})
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


def _leave_pytest() -> None:
    """What it has put in place to hear of errors, warnings, logs and output hears nothing of another process."""
    faulthandler.disable()
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    warnings.showwarning = lambda *warning: print(warnings.formatwarning(*warning[:4]), end="", file=sys.stderr)
    captured = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    logging.getLogger().handlers.clear()
    for logger in logging.Logger.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream in captured:
                handler.setStream(sys.stdout if handler.stream is captured[0] else sys.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``function(*args)`` on every rank and return what each returned.

    Raises:
        AssertionError: with the tracebacks, if a rank failed, and with the silent ranks if some never answered.
    """
    results, failures = outcomes(function, world_size, *args, timeout=timeout)
    if failures:
        details = "\n".join(f"--- rank {rank}\n{failure.trace[-1500:]}" for rank, failure in sorted(failures.items()))
        raise AssertionError(
            f"ranks {sorted(failures)} failed, {sorted(set(range(world_size)) - set(results) - set(failures))} silent\n{details}"
        )
    assert len(results) == world_size, f"no answer from ranks {sorted(set(range(world_size)) - set(results))}"
    return [results[rank] for rank in range(world_size)]


class Failure:
    """What a rank failed with."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        self.kind, self.message, self.trace = kind, message, trace


def outcomes(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, answers: int | None = None
) -> tuple[dict[int, Any], dict[int, Failure]]:
    """Like :func:`run`, for runs that are expected to fail: results and failures by rank, of ``answers`` ranks or all."""
    port = free_port()
    queue = CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            CONTEXT.Process(target=_rank, args=(queue, directory, port, rank, world_size, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < (answers or world_size) and time.monotonic() < deadline:
            if queue._reader.poll(0.2):
                rank, ok, payload = queue.get()
                (results if ok else failures)[rank] = pickle.loads(payload)
            elif not any(process.is_alive() for process in processes):
                break
        for process in processes:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
    return results, failures


def _rank(
    queue: Any, directory: str, port: int, rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.chdir(directory)
    # What ranks leave behind when a run fails goes with it.
    tempfile.tempdir = directory
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    import torch

    torch.set_num_threads(1)
    # As in an interpreter of its own. Workers of a loader would be asked of a fork server, and each rank would start one more.
    mp.set_start_method("fork", force=True)
    try:
        answer: Any = function(*args)
        ok = True
    except BaseException as error:
        answer, ok = Failure(type(error).__name__, str(error), traceback.format_exc()), False
    # Bytes, because multiprocessing would hand over tensors as file descriptors of a process that ends here.
    queue.put((rank, ok, pickle.dumps(answer)))
