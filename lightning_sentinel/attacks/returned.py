"""What an attack may return: a new tensor like the honest one."""

from __future__ import annotations

from torch import Tensor

from lightning_sentinel.attacks.context import Attack, AttackContext
from lightning_sentinel.errors import ConfigurationError

__all__ = ["checked_result"]


def checked_result(attack: Attack, honest: Tensor, context: AttackContext) -> Tensor:
    """What ``attack`` makes of ``honest``.

    Raises:
        ConfigurationError: if it returns anything but a tensor of the same shape, dtype and device, or changes ``honest`` in place.

    Example:
        >>> import torch
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> checked_result(lambda signal, context: -signal, torch.ones(2), context)
        tensor([-1., -1.])
    """
    before = _version(honest)
    sent = attack(honest, context)
    _check(sent, honest, attack, context, changed=_version(honest) != before)
    return sent


def _version(signal: Tensor) -> int:
    # Tensors made in inference mode count no versions.
    return 0 if signal.is_inference() else signal._version


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
