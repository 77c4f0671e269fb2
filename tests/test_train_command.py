"""`truthgpt train` and what comes after it: the run directory, resuming, stopping, generating, evaluating."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.process import Cli, Finished
from tests.sample_data import CHAT_TEMPLATE, write_sources
from tests.test_build import small_config

SHORT = ("training.max_steps=10", "training.eval_interval=5")


@pytest.fixture
def base(cli: Cli) -> Cli:
    """The `cli` in a folder with data and `base.yaml`."""
    write_sources(cli.folder)
    return cli


def train(cli: Cli, *arguments: str) -> Finished:
    finished = cli("train", "base.yaml", *arguments)
    assert finished.exit_code == 0, finished.stderr
    return finished


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run) if "loss" in row]


def eval_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run) if "val_loss" in row]


def test_run_directory_and_json(base: Cli) -> None:
    finished = train(base, *SHORT, "--json")
    run = base.folder / "runs/t"
    status = finished.json
    assert status == json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["max_steps"], status["exit_code"]) == ("complete", 10, 10, 0)
    last = eval_rows(run)[-1]
    assert status["best_metric"] == last["best_metric"]
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    checkpoints = {
        f"checkpoints/{name}.{kind}"
        for name in ("step_00000005", "step_00000010", "last", "best")
        for kind in ("pt", "json")
    }
    files = {"config.yaml", "environment.json", "status.json", "metrics.jsonl", "run.log", ".lock"}
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert files | checkpoints | {f"model/{name}" for name in model} <= found
    assert found <= files | checkpoints | {name for name in found if name.startswith("model/")}
    assert not [name for name in found if "tmp" in name]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["fallbacks"] == []
    assert "10 steps" in (run / "run.log").read_text() or "complete" in finished.stderr
    for name in ("last", "best"):
        manifest = json.loads((run / f"checkpoints/{name}.json").read_text())
        step = json.loads((run / f"checkpoints/step_{manifest['step']:08d}.json").read_text())
        assert manifest.keys() == {"step", "sha256"} and manifest["sha256"] == step["sha256"]
        assert (run / f"checkpoints/{name}.pt").samefile(run / f"checkpoints/step_{manifest['step']:08d}.pt")


def test_resolved_config_trains_the_same_again(base: Cli) -> None:
    train(base, *SHORT)
    resolved = base.folder / "runs/t/config.yaml"
    assert "# base.yaml:" in resolved.read_text() and "# command line" in resolved.read_text()
    finished = base("train", str(resolved), "output_dir=again")
    assert finished.exit_code == 0, finished.stderr
    assert [r["loss"] for r in log_rows(base.folder / "again")] == [r["loss"] for r in log_rows(base.folder / "runs/t")]


def test_metrics_rows(base: Cli) -> None:
    train(
        base,
        "training.max_steps=11",
        "training.eval_interval=4",
        "training.log_interval=3",
        "eval.metrics=[ppl, bits_per_byte]",
    )
    run = base.folder / "runs/t"
    assert [row["step"] for row in log_rows(run)] == [1, 3, 6, 9, 11]
    assert [row["step"] for row in eval_rows(run)] == [4, 8, 11]
    for row in log_rows(run):
        assert {"step", "loss", "tokens_per_sec", "lr", "grad_norm", "epoch", "tokens", "skipped_steps"} <= row.keys()
        assert row["tokens_per_sec"] > 0 and row["tokens"] == row["step"] * 8 * 32
    for row in eval_rows(run):
        assert row.keys() == {"step", "val_loss", "ppl", "bits_per_byte", "best_metric"}
        assert row["best_metric"] == min(r["ppl"] for r in eval_rows(run) if r["step"] <= row["step"])
        assert row["ppl"] == pytest.approx(2.718281828 ** row["val_loss"], rel=1e-6)


def test_log_window_is_the_mean_of_its_steps(base: Cli) -> None:
    train(base, "training.max_steps=6", "training.log_interval=1")
    train(base, "training.max_steps=6", "training.log_interval=3", "output_dir=wide")
    each = [row["loss"] for row in log_rows(base.folder / "runs/t")]
    wide = {row["step"]: row["loss"] for row in log_rows(base.folder / "wide")}
    assert wide == pytest.approx({1: each[0], 3: sum(each[1:3]) / 2, 6: sum(each[3:6]) / 3}, rel=1e-6)


def test_loss_falls(base: Cli) -> None:
    train(base, "training.max_steps=40")
    losses = [row["loss"] for row in log_rows(base.folder / "runs/t")]
    assert losses[0] > 5 and losses[-1] < losses[0] - 1


def test_already_complete(base: Cli) -> None:
    train(base, *SHORT)
    run = base.folder / "runs/t"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock" and path.is_file()}
    for extra in ((), ("training.max_steps=8",)):
        finished = train(base, *SHORT, *extra, "--resume", "auto", "--json")
        assert "already complete" in finished.stderr
        assert finished.json["state"] == "complete"
    for extra, code, phrase in (
        (("seed=9", "--resume", "auto"), 2, "seed: changed since the run started"),
        (("--resume", "nowhere"), 4, "nowhere does not exist; give a checkpoint"),
    ):
        finished = base("train", "base.yaml", *SHORT, *extra)
        assert finished.exit_code == code and phrase in finished.stderr, finished.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(("fraction", "named"), [("0.1", True), ("0", False)])
def test_next_is_what_can_be_typed(base: Cli, fraction: str, named: bool) -> None:
    """Nothing was held out: there is no split to evaluate on."""
    for resume in ((), ("--resume", "auto")):
        finished = train(base, *SHORT, f"data.validation_fraction={fraction}", *resume)
        _, _, commands = finished.stderr.partition("Next:")
        assert "truthgpt generate runs/t" in commands and ("truthgpt eval runs/t" in commands) is named


def test_next_for_a_model_of_chats_is_to_talk_with_it(base: Cli) -> None:
    turns = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    (base.folder / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 40)
    common = (f"data.chat_template={json.dumps(CHAT_TEMPLATE)}", "data.validation_fraction=0")
    alone = ("data.source=jsonl", "data.path=chats.jsonl", "data.format=chat")
    mixed = (
        "data={sources: [{source: jsonl, path: chats.jsonl, format: chat}, {source: text, path: corpus.txt}]}",
        "data.max_seq_len=32",
    )
    for data in (alone, mixed):
        finished = train(base, *data, *common, "data.packing=false", "training.max_steps=1", "--overwrite")
        _, _, commands = finished.stderr.partition("Next:")
        assert "truthgpt chat runs/t " in commands and "truthgpt generate" not in commands
        assert "1 steps of up to 256 tokens" in finished.stderr  # rows are padded here


def test_next_can_be_typed_where_no_environment_is_activated(base: Cli) -> None:
    """`make train` calls the program by its path, which is not among those the shell looks through."""
    program = base.folder / "my env/truthgpt"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom truthgpt.cli.start import main\nmain()\n")
    program.chmod(0o755)
    for path, name in (("/usr/bin:/bin", "'my env/truthgpt'"), (f"{program.parent}:/usr/bin:/bin", "truthgpt")):
        command = ["my env/truthgpt", "train", "base.yaml", "training.max_steps=1", "--overwrite"]
        finished = subprocess.run(
            command, cwd=base.folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
        )
        assert f"\n  {name} generate runs/t" in finished.stderr, finished.stderr


def test_resume_without_checkpoints_says_so(base: Cli) -> None:
    finished = train(base, "training.max_steps=2", "--resume", "auto")
    assert "no checkpoint to resume from: starting fresh" in finished.stderr


def test_overwrite_moves_the_old_run_aside(base: Cli) -> None:
    train(base, *SHORT)
    train(base, "training.max_steps=2", "--overwrite")
    (aside,) = (base.folder / "runs").glob("t.old-*")
    assert (aside / "checkpoints/step_00000010.pt").is_file()
    assert [row["step"] for row in log_rows(base.folder / "runs/t")] == [1, 2]


def test_resume_to_more_steps(base: Cli) -> None:
    train(base, "training.max_steps=10", "training.scheduler=constant", "training.warmup_ratio=0.0")
    arguments = ("training.max_steps=14", "training.scheduler=constant", "training.warmup_ratio=0.0")
    finished = train(base, *arguments, "--resume", "auto", "--json")
    assert finished.json["step"] == 14
    train(base, *arguments, "output_dir=straight")
    long, straight = (log_rows(base.folder / name) for name in ("runs/t", "straight"))
    assert [row["loss"] for row in long] == [row["loss"] for row in straight]


def test_resume_keys_of_the_yaml_and_never(base: Cli) -> None:
    train(base, "training.max_steps=5")
    train(base, "training.max_steps=6", "resume.enabled=true")
    checkpoint = base.folder / "runs/t/checkpoints/step_00000005.pt"
    enabled = f"resume={{enabled: true, checkpoint_dir: {checkpoint}}}"
    finished = train(base, "training.max_steps=7", enabled, "output_dir=branch")
    assert "resumed after step 5" in finished.stderr
    assert base("train", "base.yaml", "training.max_steps=8", "resume.enabled=true", "--resume", "never").exit_code == 6


def test_a_checkpoint_of_a_run_that_was_another_is_refused(base: Cli) -> None:
    """It is compared with its own run, which is not in this one's directory."""
    train(base, "training.max_steps=5")
    checkpoint = str(base.folder / "runs/t/checkpoints/step_00000005.pt")
    for change in ("seed=8", "model.config.activation_function=relu"):
        more = ("training.max_steps=6", "output_dir=branch", change)
        refused = base("train", "base.yaml", *more, "--resume", checkpoint)
        assert refused.exit_code == 2 and "changed since the run started" in refused.stderr, refused.stderr
    assert "resuming with changed settings: training.max_steps 5 -> 6" in (
        train(base, "training.max_steps=6", "output_dir=branch", "--resume", checkpoint).stderr
    )


