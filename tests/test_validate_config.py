"""Validation: every mistake at once, each with its place and a fix; components, rules, and the resolved YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from truthgpt.config.load import load_raw, preset_names
from truthgpt.config.names import ALIASES, FOREIGN_NAMES
from truthgpt.config.schema import Config
from truthgpt.config.strict_yaml import flow
from truthgpt.errors import ConfigError, Problem
from truthgpt.factories.catalog import REGISTRIES
from truthgpt.factories.registry import Options
from truthgpt.json_schema import json_schema
from truthgpt.validate_config import load_config, resolved_yaml, validate_config

SCRATCH = {"model": {"config": {"model_type": "llama"}}}


def mistakes(source: Any, *overrides: str) -> dict[str, Problem]:
    """The problems by key; a key with two problems is a defect."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    by_key = {problem.key: problem for problem in caught.value.problems}
    assert len(by_key) == len(caught.value.problems), str(caught.value)
    return by_key


def mistake(override: str) -> Problem:
    """The only problem that the default configuration has with `override`."""
    found = mistakes(None, override)
    assert len(found) == 1, found
    return next(iter(found.values()))


def test_presets_are_valid() -> None:
    given = ["model.name_or_path=gpt2", "data.path=train.jsonl"]
    own = {"finetune": given, "lora_fast": given, "performance_max": given}
    for name in preset_names():
        config = load_config(name, own.get(name, ()))
        assert config.run_name == name
    assert set(mistakes("finetune")) == {"model.name_or_path", "data.path"}


def test_the_finetune_preset_holds_the_defaults_of_the_contract() -> None:
    config = load_config("finetune", ["model.name_or_path=gpt2", "data.path=train.jsonl"])
    defaults = Config()
    assert config.training == load_config({**SCRATCH}).training
    assert (config.checkpoint, config.ema, config.eval) == (defaults.checkpoint, defaults.ema, defaults.eval)


def test_the_smallest_valid_configuration() -> None:
    config = validate_config(SCRATCH)
    assert config.model.config == {"model_type": "llama"}
    assert config.run_directory == "runs/llm_default"


def test_defaults_of_components_are_filled_in() -> None:
    config = load_config(None, ["optimizer={type: lion}", "training.scheduler=wsd"])
    assert config.optimizer.options == {"betas": [0.9, 0.99]}
    assert config.optimizer.fused is True
    assert set(config.training.scheduler.options) == {"decay_ratio", "min_ratio"}
    assert config.data.collate.options == {"pad_to_multiple_of": 1}


def test_an_option_without_a_name_belongs_to_the_default_component() -> None:
    config = load_config({**SCRATCH, "training": {"scheduler": {"min_ratio": 0.1}}})
    assert (config.training.scheduler.type, config.training.scheduler.options) == ("cosine", {"min_ratio": 0.1})


def test_every_mistake_at_once_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "\n".join(
            [
                "seed: -1",
                "learning_rate: 1e-3",
                "model:",
                "  attention: {backend: flashy}",
                "  lora: {r: 8}",
                "  tokenizer: {type: bpe}",
                "training:",
                "  per_device_train_batch_size: 4",
                "  log_intervall: 5",
                "  torch_compile: off",
                "  max_steps: '1000'",
                "optimizer: {type: adamw, betas: [0.9, 1.5], epsilon: 1}",
                "data: {source: jsonl, train_on: completion}",
                "ema: {enabled: yes}",
                "eval: {metrics: [pppl], select_best_by: ppl}",
            ]
        )
    )
    found = mistakes(str(path))
    lines = {key: problem.line for key, problem in found.items()}
    assert lines == {
        "seed": 1,
        "learning_rate": 2,
        "model.config.model_type": 3,
        "model.attention.backend": 4,
        "model.lora.r": 5,
        "model.tokenizer.vocab_size": 6,
        "training.per_device_train_batch_size": 8,
        "training.log_intervall": 9,
        "training.torch_compile": 10,
        "training.max_steps": 11,
        "optimizer.betas[1]": 12,
        "optimizer.epsilon": 12,
        "data.path": 13,
        "data.train_on": 13,
        "ema.enabled": 14,
        "eval.metrics[0]": 15,
    }
    assert {problem.file for problem in found.values()} == {str(path)}


