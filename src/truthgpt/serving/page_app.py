"""The chat page: its files, and what it asks for besides the API."""

from __future__ import annotations

import importlib.resources
from dataclasses import asdict, dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from truthgpt.config.strict_yaml import parse_yaml
from truthgpt.errors import ConfigError
from truthgpt.runtime.run_directory import is_in_use, read_status
from truthgpt.serving.run_curves import read_curves

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class ModelFacts:
    """What the page says about the model.

    Attributes:
        name: as in the API.
        family: transformers' model type.
        context_tokens: positions the model has; None: no limit is known.
        folder: name of the folder it was loaded from.
    """

    name: str
    family: str
    parameters: int
    context_tokens: int | None
    device: str
    dtype: str
    chat_template: bool
    folder: str


def page_routes(model: ModelFacts, run_directory: Path | None) -> list[Route]:
    """The page (`/` and `/page/...`) and `/api/run`, to be served beside the API.

    Args:
        run_directory: where the curves are; None: the model comes from a folder that is no run.
    """
    prompts = _sampled_prompts(run_directory)

    def answer(request: Request) -> Response:
        """Read anew each time: the run may still be training."""
        curves = {} if run_directory is None else read_curves(run_directory / "metrics.jsonl")
        document = {"model": asdict(model), "run": _describe(run_directory), "curves": curves, "prompts": prompts}
        return JSONResponse(document, headers={"Cache-Control": "no-store"})

    files = (importlib.resources.files("truthgpt.serving") / "page").iterdir()
    return [Route("/api/run", answer), *[_file_route(file) for file in files if Path(file.name).suffix in _TYPES]]


def _file_route(file: Traversable) -> Route:
    content, media_type = file.read_bytes(), _TYPES[Path(file.name).suffix]

    def answer(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return Route("/" if file.name == "index.html" else f"/page/{file.name}", answer)


def _describe(run_directory: Path | None) -> dict[str, Any] | None:
    if run_directory is None:
        return None
    status = read_status(run_directory) or {}
    state = status.get("state", "unknown")
    if state == "running" and not is_in_use(run_directory):
        state = "stopped"
    return {
        "directory": run_directory.resolve().name,
        "state": state,
        **{key: status.get(key) for key in ("step", "max_steps", "best_step")},
    }


def _sampled_prompts(run_directory: Path | None) -> list[str]:
    """The prompts the run sampled from while it trained; they suit its data."""
    if run_directory is None:
        return []
    file = run_directory / "config.yaml"
    try:
        config = parse_yaml(file.read_text(encoding="utf-8"), str(file)).data
    except (OSError, UnicodeDecodeError, ConfigError):
        return []  # a run without its configuration can still be talked to
    generate = config.get("generate")
    prompts = generate.get("prompts") if isinstance(generate, dict) else None
    return [prompt for prompt in prompts or [] if isinstance(prompt, str)]
