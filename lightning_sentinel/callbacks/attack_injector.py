"""A callback that turns chosen workers into adversaries, to test how a run stands up to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from typing_extensions import override

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Worker

__all__ = ["AttackInjector"]


class AttackInjector(L.Callback):
    """Makes chosen workers tamper with what they send. The verifiers are not told.

    Args:
        attacks: what to do: a name from :func:`lightning_sentinel.attacks.available`, a mapping such as
            ``{"name": "scale", "factor": -1.0}``, a callable ``(signal, context) -> tensor``, or a list of those, of which each
            malicious worker draws one.
        workers: the malicious workers, or pairs ``(stage, replica)``.
        fraction: instead of ``workers``, the fraction of each middle stage's workers that is drawn to be malicious.
        start_step: the training batch at which the attacks begin; ``None`` is the end of the verifiers' warm-up.
        direction: tamper with ``"activation"``, ``"gradient"`` or ``"both"``.
        seed: seed of all random draws.

    Raises:
        ConfigurationError: at the start of the run, if the attack is unknown, or a worker is not in the mesh.

    Example:
        >>> import lightning_sentinel as ls
        >>> injector = ls.AttackInjector("zeros", workers=[ls.Worker(stage=1, replica=0)], start_step=60)
        >>> injector.workers
        frozenset({Worker(stage=1, replica=0)})
    """

    def __init__(
        self,
        attacks: Any,
        workers: Sequence[Worker | tuple[int, int]] | None = None,
        fraction: float | None = None,
        start_step: int | None = None,
        direction: Literal["activation", "gradient", "both"] = "both",
        seed: int = 0,
    ) -> None:
        self._attacks = attacks
        self._named = None if workers is None else [Worker.of(worker, "AttackInjector(workers=...)") for worker in workers]
        self._fraction = fraction
        self._start_step = start_step
        self._direction = direction
        self._seed = seed
        self._adversary: Adversary | None = None

    @property
    def workers(self) -> frozenset[Worker]:
        """The malicious workers: the ground truth. Drawn workers are known from the start of the run."""
        if self._adversary is not None:
            return self._adversary.workers
        return frozenset(self._named or ())

    @property
    def start_step(self) -> int | None:
        """The training batch at which the attacks begin."""
        return self._start_step if self._adversary is None else self._adversary.start_step

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        from lightning_sentinel.strategy import SentinelStrategy

        strategy = trainer.strategy
        if not isinstance(strategy, SentinelStrategy):
            raise ConfigurationError(
                f"AttackInjector needs a pipeline to attack, but the Trainer uses {type(strategy).__name__}. Use"
                " Trainer(strategy='sentinel')."
            )
        if self._adversary is None:
            warmup = strategy.verification.warmup_steps if strategy.verification is not None else 0
            self._adversary = Adversary(
                self._attacks,
                strategy.mesh,
                workers=self._named,
                fraction=self._fraction,
                start_step=warmup if self._start_step is None else self._start_step,
                direction=self._direction,
                seed=self._seed,
            )
        strategy.adversary = self._adversary
