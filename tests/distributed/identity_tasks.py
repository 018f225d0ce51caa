"""Runs of workers that have keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError, MeshExhaustedError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.verification.bans import Ban, enter_bans
from tests.distributed import tasks


def attempts(folder: str) -> dict[str, Any]:
    """What comes of runs with other keys and lists, by name: keys and bans, or the error."""
    place = Path(folder)
    rank = int(os.environ["LOCAL_RANK"])
    own = place / "{rank}.key"
    found = {
        "known": attempt(identity=own, known_workers=place / "known"),
        "one of them": attempt(identity=own, known_workers=place / "one of them"),
        "shared": attempt(identity=place / "shared.key"),
        "one without": attempt(identity=own if rank == 0 else None),
    }
    if rank == 0:
        key = str(Identity.kept(place / "1.key").public)
        enter_bans(place / "ledger.json", [Ban(Worker(2, 3), 7, host="elsewhere", hosts=1, mesh=Mesh(3, 4), key=key)])
    found["banned"] = attempt(identity=own, response=ls.Response(ledger=place / "ledger.json"))
    return found


def attempt(**settings: Any) -> Any:
    strategy = ls.SentinelStrategy(2, 1, micro_batches=2, timeout=tasks.PATIENCE, **settings)
    try:
        trainer = tasks.trainer(strategy, 2, 2)
        trainer.fit(tasks.Classifier(), tasks.loader(4))
    except (ConfigurationError, MeshExhaustedError) as error:
        return str(error)
    ledger = strategy.ledger
    return {"keys": list(ledger.keys.values()), "banned": [list(worker) for worker in sorted(ledger.banned)]}
