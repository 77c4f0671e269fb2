"""What `serve` and `demo` have in common: a model loaded once its port is taken, served until Ctrl-C."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from truthgpt.cli.output import say

if TYPE_CHECKING:
    from starlette.routing import BaseRoute
    from transformers import PreTrainedTokenizerBase

    from truthgpt.serve_model import ServingOptions, TextModel
    from truthgpt.serving.base import TextEngine
    from truthgpt.serving.server import ServerOptions


def run_model_server(
    target: Path,
    model_options: ServingOptions,
    options: ServerOptions,
    on_ready: Callable[[str, str, bool], None],
    make_routes: Callable[[TextModel], Sequence[BaseRoute]] = lambda model: (),
) -> None:
    """Serve what `target` names until a signal; see `serve_engine`.

    Args:
        on_ready: called with the server's URL, the model's name and whether it has a chat template, once requests
            are taken.
        make_routes: more routes than the API's, for a page about the model.

    Raises:
        ConfigError: the port cannot be taken, or the model writes no text.
        CheckpointError: there is nothing to load.
    """
    from truthgpt.runtime.run_log import attach_console, detach
    from truthgpt.serve_model import open_text_model
    from truthgpt.serving.server import serve_engine

    routes: list[BaseRoute] = []

    @contextmanager
    def engine() -> Iterator[tuple[TextEngine, PreTrainedTokenizerBase]]:
        with open_text_model(target, model_options) as model:
            routes.extend(make_routes(model))
            yield model.engine, model.tokenizer

    console = attach_console(logging.INFO)
    try:
        serve_engine(engine, options, on_ready, routes)
    finally:
        detach(console)
    say("stopped")
