"""Loading: presets, extends, aliases, overrides, secrets, and the origin of every value."""

from __future__ import annotations

from pathlib import Path

import pytest

from truthgpt.config.load import Origin, RawConfig, load_raw, preset_names, redact_secrets, shown
from truthgpt.errors import ConfigError

HF_TOKEN = "hf_" + "a1B2" * 8


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(source: object, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_raw(source, overrides)  # type: ignore[arg-type]
    return [str(problem) for problem in caught.value.problems]


def held(raw: RawConfig) -> list[str]:
    return [str(problem) for problem in raw.problems]


def test_default_is_the_packaged_file() -> None:
    raw = load_raw()
    assert raw.data == load_raw("llm_default").data
    assert raw.data["run_name"] == "llm_default"
    assert raw.origins["seed",].file == "configs/llm_default.yaml"
    assert preset_names() == ["llm_default", "debug", "finetune", "lora_fast", "performance_max"]


def test_a_preset_name_never_stands_for_a_path() -> None:
    (found,) = refused("./debug")
    assert found.startswith("debug: cannot be read: No such file")
    assert "did you mean the preset debug?" in found


def test_extends_merges_deeply_and_keeps_origins(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "seed: 1\ntraining:\n  epochs: 2\n  log_interval: 5\n")
    top = write(tmp_path, "sub/top.yaml", "extends: ../base.yaml\ntraining:\n  epochs: 7\n")
    raw = load_raw(top)
    assert raw.data == {"seed": 1, "training": {"epochs": 7, "log_interval": 5}}
    assert raw.origins["training", "epochs"] == Origin(top, 3)
    base_label = str(Path(top).parent / "../base.yaml")
    assert raw.origins["training", "log_interval"] == Origin(base_label, 4)
    assert Path(base_label).resolve() == Path(base)
    assert raw.origins[()] == Origin(top)


def test_extends_a_preset(tmp_path: Path) -> None:
    raw = load_raw(write(tmp_path, "my.yaml", "extends: llm_default\nseed: 3\n"))
    assert raw.data["seed"] == 3
    assert raw.data["training"]["max_steps"] == load_raw().data["training"]["max_steps"]


@pytest.mark.parametrize(
    ("base", "top", "merged"),
    [
        ("{type: adamw, eps: 1}", "{type: lion}", {"type": "lion"}),
        ("{type: adamw, eps: 1}", "{type: adamw, fused: false}", {"type": "adamw", "eps": 1, "fused": False}),
        ("{type: adamw, eps: 1}", "lion", {"type": "lion"}),
        ("lion", "{betas: [0, 0]}", {"type": "lion", "betas": [0, 0]}),
        ("{type: adamw, eps: 1}", "{eps: 2}", {"type": "adamw", "eps": 2}),
    ],
)
def test_naming_another_component_replaces_its_options(tmp_path: Path, base: str, top: str, merged: object) -> None:
    write(tmp_path, "base.yaml", f"optimizer: {base}\n")
    raw = load_raw(write(tmp_path, "top.yaml", f"extends: base.yaml\noptimizer: {top}\n"))
    assert raw.data["optimizer"] == merged
    assert not [path for path in raw.origins if path[:1] == ("optimizer",) and len(path) == 2 and path[1] not in merged]


def test_another_model_type_replaces_the_model_config(tmp_path: Path) -> None:
    top = write(tmp_path, "top.yaml", "extends: llm_default\nmodel: {config: {model_type: gpt2, n_layer: 2}}\n")
    model = load_raw(top).data["model"]
    assert model["config"] == {"model_type": "gpt2", "n_layer": 2}
    assert model["tokenizer"] == load_raw().data["model"]["tokenizer"]


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "\nextends: a.yaml\n")
    (found,) = refused(str(tmp_path / "a.yaml"))
    assert f"{tmp_path}/b.yaml:2: extends: goes round in a circle" in found


def test_extends_that_leads_nowhere_names_its_line(tmp_path: Path) -> None:
    top = write(tmp_path, "top.yaml", "seed: 1\nextends: gone.yaml\n")
    (found,) = refused(top)
    assert found.startswith(f"{top}:2: extends: {tmp_path}/gone.yaml cannot be read: No such file")
    assert held(load_raw(write(tmp_path, "list.yaml", "extends: [a, b]\n")))[0].endswith("found a list")


def test_extends_of_an_impossible_path(tmp_path: Path) -> None:
    top = write(tmp_path, "top.yaml", 'extends: "a\\0b"\n')
    (found,) = refused(top)
    assert found.startswith(f"{top}:1: extends: ")
    assert "null byte" in found
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read" in refused({"extends": str(tmp_path / "loop")})[0]
    assert "cannot be read: File name too long" in refused({"extends": "x" * 300})[0]


def test_mistakes_of_files_in_a_circle_are_reported_once(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "extends: a.yaml\nseed: 1\nseed: 2\n")
    assert len(refused(path)) == 2


