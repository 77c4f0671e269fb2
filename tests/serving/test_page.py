"""The chat page, end to end in a real browser: what it sends, what it shows, and what it never does."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra demo")
pytest.importorskip("uvicorn", reason="needs the extra demo")

from tests.process import Cli
from tests.serving.fake_engine import FakeEngine, expected_text
from tests.serving.page_browser import CHROMIUM, WAIT_MS, Tab, contrast, served
from tests.serving.served_command import served_command
from truthgpt.runtime.metrics_log import MetricsLog
from truthgpt.runtime.run_directory import RunDirectory, RunStatus

_MISSING = [
    *([] if importlib.util.find_spec("playwright") else ["the package playwright"]),
    *([] if CHROMIUM.exists() else [str(CHROMIUM)]),
]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}")

Open = Callable[..., Tab]
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "demo.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens the page of an engine. At the end: nothing in the console, and no request to another host."""
    tabs: list[Tab] = []
    with ExitStack() as stack:

        def open_page(engine: FakeEngine, *, chat: bool = True, run_directory: Path | None = None, **tab: Any) -> Tab:
            return open_at(stack.enter_context(served(engine, chat=chat, run_directory=run_directory)), **tab)

        def open_at(url: str, width: int = 1280, scheme: str = "light", clock: bool = False) -> Tab:
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
            )
            stack.callback(context.close)
            tab = Tab(context.new_page(), url)
            if clock:
                tab.page.clock.install()
            tabs.append(tab)
            tab.open()
            return tab

        open_page.at = open_at  # type: ignore[attr-defined]
        yield open_page
        for tab in tabs:
            assert tab.problems == []
            assert tab.requests
            assert [url for url in tab.requests if not url.startswith(f"{tab.url}/")] == []


def last_sampling(engine: FakeEngine) -> dict[str, Any]:
    sampling = engine.submitted[-1][1]
    return {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}


def prompt_text(engine: FakeEngine, index: int = -1) -> str:
    return bytes(engine.submitted[index][0]).decode()


def test_an_answer_is_shown_as_it_is_written(open_page: Open) -> None:
    gate = threading.Semaphore(0)

    def let_through() -> None:
        assert gate.acquire(timeout=60), "nobody opened the gate"

    engine = FakeEngine(step_s=0.02, before_step=let_through)
    tab = open_page(engine)
    tab.set("max_tokens", "40")
    asked_s = time.monotonic()
    tab.send("hello")
    for tokens in range(5, 41, 5):
        gate.release(5)
        tab.until(lambda tokens=tokens: len(tab.answer()) == tokens)
    tab.wait_for_end()
    took_s = time.monotonic() - asked_s
    prompt_ids, sampling = engine.submitted[0]
    assert prompt_text(engine) == "[user]hello\n[assistant]"
    assert tab.answer() == expected_text(prompt_ids, sampling.seed, 40)
    figures = tab.figures()
    said = re.fullmatch(
        r"40 tokens · ([\d.]+) tokens/s · first after (\d+\.\d\d) s · seed \d+ · limit reached", figures
    )
    assert said is not None, figures
    assert 0.02 <= float(said[2]) <= took_s
    assert 39 / took_s - 0.1 <= float(said[1]) <= 50  # it writes 50 a second at most
    assert f"seed {sampling.seed}" in figures
    assert tab.page.locator("#announcer").text_content() == tab.answer()


def test_figures_are_live(open_page: Open) -> None:
    gate = threading.Semaphore(0)

    def let_through() -> None:
        assert gate.acquire(timeout=60), "nobody opened the gate"

    tab = open_page(FakeEngine(before_step=let_through))
    tab.set("max_tokens", "9")
    tab.send("hello")
    tab.until(lambda: tab.figures() == "waiting for the first token…")
    for tokens, text in ((1, "1 token · first after"), (2, "2 tokens · "), (3, "3 tokens · ")):
        gate.release()
        tab.until(lambda text=text: tab.figures().startswith(text))
        assert len(tab.answer()) == tokens
    gate.release(100)
    tab.wait_for_end()


