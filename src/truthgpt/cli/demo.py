"""`truthgpt demo`: talk to a trained model on a page in the browser."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from truthgpt.cli.model_server import run_model_server
from truthgpt.cli.output import say

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from truthgpt.serve_model import TextModel


def demo(
    target: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|HF_DIR", help="What to load.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu or mps.")] = "auto",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
) -> None:
    """Talk to a run's model, a checkpoint or a Hugging Face folder on a page that only this machine can reach."""
    from truthgpt.serving.packages import require_server_packages

    require_server_packages()
    from truthgpt.inference.open_engine import EngineOptions
    from truthgpt.serve_model import ServingOptions
    from truthgpt.serving.server import ServerOptions

    opens = browser and has_display()

    def on_ready(url: str, model_name: str, chats: bool) -> None:
        say(f"{model_name} is at {url}; Ctrl-C ends it")
        if opens:
            # In a thread: some browsers return only when they are closed.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        elif browser:
            number = url.rpartition(":")[2]
            say(f"no display here: from another machine, ssh -L {number}:127.0.0.1:{number} HOST and open the same URL")

    server = ServerOptions("127.0.0.1", port, shorten=True)
    run_model_server(target, ServingOptions(device, engine=EngineOptions(streaming=True)), server, on_ready, _page)


def has_display() -> bool:
    """Whether a browser can be shown; without a display Python would start one for the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _page(model: TextModel) -> Sequence[BaseRoute]:
    from truthgpt.runtime.device import describe_hardware
    from truthgpt.serving.page_app import ModelFacts, page_routes

    loaded, trained = model.loaded, model.loaded.model
    device = trained.device
    facts = ModelFacts(
        name=model.engine.model_name,
        family=trained.config.model_type,
        parameters=trained.num_parameters(),
        context_tokens=model.engine.context_tokens,
        device=str(describe_hardware(device)["name"]) if device.type == "cuda" else device.type,
        dtype=str(trained.dtype).removeprefix("torch."),
        chat_template=model.tokenizer.chat_template is not None,
        folder=loaded.folder.resolve().name,
    )
    return page_routes(facts, loaded.run_directory)
