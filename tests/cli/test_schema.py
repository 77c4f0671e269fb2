"""`truthgpt schema` accepts what validation accepts; the generated pages have not drifted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from truthgpt.cli import reference
from truthgpt.cli.app import main
from truthgpt.cli.schema import key_meanings
from truthgpt.config.load import load_raw
from truthgpt.config.schema import Config
from truthgpt.config.strict_yaml import parse_yaml
from truthgpt.factories.catalog import REGISTRIES
from truthgpt.validate_config import load_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "src/truthgpt/configs").rglob("*.yaml"))
KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def fits(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """Whether a value fits a JSON Schema, as far as ours use the language."""
    if "$ref" in schema:
        return fits(value, definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "anyOf" in schema and not any(fits(value, choice, definitions) for choice in schema["anyOf"]):
        return False
    if "enum" in schema and not any(value == choice and type(value) is type(choice) for choice in schema["enum"]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "type" in schema:
        kind = KINDS[schema["type"]]
        if not isinstance(value, kind) or (isinstance(value, bool) and schema["type"] in ("integer", "number")):
            return False
    if isinstance(value, dict) and "properties" in schema:
        properties = schema["properties"]
        if any(name not in value for name in schema.get("required", [])):
            return False
        if schema.get("additionalProperties") is False and not set(value) <= set(properties):
            return False
        return all(fits(item, properties[name], definitions) for name, item in value.items() if name in properties)
    if isinstance(value, list) and "items" in schema:
        return all(fits(item, schema["items"], definitions) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value and not schema.get("exclusiveMinimum", value - 1) >= value
    return not ("pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value))


@pytest.fixture
def schema(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as caught:
        main(["schema"])
    assert not caught.value.code
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_fit_the_schema(path: Path, schema: dict[str, Any]) -> None:
    assert fits(parse_yaml(path.read_text(encoding="utf-8"), path.name).data, schema, schema["$defs"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_carry_the_editor_modeline(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=")


def test_the_resolved_default_fits_the_schema(schema: dict[str, Any]) -> None:
    assert fits(load_config().model_dump(), schema, schema["$defs"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"sede": 1},
        {"seed": "1"},
        {"training": {"log_interval": 0}},
        {"training": {"torch_compile": "off"}},
        {"training": {"callbacks": ["nope"]}},
        {"training": {"scheduler": {"type": "cosine", "other": 1}}},
        {"optimizer": {"type": "lion", "eps": 1e-8}},
        {"optimizer": "sgd"},
        {"model": {"attention": {"backend": "nope"}}},
        {"eval": {"metrics": [{"type": "ppl", "x": 1}]}},
        {"run_name": "a b"},
    ],
)
def test_the_schema_refuses_what_validation_refuses(wrong: dict[str, Any], schema: dict[str, Any]) -> None:
    assert not fits(wrong, schema, schema["$defs"])


@pytest.mark.parametrize(
    "right",
    [
        {"extends": "llm_default", "training": {"lr": 1e-3, "batch_size": 2, "scheduler": "linear"}},
        {"optimizer": {"betas": [0.9, 0.95]}},
        {"optimizer": {"type": "lion", "betas": [0.9, 0.95], "fused": False}},
        {"data": {"path": "a.txt"}, "eval": {"metrics": ["ppl", {"type": "loss"}]}},
        {"data": {"path": ["a", "b"]}, "training": {"torch_compile": False}},
    ],
)
def test_the_schema_accepts_what_validation_accepts(right: dict[str, Any], schema: dict[str, Any]) -> None:
    assert fits(right, schema, schema["$defs"])


def test_every_key_has_a_meaning() -> None:
    for path, meaning in key_meanings().items():
        assert meaning.endswith("."), path
        assert "\n" not in meaning


def test_every_option_has_a_meaning() -> None:
    for registry in REGISTRIES.values():
        for entry in registry:
            assert entry.summary, entry.name
            for name, field in entry.options.model_fields.items():
                assert field.description, (entry.name, name)


def check(root: Path, capsys: pytest.CaptureFixture[str], action: str = "--check") -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        reference.main([action, "--root", str(root)])
    return int(caught.value.code or 0), capsys.readouterr().out


def test_generated_files_have_not_drifted(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(ROOT, capsys) == (0, "")


def test_check_names_the_files_that_drifted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default = tmp_path / reference.DEFAULT_YAML
    default.parent.mkdir(parents=True)
    default.write_text("# Head\n\n# Stale comment.\nseed: 3\nmodel: {init: scratch}\n")
    code, said = check(tmp_path, capsys)
    assert code == 1
    assert [line.split()[0] for line in said.splitlines()] == [
        reference.CONFIG_PAGE,
        reference.QUICK_PAGE,
        reference.DEFAULT_YAML,
    ]
    assert check(tmp_path, capsys, "--write")[0] == 0
    assert check(tmp_path, capsys) == (0, "")
    seed, model = Config.model_fields["seed"].description, Config.model_fields["model"].description
    assert default.read_text() == f"# Head\n\n# {seed}\nseed: 3\n# {model}\nmodel: {{init: scratch}}\n"


def test_pages_name_every_key_and_component() -> None:
    page, quick = reference.config_page(), reference.quick_page()
    for path in key_meanings():
        assert f"`{'.'.join(path)}`" in page
    for registry in REGISTRIES.values():
        for name in registry.names():
            assert f"**`{name}`**" in page
            assert f"`{name}`" in quick
    assert all(f"### `truthgpt {name}" in quick for name in ("validate", "schema", "init", "components"))
    assert "| 143 | " in quick


def test_commenting_the_default_changes_no_value() -> None:
    text = (ROOT / reference.DEFAULT_YAML).read_text(encoding="utf-8")
    assert parse_yaml(reference.commented_yaml(text), "a").data == parse_yaml(text, "a").data
    assert load_raw().problems == ()
