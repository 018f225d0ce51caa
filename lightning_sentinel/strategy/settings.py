"""The settings of a strategy: checked by type, readable as attributes, and in the plain form that goes into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning_sentinel.config import Response, Verification, is_whole
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.features import watched

__all__ = ["UNSIGNED", "StrategySettings", "differences"]

UNSIGNED = "unsigned"
"""The ``identity`` of workers that sign nothing."""

_VIRTUAL_MESH = Mesh(stages=2, replicas=4)
"""The defaults of ``stages`` and ``replicas`` on a virtual mesh."""


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
    identity: str | Path | None = None
    known_workers: str | Path | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_values()
        self._check_together()

    @property
    def virtual(self) -> bool:
        """Whether the whole mesh is in one process."""
        return self.engine == "virtual"

    @property
    def signs(self) -> bool:
        """Whether each process signs what it says."""
        return self.verification is not None and not self.virtual and self.identity != UNSIGNED

    @property
    def key_file(self) -> str | None:
        """The file of the key that each process keeps; ``None`` if it keeps none."""
        return None if self.identity is None or self.identity == UNSIGNED else str(self.identity)

    @property
    def sharded(self) -> bool:
        """Whether each stage writes its own part of a checkpoint."""
        return self.state_dict_type == "sharded"

    def mesh(self, world_size: int) -> Mesh:
        """The mesh that these settings make of a number of processes.

        Raises:
            ConfigurationError: if they make none.
        """
        if self.virtual:
            return Mesh(
                _VIRTUAL_MESH.stages if self.stages is None else self.stages,
                _VIRTUAL_MESH.replicas if self.replicas is None else self.replicas,
            )
        # With a ledger, some of the started ranks may be left out.
        mesh = Mesh.for_world if self.response.ledger is None else Mesh.largest
        return mesh(world_size, self.stages, self.replicas)

    @property
    def plain(self) -> dict[str, Any]:
        """The settings as a checkpoint keeps them, without the seed of verification, which no worker may know."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    def _check_values(self) -> None:
        """Raise ``ConfigurationError`` for a value that is none of those possible."""
        if self.engine not in ("process", "virtual"):
            raise ConfigurationError(f"engine={self.engine!r} is unknown. Use 'process' or 'virtual'.")
        if not is_whole(self.micro_batches, 1):
            raise ConfigurationError(
                f"micro_batches={self.micro_batches!r} cannot work: a batch is at least one micro-batch, and a whole number of"
                " them."
            )
        if not isinstance(self.partition, str) or (
            self.partition not in ("parameters", "uniform") and not self.partition.startswith("type:")
        ):
            raise ConfigurationError(
                f"partition={self.partition!r} is unknown. Use 'parameters', 'uniform', or 'type:REGEX' for a class name."
            )
        if self.transport not in ("auto", "device", "host"):
            raise ConfigurationError(f"transport={self.transport!r} is unknown. Use 'auto', 'device' or 'host'.")
        if self.state_dict_type not in ("full", "sharded"):
            raise ConfigurationError(f"state_dict_type={self.state_dict_type!r} is unknown. Use 'full' or 'sharded'.")

    def _check_together(self) -> None:
        """Raise ``ConfigurationError`` for settings that contradict each other."""
        if self.verification is not None:
            watched(self.verification)
        if self.response.aggregation != "mean" and self.engine == "virtual":
            raise ConfigurationError(
                f"Response(aggregation={self.response.aggregation!r}) needs engine='process': the virtual mesh computes the"
                " gradients of all replicas of a stage at once, so that there is nothing to aggregate. Use aggregation='mean'."
            )
        if self.zero_stage not in (0, 1):
            raise ConfigurationError(
                f"zero_stage={self.zero_stage} cannot be used with a pipeline: gradients and weights of a stage are needed whole."
                " Use zero_stage=1, which shards the optimizer's state, or 0."
            )
        if self.identity is not None and self.virtual:
            raise ConfigurationError(
                f"identity={str(self.identity)!r} needs engine='process': on a virtual mesh one process is all workers. Leave"
                " identity out."
            )
        if self.key_file is not None and self.verification is None:
            raise ConfigurationError(
                f"identity={str(self.identity)!r} signs what is verified, and verification=None verifies nothing. Leave identity"
                " out, or give verification=Verification()."
            )
        if self.known_workers is not None and self.key_file is None:
            raise ConfigurationError(
                f"known_workers={str(self.known_workers)!r} admits workers by their keys, and this one has none. Give it a key"
                " file: identity='worker.key' makes one, and `lightning-sentinel identity worker.key` prints its public key."
            )
        if self.zero_stage == 1 and self.engine == "virtual":
            raise ConfigurationError(
                "zero_stage=1 needs engine='process': on a virtual mesh all replicas of a stage share one optimizer state. Use"
                " zero_stage=0."
            )
        if self.zero_stage == 1 and self.verification is not None and self.response.ban_after is not None:
            raise ConfigurationError(
                f"zero_stage=1 contradicts Response(ban_after={self.response.ban_after}): a banned worker would take with it the"
                " optimizer state that only it has. Use zero_stage=0, or ban_after=None, or verification=None."
            )

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
        for name in ("identity", "known_workers"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, (str, Path)), name, value, "None or the path of a file")


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
