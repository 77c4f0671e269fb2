"""`truthgpt eval`: on the run's own split, on any other data, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.process import Cli, Finished
from tests.sample_data import BASE, CHAT_TEMPLATE, write_config, write_every_source
from tests.test_lora_run import write_bases
from truthgpt.errors import ConfigError
from truthgpt.evaluation_data import evaluation_data
from truthgpt.load_model import load_model

CPU = torch.device("cpu")
METRICS = "there are: accuracy, bits_per_byte, loss, ppl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of every kind, a finished run `runs/t` on text, `runs/chat` on chats, and the model folder `llama`."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_every_source(folder)
    write_bases(folder)
    (folder / "other.txt").write_text("a dog saw the queen and ran.\n" * 40)
    (folder / "template.jinja").write_text(CHAT_TEMPLATE)
    write_config(folder / "text.yaml", {**BASE, "eval": {"metrics": ["ppl"]}})
    chat = {"source": "jsonl", "path": "chats.jsonl", "format": "chat", "chat_template": "template.jinja"}
    write_config(folder / "chat.yaml", {**BASE, "output_dir": "runs/chat", "data": {**BASE["data"], **chat}})
    for config in ("text.yaml", "chat.yaml"):
        finished = Cli(folder)("train", config, "training.max_steps=4", "training.eval_interval=4")
        assert finished.exit_code == 0, finished.stderr
    return folder


@pytest.fixture
def cli(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    monkeypatch.chdir(folder)
    yield Cli(folder)


def run(cli: Cli, *arguments: str, exit_code: int = 0) -> Finished:
    finished = cli("eval", *arguments)
    assert finished.exit_code == exit_code, finished.stderr
    return finished


def reference(folder: Path, target: str, text: str, length: int) -> tuple[float, int]:
    """Mean loss in nats, and tokens, of a text and its end-of-text token in blocks, by transformers in float64."""
    loaded = load_model(folder / target, CPU)
    ids = [*text.encode(), 256]
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, length):
        block = torch.tensor([ids[start : start + length + 1]])
        with torch.no_grad():
            logits = loaded.model.double()(input_ids=block[:, :-1]).logits.double()
        total += float(torch.nn.functional.cross_entropy(logits[0], block[0, 1:], reduction="sum"))
        count += block.shape[1] - 1
    return total / count, count


@pytest.mark.parametrize("target", ["runs/t", "runs/t/checkpoints/best.pt", "runs/t/model"])
def test_all_of_another_file(cli: Cli, target: str) -> None:
    finished = run(cli, target, "data.path=other.txt", "--metrics", "loss,ppl,bits_per_byte", "--json")
    text = (cli.folder / "other.txt").read_text()
    loss, tokens = reference(cli.folder, "runs/t", text, 32)
    found = finished.json
    assert found["tokens"] == tokens, "all of it, not a held-out share"
    assert set(found["metrics"]) == {"loss", "ppl", "bits_per_byte"}
    assert found["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["metrics"]["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    bits = loss * tokens / math.log(2) / len(text.encode())
    assert found["metrics"]["bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    assert "evaluating all documents of other.txt" in finished.stderr


def test_the_runs_own_split_is_left_alone(cli: Cli) -> None:
    finished = run(cli, "runs/t", "--json")
    rows = [json.loads(line) for line in (cli.folder / "runs/t/metrics.jsonl").read_text().splitlines()]
    assert finished.json["metrics"]["loss"] == pytest.approx(rows[-1]["val_loss"], abs=1e-6)
    assert set(finished.json["metrics"]) == {"loss", "ppl"}
    assert "evaluating the validation documents of text" in finished.stderr
    smaller = run(cli, "runs/t", "data.max_seq_len=16", "--json").json
    assert smaller["tokens"] == finished.json["tokens"] and smaller["metrics"] != finished.json["metrics"]


@pytest.mark.parametrize(
    ("overrides", "said", "rows"),
    [
        (["data.source=jsonl", "data.path=rows.jsonl"], "all documents of rows.jsonl", 120),
        (["data.source=hf", "data.path=rows-0.parquet"], "all documents of rows-0.parquet", 40),
        (
            ["data.source=hf", "data.path=rows-0.parquet", "data.split=train[:50%]"],
            "all documents of rows-0.parquet",
            20,
        ),
        (["data.source=webdataset", "data.path=shards"], "all documents of shards", 120),
        (
            ["data.source=jsonl", "data.path=chats.jsonl", "data.format=chat", "data.chat_template=template.jinja"],
            "",
            0,
        ),
        (
            ["data.sources=[{source: jsonl, path: rows.jsonl}, {source: text, path: texts}]"],
            "all documents of rows.jsonl, texts",
            0,
        ),
        (["data.source=python_stdlib"], "the validation documents of python_stdlib", 0),
        (["data.source=jsonl", "data.path=rows.jsonl", "data.validation_fraction=0.1"], "the validation documents", 0),
        (["data.validation_path=other.txt"], "the validation documents of text", 0),
    ],
)
def test_any_source(cli: Cli, overrides: list[str], said: str, rows: int) -> None:
    finished = run(cli, "runs/t", *overrides, "--json")
    assert said in finished.stderr and math.isfinite(finished.json["metrics"]["loss"])
    if rows:
        texts = [json.loads(line)["text"] for line in (cli.folder / "rows.jsonl").read_text().splitlines()]
        chosen = texts if rows == 120 else texts[0::3][:rows]
        assert finished.json["tokens"] == sum(min(len(text), 32) for text in chosen)


def test_what_describes_the_runs_source_goes_with_it(cli: Cli) -> None:
    """`format: chat` is of the run's source; another one that has rows keeps it, one that has none does not."""
    texts = run(cli, "runs/chat", "data.source=text", "data.path=other.txt", "--json").json
    assert texts["tokens"] == len((cli.folder / "other.txt").read_text())
    (cli.folder / "more.jsonl").write_text((cli.folder / "chats.jsonl").read_text())
    chats = run(cli, "runs/chat", "data.path=more.jsonl", "--json").json
    data = evaluation_data(Path("runs/chat"), None, ["data.path=more.jsonl"]).config.data
    assert data.format == "chat" and data.validation_path == ["more.jsonl"] and data.chat_template is None
    assert chats["tokens"] > 10 * run(cli, "runs/chat", "--json").json["tokens"]
    (cli.folder / "template.jinja").rename(cli.folder / "gone.jinja")
    try:
        assert run(cli, "runs/chat", "data.path=more.jsonl", "--json").json == chats, "the tokenizer has the template"
    finally:
        (cli.folder / "gone.jinja").rename(cli.folder / "template.jinja")


