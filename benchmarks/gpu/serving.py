"""`truthgpt serve` under load, from outside: streamed completions for many clients at once.

    python benchmarks/gpu/serving.py --out benchmarks/results/serving.jsonl
    python benchmarks/gpu/serving.py --clients 64 --requests 512 -- --no-compile     # options of the server
    python benchmarks/gpu/serving.py --size small --clients 1 16                      # runs on a CPU

The model has the shape of Llama 1B and random bf16 weights. The load is closed: a client sends its next request when
its last one has ended. Prompts are random text of 100 to 1,000 tokens, answers greedy, of 100 to 400 tokens, so that no
two requests share anything. Before the first level as many requests as there are clients at most warm the server up.
Tokens a second count the answers' tokens over the whole time of a level, prompts included. A token is timed by the
client, when its text is there; the time between tokens is the mean of a request.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from completion_client import Answer, BadAnswerError, Exchange, Request, complete, read_answer
from processes import HERE, append_record, gpu_state, offline_environment
from random_llama import PRINTABLE, SIZES

CLIENTS = (1, 16, 64, 256)
REQUESTS_PER_CLIENT = 4
PROMPT_TOKENS = (100, 1000)
MAX_TOKENS = (100, 400)
READY_TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0
TOKEN_TIMES = ("time_to_first_token_s", "between_tokens_s")
PACKAGES = ("torch", "transformers", "starlette", "uvicorn")


@dataclass
class Server:
    """A server under way; `exit_code` once it has ended."""

    url: str
    ready_s: float
    exit_code: int | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the model, measure every level, print and append a record each."""
    options = _options(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or the server would outlive it
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary) / "model"
        if not folder.exists():
            made = [sys.executable, str(HERE / "random_llama.py"), str(folder), "--size", options.size]
            subprocess.run(made, check=True, env=offline_environment())
        with served(folder, options.server, Path(temporary) / "server.log") as server:
            print(f"ready after {server.ready_s:.1f} s", flush=True)
            asyncio.run(load(server.url, requests(options, "warm-up", max(options.clients)), max(options.clients)))
            for clients in options.clients:
                count = options.requests or REQUESTS_PER_CLIENT * clients
                found = measure(server.url, requests(options, str(clients), count), clients)
                failed += found["failed"]
                if options.out is not None:
                    append_record(options.out, {**_circumstances(options, server), **found})
                print(_line(found), flush=True)
    if server.exit_code != 0:
        raise SystemExit(f"after SIGINT the server ended with exit code {server.exit_code}, not 0")
    if failed:
        raise SystemExit(f"{failed} requests failed")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1b", help="of the model that is made")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="where it stands; it is made if it does not")
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS), help="levels")
    parser.add_argument("--requests", type=int, help=f"of a level (default: {REQUESTS_PER_CLIENT} a client)")
    parser.add_argument("--prompt-tokens", nargs=2, type=int, default=PROMPT_TOKENS, metavar=("LEAST", "MOST"))
    parser.add_argument("--max-tokens", nargs=2, type=int, default=MAX_TOKENS, metavar=("LEAST", "MOST"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to append the records to")
    parser.add_argument("server", nargs="*", metavar="-- OPTION", help="options of truthgpt serve")
    return parser.parse_args(argv)


def requests(options: argparse.Namespace, purpose: str, count: int) -> list[Request]:
    """Requests of random text, where a character is a token; others for every purpose, so that none is remembered."""
    numbers = random.Random(f"{options.seed} {purpose}")
    return [
        Request(
            "".join(numbers.choices(PRINTABLE, k=numbers.randint(*options.prompt_tokens))),
            numbers.randint(*options.max_tokens),
        )
        for _ in range(count)
    ]


@contextmanager
def served(folder: Path, options: Sequence[str], log: Path) -> Iterator[Server]:
    """`truthgpt serve` at a free port, once it is ready; ended with SIGINT."""
    command = [sys.executable, "-m", "truthgpt", "serve", str(folder), "--port", "0", *options]
    begin = time.perf_counter()
    with log.open("wb") as errors:
        # In a session of its own: Ctrl-C in the terminal is for this process, which then ends the server.
        process = subprocess.Popen(command, stderr=errors, env=offline_environment(), start_new_session=True)
    try:
        server = Server(_url_said(process, log), time.perf_counter() - begin)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    server.exit_code = process.returncode


def _url_said(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.perf_counter() + READY_TIMEOUT_S
    while time.perf_counter() < end and process.poll() is None:
        if found := re.search(r" at (http://\S+)/v1; ", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the server was not ready (exit code {process.poll()}): {log.read_text()[-2000:]}")


async def load(url: str, asked: Iterable[Request], clients: int) -> list[Exchange]:
    """Send the requests, each client one at a time."""
    left, done = deque(asked), []

    async def client() -> None:
        while left:
            done.append(await complete(url, left.popleft()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return done


def measure(url: str, asked: Sequence[Request], clients: int) -> dict[str, Any]:
    """One level: its speed and its waiting times."""
    cpu_begin, begin = time.process_time(), time.perf_counter()
    exchanges = asyncio.run(load(url, asked, clients))
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    answers, failures = [], Counter[str]()
    for exchange in exchanges:
        try:
            answers.append(read_answer(exchange))
        except BadAnswerError as error:
            failures[str(error)] += 1
    level: dict[str, Any] = {"clients": clients, "requests": len(asked), "failed": failures.total()}
    # What the client itself takes: near 1 it would be the client that is measured.
    level |= {"failures": dict(failures.most_common(3)), "seconds": seconds, "client_cpu_share": cpu_seconds / seconds}
    return {**level, **(_figures(answers, seconds) if answers else {})}


def _figures(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    tokens = sum(each.tokens for each in answers)
    return {
        "prompt_tokens": sum(each.prompt_tokens for each in answers),
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / seconds,
        "tokens_per_event": tokens / sum(each.events for each in answers),
        "time_to_first_token_s": _percentiles([each.first_text_s for each in answers]),
        "between_tokens_s": _percentiles([each.between_tokens_s for each in answers]),
        "request_s": _percentiles([each.end_s for each in answers]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """The least values that half and 95% of them do not exceed."""
    ordered = sorted(values)
    return {f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] for share in (50, 95)}


def _circumstances(options: argparse.Namespace, server: Server) -> dict[str, Any]:
    asked = {"prompt_tokens_asked": list(options.prompt_tokens), "max_tokens_asked": list(options.max_tokens)}
    return {
        **{"kind": "serving", "model": options.size if options.model is None else options.model.name, **asked},
        **{"seed": options.seed, "server_options": options.server, "ready_s": server.ready_s, "gpu": gpu_state()},
        "versions": {package: version(package) for package in PACKAGES},
    }


def _line(level: dict[str, Any]) -> str:
    line = f"{level['clients']:4} clients {level['requests']:5} requests {level['failed']} failed"
    if "output_tokens" in level:
        first, between = ({name: 1e3 * level[key][name] for name in ("p50", "p95")} for key in TOKEN_TIMES)
        line += (
            f" {level['output_tokens_per_s']:9,.0f} tokens/s, "
            f"first token {first['p50']:.0f} ms (p95 {first['p95']:.0f}), "
            f"between tokens {between['p50']:.2f} ms (p95 {between['p95']:.2f}), "
            f"request p95 {level['request_s']['p95']:.2f} s, client {level['client_cpu_share']:.0%} of a core"
        )
    return line + "".join(f"\n  {count} failed: {why}" for why, count in level["failures"].items())


if __name__ == "__main__":
    main()
