"""What the documentation says, done: its files written, its commands run, its links followed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.process import Cli, Finished
from tests.sample_data import write_sources
from truthgpt.config.load import preset_names
from truthgpt.validate_config import load_config

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^<!-- (?:file: (?P<name>\S+)|run(?P<exact>, exact)?(?:, exit (?P<exit>\d+))?) -->\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
)
FINE_TUNING = ("finetune", "lora_fast", "performance_max")
"""Presets that need a model and data."""
RUNNABLE = [page for page in PAGES if FENCE.search((ROOT / page).read_text(encoding="utf-8"))]
CONFIGS = sorted(
    path.relative_to(ROOT)
    for folder in ("src/truthgpt/configs", "examples")
    for path in (ROOT / folder).rglob("*.yaml")
)


@dataclass
class Command:
    """A command with its arguments, and the lines that the page shows below it."""

    words: list[str]
    output: list[str]


@dataclass(frozen=True)
class Block:
    """A marked block: a file to write, or (no name) commands to run, which end with `exit_code`.

    With `exact`, every line that the page shows is a line the command prints; `...` stands for anything.
    """

    name: str | None
    text: str
    exact: bool
    exit_code: int

    @property
    def commands(self) -> list[Command]:
        """The `truthgpt` and `python` commands, with or without a prompt sign; other lines are output."""
        found: list[Command] = []
        for line in self.text.splitlines():
            words = line.removeprefix("$ ")
            if words.startswith(("truthgpt ", "python ")):
                found.append(Command(shlex.split(words, comments=True), []))
            elif found and line not in ("", "..."):
                found[-1].output.append(line)
        return found


def blocks_of(page: Path) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(match["name"], match["text"], match["exact"] is not None, int(match["exit"] or 0))
        for match in FENCE.finditer(text)
    ]
    marks = len(re.findall(r"^<!-- (?:file: |run)", text, re.MULTILINE))
    assert len(found) == marks, f"{page}: a mark without its block"
    return found


@pytest.mark.parametrize("page", RUNNABLE, ids=str)
def test_page_runs_as_written(cli: Cli, page: Path) -> None:
    write_sources(cli.folder)
    (cli.folder / "my.txt").write_text("\n".join((ROOT / each).read_text(encoding="utf-8") for each in PAGES))
    (cli.folder / "train.jsonl").write_text((cli.folder / "rows.jsonl").read_text())
    ran = 0
    for block in blocks_of(page):
        if block.name is not None:
            target = cli.folder / block.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
            continue
        assert block.commands, f"{page}: nothing to run in\n{block.text}"
        for command in block.commands:
            finished = run(cli, command.words)
            said = f"{shlex.join(command.words)}\n{finished.stdout}{finished.stderr}"
            assert finished.exit_code == block.exit_code, said
            if block.exact:
                printed = [line.rstrip() for line in said.splitlines()]
                assert [line for line in command.output if not any(shows(line, each) for each in printed)] == [], said
            ran += 1
    assert ran


def shows(line: str, printed: str) -> bool:
    """Whether `line` of a page is the `printed` one; `...` in it stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, line.rstrip().split("..."))), printed) is not None


def run(cli: Cli, words: list[str]) -> Finished:
    """A `truthgpt` command, or `python FILE` with the Python of the tests, in the folder of `cli`."""
    if words[0] == "truthgpt":
        return cli(*words[1:])
    command = [sys.executable, *words[1:]]
    finished = subprocess.run(command, cwd=cli.folder, capture_output=True, text=True, timeout=60)
    return Finished(finished.returncode, finished.stdout, finished.stderr)


def test_extending_shows_the_three_promised_snippets() -> None:
    files = {block.name: block.text for block in blocks_of(Path("docs/extending.md")) if block.name is not None}
    promised = [  # as the plan gives them, one line a builder
        '@ATTENTION_BACKENDS.register("mi_backend")\ndef build_mi_backend(): return mi_attention_function\n',
        '@OPTIMIZERS.register("mi_optimizer")\n'
        "def build_mi_optimizer(params, lr, **kwargs): return MiOptimizer(params, lr=lr)\n",
        '@CALLBACKS.register("mi_callback")\ndef build_mi_callback(**kwargs): return MiCallback(**kwargs)\n',
    ]
    for snippet in promised:
        assert any(snippet in text for text in files.values()), snippet
    yaml_text = "".join(text for name, text in files.items() if name.endswith(".yaml"))
    assert all(name in yaml_text for name in ("mi_backend", "mi_optimizer", "mi_callback"))


