"""Who may ask a server, its port, and its beginning and end as a command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import truthgpt.serving.server
from tests.process import Cli, Running
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import RunningServer, serving, wait_until
from truthgpt.errors import ConfigError
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.serving.engine_thread import EngineThread
from truthgpt.serving.guards import is_loopback
from truthgpt.serving.openai_api import create_app
from truthgpt.serving.packages import require_server_packages
from truthgpt.serving.server import ServerOptions, bind, run_app

KEY = "sk-test-51f0c9"


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    with serving(api_key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


def test_the_right_key(guarded: RunningServer) -> None:
    with guarded.new_client(api_key=KEY) as client:
        assert client.completions.create(model="fake", prompt="x", max_tokens=1).choices


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], f"{KEY}x"])
def test_a_wrong_key(guarded: RunningServer, key: str) -> None:
    with guarded.new_client(api_key=key) as client:
        with pytest.raises(openai.AuthenticationError, match="wrong or missing API key") as caught:
            client.completions.create(model="fake", prompt="x")
        assert caught.value.code == "invalid_api_key" and KEY not in str(caught.value)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/", "/v1/completions", "/healthy"])
def test_without_a_key(guarded: RunningServer, path: str) -> None:
    for value in (None, "", KEY, f"Basic {KEY}", f"Bearer  {KEY}", b"Bearer \xff\xfe"):
        headers: Any = {} if value is None else {"Authorization": value}
        assert httpx.get(f"{guarded.url}{path}", headers=headers).status_code == 401


def test_health_needs_no_key(guarded: RunningServer) -> None:
    assert httpx.get(f"{guarded.url}/health").status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000", "LocalHost:80"])
def test_hosts_of_this_machine(server: RunningServer, host: str) -> None:
    assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "::1", "", "a:b"]
)
def test_a_name_that_resolves_to_this_machine(server: RunningServer, host: str) -> None:
    """DNS rebinding: the browser takes the page's site and this server for one."""
    for path in ("/health", "/v1/models", "/metrics"):
        answer = httpx.get(f"{server.url}{path}", headers={"Host": host})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"


def test_no_other_site_may_read_the_answers(server: RunningServer) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        httpx.options(f"{server.url}/v1/completions", headers=asked),
        httpx.get(f"{server.url}/v1/models", headers=asked),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_port_in_use() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        message = f"cannot serve at 127.0.0.1, port {port}: Address already in use; give another --port"
        with pytest.raises(ConfigError, match=message):
            bind("127.0.0.1", port)


