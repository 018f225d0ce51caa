"""What a strategy is made with: checked by kind, to be read later, and what of it goes into a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.strategies import ParallelStrategy

from lightning_sentinel.config import Response, Verification, is_whole
from lightning_sentinel.errors import ConfigurationError

__all__ = ["ReadableSettings", "differences"]

_OTHER = "pytorch_lightning"
_NAMES = (
    "stages",
    "replicas",
    "micro_batches",
    "verification",
    "response",
    "partition",
    "engine",
    "sequential",
    "zero_stage",
    "activation_checkpointing",
    "transport",
    "state_dict_type",
    "timeout",
)


class ReadableSettings(ParallelStrategy):
    """The arguments of a strategy as attributes that cannot be set: what was decided by them has been decided."""

    _stages: int | None
    _replicas: int | None
    _micro_batches: int
    _verification: Verification | None
    _response: Response
    _partition: str
    _virtual: bool
    _sequential: str | None
    _zero_stage: int
    _activation_checkpointing: bool
    _transport: Literal["auto", "device", "host"]
    _sharded: bool
    _timeout: timedelta

    @property
    def stages(self) -> int | None:
        """As they were given; ``strategy.mesh.stages`` is what follows if they were not."""
        return self._stages

    @property
    def replicas(self) -> int | None:
        """As they were given; ``strategy.mesh.replicas`` is what follows if they were not."""
        return self._replicas

    @property
    def micro_batches(self) -> int:
        return self._micro_batches

    @property
    def verification(self) -> Verification | None:
        return self._verification

    @property
    def response(self) -> Response:
        return self._response

    @property
    def partition(self) -> str:
        return self._partition

    @property
    def engine(self) -> Literal["process", "virtual"]:
        return "virtual" if self._virtual else "process"

    @property
    def sequential(self) -> str | None:
        return self._sequential

    @property
    def zero_stage(self) -> int:
        return self._zero_stage

    @property
    def activation_checkpointing(self) -> bool:
        return self._activation_checkpointing

    @property
    def transport(self) -> Literal["auto", "device", "host"]:
        return self._transport

    @property
    def state_dict_type(self) -> Literal["full", "sharded"]:
        return "sharded" if self._sharded else "full"

    @property
    def timeout(self) -> timedelta:
        return self._timeout

    @property
    def plain_settings(self) -> dict[str, Any]:
        """The settings as a checkpoint keeps them, without the seed of the directions that no worker may know."""
        return {name: _plain(getattr(self, name)) for name in _NAMES}

    def check_kinds(self) -> None:
        """Raise ``ConfigurationError`` for an argument of another kind than it has to be."""
        for name, kind in (("verification", Verification), ("response", Response)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or kind is Response):
                raise ConfigurationError(f"{name}={value!r} is no {kind.__name__}. {_remedy(name, kind, value)}")
        timeout = self.timeout
        if not isinstance(timeout, timedelta) or timeout <= timedelta():
            seconds = timeout if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and timeout > 0 else 300
            raise ConfigurationError(
                f"timeout={timeout!r} cannot work: it must be a datetime.timedelta above zero. Write timedelta(seconds={seconds})."
            )
        for name in ("stages", "replicas"):
            value = getattr(self, name)
            _require(value is None or is_whole(value, 1), name, value, "None or a whole number, at least 1")
        _require(is_whole(self.zero_stage), "zero_stage", self.zero_stage, "0 or 1")
        checkpointing = self.activation_checkpointing
        _require(isinstance(checkpointing, bool), "activation_checkpointing", checkpointing, "True or False")
        named = self.sequential is None or isinstance(self.sequential, str)
        _require(named, "sequential", self.sequential, "None or the name of an attribute")

    def __repr__(self) -> str:
        shown = f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in _NAMES)})"
        # `pytorch_lightning` shows this where it refuses a strategy that is not its own.
        return f"{shown}, for the package `lightning` and not for `pytorch_lightning`" if _OTHER in sys.modules else shown


def _plain(value: Any) -> Any:
    if isinstance(value, (Verification, Response)):
        settings = {name: _plain(one) for name, one in asdict(value).items()}
        settings.pop("seed", None)
        return settings
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def differences(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """What has changed between two plain forms of a :class:`Verification` or a :class:`Response`.

    Example:
        >>> differences({"window": 512, "method": "paper"}, {"window": 64, "method": "paper"})
        ['window=512 is now 64']
    """
    if before is None or now is None:
        was = "nothing was verified" if before is None else "signals were verified"
        return [] if before is now else [f"{was} before"]
    return [f"{name}={before[name]!r} is now {now[name]!r}" for name in before if name in now and before[name] != now[name]]


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigurationError(f"{name}={value!r} cannot work: it must be {rule}.")


def _remedy(name: str, kind: type, value: object) -> str:
    """How the user may have meant it."""
    if isinstance(value, Mapping):
        return f"Write {name}={kind.__name__}({', '.join(f'{key}={one!r}' for key, one in value.items())})."
    if value in ("sentinel", "paper") and kind is Verification:
        return f"Write verification=Verification(method={value!r})."
    if value in ("exclude", "log") and kind is Response:
        return f"Write response=Response(on_flag={value!r}{', ban_after=None' if value == 'log' else ''})."
    off = " None turns verification off." if kind is Verification else ""
    return f"Write {name}={kind.__name__}(...), or leave it out for the default.{off}"
