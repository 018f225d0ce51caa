"""Modules of users, one after the other on one mesh, or in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_sentinel as ls
from lightning_sentinel.errors import SentinelError
from tests.distributed.tasks import PATIENCE
from tests.distributed.trainer_tasks import metrics_of, trainer
from tests.user_modules import (
    OPTIMIZERS,
    Deep,
    Fetches,
    Module,
    Once,
    OnlyLogs,
    OwnBackward,
    OwnClipping,
    Partly,
    Skips,
    loader,
)

MODULES: dict[str, Callable[[], Module]] = {
    "wrapped": Module,
    "deep": Deep,
    "compiled": lambda: _compiled(),
    "changes its batch": Once,
    "only logs": OnlyLogs,
    "fetches": Fetches,
    "skips": lambda: Skips(early=False),
    "backward": OwnBackward,
    "clipping": OwnClipping,
    "optimizes the trainable": lambda: Partly("trainable"),
}


def _compiled() -> Module:
    module = Module()
    module.model = torch.compile(module.model, backend="eager")
    return module


def _trainer(stages: int, epochs: int, **options: Any) -> L.Trainer:
    """Of a mesh with one replica, or, without stages, plain; on the data in their order."""
    mesh = ls.SentinelStrategy(stages, 1, micro_batches=2, verification=None, timeout=PATIENCE, **options) if stages else "auto"
    return trainer(mesh, max_epochs=epochs, use_distributed_sampler=False)


def in_turn(stages: int = 0) -> dict[str, Any]:
    """Weights and logs of each."""
    found = {}
    for name, make in MODULES.items():
        module, run = make(), _trainer(stages, epochs=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*training_step. returned .None.")
            run.fit(module, loader(), loader())
        found[name] = {"weights": dict(module.state_dict()), "metrics": metrics_of(run), "steps": run.global_step}
    return found


def optimizers(directory: str, state_dict_type: str, stages: int = 0) -> dict[str, Any]:
    """Of each that covers a part the weights, after a checkpoint in the middle from which it goes on, and its groups."""
    found = {}
    options = {"state_dict_type": state_dict_type} if stages else {}
    for name in OPTIMIZERS:
        path = str(Path(directory) / name)
        run = _trainer(stages, epochs=1, **options)
        run.fit(Partly(name), loader())
        run.save_checkpoint(path)
        module, run = Partly(name), _trainer(stages, epochs=2, **options)
        run.fit(module, loader(), ckpt_path=path)
        groups = run.optimizers[0].param_groups
        found[name] = {
            "weights": dict(module.state_dict()),
            "rates": [group["lr"] for group in groups],
            "sizes": [len(group["params"]) for group in groups],
        }
    return found


class ClipsItself(Module):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)


class Apart(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model.head(self.model.mid[1](self.model.mid[0](self.model.inp(batch["x"])))).mean()


class Looks(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + self.model.inp.weight.norm()


class Loses(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise RuntimeError("the socket of the user's own service timed out")


def refused(name: str) -> str:
    module = {"clips itself": ClipsItself, "apart": Apart, "looks": Looks, "loses": Loses}[name]()
    run = _trainer(2, epochs=1)
    try:
        run.fit(module, loader())
    except (SentinelError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
