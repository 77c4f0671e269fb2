"""The command line's frame: exit codes, errors in one place, global options anywhere, a quick start."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from truthgpt.cli import app as cli
from truthgpt.cli.components import loaded_plugins
from truthgpt.errors import CheckpointError, DataError, RunDirectoryError, TruthGPTError
from truthgpt.factories.catalog import REGISTRIES
from truthgpt.version import __version__


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    code = caught.value.code
    return 0 if code is None else int(code)


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "truthgpt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`truthgpt schema` raises the one error this list holds."""
    errors: list[BaseException] = []

    def fail() -> None:
        raise errors[0]

    monkeypatch.setattr("truthgpt.json_schema.json_schema", fail)
    return errors


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("validate", "schema", "init", "components"))
    assert exit_code("validate", "--help") == 0
    assert "--plugin MODULE" in capsys.readouterr().out


def test_help_says_the_whole_of_what_a_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, end in ((["--help"], "other data, or tasks."), (["benchmark", "--help"], "and keep nothing.")):
        assert exit_code(*arguments) == 0
        text = " ".join(capsys.readouterr().out.partition("Commands:")[2].split())
        assert "..." not in text and end in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"truthgpt {__version__}\n"


@pytest.mark.parametrize("arguments", [["no-such-command"], ["validate", "--no-such-option"], ["--plugin"]])
def test_wrong_usage_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "TOO_LONG", "--prompt", "x"),
        ("eval", "TOO_LONG"),
        ("train", "debug", "resume.enabled=true", "resume.checkpoint_dir=TOO_LONG"),
        ("plan", "debug", "model.name_or_path=TOO_LONG"),
    ],
)
def test_a_path_out_of_reach_is_no_bug(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*(argument.replace("TOO_LONG", "x" * 300) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert "File name too long; give a path" in said and "unexpected" not in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [DataError("bad\nworse"), CheckpointError("x"), RunDirectoryError("y")])
def test_expected_errors_end_with_their_own_code(
    failing: list[BaseException], error: TruthGPTError, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(error)
    assert exit_code("schema") == error.exit_code
    lines = str(error).splitlines()
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in lines]


def test_unexpected_errors_are_one_line_and_exit_1(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(ZeroDivisionError("oh\n no"))
    assert exit_code("schema") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: unexpected ZeroDivisionError: oh no (run again with --debug for the traceback)"


@pytest.mark.parametrize("arguments", [["--debug", "schema"], ["schema", "--debug"]])
def test_debug_anywhere_shows_the_traceback(
    failing: list[BaseException], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(ZeroDivisionError("oh no"))
    assert exit_code(*arguments) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_is_exit_143(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    failing.append(KeyboardInterrupt())
    assert exit_code("schema") == 143
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_before_a_command_is_chosen_is_exit_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.core.TyperGroup.parse_args", interrupted)
    assert exit_code("schema") == 143
    assert capsys.readouterr().err == "interrupted\n"


PLUGIN = textwrap.dedent(
    """
    from truthgpt.factories.scheduler import SCHEDULERS

    @SCHEDULERS.register("{name}")
    def build_{name}(total_steps, steepness: float = 1.0):
        return lambda step: 1.0
    """
)


def test_a_plugin_in_the_current_folder_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_app_plugin.py").write_text(PLUGIN.format(name="from_app_plugin"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    override = "training.scheduler={type: from_app_plugin, steepness: 2.0}"
    assert exit_code("validate", override) == 2
    assert exit_code("validate", override, "--plugin", "my_app_plugin") == 0
    assert exit_code("validate", "plugins=[my_app_plugin]", "--plugin=my_app_plugin") == 0
    assert "my_app_plugin" in loaded_plugins()
    REGISTRIES["SCHEDULERS"].unregister("from_app_plugin")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("no_such_module_here", "cannot be imported"),
        ("file.py/..", "is no module name"),
        (".relative", "is no module name"),
        ("", "is no module name"),
    ],
)
def test_a_bad_plugin_is_exit_2(module: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("components", "--plugin", module) == 2
    assert words in capsys.readouterr().err


def test_a_plugin_that_takes_a_name_is_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taking_plugin.py").write_text(PLUGIN.format(name="cosine"))
    monkeypatch.syspath_prepend(tmp_path)
    assert exit_code("components", "--plugin", "taking_plugin") == 2
    assert "scheduler 'cosine' is already registered" in capsys.readouterr().err


def test_installed_plugins_are_loaded_and_a_broken_one_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "good_plugin.py").write_text(PLUGIN.format(name="from_entry_point"))
    info = tmp_path / "demo_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[truthgpt.plugins]\ngood = good_plugin\nbroken = not_there\n")
    result = run("validate", "training.scheduler=from_entry_point", "plugins=[good_plugin]", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "warning: installed plugin broken (not_there) is left out: No module named 'not_there'\n"


@pytest.mark.parametrize("option", ["--max_steps", "--training.max_steps=3", "--epochs", "--lr"])
def test_a_key_given_as_an_option_is_told_how_to_set_it(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("validate", "debug", option, "3") == 2
    assert capsys.readouterr().err.startswith(f"error: {option.partition('=')[0]} is no option; a key is set without")
    # Other commands take such words as values, whatever else they are given.
    assert exit_code("generate", "no_such_run", "--prompt", "--a_b", "--prompt", "train") == 4
    assert exit_code("--debug", "benchmark", "train", "debug", option, "3") == 2
    assert "is no option; a key is set without" in capsys.readouterr().err
    assert exit_code("train", "debug", "--resum", "auto") == 2
    assert "--resume" in capsys.readouterr().err  # nearly an option
    assert exit_code("plan", "debug", "--gpu_memory", "80GB") == 2
    assert "--gpu-memory" in capsys.readouterr().err  # one but for its line
    assert exit_code("train", "--config", "my.yaml") == 2
    assert (
        capsys.readouterr().err
        == "error: --config is no option; a YAML is named without one, as in truthgpt train my.yaml\n"
    )


def test_global_options_stop_at_the_double_dash() -> None:
    assert cli._global_first(["a", "--plugin", "m", "b", "--", "--debug"]) == [
        "--plugin",
        "m",
        "a",
        "b",
        "--",
        "--debug",
    ]


def test_start_is_light() -> None:
    code = "import sys; import truthgpt.cli.app; "
    code += (
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'numpy', 'rich', 'pydantic')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_an_interrupt_while_modules_are_imported_is_exit_143() -> None:
    code = """
    import sys

    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "truthgpt.cli.train":
                raise KeyboardInterrupt

    sys.meta_path.insert(0, Interrupted())
    from truthgpt.cli.start import main
    main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "interrupted\n")


def test_an_interrupt_within_a_text_that_is_executed_is_exit_143(tmp_path: Path) -> None:
    """As dataclasses do while modules are imported: under `python -m` Python itself would end with SIGINT's code."""
    (tmp_path / "interrupting.py").write_text("exec('import signal; signal.raise_signal(signal.SIGINT)')\n")
    done = run("--plugin", "interrupting", "schema", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "interrupted\n")
