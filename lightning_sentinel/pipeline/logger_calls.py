"""Holds back direct logger calls of steps, in a batch that may be repeated, until the batch counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

__all__ = ["LoggerCalls"]


class LoggerCalls:
    """Holds back calls of loggers' ``log_*`` methods; calls of a logger's ``experiment`` are not held back.

    Example:
        >>> class Logger:
        ...     def log_metrics(self, metrics, step=None):
        ...         print(metrics)
        >>> calls, logger = LoggerCalls(), Logger()
        >>> calls.hold()
        >>> with calls.redirected([logger]):
        ...     logger.log_metrics({"x": 1})
        >>> calls.make()
        {'x': 1}
    """

    def __init__(self) -> None:
        self._held: list[Callable[[], Any]] | None = None

    def hold(self) -> None:
        """Hold back calls from here on; drop those held back so far."""
        self._held = []

    def make(self) -> None:
        """Make the calls held back so far, and later calls immediately."""
        held = self._held or ()
        self._held = None
        for call in held:
            call()

    @contextmanager
    def redirected(self, loggers: Iterable[Any]) -> Iterator[None]:
        """A context around a step in which its logger calls come here, if they are to be held back."""
        if self._held is None:
            yield
            return
        # A logger may be listed twice, and a user's logger may have an instance attribute of that name.
        places = {(id(logger), name): (logger, name) for logger in loggers for name in _methods(cast(Any, type(logger)))}
        mine = [(logger, name) for logger, name in places.values() if name not in vars(logger)]
        for logger, name in mine:
            vars(logger)[name] = partial(self._hold_one, getattr(logger, name))
        try:
            yield
        finally:
            for logger, name in mine:
                del vars(logger)[name]

    def _hold_one(self, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        if self._held is None:
            call(*args, **options)
        else:
            self._held.append(partial(call, *args, **options))


@cache
def _methods(kind: Any) -> tuple[str, ...]:
    return tuple(name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name.startswith("log_"))