def test_problems_of_the_loader_and_of_validation_come_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("extends: llm_default\nrun_name: a\nrun_name: b\nstrict: 1\n")
    found = mistakes(str(path), "nonsense", "seed=x")
    assert {key: problem.line for key, problem in found.items()} == {"run_name": 3, "strict": 4, "": None, "seed": None}
    assert found["seed"].file is None


@pytest.mark.parametrize(
    ("override", "message", "suggestion"),
    [
        ("seed=x", "must be an integer; found 'x'", None),
        ("seed='7'", "must be an integer; found '7'", "write 7"),
        ("seed=1.0", "must be an integer; found 1.0", "write 1"),
        ("seed=true", "must be an integer; found true", None),
        ("training.max_steps=1_000", "must be an integer; found '1_000'", "write 1000"),
        ("training.learning_rate=.nan", "must be a finite number; found .nan", None),
        ("training.max_time_s=.inf", "must be a finite number; found .inf", None),
        ("training.warmup_ratio=1", "must be less than 1.0; found 1", None),
        ("training.train_batch_size=0", "must be at least 1; found 0", None),
        ("training.train_batch_size=null", "must be an integer; found null", None),
        ("ema.enabled=no", "must be true or false; found 'no'", "write false"),
        ("ema.enabled=on", "must be true or false; found 'on'", "write true"),
        ("ema.enabled='true'", "must be true or false; found 'true'", "write true without quotes"),
        ("ema.enabled=1", "must be true or false; found 1", "write true"),
        ("training.torch_compile=off", "must be 'auto', true or false; found 'off'", "write false"),
        ("training.torch_compile=0", "must be 'auto', true or false; found 0", "write false"),
        ("model.gradient_checkpointing=1", "must be 'auto', true or false; found 1", "write true"),
        ("training.mixed_precision=bf61", "must be 'bf16', 'fp16' or 'none'; found 'bf61'", "did you mean bf16?"),
        ("training.callbacks=print", "must be a list; found 'print'", "write [print]"),
        ("ema=5", "must be a mapping; found 5", None),
        ("run_name=a/../b", "must be letters", None),
        ("run_name=" + "a" * 200, "must be at most 128 characters long", None),
        ("optimizer.betas=[0.9]", "must have at least 2 items, not 1", None),
        ("model.task=images", "must be 'causal_lm' or 'image_classification'; found 'images'", None),
        ("seed=" + "9" * 60, "must be less than 9223372036854775808", None),
    ],
)
def test_wrong_values(override: str, message: str, suggestion: str | None) -> None:
    problem = mistake(override)
    assert problem.message.startswith(message)
    assert problem.suggestion == suggestion
    assert problem.file is None


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("training.log_intervall", "did you mean log_interval?"),
        ("training.batch_sze", "did you mean batch_size?"),  # a second name is a name
        ("model.tokeniser", "did you mean tokenizer?"),
        ("modell", "did you mean model?"),
        ("training.max_seq_len", "did you mean data.max_seq_len?"),  # nearer than training.max_steps
        ("learning_rate", "did you mean training.learning_rate?"),
        ("batch_size", "did you mean training.train_batch_size?"),
        ("optimizer.weight_decay", "did you mean training.weight_decay?"),
        ("optimizer.beta", "did you mean betas?"),
        ("data.max_sequence_len", "did you mean max_seq_len?"),
        ("data.source.path", "did you mean model.tokenizer.path or data.path?"),
        ("zzz", None),
    ],
)
def test_unknown_keys_get_the_nearest_name(key: str, suggestion: str | None) -> None:
    problem = mistake(f"{key}=1")
    assert problem.key == key
    assert "allowed here: " in problem.message
    assert problem.suggestion == suggestion


@pytest.mark.parametrize("name", sorted(FOREIGN_NAMES))
def test_names_of_other_trainers_are_answered_with_ours(name: str) -> None:
    ours = FOREIGN_NAMES[name]
    assert mistake(f"training.{name}=1").suggestion == f"here this is {ours}"
    section: Any = Config().model_dump()
    for part in ours.split("."):
        if part in ("betas", "eps") and section.get("type") == "adamw":
            break
        section = section[part]


def test_aliases_mean_keys_that_exist() -> None:
    defaults = Config().model_dump()
    for alias, name in ALIASES.items():
        section, key = name.split(".")
        assert key in defaults[section]
        assert alias.split(".")[1] not in defaults[section]