def test_components_of_the_documentation_do_their_work(cli: Cli) -> None:
    """Each snippet alone, in the smallest run; the callback's state survives a resume."""
    write_sources(cli.folder)
    for block in blocks_of(Path("docs/extending.md")):
        if block.name is not None and block.name.endswith(".py"):
            (cli.folder / block.name).write_text(block.text)
    plugins = ("--plugin", "my_backend", "--plugin", "my_optimizer", "--plugin", "my_callback")
    use = ("model.attention.backend=mi_backend", "optimizer.type=mi_optimizer", "training.callbacks=[mi_callback]")
    first = cli("train", "base.yaml", *plugins, *use, "training.max_steps=5")
    assert first.exit_code == 0, first.stderr
    assert "mi_callback saw 5 steps" in first.stdout
    second = cli("train", "base.yaml", *plugins, *use, "training.max_steps=8", "--resume", "auto")
    assert second.exit_code == 0, second.stderr
    assert "mi_callback saw 8 steps" in second.stdout
    # The backend computes what sdpa computes: the same losses in a run without dropout.
    losses = []
    model = (
        "model.config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 4, num_key_value_heads: 2}"
    )
    for backend in ("mi_backend", "sdpa"):
        command = ("train", "base.yaml", *plugins, model, f"model.attention.backend={backend}", "training.max_steps=3")
        finished = cli(*command, f"output_dir={backend}")
        assert finished.exit_code == 0, finished.stderr
        losses.append(re.findall(r"loss (\d+\.\d+)", finished.stderr))
    assert losses[0] == losses[1] and len(losses[0]) >= 3


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_valid(name: str) -> None:
    needed = ("model.name_or_path=gpt2", "data.path=train.jsonl") if name in FINE_TUNING else ()
    assert load_config(name, needed).seed == 42


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_shipped_yaml_is_valid(cli: Cli, path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    needed = ["model.name_or_path=gpt2", "data.path=train.jsonl"] if path.stem in FINE_TUNING else []
    plugins = re.findall(r"(--plugin \S+)", text)
    cli.folder.joinpath("examples").symlink_to(ROOT / "examples")
    finished = cli(
        "validate", str(ROOT / path), *needed, *shlex.split(" ".join(plugins)), env={"PYTHONPATH": str(ROOT)}
    )
    assert finished.exit_code == 0, finished.stderr


def test_debug_preset_trains_end_to_end(cli: Cli) -> None:
    write_sources(cli.folder)
    corpus = ("data.source=text", "data.path=corpus.txt", "data.validation_fraction=0.1")
    finished = cli("train", "debug", *corpus, "--json")
    assert finished.exit_code == 0, finished.stderr
    assert finished.json["state"] == "complete" and finished.json["step"] == 20
    assert cli("generate", "runs/debug", "--prompt", "def ", "--max-new-tokens", "3").exit_code == 0


def test_lora_fast_trains_end_to_end(cli: Cli) -> None:
    """Also where there is no GPU and no base."""
    write_sources(cli.folder)
    model = (
        "model.config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 4}"
    )
    finished = cli("train", "lora_fast", "model.init=scratch", model, "data.path=rows.jsonl", "training.epochs=1")
    assert finished.exit_code == 0, finished.stderr
    assert "trained)" in finished.stderr and "steps of 8,192 tokens" in finished.stderr  # packed: 2 x 8 full rows
    assert cli("generate", "runs/lora_fast", "--prompt", "the", "--max-new-tokens", "3").exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_resolve(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    missing = []
    for target in LINK.findall(prose):
        name, _, anchor = target.partition("#")
        file = ROOT / page.parent / name if name else ROOT / page
        if not re.match("[a-z]+:", target) and not (file.exists() and (not anchor or anchor in anchors_of(file))):
            missing.append(target)
    assert missing == []


def anchors_of(page: Path) -> set[str]:
    """What a page's headings are linked by: lower case, hyphens for spaces, punctuation left out."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_paths_in_prose_exist() -> None:
    """A file of the source or the tests that a page names in backticks is there."""
    missing = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:src|tests|docs|examples|benchmarks)/[\w./-]+?\.(?:py|md|yaml))`", text):
            if not (ROOT / name).exists():
                missing.append(f"{page}: {name}")
    assert missing == []


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, "-m", "truthgpt.cli.reference", "--check"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.name)
def test_example_is_python(path: Path) -> None:
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