def test_a_conversation_carries_its_answers_and_the_system_prompt(open_page: Open) -> None:
    engine = FakeEngine()
    tab = open_page(engine)
    tab.set("max_tokens", "5")
    tab.page.fill("#system", "Be brief.")
    first = tab.ask("one")
    tab.ask("two")
    expected = f"[system]Be brief.\n[user]one\n[assistant]{first}\n[user]two\n[assistant]"
    assert prompt_text(engine) == expected
    tab.button("New chat").click()
    assert tab.page.locator("#log-chat .entry").count() == 0
    tab.page.fill("#system", "")
    tab.ask("three")
    assert prompt_text(engine) == "[user]three\n[assistant]"


def test_shift_enter_breaks_the_line_and_nothing_empty_is_sent(open_page: Open) -> None:
    engine = FakeEngine()
    tab = open_page(engine)
    tab.send("  ")
    tab.page.fill("#prompt", "a")
    before = tab.page.locator("#prompt").bounding_box()["height"]
    tab.page.press("#prompt", "Shift+Enter")
    tab.page.locator("#prompt").press_sequentially("b")
    assert tab.page.locator("#prompt").bounding_box()["height"] > before
    assert engine.submitted == []
    tab.page.click("#send")
    tab.wait_for_end()
    assert prompt_text(engine) == "[user]a\nb\n[assistant]"


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stopping_cancels_the_request_and_keeps_what_is_written(open_page: Open, how: str) -> None:
    engine = FakeEngine(step_s=0.02, context_tokens=5000)
    tab = open_page(engine)
    tab.set("max_tokens", "2000")
    tab.send("hello")
    tab.until(lambda: len(tab.answer()) > 3)
    if how == "Escape":
        tab.page.keyboard.press("Escape")
    else:
        tab.page.click("#stop")
    tab.wait_for_end()
    written = tab.answer()
    assert 3 < len(written) < 2000
    assert tab.figures().endswith("stopped")
    tab.set("max_tokens", "4")
    tab.ask("again")
    assert len(tab.answer()) == 4
    tab.until(lambda: engine.cancelled == [1])
    assert f"[assistant]{written}\n[user]again" in prompt_text(engine)


def test_the_controls_are_what_is_sent(open_page: Open) -> None:
    engine = FakeEngine()
    tab = open_page(engine)
    for control, value in {
        "temperature": "0.35",
        "top_p": "0.9",
        "top_k": "40",
        "repetition_penalty": "1.15",
        "max_tokens": "7",
        "seed": "123",
    }.items():
        tab.set(control, value)
    tab.ask("hello")
    expected = {"temperature": 0.35, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.15}
    ends = {"stop": ("[user]",), "stop_ids": frozenset()}  # where the template ends a turn
    assert last_sampling(engine) == {**expected, **ends, "max_new_tokens": 7, "seed": 123}
    tab.page.reload()
    tab.page.wait_for_selector("#facts dd", state="attached")
    assert tab.page.input_value("#temperature") == "0.35"  # kept for the next visit
    tab.page.locator("input[type=range]").first.focus()
    tab.page.keyboard.press("ArrowRight")
    assert tab.page.input_value("#temperature") == "0.4"
    tab.button("Reset").click()
    tab.ask("hello")
    defaults = {
        "temperature": 0.8,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 200 + 1 - len(engine.submitted[-1][0]),
    }
    assert {**last_sampling(engine), "seed": 0} == {**defaults, **ends, "seed": 0}


@pytest.mark.parametrize(
    ("control", "typed", "kept"),
    [
        *(("temperature", "9", "2"), ("temperature", "-1", "0"), ("temperature", "", "0.8")),
        *(("top_p", "0", "0.05"), ("top_k", "3.6", "4"), ("max_tokens", "100000", "200")),
    ],
)
def test_a_value_out_of_range_is_brought_into_it(open_page: Open, control: str, typed: str, kept: str) -> None:
    tab = open_page(FakeEngine())
    tab.set(control, typed)
    assert tab.page.input_value(f"#{control}") == kept


def test_an_answer_is_written_again_with_another_seed_in_its_place(open_page: Open) -> None:
    engine = FakeEngine()
    tab = open_page(engine)
    tab.set("max_tokens", "5")
    tab.ask("one")
    tab.ask("two")
    assert tab.page.locator("button:visible", has_text="Retry").count() == 1  # of the last answer only
    tab.button("Retry").click()
    tab.wait_for_end()
    assert engine.submitted[2][0] == engine.submitted[1][0]
    assert engine.submitted[2][1].seed != engine.submitted[1][1].seed
    assert tab.page.locator("#log-chat .entry").count() == 2
    tab.button("Edit").click()
    assert tab.page.input_value("#prompt") == "two"
    tab.ask("three")
    assert "[user]one" in prompt_text(engine) and "two" not in prompt_text(engine)


