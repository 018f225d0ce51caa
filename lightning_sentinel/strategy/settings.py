"""The settings of a strategy: checked by type, readable as attributes, and in the plain form that goes into a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.strategies import ParallelStrategy

from lightning_sentinel.config import Response, Verification, is_whole
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.strategy.refusals import check_settings

__all__ = ["ReadableSettings", "StrategySettings", "differences"]

_OTHER = "pytorch_lightning"


@dataclass(frozen=True)
class StrategySettings:
    """The settings of a strategy; :class:`SentinelStrategy` says what each argument means.

    Raises:
        ConfigurationError: if the settings cannot work.
    """

    stages: int | None
    replicas: int | None
    micro_batches: int
    verification: Verification | None
    response: Response
    partition: str
    engine: Literal["process", "virtual"]
    sequential: str | None
    zero_stage: int
    activation_checkpointing: bool
    transport: Literal["auto", "device", "host"]
    state_dict_type: Literal["full", "sharded"]
    timeout: timedelta

    def __post_init__(self) -> None:
        self._check_kinds()
        check_settings(
            self.engine,
            self.micro_batches,
            self.partition,
            self.transport,
            self.zero_stage,
            self.verification,
            self.response,
            self.state_dict_type,
        )

    @property
    def plain(self) -> dict[str, Any]:
        """The settings as a checkpoint keeps them, without the seed of verification, which no worker may know."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    def _check_kinds(self) -> None:
        """Raise ``ConfigurationError`` for an argument of the wrong type, or out of range."""
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


class ReadableSettings(ParallelStrategy):
    """The settings of a strategy as attributes that cannot be set, because decisions were made by them already."""

    _settings: StrategySettings

    @property
    def stages(self) -> int | None:
        """The argument as given; ``strategy.mesh.stages`` is the number in use, also if none was given."""
        return self._settings.stages

    @property
    def replicas(self) -> int | None:
        """The argument as given; ``strategy.mesh.replicas`` is the number in use, also if none was given."""
        return self._settings.replicas

    @property
    def micro_batches(self) -> int:
        return self._settings.micro_batches

    @property
    def verification(self) -> Verification | None:
        return self._settings.verification

    @property
    def response(self) -> Response:
        return self._settings.response

    @property
    def partition(self) -> str:
        return self._settings.partition

    @property
    def engine(self) -> Literal["process", "virtual"]:
        return self._settings.engine

    @property
    def sequential(self) -> str | None:
        return self._settings.sequential

    @property
    def zero_stage(self) -> int:
        return self._settings.zero_stage

    @property
    def activation_checkpointing(self) -> bool:
        return self._settings.activation_checkpointing

    @property
    def transport(self) -> Literal["auto", "device", "host"]:
        return self._settings.transport

    @property
    def state_dict_type(self) -> Literal["full", "sharded"]:
        return self._settings.state_dict_type

    @property
    def timeout(self) -> timedelta:
        return self._settings.timeout

    @property
    def _virtual(self) -> bool:
        return self._settings.engine == "virtual"

    @property
    def _sharded(self) -> bool:
        return self._settings.state_dict_type == "sharded"

    def __repr__(self) -> str:
        settings = ", ".join(f"{one.name}={getattr(self._settings, one.name)!r}" for one in fields(self._settings))
        shown = f"{type(self).__name__}({settings})"
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
    """How to write what the user may have meant."""
    if isinstance(value, Mapping):
        return f"Write {name}={kind.__name__}({', '.join(f'{key}={one!r}' for key, one in value.items())})."
    if value in ("sentinel", "paper") and kind is Verification:
        return f"Write verification=Verification(method={value!r})."
    if value in ("exclude", "log") and kind is Response:
        return f"Write response=Response(on_flag={value!r}{', ban_after=None' if value == 'log' else ''})."
    off = " None turns verification off." if kind is Verification else ""
    return f"Write {name}={kind.__name__}(...), or leave it out for the default.{off}"
