"""The adversary: which workers tamper with which signals, and when. It knows the mesh, but not the engine that runs it."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import Attack, AttackContext
from lightning_sentinel.attacks.faults import Site, site_of
from lightning_sentinel.attacks.registry import LIBRARY, AttackSpec, resolve
from lightning_sentinel.attacks.wrappers import Wrapper
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.seeds import derive_seed

__all__ = ["Adversary"]


class Adversary:
    """Makes some workers of a mesh tamper with what they send. The same arguments give the same run, bit for bit.

    Args:
        attacks: what the workers do: a name, a mapping of ``name`` and parameters, a callable, or a sequence of these,
            of which each malicious worker then draws one.
        mesh: the mesh that is attacked.
        workers: the malicious workers. Give either these or ``fraction``.
        fraction: share of malicious workers, between 0 and 1. In every middle stage ``round(fraction * replicas)``
            workers, at least one, are drawn. The first and last stage stay honest, as in SENTINEL (arXiv 2603.03592).
        start_step: first step that is tampered with.
        direction: which of the signals of a malicious worker are tampered with.
        seed: seed of all draws: of the workers, of their attacks and of the randomness in these.

    Raises:
        ConfigurationError: if not exactly one of ``workers`` and ``fraction`` is given, or one of the arguments fits
            neither the mesh nor its range.

    Warns:
        UserWarning: if more than half the workers of a stage are malicious.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Mesh, Worker
        >>> liar = Worker(stage=1, replica=0)
        >>> adversary = attacks.Adversary("scale", Mesh(stages=3, replicas=4), workers=[liar], start_step=10)
        >>> for step in (9, 10):
        ...     print(adversary.tamper(torch.ones(2), liar, Direction.GRADIENT, step, micro_batch=0))
        tensor([1., 1.])
        tensor([-1., -1.])
    """

    def __init__(
        self,
        attacks: AttackSpec | Sequence[AttackSpec],
        mesh: Mesh,
        workers: Collection[Worker] | None = None,
        fraction: float | None = None,
        start_step: int = 0,
        direction: Literal["activation", "gradient", "both"] = "both",
        seed: int = 0,
    ) -> None:
        if start_step < 0:
            raise ConfigurationError(f"start_step={start_step!r} cannot work: steps count from 0.")
        if direction not in ("activation", "gradient", "both"):
            raise ConfigurationError(f"direction={direction!r} cannot work: it must be 'activation', 'gradient' or 'both'.")
        self._workers = _malicious_workers(mesh, workers, fraction, seed)
        self._attacks = _deal(attacks, self._workers, seed)
        self._start_step = start_step
        self._directions = frozenset(Direction if direction == "both" else (Direction(direction),))
        self._seed = seed
        self.votes: Callable[[Worker, Worker, int], int] | None = None
        """How malicious workers vote on signals that they were asked to recompute; ``None``: honestly."""
        self.notes: Callable[[Worker, Tensor], Tensor] | None = None
        """The notes that malicious workers send with their signals; ``None``: honest ones."""
        _warn_of_majority(mesh, self._workers)

    @property
    def workers(self) -> frozenset[Worker]:
        """The malicious workers: the ground truth that detection is measured against."""
        return self._workers

    @property
    def start_step(self) -> int:
        """The first step that is tampered with."""
        return self._start_step

    def attack_of(self, worker: Worker) -> Attack:
        """The attack that ``worker`` carries out. Raises ``ConfigurationError`` if ``worker`` is honest."""
        if worker not in self._attacks:
            liars = ", ".join(map(str, sorted(self._workers))) or "none"
            raise ConfigurationError(f"{worker} is honest and has no attack. Malicious workers: {liars}.")
        return self._attacks[worker]

    def tampers(self, worker: Worker, direction: Direction, step: int) -> bool:
        """Whether the attack decides what ``worker`` sends in this direction and step; it may send the honest signal."""
        return step >= self._start_step and self._watches(worker, direction)

    def tamper(
        self,
        signal: Tensor,
        worker: Worker,
        direction: Direction,
        step: int,
        micro_batch: int,
        received: Tensor | None = None,
    ) -> Tensor:
        """The signal that ``worker`` sends in place of ``signal``.

        Args:
            signal: the honest signal, of any shape.
            worker: the sender.
            direction: whether the signal is an activation or a gradient.
            step: the optimizer step.
            micro_batch: index of the micro-batch within the step.
            received: the signal that the worker itself received in this direction, if any.

        Returns:
            ``signal`` itself if the worker does not tamper with it, else a tensor of the same shape, dtype and device
            without a graph.

        Raises:
            ConfigurationError: if an attack returns anything else, or changes the honest signal in place.
        """
        if not self._watches(worker, direction) or site_of(self._attacks[worker]) is not Site.MESSAGE:
            return signal
        attack = self._attacks[worker]
        observe = getattr(attack, "observe", None)
        active = self.tampers(worker, direction, step)
        if not active and observe is None:
            return signal
        context = self._context(worker, direction, step, micro_batch, signal, received)
        honest = signal.detach()
        with torch.no_grad():
            if observe is not None and not active:
                observe(honest, context)
                return signal
            return _checked_result(attack, honest, context)

    def fails(self, worker: Worker, step: int) -> Site | None:
        """Where a worker's computation is faulty in a step; ``None`` if it is not, even if the worker sends another signal."""
        if worker not in self._workers or step < self._start_step:
            return None
        site = site_of(self._attacks[worker])
        return None if site is Site.MESSAGE else site

    @property
    def corrupts_weight_gradients(self) -> bool:
        """Whether the attack of any worker is on weight gradients, in some step or other."""
        return any(site_of(attack) is Site.WEIGHTS for attack in self._attacks.values())

    def layer_output(self, output: Tensor, worker: Worker, step: int, micro_batch: int) -> Tensor:
        """The tensor that a layer of ``worker`` returns for ``output``, in the same graph; its gradient may be hit as well."""
        if self.fails(worker, step) is not Site.LAYER:
            return output
        attack = self._attacks[worker]
        if Direction.ACTIVATION in self._directions:
            output = _checked_result(attack, output, self._context(worker, Direction.ACTIVATION, step, micro_batch, output))
        if Direction.GRADIENT in self._directions and output.requires_grad:

            def wrong(gradient: Tensor) -> Tensor:
                return _checked_result(attack, gradient, self._context(worker, Direction.GRADIENT, step, micro_batch, gradient))

            output.register_hook(wrong)
        return output

    def weight_gradient(self, gradient: Tensor, worker: Worker, step: int, micro_batch: int) -> Tensor:
        """The tensor that ``worker`` adds to the gradient of one of its stage's weights in place of ``gradient``."""
        if self.fails(worker, step) is not Site.WEIGHTS:
            return gradient
        context = self._context(worker, Direction.GRADIENT, step, micro_batch, gradient)
        return _checked_result(self._attacks[worker], gradient, context)

    def _context(
        self, worker: Worker, direction: Direction, step: int, micro_batch: int, signal: Tensor, received: Tensor | None = None
    ) -> AttackContext:
        return AttackContext.seeded(
            self._seed,
            worker,
            direction,
            step=step,
            micro_batch=micro_batch,
            received=None if received is None else received.detach(),
            device=signal.device,
            start_step=self._start_step,
        )

    def vote(self, juror: Worker, audited: Worker, word: int) -> int:
        """The vote of ``juror`` on a signal of ``audited`` for which it found ``word``: 0 if it matches, 1 if it does not.

        A malicious juror votes as :attr:`votes` says, if set. The process engine asks on the rank of ``juror``.
        """
        return word if self.votes is None or juror not in self._workers else self.votes(juror, audited, word)

    def note(self, worker: Worker, values: Tensor, step: int) -> Tensor:
        """The note that ``worker`` sends with a signal: its projection on secret directions, ``values``, or a lie."""
        if self.notes is None or worker not in self._workers or step < self._start_step:
            return values
        return self.notes(worker, values)

    def _watches(self, worker: Worker, direction: Direction) -> bool:
        return worker in self._workers and direction in self._directions


