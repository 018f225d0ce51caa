"""The part of the strategy that knows when there is no pipeline to run: modules that take their optimizers' steps themselves."""

from __future__ import annotations

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.strategy.building import StageBuilding

__all__ = ["StepsByHand"]


class StepsByHand(StageBuilding):
    """Manual optimization: between processes a schedule runs the backward pass; with the only stage in this process a step does.

    Then steps are Lightning's own, on the whole batch, and checkpoints have the optimizers' states as torch gives them.
    """

    @property
    def _has_all(self) -> bool:
        """Whether this process has the only stage."""
        return self._virtual and self.mesh.stages == 1

    @property
    def _by_hand(self) -> bool:
        """Whether steps are Lightning's own, because the module takes its optimizers' steps itself, and there is no pipeline."""
        assert self.lightning_module is not None
        return self._has_all and not self.lightning_module.automatic_optimization

    def _refuse_shards(self) -> None:
        """Raise ``ConfigurationError`` if several optimizers' states would have to be cut up by name."""
        if self._sharded and self._by_hand:
            raise ConfigurationError(
                f"{type(self.lightning_module).__name__} uses manual optimization, and a sharded checkpoint has the state of one"
                " optimizer. Use SentinelStrategy(state_dict_type='full'): with stages=1 nothing is cut."
            )
