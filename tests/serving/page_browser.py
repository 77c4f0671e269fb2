"""The page in a real browser, served by the real server with an engine that writes letters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.serving.fake_engine import FakeEngine
from tests.serving.server import serving
from truthgpt.serving.page_app import ModelFacts, page_routes

CHROMIUM = Path("/usr/bin/chromium")
TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}[assistant]"
WAIT_MS = 60_000


@contextmanager
def served(engine: FakeEngine, *, chat: bool = True, run_directory: Path | None = None) -> Iterator[str]:
    """The address of the page of `engine`, served inside the block."""
    facts = ModelFacts(engine.model_name, "llama", 984_192, engine.context_tokens, "cpu", "float32", chat, "my-folder")
    routes = page_routes(facts, run_directory)
    with serving(engine, template=TEMPLATE if chat else None, shorten=True, routes=routes) as server:
        yield server.url


@dataclass
class Tab:
    """The page in a tab, and all that went wrong or out in it."""

    page: Any
    url: str
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Load the page and wait until it knows the model."""
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.url)
        self.page.wait_for_selector("#facts dd", state="attached", timeout=WAIT_MS)

    def send(self, text: str) -> None:
        """Type a message and press Enter."""
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds` does. Playwright's own way evaluates a string, which the page's policy forbids."""
        end_s = time.monotonic() + WAIT_MS / 1000
        while not holds():
            assert time.monotonic() < end_s, "it did not come about in time"
            self.page.wait_for_timeout(10)

    def wait_for_end(self) -> None:
        """Wait until nothing is written."""
        self.page.wait_for_selector("#stop", state="hidden", timeout=WAIT_MS)
        self.page.wait_for_selector(".writing", state="detached", timeout=WAIT_MS)

    def ask(self, text: str) -> str:
        """Send a message and wait for the whole answer."""
        self.send(text)
        self.wait_for_end()
        return self.answer()

    def answer(self) -> str:
        """The last answer in sight, as far as it is written."""
        return str(self.page.locator(".log:not([hidden]) .answer").last.text_content())

    def figures(self) -> str:
        """What is said below it."""
        return str(self.page.locator(".log:not([hidden]) .figures").last.text_content())

    def set(self, control: str, value: str) -> None:
        """Type a number into a control and leave it."""
        self.page.fill(f"#{control}", value)
        self.page.press(f"#{control}", "Tab")

    def button(self, name: str) -> Any:
        """The last button in sight with this name."""
        return self.page.locator("button:visible", has_text=name).last

    def colour(self, selector: str, of: str = "color") -> tuple[float, ...]:
        """A computed colour as (red, green, blue), 0 to 255; for `background` that of the nearest painted ancestor."""
        script = """([selector, of]) => {
            let element = document.querySelector(selector);
            if (of === "color") return getComputedStyle(element).color;
            while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
            return getComputedStyle(element).backgroundColor;
        }"""
        text = self.page.evaluate(script, [selector, of])
        return tuple(float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3])


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
