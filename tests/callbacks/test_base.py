"""The dispatcher: every hook, in order, and no failure that spreads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest

from truthgpt.callbacks.base import HOOKS, CallbackList, StateView
from truthgpt.trainers.state import TrainState

STATE = TrainState(step=3)


class Recorder:
    """Writes down what it is called with."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log = log
        self._name = name
        self.loaded: Mapping[str, Any] | None = None

    def __getattr__(self, hook: str) -> Any:
        if hook not in HOOKS:
            raise AttributeError(hook)
        return lambda state, info: self._log.append(f"{self._name}.{hook}({state.step}, {dict(info)})")

    def state_dict(self) -> dict[str, str]:
        return {"name": self._name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loaded = state


class Failing:
    """Fails in one method."""

    def __init__(self, method: str) -> None:
        self.calls = 0
        setattr(self, method, self._fail)

    def _fail(self, *arguments: object) -> None:
        self.calls += 1
        raise ConnectionError("the tracker is gone")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("callbacks are told apart by identity")

    __hash__ = None  # type: ignore[assignment]


def test_every_hook_reaches_every_callback_in_order() -> None:
    log: list[str] = []
    callbacks = CallbackList([("a", Recorder(log, "a")), ("nothing", object()), ("b", Recorder(log, "b"))])
    for hook in HOOKS:
        callbacks.call(hook, STATE, {"x": 1})
    assert log == [f"{name}.{hook}(3, {{'x': 1}})" for hook in HOOKS for name in "ab"]
    assert len(HOOKS) == 8


def test_a_failing_callback_is_reported_once_and_off(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    failing = Failing("on_log")
    callbacks = CallbackList([("a", Recorder(log, "a")), ("bad", failing), ("b", Recorder(log, "b"))])
    with caplog.at_level(logging.WARNING, logger="truthgpt"):
        for _ in range(3):
            callbacks.call("on_log", STATE, {})
    assert failing.calls == 1
    assert len(log) == 6
    assert [r.getMessage() for r in caplog.records] == [
        "callback bad failed in on_log and is off from now on: ConnectionError('the tracker is gone')"
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_swallowed(error: type[BaseException]) -> None:
    class Interrupted:
        def on_step(self, state: StateView, info: Mapping[str, Any]) -> None:
            raise error

    with pytest.raises(error):
        CallbackList([("x", Interrupted())]).call("on_step", STATE, {})


def test_states_go_out_and_come_back_by_name() -> None:
    first = Recorder([], "a")
    callbacks = CallbackList([("a", first), ("nothing", object())])
    assert callbacks.state_dict() == {"a": {"name": "a"}}
    callbacks.load_state_dict({"a": {"name": "saved"}, "left": {"out": 1}})
    assert first.loaded == {"name": "saved"}
    fresh = Recorder([], "new")
    CallbackList([("new", fresh)]).load_state_dict({"a": {}})
    assert fresh.loaded is None


def test_a_failing_state_dict_does_not_stop_a_save(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing("state_dict")
    callbacks = CallbackList([("bad", failing), ("a", Recorder([], "a"))])
    assert callbacks.state_dict() == {"a": {"name": "a"}}
    assert callbacks.state_dict() == {"a": {"name": "a"}}
    assert failing.calls == 1
    assert "bad failed in state_dict" in caplog.text


def test_a_failing_load_does_not_stop_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    CallbackList([("bad", Failing("load_state_dict"))]).load_state_dict({"bad": {}})
    assert "bad failed in load_state_dict" in caplog.text