@pytest.mark.parametrize("name", ["status.json", "config.yaml"])
def test_a_finished_run_with_a_lost_document_goes_on(base: Cli, name: str) -> None:
    train(base, "training.max_steps=2")
    run = base.folder / "runs/t"
    (run / "status.json").write_text("{}") if name == "status.json" else (run / name).unlink()
    train(base, "training.max_steps=2", "--resume", "auto")
    assert json.loads((run / "status.json").read_text())["state"] == "complete" and (run / "config.yaml").is_file()


def test_a_run_older_than_a_key_is_complete_all_the_same(base: Cli) -> None:
    train(base, "training.max_steps=2")
    config = base.folder / "runs/t/config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if "max_time_s" not in line))
    assert "already complete" in train(base, "training.max_steps=2", "--resume", "auto").stderr


def test_a_damaged_configuration_is_named(base: Cli) -> None:
    train(base, "training.max_steps=2")
    config = base.folder / "runs/t/config.yaml"
    whole = config.read_text()
    for damaged in (whole.partition("\ntraining:")[0], re.sub("train_batch_size: .*", "train_batch_size:", whole)):
        config.write_text(damaged)
        refused = base("train", "base.yaml", "training.max_steps=3", "--resume", "auto")
        assert refused.exit_code == 2 and "config.yaml is damaged" in refused.stderr, refused.stderr


