"""Bad input as commands: the exit code, one message a person can act on, no traceback, and nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.process import Cli, Finished
from tests.sample_data import BASE, write_sources
from truthgpt.runtime.run_directory import RunDirectory, is_run_directory

FAULTS = ("--plugin", "tests.plugins.faults")


def refused(finished: Finished, code: int, *phrases: str, lines: int = 1) -> None:
    """The command ended with `code` and `lines` lines of error that hold every phrase."""
    assert finished.exit_code == code, f"exit {finished.exit_code}\n{finished.stderr}"
    assert "Traceback" not in finished.stderr + finished.stdout
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == lines, finished.stderr
    for phrase in phrases:
        assert any(phrase in line for line in errors), f"{phrase!r} not in:\n{finished.stderr}"


def write_bad(folder: Path, text: str) -> None:
    write_sources(folder)
    (folder / "bad.yaml").write_text(text)


def digests(run: Path) -> dict[str, str]:
    """Content of every file of a run, save the lock and the log of lines, which a refused command may add to."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "run.log")]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start_run(cli: Cli, *arguments: str) -> Path:
    """A run of ten steps in `runs/t`, which a longer one may resume."""
    write_sources(cli.folder)
    finished = cli("train", "base.yaml", "training.max_steps=10", *arguments)
    assert finished.exit_code == 0, finished.stderr
    return cli.folder / "runs/t"


YAML_MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "misspelt": ("training:\n  learning_rat: 1e-3\n", ("bad.yaml:3: ", "did you mean learning_rate")),
    "unknown section": ("trainer: {}\n", ("bad.yaml:2: trainer: unknown key", "did you mean training")),
    "foreign name": (
        "training: {gradient_accumulation_steps: 4}\n",
        ("bad.yaml:2: ", "here this is training.grad_accum_steps"),
    ),
    "mistyped": ("training:\n  max_steps: many\n", ("bad.yaml:3: training.max_steps: must be an integer",)),
    "no boolean": ("ema:\n  enabled: off\n", ("bad.yaml:3: ema.enabled: must be true or false", "write false")),
    "duplicate": ("seed: 1\nseed: 2\n", ("bad.yaml:3: seed: written twice, on lines 2 and 3",)),
    "out of range": ("data: {validation_fraction: 1.5}\n", ("bad.yaml:2: ", "less than 1")),
    "nan": ("training: {learning_rate: .nan}\n", ("bad.yaml:2: training.learning_rate: ", "number")),
    "component": ("optimizer: adamv\n", ("bad.yaml:2: optimizer", "did you mean adamw")),
    "option": ("optimizer: {type: lion, eps: 1e-8}\n", ("bad.yaml:2: optimizer.eps: ", "betas")),
    "missing path": ("data: {path: null}\n", ("data.path: missing; data source text needs it",)),
    "missing plugin": ("plugins: [tests.plugins.faults]\n", ("bad.yaml:2: ", "--allow-plugins")),
    "not YAML": ("training: {max_steps: 3\n", ("bad.yaml:",)),
    # What only building can find still has its line.
    "context": ("data:\n  max_seq_len: 65\n", ("bad.yaml:3: data.max_seq_len: 65 tokens do not fit", "at most 64")),
    "model key": (
        "model:\n  config: {n_layers: 2}\n",
        ("bad.yaml:3: model.config.n_layers: ", "did you mean n_layer"),
    ),
    "vocabulary": ("model:\n  config: {vocab_size: 100}\n", ("bad.yaml:3: ", "at least 257")),
    "model type": ("model:\n  config: {model_type: gpt22}\n", ("bad.yaml:3: ", "did you mean gpt2")),
}
"""What stands below `extends: base.yaml`, and what the message says."""


@pytest.mark.parametrize("mistake", YAML_MISTAKES)
def test_configuration_mistake(cli: Cli, mistake: str) -> None:
    text, phrases = YAML_MISTAKES[mistake]
    write_bad(cli.folder, f"extends: base.yaml\n{text}")
    refused(cli("train", "bad.yaml"), 2, *phrases)
    assert not is_run_directory(cli.folder / "runs/t")


