"""`truthgpt components` lists what is registered."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from truthgpt.cli.app import main
from truthgpt.factories.catalog import REGISTRIES
from truthgpt.factories.registry import Availability


@pytest.fixture
def missing_component() -> Iterator[None]:
    callbacks = REGISTRIES["CALLBACKS"]
    state = Availability(False, reason="pip install 'truthgpt[absent]'", fallback="print")

    @callbacks.register("absent", probe=lambda: state)
    def build_absent() -> object:
        return object()

    yield
    callbacks.unregister("absent")


@pytest.mark.usefixtures("missing_component")
def test_json_has_a_row_for_every_component(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["components", "--json"])
    assert not caught.value.code
    rows = json.loads(capsys.readouterr().out)
    assert all(set(row) == {"registry", "name", "available", "fallback", "reason"} for row in rows)
    names = [(row["registry"], row["name"]) for row in rows]
    assert names == [(name, entry.name) for name, registry in REGISTRIES.items() for entry in registry]
    (absent,) = [row for row in rows if row["name"] == "absent"]
    assert absent == {
        "registry": "CALLBACKS",
        "name": "absent",
        "available": False,
        "fallback": "print",
        "reason": "pip install 'truthgpt[absent]'",
    }


@pytest.mark.usefixtures("missing_component")
def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["components"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["registry", "name", "available"]
    (absent,) = [line for line in lines if " absent " in line]
    assert absent.endswith("no: pip install 'truthgpt[absent]' (falls back to print)")
    assert len({line.index(line.split()[1]) for line in lines}) == 1