def test_json_of_a_resume_that_fails_before_it_begins(base: Cli) -> None:
    """The status that stands in the directory is of the run before, which ended well."""
    train(base, "training.max_steps=2")
    (base.folder / "corpus.txt").write_text("Another text.\n" * 300)
    refused = base("train", "base.yaml", "training.max_steps=4", "--resume", "auto", "--json")
    assert refused.exit_code == 3 and refused.stdout == ""
    assert json.loads((base.folder / "runs/t/status.json").read_text())["state"] == "complete"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupt_before_the_run_begins_ends_it_at_once_and_leaves_the_directory_unused(
    base: Cli, name: str, lost: bool
) -> None:
    """Not at once where a library loses it; the directory is unused all the same."""
    broken_off = f"    os.kill(os.getpid(), signal.{name})\n"
    caught = f"    try:\n    {broken_off}    except KeyboardInterrupt:\n        return torch.optim.SGD(params, lr)\n"
    (base.folder / "slow_parts.py").write_text(
        "import os, signal, torch\nfrom truthgpt.factories.optimizer import OPTIMIZERS\n\n"
        "@OPTIMIZERS.register('slow')\ndef build_slow(params, lr):\n"
        f"{caught if lost else broken_off}    raise AssertionError('it went on')\n"
    )
    stopped = base("train", "base.yaml", "--plugin", "slow_parts", "optimizer.type=slow", "--json")
    assert (stopped.exit_code, stopped.stdout) == (143, ""), stopped.stderr
    assert stopped.stderr.endswith("interrupted\n") and "finishing the step" not in stopped.stderr
    train(base, "training.max_steps=1")


def test_early_stopping(base: Cli) -> None:
    """A learning rate of nearly nothing: with ppl equal to seven digits no evaluation is better for long."""
    arguments = ("training.early_stopping_patience=2", "training.eval_interval=3", "training.log_interval=100")
    finished = train(base, *arguments, "training.learning_rate=1e-30", "ema.enabled=false", "--json")
    run = base.folder / "runs/t"
    status = finished.json
    assert (status["state"], status["exit_code"], status["step"]) == ("complete", 0, 9)
    assert "early_stopping_patience" in status["message"]
    assert log_rows(run)[-1]["step"] == 9 and (run / "checkpoints/step_00000009.pt").is_file()
    assert (run / "model/model.safetensors").is_file()
    assert status["best_step"] == 3
    assert (
        "already complete"
        in train(base, *arguments, "training.learning_rate=1e-30", "ema.enabled=false", "--resume", "auto").stderr
    )


