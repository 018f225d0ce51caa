"""Which workers are malicious, and which attack each of them carries out."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from lightning_sentinel.attacks.context import Attack
from lightning_sentinel.attacks.registry import LIBRARY, AttackSpec, resolve
from lightning_sentinel.attacks.wrappers import Several, Wrapper, parts_of
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.seeds import derive_seed

__all__ = ["dealt", "malicious_workers", "warn_of_majority"]


def malicious_workers(mesh: Mesh, workers: Collection[Worker] | None, fraction: float | None, seed: int) -> frozenset[Worker]:
    """Those that are named, or in every middle stage a fraction, at least one, that is drawn.

    Raises:
        ConfigurationError: if not exactly one of ``workers`` and ``fraction`` is given, or it does not fit the mesh.
    """
    if (workers is None) == (fraction is None):
        given = "neither is given" if workers is None else f"both are given (fraction={fraction!r})"
        raise ConfigurationError(
            f"Malicious workers are named by workers or drawn by fraction, and {given}. Give exactly one of them."
        )
    if workers is not None:
        return frozenset(_checked(worker, mesh) for worker in workers)
    assert fraction is not None
    if not 0 < fraction < 1:
        raise ConfigurationError(f"fraction={fraction!r} cannot work: it must be between 0 and 1, both excluded.")
    if mesh.stages < 3:
        raise ConfigurationError(
            f"fraction={fraction!r} draws from the middle stages, as first and last are trusted, and a mesh of"
            f" {mesh.stages} stages has none. Name the workers instead: workers=[Worker(stage=0, replica=0)]."
        )
    count = max(1, round(fraction * mesh.replicas))
    return frozenset(
        Worker(stage, replica)
        for stage in range(1, mesh.stages - 1)
        for replica in random.Random(derive_seed(seed, "workers", stage)).sample(range(mesh.replicas), count)
    )


def _checked(worker: Worker, mesh: Mesh) -> Worker:
    if not isinstance(worker, Worker):
        raise ConfigurationError(f"workers holds {worker!r}, which is no worker. Write Worker(stage=1, replica=0).")
    mesh.rank(worker)
    return worker


def dealt(attacks: AttackSpec | Sequence[AttackSpec], workers: Collection[Worker], seed: int) -> dict[Worker, Attack]:
    """One of ``attacks`` for each worker, with a state of its own."""
    specs = attacks if isinstance(attacks, Sequence) and not isinstance(attacks, str) else [attacks]
    choices = [resolve(spec) for spec in specs]
    if not choices:
        raise ConfigurationError(f"attacks={attacks!r} holds no attack. Give at least one, for instance 'zeros'.")
    return {
        worker: _own(random.Random(derive_seed(seed, "attack", worker.stage, worker.replica)).choice(choices)) for worker in workers
    }


def _own(attack: Attack) -> Attack:
    # A callable of the user's may hold anything (a model, an open file), so only attacks of the library are copied.
    if type(attack) not in LIBRARY.values():
        return attack
    if isinstance(attack, Several):
        return Several([_own(part) for part in parts_of(attack)])
    return replace(attack, attack=_own(attack.inner)) if isinstance(attack, Wrapper) else copy.deepcopy(attack)


def warn_of_majority(mesh: Mesh, workers: Collection[Worker]) -> None:
    """Warns where more than half of a stage are malicious."""
    counts = Counter(worker.stage for worker in workers)
    lost = [
        f"stage {stage} ({count} of {mesh.replicas} replicas)"
        for stage, count in sorted(counts.items())
        if 2 * count > mesh.replicas
    ]
    if lost:
        warnings.warn(
            f"More than half the workers are malicious in {', '.join(lost)}. Detection assumes that fewer than half of"
            " a stage's workers are: here it may blame the honest ones. Attack fewer workers or add replicas.",
            UserWarning,
            stacklevel=3,
        )
