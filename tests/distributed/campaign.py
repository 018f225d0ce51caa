"""One honest warm-up, then a run for each attack that goes on from it: how the detection tests and their clean run are made.

``python -m tests.distributed.campaign`` prints a table of all of them over several seeds.
"""

from __future__ import annotations

import argparse
import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_sentinel as ls
from lightning_sentinel.models import llama
from tests.distributed.tasks import PATIENCE, trainer

STAGES, REPLICAS, MICRO_BATCHES, WARMUP = 3, 3, 2, 60
X10 = {"name": "scale", "factor": 10.0}
ACTIVATION_ATTACKS: dict[str, Any] = {"zeros": "zeros", "sign": "sign", "scale -1": "scale", "random": "random", "x10": X10}
GRADIENT_ATTACKS: dict[str, Any] = {
    "zeros": "zeros",
    "ones": "ones",
    "random": "random",
    "x10": X10,
    # What a distance to the momentum cannot see, because the momentum of gradients is nearly zero.
    "scale -1": "scale",
    "sign": "sign",
}
GUILTY = ls.Worker(1, 2)
LENGTH = 32


def windows(start: int, stop: int) -> TensorDataset:
    """Byte windows of a text that every machine has."""
    data = torch.tensor(list(inspect.getsource(argparse).encode()[:64_000]))
    pieces = data[: len(data) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))][start:stop]
    return TensorDataset(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous())


class Text(L.LightningDataModule):
    """What one replica reads; with one replica in all, what a virtual mesh deals to its own."""

    def __init__(self, replica: int, seed: int = 0, batch_size: int = 16, replicas: int = REPLICAS) -> None:
        super().__init__()
        self.replica, self.seed, self.batch_size, self.replicas = replica, seed, batch_size, replicas

    def _loader(self, data: TensorDataset, shuffle: bool, batch_size: int) -> DataLoader[Any]:
        sampler = DistributedSampler(data, self.replicas, self.replica, shuffle=shuffle, seed=self.seed)
        return DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(windows(0, 1700), True, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(windows(1700, 1892), False, 192 // self.replicas)


class Model(L.LightningModule):
    def __init__(self, seed: int, total: int) -> None:
        super().__init__()
        self.total = total
        torch.manual_seed(seed)
        self.net = llama(vocab_size=128, width=32, depth=4, heads=4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / self.total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def strategy(method: str, engine: str = "process") -> ls.SentinelStrategy:
    return ls.SentinelStrategy(
        engine=engine,  # type: ignore[arg-type]
        stages=STAGES,
        replicas=REPLICAS,
        micro_batches=MICRO_BATCHES,
        timeout=PATIENCE,
        verification=ls.Verification(method=method, warmup_steps=WARMUP, seed=0),  # type: ignore[arg-type]
        response=ls.Response(audit_rate=None),
    )


def run(
    directory: str, attacks: dict[str, tuple[str, Any]], method: str, steps: int, seed: int = 0, engine: str = "process"
) -> dict[str, Any]:
    """Warm up, then attack.

    Args:
        directory: shared by all ranks, for the checkpoint after the warm-up.
        attacks: name to (direction, attack); the clean run is added as ``"clean"``.
        steps: after the warm-up.
        engine: ``"virtual"`` has the whole mesh in this process.
    """
    if engine == "virtual":
        devices = 1
        data = Text(0, seed, REPLICAS * 16, 1)
    else:
        devices = STAGES * REPLICAS
        data = Text(int(os.environ["LOCAL_RANK"]) % REPLICAS, seed)
    warm = Path(directory) / "warm.ckpt"
    first = trainer(strategy(method, engine), devices, WARMUP)
    first.fit(Model(seed, WARMUP + steps), data)
    first.save_checkpoint(warm)
    results = {}
    for name, (direction, attack) in {"clean": ("both", None), **attacks}.items():
        injector = [] if attack is None else [ls.AttackInjector(attack, workers=[GUILTY], direction=direction, start_step=WARMUP)]  # type: ignore[arg-type]
        ours = strategy(method, engine)
        module = Model(seed, WARMUP + steps)
        second = trainer(ours, devices, WARMUP + steps, injector)
        second.fit(module, data, ckpt_path=warm)
        # By a strategy that has banned nobody, so that all runs are judged on the same samples.
        judge = trainer(strategy(method, engine), devices, 1, limit_val_batches=1.0)
        loss = judge.validate(module, data, verbose=False)[0]["val_loss"]
        results[name] = {
            "banned": sorted(ours.ledger.banned_at.items()),
            "flags": dict(ours.ledger.flags),
            "finite": all(bool(p.isfinite().all()) for p in module.parameters()),
            "loss": loss,
        }
    return results


def table(method: str, seeds: int, steps: int) -> str:
    """All attacks over several seeds, as a Markdown table."""
    from tests.distributed import world

    attacks = {f"activation {name}": ("activation", attack) for name, attack in ACTIVATION_ATTACKS.items()}
    attacks |= {f"gradient {name}": ("gradient", attack) for name, attack in GRADIENT_ATTACKS.items()}
    results = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as directory:
            results.append(world.run(run, STAGES * REPLICAS, directory, attacks, method, steps, seed, timeout=1200)[0])
    lines = [
        "| attack | caught | steps to the ban | others banned | honest signals flagged | loss / clean |",
        "|---|---|---|---|---|---|",
    ]
    signals = (STAGES - 1) * 2 * REPLICAS * MICRO_BATCHES * steps
    for name in ("clean", *attacks):
        rows = [(result[name], result["clean"]) for result in results]
        bans = [dict(row["banned"]) for row, _ in rows]
        caught = [ban[GUILTY] - WARMUP + 1 for ban in bans if GUILTY in ban]
        others = sum(len(set(ban) - {GUILTY}) for ban in bans)
        honest = [sum(n for worker, n in row["flags"].items() if worker != GUILTY or name == "clean") for row, _ in rows]
        ratios = " ".join(f"{row['loss'] / clean['loss']:.3f}" for row, clean in rows)
        found = "" if name == "clean" else f"{len(caught)} of {seeds}"
        delay = f"{sum(caught) / len(caught):.1f}" if caught else ""
        lines.append(f"| {name} | {found} | {delay} | {others} | {sum(honest) / seeds / signals:.1%} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="sentinel", choices=["sentinel", "paper"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    chosen = parser.parse_args()
    # Ranks import this module by its name, so what they are to run must be found under it, not under __main__.
    from tests.distributed.campaign import table as print_me

    print(print_me(chosen.method, chosen.seeds, chosen.steps))
