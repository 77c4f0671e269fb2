"""The OpenAI API over an engine: completions and chat completions, whole or streamed."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from truthgpt.errors import TruthGPTError
from truthgpt.inference.request import Sampling
from truthgpt.runtime.seeds import derive_seed
from truthgpt.serving.api_error import ApiError
from truthgpt.serving.engine_thread import BusyError, EngineError, EngineThread, StoppingError, TextRequest
from truthgpt.serving.guards import HostGuard, KeyGuard
from truthgpt.serving.metrics import Metrics
from truthgpt.serving.openai_answers import DONE, ChatFormat, Choice, CompletionFormat, Envelope, Format, Usage, event
from truthgpt.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    parse_request,
)
from truthgpt.serving.piece_stream import PieceStream
from truthgpt.serving.prompts import PromptEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BODY_BYTES = 4 * 1024 * 1024
STOP_DEADLINE_S = 10.0
"""How long answers under way may go on when the server is stopped."""
COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say how many; OpenAI's default."""
UNLIMITED_CHAT_TOKENS = 1024
"""New tokens of a chat answer that does not say how many, from a model without a known limit."""
CLIENT_LEFT = 499
"""Stands for an HTTP status in the counters: the client left before its answer was complete."""
ENDPOINTS = ("GET /v1/models", "POST /v1/completions", "POST /v1/chat/completions", "GET /health", "GET /metrics")


def create_app(
    thread: EngineThread,
    tokenizer: PreTrainedTokenizerBase,
    *,
    hosts: Collection[str] | None = None,
    api_key: str | None = None,
    public: Collection[str] = ("/health",),
    shorten: bool = False,
    routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """The application: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, `/health` and `/metrics`.

    Its lifespan starts the thread and stops it.

    Args:
        thread: writes the answers; not started yet.
        tokenizer: the model's; a copy of it is used.
        hosts: allowed Host headers without port; None: all.
        api_key: what clients have to send as `Authorization: Bearer KEY`; None: nothing.
        public: paths that need no key.
        shorten: write as many new tokens as fit where more are asked for, instead of refusing the request.
        routes: more routes, for pages.
    """
    api = _Api(thread, PromptEncoder(tokenizer), Metrics(), shorten)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        thread.start()
        giving_up = asyncio.create_task(api.give_up_bodies())
        try:
            yield
        finally:
            await thread.stop(STOP_DEADLINE_S)
            await giving_up
            api.encoder.close()

    guards = [] if hosts is None else [Middleware(HostGuard, hosts=frozenset(hosts))]
    if api_key is not None:
        guards.append(Middleware(KeyGuard, key=api_key, public=frozenset(public)))
    return Starlette(
        routes=[
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{model:path}", api.model, methods=["GET"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/metrics", api.metrics_text, methods=["GET"]),
            *routes,
        ],
        middleware=guards,
        exception_handlers={HTTPException: _on_http_exception, Exception: _on_exception},
        lifespan=lifespan,
    )


@dataclass
class _Job:
    """One client's request, with the engine."""

    envelope: Envelope
    stream: PieceStream
    count: int
    usage: Usage