def test_one_answer_is_written_at_a_time(open_page: Open) -> None:
    engine = FakeEngine(step_s=0.02, context_tokens=5000)
    tab = open_page(engine, chat=False)
    tab.set("max_tokens", "3")
    tab.ask("first")
    tab.set("max_tokens", "2000")
    tab.send("second")
    tab.until(lambda: len(tab.answer()) > 3)
    buttons = tab.page.locator(".entry").first.locator(".buttons button")
    assert [(button.inner_text(), button.is_disabled()) for button in buttons.all()] == [
        *(("Copy", False), ("Continue", True), ("Retry", True), ("Edit", True))
    ]
    tab.send("third")
    assert tab.page.input_value("#prompt") == "third"  # kept until it can be sent
    tab.page.keyboard.press("Escape")
    tab.wait_for_end()
    assert not any(button.is_disabled() for button in buttons.all())
    assert len(engine.submitted) == 2


def test_what_is_copied_is_the_text(open_page: Open) -> None:
    tab = open_page(FakeEngine(), chat=False)
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.set("max_tokens", "3")
    answer = tab.ask("first ")
    tab.button("Copy").click()
    tab.page.wait_for_selector("text=Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == f"first {answer}"


def test_a_base_model_continues_in_another_colour(open_page: Open) -> None:
    engine = FakeEngine()
    tab = open_page(engine, chat=False)
    assert tab.page.is_checked("#mode-completion") and tab.page.is_disabled("#mode-chat")
    tab.set("max_tokens", "6")
    first = tab.ask("def ")
    assert prompt_text(engine) == "def "
    assert tab.page.locator("#log-completion .body").inner_text() == f"def {first}"
    assert tab.colour("#log-completion .given") != tab.colour("#log-completion .answer")
    assert tab.figures().endswith("limit reached")
    tab.button("Continue").click()
    tab.wait_for_end()
    assert prompt_text(engine) == f"def {first}"
    assert tab.answer().startswith(first) and len(tab.answer()) == 12
    tab.button("Retry").click()
    tab.wait_for_end()
    assert prompt_text(engine) == "def " and len(tab.answer()) == 6


def test_an_answer_is_as_long_as_the_context_allows(open_page: Open) -> None:
    engine = FakeEngine(context_tokens=40)
    tab = open_page(engine, chat=False)
    tab.set("max_tokens", "30")
    tab.ask("0123456789")
    tab.button("Continue").click()
    tab.wait_for_end()
    assert engine.submitted[-1][1].max_new_tokens == 1
    tab.button("Continue").click()
    tab.page.wait_for_selector(".error:visible")
    assert "the model 40 positions: shorten the prompt" in tab.page.locator(".error").inner_text()
    tab.problems.clear()  # the browser's own line about status 400


def test_modes_have_logs_of_their_own(open_page: Open) -> None:
    engine = FakeEngine()
    tab = open_page(engine)
    assert tab.page.is_checked("#mode-chat")
    tab.set("max_tokens", "5")
    tab.ask("hello")
    tab.page.check("#mode-completion", force=True)
    assert tab.page.locator(".entry:visible").count() == 0
    assert tab.page.locator("#system").is_hidden()
    tab.ask("hello")
    assert prompt_text(engine) == "hello"
    tab.button("Clear").click()
    tab.page.check("#mode-chat", force=True)
    assert tab.page.locator(".entry:visible").count() == 1


def test_a_refusal_is_shown_in_place_with_the_servers_words(open_page: Open) -> None:
    engine = FakeEngine(context_tokens=60)
    tab = open_page(engine)
    tab.set("max_tokens", "8")
    tab.send("x" * 100)
    tab.page.wait_for_selector("#log-chat .error:visible")
    message = tab.page.locator("#log-chat .error").inner_text()
    assert "the prompt has 118 tokens and the model 60 positions" in message
    assert tab.problems == ["error: Failed to load resource: the server responded with a status of 400 (Bad Request)"]
    tab.problems.clear()
    tab.ask("short")
    assert prompt_text(engine) == "[user]short\n[assistant]"  # the refused question is not part of the conversation


def test_a_chat_longer_than_the_context_goes_on_without_its_beginning(open_page: Open) -> None:
    engine = FakeEngine(context_tokens=100)
    tab = open_page(engine)
    tab.set("max_tokens", "4")
    answers = [tab.ask(f"question {number}") for number in range(4)]
    assert len(engine.submitted) == 3 + 1
    expected = f"[user]question 2\n[assistant]{answers[2]}\n[user]question 3\n[assistant]"
    assert prompt_text(engine) == expected, "of three earlier questions the last one is left"
    assert "without the first 2 questions: the context is full" in tab.figures()
    tab.problems.clear()  # the browser's own line about the refusal

    tab.ask("x" * 200)
    assert "the prompt has 218 tokens" in tab.page.locator("#log-chat .error:visible").inner_text()
    tab.problems.clear()
    tab.ask("4")
    assert prompt_text(engine) == f"{expected}{answers[3]}\n[user]4\n[assistant]", "it is not forgotten for that"
    assert tab.problems == [], "what is left out is not sent again"

    tab.button("New chat").click()
    tab.ask("one")
    assert "without" not in tab.figures()


def test_an_engine_that_fails_in_the_middle_is_said(open_page: Open) -> None:
    def fail_at_the_fourth() -> None:
        if engine.steps == 3:
            engine.steps += 1
            raise RuntimeError("broken")

    engine = FakeEngine(before_step=fail_at_the_fourth)
    tab = open_page(engine)
    tab.set("max_tokens", "8")
    tab.send("hello")
    tab.page.wait_for_selector("#log-chat .error:visible")
    assert "the engine failed while it wrote" in tab.page.locator("#log-chat .error").inner_text()
    assert len(tab.answer()) == 3
    tab.button("Retry").click()
    tab.wait_for_end()
    assert tab.page.locator(".error:visible").count() == 0 and len(tab.answer()) == 8


def test_a_lost_server_is_said_and_its_return_too(open_page: Open) -> None:
    with ExitStack() as server:
        tab = open_page.at(server.enter_context(served(FakeEngine(step_s=0.02, context_tokens=5000))))  # type: ignore[attr-defined]
        tab.set("max_tokens", "2000")
        tab.send("hello")
        tab.until(lambda: len(tab.answer()) > 3)
        server.close()
        tab.page.wait_for_selector("#lost:visible")
        assert "The server does not answer" in tab.page.locator("#lost").inner_text()
        tab.wait_for_end()
        tab.page.route("**/api/run", lambda route: route.fulfill(json=KNOWN))
        tab.page.wait_for_selector("#lost", state="hidden", timeout=WAIT_MS)
    assert all("net::ERR" in problem for problem in tab.problems)
    tab.problems.clear()


KNOWN = {
    "model": {
        **{"name": "fake", "family": "llama", "parameters": 1, "context_tokens": None, "device": "cpu"},
        **{"dtype": "float32", "chat_template": True, "folder": "f"},
    },
    **{"run": None, "curves": {}, "prompts": []},
}


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    with RunDirectory.claim(tmp_path / "my-run", resume=False, overwrite=False) as run:
        run.write_config('generate:\n  prompts: ["def ", "import "]\n')
        run.write_status(RunStatus("complete", 100, 120, 2.0, 100))
        log = MetricsLog(run.metrics)
        for step in range(1, 101):
            loss = math.nan if step == 50 else 7 * math.exp(-step / 50)
            log.append({"step": step, "loss": loss, "lr": 1e-3 * step / 100, "tokens_per_sec": 10_000.0 + step})
            if step % 20 == 0:
                log.append({"step": step, "val_loss": 7 * math.exp(-step / 60)})
        with run.metrics.open("a") as file:
            file.write('{"step": 101, "lo')
        return run.path


def test_the_runs_curves_are_drawn_with_axes_and_values(open_page: Open, run_directory: Path) -> None:
    tab = open_page(FakeEngine(), chat=False, run_directory=run_directory)
    page = tab.page
    page.wait_for_selector("#curves svg")
    assert page.locator("#curves figcaption").all_inner_texts() == [
        f"Loss\ntraining {7 * math.exp(-2):.4g}\nvalidation {7 * math.exp(-100 / 60):.4g}",
        "Learning rate\n0.001",
        "Tokens/s\n10,100",
    ]
    drawn = [path.get_attribute("d") for path in page.locator("#curves path.curve").all()]
    assert [len(path.replace("L", "M").split("M")) - 1 for path in drawn] == [99, 5, 100, 100]
    assert [path.count("M") for path in drawn] == [2, 1, 1, 1]  # the step that is not finite leaves a gap
    assert falls(drawn[0]) and falls(drawn[1]) and not falls(drawn[2])
    ticks = page.locator("#curves svg").first.locator("text").all_text_contents()
    assert {"2", "4", "6", "20", "100"} <= set(ticks)
    box = page.locator("#curves svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 13, box["y"] + 40)
    shown = page.locator("#curves .values:visible").inner_text().split("\n")
    assert shown == ["step 100", f"training {7 * math.exp(-2):.4g}", f"validation {7 * math.exp(-100 / 60):.4g}"]
    facts = page.locator("#facts").inner_text()
    assert "my-run" in facts and "984 k (llama)" in facts and "100 of 120 steps, complete" in facts
    page.click("#enlarge")
    assert page.locator("#large svg").first.bounding_box()["width"] > 800
    page.keyboard.press("Escape")
    assert page.locator("#large").is_hidden()


def falls(path: str) -> bool:
    """Whether a drawn line ends below its start (y grows downwards)."""
    points = [point.split() for point in path.replace("L", "M").split("M")[1:]]
    return float(points[0][1]) < float(points[-1][1])


def test_the_runs_own_prompts_start_a_completion(open_page: Open, run_directory: Path) -> None:
    engine = FakeEngine()
    tab = open_page(engine, chat=False, run_directory=run_directory)
    tab.set("max_tokens", "5")
    tab.page.locator(".starter").first.click()
    tab.wait_for_end()
    assert prompt_text(engine) == "def "


def test_a_run_that_trains_is_drawn_again(open_page: Open, run_directory: Path) -> None:
    with RunDirectory.claim(run_directory, resume=True, overwrite=False) as run:
        run.write_status(RunStatus("running", 100, 120))
        tab = open_page(FakeEngine(), chat=False, run_directory=run_directory, clock=True)
        MetricsLog(run.metrics).cut_after(100)
        MetricsLog(run.metrics).append({"step": 120, "loss": 0.125})
        tab.page.clock.run_for(10_000)
        tab.page.wait_for_selector("text=training 0.125")


def test_a_folder_has_no_curves_and_says_so(open_page: Open) -> None:
    tab = open_page(FakeEngine(), run_directory=None)
    assert "A Hugging Face folder has no curves" in tab.page.locator("#no-curves").inner_text()
    assert tab.page.locator("#curves svg").count() == 0
    assert "my-folder" in tab.page.locator("#facts").inner_text()


def test_text_is_never_markup(open_page: Open) -> None:
    class Hostile(FakeEngine):
        def step(self) -> list[Any]:
            from dataclasses import replace

            return [replace(piece, text=HOSTILE) if piece.text else piece for piece in super().step()]

    engine = Hostile(model_name="<b>model</b>")
    tab = open_page(engine)
    tab.set("max_tokens", "1")
    assert tab.ask(HOSTILE) == HOSTILE
    tab.page.check("#mode-completion", force=True)
    assert tab.ask(HOSTILE) == HOSTILE
    assert tab.page.locator(".question").inner_text() == HOSTILE
    assert tab.page.locator("h1").inner_text() == "<b>model</b>"
    assert tab.page.locator("main img, main script, h1 b").count() == 0


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"


def test_fenced_parts_of_an_answer_are_code(open_page: Open) -> None:
    answer = "See:\n```python\ndef f():\n    return 1\n```\nDone."

    class Speaker(FakeEngine):
        def step(self) -> list[Any]:
            from dataclasses import replace

            return [replace(piece, text=answer[self.steps - 1]) for piece in super().step()]

    tab = open_page(Speaker())
    tab.set("max_tokens", str(len(answer)))
    tab.ask("hello")
    assert tab.page.locator(".answer .code").all_text_contents() == ["def f():\n    return 1"]
    assert tab.page.locator(".answer .prose").all_text_contents() == ["See:", "Done."]


@pytest.mark.parametrize("width", [400, 700, 1280])
def test_nothing_is_wider_than_the_window(open_page: Open, width: int, run_directory: Path) -> None:
    tab = open_page(FakeEngine(model_name="m" * 60), width=width, run_directory=run_directory)
    tab.ask("w" * 50 + " and words")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.page.evaluate(overflow) == 0
    assert (
        tab.page.evaluate(
            "(({scrollWidth, clientWidth}) => scrollWidth - clientWidth)(document.querySelector('#scroller'))"
        )
        == 0
    )
    for selector in ("#send", "#prompt", "#new"):
        box = tab.page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    if width < 1024:
        assert tab.page.locator("#panel").is_hidden()
        tab.button("Settings").click()
        box = "document.querySelector('#panel').getBoundingClientRect()"
        tab.until(lambda: tab.page.evaluate(f"(({{left, right}}) => left >= 0 && right <= innerWidth)({box})"))
        assert tab.page.evaluate(overflow) == 0
        assert tab.page.locator("#curves svg").first.is_visible()
        tab.page.keyboard.press("Escape")
        tab.page.wait_for_selector("#panel", state="hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(open_page: Open, scheme: str, run_directory: Path) -> None:
    tab = open_page(FakeEngine(), scheme=scheme, run_directory=run_directory)
    tab.set("max_tokens", "5")
    tab.ask("hello")
    tab.page.check("#mode-completion", force=True)
    tab.ask("hello")
    assert (sum(tab.colour("body", "background")) < 3 * 128) == (scheme == "dark")
    for selector in (
        *("h1", ".brand p", ".question", "#log-chat .answer", ".figures", ".quiet", ".given"),
        *("#log-completion .answer", ".keys", "dt", "dd", ".control label", "#temperature", "figcaption", ".key.loss"),
        *(".key.val-loss", ".modes input:checked + span", ".error"),
    ):
        assert contrast(tab.colour(selector), tab.colour(selector, "background")) >= 4.5, selector


def test_every_control_has_a_name(open_page: Open, run_directory: Path) -> None:
    tab = open_page(FakeEngine(), run_directory=run_directory)
    tab.ask("hello")
    nameless = """() => [...document.querySelectorAll("button, input, textarea, svg[role=img]")].filter((element) =>
        !(element.labels?.length || element.getAttribute("aria-label") || element.textContent.trim())
    ).map((element) => element.outerHTML)"""
    assert tab.page.evaluate(nameless) == []


def test_the_page_allows_only_itself(open_page: Open) -> None:
    tab = open_page(FakeEngine())
    with urllib.request.urlopen(f"{tab.url}/") as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy
    tab.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))"
    )
    assert tab.page.evaluate("window.ran") is None
    assert [problem for problem in tab.problems if "Content Security Policy" not in problem] == []
    tab.problems.clear()