def test_connections_stay_open_longer_than_clients_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that closes one first may do so while a request is on its way: then that is lost."""
    opened: list[uvicorn.Config] = []

    class Stub:
        def __init__(self, config: uvicorn.Config, *_: Any) -> None:
            opened.append(config)

        def run(self, sockets: list[socket.socket]) -> None:
            """Nothing."""

    monkeypatch.setattr(truthgpt.serving.server, "_Server", Stub)
    with bind("127.0.0.1", 0) as bound:
        run_app(Starlette(), EngineThread(FakeEngine()), bound, lambda: None)
    clients = httpx.Limits().keepalive_expiry
    assert clients is not None and opened[0].timeout_keep_alive > 2 * clients


def test_an_answer_that_is_broken_off_at_the_end_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """As for a client that does not read, whose answer waits for room; a real error is told with its traceback."""
    broken_off: list[BaseException] = []

    async def stuck(request: Request) -> Response:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            broken_off.append(error)
            raise
        raise AssertionError

    async def fail(request: Request) -> Response:
        raise ZeroDivisionError

    with bind("127.0.0.1", 0) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"

        def ask() -> None:
            assert httpx.get(f"{url}/fail").status_code == 500
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/stuck", timeout=60)

        client = threading.Thread(target=ask)
        thread = EngineThread(FakeEngine())
        app = create_app(thread, byte_tokenizer(), routes=[Route("/stuck", stuck), Route("/fail", fail)])
        run_app(app, thread, bound, client.start)
        client.join()
    assert broken_off
    told = [record.exc_info[0] for record in caplog.records if record.name == "uvicorn.error" and record.exc_info]
    assert told == [ZeroDivisionError]


def test_a_host_that_is_no_address() -> None:
    with pytest.raises(ConfigError, match=r"--host: no\.such\.host\.invalid is no address"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(ConfigError, match=r"cannot serve at 192\.0\.2\.1"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert f"[{host}]" in (ServerOptions(host).allowed_hosts or ()) or host in (ServerOptions(host).allowed_hosts or ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_other_machines_need_a_key(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"lets other machines in, so clients need a key.*--api-key-env NAME"):
        ServerOptions(host)
    options = ServerOptions(host, api_key=KEY)
    assert options.allowed_hosts is None and KEY not in repr(options)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_its_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_server_packages()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"starlette and uvicorn: .*{package}.*pip install 'truthgpt\[demo\]'"):
        require_server_packages()


class Served:
    """`truthgpt serve` in a process of its own."""

    def __init__(self, cli: Cli, *options: str, model: str = "tiny", env: dict[str, str] | None = None) -> None:
        self._model = model
        self.running: Running = cli.start(
            "--plugin", "tests.plugins.fake_engine", "serve", f"runs/{model}", "--port", "0", *options, env=env
        )
        self._stderr = cli.folder / ".stderr1"
        wait_until(lambda: "curl" in self.stderr, 60)

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._stderr.read_text() if self._stderr.exists() else ""

    @property
    def url(self) -> str:
        """Where it says that it serves."""
        found = re.search(rf"serving {self._model} at (http://\S+?)/v1; Ctrl-C ends it", self.stderr)
        assert found, self.stderr
        return found[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command(cli: Cli, number: signal.Signals) -> None:
    served = Served(cli)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        assert client.completions.create(model="tiny", prompt="x", max_tokens=3).choices[0].finish_reason == "length"
    os.kill(served.running.pid, number)
    finished = served.running.wait(30)
    assert finished.exit_code == 0 and finished.stdout == ""
    lines = finished.stderr.splitlines()
    assert lines[1].startswith(f"  curl {served.url}/v1/completions -H 'Content-Type: application/json' -d '")
    assert re.fullmatch(r"/v1/completions 200, 1 \+ 3 tokens, \d+\.\d\d s", lines[2])
    assert lines[3:] == ["stopped"]


def test_the_end_of_the_command_waits_for_answers(cli: Cli) -> None:
    served = Served(cli)
    body = {"prompt": "x", "max_tokens": 60, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        written = [next(lines)]
        os.kill(served.running.pid, signal.SIGINT)
        written += lines
    assert served.running.wait(30).exit_code == 0
    assert written[-1] == "data: [DONE]"
    assert len("".join(json.loads(line[6:])["choices"][0]["text"] for line in written[:-1])) == 60


def test_the_end_of_the_command_waits_for_no_request_that_is_still_being_sent(cli: Cli) -> None:
    served = Served(cli)
    address = served.url.removeprefix("http://")
    host, _, port = address.rpartition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: 99"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f'{head}\r\nExpect: 100-continue\r\n\r\n{{"prompt"'.encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 100"), "it waits for the body"
        os.kill(served.running.pid, signal.SIGTERM)
        finished = served.running.wait(8)
        assert client.recv(1000).startswith(b"HTTP/1.1 503")
    assert finished.exit_code == 0 and "Traceback" not in finished.stderr, finished.stderr


def test_a_second_ctrl_c_waits_for_nobody(cli: Cli) -> None:
    served = Served(cli)
    body = {"prompt": "x", "max_tokens": 100_000, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: its end closes the connection
        next(lines)
        os.kill(served.running.pid, signal.SIGINT)
        wait_until(lambda: _refuses(served.url))
        os.kill(served.running.pid, signal.SIGINT)
        finished = served.running.wait(8)
        assert any("the server was stopped before the answer was complete" in line for line in lines)
    assert finished.exit_code == 0 and "Traceback" not in finished.stderr, finished.stderr


def _refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False  # it was connected when the server began to end, and the connection was closed
    return False


def test_what_the_command_shows_to_try_works(cli: Cli) -> None:
    """A model with a chat template is asked through it: the plain beginning of a text is not what it was trained on."""
    served = Served(cli, model="chatty")
    command = shlex.split(served.stderr.splitlines()[1])
    url, body = command[1], json.loads(command[-1])
    answer = httpx.post(url, json={**body, "max_tokens": 3})
    os.kill(served.running.pid, signal.SIGINT)
    assert served.running.wait(30).exit_code == 0
    assert url == f"{served.url}/v1/chat/completions"
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_the_command_with_a_key(cli: Cli) -> None:
    served = Served(cli, "--host", "0.0.0.0", "--api-key-env", "MY_KEY", env={"MY_KEY": KEY})
    url = served.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    good = {"Authorization": f"Bearer {KEY}", "Host": "my-machine.example"}
    assert httpx.get(f"{url}/v1/models", headers=good).status_code == 200
    os.kill(served.running.pid, signal.SIGINT)
    finished = served.running.wait(30)
    assert finished.exit_code == 0 and KEY not in finished.stderr + finished.stdout
    assert finished.stderr.startswith("warning: other machines can reach this server")
    assert '-H "Authorization: Bearer $MY_KEY"' in finished.stderr


def test_mistakes_of_the_command(cli: Cli) -> None:
    plugin = ("--plugin", "tests.plugins.fake_engine", "serve")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            (
                ("runs/tiny", "--port", port),
                2,
                f"error: cannot serve at 127.0.0.1, port {port}: Address already in use",
            ),
            (("runs/absent", "--port", "0"), 4, "error: nothing to load at runs/absent"),
            (("runs/tiny", "--host", "0.0.0.0"), 2, "error: --host 0.0.0.0 lets other machines in"),
            (("runs/tiny", "--api-key-env", "NOT_SET"), 2, "error: --api-key-env: the environment variable NOT_SET"),
        ]
        for arguments, code, said in cases:
            finished = cli(*plugin, *arguments)
            assert finished.exit_code == code and finished.stderr.startswith(said), finished.stderr
            assert len(finished.stderr.splitlines()) == 1
    assert not list(Path().glob("runs"))