@pytest.mark.parametrize(("limit", "step"), [("training.max_tokens=1000", 4), ("training.max_time_s=0.000001", 1)])
def test_limits(base: Cli, limit: str, step: int) -> None:
    finished = train(base, limit, "training.log_interval=100", "--json")
    run = base.folder / "runs/t"
    assert finished.json["step"] == step and finished.json["state"] == "complete"
    assert limit.partition("=")[0] in finished.json["message"]
    assert log_rows(run)[-1]["step"] == eval_rows(run)[-1]["step"] == step
    assert (run / f"checkpoints/step_{step:08d}.pt").is_file() and (run / "model/model.safetensors").is_file()


def test_samples_are_shown(base: Cli) -> None:
    arguments = (
        "training.max_steps=4",
        "training.eval_interval=2",
        "generate.prompts=[the cat]",
        "generate.max_new_tokens=5",
    )
    finished = train(base, *arguments)
    assert finished.stderr.count("> the cat") == 2
    again = train(base, *arguments, "output_dir=again")
    samples = [[line for line in f.stderr.splitlines() if "> the cat" in line] for f in (finished, again)]
    assert samples[0] == samples[1]


def generated(cli: Cli, target: str, *extra: str) -> list[dict[str, Any]]:
    arguments = ("--prompt", "the ", "--prompt", "a king", "--max-new-tokens", "12", "--temperature", "0", "--json")
    finished = cli("generate", target, *arguments, *extra)
    assert finished.exit_code == 0, finished.stderr
    result: list[dict[str, Any]] = finished.json
    return result


def test_generate_and_eval_say_what_the_run_said(base: Cli) -> None:
    """Run, checkpoint and model folder are one model: the averaged weights of best.pt."""
    train(base, *SHORT, "eval.metrics=[ppl, bits_per_byte]")
    run = base.folder / "runs/t"
    first = generated(base, "runs/t")
    assert [g["prompt"] for g in first] == ["the ", "a king"] and all(len(g["token_ids"]) == 12 for g in first)
    for target in ("runs/t/model", "runs/t/checkpoints/best.pt", "runs/t/checkpoints/step_00000010.pt"):
        assert generated(base, target) == first
    assert generated(base, "runs/t", "--kv-cache", "none") == first
    last = eval_rows(run)[-1]
    assert last["best_metric"] == last["ppl"], "the last evaluation must be the best for the comparison below"
    for target in ("runs/t", "runs/t/model", "runs/t/checkpoints/best.pt"):
        finished = base("eval", target, "--json")
        assert finished.exit_code == 0, finished.stderr
        metrics = finished.json["metrics"]
        assert metrics["loss"] == pytest.approx(last["val_loss"], abs=1e-6)
        assert metrics["bits_per_byte"] == pytest.approx(last["bits_per_byte"], abs=1e-6)
        assert finished.json["tokens"] > 100
    elsewhere = base("eval", "runs/t/model", "--config", "base.yaml", "data.validation_fraction=0.5", "--json")
    assert elsewhere.exit_code == 0 and elsewhere.json["tokens"] > 2 * finished.json["tokens"]


def test_generate_from_a_prompts_file_and_an_unfinished_run(base: Cli) -> None:
    train(base, *SHORT)
    (base.folder / "prompts.txt").write_text("the \n\na king\n")
    (base.folder / "runs/t/model/model.safetensors").unlink()
    finished = base("generate", "runs/t", "--prompts", "prompts.txt", "--max-new-tokens", "3", "--json")
    assert finished.exit_code == 0 and len(finished.json) == 2
    plain = base("generate", "runs/t", "--prompt", "the ", "--max-new-tokens", "3", "--temperature", "0")
    assert plain.exit_code == 0 and plain.stdout.startswith("the ")


@pytest.mark.parametrize("ema", ["true", "false"])
def test_exported_model_is_best_checkpoint(base: Cli, ema: str) -> None:
    train(base, *SHORT, f"ema.enabled={ema}")
    run = base.folder / "runs/t"
    payload = torch.load(run / "checkpoints/best.pt", weights_only=True)
    assert bool(payload["ema"]) == (ema == "true")
    model = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=False)
    expected = {**payload["model"], **payload["ema"]}
    for name, weight in model.state_dict().items():
        source = "transformer.wte.weight" if name == "lm_head.weight" else name  # tied
        assert torch.equal(weight, expected[source]), name
    tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=False)
    assert tokenizer("the cat").input_ids == list(b"the cat")
    assert model.config.vocab_size == 257 and model.generation_config.eos_token_id == 256