def test_tag_that_names_code(cli: Cli) -> None:
    write_bad(cli.folder, "extends: base.yaml\nseed: !!python/object/apply:os.mkdir [it_ran]\n")
    refused(cli("train", "bad.yaml"), 2, "bad.yaml:2: seed: the tag !!python/object/apply:os.mkdir", lines=2)
    assert not (cli.folder / "it_ran").exists()


def test_missing_model(cli: Cli) -> None:
    write_bad(cli.folder, "data: {source: text, path: corpus.txt}\n")
    refused(cli("train", "bad.yaml"), 2, "model.config.model_type: missing", "extends: llm_default")


def test_all_mistakes_at_once(cli: Cli) -> None:
    write_bad(
        cli.folder,
        "extends: base.yaml\nsed: 1\ntraining:\n  max_steps: -1\n  learning_rate: fast\n  max_steps: 2\n"
        "data:\n  sorce: text\neval: {metrics: [pppl]}\n",
    )
    finished = cli("train", "bad.yaml", "ema.decay=2")
    places = (
        "bad.yaml:2: sed",
        "bad.yaml:4: ",
        "bad.yaml:5: ",
        "bad.yaml:6: ",
        "bad.yaml:8: data.sorce",
        "bad.yaml:9: ",
        "ema.decay: ",
    )
    refused(finished, 2, *places, lines=len(places))


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("train", "bas.yaml"), "bas.yaml"),
        (("train", "base.yaml", "training.max_step=3"), "did you mean max_steps"),
        (("train", "base.yaml", "training.max_steps=3", "model.name_or_path=nowhere"), "nowhere"),
        (("train", "base.yaml", "--plugin", "no_such_module"), "no_such_module"),
        (("train", "base.yaml", "hardware.device=mps"), "available: "),
        (("generate", "base.yaml"), "--prompt"),
        (("eval", "model_folder"), "model_folder does not exist"),
        (("validate", "-"), "standard input is /dev/stdin"),
        (("train", "base.yaml", "hardware.device=gpu"), "here this is cuda"),
        (("train", "base.yaml", "training.mixed_precision=fp32"), "here this is none"),
    ],
)
def test_wrong_command(cli: Cli, arguments: tuple[str, ...], phrase: str) -> None:
    write_sources(cli.folder)
    refused(cli(*arguments), 2, phrase)
    assert not is_run_directory(cli.folder / "runs/t")