@pytest.mark.parametrize(
    ("override", "key", "kind"),
    [
        ("model.attention.backend=xformers", "model.attention.backend", "attention backend"),
        ("model.kv_cache.type=pagd", "model.kv_cache.type", "kv cache"),
        ("model.memory.policy=adaptve", "model.memory.policy", "memory policy"),
        ("data.source=hub", "data.source", "data source"),
        ("data.source={type: webdatasets}", "data.source.type", "data source"),
        ("data.collate=images", "data.collate", "collator"),
        ("optimizer.type=sgd", "optimizer.type", "optimizer"),
        ("training.callbacks=[print, mlflow]", "training.callbacks[1]", "callback"),
        ("eval.metrics=[ppl, {type: bleu}]", "eval.metrics[1].type", "metric"),
    ],
)
def test_unknown_components_list_what_there_is(override: str, key: str, kind: str) -> None:
    problem = mistake(override)
    assert problem.key == key
    assert problem.message.startswith(f"no {kind} is called ")
    registry = next(r for r in REGISTRIES.values() if r.kind == kind)
    assert problem.message.endswith(f"there are: {', '.join(registry.names())}")


ROWS = ["data.source=jsonl", "data.path=x.jsonl"]
IMAGES = [
    *("model.task=image_classification", "data.source=image_folder", "data.path=x", "data.collate=cv"),
    *("eval.metrics=[ppl, accuracy]", "generate.prompts=[]"),
]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["eval.select_best_by=bleu"], "eval.select_best_by", "(loss, ppl, bits_per_byte); found 'bleu'"),
        (["eval.metrics=[bits_per_byte]"], "eval.select_best_by", "found 'ppl'"),
        (["model.kv_cache.block_size=64"], "model.kv_cache.block_size", "is not read by kv_cache.type: none"),
        (["model.lora.r=8"], "model.lora.r", "is read with model.lora.enabled: true only"),
        (["model.lora.target_modules=q_proj"], "model.lora.target_modules", "enabled: true only"),
        (
            ["model.lora={enabled: true, target_modules: [all-linear, x]}"],
            "model.lora.target_modules",
            "stand beside it",
        ),
        (["model.lora.method=dora"], "model.lora.method", "enabled: true only"),
        (["model.lora={enabled: true, quantization: nf4}"], "model.lora.quantization", "starts from random weights"),
        (
            [
                "model.lora={enabled: true, method: dora}",
                "training.mixed_precision=bf16",
                "training.weights=bf16_stochastic",
            ],
            "model.lora.method",
            "dora needs its magnitudes in float32; training.weights is bf16_stochastic",
        ),
        (["model.lora={enabled: true, target_modules: []}"], "model.lora.target_modules", "at least 1 items"),
        (["data.streaming=true"], "data.streaming", "is not read by data source python_stdlib"),
        ([*ROWS, "data.streaming=true", "training.max_steps=null"], "training.max_steps", "no known length"),
        ([*ROWS, "data.shuffle_window=9"], "data.shuffle_window", "data.streaming: true only"),
        ([*ROWS, "data.train_on=assistant"], "data.train_on", "needs format: chat"),
        ([*ROWS, "data.chat_template=x"], "data.chat_template", "format: chat only"),
        ([*ROWS, "data.split=test"], "data.split", "is not read by data source jsonl"),
        ([*ROWS, "data.validation_split=test"], "data.validation_split", "is not read by data source jsonl"),
        (["data.validation_path=x.txt"], "data.validation_path", "is not read by data source python_stdlib"),
        ([*ROWS, "data.image_field=x"], "data.image_field", "is not read by data source jsonl"),  # said once
        (["data.source=hf"], "data.dataset", "missing; give data.dataset or data.path"),
        (["data.source=hf", "data.dataset=a", "data.path=b"], "data.dataset", "one is read"),
        (["data.source=hf", "data.path=b", "data.image_field=x"], "data.image_field", "image_classification only"),
        (["data.mix_by=tokens"], "data.mix_by", "data.sources only"),
        ([*ROWS, "data.packing=true", "data.bucket_by_length=true"], "data.bucket_by_length", "packing: true"),
        ([*ROWS, "data.bucket_bins=[8]"], "data.bucket_bins", "bucket_by_length: true only"),
        ([*ROWS, "data.max_tokens=100"], "data.max_tokens", "less than one sample of data.max_seq_len 128"),
        (["data.sources=[{source: jsonl}]"], "data.sources[0].path", "missing; data source jsonl needs it"),
        (["data.sources=[{source: text, path: x, text_field: y}]"], "data.sources[0].text_field", "is not read by"),
        (["data.sources=[{source: jsnol, path: x}]"], "data.sources[0].source", "no data source is called 'jsnol'"),
        (["data.sources=[{source: text, path: x, stirp: 1}]"], "data.sources[0].stirp", "has no option of this name"),
        (["data.sources=[{source: text, path: x}]", "data.text_field=t"], "data.text_field", "by data source text"),
        ([*ROWS, "data.sources=[{source: text, path: x}]"], "data.source", "beside data.sources"),
        (["data.sources=[{source: text, path: x, weight: 0}]"], "data.sources[0].weight", "more than 0"),
        (
            ["data.sources=[{source: text, path: x, weight: 1}, {source: text, path: y}]"],
            "data.sources[1]",
            "no weight",
        ),
        (
            ["data.sources=[{source: jsonl, path: x, train_on: assistant}]"],
            *("data.sources[0].train_on", "needs format: chat"),
        ),
        (
            ["data.sources=[{source: jsonl, path: x, weight: 1}]", "data.bucket_by_length=true"],
            *("data.bucket_by_length", "weighted sources"),
        ),
        (
            ["data.sources=[{source: text, path: x}, {source: text, path: y}]", "data.streaming=true"],
            *("data.sources[0]", "has no weight"),
        ),
        (["data.collate=cv"], "data.collate", "the task is causal_lm"),
        (["data.source=image_folder", "data.path=x"], "data.source", "image_folder has no text"),
        (
            ["data.sources=[{source: text, path: x, validation_path: y}]", "data.validation_path=z"],
            *("data.validation_path", "all sources have validation documents of their own"),
        ),
        (
            ["data.sources=[{source: python_stdlib}, {source: text, path: x}]", "data.validation_path=z"],
            *("data.validation_path", "python_stdlib reads no files"),
        ),
        (["data.sources=[{source: image_folder, path: x}]"], "data.sources[0].source", "image_folder has no text"),
        ([*IMAGES, "data.collate=lm"], "data.collate", "the task is image_classification"),
        ([*IMAGES, "data.packing=true"], "data.packing", "is for text"),
        ([*IMAGES, "data.max_tokens=500"], "data.max_tokens", "is for text"),
        ([*IMAGES, "generate.prompts=[a]"], "generate.prompts", "writes no text"),
        ([*IMAGES, "eval.metrics=[ppl, bits_per_byte]"], "eval.metrics[1]", "is for text"),
        ([*IMAGES, "model.lora.enabled=true"], "model.lora.enabled", "the task is image_classification"),
        ([*IMAGES, "data.source=text"], "data.source", "text has no images"),
        (
            ["optimizer.type=schedule_free", "ema.enabled=false"],
            *("training.scheduler", "cosine changes the learning rate"),
        ),
        (
            ["optimizer.type=schedule_free", "training.scheduler=constant"],
            *("ema.enabled", "keeps an average of its own"),
        ),
        (["training.float8=rowwise"], "training.float8", "is for mixed_precision: bf16; it is none"),
        (
            ["training.float8=rowwise", "training.mixed_precision=bf16", "model.lora.enabled=true"],
            *("training.float8", "is for training all weights"),
        ),
        (
            [*IMAGES, "training.float8=tensorwise", "training.mixed_precision=bf16"],
            *("training.float8", "the task is image_classification"),
        ),
        (["model.init=pretrained"], "model.name_or_path", "missing"),
        (["model.config={}"], "model.config.model_type", "missing"),
        (["model={init: scratch}"], "model.config.model_type", "missing"),
        (["model.config.model_type=3"], "model.config.model_type", "found 3"),
        (["model.config.output_router_logits=true"], "model.config.output_router_logits", "cross-entropy alone"),
        (["model.tokenizer={type: bpe}"], "model.tokenizer.vocab_size", "type: bpe needs it"),
        (["model.tokenizer={type: path}"], "model.tokenizer.path", "type: path needs it"),
        (["model.tokenizer={type: byte, vocab_size: 300}"], "model.tokenizer.vocab_size", "for type: bpe only"),
        (["model.tokenizer={vocab_size: 300}"], "model.tokenizer.vocab_size", "the type is auto"),
        (["model.tokenizer={type: byte, path: x}"], "model.tokenizer.path", "for type: path only"),
        (["data.path=x.txt"], "data.path", "is not read by data source python_stdlib"),
        (["data.dataset=x"], "data.dataset", "is not read by"),
        (["data.text_field=body"], "data.text_field", "is not read by"),
        (["data.source=text"], "data.path", "missing; data source text needs it"),
        (["data.source=jsonl"], "data.path", "missing; data source jsonl needs it"),
        (["data.source=jsonl", "data.path=x", "data.train_on=completion"], "data.train_on", "needs format"),
        (["plugins=[mine]"], "plugins[0]", "not loaded"),
    ],
)
def test_rules_between_keys(overrides: list[str], key: str, words: str) -> None:
    found = mistakes(None, *overrides)
    assert list(found) == [key]
    assert words in found[key].message