def test_another_chat_template_is_used(cli: Cli) -> None:
    marked = "{% for m in messages %}[[[{{ m.role }}]]]{{ m.content }}\n{% endfor %}"
    base = ("runs/chat", "data.path=chats.jsonl", "data.max_seq_len=64")
    own = run(cli, *base, "--json").json
    assert run(cli, *base, f"data.chat_template={json.dumps(marked)}", "--json").json != own


@pytest.mark.parametrize(
    ("target", "path", "source"),
    [
        ("runs/t", "rows.jsonl", "jsonl"),
        ("runs/t", "rows-0.parquet", "hf"),
        ("runs/t", "other.txt", "text"),
        ("runs/chat", "chats.jsonl", "jsonl"),
    ],
)
def test_rows_are_not_read_as_text(cli: Cli, target: str, path: str, source: str) -> None:
    """A run on text is evaluated on the texts of rows, not on their braces."""
    config = evaluation_data(Path(target), None, [f"data.path={path}"]).config.data
    assert config.source.type == source and config.validation_path == [path]
    assert evaluation_data(Path(target), None, [f"data.path={path}", f"data.source={source}"]).config.data == config


@pytest.mark.parametrize(
    ("path", "source"),
    [("other.txt", "text"), ("rows.jsonl", "jsonl"), ("rows.jsonl.gz", "jsonl"), ("rows-0.parquet", "hf")],
)
def test_model_folder_needs_a_path_alone(cli: Cli, path: str, source: str) -> None:
    finished = run(cli, "llama", f"data.path={path}", "data.num_workers=0", "--json")
    assert f"data.source is {source}, by the name of {path}" in finished.stderr
    assert "data.max_seq_len is 64, the positions that the model has" in finished.stderr
    assert set(finished.json["metrics"]) == {"loss", "ppl", "bits_per_byte"}
    if source == "text":
        loss, tokens = reference(cli.folder, "llama", (cli.folder / path).read_text(), 64)
        assert finished.json["tokens"] == tokens
        assert finished.json["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "phrase"),
    [
        (("llama",), 2, "llama lies in no run directory: name what to evaluate it on, data.path=FILE"),
        (("llama", "data.path=other.txt", "data.max_seq_len=65"), 2, "data.max_seq_len: 65 is more than the 64 pos"),
        (("runs/t", "model.init=auto"), 2, "model.init: is not read by eval (eval reads data, hardware and"),
        (("runs/t", "training.max_steps=3"), 2, "training.max_steps: is not read by eval"),
        (("runs/t", "data.pth=x"), 2, "did you mean path?"),
        (("runs/t", "data.source=jsonl"), 2, "data.path: missing; data source jsonl needs it"),
        (("runs/t", "data.path=nowhere.txt"), 3, "nowhere.txt"),
        (
            ("runs/t", "--metrics", "pppl"),
            2,
            f"error: --metrics: no metric is called 'pppl'; {METRICS} (did you mean ppl?)",
        ),
        (("runs/t", "--metrics", "loss,bits"), 2, f"error: --metrics: no metric is called 'bits'; {METRICS}"),
        (("runs/t", "eval.metrics=[bits]"), 2, f"error: eval.metrics[0]: no metric is called 'bits'; {METRICS}"),
        (("runs/t", "--metrics", "loss,,ppl"), 2, "--metrics 'loss,,ppl': give names with commas between them"),
        (("runs/t", "--include-path", "tasks"), 2, "--include-path and --allow-task-code are read with --tasks only"),
    ],
)
def test_what_is_refused(cli: Cli, arguments: tuple[str, ...], code: int, phrase: str) -> None:
    refused = run(cli, *arguments, exit_code=code).stderr
    assert phrase in refused and refused.splitlines()[-1].startswith("error: "), refused