def test_rounding_up_stays_within_the_context(cli: Cli) -> None:
    write_sources(cli.folder)
    (cli.folder / "long.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 60}) + "\n" for i in range(20)))
    rounding = ("data.max_seq_len=64", "data.collate={type: lm, pad_to_multiple_of: 48}")
    finished = cli("train", "base.yaml", "data.source=jsonl", "data.path=long.jsonl", *rounding, "training.max_steps=1")
    assert finished.exit_code == 0, finished.stderr


def test_directory_in_use(cli: Cli) -> None:
    write_sources(cli.folder)
    with RunDirectory.claim(cli.folder / "runs/t", resume=False, overwrite=False):
        for extra in ((), ("--resume", "auto"), ("--overwrite",)):
            refused(cli("train", "base.yaml", *extra), 6, f"is in use by process {os.getpid()} on host")
    assert cli("train", "base.yaml", "training.max_steps=1").exit_code == 0


def test_directory_used_before(cli: Cli) -> None:
    run = start_run(cli)
    before = digests(run)
    refused(cli("train", "base.yaml"), 6, "--resume auto", "--overwrite")
    refused(cli("train", "base.yaml", "--resume", "never"), 6, "holds a run already")
    refused(cli("train", "base.yaml", "--resume", "auto", "--overwrite"), 6, "exclude each other")
    assert digests(run) == before


def test_directory_is_a_file(cli: Cli) -> None:
    write_sources(cli.folder)
    refused(cli("train", "base.yaml", "output_dir=corpus.txt"), 6, "corpus.txt cannot be a run directory")
    refused(cli("train", "base.yaml", "output_dir=corpus.txt/run"), 6, "corpus.txt/run cannot be a run directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_is_read_only(cli: Cli) -> None:
    write_sources(cli.folder)
    (cli.folder / "runs").mkdir(mode=0o555)
    refused(cli("train", "base.yaml"), 6, "runs/t")


def test_checkpoint_of_another_model(cli: Cli) -> None:
    run = start_run(cli)
    before = digests(run)
    model = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 16, n_positions: 64}"
    arguments = ("base.yaml", f"model.config={model}", "output_dir=other")
    in_its_run = cli("train", *arguments, "--resume", "runs/t/checkpoints/last.pt")
    refused(in_its_run, 2, "model.config.n_embd: changed since the run started: 32 -> 16")
    shutil.copytree(run / "checkpoints", cli.folder / "copied")
    refused(cli("train", *arguments, "--resume", "copied/last.pt"), 4, "of another model: ", "(257, 32)", "(257, 16)")
    assert digests(run) == before and not is_run_directory(cli.folder / "other")
    refused(cli("train", "base.yaml", "output_dir=other", "--resume", "runs/nothing"), 4, "runs/nothing does not exist")
    (cli.folder / "empty").mkdir()
    refused(cli("train", "base.yaml", "output_dir=other", "--resume", "empty"), 4, "no checkpoint in empty")


def test_all_checkpoints_damaged(cli: Cli) -> None:
    run = start_run(cli)
    checkpoints = list((run / "checkpoints").glob("*.pt"))
    for path in checkpoints:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()  # links share their bytes
        path.write_bytes(content)
    before = digests(run)
    finished = cli("train", "base.yaml", "training.max_steps=20", "--resume", "auto")
    refused(finished, 4, "no checkpoint in runs/t/checkpoints is valid", "--overwrite", lines=1 + len(checkpoints))
    assert digests(run) == before


def test_damaged_newest_checkpoint_falls_back(cli: Cli) -> None:
    run = start_run(cli, "training.eval_interval=100", "data.validation_fraction=0")
    for name in ("step_00000010.pt", "last.pt"):
        (run / "checkpoints" / name).unlink()
        (run / "checkpoints" / name).write_bytes(b"torn")
    finished = cli(
        "train", "base.yaml", "training.max_steps=12", "data.validation_fraction=0", "--resume", "auto", "--json"
    )
    assert finished.exit_code == 0, finished.stderr
    assert "step_00000010.pt" in finished.stderr and "going on with" in finished.stderr
    assert finished.json["step"] == 12


def test_changed_data_on_resume(cli: Cli) -> None:
    run = start_run(cli)
    before = digests(run)
    with (cli.folder / "corpus.txt").open("a") as file:
        file.write("one more line\n")
    finished = cli("train", "base.yaml", "training.max_steps=20", "--resume", "auto")
    refused(finished, 3, "the data is not what this run was trained on", "output_dir")
    assert digests(run) == before


@pytest.mark.parametrize(
    ("override", "phrase"),
    [
        ("seed=8", "seed: changed since the run started: 7 -> 8"),
        ("data.max_seq_len=16", "data.max_seq_len: changed since the run started: 32 -> 16"),
        ("optimizer.type=lion", "optimizer.type: changed since the run started: adamw -> lion"),
        (
            "model.tokenizer={type: bpe, vocab_size: 300}",
            "model.tokenizer.type: changed since the run started: byte -> bpe",
        ),
        ("training.grad_accum_steps=4", "samples a step changed since the run started: 8 -> 16"),
    ],
)
def test_changed_identity_on_resume(cli: Cli, override: str, phrase: str) -> None:
    run = start_run(cli)
    before = digests(run)
    finished = cli("train", "base.yaml", "training.max_steps=20", override, "--resume", "auto")
    refused(finished, 2, phrase, lines=2 if "tokenizer" in override else 1)
    assert digests(run) == before


def test_changed_rate_on_resume_is_said(cli: Cli) -> None:
    start_run(cli)
    arguments = ("training.max_steps=12", "training.learning_rate=5e-4", "training.train_batch_size=8")
    finished = cli("train", "base.yaml", *arguments, "training.grad_accum_steps=1", "--resume", "auto")
    assert finished.exit_code == 0, finished.stderr
    said = next(line for line in finished.stderr.splitlines() if "changed settings" in line)
    assert "training.learning_rate 0.001 -> 0.0005" in said and "max_steps 10 -> 12" in said


def floats_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in floats_of(item)]
    return [tensor for item in value for tensor in floats_of(item)] if isinstance(value, list | tuple) else []