def test_another_sites_name_for_this_machine_is_refused(open_page: Open) -> None:
    tab = open_page(FakeEngine())
    for path in ("/", "/api/run", "/page/page.js"):
        request = urllib.request.Request(tab.url + path, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 403


def test_nothing_on_the_page_points_elsewhere() -> None:
    import truthgpt.serving

    folder = Path(truthgpt.serving.__file__).parent / "page"
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.lower() or file.name == "page.css", file
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert forbidden not in text, file


@pytest.mark.skipif("SCREENSHOT_RUN" not in os.environ, reason="SCREENSHOT_RUN names no run directory to show")
def test_the_readmes_picture_is_taken(browser: Any, cli: Cli) -> None:
    """Writes docs/images/demo.png: `SCREENSHOT_RUN=runs/llm_default pytest tests/serving/test_page.py -k picture`."""
    run_directory = Path(os.environ["PWD"], os.environ["SCREENSHOT_RUN"])
    with served_command(cli, "demo", str(run_directory), "--port", "0", "--no-browser") as command:
        context = browser.new_context(viewport={"width": 1280, "height": 840}, reduced_motion="reduce")
        tab = Tab(context.new_page(), command.url)
        tab.open()
        for control, value in {"temperature": "0.4", "max_tokens": "120", "seed": "7"}.items():
            tab.set(control, value)
        tab.ask("def read_lines(path):\n")
        tab.set("max_tokens", "70")
        tab.ask("import ")
        tab.page.locator("#curves svg").first.hover(position={"x": 105, "y": 60})
        PICTURE.parent.mkdir(exist_ok=True)
        tab.page.screenshot(path=str(PICTURE))
        context.close()
    assert PICTURE.stat().st_size < 200_000
