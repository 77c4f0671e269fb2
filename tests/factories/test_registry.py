"""The registry: names, options, run-time arguments; and the examples of a user's own file, as written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from truthgpt.factories.attention import ATTENTION_BACKENDS
from truthgpt.factories.callbacks import CALLBACKS
from truthgpt.factories.catalog import REGISTRIES
from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.factories.registry import Availability, NoOptions, Options, Registry, accepts
from truthgpt.validate_config import load_config


class SizeOptions(Options):
    """Options of the entry the tests register."""

    size: int = 2


@pytest.fixture
def registry() -> Registry:
    made = Registry("widget", runtime=("params", "lr"))

    @made.register("sized", options=SizeOptions)
    def build_sized(params: list[int], size: int) -> tuple[list[int], int]:
        """A widget of a size.

        More about it.
        """
        return params, size

    @made.register("any")
    def build_any(params: list[int], power: float = 1.5, **kwargs: object) -> tuple[Any, ...]:
        return params, power, kwargs

    return made


def test_names_are_sorted_and_known(registry: Registry) -> None:
    assert registry.names() == ["any", "sized"]
    assert [entry.name for entry in registry] == ["any", "sized"]
    assert "sized" in registry
    assert "other" not in registry
    with pytest.raises(KeyError, match="no widget is called 'other'; there are: any, sized"):
        registry.entry("other")


def test_a_second_registration_is_an_error(registry: Registry) -> None:
    with pytest.raises(ValueError, match="widget 'sized' is already registered"):
        registry.register("sized")
    registry.unregister("sized")
    registry.register("sized")(lambda: 1)
    assert registry.build("sized") == 1


def test_the_decorated_builder_stays_what_it_is(registry: Registry) -> None:
    def build() -> int:
        return 3

    assert registry.register("plain")(build) is build


def test_builders_receive_the_run_time_arguments_they_name(registry: Registry) -> None:
    assert registry.build("sized", {"size": 5}, params=[1], lr=0.1) == ([1], 5)
    assert registry.build("sized", params=[1], lr=0.1) == ([1], 2)
    assert registry.build("any", {"power": 2.0}, params=[1], lr=0.1) == ([1], 2.0, {"lr": 0.1})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sized", {"sice": 1}),
        ("sized", {"size": "1"}),
        ("any", {"lr": 1}),
        ("any", {"other": 1}),
        ("any", {"params": []}),
    ],
)
def test_wrong_options_are_errors(registry: Registry, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        registry.build(name, options, params=[1])


def test_undeclared_run_time_arguments_are_errors(registry: Registry) -> None:
    with pytest.raises(TypeError, match="widget builders take no run-time argument device, size"):
        registry.build("any", device="cpu", size=1, lr=1)


def test_options_come_from_the_signature(registry: Registry) -> None:
    @registry.register("positional")
    def build(width: int, *rest: int, label: str = "x") -> tuple[int, str]:
        return width, label

    fields = registry.entry("positional").options.model_fields
    assert set(fields) == {"width", "label"}
    assert fields["width"].is_required()
    with pytest.raises(ValidationError):
        registry.build("positional")
    assert registry.build("positional", {"width": 1}) == (1, "x")


def test_summary_and_availability(registry: Registry) -> None:
    assert registry.entry("sized").summary == "A widget of a size."
    assert registry.entry("any").summary == ""
    assert registry.entry("any").probe() == Availability(True)


def test_accepts() -> None:
    def named(a: int, *, b: int) -> None: ...
    def open_ended(a: int, **rest: int) -> None: ...
    def positional(a: int, /, *rest: int) -> None: ...

    assert [accepts(named, name) for name in "abc"] == [True, True, False]
    assert [accepts(open_ended, name) for name in "ab"] == [True, True]
    assert [accepts(positional, name) for name in "ab"] == [False, False]


def test_no_options_means_none(registry: Registry) -> None:
    registry.register("bare", options=NoOptions)(lambda: 1)
    with pytest.raises(ValidationError):
        registry.build("bare", {"x": 1})


@pytest.fixture
def users_own_file() -> Iterator[tuple[object, type, type]]:
    """The example of the contract, as a user writes it: no annotations, no options model."""

    def mi_attention_function(module, query, key, value, attention_mask, scaling, dropout, **kwargs):  # type: ignore[no-untyped-def]
        return query, None

    class MiOptimizer:
        def __init__(self, params, lr):  # type: ignore[no-untyped-def]
            self.params, self.lr = params, lr

    class MiCallback:
        pass

    @ATTENTION_BACKENDS.register("mi_backend")
    def build_mi_backend():  # type: ignore[no-untyped-def]
        return mi_attention_function

    @OPTIMIZERS.register("mi_optimizer")
    def build_mi_optimizer(params, lr, **kwargs):  # type: ignore[no-untyped-def]
        return MiOptimizer(params, lr=lr)

    @CALLBACKS.register("mi_callback")
    def build_mi_callback(**kwargs):  # type: ignore[no-untyped-def]
        return MiCallback(**kwargs)

    yield mi_attention_function, MiOptimizer, MiCallback
    ATTENTION_BACKENDS.unregister("mi_backend")
    OPTIMIZERS.unregister("mi_optimizer")
    CALLBACKS.unregister("mi_callback")


def test_the_contracts_example_works_as_written(users_own_file: tuple[object, type, type]) -> None:
    function, optimizer_class, callback_class = users_own_file
    overrides = [
        "model.attention.backend=mi_backend",
        "optimizer=mi_optimizer",
        "training.callbacks=[print, mi_callback]",
    ]
    config = load_config(None, overrides)
    assert ATTENTION_BACKENDS.build(config.model.attention.backend) is function
    run_time = {"params": [], "lr": 0.1, "weight_decay": 0.0, "fused": True}
    optimizer = OPTIMIZERS.build(config.optimizer.type, config.optimizer.options, **run_time)
    assert isinstance(optimizer, optimizer_class)
    assert isinstance(CALLBACKS.build("mi_callback", config.training.callbacks[1].options), callback_class)


def test_every_registry_of_the_contract_is_there() -> None:
    kinds = ["attention backend", "kv cache", "memory policy", "optimizer", "scheduler", "data source", "collator"]
    assert [registry.kind for registry in REGISTRIES.values()] == [*kinds, "callback", "metric"]
    assert all(registry.names() for registry in REGISTRIES.values())