def test_what_the_rules_allow() -> None:
    assert load_config(None, ["eval.select_best_by=loss"]).eval.select_best_by == "loss"
    assert load_config(None, ["model.tokenizer={}"]).model.tokenizer.type == "auto"
    assert load_config(None, ["model={name_or_path: gpt2}"]).model.name_or_path == "gpt2"
    rows = ["data.source=jsonl", "data.path=[a, b]", "data.format=prompt_completion", "data.train_on=completion"]
    assert load_config(None, rows).data.path == ["a", "b"]
    assert load_config(None, ["plugins=[mine]"], frozenset({"mine"})).plugins == ["mine"]


def test_plugin_problem_names_the_way_out() -> None:
    assert "--allow-plugins" in str(mistake("plugins=[mine]"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.source=txet", "data.path=x"],  # path may well be right for what was meant
        ["data.sourcee=text", "data.path=x"],
        ["data.source=text", "data.path=3"],
        ["model.tokenizer={type: bpe, vocab_size: many}"],
        ["eval.metrics=[pppl]"],
        ["training.callbacks=[{type: 3}]"],
        ["data.source={type: txet, strip: 1}", "data.path=x"],
        ["model.init=pretrained", "model.name_or_path=3"],
        ["data={source: jsonl, path: x, format: promptcompletion, train_on: completion}"],
    ],
)
def test_a_mistake_is_not_reported_twice(overrides: list[str]) -> None:
    assert len(mistakes(None, *overrides)) == 1