def assert_all_finite(run: Path) -> None:
    """No checkpoint, and no exported weight, holds NaN or infinity."""
    paths = sorted((run / "checkpoints").glob("*.pt"))
    assert len(paths) >= 2
    for path in paths:
        payload = torch.load(path, weights_only=True)
        parts = [tensor for part in ("model", "ema", "optimizer") for tensor in floats_of(payload[part])]
        assert parts and all(torch.isfinite(tensor).all() for tensor in parts), path


@pytest.mark.parametrize("backend", ["nan", "nan_gradient"])
def test_training_that_stays_non_finite(cli: Cli, backend: str) -> None:
    """Good steps first: 4 calls of the probe, then 2 layers x 2 micro-batches a step; step 8 is the first bad one."""
    write_sources(cli.folder)
    arguments = (f"model.attention.backend={backend}", "guards.max_consecutive_skips=3", "data.validation_fraction=0")
    finished = cli("train", "base.yaml", *FAULTS, *arguments, "--json", env={"FAIL_AT_CALL": "32"})
    refused(finished, 5, "more than 3 steps in a row", "training.learning_rate")
    assert finished.json["state"] == "failed" and finished.json["exit_code"] == 5
    run = cli.folder / "runs/t"
    assert_all_finite(run)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in steps if row["step"] in (7, 8, 10)] == [0, 1, 3]
    assert steps[-1]["loss"] == ("NaN" if backend == "nan" else pytest.approx(steps[-1]["loss"]))
    # What was good is kept: the run goes on from it once the cause is gone.
    resumed = cli("train", "base.yaml", *FAULTS, *arguments, "--resume", "auto", env={"FAIL_AT_CALL": "1000000"})
    assert resumed.exit_code == 0, resumed.stderr


def test_absurd_learning_rate(cli: Cli) -> None:
    """The weights become huge and the loss NaN; what is saved stays finite all the same."""
    write_sources(cli.folder)
    arguments = ("training.learning_rate=1e30", "guards.max_consecutive_skips=2", "checkpoint.interval_steps=1")
    refused(cli("train", "base.yaml", *arguments), 5, "Lower training.learning_rate")
    assert_all_finite(cli.folder / "runs/t")


def test_anomaly_detection_names_the_operation(cli: Cli) -> None:
    """And torch shows where in the code the operation stands: the one traceback that is asked for."""
    write_sources(cli.folder)
    arguments = ("model.attention.backend=nan_gradient", "training.detect_anomaly=true")
    finished = cli("train", "base.yaml", *FAULTS, *arguments)
    assert finished.exit_code == 5, finished.stderr
    assert "error: training.detect_anomaly: Function 'MulBackward0' returned nan values" in finished.stderr
    assert "(output * 0).sqrt()" in finished.stderr


def test_out_of_memory(cli: Cli) -> None:
    write_sources(cli.folder)
    arguments = ("model.attention.backend=out_of_memory", "data.validation_fraction=0")
    finished = cli("train", "base.yaml", *FAULTS, *arguments, "--json", env={"FAIL_AT_CALL": "31"})
    refused(
        finished, 7, "step 7 ", "micro-batches of 4 x 32 labels", "training.train_batch_size", "gradient_checkpointing"
    )
    assert finished.json["exit_code"] == 7 and finished.json["step"] == 6
    resumed = cli("train", "base.yaml", *FAULTS, *arguments, "--resume", "auto", env={"FAIL_AT_CALL": "1000000"})
    assert resumed.exit_code == 0 and "resumed after step 5" in resumed.stderr


def test_plugins_of_a_file_need_permission(cli: Cli) -> None:
    write_sources(cli.folder)
    (cli.folder / "my_parts.py").write_text("open('it_ran', 'w').close()\n")
    (cli.folder / "mine.yaml").write_text(yaml.safe_dump({**BASE, "plugins": ["my_parts"]}))
    refused(cli("train", "mine.yaml", "training.max_steps=1"), 2, "my_parts", "--allow-plugins")
    assert not (cli.folder / "it_ran").exists()
    assert cli("train", "mine.yaml", "training.max_steps=1", "--allow-plugins").exit_code == 0
    assert (cli.folder / "it_ran").exists()


def test_debug_shows_the_traceback(cli: Cli) -> None:
    write_sources(cli.folder)
    finished = cli("train", "base.yaml", "data.path=nowhere", "--debug")
    assert finished.exit_code == 3 and "Traceback" in finished.stderr