def test_weights_as_pytorch_file(base: Cli) -> None:
    train(base, *SHORT, "training.save_safetensors=false")
    train(base, *SHORT, "output_dir=other")
    run = base.folder / "runs/t"
    assert (run / "model/pytorch_model.bin").is_file() and not (run / "model/model.safetensors").exists()
    assert torch.load(run / "model/pytorch_model.bin", weights_only=True)
    assert generated(base, "runs/t") == generated(base, "other")


def test_best_is_an_earlier_step(base: Cli) -> None:
    """The rate explodes after the first evaluation: model/ holds best.pt, not the last step."""
    arguments = (
        "training.learning_rate=1.0",
        "training.warmup_ratio=0.5",
        "training.eval_interval=1",
        "ema.enabled=false",
    )
    finished = train(base, "training.max_steps=8", "training.max_grad_norm=null", *arguments, "--json")
    best = finished.json["best_step"]
    assert best < 8
    run = base.folder / "runs/t"
    weights = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=False).state_dict()
    payload = torch.load(run / "checkpoints/best.pt", weights_only=True)
    assert payload["state"]["step"] == best
    assert torch.equal(weights["transformer.wpe.weight"], payload["model"]["transformer.wpe.weight"])


def test_runs_list(base: Cli) -> None:
    train(base, "training.max_steps=2")
    train(base, "training.max_steps=3", "output_dir=runs/second")
    finished = base("runs", "list", "--json")
    assert {(row["name"], row["state"], row["step"]) for row in finished.json} == {
        ("t", "complete", 2),
        ("second", "complete", 3),
    }


def test_two_epochs(base: Cli) -> None:
    epochs = ("training.max_steps=null", "training.epochs=2", "data.source=jsonl", "data.path=rows.jsonl")
    finished = train(base, *epochs, "data.validation_fraction=0.1", "data.packing=false", "--json")
    steps = -(-108 // 8)  # 120 rows, 12 of them held out, 8 a step; the last step of an epoch is smaller
    assert finished.json["step"] == finished.json["max_steps"] == 2 * steps
    last = log_rows(base.folder / "runs/t")[-1]
    assert last["epoch"] == 2.0
    payload = torch.load(base.folder / "runs/t/checkpoints/last.pt", weights_only=True)
    assert payload["state"]["samples"] == 2 * 108 and payload["state"]["epoch"] == 1


def test_no_validation_split(base: Cli) -> None:
    finished = train(base, *SHORT, "data.validation_fraction=0", "--json")
    assert finished.json["best_metric"] is None and eval_rows(base.folder / "runs/t") == []
    assert generated(base, "runs/t")
    assert not (base.folder / "runs/t/checkpoints/best.pt").exists()


def test_next_commands_work(base: Cli) -> None:
    finished = base("train", "base.yaml", *SHORT, "output_dir=~/my runs/t", env={"HOME": str(base.folder)})
    assert (base.folder / "my runs/t/model").is_dir(), finished.stderr
    commands = [shlex.split(line)[1:] for line in finished.stderr.splitlines() if line.startswith("  truthgpt ")]
    assert len(commands) == 3
    assert base(*commands[0][:2], "--prompt", "def ", "--max-new-tokens", "2").exit_code == 0
    assert base(*commands[1][:2]).exit_code == 0 and base(*commands[2][:2]).exit_code == 0


def test_python_says_the_same(tmp_path: Path) -> None:
    """The five lines of the documentation, without the command line."""
    import truthgpt

    assert set(truthgpt.__all__) <= set(dir(truthgpt)), "what an interactive Python completes"
    torch.set_num_threads(1)
    config = small_config(tmp_path, *SHORT)
    components = truthgpt.build_components(config)
    trainer = truthgpt.build_trainer(config, components)
    state = trainer.train()
    assert state.step == 10 and state.best_metric is not None
    assert (tmp_path / "runs/t/model/model.safetensors").is_file()
    longer = small_config(tmp_path, "training.max_steps=12", "resume.enabled=true")
    again = truthgpt.build_trainer(longer, truthgpt.build_components(longer))
    assert again.state.step == 10, "the first trainer must have let go of the directory"
    assert again.train().step == 12
