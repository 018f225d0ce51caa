"""The adversary: which workers tamper with which signals, and when. It knows the mesh, but not the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import Attack, AttackContext
from lightning_sentinel.attacks.dealing import deal, malicious_workers, warn_of_majority
from lightning_sentinel.attacks.faults import OF_COMPUTATION, Site, site_of
from lightning_sentinel.attacks.products import Phase, Product, Products
from lightning_sentinel.attacks.registry import AttackSpec
from lightning_sentinel.attacks.returned import checked_result
from lightning_sentinel.attacks.stage_weights import replaced
from lightning_sentinel.attacks.wrappers import innermost, parts_of
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh, Worker

__all__ = ["Adversary", "Witness"]

_INSIDE = (Site.LAYER, Site.PRODUCT, Site.OWN_WEIGHTS)
"""Where a fault strikes before a signal is made."""

Witness = Callable[[Worker, str, int, int, Tensor, Tensor], None]
"""Takes the worker, what it made (``"activation"``, ``"gradient"`` or ``"weights"``, for the gradients of all its weights as one
vector), the step, the micro-batch's index, what it made, and what it should have."""


class Adversary:
    """Makes some workers of a mesh lie, in what they send or say. The same arguments give the same run, bit for bit.

    Args:
        attacks: what the workers do: a name, a mapping of ``name`` and parameters, a callable, or a sequence of these,
            of which each malicious worker then draws one; ``several`` is an attack that does more than one thing.
        mesh: the mesh that is attacked.
        workers: the malicious workers. Give either these or ``fraction``.
        fraction: share of malicious workers, between 0 and 1. In every middle stage ``round(fraction * replicas)``
            workers, at least one, are drawn. The first and last stage stay honest, as in SENTINEL (arXiv 2603.03592).
        start_step: first step that is tampered with.
        direction: which of the signals of a malicious worker are tampered with, and of which signals its rows, notes,
            commitments and votes are false.
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
        self._workers = malicious_workers(mesh, workers, fraction, seed)
        self._attacks = deal(attacks, self._workers, seed)
        self._start_step = start_step
        self._directions = frozenset(Direction if direction == "both" else (Direction(direction),))
        self._seed = seed
        self.witness: Witness | None = None
        """Told what a malicious worker made and what an honest one would have, in the virtual mesh: the ground truth of faults."""
        self._products: dict[tuple[Worker, int], Products] = {}
        """The products of micro-batches that are between their forward and their backward pass."""
        self._parts = {worker: parts_of(attack) for worker, attack in self._attacks.items()}
        warn_of_majority(mesh, self._workers)

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
        if not self._watches(worker, direction):
            return signal
        active = self.tampers(worker, direction, step)
        sent = signal
        for attack in self._at(worker, Site.MESSAGE):
            observe = getattr(attack, "observe", None)
            if not active and observe is None:
                continue
            context = self._context(worker, direction, step, micro_batch, signal, received)
            with torch.no_grad():
                if active:
                    sent = checked_result(attack, sent.detach(), context)
                elif observe is not None:
                    observe(signal.detach(), context)
        return sent

    def fails(self, worker: Worker, step: int) -> Site | None:
        """Where a worker's computation is faulty in a step; ``None`` if it is not, even if the worker sends another signal."""
        if step < self._start_step:
            return None
        return next((site for site in OF_COMPUTATION if self._at(worker, site)), None)

    def computes_wrongly(self, worker: Worker, step: int) -> bool:
        """Whether a worker's computation is faulty in a step in a way that its signals may show."""
        return self.fails(worker, step) in _INSIDE

    @property
    def corrupts_weight_gradients(self) -> bool:
        """Whether any worker adds wrong weight gradients in some step: by an attack on these, or by a faulty computation."""
        return any(self.liars(site) for site in OF_COMPUTATION)

    def require_fit(self, stage: int, parameters: Sequence[Tensor]) -> None:
        """Raises ``ConfigurationError`` if an attack on ``stage`` was made for other parameters than its trained ones."""
        for worker in sorted(self._workers):
            for attack in self._parts[worker] if worker.stage == stage else ():
                if (require_fit := getattr(innermost(attack), "require_fit", None)) is not None:
                    require_fit(stage, parameters)

    def layer_output(self, output: Tensor, worker: Worker, step: int, micro_batch: int) -> Tensor:
        """The tensor that a layer of ``worker`` returns for ``output``, in the same graph; its gradient may be hit as well."""
        if step < self._start_step:
            return output
        for attack in self._at(worker, Site.LAYER):
            output = self._faulty(attack, output, worker, step, micro_batch)
        return output

    def _faulty(self, attack: Attack, output: Tensor, worker: Worker, step: int, micro_batch: int) -> Tensor:
        if Direction.ACTIVATION in self._directions:
            output = checked_result(attack, output, self._context(worker, Direction.ACTIVATION, step, micro_batch, output))
        if Direction.GRADIENT in self._directions and output.requires_grad:

            def wrong(gradient: Tensor) -> Tensor:
                return checked_result(attack, gradient, self._context(worker, Direction.GRADIENT, step, micro_batch, gradient))

            output.register_hook(wrong)
        return output

    @contextmanager
    def computing(
        self, worker: Worker, step: int, micro_batch: int, backward: bool, parameters: Sequence[Tensor] = ()
    ) -> Iterator[None]:
        """A context for a pass of ``worker`` through its layers, with other weights or with wrong results of matrix products.

        The forward pass of a micro-batch comes before its backward pass; others may come in between.

        Args:
            parameters: the trained parameters of its layers.
        """
        own = self.own_weights(worker, step, parameters)
        with replaced(parameters if own else (), own), self._multiplying(worker, step, micro_batch, backward):
            yield

    def own_weights(self, worker: Worker, step: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The weights that a worker computes with in place of its stage's ``parameters``; none if it computes with these."""
        attacks = self._at(worker, Site.OWN_WEIGHTS) if step >= self._start_step else []
        own = []
        for number, parameter in enumerate(parameters if attacks else ()):
            weight = parameter.detach()
            for attack in attacks:
                context = self._context(worker, Direction.ACTIVATION, step, 0, weight, parameter=number)
                weight = checked_result(attack, weight, context)
            own.append(weight)
        return own

    def _multiplying(self, worker: Worker, step: int, micro_batch: int, backward: bool) -> AbstractContextManager[None]:
        """A context for a pass of ``worker`` through its layers, in which results of matrix products may be wrong."""
        attacks = self._at(worker, Site.PRODUCT) if step >= self._start_step else []
        if not attacks:
            return nullcontext()
        products = self._products.pop((worker, micro_batch), Products()) if backward else Products()
        if not backward:
            self._products[worker, micro_batch] = products

        def wrong(result: Tensor, product: Product) -> Tensor:
            direction = Direction.ACTIVATION if product.phase is Phase.FORWARD else Direction.GRADIENT
            if direction not in self._directions:
                return result
            for attack in attacks:
                context = self._context(worker, direction, step, micro_batch, result, product=product)
                result = checked_result(attack, result, context)
            return result

        return products.seen(wrong, backward)

    def weight_gradient(self, gradient: Tensor, worker: Worker, step: int, micro_batch: int, parameter: int) -> Tensor:
        """The tensor that ``worker`` adds to the gradient of one of its stage's weights in place of ``gradient``.

        Args:
            parameter: which of the stage's trained parameters it belongs to.
        """
        if step < self._start_step:
            return gradient
        for attack in self._at(worker, Site.WEIGHTS):
            context = self._context(worker, Direction.GRADIENT, step, micro_batch, gradient, parameter=parameter)
            gradient = checked_result(attack, gradient, context)
        return gradient

    def row(
        self, row: Tensor, usual: Tensor, receiver: Worker, sender: Worker, direction: Direction, step: int, micro_batch: int
    ) -> Tensor:
        """The row that ``receiver`` reports of a signal of ``sender``.

        Args:
            row: the honest one, ``(F + 1,)``: the features, and last whether the signal was tainted.
            usual: ``(F + 1,)``, the row that is usual at this boundary.
        """
        return self._said(Site.ROWS, row, receiver, sender, direction, step, micro_batch, usual)

    def note(self, values: Tensor, maker: Worker, neighbour: Worker, direction: Direction, step: int, micro_batch: int) -> Tensor:
        """The note that ``maker`` sends on a signal to ``neighbour``: the projection ``values`` on secret directions, or a lie."""
        return self._said(Site.NOTES, values, maker, neighbour, direction, step, micro_batch)

    def commitment(
        self, signal: Tensor, worker: Worker, neighbour: Worker, direction: Direction, step: int, micro_batch: int
    ) -> Tensor:
        """The signal that ``worker`` says to all that it sent to ``neighbour``, or received from it, where that was ``signal``."""
        return self._said(Site.COMMITMENTS, signal, worker, neighbour, direction, step, micro_batch)

    def vote(self, word: int, juror: Worker, audited: Worker, direction: Direction, step: int) -> int:
        """The vote of ``juror`` on what ``audited`` sent or said, for which it found ``word``: 0 if it matches, 1 if it does not.

        The process engine asks on the rank of ``juror``.
        """
        return int(self._said(Site.VOTES, torch.tensor(float(word)), juror, audited, direction, step, 0))

    def liars(self, site: Site) -> frozenset[Worker]:
        """The workers whose attack strikes there."""
        return frozenset(worker for worker in self._workers if self._at(worker, site))

    def _said(
        self,
        site: Site,
        honest: Tensor,
        worker: Worker,
        about: Worker,
        direction: Direction,
        step: int,
        micro_batch: int,
        received: Tensor | None = None,
    ) -> Tensor:
        """What ``worker`` says of ``about`` in place of what is true."""
        said = honest
        if not self.tampers(worker, direction, step):
            return said
        for attack in self._at(worker, site):
            context = self._context(worker, direction, step, micro_batch, said, received)
            said = checked_result(attack, said, replace(context, about=about, allies=self._workers))
        return said

    def _context(
        self,
        worker: Worker,
        direction: Direction,
        step: int,
        micro_batch: int,
        signal: Tensor,
        received: Tensor | None = None,
        **place: Any,
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
            **place,
        )

    def _at(self, worker: Worker, site: Site) -> list[Attack]:
        """The parts of a worker's attack that strike there; none if it is honest."""
        return [attack for attack in self._parts.get(worker, ()) if site_of(attack) is site]

    def _watches(self, worker: Worker, direction: Direction) -> bool:
        return worker in self._workers and direction in self._directions