def test_an_alias_leaves_no_origin_of_its_own(tmp_path: Path) -> None:
    raw = load_raw(write(tmp_path, "a.yaml", "training: {lr: 1e-3}\n"))
    assert ("training", "lr") not in raw.origins


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"seed: \xff1\n", ":1: not UTF-8 text: byte 6"),
        (b"a: " + b"x" * (1 << 20), "more than 1,048,576 bytes"),
        (b"", "empty"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    (found,) = refused(path)
    assert words in found


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_raw(path).data == {"seed": 3}


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "name a YAML file, not a folder" in refused(tmp_path)[0]
    write(tmp_path, "config.yaml", "seed: 1\n")
    assert f"use {tmp_path}/config.yaml" in refused(tmp_path)[0]
    assert "null byte" in refused("a\0b.yaml")[0]


def test_aliases_are_rewritten(tmp_path: Path) -> None:
    raw = load_raw(write(tmp_path, "a.yaml", "training:\n  batch_size: 4\n  lr: 1e-3\n"), ["training={lr: 1e-4}"])
    assert raw.data["training"] == {"learning_rate": 1e-4}
    raw = load_raw(str(tmp_path / "a.yaml"), ["training.lr=2e-3"])
    assert raw.data["training"] == {"train_batch_size": 4, "learning_rate": 2e-3}
    assert raw.origins["training", "train_batch_size"].line == 2
    assert raw.origins["training", "learning_rate"] == Origin()


def test_alias_and_name_together(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "training:\n  learning_rate: 1\n  lr: 2\n")
    (found,) = held(load_raw(path))
    assert found.startswith(f"{path}:3: training.lr: is a second name of training.learning_rate")
    assert f"{path}:2" in found
    (found,) = held(load_raw(None, ["training.lr=1", "training.learning_rate=2"]))
    assert "training.learning_rate: means the same as training.lr" in found


def test_alias_in_the_file_above_overrides_the_name_below(tmp_path: Path) -> None:
    raw = load_raw(write(tmp_path, "a.yaml", "extends: llm_default\ntraining: {batch_size: 3}\n"))
    assert raw.data["training"]["train_batch_size"] == 3


def test_overrides_win_and_replace_mappings_whole() -> None:
    raw = load_raw(None, ["training={epochs: 1}", "seed=7", "model.config={}", "new.deep.key=[1, {a: off}]", "seed=8"])
    assert raw.data["training"] == {"epochs": 1}
    assert raw.data["seed"] == 8
    assert raw.data["model"]["config"] == {}
    assert raw.data["new"] == {"deep": {"key": [1, {"a": "off"}]}}
    assert raw.origins["new", "deep", "key", 1, "a"] == Origin()
    assert ("training", "max_steps") not in raw.origins


def test_overriding_a_name_drops_the_former_options_of_files_only() -> None:
    raw = load_raw(None, ["optimizer.eps=1e-6", "optimizer.type=lion"])
    assert raw.data["optimizer"] == {"eps": 1e-6, "type": "lion"}
    assert load_raw(None, ["model.tokenizer.type=byte"]).data["model"]["tokenizer"] == {"type": "byte"}
    assert load_raw(None, ["optimizer.type=adamw"]).data["optimizer"] == load_raw().data["optimizer"]
    assert load_raw(None, ["data.source=text"]).data["data"]["source"] == {"type": "text"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "seed is no override (write key.path=value)"),
        ("=3", "is no key path"),
        ("a b=3", "is no key path"),
        ("training.callbacks.0=print", "a list is replaced whole"),
        ("seed=[1, 2", "seed: invalid YAML"),
        ("data.path=@home", "data.path: invalid YAML"),
        ("extends=debug", "can stand in a file only"),
        ("seed=\udcff", "not valid Unicode"),
        (f"{HF_TOKEN}", "[secret]"),
    ],
)
def test_bad_overrides(override: str, words: str) -> None:
    (found,) = held(load_raw(None, [override]))
    assert words in found
    assert HF_TOKEN not in found


def test_problems_of_files_and_overrides_come_together(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "extends: gone.yaml\nseed: 1\nseed: 2\n")
    found = refused(path, "nonsense")
    assert len(found) == 3
    assert any("written twice" in line for line in found)
    assert any("gone.yaml" in line for line in found)
    assert any("nonsense" in line for line in found)


def test_mappings_from_python(tmp_path: Path) -> None:
    given = {"seed": 3, "data": {"path": (tmp_path, "b")}, "optimizer": "lion"}
    raw = load_raw(given, ["seed=4"])
    assert raw.data == {"seed": 4, "data": {"path": [str(tmp_path), "b"]}, "optimizer": {"type": "lion"}}
    assert given["optimizer"] == "lion"
    assert str(raw.origins["data", "path"]) == "python"
    bad = load_raw({"a": {1: 2}, "b": object(), "c": "\ud800"})
    assert len(bad.problems) == 3
    loop: dict[str, object] = {}
    loop["a"] = loop
    assert "nested" in refused(loop)[0]


@pytest.mark.parametrize(
    "secret", [HF_TOKEN, "sk-" + "a1" * 12, "sk-ant-api03-" + "a1" * 12, "https://me:pass@example.org/x"]
)
def test_secrets_are_found_and_never_shown(tmp_path: Path, secret: str) -> None:
    path = write(tmp_path, "a.yaml", f"seed: 1\nmodel:\n  config:\n    deep: [x, 'say {secret}']\n")
    (problem,) = load_raw(path).problems
    assert (problem.line, problem.key) == (4, "model.config.deep[1]")
    assert "token" in problem.message
    assert secret not in str(problem)
    assert secret not in shown(f"say {secret}")
    assert redact_secrets(f"x {secret} y").startswith("x ")


@pytest.mark.parametrize(
    "text", ["data/hf_datasets/x", "hf-internal-testing/tiny", "task-1", "https://example.org/a", "a@b.c"]
)
def test_ordinary_text_is_no_secret(text: str) -> None:
    assert load_raw({"run_name": text}).problems == ()


def test_big_files_merge_in_linear_time(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "".join(f"a{i}: 1\n" for i in range(20_000)))
    raw = load_raw(write(tmp_path, "top.yaml", "extends: base.yaml\n" + "".join(f"a{i}: 2\n" for i in range(20_000))))
    assert set(raw.data.values()) == {2}
