"""Sets up DeepSpeed: its environment, and a check of the private names that the engine uses.

All private names of DeepSpeed that this package uses are listed here, so that a release that changes one fails at once with a clear
error, instead of training wrongly.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from lightning_sentinel.errors import ConfigurationError, UnsupportedVersionError

__all__ = [
    "check_engine",
    "check_private_names",
    "engine_config",
    "keeping_groups",
    "leave_module_alone",
    "local_rank_of",
    "prepare",
]

_PRIVATE_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "deepspeed.runtime.pipe.engine": {
        "PipelineEngine": (
            "_INSTRUCTION_MAP",
            "_exec_schedule",
            "_exec_optimizer_step",
        ),
    },
    "deepspeed.runtime.engine": {"DeepSpeedEngine": ("_broadcast_model", "_set_distributed_vars", "zero_grad")},
    "deepspeed.runtime.pipe.module": {"PipelineModule": ("mpu",)},
    "deepspeed.runtime.pipe.schedule": {"TrainSchedule": ("steps", "_step_to_micro_batch"), "InferenceSchedule": ("steps",)},
    "deepspeed.ops": {"_probe_compatible_ops": ()},
}
"""Module -> class or variable -> members."""

_HOOKS = ("module_forward_pre_hook", "module_forward_post_hook")
_ENGINE_ATTRIBUTES = _HOOKS
"""Set by DeepSpeed's constructor, so that only an instance can be checked for them."""


def prepare(device: torch.device, timeout: timedelta | None, local_rank: int = 0) -> None:
    """Import DeepSpeed for a device and connect it to the running ``torch.distributed``.

    Args:
        device: of the Trainer.
        timeout: of DeepSpeed's own waits; ``None`` in a single process, which waits for no other.
        local_rank: of this process on its machine.

    Raises:
        ConfigurationError: if DeepSpeed was imported before, for another accelerator.
        UnsupportedVersionError: if a private name that we rely on is gone.
    """
    wanted = device.type
    if "deepspeed" not in sys.modules:
        os.environ.setdefault("DS_ACCELERATOR", wanted)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    actual = get_accelerator().device_name()
    if actual != wanted:
        raise ConfigurationError(
            f"The Trainer uses {wanted!r}, but DeepSpeed was imported for {actual!r} and cannot change. Set the environment"
            f" variable DS_ACCELERATOR={wanted} before Python starts, or import lightning_sentinel before deepspeed."
        )
    check_private_names()
    if timeout is None:
        return
    # DeepSpeed reads LOCAL_RANK, which torchrun and Lightning's launcher set, but others, such as SLURM's, do not.
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    with _no_ops():
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False, timeout=timeout
        )


@contextmanager
def _no_ops() -> Iterator[None]:
    """A context in which DeepSpeed believes that none of its ops can be built; afterwards it gets the true answer.

    On CPU it would compile a shared-memory op at start-up: a minute, a compiler, and a lock file that outlives a killed run and
    blocks all later ones. Even checking which ops can be built runs compilers. The pipeline uses none of them.
    """
    import deepspeed

    names = vars(deepspeed.ops)
    known = names.get("__compatible_ops__")
    names["__compatible_ops__"] = {}
    try:
        yield
    finally:
        del names["__compatible_ops__"]
        if known is not None:
            names["__compatible_ops__"] = known


def engine_config() -> dict[str, Any]:
    """DeepSpeed's configuration for a run in which this package handles batches, gradients and clipping."""
    return {
        # We split batches, so that gradients are scaled in one place; DeepSpeed sees one micro-batch per step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's gradient norm would include banned workers. Explicit, because the default is not zero.
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }


def check_private_names() -> None:
    """Raise ``UnsupportedVersionError`` if the installed DeepSpeed lacks a private name that the engine uses."""
    from importlib import import_module

    missing = []
    for module_name, owners in _PRIVATE_NAMES.items():
        module = import_module(module_name)
        for owner, members in owners.items():
            if not hasattr(module, owner):
                missing.append(f"{module_name}.{owner}")
            else:
                found = getattr(module, owner)
                missing += [f"{module_name}.{owner}.{member}" for member in members if not hasattr(found, member)]
    _refuse_without(missing)


def check_engine(engine: object) -> None:
    """Raise ``UnsupportedVersionError`` if an engine lacks a private attribute that we use."""
    _refuse_without([f"{type(engine).__name__}.{name}" for name in _ENGINE_ATTRIBUTES if not hasattr(engine, name)])


def leave_module_alone(engine: object) -> None:
    """Remove the hooks that DeepSpeed's constructor leaves on the module: they keep the engine and its optimizer state alive.

    The hooks time forward passes that go through DeepSpeed, which ours do not, and a module may outlive many engines.
    """
    for name in _HOOKS:
        getattr(engine, name).remove()


@contextmanager
def local_rank_of(device: torch.device) -> Iterator[None]:
    """A context for constructing ``PipelineModule``, which moves to device ``LOCAL_RANK``: sets it to the Trainer's device."""
    before = os.environ.get("LOCAL_RANK")
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before
        elif device.index is not None:
            del os.environ["LOCAL_RANK"]


@contextmanager
def keeping_groups(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """A context around DeepSpeed's constructor that restores the parameter groups which it drops: those empty on this stage.

    Without them a learning-rate scheduler would pair its rates with the wrong groups.
    """
    groups = [] if optimizer is None else list(optimizer.param_groups)
    yield
    if optimizer is not None:
        optimizer.param_groups[:] = groups


def _refuse_without(missing: list[str]) -> None:
    if missing:
        import deepspeed

        raise UnsupportedVersionError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}, on which lightning-sentinel builds. Install a version"
            " that has, such as deepspeed==0.19.8, and report the newer one."
        )
