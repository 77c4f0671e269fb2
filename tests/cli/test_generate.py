"""`truthgpt generate`: prompts from files, answers to files, and what of sampling and cache a user can set."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference.engine_runs import reference
from tests.inference.small_models import TOKENIZER, small_model
from tests.process import Cli, Finished

from truthgpt.cli.app import main
from truthgpt.cli.generate import _give_out, _lines, _prompts
from truthgpt.errors import DataError, RunDirectoryError

PROMPTS = ["def f(", "the ", "the king", "x = 1"]
GREEDY = ("--temperature", "0", "--max-new-tokens", "8")
BLOCK_BYTES = 16 * 2 * 2 * 32 * 4
"""16 positions of two layers, keys and values of 32 numbers of 4 bytes."""


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """In a folder with a model `m` and files of prompts."""
    folder = tmp_path_factory.mktemp("generate")
    small_model("llama").save_pretrained(folder / "m")
    TOKENIZER.save_pretrained(folder / "m")
    (folder / "p.txt").write_text("\n".join(["", *PROMPTS, "  "]))
    (folder / "p.jsonl").write_text("\n\n".join(json.dumps({"prompt": p, "id": 1}) for p in PROMPTS))
    return Cli(folder)


def asked(*prompts: str) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def done(finished: Finished) -> Any:
    assert finished.exit_code == 0, finished.stderr
    return finished.json


def expected(prompt: str) -> list[int]:
    return reference("llama", tuple(TOKENIZER(prompt)["input_ids"]), 8)


def test_the_caches_give_what_transformers_writes(cli: Cli) -> None:
    paged = done(cli("generate", "m", *asked(*PROMPTS), *GREEDY, "--json"))
    assert [row["token_ids"] for row in paged] == [expected(prompt) for prompt in PROMPTS]
    assert [row["prompt"] for row in paged] == PROMPTS
    assert {row["finish"] for row in paged} <= {"length", "stop"}
    for changes in (["--kv-cache", "none"], ["--block-size", "1"], ["--cache-memory", "0.015625MiB"]):
        assert done(cli("generate", "m", *asked(*PROMPTS), *GREEDY, "--json", *changes)) == paged, changes


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_prompts_come_from_a_file_and_answers_go_to_one(cli: Cli, name: str) -> None:
    wanted = done(cli("generate", "m", *asked(*PROMPTS), *GREEDY, "--json"))
    out = cli.folder / f"from-{name}.jsonl"
    finished = cli("generate", "m", "--prompts", name, *GREEDY, "--out", out.name)
    assert finished.exit_code == 0 and finished.stdout == "" and "4/4 prompts" in finished.stderr
    lines = out.read_text().splitlines()
    assert [json.loads(line) for line in lines] == wanted
    both = cli("generate", "m", "--prompts", name, *GREEDY, "--out", out.name, "--json", "--overwrite")
    assert done(both) == wanted and out.read_text().splitlines() == lines


def test_a_file_that_is_there_is_replaced_only_when_asked_and_only_by_all_answers(cli: Cli) -> None:
    out = cli.folder / "kept.jsonl"
    out.write_text("an hour of answers\n")
    refused = cli("generate", "nowhere", *asked("a"), "--out", out.name)  # before the model is looked for
    message = "error: --out: kept.jsonl is there already: give another --out, or --overwrite to replace it"
    assert (refused.exit_code, refused.stderr.strip()) == (6, message)
    for name, why in (("nowhere/out", "there is no folder nowhere"), ("x" * 300, "File name too long")):
        refused = cli("generate", "nowhere", *asked("a"), "--out", name)
        assert (refused.exit_code, refused.stderr) == (6, f"error: --out: {name} cannot be written: {why}\n")
    before = sorted(cli.folder.iterdir())
    no_room = ("--cache-memory", "0.0078125MiB", "--max-new-tokens", "20")
    failed = cli("generate", "m", *asked("def f("), *no_room, "--out", out.name, "--overwrite")
    assert failed.exit_code == 2 and "need 25 positions" in failed.stderr
    assert out.read_text() == "an hour of answers\n"
    assert [path for path in sorted(cli.folder.iterdir()) if not path.name.startswith(".std")] == [
        path for path in before if not path.name.startswith(".std")
    ]
    assert cli("generate", "m", *asked("a"), *GREEDY, "--out", out.name, "--overwrite").exit_code == 0
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["prompt"] == "a"


def test_what_is_broken_off_leaves_the_old_answers_or_else_the_new_ones_so_far(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for old, overwrite, left in (("", False, "1\n"), ("old\n", True, "old\n"), ("", True, "1\n")):
        out.write_text(old)
        with pytest.raises(KeyboardInterrupt), _lines(out, overwrite) as file:
            assert file is not None
            file.write("1\n")
            assert out.read_text() == left, "line by line, and nothing replaced yet"
            raise KeyboardInterrupt
        assert out.read_text() == left and list(tmp_path.iterdir()) == [out]
    with pytest.raises(RunDirectoryError, match="is there already"), _lines(out, overwrite=False):
        raise AssertionError("it came while the model was loaded")
    assert out.read_text() == "1\n"


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    """Nothing is lost in a device, and the file that is replaced is the one a link leads to."""
    with _lines(Path("/dev/null"), overwrite=False) as file:
        assert file is not None
        file.write("gone\n")
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "out.jsonl", tmp_path / "link.jsonl"
    target.write_text("old\n")
    target.chmod(0o600)
    link.symlink_to(target)
    with _lines(link, overwrite=True) as file:
        assert file is not None
        file.write("new\n")
    assert link.is_symlink() and target.read_text() == "new\n" and list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "answers").symlink_to("/dev/full")
    full = pytest.raises(RunDirectoryError, match=r"--out: \S+answers cannot be written: No space left on device")
    with full, _lines(tmp_path / "answers", overwrite=False) as file:
        assert file is not None
        file.write("line\n")


def test_a_line_ends_where_a_line_of_text_does(tmp_path: Path) -> None:
    """Not at the other characters that Unicode counts as ends of lines; and a mark of the byte order is none of it."""
    odd = "a\u2028b\u0085c\x0cd"
    rows = json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n" + json.dumps({"prompt": "e"})
    (tmp_path / "p.jsonl").write_bytes(rows.encode("utf-8-sig"))
    (tmp_path / "p.txt").write_bytes(f"{odd}\r\ne\n".encode("utf-8-sig"))
    assert _prompts(None, tmp_path / "p.jsonl") == _prompts(None, tmp_path / "p.txt") == [odd, "e"]


def test_prompts_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert _prompts(None, Path("-")) == ["one", "two"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_is_sent_nothing_that_it_would_obey(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", written)
    _give_out({"prompt": "a\n", "text": "\tb\x1b]52;c;eA==\x07\x9b1m é"}, None, "", json_output=False)
    shown = "\tb\ufffd]52;c;eA==\ufffd\ufffd1m é" if terminal else "\tb\x1b]52;c;eA==\x07\x9b1m é"
    assert written.getvalue() == f"a\n{shown}\n\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_is_utf_8_in_every_locale(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    """In the locale C, Python's own takes any bytes."""
    for raw, prompts in (("\ufeffé\n".encode(), ["é"]), (b"a\n\xff\n", None)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii", errors=errors))
        if prompts is None:
            with pytest.raises(DataError, match=r"^--prompts: standard input: byte 2 is not UTF-8$"):
                _prompts(None, Path("-"))
        else:
            assert _prompts(None, Path("-")) == prompts


def test_sampling_is_what_was_asked_for(cli: Cli) -> None:
    def written(*arguments: str) -> list[list[int]]:
        finished = cli("generate", "m", *asked("def f(", "the "), "--max-new-tokens", "8", "--json", *arguments)
        return [row["token_ids"] for row in done(finished)]

    greedy, hot = written("--temperature", "0"), written("--temperature", "1.5")
    assert hot == written("--temperature", "1.5", "--seed", "0") != greedy
    assert written("--temperature", "1.5", "--seed", "1") != hot
    assert written("--temperature", "1.5", "--top-k", "1") == greedy
    assert written("--temperature", "1.5", "--top-p", "1e-6") == greedy
    often = written("--temperature", "0", "--max-new-tokens", "40")
    never = written("--temperature", "0", "--max-new-tokens", "40", "--repetition-penalty", "1000")
    assert any(len(set(tokens)) < len(tokens) for tokens in often)
    assert all(len(set(tokens)) == len(tokens) for tokens in never)


def test_stop_texts(cli: Cli) -> None:
    (whole,) = done(cli("generate", "m", *asked("def f("), *GREEDY, "--json"))
    stop = next(c for c in whole["text"] if c.isascii() and c.isprintable())
    (row,) = done(cli("generate", "m", *asked("def f("), *GREEDY, "--json", "--stop", "never", "--stop", stop))
    assert row["text"] == whole["text"][: whole["text"].index(stop)] and row["finish"] == "stop"


@pytest.mark.parametrize(("content", "place"), [(None, "."), ("", "out.jsonl"), ("an answer", ".")])
def test_what_may_not_be_written_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str | None, place: str
) -> None:
    out, locked = tmp_path / "out.jsonl", tmp_path / place
    if content is not None:
        out.write_text(content)
    for refuses in (False, True):  # as for a user other than root
        monkeypatch.setattr(
            os, "access", lambda path, mode, no=refuses: not (no and path == locked and mode == os.W_OK)
        )
        with pytest.raises(SystemExit) as ended:
            main(["generate", "nowhere", *asked("a"), "--out", str(out), "--overwrite"])
        said = f"error: --out: {out} cannot be written: {locked} is not writable\n"
        assert (ended.value.code == 6, capsys.readouterr().err == said) == (refuses, refuses)


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "no room for a block": (
        ["--cache-memory", "0.005MiB"],
        2,
        f"a block of 16 positions takes {BLOCK_BYTES:,} bytes, the cache has 5,243: give it more memory",
    ),
    "no room for an answer": (
        ["--cache-memory", "0.0078125MiB", "--max-new-tokens", "20"],
        2,
        "6 tokens and 20 new ones need 25 positions of the cache, which has 16",
    ),
    "more than there is": (["--cache-memory", "900000GiB"], 2, "free: give it less"),
    "no size": (["--cache-memory", "much"], 2, "--cache-memory"),
    "temperature": (["--temperature", "-1"], 2, "temperature: -1.0 is not allowed: give 0 (greedy) or more"),
    "top-p": (["--top-p", "2"], 2, "top_p: 2.0 is not allowed: give more than 0, at most 1"),
    "top-k": (["--top-k", "-3"], 2, "top_k: -3 is not allowed"),
    "penalty": (["--repetition-penalty", "0"], 2, "repetition_penalty: 0.0 is not allowed"),
    "stop": (["--stop", ""], 2, "stop: ('',) is not allowed: give texts that are not empty"),
    "tokens": (["--max-new-tokens", "0"], 2, "max_new_tokens: 0 is not allowed: give 1 or more"),
    "cache": (["--kv-cache", "huge"], 2, "--kv-cache"),
    "two sources": (["--prompts", "p.txt"], 2, "give either --prompt TEXT (repeatable) or --prompts FILE"),
    "a folder": (["--out", "m"], 6, "--out: m is a folder: name a file in it"),
    "nothing to replace": (["--overwrite"], 2, "--overwrite is read with --out only; leave it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_get_one_clear_line(cli: Cli, case: str) -> None:
    arguments, code, message = REFUSED[case]
    finished = cli("generate", "m", *asked("def f("), "--json", *arguments)
    assert finished.exit_code == code and message in finished.stderr and finished.stdout == "", finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", "\n \n", "holds no prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n\n{"prompt"', "bad.jsonl:3: no JSON"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}', 'bad.jsonl:2: expected an object with a text "prompt"'),
        ("bad.jsonl", '{"prompt": 3}', "bad.jsonl:1: expected"),
        ("bad.jsonl", "[1]", "bad.jsonl:1: expected"),
        ("bad.txt", b"a\xfe\x00", "bad.txt: byte 1 is not UTF-8"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path: Path, name: str, text: str | bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        _prompts(None, tmp_path / name)
    assert str(caught.value).startswith("--prompts: ") and message in str(caught.value)


def test_a_model_with_weights_that_are_no_numbers_is_exit_5(cli: Cli) -> None:
    """By transformers' cache: the probe of the paged one refuses it."""
    model = small_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(cli.folder / "broken")
    TOKENIZER.save_pretrained(cli.folder / "broken")
    finished = cli("generate", "broken", *asked("a", "b"), *GREEDY)
    assert finished.exit_code == 5 and "2 of 2 answers ended early" in finished.stderr
    assert "Traceback" not in finished.stderr
