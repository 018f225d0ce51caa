"""Suspends a function in the middle and resumes it later, in one thread.

The user's step is one function, and the pipeline runs in the middle of it. As a greenlet the step is suspended there, with its
variables, open ``with`` blocks and exceptions, until the pipeline's output is available; no part of the step runs twice.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from lightning_sentinel.pipeline.randomness import remember_generators

__all__ = ["Suspended"]


class _Abandoned(BaseException):
    """Raised in an abandoned function to end it. Not an ``Exception``, so that the function's own handlers let it pass."""


class Suspended:
    """Runs a function up to its call of :meth:`ask`, and later resumes it with the answer.

    The gradient mode is the function's own while it runs, and the caller's while it is suspended. With ``draws_on`` the function
    also resumes with its own random number states. Context variables are a copy of the caller's.

    Args:
        function: to run. It calls :meth:`ask` to wait for an answer.
        draws_on: a device whose generators the function resumes with the states they had when it was suspended; ``None`` leaves
            the generators alone.

    Example:
        >>> def double() -> int:
        ...     return 2 * suspended.ask("how many?")
        >>> suspended = Suspended(double)
        >>> suspended.start()
        >>> suspended.waits, suspended.value
        (True, 'how many?')
        >>> suspended.go_on(4)
        >>> suspended.waits, suspended.value
        (False, 8)
    """

    def __init__(self, function: Callable[[], Any], draws_on: torch.device | None = None) -> None:
        self._greenlet = greenlet(function)
        self._greenlet.gr_context = contextvars.copy_context()
        self._draws_on = draws_on
        self._draw_on: Callable[[], None] | None = None
        self._records_gradients = torch.is_grad_enabled()
        self.waits = False
        """Whether the function has called :meth:`ask` and waits for an answer."""
        self.value: Any = None
        """The function's question while it waits, else its return value."""

    def start(self) -> None:
        """Run up to the first :meth:`ask`, or to the end. Raises what the function raises, with its traceback."""
        self._switch(self._greenlet.switch)

    def go_on(self, answer: Any) -> None:
        """Let :meth:`ask` return ``answer``, and run up to the next one, or to the end."""
        self._switch(self._greenlet.switch, answer)

    def abandon(self) -> None:
        """End the function where it waits; its ``finally`` clauses run, and their exceptions propagate."""
        try:
            while not self._greenlet.dead:
                self._switch(self._greenlet.throw, _Abandoned)
        except _Abandoned:
            pass
        self.value = None

    def ask(self, question: Any) -> Any:
        """Wait for an answer; to be called by the function."""
        parent = getcurrent().parent
        assert parent is not None, "only the function asks"
        self.waits = True
        try:
            return parent.switch(question)
        finally:
            self.waits = False

    def _switch(self, switch: Callable[..., Any], *values: Any) -> None:
        # The greenlet that resumes the function may not be the one that started it; the function must switch back to it.
        self._greenlet.parent = getcurrent()
        callers = torch.is_grad_enabled()
        torch.set_grad_enabled(self._records_gradients)
        if self._draw_on is not None:
            self._draw_on()
        try:
            self.value = switch(*values)
        finally:
            self._records_gradients = torch.is_grad_enabled()
            torch.set_grad_enabled(callers)
            if self._draws_on is not None and not self._greenlet.dead:
                self._draw_on = remember_generators(self._draws_on)