def test_images_of_another_folder(cli: Cli) -> None:
    settings: dict[str, Any] = {
        "model": {
            "task": "image_classification",
            "config": {
                **{"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
                **{"image_size": 8, "intermediate_size": 8, "patch_size": 4},
            },
        },
        "data": {"source": "image_folder", "path": "images", "collate": "cv", "num_workers": 0},
        "eval": {"metrics": ["accuracy"], "select_best_by": "accuracy"},
        "output_dir": "runs/images",
    }
    write_config(cli.folder / "images.yaml", {**BASE, **settings})
    assert cli("train", "images.yaml", "training.max_steps=2", "training.eval_interval=2").exit_code == 0
    found = run(cli, "runs/images", "data.path=images", "--json").json
    assert found["tokens"] == 40 and set(found["metrics"]) == {"loss", "accuracy"}
    refused = run(cli, "runs/images", "--metrics", "accuracy,bits_per_byte", exit_code=2).stderr
    assert "error: --metrics: bits_per_byte is for text (use accuracy or loss)" in refused
    refused = run(cli, "runs/images", "--tasks", "x", exit_code=2).stderr
    assert "runs/images is a ViTForImageClassification, and tasks are for text" in refused


def test_a_mistake_of_the_file_keeps_its_place_beside_other_metrics(tmp_path: Path) -> None:
    """What `--metrics` replaces is nobody's mistake any more; the rest of the file still is the file's."""
    (tmp_path / "config.yaml").write_text("eval: {metrics: [bits]}\ntraining: {max_steps: many}\n")
    with pytest.raises(ConfigError) as refused:
        evaluation_data(tmp_path, None, ["data.path=x"], ["nll"])
    places = {problem.key: (problem.line, "nll" in problem.message) for problem in refused.value.problems}
    assert places["--metrics"] == (None, True) and places["training.max_steps"] == (2, False)
    assert not any(key.startswith("eval") for key in places)


def test_only_what_is_read_can_be_changed() -> None:
    with pytest.raises(ConfigError) as refused:
        evaluation_data(Path("runs/t"), "llm_default", ["seed=3", "optimizer.lr=1", "data.path=x"])
    assert [problem.key for problem in refused.value.problems] == ["seed", "optimizer.lr"]
