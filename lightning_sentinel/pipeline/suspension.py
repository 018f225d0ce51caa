"""A function that is left in the middle and gone on with later, in one thread.

The user's step is one function, and the pipeline belongs into the middle of it. As a greenlet it waits there, with its variables,
its open ``with`` blocks and its exceptions, until the output is there; nothing in it happens twice.
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
    """Ends a function that nobody goes on with; no ``Exception``, so that its own handlers let it pass."""


class Suspended:
    """Runs a function up to the place where it asks for something, and goes on from there with the answer.

    What the thread has only once is the function's own while it runs, and the caller's in between: whether gradients are recorded,
    and, with ``draws_on``, the random numbers. Context variables are a copy of the caller's.

    Args:
        function: to run. It calls :meth:`ask` for what it waits for.
        draws_on: whose generator the function goes on with where it stood; ``None`` lets numbers be drawn in the order of time.

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
        """Whether the function has asked for something, and waits for it."""
        self.value: Any = None
        """What it asked, or, if it waits for nothing, what it returned."""

    def start(self) -> None:
        """Run up to the first :meth:`ask`, or to the end. Raises what the function raises, with its traceback."""
        self._switch(self._greenlet.switch)

    def go_on(self, answer: Any) -> None:
        """Let :meth:`ask` return ``answer``, and run up to the next one, or to the end."""
        self._switch(self._greenlet.switch, answer)

    def abandon(self) -> None:
        """Leave the function where it waits; its ``finally`` clauses run, and what they raise is raised."""
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
        # Whoever goes on with it need not be who began, and is where it is to come back to.
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
