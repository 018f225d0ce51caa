"""The part of the strategy for manual optimization: the module steps its optimizers itself, and no pipeline runs."""

from __future__ import annotations

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.strategy.building import StageBuilding

__all__ = ["StepsByHand"]


class StepsByHand(StageBuilding):
    """Runs manual optimization, where this process has the only stage. Between processes the schedule runs the backward pass.

    With manual optimization steps run as in plain Lightning, on the whole batch, and checkpoints hold the optimizers' states in
    torch's format.
    """

    @property
    def _has_all(self) -> bool:
        """Whether this process has the only stage."""
        return self._virtual and self.mesh.stages == 1

    @property
    def _by_hand(self) -> bool:
        """Whether steps run as in plain Lightning, because the module steps its optimizers itself and there is no pipeline."""
        assert self.lightning_module is not None
        return self._has_all and not self.lightning_module.automatic_optimization

    def _refuse_shards(self) -> None:
        """Raise ``ConfigurationError`` if a sharded checkpoint would have to split the states of several optimizers by name."""
        if self._sharded and self._by_hand:
            raise ConfigurationError(
                f"{type(self.lightning_module).__name__} uses manual optimization, and a sharded checkpoint has the state of one"
                " optimizer. Use SentinelStrategy(state_dict_type='full'): with stages=1 nothing is cut."
            )