def _malicious_workers(mesh: Mesh, workers: Collection[Worker] | None, fraction: float | None, seed: int) -> frozenset[Worker]:
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


def _deal(attacks: AttackSpec | Sequence[AttackSpec], workers: Collection[Worker], seed: int) -> dict[Worker, Attack]:
    """Gives each worker one of ``attacks``, with a state of its own."""
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
    return replace(attack, attack=_own(attack.inner)) if isinstance(attack, Wrapper) else copy.deepcopy(attack)


def _warn_of_majority(mesh: Mesh, workers: Collection[Worker]) -> None:
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


def _version(signal: Tensor) -> int:
    # Tensors made in inference mode count no versions.
    return 0 if signal.is_inference() else signal._version


def _checked_result(attack: Attack, honest: Tensor, context: AttackContext) -> Tensor:
    before = _version(honest)
    sent = attack(honest, context)
    _check(sent, honest, attack, context, changed=_version(honest) != before)
    return sent


def _check(sent: object, honest: Tensor, attack: Attack, context: AttackContext, changed: bool) -> None:
    name = getattr(attack, "__name__", repr(attack))
    if changed:
        raise ConfigurationError(
            f"The attack {name} of {context.worker} changed the honest {context.direction} in place, which the worker"
            " itself still needs. Return a new tensor: start from signal.clone()."
        )
    if not isinstance(sent, Tensor):
        got = f"an object of type {type(sent).__name__}"
    elif (sent.shape, sent.dtype, sent.device) != (honest.shape, honest.dtype, honest.device):
        got = _describe(sent)
    else:
        return
    raise ConfigurationError(
        f"The attack {name} of {context.worker} returned {got} in place of a {context.direction} which is"
        f" {_describe(honest)}: the receiver expects just that. Return a tensor like the signal."
    )


def _describe(tensor: Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} on {tensor.device}"
