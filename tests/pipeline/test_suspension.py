from __future__ import annotations

import contextvars
import traceback
from typing import Any

import pytest
import torch

from lightning_sentinel.pipeline.suspension import Suspended

CPU = torch.device("cpu")


def begun(function: Any, draws_on: torch.device | None = None) -> Suspended:
    suspended = Suspended(lambda: function(lambda question: suspended.ask(question)), draws_on)
    suspended.start()
    return suspended


def test_it_waits_goes_on_and_ends() -> None:
    seen: list[str] = []

    def function(ask: Any) -> int:
        seen.append("before")
        answer = ask("first") + ask("second")
        seen.append("after")
        return answer

    suspended = begun(function)
    assert suspended.waits and suspended.value == "first" and seen == ["before"]
    suspended.go_on(1)
    assert suspended.waits and suspended.value == "second"
    suspended.go_on(2)
    assert not suspended.waits and suspended.value == 3 and seen == ["before", "after"]


def test_one_that_asks_nothing() -> None:
    suspended = begun(lambda ask: "result")
    assert not suspended.waits and suspended.value == "result"
    suspended.abandon()


def test_several_take_turns() -> None:
    many = [begun(lambda ask, number=number: (number, ask(number))) for number in range(3)]
    for one in (many[1], many[2], many[0]):
        one.go_on("answer")
    assert [one.value for one in many] == [(number, "answer") for number in range(3)]


@pytest.mark.parametrize("late", [False, True])
def test_what_it_raises_comes_to_whoever_runs_it_with_its_traceback(late: bool) -> None:
    def function(ask: Any) -> None:
        if late:
            ask(None)
        raise ArithmeticError("of its own")

    with pytest.raises(ArithmeticError, match="of its own") as raised:
        begun(function).go_on(None)
    assert "function" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]


def test_abandoned_it_cleans_up_and_its_handlers_do_not_stop_it() -> None:
    seen: list[str] = []

    def function(ask: Any) -> None:
        try:
            ask(None)
        except Exception:
            seen.append("handled")
        finally:
            seen.append("finally")

    begun(function).abandon()
    assert seen == ["finally"]

    def stubborn(ask: Any) -> None:
        try:
            ask(None)
        except BaseException:
            ask("again")

    suspended = begun(stubborn)
    suspended.abandon()
    assert not suspended.waits

    def failing(ask: Any) -> None:
        try:
            ask(None)
        finally:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        begun(failing).abandon()


def test_gradients_are_recorded_by_whoever_runs_as_it_has_said() -> None:
    def function(ask: Any) -> tuple[bool, ...]:
        inside: list[bool] = []
        with torch.no_grad():
            ask(None)
            inside.append(torch.is_grad_enabled())
        ask(None)
        inside.append(torch.is_grad_enabled())
        return tuple(inside)

    suspended = begun(function)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        suspended.go_on(None)
        assert not torch.is_grad_enabled()
    suspended.go_on(None)
    assert suspended.value == (False, True) and torch.is_grad_enabled()


def test_random_numbers_are_its_own_or_in_order_of_time() -> None:
    def function(ask: Any) -> list[float]:
        first = float(torch.rand(()))
        ask(None)
        return [first, float(torch.rand(()))]

    torch.manual_seed(3)
    expected = torch.rand(3).tolist()
    torch.manual_seed(3)
    suspended = begun(function, CPU)
    between = float(torch.rand(()))
    suspended.go_on(None)
    assert suspended.value == pytest.approx(expected[:2]) and between == pytest.approx(expected[1])

    torch.manual_seed(3)
    suspended = begun(function)
    torch.rand(())
    suspended.go_on(None)
    assert suspended.value == pytest.approx([expected[0], expected[2]])


def test_context_variables_are_those_of_the_caller() -> None:
    variable = contextvars.ContextVar("variable", default="outside")
    token = variable.set("the caller's")
    try:
        suspended = begun(lambda ask: (variable.get(), variable.set("its own"), ask(None), variable.get()))
        assert variable.get() == "the caller's"
        suspended.go_on(None)
        assert suspended.value[0] == "the caller's" and suspended.value[3] == "its own"
    finally:
        variable.reset(token)


def test_one_inside_another() -> None:
    def outer(ask: Any) -> int:
        inner = begun(lambda ask_me: 10 * ask_me("inner"))
        inner.go_on(ask(inner.value))
        return inner.value + 1

    suspended = begun(outer)
    assert suspended.value == "inner"
    suspended.go_on(4)
    assert suspended.value == 41