class _Api:
    """The endpoints."""

    def __init__(self, thread: EngineThread, encoder: PromptEncoder, metrics: Metrics, shorten: bool) -> None:
        self.encoder = encoder
        self._thread = thread
        self._metrics = metrics
        self._shorten = shorten
        self._created = int(time.time())
        self._encoding = 0
        self._bodies: set[asyncio.Timeout] = set()

    async def give_up_bodies(self) -> None:
        """Once the server is being stopped, wait for no body that is still on its way."""
        await self._thread.stopping.wait()
        for limit in self._bodies:
            limit.reschedule(0)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        try:
            self._check_model(request.path_params["model"])
        except ApiError as error:
            return error.response()
        return JSONResponse(self._model_card())

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, else 503."""
        state = self._thread.state
        return JSONResponse({"status": state, "model": self._thread.model_name}, 200 if state == "ok" else 503)

    async def metrics_text(self, request: Request) -> Response:
        """The counters."""
        return PlainTextResponse(self._metrics.text(self._thread), media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, self._completion_job)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, self._chat_job)

    async def _answer(self, request: Request, make_job: Callable[[bytes], Awaitable[_Work]]) -> Response:
        started, path = time.monotonic(), request.url.path
        try:
            fields, job = await make_job(await self._body(request))
            if fields.stream:
                return _EventStream(
                    job, fields.include_usage, functools.partial(self._metrics.count, path, started=started)
                )
            choices = await _written(job, request.receive)
        except (ApiError, TruthGPTError) as error:
            refused = _as_api_error(error)
            self._metrics.count(path, refused.status, None, started)
            return refused.response()
        complete = all(choice.finish for choice in choices)
        self._metrics.count(path, 200 if complete else CLIENT_LEFT, job.usage, started)
        return JSONResponse(job.envelope.whole(choices, job.usage))

    async def _body(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(0 if self._thread.stopping.is_set() else None) as limit:
                self._bodies.add(limit)
                try:
                    return await _read_body(request)
                finally:
                    self._bodies.discard(limit)
        except TimeoutError as error:
            raise StoppingError("the server is being stopped") from error

    async def _completion_job(self, body: bytes) -> _Work:
        fields = parse_request(CompletionRequest, body)
        self._check_model(fields.model)
        with self._place_for(len(fields.prompts) * (fields.n or 1)):
            prompts = await self.encoder.encode(fields.prompts)
        return fields, await self._submit(CompletionFormat(), fields, prompts, fields.max_tokens or COMPLETION_TOKENS)

    async def _chat_job(self, body: bytes) -> _Work:
        fields = parse_request(ChatRequest, body)
        self._check_model(fields.model)
        with self._place_for(fields.n or 1):
            prompt = await self.encoder.encode_chat([message.for_template() for message in fields.messages])
        return fields, await self._submit(ChatFormat(), fields, [prompt], fields.new_tokens)

    @contextmanager
    def _place_for(self, count: int) -> Iterator[None]:
        """Refuse a request that would not be taken before its prompts are encoded; those being encoded count too."""
        if count > self._thread.max_waiting:
            raise ApiError(400, f"{count} answers are more than the {self._thread.max_waiting} this server lets wait")
        self._thread.check_room(self._encoding + count)
        self._encoding += count
        try:
            yield
        finally:
            self._encoding -= count

    async def _submit(
        self, form: Format, fields: SamplingFields, prompts: list[list[int]], new_tokens: int | None
    ) -> _Job:
        requests = []
        for prompt in prompts:
            limit = self._new_tokens(len(prompt), new_tokens)
            # Of every prompt the first choice has the seed itself: it is the answer to a request for it alone.
            seed = secrets.randbits(63) if fields.seed is None else fields.seed
            seeds = [seed, *(derive_seed(seed, "choice", number) for number in range(1, fields.n or 1))]
            samplings = [_sampling(fields, limit, own) for own in seeds]
            if isinstance(fields, ChatRequest):
                samplings = [self.encoder.turn_end.ending(sampling) for sampling in samplings]
            requests += [TextRequest(prompt, sampling) for sampling in samplings]
        stream = self._thread.stream(requests)
        try:
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return _Job(Envelope(form, self._thread.model_name), stream, len(requests), Usage(sum(map(len, prompts))))

    def _new_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        """New tokens for a prompt: as asked, or all that fit. n prompt and m new tokens take n + m - 1 positions."""
        context = self._thread.context_tokens
        if context is not None and prompt_tokens > context:
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens and the model {context} positions: shorten the prompt",
                code="context_length_exceeded",
            )
        if context is not None and asked is not None and prompt_tokens + asked - 1 > context and not self._shorten:
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens and {asked} new ones are asked for, the model has {context} "
                f"positions: ask for at most {context + 1 - prompt_tokens} new ones, or shorten the prompt",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if asked is not None and not self._shorten:
            return asked
        limits = [limit for limit in (context, self._thread.load.cache_tokens) if limit]
        # The engine itself refuses a prompt that is larger than its cache.
        room = max(min(limits) + 1 - prompt_tokens, 1) if limits else asked or UNLIMITED_CHAT_TOKENS
        return room if asked is None else min(asked, room)

    def _check_model(self, name: str | None) -> None:
        known = self._thread.model_name
        if name is not None and name != known:
            raise ApiError(404, f"there is no model {name!r}: this server has {known!r}", "model", "model_not_found")

    def _model_card(self) -> dict[str, str | int]:
        return {"id": self._thread.model_name, "object": "model", "created": self._created, "owned_by": "truthgpt"}


_Work = tuple[SamplingFields, _Job]


class _EventStream(Response):
    """An answer as server-sent events."""

    def __init__(self, job: _Job, with_usage: bool, count: Callable[[int, Usage], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._job = job
        self._with_usage = with_usage
        self._count = count
        self._status = CLIENT_LEFT

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the last, or until the client leaves."""
        try:
            async with _closed_when_client_leaves(receive, self._job.stream):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for data in self._events():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._count(self._status, self._job.usage)

    async def _events(self) -> AsyncIterator[bytes]:
        job, form, finished = self._job, self._job.envelope.form, 0
        for index in range(job.count):
            for choice in form.opening(index):
                yield job.envelope.chunk(choice, self._with_usage)
        try:
            async for index, piece in job.stream:
                job.usage.completion_tokens += len(piece.token_ids)
                finished += piece.finish is not None
                for choice in form.pieces(index, piece):
                    yield job.envelope.chunk(choice, self._with_usage)
        except TruthGPTError as error:
            failed = _as_api_error(error)
            self._status = failed.status
            yield event(failed.body())
            return
        if finished == job.count:
            self._status = 200
            if self._with_usage:
                yield job.envelope.usage_chunk(job.usage)
            yield DONE


async def _written(job: _Job, receive: Receive) -> list[Choice]:
    """All choices, complete unless the client leaves."""
    choices = [Choice() for _ in range(job.count)]
    async with _closed_when_client_leaves(receive, job.stream):
        async for index, piece in job.stream:
            choices[index].add(piece)
            job.usage.completion_tokens += len(piece.token_ids)
    return choices


@asynccontextmanager
async def _closed_when_client_leaves(receive: Receive, stream: PieceStream) -> AsyncIterator[None]:
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        stream.close()


async def _read_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Not only for order's sake: a browser sends this type to another site only after asking it.
        raise ApiError(415, "send JSON with the header Content-Type: application/json", code="unsupported_media_type")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    except ClientDisconnect as error:
        raise ApiError(CLIENT_LEFT, "the client left") from error
    return bytes(body)


def _sampling(fields: SamplingFields, max_new_tokens: int, seed: int) -> Sampling:
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=fields.top_k or 0,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        repetition_penalty=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
        seed=seed,
        stop=fields.stops,
    )


def _as_api_error(error: ApiError | TruthGPTError) -> ApiError:
    if isinstance(error, ApiError):
        return error
    status, code = {
        BusyError: (429, "too_many_requests"),
        StoppingError: (503, "server_stopping"),
        EngineError: (500, "engine_error"),
    }.get(type(error), (400, None))
    return ApiError(status, str(error), code=code)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}; the endpoints are {', '.join(ENDPOINTS)}"
    return ApiError(error.status_code, message, code="unknown_url").response()


async def _on_exception(request: Request, error: Exception) -> Response:
    return ApiError(500, "unexpected error; the server's log says more", code="internal_error").response()