def test_a_secret_is_never_printed() -> None:
    token = "hf_" + "a1B2" * 8
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"seed={token}", f"optimizer.type={token}", f"training.epochs={token}", f"model.{token}=1"])
    assert token not in str(caught.value)


class DecayOptions(Options):
    """Options of the component that the tests register."""

    power: float = Field(default=2.0, gt=0)
    """Exponent."""
    floor: float
    """Least value."""


@pytest.fixture
def registered() -> Iterator[None]:
    schedulers = REGISTRIES["SCHEDULERS"]
    callbacks = REGISTRIES["CALLBACKS"]

    @schedulers.register("power", options=DecayOptions)
    def build_power(total_steps: int, power: float, floor: float) -> object:
        """A power of the step."""
        return (total_steps, power, floor)

    @callbacks.register("mine")
    def build_mine(level: int = 1, **kwargs: object) -> object:
        return (level, kwargs)

    yield
    schedulers.unregister("power")
    callbacks.unregister("mine")


@pytest.mark.usefixtures("registered")
def test_components_of_a_plugin_are_checked_like_ours() -> None:
    config = load_config(None, ["training.scheduler={type: power, floor: 1}", "training.callbacks=[{type: mine}]"])
    assert config.training.scheduler.options == {"power": 2.0, "floor": 1.0}
    assert config.training.callbacks[0].options == {"level": 1}
    found = mistakes(None, "training.scheduler={type: power, powr: 1}", "training.callbacks=[{type: mine, other: 1}]")
    assert found["training.scheduler.floor"].message == "missing; scheduler power needs it"
    assert found["training.scheduler.powr"].suggestion == "did you mean power?"
    assert "callback mine has no option of this name" in found["training.callbacks[0].other"].message


@pytest.mark.usefixtures("registered")
def test_json_schema_follows_the_registries() -> None:
    document = json_schema()
    training = document["$defs"]["TrainingConfig"]["properties"]
    options = {choice["properties"]["type"]["const"]: choice for choice in training["scheduler"]["anyOf"][1:]}
    assert options["power"]["required"] == ["type", "floor"]
    assert "power" in training["scheduler"]["anyOf"][0]["enum"]
    assert training["scheduler"]["default"] == {"type": "cosine"}
    assert {"batch_size", "lr"} <= set(training)
    assert json.loads(json.dumps(document)) == document


