"""Lightning's side: :class:`SentinelStrategy`, and its parts by what they are about."""

from lightning_sentinel.strategy.strategy import SentinelStrategy

__all__ = ["SentinelStrategy"]
