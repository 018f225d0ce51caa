"""The Lightning strategy: :class:`SentinelStrategy`, and the parts that it is composed of."""

from lightning_sentinel.strategy.strategy import SentinelStrategy

__all__ = ["SentinelStrategy"]