def test_resolved_yaml_says_where_everything_came_from(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("extends: llm_default\ntraining:\n  scheduler: linear\n  lr: 1e-5\n")
    raw = load_raw(str(path), ["seed=3", "model.config.rope={kind: 'off', list: [1, {a: 1e-7}]}"])
    lines = {
        line.split("#")[0].strip(): line.split("# ")[-1]
        for line in resolved_yaml(validate_config(raw), raw.origins).splitlines()
    }
    assert lines["seed: 3"] == "command line"
    assert lines["learning_rate: 1.0e-05"] == f"{path}:4"
    assert lines["type: linear"] == f"{path}:3"
    assert lines["min_ratio: 0.0"] == "default"
    assert lines[f"max_steps: {raw.data['training']['max_steps']}"].startswith("configs/llm_default.yaml:")
    assert lines['kind: "off"'] == "command line"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.config.odd={'a: b': \"x\\ny # z\", e: [], m: {}, n: null, t: '1e5'}", "training.callbacks=[]"],
        [
            "optimizer.type=adafactor",
            "generate.prompts=['déf \\t', \"\\x85 \\u2028\", '#']",
            "training.max_time_s=1e20",
        ],
    ],
)
def test_resolved_yaml_is_read_back_the_same(tmp_path: Path, overrides: list[str]) -> None:
    raw = load_raw(None, overrides)
    config = validate_config(raw)
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(config, raw.origins), encoding="utf-8")
    again = load_raw(str(path))
    assert validate_config(again) == config
    assert again.origins["seed",].line == 1


def test_a_file_name_of_two_lines_stays_in_its_comment(tmp_path: Path) -> None:
    path = tmp_path / "a\nseed: 5 #.yaml"
    path.write_text("extends: llm_default\nseed: 3\n")
    raw = load_raw(str(path))
    config = validate_config(raw)
    saved = tmp_path / "config.yaml"
    saved.write_text(resolved_yaml(config, raw.origins))
    assert load_config(str(saved)) == config
    path.write_text("sede: 3\n")
    assert all("\n" not in str(problem) for problem in mistakes(str(path)).values())


def test_validation_loads_no_torch() -> None:
    code = "import sys; from truthgpt.validate_config import *; from truthgpt.json_schema import *; "
    code += "load_config(); json_schema(); "
    code += "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'numpy', 'rich')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


NAMES = sorted(
    {key for section in Config().model_dump().values() if isinstance(section, dict) for key in section}
    | set(Config.model_fields)
    | {"type", "backend", "policy", "extends", "betas", "lr", "batch_size"}
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["auto", "none", "off", "adamw", "jsonl", "text", "print", "ppl", "cosine", "scratch", "byte", "llm_default"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)
documents = st.dictionaries(st.sampled_from(NAMES), values, max_size=6)


def accepted_or_refused(source: Any, *overrides: str) -> None:
    try:
        config = load_config(source, overrides)
    except ConfigError as error:
        for problem in error.problems:
            assert problem.message
            assert "\n" not in str(problem)
    else:
        assert isinstance(config, Config)


@settings(max_examples=300, deadline=None)
@given(documents)
def test_any_mapping_is_accepted_or_refused(document: dict[str, Any]) -> None:
    accepted_or_refused(document)


@settings(max_examples=200, deadline=None)
@given(
    documents,
    st.sampled_from(["{}", "a: &x {}\n{}\nb: *x", "? {}\n: {}", "{}\n<<: {{seed: 1}}", "{}\nseed: 1\nseed: 2"]),
)
def test_any_yaml_is_accepted_or_refused(tmp_path_factory: pytest.TempPathFactory, document: Any, frame: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    body = "\n".join(f"{flow(key)}: {flow(value)}" for key, value in document.items())
    path.write_text(frame.replace("{}", body, 1), encoding="utf-8", errors="replace")
    accepted_or_refused(str(path))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.builds("{}={}".format, st.sampled_from(NAMES) | st.text(max_size=9), st.text(max_size=12)), max_size=3)
)
def test_any_override_is_accepted_or_refused(overrides: list[str]) -> None:
    accepted_or_refused(None, *overrides)


def test_a_file_of_nothing_but_mistakes_ends_soon() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({f"key{i}": i for i in range(5000)})
    assert 200 <= len(caught.value.problems) < 210
    assert "more mistakes" in str(caught.value)
