"""`truthgpt serve`: answer requests of the OpenAI API with a trained model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from truthgpt.cli.generate import ComputeType
from truthgpt.cli.model_server import run_model_server
from truthgpt.cli.output import say
from truthgpt.cli.sizes import parse_size
from truthgpt.errors import ConfigError

_COMPLETION = ("completions", '{"prompt": "Once upon a time", "max_tokens": 64}')
_CHAT = ("chat/completions", '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}')
"""What to try a server with: an endpoint, and a body for it."""


def serve(
    target: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|HF_DIR", help="What to load.")],
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu or mps.")] = "auto",
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait for their first token.")] = 1024,
    dtype: Annotated[
        ComputeType, typer.Option(help="auto: bf16 on a GPU that has it, float32 elsewhere.")
    ] = ComputeType.auto,
    cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the paged cache, such as 4GiB.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="On a GPU, compile the layers: about 10 s at first.")
    ] = True,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key that clients must send.")
    ] = None,
) -> None:
    """Answer requests of the OpenAI API with a run's model, a checkpoint or a Hugging Face folder."""
    from truthgpt.serving.packages import require_server_packages

    require_server_packages()
    from truthgpt.inference.open_engine import EngineOptions
    from truthgpt.serve_model import ServingOptions
    from truthgpt.serving.guards import is_loopback
    from truthgpt.serving.server import ServerOptions

    options = ServerOptions(host, port, api_key_from(api_key_env), max_waiting)
    if not is_loopback(host):
        say("warning: other machines can reach this server, and what they send is not encrypted")

    def on_ready(url: str, model_name: str, chats: bool) -> None:
        key = "" if api_key_env is None else f' -H "Authorization: Bearer ${api_key_env}"'
        path, body = _CHAT if chats else _COMPLETION
        say(f"serving {model_name} at {url}/v1; Ctrl-C ends it. Try:")
        say(f"  curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'")

    size = None if cache_memory is None else parse_size(cache_memory, "--cache-memory")
    model_options = ServingOptions(device, dtype.value, engine=EngineOptions(size, compiled, streaming=True))
    run_model_server(target, model_options, options, on_ready)


def api_key_from(variable: str | None) -> str | None:
    """The key in an environment variable; None without one.

    Raises:
        ConfigError: the variable is not set, or empty.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"--api-key-env: the environment variable {variable} is not set, or empty")
    return key
