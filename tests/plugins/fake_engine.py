"""`truthgpt serve` with an engine that has no model, as a plugin; its folder's name is the model's, and one called
"chatty" has a chat template."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.sample_data import CHAT_TEMPLATE
from tests.serving.fake_engine import FakeEngine

from truthgpt import serve_model
from truthgpt.errors import CheckpointError


@contextmanager
def _open_text_model(target: Path, options: Any) -> Iterator[Any]:
    from truthgpt.models.tokenizer import byte_tokenizer

    if target.name == "absent":
        raise CheckpointError(f"nothing to load at {target}")
    engine = FakeEngine(target.name, step_s=0.01, context_tokens=None)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if target.name == "chatty" else None
    yield SimpleNamespace(engine=engine, tokenizer=tokenizer)


serve_model.open_text_model = _open_text_model
