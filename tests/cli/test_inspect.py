"""`truthgpt inspect`: what is printed, the JSON, and the exit codes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tests.process import Cli
from tests.sample_data import BASE, CHAT_TEMPLATE, write_config, write_every_source

from truthgpt.cli.inspect import _print_samples
from truthgpt.inspect_data import InspectedToken

PAIRS = ["data.source=jsonl", "data.path=pairs.jsonl", "data.format=prompt_completion", "data.train_on=completion"]


def test_report_of_completions(cli: Cli) -> None:
    write_every_source(cli.folder)
    shown = cli("inspect", "base.yaml", *PAIRS)
    assert shown.exit_code == 0, shown.stderr
    pairs = [json.loads(line) for line in (cli.folder / "pairs.jsonl").read_text().splitlines()]
    assert "training documents               114" in shown.stdout
    assert "packing" in shown.stdout and "<- here" in shown.stdout
    assert any(f"‹{pair['prompt']}›{pair['completion']}" in shown.stdout for pair in pairs), "masked and trained"


def test_json_of_every_way(cli: Cli) -> None:
    write_every_source(cli.folder)
    found = cli("inspect", "base.yaml", *PAIRS, "--json", "--samples", "1").json
    shares = found["useful_token_share"]
    assert set(shares) == {"padding", "bucketing", "packing"}
    assert 0 < shares["padding"] < shares["packing"] <= 1
    assert found["chosen"] == "packing" and found["documents"] == 114 and found["validation_documents"] == 6
    assert 0 < found["trained_tokens"] < found["tokens"]
    assert found["overlong_rows"] > 0 and sum(bar["samples"] for bar in found["lengths"]["histogram"]) == 114
    (documents,) = found["first_samples"]
    trained = "".join(token["text"] for token in documents[0] if token["trained"])
    assert trained.startswith(" ") and not found["partial"]


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        (["data.packing=false"], "padding"),
        (["data.bucket_by_length=true"], "bucketing"),
        (["data.streaming=true"], "packing"),
    ],
)
def test_the_way_that_the_configuration_asks_for(cli: Cli, overrides: list[str], chosen: str) -> None:
    write_every_source(cli.folder)
    found = cli("inspect", "base.yaml", *PAIRS, *overrides, "--json").json
    assert found["chosen"] == chosen and found["partial"] == ("streaming" in overrides[0])


def test_joined_text_and_chats(cli: Cli) -> None:
    write_every_source(cli.folder)
    finished = cli("inspect", "base.yaml", "--json")
    joined = finished.json
    assert "longer than" not in finished.stderr
    assert joined["chosen"] == "joined" and joined["useful_token_share"]["joined"] > 0.99
    template = f"data.chat_template={json.dumps(CHAT_TEMPLATE)}"
    chat = ["data.source=jsonl", "data.path=chats.jsonl", "data.format=chat", "data.train_on=assistant", template]
    found = cli("inspect", "base.yaml", *chat, "data.max_seq_len=64", "--json").json
    assert found["problems"]["missing_eos"] == found["documents"]


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_only_where_they_are_wanted(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    token = InspectedToken("a", trained=False, special=False)
    _print_samples(SimpleNamespace(first_samples=[[[token]]], chosen="padding"))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert ("‹a›" in shown) == bool(variables) == ("green" not in shown)


def test_images_are_counted_by_class(cli: Cli) -> None:
    write_every_source(cli.folder)
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8}
    model = {"task": "image_classification", "init": "scratch", "config": {**vit, "patch_size": 4}}
    data = {"source": "image_folder", "path": "images", "collate": "cv"}
    evaluation = {"metrics": ["accuracy"], "select_best_by": "accuracy"}
    write_config(cli.folder / "images.yaml", {**BASE, "model": model, "data": data, "eval": evaluation})
    found = cli("inspect", "images.yaml", "--json").json
    assert sum(found["training_images"].values()) == 38 and sum(found["validation_images"].values()) == 2
    assert set(found["training_images"]) == {"dark", "light"}
    assert "dark" in cli("inspect", "images.yaml").stdout


def test_nothing_to_learn_is_an_error(cli: Cli) -> None:
    write_every_source(cli.folder)
    (cli.folder / "long.jsonl").write_text(('{"prompt": "' + "a" * 200 + '", "completion": "b"}\n') * 5)
    failed = cli("inspect", "base.yaml", *PAIRS, "data.path=long.jsonl")
    assert failed.exit_code == 3
    assert "0 usable rows" in failed.stderr and "no token the loss counts" in failed.stderr


def test_mistakes_of_the_configuration_come_first(cli: Cli) -> None:
    assert cli("inspect", "data.source=hf").exit_code == 2
