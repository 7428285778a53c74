"""Tests of datadivr, in the order of its sections, each with a mark: `pytest -m cluster`.

`pytest -m benchmark` measures, and `python test_datadivr.py` prints the README's promises, each
with the tests that hold it. These fixtures start servers. `configure` changes settings of this
process, and so of those that run in it:

| fixture | server | where | for | start |
|---|---|---|---|---|
| `api` | Starlette's TestClient | this process | a test | at once |
| `live` | uvicorn, with default options | a thread of this process | the session | 0.1 s |
| `tab`, `page` | `live`, with a page in Chromium | this process | the session | 1 s |
| `server` | `APPLICATION`, under each of `SERVERS` | a process | the session | 1 s each |
| `scraped`, `both` | two uvicorns, each with a Prometheus | processes | the session | 6 s |
| `cluster`, `pair`, `flow`, `gardeners` | a Redis and two nodes | processes | the module | 2 s |
| `tutorial`, `recipes`, `people`, `members` | code of the README | a process | the session | 1 s |
| `counted` | uvicorn, which counts its objects | a process | the session | 1 s |

`loop` has no server: a test runs the turns of the event loop, and looks at what was written.

Variables of the environment: with `CI`, a test fails whose program is missing, where others skip
it. `SLOW_MACHINE=3` makes all bounds on time three times as long. `NODE_PATH` is where the node
modules are.
"""

import argparse
import array
import asyncio
import configparser
import contextlib
import functools
import gc
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
import types
import uuid
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Optional, Self, TypeVar, assert_type
from urllib.parse import quote
from zoneinfo import ZoneInfo

import anyio.to_thread
import fastapi
import httpx2 as httpx
import hypothesis
import pytest
import redis
import starlette
import structlog
import uvicorn
from fastapi.routing import APIWebSocketRoute
from fastapi.testclient import TestClient
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    Route,
    WebSocketRoute,
    expect,
    sync_playwright,
)
from playwright.sync_api import Error as PlaywrightError
from prometheus_client.mmap_dict import MmapedDict
from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticSerializationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.staticfiles import StaticFiles
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect, WebSocketState
from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as dial_as_usual
from websockets.typing import Origin, Subprotocol

import datadivr
from datadivr import HandlerType, WebSocketMessage

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text()
SOURCE = Path(__file__).read_text()
# The rule above a section names the mark that the section's tests get, at the end of this file.
SECTION = r"^# ---- .*: `pytest -m (\w+)` -+$"
SLOWNESS = float(os.environ.get("SLOW_MACHINE", "1"))  # it stretches all bounds on time
LIMIT = 10.0 * SLOWNESS  # seconds that anything may take
TOKEN = "secret"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
os.environ["no_proxy"] = ",".join(
    [os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")), "127.0.0.1", "localhost"]
)

# A client that has not read everything ends at once: its queue has no bound or, before websockets
# 15, its close waits no longer than this for the server's.
AT_ONCE: Any = (
    {"max_queue": None}
    if "max_queue" in inspect.signature(dial_as_usual).parameters
    else {"close_timeout": 0.3 * SLOWNESS}
)
dial = functools.partial(dial_as_usual, **AT_ONCE)
# Without keep-alive, as if each request had a client of its own, whose TLS set-up takes 50 ms.
new_client = functools.partial(
    httpx.Client,
    verify=False,
    timeout=LIMIT,
    limits=httpx.Limits(max_keepalive_connections=0),
)
http = new_client()

Json = dict[str, Any]
Connect = Callable[..., ClientConnection]


# ---- Helpers -------------------------------------------------------------------------------------


promise = pytest.mark.promise  # the README's sentence, or sentences, that a test holds


def all_tests() -> dict[str, Any]:
    """Return the tests of this file, by their names."""
    return {name: thing for name, thing in globals().items() if is_test(name, thing)}


def is_test(name: str, thing: Any) -> bool:
    """Tell what pytest takes for a test, which Starlette's TestClient is not."""
    return name.startswith("test") or (name.startswith("Test") and getattr(thing, "__test__", True))


def marks_of(test: Any) -> list[str]:
    return [mark.name for mark in getattr(test, "pytestmark", ())]


def promises() -> Iterator[tuple[str, str]]:
    """Return each promise of the README's that a test holds, with the test's name."""
    for name, test in all_tests().items():
        for mark in getattr(test, "pytestmark", ()):
            if mark.name == "promise":
                yield from ((one_line(text), name) for text in mark.args)


def one_line(text: str) -> str:
    return " ".join(text.split())


# What only newer parts of a project have.
IS_SANSIO = getattr(AutoWebSocketsProtocol, "__name__", "") == "WebSocketsSansIOProtocol"
needs_sansio = pytest.mark.skipif(
    not IS_SANSIO, reason="this uvicorn has another WebSocket protocol: the adapter serves"
)
needs_refusals = pytest.mark.skipif(
    tuple(map(int, starlette.__version__.split(".")[:2])) < (0, 41),
    reason="in the stack of a Starlette before 0.41, a refused WebSocket is a 500",
)


def wait_until(
    condition: Callable[[], Any], what: str, limit: float = LIMIT, pause: float = 0.01
) -> None:
    """Wait for something that sends no event of its own."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit} s for {what}"
        time.sleep(pause)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if what is done in it takes longer."""
    start = time.monotonic()
    yield
    took, bound = time.monotonic() - start, seconds * SLOWNESS
    assert took < bound, f"it took {took:.2f} s, and may take {bound} s"


def ports_of_this_worker() -> Iterator[int]:
    """Yield ports below those from which systems take one for each client, each of them once."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = list(range(20_000 + worker, 32_000, workers))
    random.SystemRandom().shuffle(ports)
    yield from ports


PORTS = ports_of_this_worker()


def free_port() -> int:
    """Return a port that is free, and that no other test takes before its server does."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", next(PORTS)))
            return int(probe.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DATADIVR_")}
    return {**clean, "PYTHONPATH": str(ROOT), "DATADIVR_ADMIN_TOKEN": TOKEN, **variables}


class Served:
    """A server on a port of this machine, and how to reach it."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @functools.cached_property
    def api(self) -> httpx.Client:
        """Return a client of the server's paths that sends the admin token."""
        return new_client(base_url=self.url, headers=ADMIN)

    def is_left(self) -> bool:
        """Tell whether no client is connected; `left` waits for those of this process."""
        return True


class Process(Served):
    """A server in a process of its own, its output in `log`."""

    def __init__(
        self,
        *command: str,
        program: str = sys.executable,
        cwd: Path = ROOT,
        port: int = 0,
        **variables: Any,
    ) -> None:
        self.port = port or free_port()
        # A file, not a pipe: what the server wrote before its answer is there with the answer.
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self.output.close)
        words = [program, *(word.format(port=self.port) for word in command)]
        self.popen = subprocess.Popen(
            words,
            cwd=cwd,
            env=environment(**variables),
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        file = self.output.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def wait_until_up(self, path: str = "/healthz") -> None:
        def answers() -> bool:
            assert self.popen.poll() is None, self.log
            with contextlib.suppress(httpx.TransportError):
                return http.get(f"{self.url}{path}").status_code == 200
            return False

        wait_until(answers, "the server to start", 30, pause=0.05)  # it needs the processor

    def is_left(self) -> bool:
        return self.popen.poll() is not None or total(self) == 0

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        status = self.popen.wait(LIMIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # the workers that it may have left behind
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)


class Live(Served):
    """A uvicorn in a thread of this process."""

    def __init__(self, app: Any = datadivr.app, **options: Any) -> None:
        config = uvicorn.Config(app, port=0, log_config=None, **options)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started or not self.thread.is_alive(), "uvicorn to start")
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def connections(self) -> set[Any]:
        """Return the sockets that uvicorn has open."""
        return self.server.server_state.connections

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()


def need(there: object, what: str) -> None:
    """Skip a test that needs a program which is not there; in CI it must be."""
    if not there:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"it needs {what}")


def find(program: str) -> str:
    """Return the path of a program, one of this environment first, that a test needs."""
    path = shutil.which(
        program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    need(path, program)
    return str(path)


def blocks(language: str) -> list[str]:
    """Return the README's code in one language, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block(language: str, text: str) -> str:
    """Return the README's block that has a text in it."""
    (found,) = (code for code in blocks(language) if text in code)
    return found


def make_certificate(folder: Path) -> None:
    """Make key.pem and certificate.pem, for localhost."""
    subject = ["-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "certificate.pem"]
    command = [find("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject]
    output_of(*command, cwd=folder)


def say(client: ClientConnection, event_name: str, **fields: Any) -> None:
    client.send(json.dumps({"event_name": event_name, **fields}))


def hear(client: ClientConnection) -> Json:
    return dict(json.loads(client.recv(timeout=LIMIT)))


def hear_all(client: ClientConnection) -> list[Json]:
    """Return what has been sent to a client up to now."""
    heard = []
    say(client, "whoami")
    while (message := hear(client))["event_name"] != "whoami":
        heard.append(message)
    return heard


def ask(client: ClientConnection, event_name: str, **fields: Any) -> Json:
    say(client, event_name, **fields)
    return hear(client)


def id_of(client: ClientConnection | socket.socket) -> str:
    """Ask a client that has heard all that came before for its id."""
    if isinstance(client, ClientConnection):
        return str(ask(client, "whoami")["payload"])
    client.sendall(masked('{"event_name": "whoami"}'))
    heard = b""
    while b"}" not in heard:
        data = client.recv(4096)
        assert data, "the connection ended"
        heard += data
    ((_, payload),) = unframe(heard)
    return str(json.loads(payload)["payload"])


def error(client_id: str, code: str, text: str, **known: Any) -> Json:
    """Return an error as it goes out; `known` is its event's name, its message's id, a status."""
    asked = {"id": known.pop("id")} if "id" in known else {}
    return {
        "event_name": "error",
        "payload": {"code": code, **known},
        "to": client_id,
        "from_id": "server",
        "message": text,
        **asked,
    }


def message_from(from_id: str, event_name: str, to: str, **fields: Any) -> Json:
    """Return a message as it goes out, with null for the fields that are not given."""
    keys = {"event_name": event_name, "payload": None, "to": to, "from_id": from_id}
    return {**keys, "message": None, **fields}


def ok(client_id: str, number: int | str) -> Json:
    """Return the server's answer to a message whose id nothing else answered."""
    return message_from("server", "ok", client_id, id=number)


def in_a_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in the event loop of a new thread: in this one, a browser's may run."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, asyncio.wait_for(coroutine, 6 * LIMIT)).result()


def with_ids(messages: list[Json]) -> list[Json]:
    return [message for message in messages if "id" in message]


UNKNOWN = "No client with the id in `to` is connected."
# Each is wrong as a room's name, in a way of its own.
BAD_ROOMS = ["", "a b", "a\n", "\na", "a\tb", "a\x00", "a\x1f", "a\x7f", "a\x85", "a\u00a0b"]
BAD_ROOMS += ["a\u2028b", "a/b", "a#b", "#a", "x" * 101, "\ud800", "x\nall - {}"]


def close_code(client: ClientConnection) -> int | None:
    """Read until the server's close frame and return its code."""
    try:
        while True:
            client.recv(timeout=LIMIT)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def raw_client(server: Served, buffer: int | None = None, extensions: str = "") -> socket.socket:
    """Connect a client that does nothing by itself: it reads only what a test reads."""
    client = socket.socket()
    client.settimeout(LIMIT)
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect(("127.0.0.1", server.port))
    offer = f"Sec-WebSocket-Extensions: {extensions}\r\n\r\n".encode() if extensions else b"\r\n"
    client.sendall(UPGRADE.removesuffix(b"\r\n") + offer)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    assert head.startswith(b"HTTP/1.1 101"), head
    return client


def masked(text: str) -> bytes:
    """Frame a text as a client does, with a mask of zeroes."""
    framed = datadivr._frame(text.encode())
    head = len(framed) - len(text.encode())
    return framed[:1] + bytes((framed[1] | 0x80,)) + framed[2:head] + bytes(4) + framed[head:]


def unframe(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut a server's frames apart: the first byte of each, and its payload."""
    while data:
        first, length = data[:2]
        start = 2
        if length > 125:
            start = 4 if length == 126 else 10
            length = int.from_bytes(data[2:start])
        yield first, data[start : start + length]
        data = data[start + length :]


def metrics(server: Served) -> dict[str, float]:
    """Scrape the server's own metrics, but for times and histogram buckets."""
    text = http.get(f"{server.url}/metrics").text
    lines = re.findall(r"^datadivr_(?!\S*(?:_created|_bucket))(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def pages(api: httpx.Client, limit: int) -> Iterator[Json]:
    """Ask for the clients, page after page."""
    after: str | None = ""
    while after is not None:
        page = api.get("/clients", params={"limit": limit, "after": after}).json()
        yield page
        after = page["next"]


def total(server: Served) -> int:
    """Ask the server how many clients are connected."""
    return int(server.api.get("/clients").json()["total"])


@pytest.fixture
def registry() -> Iterator[None]:
    """Undo what a test registers."""
    before = {kind: dict(handlers) for kind, handlers in datadivr._handlers.items()}
    yield
    datadivr._replaced_events.clear()
    for kind, handlers in datadivr._handlers.items():
        handlers.clear()
        handlers.update(before[kind])


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change settings for one test."""

    def change(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(datadivr._settings(), name, value)

    return change


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datadivr._settings(), "admin_token", TOKEN)
    path = datadivr._hub.console_path  # which each application that starts changes
    monkeypatch.setattr(datadivr._hub, "console_path", path)
    datadivr._logged_at.clear()
    datadivr._admin_token.cache_clear()
    yield
    datadivr._admin_token.cache_clear()


@pytest.fixture
def made_up_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """Return a function that returns the token which was shown, once, with the console's path."""
    shown = ""

    def read(path: str = "/console") -> str:
        nonlocal shown
        shown += capsys.readouterr().out
        assert shown.count("admin_token_generated") == 1
        (token,) = re.findall(rf"console='?{path}#token=([\w-]+)", shown)
        return str(token)

    monkeypatch.setattr(datadivr._hub, "console_path", "")
    datadivr._last_resort.cache_clear()
    datadivr._admin_token.cache_clear()
    yield read
    datadivr._last_resort.cache_clear()


@pytest.fixture(scope="session")
def shared() -> Iterator[Live]:
    with Live() as running:
        yield running


@pytest.fixture
def left(registry: None, shared: Live) -> Iterator[None]:
    """Wait for the clients of this process to go, once `connect` has closed them."""
    yield
    wait_until(lambda: not datadivr.clients, "the test's clients to go")
    # What follows an answer, such as a line of the log, belongs to this test, too.
    wait_until(lambda: not shared.server.server_state.tasks, "the server to have done all")


@pytest.fixture
def live(shared: Live, left: None) -> Live:
    return shared


@pytest.fixture
def connect(left: None) -> Iterator[Connect]:
    """Return a function that connects a client to a server; close the clients at the test's end."""
    servers: list[Served] = []
    with contextlib.ExitStack() as stack:

        def connect(server: Served, path: str = "/ws", **options: Any) -> ClientConnection:
            servers.append(server)
            url = server.ws.removesuffix("/ws") + path
            dialled: ClientConnection = dial(url, max_size=None, **options)
            return stack.enter_context(dialled)

        yield connect
    for server in servers:
        wait_until(server.is_left, "the test's clients to go")


@pytest.fixture
def api() -> Iterator[httpx.Client]:
    with TestClient(datadivr.app, headers=ADMIN) as client:
        yield client


AT_ANY_TIME = "loop_blocked"  # a line that a busy machine may add to those of any test


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """Yield what this file logs, but for the line that a busy machine adds."""

    def leave_out(_: object, __: str, fields: structlog.types.EventDict) -> Any:
        if fields["event"] == AT_ANY_TIME:
            raise structlog.DropEvent
        return fields

    capture = structlog.testing.LogCapture()
    structlog.configure(processors=[leave_out, capture])
    yield capture.entries
    structlog.reset_defaults()


# The application that the conformance tests talk to, under each server.
APPLICATION = """
    import asyncio
    import collections
    import threading

    from fastapi import Body, HTTPException, WebSocket

    import datadivr
    from datadivr import WebSocketMessage, app, broadcast, clients, create_message
    from datadivr import handle_connection, join_room, leave_room, list_clients
    from datadivr import websocket_handler

    @websocket_handler("double")
    async def double(message):
        return create_message("doubled", message.payload * 2, message.from_id)

    @websocket_handler("thread")
    def thread(message):
        in_main = threading.current_thread() is threading.main_thread()
        return create_message("thread", in_main, message.from_id)

    @websocket_handler("silent")
    async def silent(message):
        return None

    @websocket_handler("broken")
    async def broken(message):
        raise RuntimeError("internal detail")

    @websocket_handler("cancelled")
    async def cancelled(message):
        task = asyncio.create_task(asyncio.sleep(10))
        task.cancel()
        await task

    @websocket_handler("wrong")
    async def wrong(message):
        return 5

    @websocket_handler("unencodable")
    async def unencodable(message):
        return create_message("unencodable", object(), message.from_id)

    @websocket_handler("tell_others")
    async def tell_others(message):
        return WebSocketMessage(event_name="told", payload=message.payload)

    released = collections.defaultdict(asyncio.Event)

    @websocket_handler("wait")
    async def wait(message):
        await released[message.from_id].wait()
        return create_message("waited", None, message.from_id)

    @websocket_handler("release")
    async def release(message):
        released[message.payload].set()

    @websocket_handler("slow")
    async def slow(message):
        await asyncio.sleep(message.payload)
        return create_message("slept", message.payload, message.from_id)

    @websocket_handler("log_in")
    async def log_in(message):
        websocket = clients[message.from_id].websocket
        websocket.state.user = message.payload
        answer = websocket.headers["x-kind"] + websocket.query_params["room"]
        return create_message("logged_in", answer, message.from_id)

    @websocket_handler("$disconnect")
    def went(message):
        client = clients[message.from_id]
        if client.user:
            return WebSocketMessage(event_name="went", payload=[client.user, client.id in clients])

    @app.post("/tell")
    async def tell():
        return await broadcast(create_message("news", 1, "all"))

    @app.post("/tell_from_a_thread")
    def tell_from_a_thread():
        return asyncio.run(broadcast(create_message("news", 2, "all")))

    @app.websocket("/in")
    async def come_in(websocket: WebSocket):
        websocket.state.rooms = set(websocket.query_params.getlist("room"))
        await handle_connection(websocket)

    @websocket_handler("join")
    async def join(message: WebSocketMessage[list]):
        await join_room(message.from_id, *message.payload)

    @websocket_handler("leave")
    async def leave(message):
        await leave_room(message.from_id, message.payload)

    @websocket_handler("members")
    async def members(message):
        found = (await list_clients(room=message.payload)).clients
        return create_message("members", {c.id: c.rooms for c in found}, message.from_id)

    @websocket_handler("publish")
    async def publish(message):
        await broadcast(create_message(**message.payload))

    @websocket_handler("publish_copy")
    async def publish_copy(message):
        news = create_message("news", None, "all")
        await broadcast(news.model_copy(update={"to": message.payload}))

    @websocket_handler("publish_changed")
    async def publish_changed(message):
        news = create_message("news", None, "all")
        news.to = message.payload
        await broadcast(news)

    @websocket_handler("reply")
    async def reply(message):
        return create_message(**message.payload)

    @websocket_handler("reply_copy")
    async def reply_copy(message):
        return message.model_copy(update={"to": message.payload, "id": None})

    @websocket_handler("relay")
    async def relay(message):
        return message

    @websocket_handler("forward")
    async def forward(message):
        message.to = message.payload
        return message

    @websocket_handler("refuse")
    async def refuse(message):
        raise HTTPException(403, "Not for you.")

    @websocket_handler("typed")
    async def typed(message: WebSocketMessage[int]):
        return create_message("typed", message.payload, message.from_id)

    @app.post("/call/{name}")
    def call(name: str, arguments: list = Body()):  # in a thread, with an event loop of its own
        if name == "broadcast":
            arguments = [create_message(*arguments)]

        async def main():
            return await getattr(datadivr, name)(*arguments)

        return asyncio.run(main())
"""
SERVERS = {
    "uvicorn": ["-m", "uvicorn", "application:app", "--port", "{port}"],
    "uvicorn-asyncio": [
        "-m",
        "uvicorn",
        "application:app",
        "--port",
        "{port}",
        "--loop",
        "asyncio",
    ],
    "uvicorn-wsproto": ["-m", "uvicorn", "application:app", "--port", "{port}", "--ws", "wsproto"],
    "hypercorn": ["-m", "hypercorn", "application:app", "--bind", "127.0.0.1:{port}"],
    "granian": ["-m", "granian", "application:app", "--interface", "asgi", "--port", "{port}"],
}


@pytest.fixture(scope="session", params=SERVERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("application")
    (folder / "application.py").write_text(textwrap.dedent(APPLICATION))
    with Process(*SERVERS[request.param], cwd=folder) as process:
        process.wait_until_up()
        yield process
        try:
            process.stop()
        except subprocess.TimeoutExpired:
            if request.param != "granian":  # which may hang with any application
                raise
        for complaint in (
            "Exception in ASGI",
            "Error in ASGI",
            "callable raised an exception",
            "never retrieved",
        ):
            assert complaint not in process.log, process.log


class Records(logging.Handler):
    """Keeps what this file logs, where no host has configured anything."""

    def __init__(self) -> None:
        super().__init__()
        self.every: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "datadivr":
            self.every.append(record)

    @property
    def all(self) -> list[logging.LogRecord]:
        """Return the records, but for those that a busy machine adds."""
        return [record for record in self.every if AT_ANY_TIME not in record.getMessage()]

    def named(self, event: str, level: int = logging.WARNING) -> list[Json]:
        """Return the fields of an event's records, from a level on."""
        found = [vars(record)["datadivr"] for record in self.every if record.levelno >= level]
        return [fields for fields in found if fields["event"] == event]


@pytest.fixture
def records() -> Iterator[Records]:
    """Give the process a handler of its own, as a host does with `logging`."""
    structlog.reset_defaults()
    handler = Records()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


async def handled(event_name: str, payload: Any) -> WebSocketMessage | None:
    return await datadivr.handle_msg(WebSocketMessage(event_name=event_name, payload=payload))


def stall(server: Served, client_id: str) -> None:
    """Send to a client that does not read until bytes for it stay unsent."""
    fill = {"event_name": "fill", "payload": "x" * 900_000, "to": client_id}
    for _ in range(100):
        server.api.post("/messages", json=fill)
        while unsent := server.api.get(f"/clients/{client_id}").json()["buffered_bytes"]:
            # The system may still take some: an acknowledgment is delayed by 40 ms.
            time.sleep(0.1)
            if server.api.get(f"/clients/{client_id}").json()["buffered_bytes"] == unsent:
                return
    raise AssertionError("the client reads")


def reasons() -> dict[str, float]:
    """Return how many clients of this process went for which reason, without the zeros."""
    samples = [
        sample for metric in datadivr._disconnections_total.collect() for sample in metric.samples
    ]
    return {s.labels["reason"]: s.value for s in samples if s.name.endswith("_total") and s.value}


@pytest.fixture
def ended() -> Callable[[], dict[str, float]]:
    """Return a function that tells the reasons that were counted since the test began."""
    before = reasons()
    return lambda: {
        name: value - before.get(name, 0)
        for name, value in reasons().items()
        if value > before.get(name, 0)
    }


class FakeLoop:
    """A loop whose turns a test runs."""

    def __init__(self) -> None:
        self.soon: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        self.soon.append((callback, args))

    def call_later(self, *args: Any) -> None: ...

    def is_closed(self) -> bool:
        return False

    def is_running(self) -> bool:
        return False

    def time(self) -> float:
        return 0.0

    def turn(self) -> None:
        soon, self.soon = self.soon, []
        for callback, args in soon:
            callback(*args)


class FakeConnection:
    """A connection that keeps what is written, and whose client stalls and goes on demand."""

    def __init__(self, framing: datadivr._Framing = datadivr._frame) -> None:
        self.framing = framing
        self.received: list[bytes] = []
        self.firsts: list[int] = []
        self.wire_bytes = 0
        self.inflater = zlib.decompressobj(wbits=-12)
        self.unsent_bytes = 0
        self.closing = False
        self.closed_with: list[int] = []

    def write(self, data: bytes) -> None:
        assert not self.closing
        for first, payload in unframe(data):
            self.firsts.append(first)
            self.wire_bytes += len(datadivr._frame(payload))
            self.received.append(inflated(first, payload, self.inflater))

    def unsent(self) -> int:
        return self.unsent_bytes

    def is_closing(self) -> bool:
        return self.closing

    def close(self, code: int, reason: str) -> None:
        assert not self.closing
        self.closed_with.append(code)

    def close_reason(self) -> str:
        return "client"

    def abort(self) -> None: ...


def fake_client(connection: FakeConnection) -> datadivr.Client:
    """Add a client to the room."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    client_id = str(uuid.uuid4())
    websocket = fastapi.WebSocket({"type": "websocket"}, None, None)  # type: ignore[arg-type]
    client = datadivr.Client(client_id, client_id[:8], "", now, websocket, connection, None)  # type: ignore[arg-type]
    datadivr._hub.add(client)
    return client


def inflated(first: int, payload: bytes, inflater: Any) -> bytes:
    """Return what a frame holds, as a client reads it (RFC 7692, 7.2.2) that keeps its context."""
    if first == datadivr._COMPRESSED_TEXT:
        return bytes(inflater.decompress(payload + b"\0\0\xff\xff"))
    return payload


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, logged: list[Any]) -> Iterator[FakeLoop]:
    """Put an empty room into a loop that does nothing by itself."""
    monkeypatch.setattr(datadivr, "_hub", datadivr._Hub())
    monkeypatch.setattr(datadivr._hub, "loop", FakeLoop())
    yield datadivr._hub.loop
    for client in tuple(datadivr.clients.values()):
        datadivr._hub.remove(client, "client")


def output_of(
    *command: str, cwd: Path = ROOT, stdin: str = "", status: int = 0, **variables: str
) -> str:
    """Run a command, which is to end with this status; return its output.

    If the status is not 0, return its errors.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=6 * LIMIT,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def run(script: str, **options: Any) -> str:
    """Run a script in a new process, as `output_of` does."""
    return output_of(sys.executable, "-c", textwrap.dedent(script), **options)


# Runs scripts in forks of a process that has imported already what takes most of a start.
FORKS = """
    import gc, json, os, sys
    import fastapi.testclient, prometheus_client, redis.asyncio, structlog, uvicorn

    gc.freeze()  # or each fork copies all of this for its collector
    for number, (script, variables) in enumerate(json.load(sys.stdin)):
        if not os.fork():
            output = os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(variables)
            exec(script, {"__name__": "__main__"})
            sys.exit()
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def run_each(
    scripts: list[tuple[str, dict[str, str]]], folder: Path, cwd: Path = ROOT
) -> list[tuple[int, str]]:
    """Run scripts, each in a process and with variables of its own: their statuses and output."""
    folder.mkdir()
    stdin = json.dumps([(textwrap.dedent(script), values) for script, values in scripts])
    command = [sys.executable, "-c", textwrap.dedent(FORKS), str(folder)]
    statuses = map(int, output_of(*command, cwd=cwd, stdin=stdin).split())
    return [(status, (folder / str(n)).read_text()) for n, status in enumerate(statuses)]


# The first byte of the ÿ in each message of a load: one byte, so that no read can cut it in two.
MARK = b"\xc3"


class Peer(asyncio.Protocol):
    """One client of a load: it counts the marks that it gets."""

    transport: asyncio.Transport
    upgrade = UPGRADE
    hello = b""

    @staticmethod
    def to_all(size: int) -> bytes:
        return text_to_all(size)

    @staticmethod
    def join(room: str) -> bytes:
        return masked(json.dumps({"event_name": "join", "payload": room}))

    @staticmethod
    def to_room(size: int, room: str) -> bytes:
        return text(size, f"#{room}")

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.head = b""
        self.deliveries = 0
        self.open = asyncio.get_running_loop().create_future()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self.transport = transport
        transport.write(self.upgrade)

    def count(self, data: bytes) -> int:
        return data.count(MARK)

    def data_received(self, data: bytes) -> None:
        if self.open.done():
            before, self.deliveries = self.deliveries, self.deliveries + self.count(data)
            if before < self.load.goal <= self.deliveries:
                self.load.behind -= 1
                if not self.load.behind:
                    self.load.reached.set()
            return
        self.head += data
        if b"\r\n\r\n" in self.head:
            assert self.head.startswith(b"HTTP/1.1 101"), self.head
            self.open.set_result(None)
            self.transport.write(self.hello)
            self.deliveries += self.count(self.head.partition(b"\r\n\r\n")[2])

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.open.done():
            self.open.set_exception(exc or ConnectionError(f"no handshake: {self.head!r}"))
        self.lost.set_result(None)


class Load:
    """Clients of one server, dealt to its ports in turn, and what they got."""

    def __init__(self, *ports: int, peer: type[Peer] = Peer) -> None:
        self.ports = itertools.cycle(ports)
        self.peer = peer
        self.peers: list[Peer] = []
        self.goal = self.behind = 0
        self.reached = asyncio.Event()

    async def connect(self, clients: int, at_once: int = 32) -> None:
        gate = asyncio.Semaphore(at_once)

        async def connect_one() -> None:
            async with gate:
                _, peer = await asyncio.get_running_loop().create_connection(
                    lambda: self.peer(self), "127.0.0.1", next(self.ports)
                )
                await peer.open
                self.peers.append(peer)

        await asyncio.gather(*(connect_one() for _ in range(clients)))

    async def join(self, rooms: int) -> None:
        """Deal the clients to rooms in turn, and wait until they are there."""
        before = self.peers[0].deliveries
        for number, peer in enumerate(self.peers):
            peer.transport.write(peer.join(str(number % rooms)) + peer.to_all(0))
        await self.until(before + len(self.peers))

    async def until(self, deliveries: int) -> None:
        """Wait until each client has got so many messages."""
        self.goal = deliveries
        self.behind = sum(peer.deliveries < deliveries for peer in self.peers)
        self.reached.clear()
        if self.behind:
            await asyncio.wait_for(self.reached.wait(), 6 * LIMIT)

    async def publish(self, messages: int, window: int, frame: bytes, publishers: int = 1) -> float:
        """Publish with `window` messages in flight, and return the deliveries a second."""
        before = self.peers[0].deliveries
        start = time.perf_counter()
        for number in range(messages):
            if number >= window:
                await self.until(before + number - window + 1)
            self.peers[number % publishers].transport.write(frame)
        await self.until(before + messages)
        return messages * len(self.peers) / (time.perf_counter() - start)

    async def talk_in_rooms(self, rounds: int, rooms: int, size: int) -> float:
        """Have each client send to its room in each round; return the deliveries a second."""
        before = self.peers[0].deliveries
        others = len(self.peers) // rooms - 1
        frames = [peer.to_room(size, str(number % rooms)) for number, peer in enumerate(self.peers)]
        start = time.perf_counter()
        for done in range(1, rounds + 1):
            for peer, frame in zip(self.peers, frames, strict=True):
                peer.transport.write(frame)
            await self.until(before + others * done)
        return rounds * others * len(self.peers) / (time.perf_counter() - start)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for peer in self.peers:
            peer.transport.abort()
        await asyncio.gather(*(peer.lost for peer in self.peers))


def text(size: int, to: str) -> bytes:
    filler = random.Random(0).randbytes(size // 2).hex()
    message = {"event_name": "msg", "to": to, "message": f"ÿ{filler}"}
    return masked(json.dumps(message, ensure_ascii=False))


def text_to_all(size: int) -> bytes:
    return text(size, "all")


def resident(process: Process, most: bool = False) -> int:
    """Return the bytes of memory that a process has resident, or the most that it had.

    Linux errs by up to 32 MiB.
    """
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    name = "VmHWM" if most else "VmRSS"
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024


@contextlib.contextmanager
def serve(folder: Path, script: str, *options: str, **variables: Any) -> Iterator[Process]:
    """Run a script's `app` for a load: without pings, whose random bytes could hold a mark."""
    folder.mkdir(exist_ok=True)
    (folder / "served.py").write_text(textwrap.dedent(script))
    quiet = ["--log-level", "warning", "--ws-ping-interval", "3600"]
    command = ["-m", "uvicorn", "served:app", "--port", "{port}", *quiet, *options]
    with Process(*command, cwd=folder, **variables) as process:
        process.wait_until_up()
        yield process


# An application that counts its objects, and their bytes.
COUNTED = """
    import gc
    import sys
    import tracemalloc

    import datadivr
    from datadivr import app

    tracemalloc.start()
    datadivr._CLOSE_SECONDS = 0.1  # for which a client that went is kept

    @app.get("/objects")
    async def count() -> tuple[int, int]:
        gc.collect()
        return sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]

    @app.get("/peak")  # since it was asked for last
    async def peak() -> int:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return most
"""


@pytest.fixture(scope="session")
def many_files() -> Iterator[None]:
    """Let this process, and those that it starts later, open 11,000 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 11_000)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="session")
def counted(tmp_path_factory: pytest.TempPathFactory, many_files: None) -> Iterator[Process]:
    with serve(tmp_path_factory.mktemp("counted"), COUNTED) as process:
        yield process


def objects_and_bytes(process: Process) -> tuple[int, int]:
    """Return how many objects a counted server has, and how many bytes they have."""
    objects, size = http.get(f"{process.url}/objects").json()
    return objects, size


GOOD_ROOMS = ["a", "x" * 100, "user:ada", "é漢😀", "all", "others", "a.b-c_d~", "%23?&+=", "{}"]


class Point(BaseModel):
    x: int
    when: datetime | None = None


class WrappedReceive:
    """A middleware that wraps `receive`, as OpenTelemetry's does."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def watched() -> Any:
            return await receive()

        await self.app(scope, watched, send)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=find("chromium"),
            args=["--no-sandbox", "--disable-background-networking"],
        )
        yield running
        running.close()


HASTE = """
    const wait = setTimeout, now = performance.now.bind(performance);
    window.setTimeout = (job, delay, ...values) =>
      wait(job, delay > 1000 ? delay : delay / 5, ...values);
    performance.now = () => 5 * now();
    window.said = []; // by the page's head, if only for a moment
    const listen = () => said.push(document.querySelector("#status")?.textContent);
    new MutationObserver(listen).observe(document, { subtree: true, childList: true });
"""


@pytest.fixture(scope="module")
def context(browser: Browser, shared: Live) -> Iterator[BrowserContext]:
    """Keep a page open, whose process the tests' pages share: to start one each takes 0.5 s."""
    with browser.new_context() as context:
        context.new_page().goto(f"{shared.url}/healthz")
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """Open a page that asks often, fetches nothing from elsewhere and raises no errors."""
    page = context.new_page()
    page.add_init_script(HASTE)
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda raised: complaints.append(str(raised)))
    page.on("console", lambda message: complaints.append(message.text))
    yield page
    assert {httpx.URL(url).netloc for url in requests} == {httpx.URL(page.url).netloc}
    expected = ("Failed to load resource", "WebSocket connection to")
    assert [text for text in complaints if not text.startswith(expected)] == []
    page.close()


def node_module(path: str) -> Path:
    """Return a file of a package of npm's that a test needs."""
    folders = map(Path, os.environ.get("NODE_PATH", "").split(os.pathsep))
    found = [file for folder in folders if (file := folder / path).exists()]
    need(found, path)
    return found[0]


def assert_formatted(name: str, parser: str, lines: int) -> None:
    """Check that a file which is served is as Prettier leaves it, and no longer than it may be."""
    source = datadivr._files[name]
    prettier = str(node_module("prettier/bin/prettier.cjs"))
    command = [find("node"), prettier, "--no-config", f"--parser={parser}", "--print-width=100"]
    assert output_of(*command, stdin=source) == source
    assert source.count("\n") <= lines
    assert max(map(len, source.split("\n"))) <= 100


NGINX = """
daemon off;
{user}
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    {temporary}
    {servers}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, server: str, secure_port: int | None = None) -> Iterator[Process]:
    """Run nginx, as this user, with a `server` block: without TLS, and on another port with it."""
    port = free_port()
    servers = re.sub(r"listen .*", f"listen 127.0.0.1:{port};", re.sub(r"ssl_.*", "", server))
    if secure_port is not None:
        servers += server.replace("listen 443", f"listen 127.0.0.1:{secure_port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root root;" if os.geteuid() == 0 else ""
    configuration = NGINX.format(folder=folder, temporary=temporary, servers=servers, user=user)
    (folder / "nginx.conf").write_text(configuration)
    command = ["-p", str(folder), "-c", str(folder / "nginx.conf")]
    with Process(*command, program=find("nginx"), port=port, cwd=folder) as proxy:
        yield proxy


class RedisServer:
    """A redis-server on a port of its own, which a test may kill, restart, pause and talk to."""

    def __init__(self, *options: str) -> None:
        need(shutil.which("redis-server"), "redis-server")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.options = options
        self.start()

    def start(self) -> None:
        command = [
            "redis-server",
            "--port",
            str(self.port),
            "--save",
            "",
            "--appendonly",
            "no",
            *self.options,
        ]
        self.popen = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis.Redis(port=self.port)
        with socket.socket() as probe:
            wait_until(
                lambda: probe.connect_ex(("127.0.0.1", self.port)) == 0, "redis-server to start"
            )

    def kill(self) -> None:
        self.client.close()
        self.popen.kill()
        self.popen.wait(LIMIT)

    def __enter__(self) -> "RedisServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Node(Process):
    """One process of a cluster."""

    def __init__(
        self, url: str, folder: Path = ROOT, app: str = "datadivr:app", **variables: Any
    ) -> None:
        self.folder = folder
        command = ["-m", "uvicorn", app, "--port", "{port}", "--log-level", "warning"]
        super().__init__(*command, cwd=folder, DATADIVR_REDIS_URL=url, **variables)
        self.wait_until_up()

    @property
    def redis_errors(self) -> int:
        return int(metrics(self)['errors_total{type="redis"}'])

    @property
    def joined(self) -> bool:
        return metrics(self)["redis_up"] == 1

    def ids(self) -> set[str]:
        return {client["id"] for client in self.api.get("/clients").json()["clients"]}


Cluster = tuple[RedisServer, Node, Node]


Pair = tuple[ClientConnection, ClientConnection]


# The line of a handler that failed, and its traceback.
FAILED_HANDLER = r"^.*\bhandler_error\b.*\n(?:(?!\d{4}-|[A-Z]+:).*\n?)*"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a Redis and two nodes, which survive whatever the tests do to the three."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "application.py").write_text(textwrap.dedent(APPLICATION))
    with (
        RedisServer() as server,
        Node(server.url, folder, "application:app", DATADIVR_MAX_BUFFER_BYTES="1000000") as one,
        Node(server.url, folder, "application:app", DATADIVR_MAX_BUFFER_BYTES="1000000") as two,
    ):
        yield server, one, two
        for node in (one, two):
            # A test may have a handler fail, whose traceback is logged.
            rest = re.sub(FAILED_HANDLER, "", node.log, flags=re.MULTILINE)
            assert "Traceback" not in rest, node.log


def wait_until_calm(cluster: Cluster) -> None:
    _, one, two = cluster
    wait_until(
        lambda: one.joined and two.joined and not one.ids() | two.ids(),
        "the last test's clients to go",
    )


@pytest.fixture
def pair(cluster: Cluster) -> Iterator[Pair]:
    """Connect a client to each of the two nodes."""
    _, one, two = cluster
    wait_until_calm(cluster)
    with dial_node(one) as here, dial_node(two) as there:
        yield here, there


def dial_node(node: Node, path: str = "/ws") -> ClientConnection:
    client: ClientConnection = dial(f"ws://127.0.0.1:{node.port}{path}", max_size=None)
    return client


# ---- Settings and logging: `pytest -m settings` --------------------------------------------------


@promise(
    "`DATADIVR_ADMIN_TOKEN` | random | bearer token of the admin API",
    "`DATADIVR_CLIENT_TOKEN` | none | bearer token that clients must bring",
    "longest message; a longer one closes its connection with 1009",
    "messages in a second from one client, the rest dropped; 0 is no limit",
)
def test_settings_have_the_defaults_that_the_readme_says() -> None:
    table = re.findall(r"^\| `DATADIVR_(\w+)` \| (\w+) \|", README, re.MULTILINE)
    meanings: dict[str, list[Any]] = {"none": [None, ()], "random": [None]}
    for name, default in table:
        value = getattr(datadivr._read_settings({}), name.lower())
        assert value in meanings.get(default, [int(default) if default.isdigit() else default])
    assert [name.lower() for name, _ in table] == list(datadivr._Settings.model_fields)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MAX_CLIENTS", "many", "valid integer"),
        ("MAX_CLIENTS", "-1", "greater than or equal to 0"),
        ("MAX_BUFFER_BYTES", "0", "greater than 0"),
        ("LOG_LEVEL", "loud", "'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'"),
        ("ALLOWED_ORIGINS", "https://a.example/path", "expected scheme://host"),
    ],
)
def test_a_bad_setting_names_the_variable_what_was_expected_and_what_came(
    variable: str, value: str, expected: str
) -> None:
    with pytest.raises(ValueError, match=f"DATADIVR_{variable}: .*{expected}.*{value!r}"):
        datadivr._read_settings({f"DATADIVR_{variable}": value})


TOKENS = [f"DATADIVR_{kind}_TOKEN" for kind in ("ADMIN", "CLIENT", "METRICS")]


@pytest.mark.parametrize("variable", TOKENS)
def test_a_bad_token_stops_the_start_without_being_shown(variable: str) -> None:
    with pytest.raises(ValueError, match=f"^{variable}: String should match pattern") as caught:
        datadivr._read_settings({variable: "two words"})
    assert "two words" not in str(caught.value)


@promise("A token has letters, digits and ``!#$%&'*+.^_`|~-``, and nothing else;")
@pytest.mark.parametrize(
    "variable",
    ["DATADIVR_ADMIN_TOKEN", "DATADIVR_CLIENT_TOKEN", "DATADIVR_METRICS_TOKEN"],
)
def test_a_token_has_the_characters_that_the_readme_says_and_no_other(variable: str) -> None:
    (signs,) = set(re.findall(r"letters, digits and ``(\S+)``", README))
    right = [char for char in map(chr, range(33, 256)) if char.isascii() and char.isalnum()]
    right += signs
    for char in map(chr, range(33, 256)):
        if char in right:
            datadivr._read_settings({variable: f"a{char}b"})
        else:
            with pytest.raises(ValueError, match=f"^{variable}: "):
                datadivr._read_settings({variable: f"a{char}b"})


@promise("An empty variable is not set, but wrong for a token.")
def test_an_empty_variable_counts_as_not_set() -> None:
    assert datadivr._read_settings({"DATADIVR_MAX_CLIENTS": ""}) == datadivr._Settings()


def test_origins_are_separated_by_commas() -> None:
    origins = {"DATADIVR_ALLOWED_ORIGINS": "https://a.example, http://B.example:8000"}
    assert datadivr._read_settings(origins).allowed_origins == (
        "https://a.example",
        "http://b.example:8000",
    )


@promise("A wrong one stops the start, and the log names it.")
def test_a_bad_setting_stops_the_server() -> None:
    with Process("-m", "uvicorn", "datadivr:app", DATADIVR_MAX_CLIENTS="many") as process:
        assert process.popen.wait(3 * LIMIT) == 3
    assert "\nValueError: DATADIVR_MAX_CLIENTS: " in process.log


def test_a_host_that_has_configured_structlog_keeps_its_configuration() -> None:
    script = """
        import structlog
        structlog.configure(processors=[structlog.processors.KeyValueRenderer(sort_keys=True)])
        import datadivr
        datadivr._log("info", "hello", a=1)
    """
    assert run(script) == "a=1 event='hello'\n"


@promise(
    "`DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`, of the logger `datadivr` of "
    "`logging`; a level that your code sets"
)
def test_the_log_has_the_level_and_format_of_the_settings(tmp_path: Path) -> None:
    script = "import datadivr as d; d._log('debug', 'quiet', a=1); d._log('warning', 'loud', a=1)"
    cases: list[tuple[dict[str, str], str]] = [
        ({}, r"\S+Z \[warning  \] loud +a=1\n"),
        (
            {"DATADIVR_LOG_FORMAT": "json"},
            r'\{"event": "loud", "a": 1, "level": "warning", "timestamp": "\S+Z"\}\n',
        ),
        ({"DATADIVR_LOG_LEVEL": "error"}, ""),
        (
            {"DATADIVR_LOG_LEVEL": "DEBUG"},
            r"\S+Z \[debug    \] quiet +a=1\n\S+Z \[warning  \] loud +a=1\n",
        ),
    ]
    outputs = run_each([(script, variables) for variables, _ in cases], tmp_path / "out")
    for (variables, expected), (status, output) in zip(cases, outputs, strict=True):
        assert status == 0, output
        assert re.fullmatch(expected, output), (variables, output)


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_handlers_traceback_is_logged_without_the_payload(
    tmp_path: Path, log_format: str
) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(APPLICATION))
    variables: Json = {"DATADIVR_LOG_FORMAT": log_format, "DATADIVR_CLIENT_TOKEN": "client-token"}
    with Process(*SERVERS["uvicorn"], cwd=tmp_path, **variables) as process:
        process.wait_until_up()
        headers = {"Authorization": "Bearer client-token"}
        with dial(process.ws, additional_headers=headers) as client:
            ask(client, "broken", payload="private matter")
        process.stop()
    assert "RuntimeError: internal detail" in process.log
    assert not re.search(r"private matter|client-token|secret", process.log)


@pytest.mark.parametrize("output", ["/dev/full", "a closed pipe"])
def test_a_log_that_cannot_be_written_disturbs_nobody(output: str) -> None:
    there = Served(free_port())
    reader, writer = os.pipe()
    os.close(reader)
    if output == "/dev/full":
        need(Path(output).exists(), output)
        os.close(writer)
        writer = os.open(output, os.O_WRONLY)
    command = [sys.executable, "-m", "uvicorn", "datadivr:app", "--port", str(there.port)]
    with subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=writer, stderr=subprocess.DEVNULL
    ) as server:
        try:
            with socket.socket() as probe:
                wait_until(
                    lambda: not probe.connect_ex(("127.0.0.1", there.port)),
                    "the server",
                    3 * LIMIT,
                )
            with dial(there.ws, max_size=None) as client, raw_client(there, 4096) as stalled:
                id_of(stalled)

                def drops() -> bool:
                    ask(client, "fill", payload="x" * 900_000, to="all")
                    return total(there) == 1

                wait_until(drops, "the slow client to be dropped")
                client.send('{"event_name": 5}')
                assert hear(client)["payload"] == {"code": "invalid_message"}
        finally:
            server.terminate()
            os.close(writer)


def test_the_standard_logging_gets_every_line(
    caplog: pytest.LogCaptureFixture, connect: Connect, live: Live
) -> None:
    client_id = id_of(connect(live))
    assert any(client_id in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("https://App.Example:443", "https://app.example"),
        ("http://a.example:80", "http://a.example"),
        ("https://münchen.example", "https://xn--mnchen-3ya.example"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("file://", "file://"),
        ("null", "null"),
        ("capacitor://localhost", "capacitor://localhost"),
    ],
)
def test_an_origin_is_listed_in_the_form_that_browsers_send(listed: str, expected: str) -> None:
    settings = datadivr._read_settings({"DATADIVR_ALLOWED_ORIGINS": listed})
    assert settings.allowed_origins == (expected,)


@pytest.mark.parametrize(
    "listed",
    [
        "https://*.example.com",
        "https://a.example/",
        "https://a.example?x",
        "https://a.example:port",
        "https://user@a.example",
        "a.example",
        "https://",
        "https://a.example,,https://b.example",
    ],
)
def test_an_origin_that_can_never_match_stops_the_start(listed: str) -> None:
    with pytest.raises(ValueError, match=r"^DATADIVR_ALLOWED_ORIGINS: "):
        datadivr._read_settings({"DATADIVR_ALLOWED_ORIGINS": listed})


@pytest.mark.parametrize("variable", TOKENS)
def test_an_empty_token_stops_the_start(variable: str) -> None:
    with pytest.raises(ValueError, match=rf"^{variable}: .*\(it is ''\)"):
        datadivr._read_settings({variable: ""})


@promise(
    "A name that is nearly one of these is `unknown_setting` in the log.",
    "`unknown_setting`, `small_buffer` | mend the variable",
)
@pytest.mark.parametrize(
    ("variable", "named"),
    [
        ("DATADIVR_CLIENT_TOKENS", "DATADIVR_CLIENT_TOKEN"),
        ("DATADIVR_CLIENTTOKEN", "DATADIVR_CLIENT_TOKEN"),
        ("DATADIVR_ALLOWED_ORIGIN", "DATADIVR_ALLOWED_ORIGINS"),
        ("DATADIVR_PORT", None),  # which Kubernetes sets beside a Service of that name
        ("DATADIVR_SERVICE_HOST", None),
    ],
)
def test_a_variable_that_is_nearly_one_of_ours_is_named(variable: str, named: str | None) -> None:
    log = run("import datadivr; datadivr._check_environment()", **{variable: "secret"})
    assert ("unknown_setting" in log) == (named is not None)
    assert named is None or f"is {named} meant?" in log
    assert "secret" not in log


def test_json_logs_have_uvicorns_lines_too(tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(APPLICATION))
    command = SERVERS["uvicorn"]
    with Process(*command, cwd=tmp_path, DATADIVR_LOG_FORMAT="json") as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            ask(client, "broken")
        process.stop()
    # uvicorn writes its first two lines before it runs anything of the module's.
    lines = [json.loads(line) for line in process.log.splitlines()[2:]]
    assert {"event", "level", "timestamp"} <= set.intersection(*(set(line) for line in lines))
    assert any("Application startup complete" in line["event"] for line in lines)
    assert any("RuntimeError: internal detail" in line.get("exception", "") for line in lines)


def test_json_is_left_to_a_host_that_configures_structlog_itself() -> None:
    log = run(
        """
        import asyncio, logging, structlog, uvicorn
        structlog.configure()
        import datadivr
        uvicorn.Config(datadivr.app)  # configures uvicorn's loggers
        async def main():
            async with datadivr.app.router.lifespan_context(datadivr.app):
                (handler,) = logging.getLogger("uvicorn").handlers
                print(type(handler.formatter).__module__)
        asyncio.run(main())
        """,
        DATADIVR_LOG_FORMAT="json",
    )
    assert log == "uvicorn.logging\n"


@promise("a random one is printed to standard output at the start")
@pytest.mark.parametrize("level", ["ERROR", "CRITICAL"])
def test_a_made_up_token_is_shown_whatever_the_level(level: str) -> None:
    script = """
        import os
        del os.environ["DATADIVR_ADMIN_TOKEN"]
        import datadivr
        print(datadivr._admin_token())
    """
    shown, token = run(script, DATADIVR_LOG_LEVEL=level).splitlines()
    assert token in shown


@pytest.mark.parametrize("variable", TOKENS)
def test_a_token_from_a_file_is_taken_without_its_line_feed(variable: str) -> None:
    settings = datadivr._read_settings({variable: "let-me-in\n"})
    assert getattr(settings, variable.removeprefix("DATADIVR_").lower()) == "let-me-in"


@promise("They are read at their first use, which is when the server starts.")
def test_the_import_configures_nothing_and_reads_no_setting(tmp_path: Path) -> None:
    script = """
        import logging, sys, threading, warnings
        import structlog

        def state():
            root, showwarning = logging.getLogger(), warnings.showwarning
            uvicorns = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.access")]
            lists = [(log.level, log.disabled, *log.handlers, *log.filters) for log in uvicorns]
            own = "datadivr" in logging.Logger.manager.loggerDict
            found = root.level, *root.handlers, *root.filters, logging.lastResort, showwarning
            return *found, *lists, own, structlog.is_configured(), sys.excepthook

        before = state()
        import datadivr
        assert state() == before
        assert threading.active_count() == 1
        structlog.get_logger().info("the host's own line")
    """
    wrong = {"DATADIVR_MAX_CLIENTS": "many", "DATADIVR_ADMIN_TOKEN": ""}
    ((status, output),) = run_each([(script, wrong)], tmp_path / "out")
    assert status == 0, output
    assert re.fullmatch(r"\S+ \S+ \[info +\] the host's own line *\n", output)


def test_nothing_is_open_while_a_setting_is_wrong(tmp_path: Path) -> None:
    script = """
        import datadivr
        from fastapi.testclient import TestClient

        def start():
            with TestClient(datadivr.app):
                pass

        def come():
            with TestClient(datadivr.app).websocket_connect("/ws"):
                pass

        def scrape():
            assert TestClient(datadivr.app).get("/metrics").status_code == 200

        for knock in (start, come, scrape):
            try:
                knock()
            except ValueError as error:
                print(error)
    """
    wrong = {"DATADIVR_METRICS_TOKEN": ""}
    ((status, output),) = run_each([(script, wrong)], tmp_path / "out")
    assert status == 0, output
    assert len(re.findall("^DATADIVR_METRICS_TOKEN: ", output, re.MULTILINE)) == 3, output


@promise(
    "Settings are read at their first use, when the server starts. So `load_dotenv()` may"
    " stand after the import"
)
def test_variables_that_a_host_loads_after_the_import_count(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATADIVR_CLIENT_TOKEN=let-me-in\n")
    script = f"""
        import datadivr
        from dotenv import load_dotenv
        from fastapi.testclient import TestClient
        from starlette.testclient import WebSocketDenialResponse

        load_dotenv({str(tmp_path / ".env")!r})
        for headers in ({{}}, {{"Authorization": "Bearer let-me-in"}}):
            try:
                with TestClient(datadivr.app).websocket_connect("/ws", headers=headers):
                    print("let in")
            except WebSocketDenialResponse as refused:
                print(refused.status_code)
    """
    variables = {"DATADIVR_LOG_LEVEL": "CRITICAL"}
    assert run_each([(script, variables)], tmp_path / "out") == [(0, "401\nlet in\n")]


# A host: at one of three places it configures its log. Its client brings three lines about.
HOST = """
    import contextlib, logging, logging.config, os, sys
    import fastapi, structlog
    from fastapi.testclient import TestClient

    def configure():
        {configure}

    def at(place):
        if place == {place!r}:
            configure()

    at("first")
    import datadivr
    at("last")

    @contextlib.asynccontextmanager
    async def lifespan(_):
        at("lifespan")
        yield

    app = fastapi.FastAPI(lifespan=lifespan)
    app.include_router(datadivr.router)
    with TestClient(app) as client:
        at("started")
        with client.websocket_connect("/ws") as session:
            session.send_text("5")
            session.receive_json()
"""
FORM = "HOST %(levelname)s %(name)s %(message)s"
HANDLER = {"class": "logging.StreamHandler", "formatter": "form"}
CONFIG = {"version": 1, "formatters": {"form": {"format": FORM}}, "handlers": {"h": HANDLER}}
STANDARD = r"HOST (INFO|WARNING) datadivr (?P<event>\w+) \S+='.*"
STRUCTURED = r"event='(?P<event>\w+)' \w+=.*"
CONSOLE = r"\S+Z \[\w+ *\] (?P<event>\w+) +\w+=.*"
JSON_LINE = r'\{.*"event": "(?P<event>\w+)".*\}'
KEY_VALUE = 'processors=[structlog.processors.KeyValueRenderer(key_order=["event"])]'
LOGGER_FACTORY = "logger_factory=structlog.stdlib.LoggerFactory()"
LINES = {"client_connected", "invalid_message", "client_disconnected"}
# What a host does, the form of each line then, and the lines.
HOSTS: dict[str, tuple[str, str, set[str]]] = {
    "nothing": ("pass", CONSOLE, LINES),
    "nothing, in JSON": ("pass", JSON_LINE, LINES),
    "basicConfig": (f"logging.basicConfig(format={FORM!r})", STANDARD, LINES),
    "basicConfig, and DATADIVR_LOG_FORMAT in JSON": (
        f"logging.basicConfig(format={FORM!r})",
        STANDARD,
        LINES,
    ),
    "a handler of the root": (
        "handler = logging.StreamHandler(sys.stdout)\n"
        f"        handler.setFormatter(logging.Formatter({FORM!r}))\n"
        "        logging.getLogger().addHandler(handler)",
        STANDARD,
        LINES,
    ),
    "dictConfig": (
        f"logging.config.dictConfig({CONFIG | {'root': {'handlers': ['h']}}})",
        STANDARD,
        LINES,
    ),
    "dictConfig of the logger alone": (
        "logging.config.dictConfig("
        f"{CONFIG | {'loggers': {'datadivr': {'handlers': ['h'], 'propagate': False}}}})",
        STANDARD,
        LINES,
    ),
    "dictConfig with a level": (
        "logging.config.dictConfig("
        f"{CONFIG | {'root': {'handlers': ['h']}, 'loggers': {'datadivr': {'level': 'ERROR'}}}})",
        STANDARD,
        set(),
    ),
    "structlog": (f"structlog.configure({KEY_VALUE})", STRUCTURED, LINES),
    "structlog in logging": (
        f"structlog.configure({KEY_VALUE}, {LOGGER_FACTORY})\n"
        f"        logging.basicConfig(format={FORM!r}, level='INFO')",
        r"HOST (INFO|WARNING) datadivr event='(?P<event>\w+)' .*",
        LINES,
    ),
    "structlog in its console": (
        "structlog.configure()",
        r"\S+ \S+ \[\w+ *\] (?P<event>\w+) .*",
        LINES,
    ),
}


@promise(
    "Configure `logging` or structlog first or last: the lines of datadivr follow it",
    "The lines of datadivr go to standard output, or where you have `logging` or "
    "structlog put them, in your form",
    "If there is none, the logger gets `DATADIVR_LOG_LEVEL`, whatever the level of the "
    "root logger.",
)
@pytest.mark.parametrize("place", ["first", "last", "lifespan", "started"])
def test_each_line_comes_once_and_in_the_hosts_form_whenever_that_is_set(
    tmp_path: Path, place: str
) -> None:
    scripts: list[tuple[str, dict[str, str]]] = []
    for host, (code, *_) in HOSTS.items():
        script = textwrap.dedent(HOST).format(configure=code.replace("\n    ", "\n"), place=place)
        log_format = "json" if host.endswith("in JSON") else "console"
        scripts.append((script, {"DATADIVR_LOG_FORMAT": log_format}))
    outputs = run_each(scripts, tmp_path / "out")
    for (host, (_, form, expected)), (status, output) in zip(HOSTS.items(), outputs, strict=True):
        assert status == 0, output
        matches = [re.fullmatch(form, line) for line in output.splitlines()]
        events = [match["event"] if match else "a line of another form" for match in matches]
        relevant = [event for event in events if event not in {"fanout_through_asgi", AT_ANY_TIME}]
        assert sorted(relevant) == sorted(expected), (host, output)


def test_the_level_of_the_hosts_logger_counts_before_the_settings(
    live: Live, connect: Connect, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(live)
    assert id_of(client)  # the line of its arrival comes first
    levels = []
    for level in (logging.ERROR, logging.DEBUG):
        caplog.set_level(level, logger="datadivr")
        records.every.clear()
        for _ in range(2):  # the second within a minute is for DEBUG
            client.send("5")
            hear(client)
        levels.append([record.levelname for record in records.all])
    assert levels == [[], ["DEBUG", "DEBUG"]]


@promise("finds the fields in `record.datadivr`, a dict with `event`")
def test_a_record_has_its_fields_and_a_line_in_plain_text(
    live: Live, connect: Connect, records: Records
) -> None:
    client_id = id_of(connect(live))
    ((record, fields),) = [
        (record, vars(record)["datadivr"])
        for record in records.all
        if vars(record)["datadivr"]["event"] == "client_connected"
    ]
    assert (fields["client_id"], record.levelno) == (client_id, logging.INFO)
    assert record.getMessage().startswith("client_connected ")
    assert f"client_id='{client_id}'" in record.getMessage()


@promise("`uvicorn --env-file .env` does it, too.")
def test_uvicorns_file_of_variables_counts(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATADIVR_CLIENT_TOKEN=let-me-in\n")
    command = ["-m", "uvicorn", "datadivr:app", "--port", "{port}", "--env-file", ".env"]
    with Process(*command, cwd=tmp_path) as process:
        process.wait_until_up()
        with pytest.raises(InvalidStatus):
            dial(process.ws)
        bearer = {"Authorization": "Bearer let-me-in"}
        with dial(process.ws, additional_headers=bearer) as client:
            assert id_of(client)


# Whatever can write a line: a library's logger, warnings, asyncio twice, a route and a handler.
NOISE = """
    import asyncio, gc, logging, warnings
    from datadivr import app, websocket_handler

    async def fail():
        raise RuntimeError("from a task")

    @websocket_handler("noise")
    async def noise(message):
        logging.getLogger("shop").warning("from %s", "logging", exc_info=ValueError("of the shop"))
        warnings.warn("from warnings")
        task = asyncio.create_task(fail())
        await asyncio.wait([task])
        del task
        gc.collect()
        asyncio.get_running_loop().call_soon(lambda: {}["from a callback"])
        raise KeyError("from a handler")

    @app.get("/fail")
    async def fail_too():
        raise RuntimeError("from a route")
"""


@promise(
    "`console` or `json`, of [nearly all lines](#the-log)",
    "all lines of the serving process are JSON but uvicorn's first two",
)
def test_with_json_every_line_of_the_process_is_json_but_for_uvicorns_first_two(
    tmp_path: Path,
) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(NOISE))
    command = SERVERS["uvicorn"]
    with Process(*command, cwd=tmp_path, DATADIVR_LOG_FORMAT="json") as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            ask(client, "noise")
        assert http.get(f"{process.url}/fail").status_code == 500
        process.stop()
    first, second, *lines = process.log.splitlines()
    assert first.startswith("INFO:")
    assert second.startswith("INFO:")
    entries = [json.loads(line) for line in lines]
    assert {"event", "level", "timestamp"} <= set.intersection(*(set(entry) for entry in entries))
    texts = "a task", "a callback", "a handler", "a route"
    for text in ("from logging", "from warnings", "Application startup complete"):
        assert sum(text in entry["event"] for entry in entries) == 1, text
    for text in ("of the shop", *(f"from {text}" for text in texts)):
        assert sum(text in entry.get("exception", "") for entry in entries) == 1, text


def test_a_log_config_of_uvicorns_is_the_form_of_datadivrs_lines_too(tmp_path: Path) -> None:
    config = CONFIG | {"root": {"handlers": ["h"], "level": "INFO"}}
    (tmp_path / "log.json").write_text(json.dumps(config))
    options = ["--log-config", "log.json"]
    with Process(
        "-m", "uvicorn", "datadivr:app", "--port", "{port}", *options, cwd=tmp_path
    ) as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            client.send("5")
            hear(client)
        wait_until(lambda: "client_disconnected" in process.log, "the last line")
        process.stop()
    told = re.findall(r"^HOST (\w+) (\S+) (.*)$", process.log, re.MULTILINE)
    assert len(told) == len(process.log.splitlines()), process.log
    events = {text.split()[0] for _, name, text in told if name == "datadivr"}
    assert events - {"fanout_through_asgi", AT_ANY_TIME} == LINES
    assert "uvicorn.access" in {name for _, name, _ in told}


@promise(
    "it has two or more for each client that comes. `--log-level warning` leaves them out."
    " `--no-access-log` leaves out those of HTTP requests."
)
@pytest.mark.parametrize(
    ("options", "of_clients", "of_requests"),
    [("", True, True), ("--log-level warning", False, False), ("--no-access-log", True, False)],
)
def test_uvicorns_own_lines_are_left_out_as_its_options_say(
    tmp_path: Path, options: str, of_clients: bool, of_requests: bool
) -> None:
    command = ["-m", "uvicorn", "datadivr:app", "--port", "{port}", *options.split()]
    with Process(*command, cwd=tmp_path) as process:
        process.wait_until_up()
        for _ in range(3):
            with dial(process.ws) as client:
                id_of(client)
        wait_until(lambda: process.log.count("client_disconnected") == 3, "datadivr's own lines")
        process.stop()
    own = [line for line in process.log.splitlines() if line.startswith("INFO:")]
    assert (sum("WebSocket /ws" in line or "connection" in line for line in own) >= 6) == of_clients
    assert any("GET /healthz" in line for line in own) == of_requests
    assert process.log.count("client_connected") == 3


@promise("uvicorn's access log goes to standard output, too. Its other lines go to standard error.")
def test_standard_output_has_datadivrs_lines_and_the_access_log(tmp_path: Path) -> None:
    server = f"exec {shlex.quote(sys.executable)} -m uvicorn datadivr:app --port {{port}} 2>error"
    with Process("-c", server, program="/bin/sh", cwd=tmp_path) as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            assert id_of(client)
        process.stop()
    printed, complained = process.log, (tmp_path / "error").read_text()
    assert "client_connected" in printed
    assert '"GET /healthz HTTP/1.1" 200' in printed
    assert "Uvicorn running on" in complained
    assert "client_connected" not in complained
    assert "GET /healthz" not in complained


SILENCED = f"""
    import logging.config

    import datadivr
    from datadivr import app

    logging.config.dictConfig({CONFIG | {"root": {"handlers": ["h"]}}} | EXTRA)
"""


@promise(
    "silences uvicorn's own lines, but not those of datadivr: by default, it disables each logger"
    " that exists.",
    """To keep uvicorn's, write `"disable_existing_loggers": False` into the dictionary.""",
)
@pytest.mark.parametrize(
    ("extra", "is_silent"), [({}, True), ({"disable_existing_loggers": False}, False)]
)
def test_a_dict_config_silences_uvicorn_unless_it_keeps_the_loggers_that_exist(
    tmp_path: Path, extra: Json, is_silent: bool
) -> None:
    code = textwrap.dedent(SILENCED).replace("EXTRA", repr(extra))
    (tmp_path / "application.py").write_text(code)
    with Process(*SERVERS["uvicorn"], cwd=tmp_path) as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            id_of(client)
        wait_until(lambda: "client_disconnected" in process.log, "datadivr's lines")
        process.stop()
    assert "HOST INFO datadivr client_connected " in process.log
    assert ("INFO:" not in process.log) == is_silent


@promise("If structlog is configured, its own level counts.")
def test_structlogs_own_level_counts() -> None:
    output = run(
        """
        import logging, structlog, datadivr
        from fastapi.testclient import TestClient

        level = structlog.make_filtering_bound_logger(logging.WARNING)
        structlog.configure(wrapper_class=level)
        with TestClient(datadivr.app) as client, client.websocket_connect("/ws") as session:
            session.send_text("5")
            session.receive_json()
    """,
        DATADIVR_LOG_LEVEL="DEBUG",
    )
    assert "invalid_message" in output
    assert "client_connected" not in output


@promise(
    "All lines of the parent stay plain: the start, `Child process [123] died`, the stop.",
    "Watch uvicorn's log for its line `Child process [123] died`.",
)
@needs_sansio
def test_with_json_the_parents_lines_stay_plain(tmp_path: Path) -> None:
    command = ["-m", "uvicorn", "datadivr:app", "--workers", "2", "--port", "{port}"]
    with Process(*command, cwd=tmp_path, DATADIVR_LOG_FORMAT="json") as process:
        ready = "startup complete"
        wait_until(lambda: process.log.count(ready) == 2, "two workers", 3 * LIMIT)
        worker = int(re.findall(r"Started server process \[(\d+)\]", process.log)[0])
        os.kill(worker, signal.SIGKILL)
        told = rf"^INFO: .*Child process \[{worker}\] died"
        wait_until(lambda: re.search(told, process.log, re.MULTILINE), "the line")
        wait_until(lambda: process.log.count(ready) == 3, "another worker", 3 * LIMIT)
        process.stop()
    assert re.search(r"^INFO: .*Started parent process", process.log, re.MULTILINE)
    assert re.search(r"^INFO: .*Stopping parent process", process.log, re.MULTILINE)


@promise("So does the traceback of a start that fails.")
def test_with_json_the_traceback_of_a_failed_start_stays_plain(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uvicorn", "datadivr:app", "--port", str(free_port())]
    wrong = {"DATADIVR_MAX_CLIENTS": "many", "DATADIVR_LOG_FORMAT": "json"}
    errors = output_of(*command, cwd=tmp_path, status=3, **wrong)
    assert re.search("^ValueError: DATADIVR_MAX_CLIENTS", errors, re.MULTILINE)


# Sentry and others put their own in place of this method, and store what goes through it.
OBSERVED = """
    import logging
    seen = []
    call_handlers = logging.Logger.callHandlers

    def observe(self, record):
        seen.append(str(vars(record)))
        call_handlers(self, record)

    logging.Logger.callHandlers = observe
    import os
    import datadivr, fastapi, structlog
    from fastapi.testclient import TestClient

    del os.environ["DATADIVR_ADMIN_TOKEN"]
    logging.getLogger("shop").error("observed")
    app, path = {app}
    with TestClient(app) as client:
        assert client.get(path + "/clients").status_code == 401
        with client.websocket_connect(path + "/ws"):
            pass
    assert "observed" in seen[0]
    assert "admin_token_generated" not in "".join(seen)
"""
INCLUDED = "fastapi.FastAPI(), '/realtime'; app.include_router(datadivr.router, prefix=path)"


@promise(
    "The made-up admin token is printed to standard output, whatever the level, and is in"
    " no log record."
)
def test_a_made_up_token_is_shown_once_with_the_consoles_path_and_is_in_no_record(
    tmp_path: Path,
) -> None:
    apps = [
        ("datadivr.app, ''", ""),
        ("datadivr.app, ''", ""),
        (INCLUDED, "/realtime"),
        ("fastapi.FastAPI(), '/realtime'; app.mount(path, datadivr.app)", "/realtime"),
        ("datadivr.app, ''; structlog.configure()", ""),
        ("datadivr.app, ''; logging.basicConfig()", ""),
        ("datadivr.app, ''; logging.disable()", ""),
    ]
    looks = itertools.cycle([("console", "CRITICAL"), ("json", "DEBUG")])
    cases = [(*app, *look) for app, look in zip(apps, looks)]  # noqa: B905  # without an end
    scripts = [
        (
            textwrap.dedent(OBSERVED).format(app=app),
            {"DATADIVR_LOG_FORMAT": log_format, "DATADIVR_LOG_LEVEL": level},
        )
        for app, _, log_format, level in cases
    ]
    outputs = run_each(scripts, tmp_path / "out")
    for (_, path, log_format, _), (status, output) in zip(cases, outputs, strict=True):
        assert status == 0, output
        (line,) = (line for line in output.splitlines() if "admin_token_generated" in line)
        if log_format == "json":
            console, token = json.loads(line)["console"], json.loads(line)["token"]
        else:
            (console,) = re.findall(r" console='?([^' ]+)", line)
            (token,) = re.findall(r" token='?([^' ]+)", line)
        assert console == f"{path}/console#token={token}"


@promise(
    "What a handler raises is logged as an ERROR with the exception, once a minute and event.",
    "mend your code: the line has the exception",
)
def test_a_failed_handler_is_an_error_with_its_exception_once_a_minute_and_event(
    live: Live,
    connect: Connect,
    records: Records,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG, logger="datadivr")
    observed: list[logging.LogRecord] = []
    call_handlers = logging.Logger.callHandlers

    def observe(self: logging.Logger, record: logging.LogRecord) -> None:
        observed.append(record)
        call_handlers(self, record)

    monkeypatch.setattr(logging.Logger, "callHandlers", observe)
    for name in ("one", "other"):

        @datadivr.websocket_handler(name)
        async def fail(message: WebSocketMessage, name: str = name) -> None:
            raise LookupError(name)

    client = connect(live)
    for name in ("one", "one", "other"):
        ask(client, name)
    told = [record for record in records.all if record.getMessage().startswith("handler_error ")]
    assert [record in observed for record in told] == [True] * 3
    assert [record.levelname for record in told] == ["ERROR", "DEBUG", "ERROR"]
    for record, name in zip(told, ("one", "one", "other"), strict=True):
        if record.levelno == logging.ERROR:
            assert record.exc_info is not None
            assert repr(record.exc_info[1]) == f"LookupError('{name}')"
        assert vars(record)["datadivr"]["event_name"] == name


@promise("They have the client's id, and `user` where that is known.")
def test_a_line_about_a_client_names_its_user_where_that_is_known(
    live: Live, connect: Connect, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="datadivr")

    async def authorize(websocket: fastapi.WebSocket, user: str = "") -> None:
        if user:
            websocket.state.user = user

    @datadivr.websocket_handler("fail")
    async def fail(message: WebSocketMessage) -> None:
        raise RuntimeError

    datadivr.app.dependency_overrides[datadivr.authorize_client] = authorize
    try:
        for path in ("/ws?user=Ada", "/ws"):
            client = connect(live, path)
            client.send("5")
            hear(client)
            ask(client, "fail")
            ask(client, "m", to="nobody")
            client.close()
            wait_until(lambda: not datadivr.clients, "its end")
    finally:
        datadivr.app.dependency_overrides.clear()
    ends = functools.partial(records.named, "client_disconnected", logging.DEBUG)
    wait_until(lambda: len(ends()) == 2, "their last lines")
    about = [*sorted(LINES), "handler_error", "unknown_recipient"]
    users = [
        [fields.get("user") for fields in records.named(name, logging.DEBUG)] for name in about
    ]
    assert users == [["Ada", None]] * len(about)


WITH_KEYS = """
    from datadivr import WebSocketMessage, app, clients, websocket_handler

    @websocket_handler("$connect")
    async def name(message):
        clients[message.from_id].websocket.state.user = "user \\x1b[2J"

    @websocket_handler("keys")
    async def keys(message: WebSocketMessage[dict[str, int]]):
        pass

    @websocket_handler("fail")
    async def fail(message):
        raise RuntimeError(f"no such thing: {message.payload}")
"""


def test_nothing_that_is_logged_of_the_input_moves_the_cursor(tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(WITH_KEYS))
    command = [*SERVERS["uvicorn"], "--log-level", "warning"]  # whose own lines are its own
    with Process(*command, cwd=tmp_path) as process:
        process.wait_until_up()
        evil = "\x1b[2J\x9b2J\x85\rFORGED"
        heads = [
            UPGRADE.replace(b"/ws", b"/%1b[2J%c2%9b2J%0aFORGED"),
            UPGRADE.replace(b"\r\n\r\n", b"\r\nOrigin: http://\x9b2J\r\n\r\n"),
            UPGRADE.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: \x9b2J\x85\r\n\r\n"),
        ]
        for head in heads:
            with socket.create_connection(("127.0.0.1", process.port), LIMIT) as client:
                client.sendall(head)
                assert client.recv(12).startswith(b"HTTP/1.1 ")
        with dial(process.ws) as talker:
            ask(talker, "keys", payload={evil: "x"})
            ask(talker, "fail", payload=evil)
            ask(talker, "m", to=evil)
        wait_until(lambda: process.log.count("client_disconnected") == 2, "all lines")
        process.stop()
    for event in ("no_such_path", "origin_refused", "invalid_payload", "handler_error"):
        assert event in process.log
    assert process.log.count("2J") > 6
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]|^FORGED", process.log, re.MULTILINE)


@promise("an `async def` handler blocks: make it a plain `def`")
def test_a_handler_that_holds_up_the_loop_is_named_once_with_the_seconds(
    live: Live, connect: Connect, records: Records
) -> None:
    @datadivr.websocket_handler("sleep")
    async def sleep(message: WebSocketMessage) -> None:
        time.sleep(3)  # noqa: ASYNC251  # the fault that is noticed

    say(connect(live), "sleep")

    def told() -> list[float]:
        return [fields["seconds"] for fields in records.named("loop_blocked", logging.DEBUG)]

    wait_until(lambda: any(1.5 < seconds < 6 for seconds in told()), "the line")
    assert told() == [round(seconds, 1) for seconds in told()]
    assert len(records.named("loop_blocked")) == 1  # whatever else a busy machine holds up


@promise(
    "log has `processes_are_apart` then",
    "set `DATADIVR_REDIS_URL`, or run one process",
)
def test_several_workers_without_redis_each_say_what_they_need() -> None:
    command = ["-m", "uvicorn", "datadivr:app", "--port", "{port}", "--workers", "2"]
    with Process(*command) as process:
        process.wait_until_up()
        wait_until(lambda: process.log.count("processes_are_apart") >= 2, "both warnings")
        process.stop()
    lines = [line for line in process.log.splitlines() if "processes_are_apart" in line]
    assert ["DATADIVR_REDIS_URL" in line for line in lines] == [True, True]


def test_one_process_that_is_watched_by_another_is_not_several() -> None:
    with Process(*["-m", "uvicorn", "datadivr:app", "--reload", "--port", "{port}"]) as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            client_id = id_of(client)
        wait_until(lambda: client_id in process.log, "a line")
        assert "processes_are_apart" not in process.log


def test_workers_are_told_by_the_environment_too(tmp_path: Path) -> None:
    script = """
        import datadivr
        from fastapi.testclient import TestClient
        with TestClient(datadivr.app):
            pass
    """
    redis_url = f"redis://127.0.0.1:{free_port()}"
    cases: list[tuple[dict[str, str], int]] = [({}, 0), ({"WEB_CONCURRENCY": "1"}, 0)]
    cases += [({"WEB_CONCURRENCY": "4"}, 1), ({"SERVER_SOFTWARE": "gunicorn/23.0.0"}, 1)]
    cases += [({"WEB_CONCURRENCY": "4", "DATADIVR_REDIS_URL": redis_url}, 0)]
    outputs = run_each([(script, variables) for variables, _ in cases], tmp_path / "out")
    for (_, expected), (status, output) in zip(cases, outputs, strict=True):
        assert (status, output.count("processes_are_apart")) == (0, expected), output
    assert "admin_tokens_differ" not in outputs[-1][1]  # for there is one


@promise(
    "With Redis, the log warns of it: `admin_tokens_differ`",
    "set `DATADIVR_ADMIN_TOKEN`: each process makes up its own",
)
def test_processes_that_share_a_redis_are_told_to_share_the_admin_token(tmp_path: Path) -> None:
    script = """
        import os
        del os.environ["DATADIVR_ADMIN_TOKEN"]
        import datadivr
        datadivr._check_environment()
    """
    redis_url = f"redis://127.0.0.1:{free_port()}"
    variables: list[dict[str, str]] = [{}, {"DATADIVR_REDIS_URL": redis_url}]
    outputs = run_each([(script, each) for each in variables], tmp_path / "out")
    assert [output.count("admin_tokens_differ") for _, output in outputs] == [0, 1]


@promise(
    "Two copies (`datadivr`, `shop.datadivr`) are two servers",
    "import the file under one name",
)
def test_two_copies_that_both_serve_are_named_once(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    for path in ("datadivr.py", "shop/realtime.py"):
        (tmp_path / path).write_text((ROOT / "datadivr.py").read_text())
    script = """
        import sys; sys.path.insert(0, "")
        import datadivr, shop.realtime
        from fastapi.testclient import TestClient
        for app in APPS:
            with TestClient(app) as client:
                for _ in range(2):
                    with client.websocket_connect("/ws") as session:
                        session.send_json({"event_name": "whoami"})
                        session.receive_json()
    """
    cases = {"datadivr.app,": 0, "shop.realtime.app,": 0, "datadivr.app, shop.realtime.app": 1}
    outputs = run_each(
        [(script.replace("APPS", f"({apps})"), {}) for apps in cases], tmp_path / "out", tmp_path
    )
    for expected, (status, output) in zip(cases.values(), outputs, strict=True):
        assert (status, output.count("served_twice")) == (0, expected), output


def test_a_handler_that_took_anothers_place_is_named_for_debug(tmp_path: Path) -> None:
    script = """
        import datadivr
        from fastapi.testclient import TestClient

        for number in range(2):
            @datadivr.websocket_handler("chat")
            async def chat(message):
                pass

        @datadivr.websocket_handler("once")
        async def once(message):
            pass

        with TestClient(datadivr.app):
            pass
    """
    cases = [{"DATADIVR_LOG_LEVEL": level} for level in ("DEBUG", "INFO")]
    (debug, told), (info, silent) = run_each([(script, case) for case in cases], tmp_path / "out")
    assert (debug, info) == (0, 0), told + silent
    (line,) = (line for line in told.splitlines() if "handler_replaced" in line)
    assert re.search(r"event_name='?chat\b", line)
    assert "handler_replaced" not in silent


def test_a_control_character_is_logged_as_python_writes_it() -> None:
    assert datadivr._escape("a\n\x1b\x85é\u2028") == r"a\n\x1b\x85é\u2028"


@promise("The minute is counted for each event and in each process.")
def test_a_warning_comes_again_after_a_minute_and_at_debug_between(
    logged: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for now in (1000.0, 1059.9, 1060.0):
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda now=now: now)
            datadivr._warn("invalid_message")
    assert [entry["log_level"] for entry in logged] == ["warning", "debug", "warning"]


# ---- Messages: `pytest -m messages` --------------------------------------------------------------


@promise("any client can send any event with any payload to all others")
@promise(
    "any JSON; numbers with a fraction or an exponent arrive as doubles, NaN and infinities as null"
)
@pytest.mark.parametrize(
    "payload",
    [
        "null",
        "0",
        "-0.0",
        "0.1",
        "1e-300",
        "9007199254740993",
        "123456789012345678901234567890",
        '"\\u0000 \\" \\\\ é 漢 😀"',
        '{"z":1,"a":{"":[[],{},null,true]}}',
        "[" * 150 + "]" * 150,
    ],
)
def test_a_payload_comes_back_as_it_went_in(
    connect: Connect, server: Process, payload: str
) -> None:
    client = connect(server)
    client.send(f'{{"event_name": "echo", "payload": {payload}, "to": "all"}}')
    assert repr(hear(client)["payload"]) == repr(json.loads(payload))


@pytest.mark.parametrize("payload", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_json_has_no_name_for_becomes_null(
    connect: Connect, server: Process, payload: str
) -> None:
    client = connect(server)
    client.send(f'{{"event_name": "echo", "payload": [{payload}], "to": "all"}}')
    assert hear(client)["payload"] == [None]


@promise("`message.from_id` is the id of the client that sent it")
@promise(
    "the sender's id, always set by the server; `server` for its own messages",
    "The first five keys always arrive.",
)
def test_a_relayed_message_has_all_five_keys_and_its_senders_id(
    connect: Connect, server: Process
) -> None:
    client = connect(server)
    client_id = id_of(client)
    client.send('{"event_name": "echo", "to": "all", "from_id": "somebody else", "colour": "red"}')
    expected = {
        "event_name": "echo",
        "payload": None,
        "to": "all",
        "from_id": client_id,
        "message": None,
    }
    assert list(hear(client).items()) == list(expected.items())


@promise("A message is JSON text, or a binary frame that holds it")
def test_a_binary_frame_that_holds_a_message_is_accepted(connect: Connect, server: Process) -> None:
    client = connect(server)
    client.send(b'{"event_name": "double", "payload": 4}')
    assert hear(client)["payload"] == 8


def test_a_message_of_any_size_up_to_the_limit_arrives_whole(
    connect: Connect, server: Process
) -> None:
    sender, receiver = connect(server), connect(server)
    for size in (0, 1, 60, 125, 126, 40_000, 65_400, 65_536, 1_000_000):
        say(sender, "big", payload="x" * size)
        assert hear(receiver)["payload"] == "x" * size


@promise(
    "where the server speaks, as [Presence](#presence-who-is-there) does: `from_id` is "
    "then `server`"
)
@promise("makes a message from the server")
def test_create_message_is_from_the_server() -> None:
    message = datadivr.create_message("news", {"a": 1}, "all", "Hello.")
    expected = {
        "event_name": "news",
        "payload": {"a": 1},
        "to": "all",
        "from_id": "server",
        "message": "Hello.",
        "id": None,
    }
    assert message.model_dump() == expected


@promise("`create_error_message` has `error` as its code, unless you give another one")
def test_create_error_message_has_a_sentence_and_a_code() -> None:
    message = datadivr.create_error_message("It broke.", "me").model_dump(exclude={"id"})
    assert message == error("me", "error", "It broke.")


@promise("the only one that you must give; 1 to 128 characters")
@pytest.mark.parametrize("name", ["", "x" * 129])
def test_an_event_name_has_1_to_128_characters(name: str) -> None:
    with pytest.raises(ValueError, match="event_name"):
        WebSocketMessage(event_name=name)


@promise("`1e15` goes out as `1000000000000000.0`")
def test_a_message_that_grows_beyond_the_limit_is_not_relayed(
    connect: Connect, live: Live, configure: Callable[..., None]
) -> None:
    configure(max_message_bytes=10_000)
    sender, receiver = connect(live), connect(live)
    sender_id, numbers = id_of(sender), ",".join(["1e15"] * 1900)
    sender.send(f'{{"event_name": "m", "payload": [{numbers}]}}')
    text = "It would go out with more than 10000 bytes (DATADIVR_MAX_MESSAGE_BYTES): dropped."
    assert hear(sender) == error(sender_id, "message_too_big", text, event_name="m")
    assert ask(receiver, "whoami")["event_name"] == "whoami"  # and nothing before it


def test_nothing_that_is_relayed_exceeds_the_limit(
    connect: Connect, live: Live, configure: Callable[..., None]
) -> None:
    configure(max_message_bytes=1000)
    sender, receiver = connect(live), connect(live)
    sender_id = id_of(sender)
    sender.send('{"event_name":"m","payload":""}')
    empty = len(receiver.recv(timeout=LIMIT))
    largest = 1000 + empty - len('{"event_name":"m","payload":""}')  # that may come in
    for length in (1000, 1001, largest):
        sender.send('{"event_name":"m","payload":"%s"}' % ("x" * (length - empty)))
    assert len(receiver.recv(timeout=LIMIT)) == 1000
    for _ in range(2):
        told = hear(sender)
        assert told["payload"]["code"] == "message_too_big"
        assert told["to"] == sender_id
        assert "DATADIVR_MAX_MESSAGE_BYTES" in told["message"]
    assert ask(receiver, "whoami")["event_name"] == "whoami"  # and nothing before it


def test_what_a_handler_makes_of_a_message_is_not_limited(
    connect: Connect, live: Live, configure: Callable[..., None]
) -> None:
    configure(max_message_bytes=1000)

    @datadivr.websocket_handler("img")
    async def img(message: WebSocketMessage) -> WebSocketMessage:
        return WebSocketMessage(event_name="thumb", payload="x" * 2000, from_id=message.from_id)

    sender, receiver = connect(live), connect(live)
    id_of(receiver)
    say(sender, "img")
    assert (heard := hear(receiver))["payload"] == "x" * 2000
    assert heard["from_id"] == id_of(sender)  # whose answer is the first that it gets


class Table:
    """What numpy's arrays and scalars and pandas' Series have in common."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def tolist(self) -> Any:
        return self.value


@promise("numbers, arrays and Series go out as lists and numbers")
@pytest.mark.parametrize("kind", ["broadcast", "an answer"])
def test_a_payload_with_arrays_goes_out_as_lists(
    connect: Connect, live: Live, registry: None, kind: str
) -> None:
    payload = {
        "array": array.array("d", [0.5, 2]),
        "rows": [{"scalar": Table(7)}, Table([array.array("b", [1]), Table(None)])],
    }

    @datadivr.websocket_handler("table")
    async def table(message: WebSocketMessage) -> WebSocketMessage | None:
        told = datadivr.create_message("table", payload, message.from_id)
        if kind == "an answer":
            return told
        await datadivr.broadcast(told)
        return None

    expected = {"array": [0.5, 2.0], "rows": [{"scalar": 7}, [[1], None]]}
    assert ask(connect(live), "table")["payload"] == expected


class Endless:
    def tolist(self) -> Any:
        return [self]


@promise("A payload that JSON cannot hold is an error of `broadcast`, which the log has, too")
@pytest.mark.parametrize(
    ("payload", "place", "kind"),
    [
        (object(), "payload", "object"),
        ({"rows": [1, 2, 3, object()]}, "payload.rows.3", "object"),
        ([{"a": 1}, {"b": (0, {"c": int})}], "payload.1.b.1.c", "type"),
        ({"rows": [Table([0, object()])]}, "payload.rows.0", "object"),
    ],
)
def test_what_cannot_be_encoded_is_named_with_its_place_and_type(
    live: Live, records: Records, payload: Any, place: str, kind: str
) -> None:
    message = WebSocketMessage(event_name="x", payload=payload)
    failed = datadivr._errors_total.labels("handler_error")
    before = failed._value.get()
    with pytest.raises(PydanticSerializationError) as told:
        in_a_thread(datadivr.broadcast(message))
    assert re.search(rf"{re.escape(place)}(\.\d)?\b.*\b{kind}\b", str(told.value))
    ((fields),) = records.named("broadcast_failed")
    assert place in str(fields)
    assert failed._value.get() - before == 1


def test_a_list_that_holds_itself_fails_and_nothing_else_does(connect: Connect, live: Live) -> None:
    @datadivr.websocket_handler("endless")
    async def endless(message: WebSocketMessage) -> WebSocketMessage:
        return datadivr.create_message("endless", Endless(), message.from_id)

    client = connect(live)
    assert ask(client, "endless")["payload"]["code"] == "handler_error"
    assert id_of(client)


def test_the_log_says_where_in_a_handlers_answer_it_went_wrong(
    connect: Connect, live: Live, records: Records
) -> None:
    @datadivr.websocket_handler("rows")
    async def rows(message: WebSocketMessage) -> WebSocketMessage:
        return datadivr.create_message("rows", {"rows": [0, object()]}, message.from_id)

    assert ask(connect(live), "rows")["payload"]["code"] == "handler_error"
    (record,) = (record for record in records.all if record.exc_info)
    assert record.exc_info is not None
    assert re.search(r"payload\.rows\.1\b.*\bobject\b", str(record.exc_info[1]))


@pytest.mark.parametrize("message", [{"event_name": "x"}, "x", None])
def test_a_broadcast_of_something_else_says_what_it_takes(live: Live, message: Any) -> None:
    with pytest.raises(TypeError, match=rf"WebSocketMessage.*\b{type(message).__name__}\b"):
        in_a_thread(datadivr.broadcast(message))


class Priced(WebSocketMessage):
    price: int = 0


class Renamed(WebSocketMessage):
    """Has no field of its own, but other defaults."""

    event_name: str = "renamed"
    payload: Any = 1


@promise("A field of your own belongs in the payload.")
@pytest.mark.parametrize("kind", ["broadcast", "an answer"])
def test_a_field_of_ones_own_does_not_vanish_silently(
    connect: Connect, live: Live, records: Records, kind: str
) -> None:
    @datadivr.websocket_handler("price")
    async def price(message: WebSocketMessage) -> WebSocketMessage | None:
        answer = Priced(event_name="price", price=5, to=message.from_id)
        if kind == "an answer":
            return answer
        await datadivr.broadcast(answer)
        return None

    assert ask(connect(live), "price")["payload"]["code"] == "handler_error"
    texts = [str(record.exc_info[1]) for record in records.all if record.exc_info]
    assert [re.findall(r"\b(?:Priced|price|payload)\b", text) != [] for text in texts] == [True]
    assert "payload" in texts[0]


def test_a_subclass_without_fields_of_its_own_goes_out(connect: Connect, live: Live) -> None:
    class Typed(WebSocketMessage[Point]): ...

    @datadivr.websocket_handler("subclasses")
    async def subclasses(message: WebSocketMessage) -> WebSocketMessage:
        await datadivr.broadcast(Renamed(to="all"))
        return Typed(event_name="typed", payload=Point(x=3), to="all")

    client = connect(live)
    say(client, "subclasses")
    heard = [hear(client) for _ in range(2)]
    assert [(message["event_name"], message["payload"]) for message in heard] == [
        ("renamed", 1),
        ("typed", {"x": 3, "when": None}),
    ]


@promise("a message without one has no such key")
def test_a_message_without_an_id_goes_out_with_the_five_keys_of_old_byte_for_byte(
    connect: Connect, server: Process
) -> None:
    client = connect(server)
    client_id = id_of(client)
    keys = '{{"event_name":"{}","payload":{},"to":"{}","from_id":"{}","message":null}}'.format
    client.send('{"event_name": "echo", "payload": 1.50, "to": "all", "id": null}')
    assert client.recv(timeout=LIMIT) == keys("echo", "1.5", "all", client_id)
    client.send('{"event_name": "double", "payload": 2}')
    assert client.recv(timeout=LIMIT) == keys("doubled", "4", client_id, "server")


@promise("your mark for a question: an integer, or a text of at most 128 characters")
@pytest.mark.parametrize(
    "number",
    [
        "0",
        "-1",
        "9007199254740993",
        "18446744073709551616",
        "1" + "0" * 100,
        '""',
        '"0"',
        '"null"',
        json.dumps("x" * 128),
        json.dumps("😀" * 128),
        '"\\u0000\\n\\"\\\\é"',
    ],
)
def test_an_id_comes_back_as_it_went_in_as_the_last_key(
    connect: Connect, server: Process, number: str
) -> None:
    client = connect(server)
    client_id = id_of(client)
    for event_name, to in (("whoami", "all"), ("silent", "all"), ("nobody hears", client_id)):
        client.send(f'{{"id": {number}, "event_name": "{event_name}", "to": "{to}"}}')
        answer = hear(client)
        assert list(answer) == ["event_name", "payload", "to", "from_id", "message", "id"]
        assert repr(answer["id"]) == repr(json.loads(number))
    assert hear_all(client) == []


@pytest.mark.parametrize(
    "wrong",
    ["1.5", "true", "[]", "{}", "[1]", "NaN", '"%s"' % ("x" * 129), '"\\ud800"', "9" * 5000],
)
def test_what_cannot_be_an_id_is_an_invalid_message_and_in_no_answer(
    connect: Connect, server: Process, wrong: str
) -> None:
    client = connect(server)
    client_id = id_of(client)
    client.send(f'{{"event_name": "double", "payload": 1, "id": {wrong}}}')
    (answer,) = hear_all(client)
    code, event_name = answer["payload"]["code"], answer["payload"].get("event_name", "double")
    assert (code, event_name) == ("invalid_message", "double")
    assert (answer["to"], "id" in answer) == (client_id, False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('{"id": 7}', 7),
        ('{"event_name": 5, "id": "a"}', "a"),
        ('{"event_name": "$x", "id": 0}', 0),
        ('{"event_name": "x", "to": null, "id": 7}', 7),
        ('{"event_name": "x", "to": "#", "id": 7}', 7),
        ('{"event_name": "x", "message": [], "id": ""}', ""),
        ('{"event_name": "x", "payload": "\\ud800", "id": 7}', 7),
        (b'{"event_name": "\\ud800", "id": 7}', 7),
    ],
)
def test_an_invalid_message_whose_id_can_be_read_gets_its_one_answer(
    connect: Connect, server: Process, text: str | bytes, number: int | str
) -> None:
    client = connect(server)
    client_id = id_of(client)
    client.send(text)
    (answer,) = hear_all(client)
    assert (answer["event_name"], answer["payload"]["code"]) == ("error", "invalid_message")
    assert (answer["to"], answer["id"]) == (client_id, number)


@pytest.mark.parametrize("text", ["[7]", "7", '{"id": 7', '{"id": 7}' + " " * 10 + "x"])
def test_an_invalid_message_whose_id_cannot_be_read_gets_an_error_without_one(
    connect: Connect, live: Live, text: str
) -> None:
    client = connect(live)
    client.send(text)
    (answer,) = hear_all(client)
    assert (answer["payload"]["code"], "id" in answer) == ("invalid_message", False)


def test_a_message_too_big_to_go_out_has_an_answer_with_its_id(
    connect: Connect, live: Live, configure: Callable[..., None]
) -> None:
    configure(max_message_bytes=10_000)
    sender = connect(live)
    numbers = ",".join(["1e15"] * 1900)
    for to in ("others", id_of(sender)):
        sender.send(f'{{"event_name": "m", "payload": [{numbers}], "to": "{to}", "id": 7}}')
        (answer,) = hear_all(sender)
        known = {"code": "message_too_big", "event_name": "m"}
        assert (answer["event_name"], answer["payload"], answer["id"]) == ("error", known, 7)


def test_messages_are_made_with_an_id() -> None:
    news = datadivr.create_message("news", 1, "all", None, id="a")
    assert news.model_dump() == message_from("server", "news", "all", payload=1, id="a")
    wrong = datadivr.create_error_message("It broke.", "me", id=0)
    assert wrong.model_dump() == error("me", "error", "It broke.", id=0)
    parsed = datadivr.parse_message('{"event_name": "x", "id": 5}')
    assert (parsed.id, datadivr.parse_message('{"event_name": "x"}').id) == (5, None)


@promise(
    "A name has 1 to 100 characters, without white space, control characters, lone "
    "surrogates, `/` and `#`.",
    "`create_message` with a wrong name in `to` raises a `ValueError`, which is a "
    "`handler_error` where you do not catch it",
)
@pytest.mark.parametrize("room", BAD_ROOMS)
def test_a_bad_room_is_refused_wherever_a_message_is_made_or_sent(room: str) -> None:
    to = f"#{room}"
    for make in (WebSocketMessage, WebSocketMessage[int]):
        with pytest.raises(ValueError, match=r"to\b"):
            make(event_name="x", to=to)
    with pytest.raises(ValueError, match="room"):
        datadivr.create_message("x", None, to)
    with pytest.raises(ValueError, match="room"):
        datadivr.create_error_message("It broke.", to)
    with pytest.raises(datadivr.InvalidMessageFormat, match=r"message: |to: "):
        datadivr.parse_message(json.dumps({"event_name": "x", "to": to}))
    good = WebSocketMessage(event_name="x", to="#garden")
    changed = good.model_copy()
    constructed = WebSocketMessage.model_construct(event_name="x", to=to)
    with contextlib.suppress(ValueError):  # it may be refused as early as this
        changed.to = to
    for message in (good.model_copy(update={"to": to}), changed, constructed):
        if message.to == to:
            with pytest.raises(ValueError, match="room"):
                in_a_thread(datadivr.broadcast(message))


@promise(
    "Functions and routes take the name (`garden`). `to` is `#` and the name",
    "raise an error that is both a `ValueError` and an `HTTPException` 422",
)
@pytest.mark.parametrize("room", BAD_ROOMS)
def test_every_function_that_takes_a_room_refuses_a_bad_one(room: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: datadivr.join_room("me", room),
        lambda: datadivr.leave_room("me", room),
    ]
    if room:  # no room is all clients
        calls.append(lambda: datadivr.list_clients(room=room))
    for call in calls:

        async def main(call: Callable[[], Any] = call) -> None:
            await call()

        with pytest.raises(ValueError, match="room"):
            in_a_thread(main())


@pytest.mark.parametrize("room", GOOD_ROOMS)
def test_a_room_has_any_name_of_up_to_100_characters(
    connect: Connect, server: Process, room: str
) -> None:
    member, sender = connect(server), connect(server)
    assert ask(member, "join", payload=[room], id=1)["event_name"] == "ok"
    assert ask(sender, "join", payload=[room], id=1)["event_name"] == "ok"
    sender_id = id_of(sender)
    say(sender, "m", to=f"#{room}")
    assert hear(member) == message_from(sender_id, "m", f"#{room}")
    listed = ask(sender, "members", payload=room)["payload"]
    assert listed == {id_of(member): [room], sender_id: [room]}


# ---- Handlers: `pytest -m handlers` --------------------------------------------------------------


@promise("It gets the message that a client sent, and returns one that the server sends")
@promise("It returns a message, which goes to its `to`, or `None`.")
def test_a_handlers_answer_goes_to_its_to(connect: Connect, server: Process) -> None:
    client = connect(server)
    client_id = id_of(client)
    expected = {
        "event_name": "doubled",
        "payload": 42,
        "to": client_id,
        "from_id": "server",
        "message": None,
    }
    assert ask(client, "double", payload=21) == expected


def test_a_plain_function_runs_in_the_thread_pool(connect: Connect, server: Process) -> None:
    assert ask(connect(server), "thread")["payload"] is False


def test_a_handler_may_answer_nothing(connect: Connect, server: Process) -> None:
    client = connect(server)
    say(client, "silent")
    assert ask(client, "double", payload=1)["payload"] == 2


@promise(
    "the handler raised, or returned something that is no message; the log has the traceback",
    "The client gets `handler_error`. For an `HTTPException` it gets `refused`, and the "
    "log has no traceback.",
)
@pytest.mark.parametrize("event_name", ["broken", "wrong", "unencodable", "cancelled"])
def test_a_handler_that_fails_gets_its_sender_an_error_without_internals(
    connect: Connect, server: Process, event_name: str
) -> None:
    client = connect(server)
    text = f"The handler of '{event_name}' failed."
    expected = error(id_of(client), "handler_error", text, event_name=event_name)
    assert ask(client, event_name) == expected
    assert ask(client, "double", payload=1)["payload"] == 2


@promise("`others` and a room leave out the client whose message the handler was given")
def test_an_answer_to_others_leaves_out_the_one_who_asked(
    connect: Connect, server: Process
) -> None:
    asker, other = connect(server), connect(server)
    say(asker, "tell_others", payload=1)
    assert hear(other)["event_name"] == "told"
    assert ask(asker, "double", payload=1)["event_name"] == "doubled"


@promise("A question that takes long holds up the next ones of the same client")
@promise(
    "The messages of one client are handled one after the other, so a slow one holds up "
    "the next ones",
    "Those of different clients are not: after an `await`, others may have changed",
)
def test_a_handler_that_takes_long_holds_up_its_own_client_alone(
    connect: Connect, server: Process
) -> None:
    slow, quick = connect(server), connect(server)
    slow_id = id_of(slow)
    say(slow, "wait")
    say(slow, "double", payload=1)
    assert ask(quick, "double", payload=2)["payload"] == 4
    with pytest.raises(TimeoutError):
        slow.recv(timeout=0.1)
    say(quick, "release", payload=slow_id)
    assert [hear(slow)["event_name"] for _ in range(2)] == ["waited", "doubled"]


@promise("`whoami` with the client's own id as `payload`")
def test_whoami_answers_the_clients_own_id(connect: Connect, server: Process) -> None:
    client = connect(server)
    answer = ask(client, "whoami")
    assert answer == {
        "event_name": "whoami",
        "payload": answer["to"],
        "to": answer["to"],
        "from_id": "server",
        "message": None,
    }


@promise('whose `payload` is `{"numbers": [1, 2]}`, with `sum_handler_result`')
def test_sum_event_answers_the_sum_as_a_float(connect: Connect, server: Process) -> None:
    client = connect(server)
    answer = ask(client, "sum_event", payload={"numbers": [1, "2", 3.5]})
    assert (answer["event_name"], answer["payload"], answer["from_id"]) == (
        "sum_handler_result",
        6.5,
        "server",
    )


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ([1], "payload: Input should be an object"),
        ({}, "payload.numbers: Field required"),
        ({"numbers": "12"}, "payload.numbers: Input should be a valid array"),
        (
            {"numbers": [1, "x"]},
            "payload.numbers.1: Input should be a valid number, unable to parse string as a number",
        ),
        ({"numbers": [None]}, "payload.numbers.0: Input should be a valid number"),
        ({"numbers": ["nan"]}, "payload.numbers.0: Input should be a finite number"),
        ({"numbers": [math.inf]}, "payload.numbers.0: Input should be a valid number"),
        ({"numbers": [1e308, 1e308]}, "payload.numbers: Sum should be a finite number"),
    ],
)
def test_a_sum_of_something_else_gets_an_error_of_its_own(payload: Any, text: str) -> None:
    message = WebSocketMessage(event_name="sum_event", payload=payload, from_id="me")
    answer = in_a_thread(datadivr.sum_handler(message)).model_dump(exclude={"id"})
    assert answer == error("me", "invalid_payload", text, event_name="sum_event")


def test_a_number_beyond_what_a_float_can_be_has_no_sum() -> None:
    payload = {"numbers": [10**400]}
    message = WebSocketMessage(event_name="sum_event", payload=payload, from_id="me")
    answer = in_a_thread(datadivr.sum_handler(message))
    fault = {"code": "invalid_payload", "event_name": "sum_event"}
    assert answer.payload == fault  # its sentence is pydantic's


@promise("Each event has one handler, the last that is imported")
@promise(
    "To test a handler alone, `await handle_msg(WebSocketMessage(...))`",
    "An event has one handler, the last that was registered.",
    "runs a handler and returns its answer",
)
def test_the_last_registration_of_a_name_wins(registry: None) -> None:
    for answer in (1, 2):

        @datadivr.websocket_handler("twice")
        async def handler(message: WebSocketMessage, answer: int = answer) -> WebSocketMessage:
            return datadivr.create_message("answer", answer, message.from_id)

    last = in_a_thread(datadivr.handle_msg(WebSocketMessage(event_name="twice")))
    assert last is not None
    assert last.payload == 2


def test_a_decorated_function_stays_as_it_was(registry: None) -> None:
    def handler(message: WebSocketMessage) -> None:
        return None

    assert datadivr.websocket_handler("plain")(handler) is handler


@promise(
    "`parse_message(data)`, `get_handlers(handler_type=HandlerType.SERVER)`, "
    "`HandlerType` | for a client in Python"
)
@pytest.mark.parametrize(
    ("handler_type", "registered"),
    [
        (HandlerType.SERVER, {HandlerType.SERVER}),
        (HandlerType.CLIENT, {HandlerType.CLIENT}),
        (HandlerType.BOTH, set(HandlerType)),
    ],
)
def test_each_type_of_handler_has_a_registry(
    registry: None, handler_type: HandlerType, registered: set[HandlerType]
) -> None:
    @datadivr.websocket_handler("event", handler_type)
    async def handler(message: WebSocketMessage) -> None: ...

    assert {
        kind for kind in HandlerType if datadivr.get_handlers(kind).get("event") is handler
    } == registered


@promise("An `async def` handler runs in the event loop, and must not block it.")
def test_an_object_with_a_coroutine_method_is_a_handler(registry: None) -> None:
    class Handler:
        async def __call__(self, message: WebSocketMessage) -> WebSocketMessage:
            return datadivr.create_message("answer", asyncio.get_running_loop().is_running(), "me")

    datadivr.websocket_handler("object")(Handler())
    answer = in_a_thread(datadivr.handle_msg(WebSocketMessage(event_name="object")))
    assert answer is not None
    assert answer.payload is True


def test_a_message_without_a_handler_is_its_own_answer() -> None:
    message = WebSocketMessage(event_name="unheard of")
    assert in_a_thread(datadivr.handle_msg(message)) is message


class Polygon(BaseModel):
    points: list[Point]


PointMessage = WebSocketMessage[Point]


async def by_annotation(message: WebSocketMessage[Point]) -> WebSocketMessage:
    return datadivr.create_message(
        "point", assert_type(message.payload.x, int) + 1, message.from_id
    )


async def by_text(message: "WebSocketMessage[Point]") -> WebSocketMessage:
    return datadivr.create_message("point", message.payload.x + 1, message.from_id)


async def by_alias(message: "PointMessage") -> WebSocketMessage:
    return datadivr.create_message("point", message.payload.x + 1, message.from_id)


@promise(
    "for any other payload, the function does not run, and the client gets an `error`",
    "You can write another type in place of `str`, or a model of pydantic",
)
@promise(
    "not of the type that the handler asks for; `sum_event` without numbers that have a finite sum",
    "runs for such payloads alone; others get `invalid_payload`",
)
@pytest.mark.parametrize("handler", [by_annotation, by_text, by_alias])
def test_a_typed_handler_gets_its_payload_validated(
    connect: Connect, live: Live, handler: Callable[[Any], Any], logged: list[Any]
) -> None:
    datadivr.websocket_handler("point")(handler)
    client = connect(live)
    client_id = id_of(client)
    assert ask(client, "point", payload={"x": 1, "when": "2026-01-01T00:00:00Z"})["payload"] == 2
    for payload, text in [
        (
            {"x": "secret"},
            "payload.x: Input should be a valid integer, unable to parse string as an integer",
        ),
        ({"when": 5}, "payload.x: Field required"),
        (None, "payload: Input should be an object"),
    ]:
        expected = error(client_id, "invalid_payload", text, event_name="point")
        assert ask(client, "point", payload=payload) == expected
    assert "secret" not in str(logged)


class Seat(BaseModel):
    row: int

    @field_validator("row")
    @classmethod
    def check_row(cls, row: int) -> int:
        if row > 20:
            raise ValueError("There are 20 rows.")
        return row


@promise("The sentence of a validator of your own goes to the client, too")
def test_the_sentence_of_a_validator_of_ones_own_reaches_the_client(
    connect: Connect, live: Live
) -> None:
    @datadivr.websocket_handler("book")
    async def book(message: WebSocketMessage[Seat]) -> None: ...

    client = connect(live)
    client_id = id_of(client)
    text = "payload.row: Value error, There are 20 rows."
    expected = error(client_id, "invalid_payload", text, event_name="book")
    assert ask(client, "book", payload={"row": 21}) == expected
    assert ask(client, "book", payload={"row": 20}, id=1) == ok(client_id, 1)


@pytest.mark.parametrize("kind", [Annotated[PointMessage, "documented"], PointMessage | None])
def test_a_type_is_found_in_what_stands_around_it(registry: None, kind: Any) -> None:
    async def point(message: Any) -> None: ...

    point.__annotations__["message"] = kind
    datadivr.websocket_handler("point")(point)
    with pytest.raises(datadivr.InvalidMessageFormat, match=r"payload\.x: Field required"):
        in_a_thread(handled("point", {}))


def test_many_faults_of_a_payload_are_told_in_short(registry: None) -> None:
    @datadivr.websocket_handler("points")
    async def points(message: WebSocketMessage[dict[str, Point]]) -> None: ...

    with pytest.raises(datadivr.InvalidMessageFormat, match=r"^21 fields are wrong$"):
        in_a_thread(handled("points", {str(number): {} for number in range(21)}))


def test_a_fault_of_a_typed_handlers_own_is_not_its_senders(
    registry: None, logged: list[Any]
) -> None:
    @datadivr.websocket_handler("point")
    async def point(message: WebSocketMessage[Point]) -> None:
        Point.model_validate({})

    with TestClient(datadivr.app).websocket_connect("/ws") as client:
        client.send_json({"event_name": "point", "payload": {"x": 1}})
        assert client.receive_json()["payload"]["code"] == "handler_error"


@promise("Names in annotations must be defined when the handler is registered.")
def test_a_handler_whose_messages_type_is_not_there_is_refused(registry: None) -> None:
    async def typed(message: "WebSocketMessage[Nowhere]") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    async def alias(message: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    async def elsewhere(message: "WebSocketMessage", other: "Nowhere" = 1) -> "Nowhere": ...  # type: ignore[name-defined]  # noqa: F821

    class Callable:
        async def __call__(self, message: "WebSocketMessage[Nowhere]") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    async def nested(message: Any) -> None: ...

    nested.__annotations__["message"] = Optional["WebSocketMessage[Nowhere]"]  # noqa: F821
    for handler in (typed, alias, elsewhere, nested, Callable()):
        with pytest.raises(NameError, match=r"(?s)Nowhere.*must name what is defined"):
            datadivr.websocket_handler("refused")(handler)
    assert "refused" not in datadivr.get_handlers()


def test_a_function_without_a_signature_is_a_handler(registry: None) -> None:
    datadivr.websocket_handler("print")(print)
    assert datadivr.get_handlers()["print"] is print


def test_a_generator_function_is_refused(registry: None) -> None:
    def plain(message: WebSocketMessage) -> Iterator[WebSocketMessage]:
        yield message

    async def coroutine(message: WebSocketMessage) -> Any:
        yield message

    handlers: list[Any] = [plain, coroutine, functools.partial(plain)]
    for handler in handlers:
        with pytest.raises(TypeError, match="returns a message, and yields none"):
            datadivr.websocket_handler("refused")(handler)


def test_a_handlers_own_invalid_message_is_not_its_senders(
    connect: Connect, live: Live, logged: list[Any]
) -> None:
    @datadivr.websocket_handler("own")
    async def own(message: WebSocketMessage) -> None:
        datadivr.parse_message("{}")

    assert ask(connect(live), "own")["payload"]["code"] == "handler_error"


def test_a_decorator_without_parentheses_says_how_it_is_written(registry: None) -> None:
    async def greet(message: WebSocketMessage) -> None: ...

    with pytest.raises(TypeError, match=r'write @websocket_handler\("event"\)'):
        datadivr.websocket_handler(greet)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "x" * 129, "$conect", "$"])
def test_a_name_that_no_message_can_have_is_refused(registry: None, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^expected .*, or 1 to 128 characters that begin without"
    ):
        datadivr.websocket_handler(name)


async def no_parameter() -> None: ...


async def two_parameters(message: WebSocketMessage, other: int) -> None: ...


async def with_dependency(
    message: WebSocketMessage, db: int = fastapi.Depends(free_port)
) -> None: ...


async def with_security(
    message: WebSocketMessage, user: int = fastapi.Security(free_port)
) -> None: ...


async def with_header(message: WebSocketMessage, agent: str = fastapi.Header("")) -> None: ...


async def keyword_needed(message: WebSocketMessage, *, other: int) -> None: ...


@pytest.mark.parametrize(
    "handler",
    [
        no_parameter,
        two_parameters,
        with_dependency,
        with_security,
        with_header,
        keyword_needed,
    ],
)
def test_a_handler_that_does_not_take_one_message_is_refused(
    registry: None, handler: Callable[..., Any]
) -> None:
    with pytest.raises(TypeError, match=f"^{handler.__name__}.*: a handler takes one message"):
        datadivr.websocket_handler("event")(handler)


class Size(BaseModel):
    width: int


def test_a_decorated_handler_takes_what_its_wrapper_takes(registry: None) -> None:
    async def point(message: WebSocketMessage[Point], other: int) -> None: ...

    @functools.wraps(point)
    async def wrapper(message: Any) -> None:
        await point(message, 1)

    datadivr.websocket_handler("point")(wrapper)
    in_a_thread(handled("point", {"x": 1}))
    with pytest.raises(datadivr.InvalidMessageFormat, match=r"payload\.x: Field required"):
        in_a_thread(handled("point", {}))


def test_a_decorator_may_give_its_handler_more_before_the_message(registry: None) -> None:
    async def point(user: str, message: WebSocketMessage[Point]) -> None: ...

    @functools.wraps(point)
    async def wrapper(message: Any) -> None:
        await point("Ada", message)

    datadivr.websocket_handler("point")(wrapper)
    in_a_thread(handled("point", {"x": 1}))
    with pytest.raises(datadivr.InvalidMessageFormat, match=r"payload\.x: Field required"):
        in_a_thread(handled("point", {}))


@pytest.mark.parametrize("annotation", [dict, object])
def test_a_handler_whose_annotation_makes_no_message_is_named_and_does_not_run(
    registry: None, annotation: Any
) -> None:
    ran = []

    async def point(message: Any) -> None:
        ran.append(message)

    point.__annotations__["message"] = annotation
    datadivr.websocket_handler("point")(point)
    with pytest.raises(TypeError, match="point: its annotation makes a dict of a message"):
        in_a_thread(handled("point", {"x": 1}))
    assert ran == []


def test_a_payloads_own_defaults_are_left_as_they_are(registry: None) -> None:
    heard = []

    @datadivr.websocket_handler("defaults")
    async def defaults(message: WebSocketMessage[Defaults]) -> None:
        heard.append(message.payload.kind)

    in_a_thread(handled("defaults", {}))
    assert heard == [{"type": "list"}]


class Defaults(BaseModel):
    kind: dict[str, str] = {"type": "list"}


PointAlias = WebSocketMessage[Point]


@promise("Unions, `Annotated` and subclasses work as in pydantic.")
@pytest.mark.parametrize(
    "annotation",
    [
        Annotated[PointMessage | None, "documented"],
        NewType("NewMessage", PointMessage),
        TypeVar("BoundMessage", bound=PointMessage),
        "Annotated[WebSocketMessage[Point], 'documented']",
        "PointAlias",
        "PointMessage | None",
    ],
)
def test_a_type_is_found_however_it_is_written(registry: None, annotation: Any) -> None:
    async def point(message: Any) -> None: ...

    point.__annotations__["message"] = annotation
    datadivr.websocket_handler("point")(point)
    with pytest.raises(datadivr.InvalidMessageFormat, match=r"payload\.x: Field required"):
        in_a_thread(handled("point", {}))


@pytest.mark.parametrize(
    "annotation",
    [
        WebSocketMessage[Point] | WebSocketMessage[Size],
        "WebSocketMessage[Point] | WebSocketMessage[Size] | None",
        list[WebSocketMessage[Point]],
    ],
)
def test_whatever_has_a_payloads_type_in_it_is_validated(registry: None, annotation: Any) -> None:
    ran = []

    def shape(message: Any) -> None:
        ran.append(message.payload)

    shape.__annotations__["message"] = annotation
    datadivr.websocket_handler("shape")(shape)
    with pytest.raises(datadivr.InvalidMessageFormat):
        in_a_thread(handled("shape", {"z": 1}))
    assert not ran
    if "Size" in str(annotation):
        in_a_thread(handled("shape", {"width": 2}))
        assert ran == [Size(width=2)]


class Camel(BaseModel):
    user_name: str = Field(alias="userName")


@promise("Payloads go out as pydantic writes them, by their aliases.")
def test_a_payloads_aliases_go_over_the_wire(connect: Connect, live: Live) -> None:
    @datadivr.websocket_handler("camel")
    async def camel(message: WebSocketMessage[Camel]) -> WebSocketMessage:
        return datadivr.create_message("camel", message.payload, message.from_id)

    payload = {"userName": "Ada"}
    assert ask(connect(live), "camel", payload=payload)["payload"] == payload


class Cat(BaseModel, extra="forbid"):
    kind: Literal["cat"]


class Dog(BaseModel, extra="forbid"):
    kind: Literal["dog"]
    ages: dict[str, int] = {}


class Fish(BaseModel):
    kind: Literal["fish"]
    zone: ZoneInfo


Pet = Annotated[Cat | Dog | Fish, Field(discriminator="kind")]
SECRET = "4111-1111-1111-1111"


@promise(
    "Sentences about wrong fields name keys of what was sent.",
    "Of its values they quote only a wrong room, and those that pydantic quotes: a tag that "
    "chooses among models, a time zone, an import's path.",
)
@pytest.mark.parametrize(
    "payload",
    [
        {"kind": "x" * 900_000},
        {"kind": "cat", "more": SECRET},
        {"kind": "cat", "x" * 900_000: 1},
        {"kind": "dog", "ages": {"Rex": SECRET}},
        {"kind": "dog", "ages": {"x" * 900_000: "y" * 9}},
        {"kind": "dog", "ages": {f"dog {number}": SECRET for number in range(21)}},
    ],
)
def test_an_answer_about_a_payload_is_short_and_holds_none_of_its_values(
    connect: Connect, live: Live, logged: list[Any], payload: Json
) -> None:
    @datadivr.websocket_handler("pet")
    async def pet(message: WebSocketMessage[Pet]) -> None: ...

    answer = ask(connect(live), "pet", payload=payload)
    assert answer["payload"] == {"code": "invalid_payload", "event_name": "pet"}
    assert answer["message"].startswith(("payload", "21 fields are wrong"))
    assert len(answer["message"]) <= 500
    assert SECRET not in answer["message"] + repr(logged)
    assert len(repr(logged)) < 5000


@promise(
    "Of its values they quote only a wrong room, and those that pydantic quotes: a tag that "
    "chooses among models, a time zone, an import's path."
)
def test_an_answer_about_a_wrong_room_tag_or_time_zone_quotes_it(
    registry: None, connect: Connect, live: Live
) -> None:
    @datadivr.websocket_handler("pet")
    async def pet(message: WebSocketMessage[Pet]) -> None: ...

    client = connect(live)
    assert "'bird'" in ask(client, "pet", payload={"kind": "bird"})["message"]
    assert "Bird/Sea" in ask(client, "pet", payload={"kind": "fish", "zone": "Bird/Sea"})["message"]
    assert "'a b'" in ask(client, "chat", to="#a b")["message"]


@promise("The payload of `$disconnect` is the [reason](#metrics) that the metrics count.")
def test_a_disconnect_handler_is_told_the_reason(connect: Connect, live: Live) -> None:
    heard = []

    @datadivr.websocket_handler("$disconnect")
    async def went(message: WebSocketMessage) -> None:
        heard.append((message.from_id, message.payload))

    client = connect(live)
    client_id = id_of(client)
    url = f"/clients/{client_id}"
    assert live.api.delete(url).status_code == 204
    assert close_code(client) == 1008
    wait_until(lambda: heard == [(client_id, "admin")], "the handler")


@promise("It may return the message itself, which sends it on, or `None`, which drops it.")
def test_a_message_that_the_default_handler_returns_goes_the_way_it_goes_without_one(
    connect: Connect, live: Live
) -> None:
    sender, other = connect(live), connect(live)
    payload = {"a": [1, 1.5, None, "é"], "b": {}}

    def relayed() -> list[Json]:
        say(sender, "m", payload=payload, message="hello")
        say(sender, "m", to="all")
        say(sender, "m", to=other_id)
        return [hear(client) for client in (other, other, other, sender)]

    other_id = id_of(other)
    without = relayed()

    @datadivr.websocket_handler("$default")
    async def default(message: WebSocketMessage) -> WebSocketMessage:
        return message

    assert relayed() == without
    assert without[0]["payload"] == payload
    assert id_of(sender) == without[0]["from_id"]


@promise("keep a `$default` that refuses")
def test_a_default_handler_drops_and_refuses(connect: Connect, live: Live) -> None:
    @datadivr.websocket_handler("$default")
    def default(message: WebSocketMessage) -> WebSocketMessage | None:
        if message.event_name == "noise":
            return None
        return datadivr.create_error_message("Not you.", message.from_id, "forbidden")

    sender, other = connect(live), connect(live)
    sender_id = id_of(sender)
    say(sender, "noise", to="all")
    assert ask(sender, "news", to="all") == error(sender_id, "forbidden", "Not you.")
    assert hear_all(other) == []


@promise("`$default` takes all events without one.")
def test_a_default_handler_runs_for_no_event_that_has_a_handler_and_for_none_of_the_servers(
    connect: Connect, live: Live
) -> None:
    heard = []

    @datadivr.websocket_handler("$default")
    async def default(message: WebSocketMessage) -> None:
        heard.append(message.event_name)

    client = connect(live)
    ask(client, "sum_event", payload={"numbers": []})
    say(client, "m")
    id_of(client)
    client.close()
    wait_until(lambda: not datadivr.clients, "it to go")
    assert heard == ["m"]


def test_a_default_handlers_payloads_have_the_type_that_it_names(
    connect: Connect, live: Live
) -> None:
    @datadivr.websocket_handler("$default")
    async def default(message: WebSocketMessage[int]) -> WebSocketMessage:
        return message

    client = connect(live)
    assert ask(client, "m", payload=5, to="all")["payload"] == 5
    assert ask(client, "m", payload="x", to="all")["payload"]["code"] == "invalid_payload"


def test_whatever_events_clients_make_up_the_default_handler_has_one_series_and_one_warning(
    connect: Connect, live: Live, logged: list[Any]
) -> None:
    @datadivr.websocket_handler("$default")
    async def default(message: WebSocketMessage) -> None:
        raise RuntimeError

    client = connect(live)
    for number in range(5):
        answer = ask(client, f"made-up-{number}")
        assert answer["message"] == "The handler of '$default' failed."
    assert metrics(live)['handler_seconds_count{event_name="$default"}'] >= 5
    assert not [name for name in metrics(live) if "made-up" in name]
    levels = [entry["log_level"] for entry in logged if entry["event"] == "handler_error"]
    assert levels == ["error", "debug", "debug", "debug", "debug"]


def test_a_registration_for_one_side_leaves_none_of_one_for_both(registry: None) -> None:
    async def old(message: WebSocketMessage) -> None: ...

    async def new(message: WebSocketMessage) -> None: ...

    datadivr.websocket_handler("event", HandlerType.BOTH)(old)
    datadivr.websocket_handler("event")(new)
    found = [datadivr.get_handlers(kind).get("event") for kind in HandlerType]
    assert dict(zip(HandlerType, found, strict=True)) == {
        HandlerType.SERVER: new,
        HandlerType.CLIENT: None,
        HandlerType.BOTH: None,
    }


class Greeter:
    async def greet(self, greeting: str, message: WebSocketMessage) -> WebSocketMessage:
        return datadivr.create_message("greeting", greeting, message.from_id)


async def greet(greeting: str, message: WebSocketMessage) -> WebSocketMessage:
    return await Greeter().greet(greeting, message)


@pytest.mark.parametrize(
    "handler",
    [
        functools.partial(greet, "hello"),
        functools.partial(Greeter().greet, "hello"),
        functools.partial(functools.partial(greet), "hello"),
    ],
)
def test_a_partial_of_a_coroutine_function_waits_for_no_thread(
    registry: None, handler: Callable[..., Any]
) -> None:
    datadivr.websocket_handler("greet")(handler)
    blocked, over = threading.Event(), threading.Event()

    @datadivr.websocket_handler("block")
    def block(message: WebSocketMessage) -> None:
        blocked.set()
        over.wait(LIMIT)

    async def main() -> Any:
        anyio.to_thread.current_default_thread_limiter().total_tokens = 1
        blocker = asyncio.create_task(handled("block", None))
        try:
            await asyncio.to_thread(blocked.wait, LIMIT)
            answer = await asyncio.wait_for(
                handled("greet", None), LIMIT / 5
            )  # as no thread is free
        finally:
            over.set()
            await blocker
        return answer

    assert in_a_thread(main()).payload == "hello"


async def fail_in_a_task() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(LIMIT))
        tasks.create_task(handled("fail", None))
        await asyncio.sleep(LIMIT)


def test_a_task_that_fails_in_a_handler_is_its_handlers_error(connect: Connect, live: Live) -> None:
    @datadivr.websocket_handler("fail")
    async def fail(message: WebSocketMessage) -> None:
        raise RuntimeError

    @datadivr.websocket_handler("tasks")
    @datadivr.websocket_handler("$connect")
    async def tasks(message: WebSocketMessage) -> None:
        await fail_in_a_task()

    @datadivr.websocket_handler("cancelled")
    async def cancelled(message: WebSocketMessage) -> None:
        task = asyncio.create_task(asyncio.sleep(LIMIT))
        task.cancel()
        await task

    client = connect(live)
    assert hear(client)["message"] == "The handler of '$connect' failed."
    for name in ("tasks", "cancelled", "tasks"):
        told = ask(client, name)
        assert told["payload"]["code"] == "handler_error"
        assert told["message"] == f"The handler of '{name}' failed."
    assert id_of(client)


@pytest.mark.parametrize("kind", ["coroutine", "plain"])
def test_a_handler_that_exits_ends_neither_the_server_nor_its_connection(
    registry: None, kind: str
) -> None:
    def leave(message: WebSocketMessage) -> None:
        if message.payload == "argparse":
            argparse.ArgumentParser().parse_args(["--unknown"])
        sys.exit(message.payload)

    async def leave_in_loop(message: WebSocketMessage) -> None:
        leave(message)

    datadivr.websocket_handler("leave")(leave if kind == "plain" else leave_in_loop)
    datadivr.websocket_handler("$connect")(leave if kind == "plain" else leave_in_loop)
    with Live() as live, dial(live.ws) as client:
        assert hear(client)["message"] == "The handler of '$connect' failed."
        before = metrics(live)['errors_total{type="handler_error"}']
        for payload in (None, 3, "argparse"):
            told = ask(client, "leave", payload=payload)
            assert told["payload"]["code"] == "handler_error"
        assert id_of(client)
        assert metrics(live)['errors_total{type="handler_error"}'] == before + 3


def test_an_http_exception_of_a_handler_is_an_answer_without_a_traceback(
    connect: Connect, live: Live, records: Records
) -> None:
    @datadivr.websocket_handler("refuse")
    async def refuse(message: WebSocketMessage) -> None:
        raise fastapi.HTTPException(403, "Admins alone may do this.")

    client = connect(live)
    told = ask(client, "refuse")
    assert (told["event_name"], told["payload"]["code"]) == ("error", "refused")
    assert told["message"] == "Admins alone may do this."
    assert id_of(client)
    assert [record for record in records.all if record.exc_info] == []


FAILED = ["broken", "wrong", "unencodable", "cancelled"]
# What a member of the garden sends with the id 7, and the fields of the one answer that it gets.
ANSWERED: list[tuple[Json, Json]] = [
    ({"event_name": "double", "payload": 2}, {"event_name": "doubled", "payload": 4}),
    ({"event_name": "thread"}, {"event_name": "thread", "payload": False}),
    ({"event_name": "silent"}, {"event_name": "ok"}),
    ({"event_name": "tell_others"}, {"event_name": "ok"}),
    ({"event_name": "relay", "to": "all"}, {"event_name": "ok"}),
    ({"event_name": "relay", "to": "others"}, {"event_name": "ok"}),
    ({"event_name": "relay", "to": "#garden"}, {"event_name": "ok"}),
    ({"event_name": "m", "to": "all"}, {"event_name": "ok"}),
    ({"event_name": "m", "to": "others"}, {"event_name": "ok"}),
    ({"event_name": "m", "to": "#garden"}, {"event_name": "ok"}),
    ({"event_name": "m", "to": "#shed"}, {"event_name": "ok"}),  # where nobody else is
    ({"event_name": "join", "payload": ["cellar"]}, {"event_name": "ok"}),
    ({"event_name": "m", "to": "nobody"}, {"code": "unknown_recipient", "message": UNKNOWN}),
    ({"event_name": "relay", "to": "nobody"}, {"code": "unknown_recipient", "message": UNKNOWN}),
    ({"event_name": "m", "to": "#attic"}, {"code": "not_in_room"}),
    ({"event_name": "relay", "to": "#attic"}, {"code": "not_in_room"}),
    *(
        ({"event_name": n}, {"code": "handler_error", "message": f"The handler of '{n}' failed."})
        for n in FAILED
    ),
    (
        {"event_name": "refuse", "to": "#garden"},
        {"code": "refused", "status": 403, "message": "Not for you."},
    ),
    ({"event_name": "typed", "payload": "x"}, {"code": "invalid_payload"}),
    ({"event_name": "publish_copy", "payload": "#a b"}, {"code": "handler_error"}),
]
# Messages that `publish` sends, and that `reply` returns, which answer nobody's question.
for news in ({"to": "all"}, {"to": "#garden"}, {"to": "OTHER"}, {"to": "#nobody"}):
    payload = {"event_name": "news", "payload": None, **news}
    question = {"event_name": "publish", "payload": payload}
    ANSWERED += [
        (question, {"event_name": "ok"}),
        ({**question, "event_name": "reply"}, {"event_name": "ok"}),
    ]


def complete(asker_id: str, message: Json, answer: Json, answered: Json) -> Json:
    """Return the whole answer of a table; sentences that nobody promised are taken as they are."""
    if "code" not in answer:
        return message_from("server", to=asker_id, id=7, **answer)
    known = {name: answer[name] for name in ("status",) if name in answer}
    text = answer.get("message") or answered["message"]
    assert text
    name = message["event_name"]
    return error(asker_id, answer["code"], text, event_name=name, id=7, **known)


@promise(
    "A message with an `id` gets exactly one answer with this `id`",
    "It is no receipt from the clients that the message is for",
)
@promise(
    "A message with an `id` gets exactly one answer with it",
    "Its `payload` has a `code`, the `event_name` that it is about where that is known, "
    "and the `status`",
)
@pytest.mark.parametrize(("message", "answer"), ANSWERED, ids=json.dumps)
def test_each_message_with_an_id_gets_exactly_one_answer_with_it(
    connect: Connect, server: Process, message: Json, answer: Json
) -> None:
    asker, other = connect(server, "/in?room=garden&room=shed"), connect(server, "/in?room=garden")
    ids = {"ASKER": id_of(asker), "OTHER": id_of(other)}

    def fill(fields: Json) -> Json:
        text = json.dumps(fields)
        for name, client_id in ids.items():
            text = text.replace(name, client_id)
        return dict(json.loads(text))

    asker.send(json.dumps(fill(message) | {"id": 7}))
    (answered,) = with_ids(hear_all(asker))
    assert answered == complete(ids["ASKER"], message, fill(answer), answered)
    assert with_ids(hear_all(other)) == []  # who did not ask is not answered


def test_an_answer_that_has_an_id_of_its_own_keeps_it_and_the_server_says_ok(
    connect: Connect, server: Process
) -> None:
    asker, other = connect(server), connect(server)
    asker_id, other_id = id_of(asker), id_of(other)
    for to, client in ((asker_id, asker), (other_id, other)):
        news: Json = {"event_name": "news", "payload": 1, "to": to, "id": "own"}
        say(asker, "reply", payload=news, id=7)
        assert hear(client) == message_from("server", **news)
        assert hear_all(asker) == [ok(asker_id, 7)]
    assert hear_all(other) == []


def test_an_answer_is_the_askers_in_whatever_case_its_id_is_written(
    connect: Connect, server: Process
) -> None:
    asker = connect(server)
    asker_id = id_of(asker)
    news = {"event_name": "news", "payload": 1, "to": asker_id.upper()}
    say(asker, "reply", payload=news, id=7)
    (answer,) = hear_all(asker)
    assert answer | {"to": asker_id} == message_from("server", "news", asker_id, payload=1, id=7)
    say(asker, "m", to=asker_id.upper(), id=8)
    (relayed,) = hear_all(asker)
    assert (relayed["event_name"], relayed["id"]) == ("m", 8)


@promise(
    "If the server passes the message on to one other client, that client owes the answer",
    "A message to one client keeps its `id`, so that this client can answer",
)
@promise("A message that is passed on to one other client keeps its `id`")
def test_clients_ask_one_another_and_the_server_says_nothing(
    connect: Connect, server: Process
) -> None:
    asker, other = connect(server), connect(server)
    asker_id, other_id = id_of(asker), id_of(other)
    for event_name in ("question", "relay"):  # without a handler, and with one that returns it
        say(asker, event_name, to=other_id, id=7)
        assert hear(other) == message_from(asker_id, event_name, other_id, id=7)
        say(other, "answer", payload=1, to=asker_id, id=7)
        assert hear_all(other) == []
        answer = message_from(other_id, "answer", asker_id, payload=1, id=7)
        assert hear_all(asker) == [answer]


@promise("A message to many loses it, and the server answers `ok`")
@promise("A message to many is passed on without it.")
@pytest.mark.parametrize("to", ["all", "others", "#garden"])
@pytest.mark.parametrize("event_name", ["m", "relay"])
def test_a_message_relayed_to_many_loses_its_id(
    connect: Connect, server: Process, to: str, event_name: str
) -> None:
    asker, other = connect(server, "/in?room=garden"), connect(server, "/in?room=garden")
    asker_id = id_of(asker)
    say(asker, event_name, to=to, id=7)
    relayed = message_from(asker_id, event_name, to)
    assert hear(other) == relayed
    assert hear_all(asker) == [relayed] * (to == "all") + [ok(asker_id, 7)]


def test_a_message_that_a_handler_forwards_is_answered_once(
    connect: Connect, server: Process
) -> None:
    asker, other = connect(server), connect(server)
    asker_id, other_id = id_of(asker), id_of(other)
    say(asker, "forward", payload=other_id, id=7)
    forwarded = hear(other)
    assert forwarded["from_id"] == asker_id
    # Either the other is asked in the asker's place, or the server has answered.
    assert hear_all(asker) == ([] if "id" in forwarded else [ok(asker_id, 7)])
    for to in ("all", "#garden"):
        say(asker, "forward", payload=to, id=8)
        assert "id" not in {message["event_name"]: message for message in hear_all(other)}
        assert with_ids(hear_all(asker)) == [ok(asker_id, 8)]


@promise("`server.ask` waits until the server has done what it was asked")
@promise("`ok` has no payload, and says that the handler is done or the message is sent")
def test_ok_comes_after_what_its_handler_has_sent(connect: Connect, server: Process) -> None:
    asker = connect(server, "/in?room=garden")
    asker_id = id_of(asker)
    for number in range(3):
        news = {"event_name": "news", "payload": number, "to": "#garden"}
        say(asker, "publish", payload=news, id=number)
    heard = [(message["event_name"], message.get("id")) for message in hear_all(asker)]
    assert heard == [
        ("news", None),
        ("ok", 0),
        ("news", None),
        ("ok", 1),
        ("news", None),
        ("ok", 2),
    ]
    say(asker, "slow", payload=0.1, id="slow")
    assert hear(asker) == message_from("server", "slept", asker_id, payload=0.1, id="slow")


def test_an_id_used_twice_is_answered_twice(connect: Connect, server: Process) -> None:
    asker = connect(server)
    for _ in range(2):
        say(asker, "silent", id=7)
    assert hear_all(asker) == [ok(id_of(asker), 7)] * 2


@pytest.mark.parametrize(
    ("to", "returned", "answer"),
    [
        ("all", "message", "ok"),
        ("others", "message", "ok"),
        ("#garden", "message", "ok"),
        ("#attic", "message", "not_in_room"),
        ("OTHER", "message", None),
        ("nobody", "message", "unknown_recipient"),
        ("all", "None", "ok"),
        ("OTHER", "None", "ok"),
        ("all", "error", "forbidden"),
        ("#attic", "error", "forbidden"),
        ("all", "raised", "refused"),
        ("#attic", "raised", "refused"),
    ],
)
def test_a_message_that_the_default_handler_gets_is_answered_once(
    connect: Connect, live: Live, to: str, returned: str, answer: str | None
) -> None:
    @datadivr.websocket_handler("$default")
    async def default(message: WebSocketMessage) -> WebSocketMessage | None:
        if returned == "raised":
            raise fastapi.HTTPException(403, "Not for you.")
        refusal = datadivr.create_error_message("No.", message.from_id, "forbidden")
        return {"message": message, "error": refusal}.get(returned)

    asker, other = connect(live), connect(live)
    other_id = id_of(other)
    for client in (asker, other):
        live.api.put(f"/clients/{id_of(client)}/rooms/garden")
    say(asker, "m", to=to.replace("OTHER", other_id), id=7)
    found = with_ids(hear_all(asker))
    told = [(message["payload"] or {}).get("code", message["event_name"]) for message in found]
    assert (told, [message["id"] for message in found]) == (([answer], [7]) if answer else ([], []))
    heard = hear_all(other)
    assert len(heard) == (returned == "message" and to in ("all", "others", "#garden", "OTHER"))
    assert len(with_ids(heard)) == (answer is None)


def test_a_handler_reads_the_id_of_its_message(connect: Connect, live: Live) -> None:
    @datadivr.websocket_handler("read")
    async def read(message: WebSocketMessage[int]) -> WebSocketMessage:
        return datadivr.create_message("read", [message.payload, message.id], message.from_id)

    assert ask(connect(live), "read", payload=1, id="a")["payload"] == [1, "a"]
    assert ask(connect(live), "read", payload=1)["payload"] == [1, None]


@promise("the handler raised an `HTTPException`, whose detail is the sentence")
@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (fastapi.HTTPException(403, "Only Ada may."), 403, "Only Ada may."),
        (fastapi.HTTPException(409), 409, "Conflict"),
        (StarletteHTTPException(404, "There is no such table."), 404, "There is no such table."),
        (fastapi.HTTPException(404, "No caf\udce9.txt"), 404, "No caf?.txt"),  # of `os.listdir`
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_an_exception_of_http_tells_its_client_what_was_refused_and_leaves_no_traceback(
    connect: Connect,
    live: Live,
    logged: list[Any],
    raised: StarletteHTTPException,
    status: int,
    text: str,
    plain: bool,
) -> None:
    async def refuse(message: WebSocketMessage) -> None:
        raise raised

    def refuse_in_a_thread(message: WebSocketMessage) -> None:
        raise raised

    datadivr.websocket_handler("refuse")(refuse_in_a_thread if plain else refuse)
    before = metrics(live)['errors_total{type="refused"}']
    client = connect(live)
    client_id = id_of(client)
    expected = error(client_id, "refused", text, event_name="refuse", status=status)
    assert ask(client, "refuse") == expected
    assert ask(client, "refuse", id=7) == expected | {"id": 7}
    assert metrics(live)['errors_total{type="refused"}'] - before == 2
    assert not any(entry.get("exc_info") for entry in logged)
    assert "Traceback" not in repr(logged)


def test_a_handler_lets_through_what_join_room_raises(connect: Connect, live: Live) -> None:
    @datadivr.websocket_handler("invite")
    async def invite(message: WebSocketMessage[str]) -> None:
        await datadivr.join_room(message.payload, "garden")

    client = connect(live)
    answer = ask(client, "invite", payload="nobody", id=7)
    text = "No client with this id is connected."
    assert answer == error(id_of(client), "refused", text, event_name="invite", status=404, id=7)


def test_an_exception_of_http_is_nothing_where_its_client_has_gone(
    connect: Connect, live: Live, logged: list[Any]
) -> None:
    began, left, done = threading.Event(), threading.Event(), threading.Event()

    @datadivr.websocket_handler("long")
    async def long(message: WebSocketMessage) -> None:
        began.set()
        await asyncio.to_thread(left.wait, LIMIT)
        await datadivr.join_room(message.from_id, "garden")

    @datadivr.websocket_handler("$disconnect")
    async def went(message: WebSocketMessage) -> None:
        done.set()
        raise fastapi.HTTPException(403, "Gone.")

    before = metrics(live)
    client = connect(live)
    client_id = id_of(client)
    say(client, "long", id=7)
    assert began.wait(LIMIT)
    live.api.delete(f"/clients/{client_id}")
    left.set()
    assert done.wait(LIMIT)
    other = connect(live)
    assert hear_all(other) == []  # the server has gone on
    wait_until(lambda: client_id not in datadivr.clients.left, "its last handler")
    after = metrics(live)
    errors = {name for name in after if name.startswith("errors_total")}
    assert [name for name in errors if after[name] != before[name]] == []
    usual = {"client_connected", "client_disconnected", "fanout_through_asgi"}
    assert {entry["event"] for entry in logged} <= usual


def test_an_exception_of_http_in_a_connect_handler_is_told_too(
    connect: Connect, live: Live
) -> None:
    @datadivr.websocket_handler("$connect")
    async def came(message: WebSocketMessage) -> None:
        raise fastapi.HTTPException(403, "Too early.")

    client = connect(live)
    answer = hear(client)
    known = {"event_name": "$connect", "status": 403}
    assert answer == error(id_of(client), "refused", "Too early.", **known)


@promise(
    "A handler of an event gets each message of that event first, also one that is "
    "addressed to a room"
)
@pytest.mark.parametrize("to", ["#garden", "#attic", "all", "nobody"])
def test_a_handler_sees_a_message_first_wherever_it_is_addressed(
    connect: Connect, server: Process, to: str
) -> None:
    asker, member = connect(server), connect(server, "/in?room=garden")
    answer = ask(asker, "double", payload=2, to=to, id=7)
    assert answer == message_from("server", "doubled", id_of(asker), payload=4, id=7)
    assert hear_all(member) == []


def test_a_message_has_its_answer_whatever_its_handler_makes_of_its_id(
    connect: Connect, live: Live
) -> None:
    asker, other = connect(live), connect(live)
    asker_id, other_id = id_of(asker), id_of(other)

    @datadivr.websocket_handler("forget")
    async def forget(message: WebSocketMessage) -> None:
        message.id = None

    @datadivr.websocket_handler("forget of a type")
    async def forget_of_a_type(message: WebSocketMessage[int]) -> None:
        message.id = None

    @datadivr.websocket_handler("rename of a type")
    async def rename_of_a_type(message: WebSocketMessage[int]) -> WebSocketMessage:
        message.id = "another"
        return message

    @datadivr.websocket_handler("fail")
    async def fail(message: WebSocketMessage) -> None:
        message.id = None
        raise RuntimeError

    @datadivr.websocket_handler("copy")
    async def copy(message: WebSocketMessage) -> WebSocketMessage:
        return message.model_copy(update={"to": message.payload})

    @datadivr.websocket_handler("broken")
    async def broken(message: WebSocketMessage) -> WebSocketMessage:
        message.payload = object()
        return message

    assert ask(asker, "forget", id=1) == ok(asker_id, 1)
    for name in ("forget of a type", "rename of a type"):
        assert ask(asker, name, payload=1, id=1, to="others") == ok(asker_id, 1)
    assert "id" not in hear(other)
    assert [ask(asker, name, id=2)["id"] for name in ("fail", "broken")] == [2, 2]
    for to in (other_id, "others"):
        assert ask(asker, "copy", payload=to, id=3) == ok(asker_id, 3)
        assert "id" not in hear(other)
    told = [ask(asker, "copy", payload="nobody", id=4), hear(asker)]
    assert with_ids(told) == [ok(asker_id, 4)]


def test_a_close_that_websockets_refuses_is_a_failed_handler_and_leaves_nothing_behind(
    connect: Connect, live: Live
) -> None:
    @datadivr.websocket_handler("bye")
    async def bye(message: WebSocketMessage) -> None:
        await datadivr.clients[message.from_id].websocket.close(1008, "x" * 200)

    before = metrics(live)
    client = connect(live)
    say(client, "bye")
    with pytest.raises(ConnectionClosed):
        hear(client)
    wait_until(lambda: not datadivr.clients, "it to go")
    after = metrics(live)
    assert after["clients"] == before["clients"]


@promise("So the client whose handler called them gets `refused`")
def test_a_wrong_room_that_a_client_chose_is_refused_with_what_is_right(
    connect: Connect, live: Live
) -> None:
    @datadivr.websocket_handler("go")
    async def go(message: WebSocketMessage[str]) -> None:
        await datadivr.join_room(message.from_id, message.payload)

    client = connect(live)
    answer = ask(client, "go", payload="a b", id=1)
    assert answer["payload"] == {"code": "refused", "event_name": "go", "status": 422}
    assert answer["message"].startswith("expected a room's name of 1 to 100 characters")
    assert answer["id"] == 1


def test_a_sum_of_something_else_is_logged(records: Records, connect: Connect, live: Live) -> None:
    ask(connect(live), "sum_event", payload="x")
    (logged,) = records.named("invalid_payload")
    assert logged["event_name"] == "sum_event"


@promise(
    "the type `CLIENT` are for your own client: the server does not run them",
    "Those of the type `BOTH` run in both",
)
def test_the_server_runs_handlers_of_both_and_none_of_the_client(
    live: Live, connect: Connect
) -> None:
    for kind in (HandlerType.CLIENT, HandlerType.BOTH):

        @datadivr.websocket_handler(kind.value, kind)
        async def answer(message: WebSocketMessage) -> WebSocketMessage:
            return datadivr.create_message("answer", None, message.from_id)

    client = connect(live)
    assert ask(client, "both", to="all")["event_name"] == "answer"
    assert ask(client, "client", to="all")["event_name"] == "client"


def test_forty_plain_handlers_run_at_once_and_the_next_one_waits(
    live: Live, connect: Connect
) -> None:
    running = threading.Semaphore(0)
    go_on = threading.Event()

    @datadivr.websocket_handler("block")
    def block(message: WebSocketMessage) -> None:
        running.release()
        go_on.wait(LIMIT)

    clients = [connect(live) for _ in range(41)]
    try:
        for client in clients:
            say(client, "block")
        for _ in range(40):
            assert running.acquire(timeout=LIMIT)
        assert not running.acquire(timeout=0.3)
    finally:
        go_on.set()
    assert running.acquire(timeout=LIMIT)


# ---- Metrics: `pytest -m metrics` ----------------------------------------------------------------


@promise(
    "clients that came, and that went: `client`, `admin`, `slow_client`, `keepalive`, "
    "`message_too_big`, `server_stop`"
)
def test_every_series_is_there_from_the_start() -> None:
    text = run("""
        import datadivr, prometheus_client
        print(prometheus_client.generate_latest().decode())
    """)
    series = dict(
        re.findall(r"^datadivr_(?!\S*(?:_created|_bucket|_sum))(\S+) (\S+)$", text, re.MULTILINE)
    )
    reasons = ["client", "admin", "slow_client", "keepalive", "message_too_big", "server_stop"]
    types = ["invalid_message", "invalid_payload", "unknown_recipient", "not_in_room", "refused"]
    types += ["handler_error", "rate_limited", "message_too_big", "slow_client", "origin_refused"]
    types += ["unauthorized", "forbidden", "too_many_clients", "admin_unauthorized", "redis"]
    assert series == dict.fromkeys(
        [
            "clients",
            "rooms",
            "connections_total",
            *(f'disconnections_total{{reason="{reason}"}}' for reason in reasons),
            "messages_received_total",
            "messages_sent_total",
            "bytes_sent_total",
            *(f'errors_total{{type="{kind}"}}' for kind in types),
            *(f'handler_seconds_count{{event_name="{name}"}}' for name in ("whoami", "sum_event")),
            "unsent_bytes_max",
        ],
        "0.0",
    ) | {f'build_info{{version="{datadivr.__version__}"}}': "1.0"}


@promise(
    "clients connected, and rooms with clients in them",
    "messages from clients; deliveries: one message to 200 clients counts 200",
    "histogram, by registered events",
)
def test_the_metrics_agree_with_what_was_done(connect: Connect, live: Live) -> None:
    before = metrics(live)
    sender, receiver = connect(live), connect(live)
    framing = next(iter(datadivr.clients.values())).connection.framing
    message = WebSocketMessage(event_name="m", from_id=id_of(sender), to="all")
    size = len(framing(datadivr._encode(message)))
    id_of(receiver)
    middle = metrics(live)
    for _ in range(5):
        say(sender, "m", to="all")
    for _ in range(5):
        hear(sender), hear(receiver)
    ask(sender, "x", to="nobody")
    after = metrics(live)

    def change(name: str, since: dict[str, float]) -> float:
        return after[name] - since.get(name, 0)

    assert (after["clients"], change("connections_total", before)) == (2, 2)
    assert change("messages_received_total", middle) == 6
    assert change("messages_sent_total", middle) == 11
    text = "No client with the id in `to` is connected."
    expected = error("x" * 36, "unknown_recipient", text, event_name="x")
    told = json.dumps(expected, separators=(",", ":"))
    assert change("bytes_sent_total", middle) == 10 * size + len(framing(told.encode()))
    assert change('errors_total{type="unknown_recipient"}', middle) == 1
    assert change('handler_seconds_count{event_name="whoami"}', before) == 2


def test_a_client_cannot_add_a_series(connect: Connect, live: Live) -> None:
    client = connect(live)
    ask(client, "new_series", to="all")
    assert not [name for name in metrics(live) if "new_series" in name]


@promise("bytes unsent to the slowest client, dropped above `DATADIVR_MAX_BUFFER_BYTES`")
def test_the_slowest_client_is_seen_before_it_is_dropped(live: Live) -> None:
    with raw_client(live, 4096) as slow:
        client_id = id_of(slow)
        stall(live, client_id)
        unsent = datadivr.clients[client_id].buffered_bytes
        assert unsent > 0
        wait_until(lambda: metrics(live)["unsent_bytes_max"] == unsent, "the gauge")
    wait_until(lambda: metrics(live)["unsent_bytes_max"] == 0, "the gauge")


def test_a_second_copy_and_a_reload_share_the_series() -> None:
    script = """
        import importlib, importlib.util, sys
        import datadivr
        spec = importlib.util.spec_from_file_location("copy", datadivr.__file__)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        assert copy._connected is datadivr._connected
        assert copy.clients is not datadivr.clients
        seconds = datadivr._handler_seconds
        assert importlib.reload(datadivr)._handler_seconds is seconds
    """
    run(script)


class Scraped(Process):
    """A server, and a Prometheus that scrapes it as the README says."""

    def __init__(self, folder: Path, protected: bool) -> None:
        program = find("prometheus")
        (folder / "application.py").write_text(textwrap.dedent(APPLICATION))
        tokens: Any = {"DATADIVR_METRICS_TOKEN": "of-prometheus"} if protected else {}
        super().__init__(*SERVERS["uvicorn"], cwd=folder, **tokens)
        scrape = block("yaml", "scrape_configs").replace("rule_files: [alerts.yml]\n", "")
        if protected:
            scrape = scrape.replace("# auth", "auth").replace("choose-one", "of-prometheus")
        often = "global: {scrape_interval: 100ms}\n"
        (folder / "prometheus.yml").write_text(often + scrape.replace("8000", str(self.port)))
        options = (
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            "--web.listen-address=127.0.0.1:{port}",
        )
        self.prometheus = Process(*options, program=program, cwd=folder)

    def query(self, promql: str, **options: float) -> list[float]:
        """Return the values that Prometheus finds."""
        url = f"{self.prometheus.url}/api/v1/query"
        answer = http.get(url, params={"query": promql, **options}).json()
        assert answer["status"] == "success", answer
        return [float(series["value"][1]) for series in answer["data"]["result"]]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.prometheus.stop(number)
        return super().stop(number)


def dashboard() -> dict[str, str]:
    """Return the queries of the README's dashboard, by their panels' titles."""
    panels = json.loads(block("json", '"panels"'))["panels"]
    return {panel["title"]: panel["targets"][0]["expr"] for panel in panels}


@pytest.fixture(scope="session")
def scraping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Scraped]]:
    """Two servers, the second's metrics protected: Prometheus takes 5 s to look for its targets."""
    with (
        Scraped(tmp_path_factory.mktemp("open"), False) as unprotected,
        Scraped(tmp_path_factory.mktemp("protected"), True) as protected,
    ):
        pair = [unprotected, protected]
        for server in pair:
            server.prometheus.wait_until_up("/-/ready")
        wait_until(
            lambda: [server.query("up") for server in pair] == [[1], [1]], "both targets to be up"
        )
        yield pair


@pytest.fixture
def both(scraping: list[Scraped]) -> Iterator[list[Scraped]]:
    """Scrape for the tests of it alone, for it takes half a processor."""
    for scraped in scraping:
        scraped.prometheus.popen.send_signal(signal.SIGCONT)
    yield scraping
    for scraped in scraping:
        scraped.prometheus.popen.send_signal(signal.SIGSTOP)


@pytest.fixture
def scraped(both: list[Scraped]) -> Scraped:
    return both[1]


@promise('static_configs: [{ targets: ["localhost:8000"] }]')
@pytest.mark.parametrize("protected", [False, True])
def test_prometheus_sees_who_is_connected(both: list[Scraped], protected: bool) -> None:
    scraped = both[protected]
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(raw_client(scraped))
        wait_until(lambda: scraped.query("datadivr_clients") == [3], "the clients")
    wait_until(lambda: scraped.query("datadivr_clients") == [0], "their end")


def test_the_rate_that_prometheus_sees_is_what_was_sent(scraped: Scraped, connect: Connect) -> None:
    promql = dashboard()["Deliveries a second"]
    sender, *_ = clients = [connect(scraped) for _ in range(3)]
    tried = []
    for _ in range(5):  # on a busy machine, Prometheus misses scrapes, and so a part of the rate
        sent: list[float] = []
        end = time.time() + 3.2
        while time.time() < end:
            ask(sender, "tick", to="all")
            sent.append(time.time())
            time.sleep(0.01)  # Prometheus needs the processor too
        later = functools.partial(scraped.query, f"timestamp(datadivr_clients) > {end}")
        wait_until(later, "the last scrape")
        seen = scraped.query(promql.replace("1m", "3s"), time=end)
        right = len(clients) * sum(end - 3 < at <= end for at in sent) / 3
        if seen == [pytest.approx(right, rel=0.1)]:
            return
        tried.append((seen, right))
    pytest.fail(f"of the rates that Prometheus saw, none was the right one: {tried}")


@promise("Handlers: 99 % within")
def test_each_panel_of_the_readmes_dashboard_shows_something(
    scraped: Scraped, connect: Connect
) -> None:
    client = connect(scraped)

    def shows(promql: str) -> bool:
        ask(client, "double", payload=1)
        ask(client, "x", to="nobody")
        return any(value > 0 for value in scraped.query(promql))

    panels = dashboard()
    assert len(panels) == 4
    for title, promql in panels.items():
        wait_until(functools.partial(shows, promql), title)


@promise('expr: increase(datadivr_errors_total{type="slow_client"}[5m]) > 0')
def test_an_alert_fires_where_a_client_that_does_not_read_is_dropped(scraped: Scraped) -> None:
    (alert,) = re.findall(r"expr: (.*slow_client.*> 0)", README)
    assert scraped.query(alert) == []
    with (
        raw_client(scraped, buffer=4096) as stalled,
        httpx.Client(base_url=scraped.url, headers=ADMIN, verify=False) as api,
    ):
        fill = {"event_name": "fill", "payload": "x" * 900_000, "to": id_of(stalled)}
        wait_until(lambda: api.post("/messages", json=fill).status_code == 404, "it to be dropped")
        wait_until(lambda: scraped.query(alert), "the alert")


@promise('expr: rate(datadivr_errors_total{type="handler_error"}[5m]) > 0.1')
def test_an_alert_fires_where_handlers_fail(scraped: Scraped, connect: Connect) -> None:
    (alert,) = re.findall(r"expr: (rate.*handler_error.*> 0.1)", README)
    client = connect(scraped)

    def fires() -> bool:
        for _ in range(20):
            ask(client, "broken")
        return bool(scraped.query(alert))

    wait_until(fires, "the alert", 3 * LIMIT)


def test_promtool_finds_no_fault_with_the_metrics(api: httpx.Client) -> None:
    command = [find("promtool"), "check", "metrics"]
    assert output_of(*command, stdin=api.get("/metrics").text) == ""


@pytest.mark.parametrize(
    "accept", ["text/plain; version=abc", "application/openmetrics-text;version=", "*"]
)
def test_the_metrics_do_not_stumble_over_an_accept_header(api: httpx.Client, accept: str) -> None:
    answer = api.get("/metrics", headers={"Accept": accept})
    assert (answer.status_code, "datadivr_clients" in answer.text) == (200, True)


@promise("A room needs no set-up, and is gone with its last client")
def test_a_gauge_counts_the_rooms_that_have_members_here(connect: Connect, live: Live) -> None:
    def rooms() -> float:
        return metrics(live)["rooms"]

    one, other = connect(live), connect(live)
    ids = [id_of(one), id_of(other)]
    assert rooms() == 0
    for client_id, room, count in [(0, "a", 1), (1, "a", 1), (1, "b", 2), (1, "b", 2)]:
        live.api.put(f"/clients/{ids[client_id]}/rooms/{room}")
        assert rooms() == count
    live.api.delete(f"/clients/{ids[1]}/rooms/b")
    assert rooms() == 1
    one.close()
    wait_until(lambda: total(live) == 1, "it to go")
    assert rooms() == 1
    other.close()
    wait_until(lambda: rooms() == 0, "the last member to go")
    text = http.get(f"{live.url}/metrics").text
    assert "# TYPE datadivr_rooms gauge\n" in text
    assert re.findall(r"^datadivr_rooms.*$", text, re.MULTILINE) == ["datadivr_rooms 0.0"]


@promise("If it does not, the import of `datadivr.py` fails, and so does the start.")
def test_a_folder_of_metrics_that_is_not_there_stops_the_import(tmp_path: Path) -> None:
    folder = str(tmp_path / "none")
    errors = run("import datadivr", status=1, PROMETHEUS_MULTIPROC_DIR=folder)
    assert "FileNotFoundError" in errors


@promise(
    "Counters go on from where they were. Empty the folder before a start, if they shall begin at"
    " 0."
)
def test_counters_go_on_after_a_start_unless_their_folder_is_emptied(tmp_path: Path) -> None:
    counted = []
    for begin in ("new", "kept", "emptied"):
        if begin == "emptied":
            for file in tmp_path.iterdir():
                file.unlink()
        command = ["-m", "uvicorn", "datadivr:app", "--port", "{port}"]
        with Process(*command, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)) as process:
            process.wait_until_up()
            with dial(process.ws) as client:
                id_of(client)
            counted.append(metrics(process)["connections_total"])
            process.stop()
    assert counted == [1, 2, 1]


# ---- Frames: `pytest -m frames` ------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 125, 126, 65535, 65536])
def test_a_frame_is_as_rfc_6455_says_and_can_be_cut_back(length: int) -> None:
    framed = datadivr._frame(b"x" * length)
    head = {0: b"\x81\x00", 125: b"\x81\x7d", 126: b"\x81\x7e\x00\x7e", 65535: b"\x81\x7e\xff\xff"}
    assert framed == head.get(length, b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00") + b"x" * length
    assert list(unframe(framed * 3)) == [(0x81, b"x" * length)] * 3


Payloads = st.one_of(
    st.binary(max_size=3000),
    st.binary(min_size=1, max_size=20).map(lambda part: part * 200),
    st.sampled_from(
        [b"", b"x" * 1023, b"x" * 1024, b"x" * 70_000, random.Random(0).randbytes(70_000)]
    ),
)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    payloads=st.lists(st.tuples(Payloads, st.booleans()), max_size=10), window=st.integers(12, 15)
)
def test_a_compressed_frame_needs_nothing_of_what_came_before_it(
    payloads: list[tuple[bytes, bool]], window: int
) -> None:
    inflater = zlib.decompressobj(wbits=-window)
    for payload, compressed in payloads:
        framed = (datadivr._frame_compressed if compressed else datadivr._frame)(payload)
        ((first, sent),) = unframe(framed)
        assert inflated(first, sent, inflater) == payload
        shrinks = first == datadivr._COMPRESSED_TEXT
        assert len(sent) < len(payload) if shrinks else sent == payload


@promise("permessage-deflate with a window of 12 bits or more; 0 is none")
@pytest.mark.parametrize(
    ("length", "first"), [(1023, datadivr._TEXT), (1024, datadivr._COMPRESSED_TEXT)]
)
def test_a_message_is_compressed_from_the_shortest_length_on(length: int, first: int) -> None:
    assert datadivr._frame_compressed(b"x" * length)[0] == first


def test_a_frame_is_compressed_at_the_fastest_level() -> None:
    data = random.Random(0).randbytes(3000).hex().encode()
    compressor = zlib.compressobj(1, wbits=-12)
    expected = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
    ((_, payload),) = unframe(datadivr._frame_compressed(data))
    assert payload == expected[:-4]


# ---- Connections: `pytest -m connections` --------------------------------------------------------


@pytest.mark.parametrize("code", [1000, 1009, 1012])
def test_a_client_does_not_choose_the_reason_that_is_counted(
    live: Live, connect: Connect, ended: Callable[[], dict[str, float]], code: int
) -> None:
    connect(live).close(code)
    wait_until(lambda: ended() == {"client": 1}, "its end")


@needs_sansio
def test_a_message_over_uvicorns_own_limit_is_counted(
    ended: Callable[[], dict[str, float]],
) -> None:
    errors = datadivr._errors_total.labels("message_too_big")
    before = errors._value.get()
    with Live(ws_max_size=1000) as live, raw_client(live) as client:
        client.sendall(masked("x" * 1001))
        wait_until(lambda: ended() == {"message_too_big": 1}, "its end")
    assert errors._value.get() - before == 1


@needs_sansio
def test_clients_that_the_stop_closed_are_counted(ended: Callable[[], dict[str, float]]) -> None:
    with contextlib.ExitStack() as afterwards, Live() as live:
        afterwards.enter_context(raw_client(live))
        wait_until(lambda: datadivr.clients, "the client")
    assert ended() == {"server_stop": 1}


@needs_sansio
def test_a_stop_after_a_stalled_clients_own_close_is_clean(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.ExitStack() as afterwards, Live() as live:
        stalled = afterwards.enter_context(raw_client(live, buffer=4096))
        stall(live, id_of(stalled))
        stalled.sendall(b"\x88\x80\0\0\0\0")
        wait_until(lambda: not datadivr.clients, "its end")
    assert "InvalidState" not in caplog.text


def test_another_server_gets_the_adapter_and_one_warning(server: Process, connect: Connect) -> None:
    for _ in range(2):
        id_of(connect(server))
    log = " ".join(server.popen.args)  # type: ignore[arg-type]
    adapted = not (IS_SANSIO and "uvicorn" in log and "wsproto" not in log)
    lines = re.findall(r"^(\S+) .*fanout_through_asgi", server.log, re.MULTILINE)
    assert bool(lines) == adapted
    for before, after in itertools.pairwise(map(datetime.fromisoformat, lines)):
        assert (after - before).total_seconds() > 59  # the tests of this server may take so long


# `pour` sends every kind of message, each with the SHA-256 of its payload, and ends with how many
# deliveries that were.
POUR = """
    import asyncio
    import hashlib
    import random

    from datadivr import WebSocketMessage, app, broadcast, handle_connection, websocket_handler
    from fastapi import WebSocket

    sockets = []

    @app.websocket("/own")
    async def own(websocket: WebSocket):
        sockets.append(websocket)
        await handle_connection(websocket)

    @websocket_handler("pour")
    async def pour(message):
        rng = random.Random(0)
        addressed = 0
        for number in range(2000):
            size = int(2 ** rng.uniform(0, 12)) - 1
            if number % 100 == 0:
                size = rng.choice([0, 1000, 65535, 65536, 1_000_000])
            text = rng.randbytes(size).decode("latin-1") if rng.random() < 0.1 else "".join(
                rng.choices(["datadivr ", "\u00e9t\u00e9 ", "{}", "12", "\U0001f600"], k=size // 4)
            )
            digest = hashlib.sha256(text.encode()).hexdigest()
            socket = rng.choice(sockets)
            to = rng.choice(["all", "others", socket.scope["datadivr.client_id"], "send_json"])
            poured = WebSocketMessage(event_name="poured", payload=text, to=to, message=digest)
            if to == "send_json":
                await socket.send_json(poured.model_dump())
                addressed += 1
            else:
                addressed += await broadcast(poured, socket)
            if rng.random() < 0.1:
                await asyncio.sleep(0)
        return WebSocketMessage(event_name="end", payload=addressed, to="all")
"""
POURED_IN_NODE = """
    const WebSocket = require("ws");
    const { createHash } = require("crypto");
    const socket = new WebSocket(process.argv[1]);
    let right = 0;
    socket.on("message", (data) => {
      const message = JSON.parse(data);
      if (message.event_name === "end") {
        console.log(JSON.stringify([socket.extensions, right]));
        socket.close();
      } else {
        const digest = createHash("sha256").update(message.payload).digest("hex");
        if (digest === message.message) right++;
      }
    });
"""
POURED_IN_A_PAGE = """
    (url) => {
      const socket = new WebSocket(url);
      const digests = [];
      const sha256 = async ({ payload, message }) => {
        const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(payload));
        const hex = (byte) => byte.toString(16).padStart(2, "0");
        return message === Array.from(new Uint8Array(digest), hex).join("");
      };
      window.poured = new Promise((resolve) => {
        socket.onmessage = async (event) => {
          const message = JSON.parse(event.data);
          if (message.event_name !== "end") return digests.push(sha256(message));
          resolve([socket.extensions, (await Promise.all(digests)).filter(Boolean).length]);
        };
      });
    }
"""


def poured(client: ClientConnection) -> int:
    """Read until the end, and return how many messages were right."""
    right = 0
    while (message := hear(client))["event_name"] != "end":
        right += hashlib.sha256(message["payload"].encode()).hexdigest() == message["message"]
    return right


@contextlib.contextmanager
def node_client(url: str, _: object) -> Iterator[Callable[[], tuple[str, int]]]:
    node_path = shutil.which("node")
    check = [node_path or "", "-e", "require('ws')"]
    need(
        node_path and subprocess.run(check, stderr=subprocess.DEVNULL).returncode == 0, "Node's ws"
    )
    with subprocess.Popen(
        ["node", "-e", POURED_IN_NODE, url], stdout=subprocess.PIPE, text=True
    ) as node:
        yield lambda: tuple(json.loads(node.communicate(timeout=LIMIT)[0]))


@contextlib.contextmanager
def chromium_client(
    url: str, request: pytest.FixtureRequest
) -> Iterator[Callable[[], tuple[str, int]]]:
    browser: Browser = request.getfixturevalue("browser")
    with browser.new_page() as page:
        page.goto(url.replace("ws://", "http://").replace("/own", "/healthz"))
        page.evaluate(POURED_IN_A_PAGE, url)
        yield lambda: tuple(page.evaluate("window.poured"))


@pytest.mark.parametrize("foreign", [node_client, chromium_client])
def test_clients_with_and_without_compression_all_get_what_was_sent(
    tmp_path: Path, request: pytest.FixtureRequest, foreign: Callable[..., Any]
) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(POUR))
    settings: Json = {"DATADIVR_MAX_BUFFER_BYTES": str(1 << 28)}
    with (
        Process(*SERVERS["uvicorn"], cwd=tmp_path, **settings) as process,
        contextlib.ExitStack() as stack,
    ):
        process.wait_until_up()
        url = f"ws://127.0.0.1:{process.port}/own"
        foreign_poured = stack.enter_context(foreign(url, request))
        offers = [
            ClientPerMessageDeflateFactory(server_max_window_bits=bits) for bits in range(9, 16)
        ]
        offers.append(ClientPerMessageDeflateFactory(server_no_context_takeover=True))
        options: list[Json] = [
            {"compression": None},
            {},
            *({"compression": None, "extensions": [o]} for o in offers),
        ]
        clients = [stack.enter_context(dial(url, max_size=None, **option)) for option in options]
        wait_until(lambda: total(process) == len(clients) + 1, "the clients")
        driver = stack.enter_context(dial(process.ws, max_size=None))
        rights: list[int] = []
        threads = [
            threading.Thread(target=lambda c=client: rights.append(poured(c))) for client in clients
        ]
        for thread in threads:
            thread.start()
        say(driver, "pour")
        while (message := hear(driver))["event_name"] != "end":
            rights.append(1)
        extensions, right = foreign_poured()
        for thread in threads:
            thread.join(LIMIT)
        assert "permessage-deflate" in extensions
        assert sum(rights) + right == message["payload"]


@needs_sansio
@pytest.mark.parametrize(("bits", "compressed"), [(9, False), (11, False), (12, True), (15, True)])
def test_a_client_whose_window_is_too_small_gets_plain_frames(
    live: Live, bits: int, compressed: bool
) -> None:
    with raw_client(
        live, extensions=f"permessage-deflate; server_max_window_bits={bits}"
    ) as client:
        client.sendall(masked(json.dumps({"event_name": "x", "to": "all", "payload": "x" * 5000})))
        assert client.recv(1)[0] == (datadivr._COMPRESSED_TEXT if compressed else datadivr._TEXT)
    wait_until(lambda: not datadivr.clients, "its end")


# A ping of 125 bytes, with a mask of zeroes.
PING = b"\x89\xfd" + bytes(4) + bytes(125)


@needs_sansio
@pytest.mark.parametrize(
    ("name", "between"),
    [("uvicorn", ""), ("uvicorn", '{"event_name": "m", "to": "all"}'), ("uvicorn-wsproto", "")],
)
def test_a_client_that_pings_and_does_not_read_is_dropped(
    tmp_path: Path, name: str, between: str
) -> None:
    need(Path("/proc/self/status").exists(), "/proc")
    (tmp_path / "application.py").write_text(textwrap.dedent(APPLICATION))
    pings = PING * 1800 + (masked(between) if between else b"")
    with Process(*SERVERS[name], cwd=tmp_path, DATADIVR_MAX_BUFFER_BYTES="1000000") as process:
        process.wait_until_up()
        before = resident(process, most=True)
        with raw_client(process, buffer=4096) as client, contextlib.suppress(OSError):
            while True:
                client.sendall(pings)
        wait_until(lambda: total(process) == 0, "it to be dropped")
        assert metrics(process)['errors_total{type="slow_client"}'] == 1
        assert resident(process, most=True) - before < 96 * 1024 * 1024


@promise("The limit holds before a message is inflated, and for what a relayed one grows to.")
@needs_sansio
@pytest.mark.parametrize("fragmented", [False, True])
def test_a_message_that_would_inflate_over_the_limit_is_refused(
    tmp_path: Path, fragmented: bool
) -> None:
    need(Path("/proc/self/status").exists(), "/proc")
    deflater = zlib.compressobj(9, wbits=-15)
    bomb = deflater.compress(bytes(16 << 20)) + deflater.flush(zlib.Z_SYNC_FLUSH)[:-4]
    framed = b"\x41\xfe" if fragmented else b"\xc1\xfe"  # with FIN, or to be continued
    framed += struct.pack("!H", len(bomb)) + bytes(4) + bomb
    (tmp_path / "application.py").write_text(textwrap.dedent(APPLICATION))
    command = [*SERVERS["uvicorn"], "--ws-max-size", str(1 << 28)]  # a limit of the host's own
    offer = "permessage-deflate; client_no_context_takeover"
    with Process(*command, cwd=tmp_path) as process, contextlib.ExitStack() as stack:
        process.wait_until_up()
        clients = [stack.enter_context(raw_client(process, extensions=offer)) for _ in range(4)]
        before = resident(process, most=True)
        for client in clients:
            client.sendall(framed * 12)
        wait_until(lambda: total(process) == 0, "them to be gone")
        assert metrics(process)['errors_total{type="message_too_big"}'] == 4
        assert resident(process, most=True) - before < 96 * 1024 * 1024


def test_a_client_that_floods_is_gone_soon_after_it_was_disconnected(
    server: Process, connect: Connect
) -> None:
    flooder = raw_client(server)
    client_id = id_of(flooder)
    gone = threading.Event()
    heard = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := flooder.recv(1 << 16):
                heard.extend(data[-200:])
        gone.set()

    def flood() -> None:
        frame = masked('{"event_name": "x", "to": "nobody", "payload": "%s"}' % ("y" * 1000)) * 50
        with contextlib.suppress(OSError):
            while not gone.is_set():
                flooder.sendall(frame)

    threads = [threading.Thread(target=read), threading.Thread(target=flood)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(heard) > 1000, "the flood")
    with within(8):  # 2 s of them for its answer to the close frame
        answer = server.api.delete(f"/clients/{client_id}")
        assert answer.status_code == 204
        assert gone.wait(LIMIT)
    for thread in threads:
        thread.join(LIMIT)
    flooder.close()
    if "uvicorn" in " ".join(map(str, server.popen.args)):  # type: ignore[arg-type]
        assert b"\x03\xf0Disconnected by an administrator" in bytes(heard)


class WrappedSend:
    """A middleware that keeps the kinds of what goes through `send`."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.kinds: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Any) -> None:
            self.kinds.append(message["type"])
            await send(message)

        await self.app(scope, receive, watched if scope["type"] == "websocket" else send)


@promise(
    "One that wraps `send` alone sees the handshake: under uvicorn, messages to clients go past"
    " ASGI."
)
@needs_sansio
def test_a_wrapper_of_send_alone_sees_the_handshake_and_no_message(
    left: None, records: Records
) -> None:
    wrapper = WrappedSend(datadivr.app)
    with Live(wrapper) as live, dial(live.ws) as client:
        assert id_of(client)
        assert wrapper.kinds == ["websocket.accept"]
    assert records.named("fanout_through_asgi") == []


@promise(
    "If it takes more than 40 s and its client sends meanwhile, uvicorn closes that connection,"
    " for it reads no pongs."
)
@needs_sansio
@pytest.mark.parametrize("sends", [False, True])
def test_a_long_handler_whose_client_sends_meanwhile_loses_it_to_the_keepalive(
    left: None, sends: bool
) -> None:
    go = threading.Event()

    @datadivr.websocket_handler("long")
    def long(message: WebSocketMessage) -> WebSocketMessage:
        go.wait(LIMIT if sends else 4 * SLOWNESS)
        return datadivr.create_message("done", None, message.from_id)

    pings: Any = {"ws_ping_interval": 0.5 * SLOWNESS, "ws_ping_timeout": 3 * SLOWNESS}
    with Live(**pings) as live, dial(live.ws) as client:
        say(client, "long")
        if sends:
            for _ in range(100):
                with contextlib.suppress(ConnectionClosed):
                    say(client, "m")
            try:
                assert close_code(client) == 1011
            finally:
                go.set()
        else:
            assert hear(client)["event_name"] == "done"


@promise(
    "A client whose network is gone is noticed within 40 s. `uvicorn --ws-ping-interval 5"
    " --ws-ping-timeout 5` makes that 10 s.",
    "Answer pings, or the server closes the connection after 40 s.",
)
def test_uvicorns_keepalive_has_the_seconds_that_the_readme_says() -> None:
    config = uvicorn.Config(datadivr.app)
    assert (config.ws_ping_interval or 0) + (config.ws_ping_timeout or 0) == 40
    (words,) = re.findall("`uvicorn (--ws-ping-interval 5 [^`]*)`", one_line(README))
    given = uvicorn.main.make_context("uvicorn", ["datadivr:app", *words.split()]).params
    assert given["ws_ping_interval"] + given["ws_ping_timeout"] == 10


@promise("the line names the wrapper's module")
def test_behind_a_wrapper_the_stop_is_the_reason_and_the_wrapper_is_named(
    registry: None, ended: Callable[[], dict[str, float]], records: Records
) -> None:
    reasons = []

    @datadivr.websocket_handler("$disconnect")
    async def went(message: WebSocketMessage) -> None:
        reasons.append(message.payload)

    with contextlib.ExitStack() as afterwards, Live(WrappedReceive(datadivr.app)) as live:
        client = afterwards.enter_context(dial(live.ws))
        id_of(client)
    assert ended() == {"server_stop": 1}
    assert reasons == ["server_stop"]
    (line,) = records.named("client_disconnected", logging.INFO)
    assert line["reason"] == "server_stop"
    (line,) = records.named("fanout_through_asgi")
    assert __name__ in line.values()


def test_behind_a_wrapper_a_client_that_closes_is_the_reason(
    ended: Callable[[], dict[str, float]],
) -> None:
    with Live(WrappedReceive(datadivr.app)) as live:
        with dial(live.ws) as client:
            id_of(client)
        wait_until(lambda: ended() == {"client": 1}, "its end")


@needs_sansio
def test_a_fault_while_a_connection_is_set_up_costs_speed_alone(records: Records) -> None:
    class Transport:
        def __init__(self, transport: asyncio.Transport) -> None:
            self._transport = transport

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

        def set_write_buffer_limits(self, *limits: int) -> None:
            raise RuntimeError("not here")

    class Protocol(AutoWebSocketsProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(Transport(transport))

    with Live(ws=Protocol) as live, dial(live.ws) as client:
        assert ask(client, "m", to="all")["event_name"] == "m"
        assert len(records.named("fanout_through_asgi")) == 1


def test_uvicorns_legacy_protocol_drops_a_client_that_does_not_read_without_a_traceback(
    tmp_path: Path,
) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(APPLICATION))
    command = [*SERVERS["uvicorn"], "--ws", "websockets"]
    with Process(*command, cwd=tmp_path, DATADIVR_MAX_BUFFER_BYTES="1000000") as process:
        process.wait_until_up()
        with raw_client(process, buffer=4096) as stalled:
            id_of(stalled)
            fill = {"event_name": "fill", "payload": "x" * 900_000}

            def drops() -> bool:
                assert process.api.post("/messages", json=fill).status_code == 202
                return total(process) == 0

            wait_until(drops, "it to be dropped")
        process.stop()
    assert "Traceback" not in process.log, process.log


@needs_sansio
@pytest.mark.parametrize("how", ["client", "admin"])
def test_a_websocket_is_disconnected_in_the_end(connect: Connect, live: Live, how: str) -> None:
    kept = []

    @datadivr.websocket_handler("keep")
    async def keep(message: WebSocketMessage) -> WebSocketMessage:
        kept.append(datadivr.clients[message.from_id].websocket)
        return datadivr.create_message("kept", None, message.from_id)

    client = connect(live)
    client_id = ask(client, "keep")["to"]
    (websocket,) = kept
    assert websocket.client_state is WebSocketState.CONNECTED
    if how == "admin":
        live.api.delete(f"/clients/{client_id}")
    client.close()
    wait_until(lambda: websocket.client_state is WebSocketState.DISCONNECTED, "its end")


def read_to_the_end(client: socket.socket) -> bytes:
    heard = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(1 << 16):
            heard += data
    return heard


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_no_data_follows_a_close_frame_of_a_handlers(
    connect: Connect, live: Live, whose: str
) -> None:
    @datadivr.websocket_handler("close")
    async def close(message: WebSocketMessage) -> WebSocketMessage:
        await datadivr.clients[message.payload].websocket.close(4000, "bye")
        return datadivr.create_message("closed", None, "all")

    talker = connect(live)
    with raw_client(live) as client:  # which does not answer the close frame yet
        client_id = id_of(client)
        closing = json.dumps({"event_name": "close", "payload": client_id})
        if whose == "its own":
            client.sendall(masked(closing))
        else:
            talker.send(closing)
        assert hear(talker)["event_name"] == "closed"
        for number in range(50):
            assert ask(talker, "m", payload=number, to="all")["payload"] == number
        client.sendall(b"\x88\x82" + bytes(4) + struct.pack("!H", 4000))
        frames = list(unframe(read_to_the_end(client)))
    assert frames == [(0x88, struct.pack("!H", 4000) + b"bye")]


def close_frame(code: int, reason: str) -> bytes:
    return datadivr._frame(struct.pack("!H", code) + reason.encode(), 0x88)


@promise("| 1011 | uvicorn read no answer to its pings |")
@needs_sansio
def test_a_client_that_answers_no_ping_reads_1011(ended: Callable[[], dict[str, float]]) -> None:
    with Live(ws_ping_interval=0.1, ws_ping_timeout=0.1) as live, raw_client(live) as client:
        *pings, (first, payload) = unframe(read_to_the_end(client))
    assert {first for first, _ in pings} == {0x89}
    assert (first, payload[:2]) == (0x88, struct.pack("!H", 1011))
    assert ended() == {"keepalive": 1}


def fill_up(client_id: str) -> None:
    """Send to a client of this process that does not read, until it is dropped."""
    message = datadivr.create_message("fill", "x" * 300_000, "others")
    for _ in range(100):
        in_a_thread(datadivr.broadcast(message))
        if client_id not in datadivr.clients:
            return
    raise AssertionError("the client reads")


@promise("| 1013 | the client did not keep up (`DATADIVR_MAX_BUFFER_BYTES`);")
@needs_sansio
def test_a_client_that_did_not_keep_up_reads_1013_after_what_was_sent(
    live: Live, configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datadivr, "_CLOSE_SECONDS", 2 * LIMIT)
    configure(max_buffer_bytes=100_000)
    with raw_client(live, buffer=4096) as client:
        fill_up(id_of(client))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        expected = close_frame(1013, "Too slow: reconnect")
        heard = bytearray()
        while not heard.endswith(expected):
            data = client.recv(1 << 20)
            assert data, "it ended without the close frame"
            heard += data


@promise("one that still does not read is cut off after 2 s, and sees 1006")
@needs_sansio
def test_a_client_that_never_reads_is_cut_off_two_seconds_after_it_was_dropped(
    live: Live, configure: Callable[..., None]
) -> None:
    configure(max_buffer_bytes=100_000)
    with raw_client(live, buffer=4096) as client:
        client_id, start = id_of(client), time.monotonic()
        connection = datadivr.clients[client_id].connection
        assert isinstance(connection, datadivr._UvicornConnection)
        fill_up(client_id)
        with within(6):  # not of all: a browser keeps its own for longer
            own = connection._protocol
            wait_until(lambda: own not in live.connections, "its socket's end")
        assert time.monotonic() - start > 1.9
        *_, (_, payload) = unframe(read_to_the_end(client))
    assert not payload.endswith(close_frame(1013, "Too slow: reconnect"))


@promise(
    "full speed needs uvicorn's own WebSocket protocol, of 0.50 or later, and nothing that wraps"
    " `receive`"
)
def test_behind_a_wrapper_messages_go_both_ways_and_the_log_says_what_it_costs(
    left: None, records: Records
) -> None:
    with (
        Live(WrappedReceive(datadivr.app)) as live,
        dial(live.ws) as one,
        dial(live.ws) as two,
    ):
        ids = id_of(one), id_of(two)
        for sender, own, reader, other in ((one, ids[0], two, ids[1]), (two, ids[1], one, ids[0])):
            say(sender, "m", payload=own, to=other)
            assert hear(reader) == message_from(own, "m", other, payload=own)
        assert len(records.named("fanout_through_asgi")) == 1


@promise("full speed needs uvicorn's own WebSocket protocol, of 0.50 or later")
def test_this_uvicorn_is_served_at_full_speed_from_0_50_on(live: Live, connect: Connect) -> None:
    assert id_of(connect(live))
    (client,) = datadivr.clients.values()
    is_fast = tuple(map(int, uvicorn.__version__.split(".")[:2])) >= (0, 50)
    assert isinstance(client.connection, datadivr._UvicornConnection) == is_fast
    assert is_fast == IS_SANSIO  # or the tests of the fast path would be skipped


@needs_sansio
def test_a_message_is_compressed_once_for_all_clients(
    live: Live, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [connect(live) for _ in range(3)]
    assert all(id_of(client) for client in clients)
    compressed: list[int] = []

    def count(*args: Any, **options: Any) -> Any:
        compressed.append(1)
        return zlib.compressobj(*args, **options)

    fake = types.SimpleNamespace(**{**vars(zlib), "compressobj": count})
    monkeypatch.setattr(datadivr, "zlib", fake)
    live.api.post("/messages", json={"event_name": "news", "payload": "x" * 6000})
    assert [hear(client)["payload"] for client in clients] == ["x" * 6000] * 3
    assert len(compressed) == 1


# Here alone, tests look at private parts of uvicorn and websockets, as the module's adapter does.


@needs_sansio
def test_compression_switched_off_leaves_the_connections_own_alone(
    live: Live, configure: Callable[..., None], connect: Connect
) -> None:
    configure(compress_min_bytes=0)
    assert ask(connect(live), "x", to="all", payload="x" * 5000)["payload"] == "x" * 5000
    (client,) = datadivr.clients.values()
    connection: Any = client.connection
    (extension,) = connection._protocol.conn.extensions
    assert hasattr(extension, "encoder")
    assert connection.framing is datadivr._frame


@needs_sansio
def test_reading_that_uvicorn_has_paused_is_not_resumed(live: Live, registry: None) -> None:
    go_on = threading.Event()

    @datadivr.websocket_handler("wait")
    def wait(message: WebSocketMessage) -> None:
        go_on.wait(LIMIT)

    with raw_client(live) as client:
        client.sendall(masked('{"event_name": "wait"}') * 2)
        wait_until(lambda: datadivr.clients, "the client")
        (one,) = datadivr.clients.values()
        protocol: Any = vars(type(one.connection))["_protocol"].__get__(one.connection)
        wait_until(lambda: protocol.read_paused and one.messages_received == 1, "the second")
        protocol.pause_writing()
        protocol.resume_writing()
        assert not protocol.transport.is_reading()
        go_on.set()
        wait_until(protocol.transport.is_reading, "both to be handled")


@pytest.mark.parametrize("name", ["conn.close_sent", "conn.send_close", "transport.write"])
def test_a_part_of_uvicorn_that_is_not_there_costs_speed_alone(name: str) -> None:
    owner, attribute = name.split(".")
    parts = {"conn": ["close_sent", "close_rcvd_then_sent", "extensions", "max_message_size"]}
    parts["conn"] += ["send_close", "data_to_send"]
    parts["transport"] = ["is_closing", "get_write_buffer_size", "write", "abort", "close"]
    parts["transport"] += ["pause_reading", "resume_reading", "set_write_buffer_limits"]
    parts[owner].remove(attribute)
    conn = types.SimpleNamespace(**dict.fromkeys(parts["conn"]))
    transport = types.SimpleNamespace(**dict.fromkeys(parts["transport"], print))
    protocol = types.SimpleNamespace(receive=None, conn=conn, transport=transport)
    protocol.read_paused, protocol.writable = False, asyncio.Event()
    protocol.close_sent = protocol.handshake_complete = protocol.shutdown = None
    before = dict(vars(protocol)), dict(vars(conn))
    with pytest.raises(AttributeError, match=attribute):
        datadivr._UvicornConnection(protocol)
    assert before == (vars(protocol), vars(conn))  # nothing is half patched
    setattr(getattr(protocol, owner), attribute, None)
    conn.extensions = ()
    datadivr._UvicornConnection(protocol)


def uvicorns_parts() -> Any:
    """Make what a connection needs of uvicorn, its transport and websockets."""
    conn = ["close_sent", "close_rcvd_then_sent", "max_message_size", "send_close", "data_to_send"]
    transport = [name for name in dir(asyncio.Transport) if not name.startswith("_")]
    return types.SimpleNamespace(
        receive=None,
        read_paused=False,
        writable=asyncio.Event(),
        close_sent=False,
        shutdown=None,
        handshake_complete=True,
        conn=types.SimpleNamespace(**dict.fromkeys(conn), extensions=()),
        transport=types.SimpleNamespace(**dict.fromkeys(transport, print)),
    )


@pytest.mark.parametrize(
    "name",
    ["conn.close_sent", "conn.close_rcvd_then_sent", "conn.send_close", "transport.abort"],
)
def test_what_is_missing_is_missed_before_anything_is_changed(name: str) -> None:
    protocol = uvicorns_parts()
    owner, attribute = name.split(".")
    delattr(getattr(protocol, owner), attribute)
    limits: list[int] = []
    protocol.transport.set_write_buffer_limits = lambda *given: limits.extend(given)
    before = set(vars(protocol))
    with pytest.raises(AttributeError, match=attribute):
        datadivr._UvicornConnection(protocol)
    assert set(vars(protocol)) == before
    assert limits == []


def test_older_websockets_name_the_limit_otherwise() -> None:
    protocol = uvicorns_parts()
    del protocol.conn.max_message_size
    protocol.conn.max_size = 1 << 24  # as of websockets 13 to 15
    datadivr._UvicornConnection(protocol)
    assert protocol.conn.max_size == 1 << 20


# ---- Clients: `pytest -m clients` ----------------------------------------------------------------


def begin_second(client_id: str) -> None:
    """Begin the second in which a client's messages are counted, and let it not end by itself."""
    client = datadivr.clients[client_id]
    client.second_began = time.monotonic() + LIMIT
    client.messages_this_second = 0


@pytest.mark.parametrize("dropped", [1, 7])
def test_messages_over_the_rate_are_dropped_with_one_error_a_second(
    connect: Connect, live: Live, configure: Callable[..., None], dropped: int
) -> None:
    configure(max_messages_per_second=3)
    before = metrics(live)['errors_total{type="rate_limited"}']
    client = connect(live)
    client_id = id_of(client)
    begin_second(client_id)
    sent = [{"event_name": "m", "payload": n, "to": "all"} for n in range(3 + dropped)]
    client.socket.sendall(b"".join(masked(json.dumps(message)) for message in sent))
    heard = [hear(client) for _ in range(4)]
    fault = {"code": "rate_limited", "event_name": "m"}
    assert [message["payload"] for message in heard] == [0, 1, 2, fault]
    assert heard[3]["message"] == "More than 3 messages a second: dropped."
    counted = 'errors_total{type="rate_limited"}'
    wait_until(lambda: metrics(live)[counted] - before == dropped, "the count")
    datadivr.clients[client_id].second_began -= LIMIT + 1
    assert ask(client, "m", payload="again", to="all")["payload"] == "again"


def test_each_second_one_error_tells_of_messages_over_the_rate(
    configure: Callable[..., None], loop: FakeLoop
) -> None:
    configure(max_messages_per_second=4)
    connection = FakeConnection()
    client = fake_client(connection)
    for _ in range(3):
        exceeds = [datadivr._exceeds_rate(client, "{}", 4) for _ in range(9)]
        assert exceeds == [False] * 4 + [True] * 5
        client.second_began -= 1
    datadivr._hub.flush()
    codes = [json.loads(text)["payload"]["code"] for text in connection.received]
    assert codes == ["rate_limited"] * 3


def test_errors_of_a_kind_are_logged_once_a_minute_as_a_warning(
    connect: Connect, live: Live, logged: list[Any]
) -> None:
    for _ in range(2):
        client = connect(live)
        for _ in range(2):
            client.send('{"event_name": 5, "payload": "secret thing"}')
            hear(client)
    levels = [entry["log_level"] for entry in logged if entry["event"] == "invalid_message"]
    assert levels == ["warning", "debug", "debug", "debug"]
    assert "secret thing" not in repr(logged)


@promise("The minute is counted for each event and in each process.")
def test_one_handlers_errors_do_not_hide_anothers(
    connect: Connect, live: Live, logged: list[Any]
) -> None:
    for name in ("one", "other"):

        @datadivr.websocket_handler(name)
        async def fail(message: WebSocketMessage) -> None:
            raise RuntimeError

    client = connect(live)
    for name in ("one", "other", "one"):
        ask(client, name)
    told = [entry["event_name"] for entry in logged if entry["log_level"] == "error"]
    assert told == ["one", "other"]


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("127.0.0.1", 50514), "127.0.0.1:50514"),
        (("::1", 50514), "[::1]:50514"),
        (("203.0.113.7", 0), "203.0.113.7"),
        (None, ""),
        (("", 0), ""),
        ((None, 0), ""),
    ],
)
def test_an_address_is_written_as_urls_write_it(peer: Any, address: str | None) -> None:
    scope: Json = {"type": "websocket", "client": peer, "headers": []}
    websocket = fastapi.WebSocket(scope, None, None)  # type: ignore[arg-type]
    assert datadivr._format_address(websocket) == address


def test_a_message_over_the_rate_has_an_error_with_its_id(
    connect: Connect, live: Live, configure: Callable[..., None]
) -> None:
    configure(max_messages_per_second=1)
    client = connect(live)
    client_id = id_of(client)
    begin_second(client_id)
    say(client, "m", id="first", to="all")
    say(client, "m", id="second", to="all")
    assert hear(client)["event_name"] == "m"
    assert hear(client) == ok(client_id, "first")
    answer = hear(client)
    known = answer["payload"].pop("event_name", "m"), answer["payload"].pop("code")
    assert (known, answer["payload"]) == (("m", "rate_limited"), {})
    assert (answer["event_name"], answer["id"]) == ("error", "second")


@promise("each with an `id` is answered, others are told at most once a second")
def test_each_message_over_the_rate_that_has_an_id_is_answered_once(
    connect: Connect, live: Live, configure: Callable[..., None]
) -> None:
    configure(max_messages_per_second=2)
    client = connect(live)
    for number in range(20):
        say(client, "silent", id=number)
    answers = [hear(client) for _ in range(20)]
    assert sorted(answer["id"] for answer in answers) == list(range(20))
    told = {answer["event_name"] for answer in answers}
    assert told == {"ok", "error"}


@promise("`clients[id].rooms` still says which until its `$disconnect` handler has run")
def test_a_clients_rooms_are_a_frozen_set_until_its_disconnect_has_run(
    connect: Connect, live: Live
) -> None:
    seen: list[Any] = []

    @datadivr.websocket_handler("$disconnect")
    async def went(message: WebSocketMessage) -> None:
        rooms = datadivr.clients[message.from_id].rooms
        news = WebSocketMessage(event_name="went", to="#garden")
        seen.append((rooms, await datadivr.broadcast(news)))

    member, other = connect(live), connect(live)
    member_id, other_id = id_of(member), id_of(other)
    assert datadivr.clients[member_id].rooms == frozenset()
    for client_id, room in ((member_id, "garden"), (member_id, "kitchen"), (other_id, "garden")):
        live.api.put(f"/clients/{client_id}/rooms/{room}")
    rooms = datadivr.clients[member_id].rooms
    assert isinstance(rooms, frozenset)
    assert rooms == {"garden", "kitchen"}
    live.api.delete(f"/clients/{member_id}/rooms/kitchen")
    assert datadivr.clients[member_id].rooms == {"garden"}
    member.close()
    assert hear(other)["event_name"] == "went"
    assert seen == [({"garden"}, 1)]  # it is in no room any more, and its rooms are known
    listed = live.api.get("/clients?room=garden").json()
    assert [client["id"] for client in listed["clients"]] == [other_id]


async def hold_clients(server: Served, clients: int) -> None:
    """Connect so many clients, each of which then gets all messages and is in the list once."""
    async with Load(server.port) as load:
        await load.connect(clients)
        await load.publish(3, 1, text_to_all(64))
        assert [peer.deliveries for peer in load.peers] == [3] * clients
        listed = pages(server.api, clients // 10)
        ids = [client["id"] for page in listed for client in page["clients"]]
        assert len(set(ids)) == len(ids) == clients


def test_a_thousand_clients_are_held_at_once(counted: Process) -> None:
    in_a_thread(hold_clients(counted, 1000))


def come_and_go(server: Served, clients: int) -> None:
    """Have clients come and go, 100 at once, every other one with a close frame."""
    linger = struct.pack("ii", 1, 0)  # a close is a reset

    async def visits() -> None:
        for _ in range(0, clients, 100):
            async with Load(server.port) as load:
                await load.connect(100)
                for number, peer in enumerate(load.peers):
                    peer.transport.write(masked('{"event_name": "whoami"}'))
                    if number % 2:
                        peer.transport.write(b"\x88\x80\0\0\0\0")
                    else:
                        own = peer.transport.get_extra_info("socket")
                        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        peer.transport.abort()
                await asyncio.gather(*(peer.lost for peer in load.peers))

    in_a_thread(visits())
    wait_until(lambda: total(server) == 0, "the registry to be empty")


def test_clients_that_came_and_went_leave_no_object_behind(counted: Process) -> None:
    counts: list[int] = []

    def is_settled() -> bool:
        counts.append(objects_and_bytes(counted)[0])
        return len(counts) > 1 and counts[-1] >= counts[-2]

    for _ in range(2):  # the first time, caches grow
        come_and_go(counted, 300)
        counts.clear()
        wait_until(is_settled, "the last to be let go of", pause=0.3)
    come_and_go(counted, 600)
    wait_until(
        lambda: objects_and_bytes(counted)[0] - counts[-1] < 150, "no more objects than before"
    )


@promise(
    """What you send by `websocket.send_text` yourself counts as unsent, and is not counted as
    sent."""
)
@needs_sansio
def test_what_a_handler_sends_itself_counts_as_unsent_and_not_as_sent(
    live: Live, configure: Callable[..., None], ended: Callable[[], dict[str, float]]
) -> None:
    configure(max_buffer_bytes=100_000_000)

    @datadivr.websocket_handler("pour")
    async def pour(message: WebSocketMessage) -> None:
        await datadivr.clients[message.from_id].websocket.send_text("x" * 20_000_000)

    def counts() -> list[float]:
        counted = metrics(live)
        return [counted["messages_sent_total"], counted["bytes_sent_total"], client.messages_sent]

    with raw_client(live, buffer=4096) as stalled:
        client = datadivr.clients[id_of(stalled)]
        before = counts()
        stalled.sendall(masked('{"event_name": "pour"}'))
        wait_until(lambda: client.buffered_bytes > 1_000_000, "the unsent bytes")
        assert counts() == before
        assert ended() == {}
        configure(max_buffer_bytes=100_000)
        wait_until(lambda: ended() == {"slow_client": 1}, "it to be dropped for them")


@pytest.mark.parametrize("to", ["all", "itself"])
def test_a_client_that_floods_itself_and_does_not_read_is_dropped(
    live: Live, configure: Callable[..., None], ended: Callable[[], dict[str, float]], to: str
) -> None:
    configure(max_buffer_bytes=1_000_000)
    with raw_client(live, buffer=4096) as client:
        address = id_of(client) if to == "itself" else to
        message = {"event_name": "m", "payload": "x" * 100_000, "to": address}
        with contextlib.suppress(OSError):  # it is cut off while it sends
            for _ in range(200):
                client.sendall(masked(json.dumps(message)))
        wait_until(lambda: ended() == {"slow_client": 1}, "it to be dropped")


# ---- Fan-out: `pytest -m fanout` -----------------------------------------------------------------


def test_a_message_to_all_reaches_its_sender_too(connect: Connect, server: Process) -> None:
    clients = [connect(server) for _ in range(3)]
    say(clients[0], "hello", to="all")
    assert [hear(client)["event_name"] for client in clients] == ["hello"] * 3


@promise(
    "what one client sends, the others have a moment later, without asking for it",
    "Without the handler of `$default`, the server passes on each event",
)
@promise("`all`, `others` (the default: everybody but the sender)")
def test_a_message_goes_to_the_others_by_default(connect: Connect, server: Process) -> None:
    sender, *others = clients = [connect(server) for _ in range(3)]
    say(sender, "hello")
    assert [hear(client)["event_name"] for client in others] == ["hello"] * 2
    say(others[0], "end", to="all")
    assert [hear(client)["event_name"] for client in clients] == ["end"] * 3


def test_a_message_to_an_id_reaches_that_client_alone(connect: Connect, server: Process) -> None:
    sender, receiver, bystander = clients = [connect(server) for _ in range(3)]
    say(sender, "hello", to=id_of(receiver))
    assert hear(receiver)["event_name"] == "hello"
    say(bystander, "end", to="all")
    assert [hear(client)["event_name"] for client in clients] == ["end"] * 3


@promise("no client with the id in `to` is connected")
def test_a_message_to_an_unknown_id_gets_its_sender_an_error(
    connect: Connect, server: Process
) -> None:
    client = connect(server)
    expected = error(id_of(client), "unknown_recipient", UNKNOWN, event_name="hello")
    assert ask(client, "hello", to="nobody") == expected


def test_messages_from_one_sender_arrive_in_order_mixed_with_direct_ones(
    connect: Connect, server: Process
) -> None:
    sender, receiver = connect(server), connect(server)
    addresses = random.Random(0).choices(["all", "others", id_of(receiver)], k=300)
    for number, to in enumerate(addresses):
        say(sender, "count", payload=number, to=to)
    assert [hear(receiver)["payload"] for _ in range(300)] == list(range(300))


@promise("returns how many clients of this process that addresses")
def test_broadcast_from_a_route_returns_how_many_clients_it_addressed(
    connect: Connect, server: Process
) -> None:
    clients = [connect(server) for _ in range(3)]
    wait_until(lambda: total(server) == 3, "three clients")
    assert http.post(f"{server.url}/tell").json() == 3
    expected = {
        "event_name": "news",
        "payload": 1,
        "to": "all",
        "from_id": "server",
        "message": None,
    }
    assert [hear(client) for client in clients] == [expected] * 3


def test_broadcast_with_a_sender_leaves_it_out_of_the_others(connect: Connect, live: Live) -> None:
    @datadivr.app.websocket("/greeting")
    async def greeting(websocket: fastapi.WebSocket) -> None:
        async def greet() -> None:
            while "datadivr.client_id" not in websocket.scope:  # noqa: ASYNC110  # there is no event for it
                await asyncio.sleep(0)
            counts.append(
                await datadivr.broadcast(WebSocketMessage(event_name="greeting"), websocket)
            )

        greeter = asyncio.create_task(greet())
        await datadivr.handle_connection(websocket)
        await greeter

    counts: list[int] = []
    other = connect(live)
    id_of(other)
    sender = connect(live, "/greeting")
    assert hear(other)["event_name"] == "greeting"
    assert ask(sender, "whoami")["event_name"] == "whoami"
    assert counts == [1]
    datadivr.app.router.routes.pop()


def test_broadcast_refuses_what_json_cannot_hold(live: Live, connect: Connect) -> None:
    with pytest.raises(PydanticSerializationError):
        in_a_thread(datadivr.broadcast(WebSocketMessage(event_name="x", payload=object())))


@promise(
    "bytes unsent to one client, above which it is dropped with 1013",
    "hold up nobody. One with more than `DATADIVR_MAX_BUFFER_BYTES` unsent is dropped with 1013.",
    "| Slow clients | dropped at a limit, and counted |",
)
def test_a_client_that_does_not_read_is_dropped_and_the_others_are_not(
    connect: Connect, server: Process
) -> None:
    before = metrics(server)
    reader = connect(server)
    payload = "x" * 900_000
    with raw_client(server, buffer=4096) as stalled:
        id_of(stalled)
        for _ in range(20):
            assert ask(reader, "fill", payload=payload, to="all")["payload"] == payload
            if total(server) == 1:
                break
        assert id_of(reader)
        after = metrics(server)
        for name in (
            'errors_total{type="slow_client"}',
            'disconnections_total{reason="slow_client"}',
        ):
            assert after[name] - before[name] == 1
        told = re.compile(r"slow_client_dropped +buffered_bytes=\d+ +client_id=")
        wait_until(lambda: told.search(server.log), "the line of it")


async def publish_beside_a_stalled(
    server: Process, clients: int, messages: int, measure: Callable[[], int], *, stall: bool
) -> tuple[float, int, int]:
    """Publish to clients, with one that stalls among them or not.

    Return the deliveries a second, how `measure` grew, and how many clients were dropped so far.
    """
    stalled = raw_client(server, buffer=4096) if stall else contextlib.nullcontext()
    with stalled:
        async with Load(server.port) as load:
            await load.connect(clients)
            await load.publish(100, 16, text_to_all(4096))
            before = measure()
            rate = await load.publish(messages, 16, text_to_all(4096))
            grown = measure() - before
    return rate, grown, int(metrics(server)['errors_total{type="slow_client"}'])


@promise("hold up nobody.")
def test_a_stalled_client_takes_no_more_memory_than_its_buffer_may(tmp_path: Path) -> None:
    limit = 1024 * 1024
    with serve(tmp_path, COUNTED, DATADIVR_MAX_BUFFER_BYTES=str(limit)) as process:

        def peak() -> int:
            return int(process.api.get("/peak").json())

        with within(10):
            _, grown, dropped = in_a_thread(
                publish_beside_a_stalled(process, 20, 2000, peak, stall=True)
            )
    assert dropped == 1
    assert grown < 2 * limit


@promise("With uvloop, or from Python 3.12 on, clients share it.")
@needs_sansio
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_what_is_unsent_to_many_clients_is_in_memory_once(
    tmp_path: Path, connect: Connect, loop: str
) -> None:
    if loop == "asyncio" and sys.version_info < (3, 12):
        pytest.skip("asyncio copies what it buffers before Python 3.12")
    options = "--loop", loop
    with (
        serve(tmp_path, COUNTED, *options, DATADIVR_MAX_BUFFER_BYTES="99999999") as process,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(20):
            stack.enter_context(raw_client(process, buffer=4096))
        sender = connect(process)
        id_of(sender)
        _, before = objects_and_bytes(process)
        for _ in range(8):
            say(sender, "fill", payload="x" * 900_000, to="others")
        id_of(sender)
        _, after = objects_and_bytes(process)
        listed = process.api.get("/clients").json()["clients"]
        unsent = sum(client["buffered_bytes"] for client in listed)
        assert after - before < unsent / 5


@promise("One that stalls below goes with uvicorn's keepalive.")
@needs_sansio
def test_a_client_that_stalls_below_the_limit_is_gone_once_the_keepalive_gives_it_up(
    configure: Callable[..., None],
    ended: Callable[[], dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(max_buffer_bytes=20_000_000)
    monkeypatch.setattr(datadivr, "_CLOSE_SECONDS", 0.5)
    with (
        Live(ws_ping_interval=1, ws_ping_timeout=1) as live,
        raw_client(live, buffer=4096),
    ):
        wait_until(lambda: datadivr.clients, "the client")
        fill = {"event_name": "fill", "payload": "x" * 900_000, "to": "all"}
        for _ in range(10):  # more than the system takes
            live.api.post("/messages", json=fill)
        wait_until(lambda: not datadivr.clients, "the keepalive")
        wait_until(lambda: not live.connections, "the socket's end")
    assert ended() == {"keepalive": 1}


@needs_sansio
def test_a_client_that_vanished_is_counted_as_given_up_by_the_keepalive(
    ended: Callable[[], dict[str, float]],
) -> None:
    with Live(ws_ping_interval=0.1, ws_ping_timeout=0.1) as live, raw_client(live):
        wait_until(lambda: ended() == {"keepalive": 1}, "the keepalive")


class FanOut(RuleBasedStateMachine):
    """Any order of what can happen in a turn: every client gets exactly its messages, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.hub = datadivr._hub
        self.rooms: dict[str, set[datadivr.Client]] = {"a": set(), "b": set(), "c": set()}
        self.expected: dict[datadivr.Client, list[bytes]] = {}
        self.connections: dict[datadivr.Client, FakeConnection] = {}
        self.number = 0
        self.before = self._counted()

    def _counted(self) -> list[int]:
        """Return what the hub has still to add to the metrics, which other hubs add to as well."""
        return [self.hub.sent, self.hub.sent_bytes]

    def _message(self, long: bool) -> bytes:
        self.number += 1
        return b"%d" % self.number * (1024 if long else 1)

    def _one(self, data: st.DataObject) -> datadivr.Client:
        return data.draw(st.sampled_from(list(self.expected)))

    @rule(framing=st.sampled_from([datadivr._frame, datadivr._frame_compressed]))
    def connect(self, framing: datadivr._Framing) -> None:
        connection = FakeConnection(framing)
        client = fake_client(connection)
        self.connections[client] = connection
        self.expected[client] = []
        self._forget_closed()  # a client that comes is a reason to flush

    @rule(count=st.integers(1, 3), long=st.booleans())
    def all(self, count: int, long: bool) -> None:
        for _ in range(count):
            message = self._message(long)
            assert self.hub.publish("all", message) == len(self.expected)
            for expected in self.expected.values():
                expected.append(message)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), long=st.booleans())
    def others(self, data: st.DataObject, long: bool) -> None:
        sender, message = self._one(data), self._message(long)
        assert self.hub.publish("others", message, sender) == len(self.expected) - 1
        for client, expected in self.expected.items():
            if client is not sender:
                expected.append(message)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), long=st.booleans())
    def direct(self, data: st.DataObject, long: bool) -> None:
        client, message = self._one(data), self._message(long)
        assert self.hub.publish(client.id, message) == 1
        self.expected[client].append(message)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), name=st.sampled_from("abc"), listen_only=st.booleans())
    def join_room(self, data: st.DataObject, name: str, listen_only: bool) -> None:
        client = self._one(data)
        self.hub.join_room(client, name, listen_only)
        self.rooms[name].add(client)
        self._forget_closed()  # what was published before is written, and one that closes found

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), name=st.sampled_from("abc"))
    def leave_room(self, data: st.DataObject, name: str) -> None:
        client = self._one(data)
        self.hub.leave_room(client, name)
        self.rooms[name].discard(client)
        self._forget_closed()

    @rule(data=st.data(), name=st.sampled_from("abc"), long=st.booleans(), sent=st.booleans())
    def room(self, data: st.DataObject, name: str, long: bool, sent: bool) -> None:
        sender = self._one(data) if sent and self.expected else None
        message, recipients = self._message(long), self.rooms[name] - {sender}
        assert self.hub.publish(f"#{name}", message, sender) == len(recipients)
        for client in recipients:
            self.expected[client].append(message)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        client = self._one(data)
        self.hub.remove(client, "admin", 1008, "bye")
        self._gone(client)
        self._forget_closed()
        connection = self.connections[client]
        assert connection.closed_with == ([] if connection.closing else [1008])

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.connections[self._one(data)].closing = True

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = self._one(data)
        self.connections[client].closing = True
        self.hub.remove(client, "client")
        self._drop(client)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        self.flush()
        if self.expected:
            client = self._one(data)
            self.connections[client].unsent_bytes = datadivr._settings().max_buffer_bytes + 1
            self.hub.publish(client.id, b"too much")
            self.hub.flush()
            self._gone(client)
            connection = self.connections[client]
            assert connection.closed_with == ([] if connection.closing else [1013])

    @rule()
    def flush(self) -> None:
        self.hub.flush()
        self._forget_closed()
        for client, expected in self.expected.items():
            if not self.connections[client].closing:
                assert self.connections[client].received == expected
                assert client.messages_sent == len(expected)
        connections = self.connections.values()
        written = [message for connection in connections for message in connection.received]
        wire_bytes = sum(connection.wire_bytes for connection in connections)
        counted = [now - before for now, before in zip(self._counted(), self.before, strict=True)]
        assert counted == [len(written), wire_bytes]
        for client, connection in self.connections.items():
            compressed = [first == datadivr._COMPRESSED_TEXT for first in connection.firsts]
            can = client.connection.framing is datadivr._frame_compressed
            assert compressed == [can and len(message) >= 1024 for message in connection.received]

    def _gone(self, client: datadivr.Client) -> None:
        expected = self._drop(client)
        connection = self.connections[client]
        assert connection.closing or connection.received == expected

    def _forget_closed(self) -> None:
        """Forget those that a flush met closing, which it does where it had something for them."""
        for client in set(self.expected) - set(datadivr.clients.values()):
            assert self.connections[client].closing
            self._drop(client)

    def _drop(self, client: datadivr.Client) -> list[bytes]:
        for members in self.rooms.values():
            members.discard(client)
        return self.expected.pop(client)

    @invariant()
    def registry_is_right(self) -> None:
        assert set(datadivr.clients.values()) == set(self.expected)
        for client in self.expected:
            assert client.rooms == {name for name in self.rooms if client in self.rooms[name]}

    def teardown(self) -> None:
        try:
            self.flush()
        finally:
            for client in list(datadivr.clients.values()):
                self.hub.remove(client, "client")


FanOut.TestCase.settings = hypothesis.settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestFanOut = pytest.mark.usefixtures("loop")(FanOut.TestCase)


@pytest.fixture
def crowd(loop: FakeLoop) -> list[FakeConnection]:
    """As many clients as a flush waits for."""
    connections = [FakeConnection() for _ in range(datadivr._GATHER_CLIENTS)]
    for connection in connections:
        fake_client(connection)
    return connections


def test_a_single_message_is_written_in_the_next_turn(
    loop: FakeLoop, crowd: list[FakeConnection]
) -> None:
    datadivr._hub.publish("all", b"1")
    loop.turn()
    assert [connection.received for connection in crowd] == [[b"1"]] * len(crowd)


def test_a_flush_waits_while_the_turn_grows_for_eight_more_at_most(
    loop: FakeLoop, crowd: list[FakeConnection]
) -> None:
    datadivr._hub.publish("all", b"x")
    turns = 0
    while not crowd[0].received:
        datadivr._hub.publish("all", b"x")
        loop.turn()
        turns += 1
    assert turns == datadivr._GATHER_TURNS + 1


def test_a_turn_that_is_long_enough_does_not_wait(
    loop: FakeLoop, crowd: list[FakeConnection]
) -> None:
    datadivr._hub.publish("all", b"x")
    datadivr._hub.publish("all", b"x" * datadivr._GATHER_BYTES)
    loop.turn()
    assert len(crowd[0].received) == 2


def test_one_dead_client_does_not_stop_a_flush_for_the_rest(
    loop: FakeLoop, crowd: list[FakeConnection]
) -> None:
    crowd[3].closing = True
    datadivr._hub.publish("all", b"1")
    loop.turn()
    assert [len(connection.received) for connection in crowd].count(1) == len(crowd) - 1


def test_a_turn_larger_than_the_limit_drops_nobody_who_keeps_up(
    loop: FakeLoop, crowd: list[FakeConnection]
) -> None:
    for _ in range(2):
        datadivr._hub.publish("all", b"x" * (datadivr._settings().max_buffer_bytes + 1))
        loop.turn()
    assert len(datadivr.clients) == len(crowd)


def test_a_sweep_goes_on_after_one_that_failed(loop: FakeLoop, crowd: list[FakeConnection]) -> None:
    later: list[tuple[Any, ...]] = []
    loop.call_later = lambda *args: later.append(args)  # type: ignore[method-assign]
    crowd[0].is_closing = lambda: 1 // 0 == 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        datadivr._hub._sweep("", 0.0)
    assert later == [(datadivr._SWEEP_SECONDS, datadivr._hub._sweep, "", datadivr._SWEEP_SECONDS)]
    del crowd[0].is_closing


@promise("So do tests, and what wraps `receive`.")
def test_two_sessions_of_a_test_client_talk_to_each_other() -> None:
    with (
        TestClient(datadivr.app, headers=ADMIN) as client,
        client.websocket_connect("/ws") as one,
        client.websocket_connect("/ws") as other,
    ):
        one.send_json({"event_name": "whoami"})
        one_id = one.receive_json()["payload"]
        other.send_json({"event_name": "hello", "payload": 1})
        assert one.receive_json()["payload"] == 1
        other.send_json({"event_name": "hello", "payload": 2, "to": one_id})
        assert one.receive_json()["payload"] == 2
        answer = client.post("/messages", json={"event_name": "news"}).json()
        assert answer == {"recipients": 2, "partial": False}
        heard = one.receive_json()["event_name"], other.receive_json()["event_name"]
        assert heard == ("news", "news")
        assert client.delete(f"/clients/{one_id}").status_code == 204
        with pytest.raises(WebSocketDisconnect) as closed:
            one.receive_json()
        text = "Disconnected by an administrator"
        assert (closed.value.code, closed.value.reason) == (1008, text)
    assert datadivr.clients == {}


def test_a_second_event_loop_is_told_what_to_write() -> None:
    client = TestClient(datadivr.app, headers=ADMIN)
    with client.websocket_connect("/ws") as one:
        one.send_json({"event_name": "whoami"})  # an old Starlette is not there yet
        assert one.receive_json()["event_name"] == "whoami"
        with (
            pytest.raises(RuntimeError, match=r"write `with TestClient\(app\) as client:`"),
            client.websocket_connect("/ws"),
        ):
            pass
        one.send_json({"event_name": "whoami"})
        assert one.receive_json()["event_name"] == "whoami"
        answer = client.post("/messages", json={"event_name": "news"})  # in a loop of its own
        assert (answer.status_code, answer.json()["recipients"]) == (202, 1)
        assert one.receive_json()["event_name"] == "news"
    assert datadivr.clients == {}


def test_a_room_moves_on_from_a_loop_that_is_closed(loop: FakeLoop) -> None:
    fake_client(FakeConnection())
    loop.is_closed = lambda: True  # type: ignore[method-assign]
    with TestClient(datadivr.app) as client, client.websocket_connect("/ws") as session:
        session.send_json({"event_name": "whoami"})
        session.receive_json()
        assert len(datadivr.clients) == 1
    assert datadivr.clients == {}


@promise("no server runs in this process: use `POST /messages`")
def test_a_broadcast_in_a_process_without_a_server_says_so() -> None:
    log = run("""
        import asyncio
        import datadivr
        print(asyncio.run(datadivr.broadcast(datadivr.WebSocketMessage(event_name="news"))))
    """)
    assert "broadcast_to_nobody" in log
    assert "POST /messages" in log


@promise(
    "reaches the clients in the room `garden`, but not its sender",
    "`from_id` is then the client's id",
)
@promise("the name of a room (its clients, but the sender)")
def test_a_message_to_a_room_reaches_its_members_but_the_sender(
    connect: Connect, server: Process
) -> None:
    members = [connect(server, "/in?room=garden&room=kitchen") for _ in range(3)]
    stranger = connect(server, "/in?room=kitchen")
    sender_id = id_of(members[0])
    say(members[0], "m", payload=1, to="#garden")
    for member in members[1:]:
        assert hear(member) == message_from(sender_id, "m", "#garden", payload=1)
    assert [hear_all(client) for client in (*members, stranger)] == [[]] * 4


@promise("- Handlers, `broadcast` and `POST /messages` reach any room. A room without")
@promise("allowed to speak there. Handlers, `broadcast` and `POST /messages` reach any room.")
@pytest.mark.parametrize("name", ["publish", "reply"])
def test_a_handler_reaches_a_room_that_its_asker_is_not_in(
    connect: Connect, server: Process, name: str
) -> None:
    asker, member = connect(server), connect(server, "/in?room=garden")
    news: Json = {"event_name": "news", "payload": 1, "to": "#garden"}
    say(asker, name, payload=news)
    assert hear(member) == message_from("server", **news)
    assert hear_all(asker) == []


@promise("a room leaves that client out of what its handler returns, too")
def test_broadcast_reaches_all_members_and_an_answer_all_but_the_asker(
    connect: Connect, server: Process
) -> None:
    asker, member = connect(server, "/in?room=garden"), connect(server, "/in?room=garden")
    news: Json = {"event_name": "news", "payload": 1, "to": "#garden"}
    for name in ("publish", "reply"):
        say(asker, name, payload=news)
        assert hear(member) == message_from("server", **news)
        assert len(hear_all(asker)) == (name == "publish")


@promise("`broadcast` reaches any room: first check")
@promise("leaves out nobody, unless you write `sender=clients[message.from_id].websocket`")
def test_broadcast_to_a_room_returns_how_many_and_leaves_out_its_sender(
    connect: Connect, live: Live
) -> None:
    counts: list[int] = []

    @datadivr.websocket_handler("count")
    async def count(message: WebSocketMessage) -> None:
        websocket = datadivr.clients[message.from_id].websocket
        news = WebSocketMessage(event_name="news", to=message.payload)
        counts.extend([await datadivr.broadcast(news), await datadivr.broadcast(news, websocket)])

    member, other, stranger = connect(live), connect(live), connect(live)
    for client in (member, other):
        url = f"/clients/{id_of(client)}/rooms/garden"
        assert live.api.put(url).status_code == 204
    for client in (member, stranger):
        say(client, "count", payload="#garden")
        hear_all(client)
    say(stranger, "count", payload="#nobody-is-here")
    hear_all(stranger)
    assert counts == [2, 1, 2, 2, 0, 0]


@promise(
    "The server says who is in a room: a client cannot join by itself",
    "gets an `error` with the code `not_in_room`",
    "So does one that may only listen",
)
@promise(
    "Nobody else is in the room, and so no other client can send to it",
    "the sender is not in the room in `to`, or may only listen there",
    "A client that sends to a room must be in it, and allowed",
)
@pytest.mark.parametrize("way", ["never in", "left", "listens only", "removed", "asks in capitals"])
@pytest.mark.parametrize("event_name", ["m", "relay"])
def test_who_is_not_in_a_room_or_may_only_listen_cannot_send_there(
    connect: Connect, server: Process, way: str, event_name: str
) -> None:
    client, member = connect(server), connect(server, "/in?room=garden")
    client_id = id_of(client)
    url = f"/clients/{client_id}/rooms/garden"
    if way != "never in":
        say(client, "join", payload=["garden", way == "listens only"])
        assert hear_all(client) == []
    if way == "left":
        say(client, "leave", payload="garden")
    elif way == "removed":
        assert server.api.delete(url).status_code == 204
    to = "#GARDEN" if way == "asks in capitals" else "#garden"
    say(client, event_name, to=to, id=7)
    (answer,) = hear_all(client)
    text = answer["message"]
    assert text
    assert answer == error(client_id, "not_in_room", text, event_name=event_name, id=7)
    assert hear_all(member) == []
    say(member, "m", to="#garden")
    assert len(hear_all(member)) == 0
    heard = [message["event_name"] for message in hear_all(client)]
    assert heard == ["m"] * (way in ("listens only", "asks in capitals"))


@promise("To join twice, or to leave a room that a client is not in, does nothing.")
def test_joining_twice_and_leaving_what_one_is_not_in_change_nothing(
    connect: Connect, server: Process
) -> None:
    client, member = connect(server), connect(server, "/in?room=garden")
    client_id = id_of(client)
    for name, payload in [("leave", "garden"), ("join", ["garden"]), ("join", ["garden"])]:
        assert ask(client, name, payload=payload, id=7) == ok(client_id, 7)
    say(member, "m", to="#garden")
    assert hear(client)["event_name"] == "m"
    assert hear_all(client) == []  # once
    for _ in range(2):
        assert ask(client, "leave", payload="garden", id=7) == ok(client_id, 7)
    say(member, "m", to="#garden")
    assert hear_all(member) == hear_all(client) == []


def test_a_client_keeps_nothing_of_a_room_that_it_has_left(loop: FakeLoop) -> None:
    client = fake_client(FakeConnection())
    datadivr._hub.join_room(client, "garden", listen_only=True)
    datadivr._hub.leave_room(client, "garden")
    assert (client.rooms, client.silent_in) == (frozenset(), frozenset())


@promise("To join again with another `listen_only` changes that.")
def test_whoever_joins_again_may_speak_or_not_as_the_last_time_says(
    connect: Connect, server: Process
) -> None:
    client, member = connect(server), connect(server, "/in?room=garden")
    for listen_only in (True, False, True):
        say(client, "join", payload=["garden", listen_only])
        say(client, "m", to="#garden")
        assert len(hear_all(client)) == listen_only  # an error, or nothing
        assert len(hear_all(member)) == (not listen_only)
    say(client, "leave", payload="garden")
    say(client, "join", payload=["garden"])  # it begins anew
    say(client, "m", to="#garden")
    assert hear_all(client) == []
    assert len(hear_all(member)) == 1


@promise(
    "A client sees the messages of one sender in the order sent, whichever way they are addressed."
)
def test_messages_to_all_to_rooms_and_to_one_arrive_in_the_order_sent(
    connect: Connect, server: Process
) -> None:
    sender = connect(server, "/in?room=garden&room=kitchen")
    both, one = connect(server, "/in?room=garden&room=kitchen"), connect(server, "/in?room=garden")
    both_id = id_of(both)
    goals = ["#garden", "all", both_id, "#kitchen", "others"]
    for number in range(300):
        say(sender, "n", payload=number, to=goals[number % 5])
    assert [hear(both)["payload"] for _ in range(300)] == list(range(300))
    expected = [number for number in range(300) if number % 5 in (0, 1, 4)]
    assert [message["payload"] for message in hear_all(one)] == expected


@promise("All clients of a process see its messages in one order.")
def test_all_clients_see_one_order_whoever_speaks(connect: Connect, server: Process) -> None:
    speakers = [connect(server, "/in?room=garden") for _ in range(3)]
    listeners = [connect(server, "/in?room=garden") for _ in range(2)]
    for client in listeners:
        id_of(client)
    for number in range(100):
        for who, speaker in enumerate(speakers):
            to = ("#garden", "all", "others")[number % 3]
            say(speaker, "n", payload=[who, number], to=to)
    orders = [[hear(listener)["payload"] for _ in range(300)] for listener in listeners]
    assert orders[0] == orders[1]
    for who in range(3):
        assert [number for speaker, number in orders[0] if speaker == who] == list(range(100))


@promise("everything that this process publishes to the room reaches the client")
def test_whoever_has_joined_hears_all_that_is_published_from_then_on(
    connect: Connect, live: Live
) -> None:
    @datadivr.websocket_handler("come and go")
    async def come_and_go(message: WebSocketMessage) -> WebSocketMessage:
        number = itertools.count()

        async def publish() -> int:
            news = datadivr.create_message("n", next(number), "#garden")
            return await datadivr.broadcast(news)

        counts = [await publish()]
        await datadivr.join_room(message.from_id, "garden")
        counts.append(await publish())
        await datadivr.leave_room(message.from_id, "garden")
        counts.append(await publish())
        await datadivr.join_room(message.from_id, "garden")
        counts.append(await publish())
        return datadivr.create_message("counts", counts, message.from_id)

    client = connect(live)
    say(client, "come and go", id=7)
    heard = [(message["event_name"], message["payload"]) for message in hear_all(client)]
    assert heard == [("n", 1), ("n", 3), ("counts", [0, 1, 0, 1])]


@promise("The server keeps no messages")
def test_a_message_published_before_somebody_joins_is_not_for_it(
    loop: FakeLoop, crowd: list[FakeConnection]
) -> None:
    hub, (one, other) = datadivr._hub, list(datadivr.clients.values())[:2]
    for client, message in ((one, b"1"), (other, b"2")):
        hub.join_room(client, "garden")
        hub.publish("#garden", message)
    hub.leave_room(one, "garden")
    hub.publish("#garden", b"3")
    hub.flush()
    assert [connection.received for connection in crowd[:3]] == [[b"1", b"2"], [b"2", b"3"], []]


@promise(
    "shortest message that is compressed once for all clients",
    "in bytes that all clients share, compressed once",
)
def test_what_is_sent_to_a_room_is_framed_once_for_all_its_members(loop: FakeLoop) -> None:
    framed: list[bytes] = []

    def count(payload: bytes, *rest: int) -> bytes:
        framed.append(payload)
        return datadivr._frame_compressed(payload)

    connections = [FakeConnection(count) for _ in range(50)]
    for number, connection in enumerate(connections):
        client = fake_client(connection)
        datadivr._hub.join_room(client, f"half-{number % 2}")
        datadivr._hub.join_room(client, "garden")
    long = b"x" * 2000
    datadivr._hub.publish("#garden", long)
    datadivr._hub.publish("#half-0", long + b"0")
    datadivr._hub.publish("all", long + b"1")
    datadivr._hub.flush()
    assert sorted(framed) == sorted([long, long + b"0", long + b"1"])
    assert [len(connection.received) for connection in connections] == [3, 2] * 25
    assert {first for connection in connections for first in connection.firsts} == {0xC1}


def test_the_cost_of_many_rooms_of_one_grows_as_their_number_does(loop: FakeLoop) -> None:
    """Not as its square, as in a prototype."""
    for number in range(800):
        client = fake_client(FakeConnection())
        client.connection.write = lambda data: None  # type: ignore[method-assign]
        datadivr._hub.join_room(client, f"user:{number}")

    def seconds(rooms: int) -> float:
        start = time.process_time()
        for number in range(rooms):
            datadivr._hub.publish(f"#user:{number}", b"x" * 100)
        datadivr._hub.flush()
        return time.process_time() - start

    most, least = (min(seconds(rooms) for _ in range(9)) for rooms in (800, 100))
    assert most < 24 * least  # 8 would be in proportion, and 64 its square


@pytest.mark.parametrize("change", ["join_room", "leave_room"])
def test_a_client_that_a_flush_finds_gone_is_in_no_room(loop: FakeLoop, change: str) -> None:
    connections = FakeConnection(), FakeConnection()
    client, other = map(fake_client, connections)
    datadivr._hub.join_room(client if change == "leave_room" else other, "garden")
    datadivr._hub.publish("#garden", b"x")
    datadivr._hub.publish(client.id, b"x")
    connections[0].closing = True
    getattr(datadivr._hub, change)(client, "garden")
    assert client.id not in datadivr.clients
    members = {member for room in datadivr._hub.rooms.values() for member in room}
    assert client not in members


@promise(
    "can be awaited in any event loop of the process",
    "raise an `HTTPException`: 404 if no client has the id, 503 if its node does not answer",
)
@pytest.mark.parametrize("name", ["here", "elsewhere"])
def test_rooms_are_changed_and_listed_from_any_thread_and_loop(
    connect: Connect, server: Process, name: str
) -> None:
    """In the server's loop (a handler), and in one of its own (a thread)."""
    client = connect(server)
    client_id = id_of(client)

    def call(function: str, *arguments: Any) -> httpx.Response:
        url = f"{server.url}/call/{function}"
        return http.post(url, json=list(arguments), timeout=LIMIT)

    if name == "here":
        say(client, "join", payload=["garden"])
        listed = ask(client, "members", payload="garden")
        assert listed["payload"] == {client_id: ["garden"]}
        return
    assert call("join_room", client_id.upper(), "garden").json() is None
    page = call("list_clients", 100, "", "garden").json()
    assert [(found["id"], found["rooms"]) for found in page["clients"]] == [(client_id, ["garden"])]
    assert call("broadcast", "news", 1, "#garden").json() == 1
    assert hear(client) == message_from("server", "news", "#garden", payload=1)
    assert call("leave_room", client_id, "garden").status_code == 200
    assert call("broadcast", "news", 1, "#garden").json() == 0
    for function in ("join_room", "leave_room"):
        answer = call(function, "nobody", "garden")
        assert (answer.status_code, answer.json()["detail"]) == (
            404,
            "No client with this id is connected.",
        )
    assert call("disconnect_client", client_id).status_code == 200
    assert close_code(client) in (1008, None)  # granian may lose the close frame
    assert call("disconnect_client", client_id).status_code == 404


CONVERSATION = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(0, 3), st.sampled_from("abc"), st.booleans()),
        st.tuples(st.just("leave"), st.integers(0, 3), st.sampled_from("abc")),
        st.tuples(
            st.just("say"),
            st.integers(0, 3),
            st.sampled_from(["all", "others", "#a", "#b", "#c", "0", "1", "2", "3", "nobody"]),
            st.one_of(st.none(), st.integers(), st.text(max_size=3)),
        ),
    ),
    max_size=30,
)


class Conversation:
    """Four clients, one step after the other, and what a naive model says that each must hear."""

    def __init__(self, sockets: list[ClientConnection]) -> None:
        self.sockets = sockets
        self.ids = [id_of(socket) for socket in sockets]
        self.expected: list[list[Json]] = [[] for _ in sockets]
        self.rooms: list[dict[str, bool]] = [{} for _ in sockets]  # whether it may speak there

    def join(self, who: int, room: str, listen_only: bool) -> None:
        say(self.sockets[who], "change", payload=["join_room", room, listen_only])
        self.rooms[who][room] = not listen_only
        self.expected[who].append(message_from("server", "changed", self.ids[who]))

    def leave(self, who: int, room: str) -> None:
        say(self.sockets[who], "change", payload=["leave_room", room])
        self.rooms[who].pop(room, None)
        self.expected[who].append(message_from("server", "changed", self.ids[who]))

    def say(self, who: int, to: str, number: int | str | None) -> None:
        to = self.ids[int(to)] if to.isdigit() else to
        keys = {} if number is None else {"id": number}
        say(self.sockets[who], "m", to=to, **keys)
        relayed = message_from(self.ids[who], "m", to)
        if to in self.ids:
            self.expected[self.ids.index(to)].append(relayed | keys)
            return
        code = "unknown_recipient" if to == "nobody" else ""
        if to[0] == "#" and not self.rooms[who].get(to[1:]):
            code = "not_in_room"
        if code:
            told = error(self.ids[who], code, "", event_name="m", **keys)
            self.expected[who].append(told)
            return
        for other, rooms in enumerate(self.rooms):
            is_there = to[0] != "#" or to[1:] in rooms
            if is_there and (other != who or to == "all"):
                self.expected[other].append(relayed)
        if number is not None:
            self.expected[who].append(ok(self.ids[who], number))

    def check(self, who: int) -> None:
        """Have a client hear all up to now: its last step is over, then."""
        heard = hear_all(self.sockets[who])
        told = [
            message | {"message": ""} if message["event_name"] == "error" else message
            for message in heard
        ]
        assert told == self.expected[who]
        self.expected[who].clear()


@promise(
    "A message reaches every client that it is for, that is connected and that reads. "
    "Nothing is kept for others."
)
@hypothesis.settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(CONVERSATION)
def test_any_conversation_is_heard_as_a_naive_model_says(live: Live, steps: list[Any]) -> None:
    @datadivr.websocket_handler("change")
    async def change(message: WebSocketMessage) -> WebSocketMessage:
        name, *arguments = message.payload
        await getattr(datadivr, name)(message.from_id, *arguments)
        return datadivr.create_message("changed", None, message.from_id)

    with contextlib.ExitStack() as stack:
        url = live.ws
        conversation = Conversation([stack.enter_context(dial(url)) for _ in range(4)])
        for kind, who, *rest in steps:
            getattr(conversation, kind)(who, *rest)
            conversation.check(who)
        for who in range(4):
            conversation.check(who)


def test_a_broadcast_from_any_thread_reaches_the_servers_clients(
    connect: Connect, server: Process
) -> None:
    client = connect(server)
    id_of(client)
    for _ in range(3):
        assert http.post(f"{server.url}/tell_from_a_thread").json() == 1
    assert [message["payload"] for message in hear_all(client)] == [2, 2, 2]


def test_what_is_called_from_another_loop_answers_as_in_the_servers(
    connect: Connect, live: Live
) -> None:
    client, other = connect(live), connect(live)
    client_id = id_of(client)
    assert in_a_thread(datadivr.broadcast(datadivr.create_message("news", 1, "all"))) == 2
    assert in_a_thread(datadivr.broadcast(datadivr.create_message("news", 2, client_id))) == 1
    assert [hear(client)["payload"] for _ in range(2)] == [1, 2]
    with pytest.raises(PydanticSerializationError):
        in_a_thread(datadivr.broadcast(datadivr.create_message("news", object(), "all")))
    with pytest.raises(fastapi.HTTPException) as refused:
        in_a_thread(datadivr.disconnect_client(f"{client_id[:-1]}!"))
    assert refused.value.status_code == 404
    in_a_thread(datadivr.disconnect_client(client_id))
    assert close_code(client) == 1008
    assert hear(other)["payload"] == 1
    assert id_of(other)


@promise("They do their work in the server's own")
def test_a_call_from_another_loop_while_nobody_is_connected_moves_nothing(
    connect: Connect, live: Live
) -> None:
    for _ in range(2):
        assert in_a_thread(datadivr.broadcast(datadivr.create_message("news", 1, "all"))) == 0
    client = connect(live)
    say(client, "m", to="all")
    assert hear(client)["event_name"] == "m"
    assert in_a_thread(datadivr.broadcast(datadivr.create_message("news", 1, "all"))) == 1
    assert [message["event_name"] for message in hear_all(client)] == ["news"]


def test_where_no_server_runs_a_call_says_so_and_comes_back(tmp_path: Path) -> None:
    script = """
        import asyncio
        import datadivr
        from fastapi.testclient import TestClient

        BEFORE
        news = datadivr.create_message("news", None, "all")
        print(asyncio.run(asyncio.wait_for(datadivr.broadcast(news), 5)))
        try:
            asyncio.run(asyncio.wait_for(datadivr.disconnect_client("x"), 5))
        except Exception as error:
            print(error.status_code, error.detail)
    """
    befores = ["", "with TestClient(datadivr.app): pass"]
    outputs = run_each([(script.replace("BEFORE", code), {}) for code in befores], tmp_path / "out")
    for status, output in outputs:
        assert status == 0, output
        *lines, count, refusal = output.splitlines()
        (line,) = (line for line in lines if "broadcast_to_nobody" in line)
        assert "POST /messages" in line
        assert count == "0"
        assert refusal == "503 No server runs in this process."


def test_a_broadcast_of_a_thread_that_comes_in_the_loops_last_turn_does_not_hang() -> None:
    assert "answers: [0]" in run("""
        import asyncio, threading
        import datadivr

        begun, arrived, answers = threading.Event(), threading.Event(), []

        def publish():
            begun.wait(10)
            news = datadivr.create_message("news", None, "all")
            answers.append(asyncio.run(datadivr.broadcast(news)))

        async def turn():
            datadivr._hub.enter()
            begun.set()
            arrived.wait(10)

        loop = asyncio.new_event_loop()
        call_soon_threadsafe = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *call: (call_soon_threadsafe(*call), arrived.set())
        thread = threading.Thread(target=publish, daemon=True)
        thread.start()
        loop.run_until_complete(turn())
        loop.close()
        thread.join(10)
        print("answers:", answers)
    """)


@promise("A client that reads is not dropped for one message that is larger than the limit.")
def test_who_reads_a_message_larger_than_the_buffer_is_not_dropped_for_it(
    connect: Connect, live: Live, configure: Callable[..., None]
) -> None:
    configure(max_buffer_bytes=100_000)
    talker = connect(live)
    with raw_client(live, buffer=4096) as reader:
        reader_id = id_of(reader)
        client = datadivr.clients[reader_id]

        def send(size: int) -> None:
            in_a_thread(datadivr.broadcast(datadivr.create_message("big", "x" * size, reader_id)))

        send(12_000_000)
        assert client.buffered_bytes > 1_000_000
        read = marks = 0
        while marks < 20:
            if read > 600_000 * (marks + 1):
                marks += 1
                say(talker, "m", to=reader_id)
                assert hear_all(talker) == []  # such as an error, since nobody has that id
            read += len(reader.recv(1 << 16))
        assert datadivr.clients.get(reader_id) is client  # and nobody has told it to go
        while read < 12_000_000 + 20 * 50:
            read += len(reader.recv(1 << 16))
        send(12_000_000)  # which it does not read
        for _ in range(20):
            send(1_000_000)
        wait_until(lambda: reader_id not in datadivr.clients, "its end")


@promise("must be at least that, or the log has `small_buffer`")
def test_a_buffer_smaller_than_a_message_is_named_at_the_start(tmp_path: Path) -> None:
    script = """
        import datadivr
        from fastapi.testclient import TestClient
        with TestClient(datadivr.app):
            pass
    """
    cases: list[dict[str, str]] = [{}, {"DATADIVR_MAX_BUFFER_BYTES": "1000"}]
    cases += [{"DATADIVR_MAX_MESSAGE_BYTES": "9999999"}]
    outputs = run_each([(script, case) for case in cases], tmp_path / "out")
    for case, (status, output) in zip(cases, outputs, strict=True):
        assert status == 0, output
        lines = [line for line in output.splitlines() if "small_buffer" in line]
        assert len(lines) == bool(case)
        for name in ("DATADIVR_MAX_BUFFER_BYTES", "DATADIVR_MAX_MESSAGE_BYTES") if case else ():
            assert name in lines[0]


@promise("the client's network is too slow for what you send, or its code blocks")
def test_a_slow_client_is_named_once_with_the_setting_that_decides(
    live: Live, records: Records, configure: Callable[..., None]
) -> None:
    configure(max_buffer_bytes=100_000)
    with raw_client(live, buffer=4096) as stalled:
        id_of(stalled)
        for _ in range(20):
            in_a_thread(datadivr.broadcast(datadivr.create_message("fill", "x" * 900_000, "all")))
        wait_until(lambda: not datadivr.clients, "it to be dropped")
        ((told),) = records.named("slow_client_dropped", logging.DEBUG)
        assert "DATADIVR_MAX_BUFFER_BYTES" in str(told)


def test_who_was_disconnected_is_not_dropped_as_slow_too(
    live: Live,
    ended: Callable[[], dict[str, float]],
    records: Records,
    configure: Callable[..., None],
) -> None:
    configure(max_buffer_bytes=100_000)

    @datadivr.websocket_handler("leave")
    async def leave(message: WebSocketMessage) -> None:
        fill = datadivr.create_message("fill", "x" * 9_000_000, message.from_id)
        await datadivr.broadcast(fill)
        await datadivr.disconnect_client(message.from_id)

    with raw_client(live, buffer=4096) as stalled:
        id_of(stalled)
        stalled.sendall(masked('{"event_name": "leave"}'))
        with contextlib.suppress(OSError):
            for _ in range(500):
                stalled.sendall(masked('{"event_name": "m"}') * 20)
        wait_until(lambda: not live.connections, "its end")
    assert records.named("slow_client_dropped", logging.DEBUG) == []
    assert ended() == {"admin": 1}


@promise("If the connection ends first, no answer comes. If the")
@promise(
    "it does not say that anybody has received it. If the connection ends first, no answer comes"
)
def test_who_leaves_before_its_own_answer_makes_no_error(
    connect: Connect, live: Live, records: Records
) -> None:
    began, over, ended = threading.Event(), threading.Event(), threading.Event()

    @datadivr.websocket_handler("slow")
    async def slow(message: WebSocketMessage) -> WebSocketMessage:
        began.set()
        await asyncio.to_thread(over.wait, LIMIT)
        return datadivr.create_message("slow", None, message.from_id)

    @datadivr.websocket_handler("$disconnect")
    async def went(message: WebSocketMessage) -> None:
        ended.set()

    name = 'errors_total{type="unknown_recipient"}'
    before = metrics(live)[name]
    client = connect(live)
    client_id = id_of(client)
    say(client, "slow")
    assert began.wait(LIMIT)
    live.api.delete(f"/clients/{client_id}")
    over.set()
    assert ended.wait(LIMIT)
    with dial(live.ws) as hasty:
        for _ in range(200):
            say(hasty, "whoami")
    wait_until(lambda: not datadivr.clients, "its end")
    assert metrics(live)[name] == before
    assert records.named("unknown_recipient", logging.DEBUG) == []
    ask(connect(live), "m", to=client_id)  # somebody else who has left
    assert metrics(live)[name] == before + 1


@promise(
    "Swift writes UUIDs in capitals, which is no problem: ids compare without case",
    "and in `clients[id]` and `clients.get(id)`, ids compare without case.",
)
def test_ids_compare_without_case(connect: Connect, server: Process) -> None:
    sender, receiver = connect(server), connect(server)
    client_id = id_of(receiver).upper()
    say(sender, "m", to=client_id)
    assert hear(receiver)["event_name"] == "m"
    news = {"event_name": "news", "to": client_id}
    answer = server.api.post("/messages", json=news).json()
    assert answer == {"recipients": 1, "partial": False}
    assert hear(receiver)["event_name"] == "news"
    assert server.api.get(f"/clients/{client_id}").json()["id"] == client_id.lower()
    assert server.api.delete(f"/clients/{client_id}").status_code == 204
    with pytest.raises(ConnectionClosed):
        receiver.recv(timeout=LIMIT)


def test_a_hub_that_moves_to_another_loop_leaves_its_rooms_behind(loop: FakeLoop) -> None:
    datadivr._hub.join_room(fake_client(FakeConnection()), "garden")
    loop.is_closed = lambda: True  # type: ignore[method-assign]
    with TestClient(datadivr.app) as client, client.websocket_connect("/ws"):
        assert datadivr._hub.rooms == {}


# ---- The WebSocket endpoint: `pytest -m endpoint` ------------------------------------------------


@promise(
    "`$connect` happens when a client connects",
    "`$connect` runs for each connection, so also when a page comes back after a loss",
)
@promise("`$connect` and `$disconnect` run for a client that came or went.")
def test_connect_and_disconnect_handlers_run_for_each_client(connect: Connect, live: Live) -> None:
    @datadivr.websocket_handler("$connect")
    async def came(message: WebSocketMessage) -> WebSocketMessage:
        return WebSocketMessage(event_name="came", payload=message.from_id)

    @datadivr.websocket_handler("$disconnect")
    async def went(message: WebSocketMessage) -> WebSocketMessage:
        return WebSocketMessage(event_name="went", payload=message.from_id)

    watcher, guest = connect(live), connect(live)
    guest_id = id_of(guest)
    guest.close()
    heard = [hear(watcher) for _ in range(2)]
    assert [(message["event_name"], message["payload"]) for message in heard] == [
        ("came", guest_id),
        ("went", guest_id),
    ]


FIRST_AND_LAST = """`$connect` ends before the client's first message is handled, and
    `$disconnect` runs after its last."""


@promise(FIRST_AND_LAST)
def test_a_clients_first_message_waits_for_the_end_of_its_connect_handler(
    connect: Connect, live: Live
) -> None:
    seen: list[str] = []
    began, go = threading.Event(), threading.Event()

    @datadivr.websocket_handler("$connect")
    def came(message: WebSocketMessage) -> None:
        seen.append("$connect begins")
        began.set()
        go.wait(LIMIT)
        seen.append("$connect ends")

    @datadivr.websocket_handler("m")
    async def handle(message: WebSocketMessage) -> None:
        seen.append("message")

    client = connect(live)
    say(client, "m")
    assert began.wait(LIMIT)
    for _ in range(3):  # turns of the loop in which the message could be handled
        assert total(live) == 1
    assert seen == ["$connect begins"]
    go.set()
    hear_all(client)
    assert seen == ["$connect begins", "$connect ends", "message"]


@promise(FIRST_AND_LAST)
def test_a_disconnect_handler_waits_for_the_end_of_the_clients_last_message(
    connect: Connect, live: Live
) -> None:
    seen: list[str] = []
    began, go, gone = threading.Event(), threading.Event(), threading.Event()

    @datadivr.websocket_handler("m")
    def handle(message: WebSocketMessage) -> None:
        began.set()
        go.wait(LIMIT)
        seen.append("message")

    @datadivr.websocket_handler("$disconnect")
    async def went(message: WebSocketMessage) -> None:
        seen.append("$disconnect")
        gone.set()

    client = connect(live)
    client_id = id_of(client)
    say(client, "m")
    assert began.wait(LIMIT)
    live.api.delete(f"/clients/{client_id}")
    assert close_code(client) == 1008
    assert total(live) == 0
    assert seen == []
    go.set()
    assert gone.wait(LIMIT)
    assert seen == ["message", "$disconnect"]


@promise("A handler reads what your [log-in function](#let-users-log-in) put on `websocket.state`")
def test_handlers_read_and_write_what_is_known_of_a_client_up_to_its_disconnect(
    connect: Connect, server: Process
) -> None:
    watcher, *others = [
        connect(server, "/ws?room=7", additional_headers={"X-Kind": "human"}) for _ in range(3)
    ]
    users = dict(zip(("Ada", "Bob"), others, strict=True))
    for user, client in users.items():
        assert ask(client, "log_in", payload=user)["payload"] == "human7"
    for user, client in users.items():
        url = f"/clients/{id_of(client)}"
        assert server.api.get(url).json()["user"] == user
    for user, client in users.items():
        client.close()
        assert hear(watcher)["payload"] == [user, False]


@promise("A handler may close its client: `await clients[message.from_id].websocket.close()`")
@needs_sansio
def test_a_handler_that_closes_its_clients_websocket_itself_is_in_nobodys_way(
    connect: Connect, live: Live
) -> None:
    began, over = threading.Event(), threading.Event()

    @datadivr.websocket_handler("bye")
    async def bye(message: WebSocketMessage) -> None:
        await datadivr.clients[message.from_id].websocket.close(4000, "bye")
        began.set()
        await asyncio.to_thread(over.wait, LIMIT)

    other = connect(live)
    with raw_client(live) as client:  # which does not answer the close frame
        client_id = id_of(client)
        client.sendall(masked('{"event_name": "bye"}'))
        assert began.wait(LIMIT)
        url = f"/clients/{client_id}"
        assert live.api.delete(url).status_code == 404  # it has left already
        say(other, "m", to="all")
        assert hear(other)["event_name"] == "m"
        over.set()
        ((first, payload),) = unframe(client.recv(4096))
        assert (first, payload) == (0x88, struct.pack("!H", 4000) + b"bye")


def test_a_handler_finds_its_client_though_that_has_left_meanwhile(
    connect: Connect, live: Live
) -> None:
    began, left = threading.Event(), threading.Event()
    found = []

    @datadivr.websocket_handler("long")
    async def long(message: WebSocketMessage) -> None:
        began.set()
        await asyncio.to_thread(left.wait, LIMIT)
        found.append(datadivr.clients[message.from_id].id)

    client = connect(live)
    client_id = id_of(client)
    say(client, "long")
    assert began.wait(LIMIT)
    live.api.delete(f"/clients/{client_id}")
    assert client_id not in datadivr.clients
    left.set()
    wait_until(lambda: found == [client_id], "the handler")
    wait_until(lambda: client_id not in datadivr.clients.left, "it to be forgotten")
    with pytest.raises(KeyError):
        datadivr.clients[client_id]


def test_what_a_client_says_before_it_closes_is_heard(connect: Connect, server: Process) -> None:
    listener = connect(server)
    id_of(listener)
    with dial(server.ws) as client:
        say(client, "slow", payload=0.1)
        for number in range(100):
            say(client, "m", payload=number)
    assert [hear(listener)["payload"] for _ in range(100)] == list(range(100))


def test_a_flood_from_one_client_leaves_the_others_their_turn(
    server: Process, connect: Connect
) -> None:
    talker, listener = connect(server), connect(server)
    listener_id = id_of(listener)
    id_of(talker)
    end = masked(json.dumps({"event_name": "end of the flood", "to": listener_id}))
    with raw_client(server) as flooder:
        os.killpg(server.popen.pid, signal.SIGSTOP)  # it finds both when it goes on
        try:
            flooder.sendall(masked('{"event_name": "x", "to": "nobody"}') * 5000 + end)
            say(talker, "ping", to=listener_id)
        finally:
            os.killpg(server.popen.pid, signal.SIGCONT)
        assert [hear(listener)["event_name"] for _ in range(2)] == ["ping", "end of the flood"]


@promise("Names that begin with `$` are the server's own")
@promise(
    "those that begin with `$` are the server's own",
    "it is not a message; the sentence names the field and what was expected",
)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "message: Invalid JSON: EOF"),
        ("{", "message: Invalid JSON: EOF"),
        ("[]", "message: Input should be an object"),
        ("null", "message: Input should be an object"),
        ("{}", "event_name: Field required"),
        ('{"event_name": 5}', "event_name: Input should be a valid string"),
        ('{"event_name": ""}', "event_name: String should have at least 1 character"),
        (
            json.dumps({"event_name": "x" * 129}),
            "event_name: String should have at most 128 characters",
        ),
        ('{"event_name": "$connect"}', "event_name: String should match pattern"),
        ('{"event_name": "x", "to": null}', "to: Input should be a valid string"),
        ('{"event_name": "x", "from_id": 5}', "from_id: Input should be a valid string"),
        ('{"event_name": "x", "message": []}', "message: Input should be a valid string"),
        ('{"event_name": "x", "payload": "\\ud800"}', "message: Invalid JSON: "),
        (
            '{"event_name": "x", "payload": ' + "[" * 500 + "]" * 500 + "}",
            "message: Invalid JSON: recursion limit",
        ),
        (b'{"event_name": "\xff"}', "message: Invalid JSON: invalid unicode"),
        (b"", "message: Invalid JSON: EOF"),
    ],
)
def test_what_is_not_a_message_gets_an_error_that_names_the_field(
    connect: Connect, server: Process, text: str | bytes, expected: str
) -> None:
    client = connect(server)
    client_id = id_of(client)
    client.send(text)
    answer = hear(client)
    known = {key: name for key, name in answer["payload"].items() if key == "event_name"}
    assert answer == error(client_id, "invalid_message", answer["message"], **known)
    assert all(json.dumps(name) in str(text) for name in known.values())
    assert answer["message"].startswith(expected)
    assert id_of(client) == client_id


@promise(
    "a longer one closes its connection with 1009. `DATADIVR_MAX_BUFFER_BYTES`",
    "| 1009 | a message longer than `DATADIVR_MAX_MESSAGE_BYTES` |",
)
@pytest.mark.parametrize("kind", [str, str.encode])
@pytest.mark.parametrize("text", ["x" * (1 << 20), "é" * (1 << 19)], ids=["ascii", "other"])
def test_a_message_over_the_limit_closes_its_connection(
    connect: Connect, server: Process, text: str, kind: Callable[[str], str | bytes]
) -> None:
    client, bystander = connect(server), connect(server)
    client.send(kind(json.dumps({"event_name": "big", "payload": text}, ensure_ascii=False)))
    assert close_code(client) == 1009
    assert id_of(bystander)


def test_a_client_that_floods_yields_after_16_messages(loop: FakeLoop) -> None:
    async def flood() -> list[int]:
        waiting, received, seen = 160, [], []
        connection = FakeConnection()

        async def receive() -> Json:
            nonlocal waiting
            waiting -= 1
            received.append(waiting)
            if waiting < 0:
                return {"type": "end"}
            return {"type": "websocket.receive", "text": '{"event_name": "x"}'}

        connection.receive = receive  # type: ignore[attr-defined]
        client = fake_client(connection)
        client.task = serving = asyncio.create_task(datadivr._read_messages(client))
        while not serving.done():
            seen.append(len(received))
            await asyncio.sleep(0)
        return seen

    seen = in_a_thread(flood())
    assert {later - earlier for earlier, later in itertools.pairwise(seen)} <= {1, 16}
    assert len(seen) >= 10


@pytest.mark.parametrize("name", ["uvicorn", "granian"])
def test_clients_that_come_at_once_do_not_exceed_the_limit(tmp_path: Path, name: str) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(APPLICATION))
    with (
        Process(*SERVERS[name], cwd=tmp_path, DATADIVR_MAX_CLIENTS="3") as process,
        contextlib.ExitStack() as stack,
    ):
        process.wait_until_up()
        statuses: list[bytes] = []

        def come() -> None:
            client = stack.enter_context(
                socket.create_connection(("127.0.0.1", process.port), LIMIT)
            )
            client.sendall(UPGRADE)
            statuses.append(client.recv(12))

        threads = [threading.Thread(target=come) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert sorted(statuses) == [b"HTTP/1.1 101"] * 3 + [b"HTTP/1.1 503"] * 17


@promise(
    "set `DATADIVR_MAX_CLIENTS` and `DATADIVR_MAX_MESSAGES_PER_SECOND`.",
    "503 (`DATADIVR_MAX_CLIENTS`), or what your own function raises",
    "clients connected at once, the next is refused with 503; 0 is no limit",
)
def test_clients_over_the_limit_are_refused_until_one_goes(
    connect: Connect, live: Live, configure: Callable[..., None]
) -> None:
    configure(max_clients=1)
    first = connect(live)
    with pytest.raises(InvalidStatus) as refused:
        connect(live)
    assert refused.value.response.status_code == 503
    first.close()
    wait_until(lambda: not datadivr.clients, "the first client to go")
    assert id_of(connect(live))


@promise(
    "Programs that are no browser send no `Origin`, and need not be listed",
    "those of the server's own host and port",
    "is refused with 403 until it is listed",
    "`*` allows any page.",
    "origins of pages besides the server's own, by commas",
)
@pytest.mark.parametrize(
    ("origin", "host", "allowed", "status"),
    [
        (None, "a.example", (), None),
        ("http://a.example", "a.example", (), None),
        ("http://A.example:8000", "a.example:8000", (), None),
        ("https://a.example", "a.example:443", (), None),
        ("http://a.example:8001", "a.example:8000", (), 403),
        ("http://b.example", "a.example", (), 403),
        ("null", "a.example", (), 403),
        ("", "a.example", (), 403),
        ("http://[a.example", "a.example", (), 403),
        ("chrome-extension://a.example", "a.example", (), 403),
        ("https://B.example", "a.example", ("https://b.example",), None),
        ("http://b.example", "a.example", ("https://b.example",), 403),
        ("null", "a.example", ("*",), None),
    ],
)
def test_a_foreign_page_is_refused_unless_its_origin_is_listed(
    configure: Callable[..., None],
    origin: str | None,
    host: str,
    allowed: tuple[str, ...],
    status: int | None,
) -> None:
    configure(allowed_origins=allowed)
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    assert refusal(headers) == status


def refusal(headers: Any = None, subprotocols: list[str] | None = None) -> int | None:
    """Connect through a TestClient and return the status of the refusal, or None."""
    client = TestClient(datadivr.app)
    try:
        with client.websocket_connect(
            "/ws", headers=headers or {}, subprotocols=subprotocols
        ) as websocket:
            chosen = "bearer" if subprotocols and subprotocols[0] == "bearer" else None
            assert websocket.accepted_subprotocol == chosen
            return None
    except WebSocketDenialResponse as denied:
        return denied.status_code


@promise('Without `client.js` it is `new WebSocket(url, ["bearer", token])`')
@promise(
    "It brings a token in the header `Authorization: Bearer ...`",
    "Connections are refused with 401 (no token, or a wrong one)",
)
@pytest.mark.parametrize(
    ("headers", "subprotocols", "status"),
    [
        (None, None, 401),
        ({"Authorization": "Bearer wrong"}, None, 401),
        ({"Authorization": "Basic let-me-in"}, None, 401),
        ({"Authorization": b"Bearer \xe9"}, None, 401),
        (None, ["bearer"], 401),
        (None, ["bearer", "wrong"], 401),
        (None, ["other", "let-me-in"], 401),
        ({"Authorization": "bearer let-me-in"}, None, None),
        (None, ["bearer", "let-me-in"], None),
    ],
)
def test_a_client_without_the_token_is_refused(
    configure: Callable[..., None],
    headers: dict[str, str] | None,
    subprotocols: list[str] | None,
    status: int | None,
) -> None:
    configure(client_token="let-me-in")
    assert refusal(headers, subprotocols) == status


def test_a_refusal_comes_before_the_upgrade_and_says_why(server: Process) -> None:
    with pytest.raises(InvalidStatus) as refused:
        dial(server.ws, origin=Origin("http://evil.example"))
    assert refused.value.response.status_code == 403
    assert json.loads(refused.value.response.body or b"") == {
        "detail": "Origin http://evil.example is not allowed."
    }
    wait_until(lambda: "DATADIVR_ALLOWED_ORIGINS" in server.log, "the log's hint")
    assert "without completing handshake" not in server.log


def test_a_refused_token_is_asked_for(configure: Callable[..., None]) -> None:
    configure(client_token="let-me-in")
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        TestClient(datadivr.app).websocket_connect("/ws"),
    ):
        pass
    assert denied.value.headers["www-authenticate"] == "Bearer"


@promise("`websocket_endpoint(websocket)` | the same after `authorize_client`")
@needs_refusals
def test_websocket_endpoint_authorizes_wherever_it_is_mounted(
    configure: Callable[..., None],
) -> None:
    configure(client_token="let-me-in")
    host = fastapi.FastAPI()
    host.websocket("/mine")(datadivr.websocket_endpoint)
    client = TestClient(host)
    with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/mine"):
        pass
    with client.websocket_connect(
        "/mine", headers={"Authorization": "Bearer let-me-in"}
    ) as websocket:
        websocket.send_json({"event_name": "whoami"})
        assert websocket.receive_json()["event_name"] == "whoami"


def test_a_client_that_went_rudely_leaves_the_registry(live: Live, connect: Connect) -> None:
    rude = raw_client(live)
    wait_until(lambda: datadivr.clients, "the client")
    rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rude.close()
    wait_until(lambda: not datadivr.clients, "its end")


garbage = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5)
        ),
        max_leaves=20,
    ).map(json.dumps),
    st.fixed_dictionaries(
        {
            "event_name": st.sampled_from(
                ["m", "double", "sum_event", "whoami", "broken", "$connect", "", 5]
            )
        },
        optional={
            "payload": st.integers() | st.text(max_size=20) | st.lists(st.floats()),
            "to": st.sampled_from(["nobody", "", 5]),
            "message": st.none() | st.text(max_size=20) | st.integers(),
        },
    ).map(json.dumps),
)


def test_whatever_a_client_sends_the_server_lives_and_bystanders_lose_nothing(
    server: Process, connect: Connect
) -> None:
    noisy, one, other = connect(server), connect(server), connect(server)
    other_id = id_of(other)

    @hypothesis.settings(
        max_examples=50, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.lists(garbage, max_size=10), st.integers())
    def drive(sent: list[str | bytes], number: int) -> None:
        for thing in sent:
            if "to" in json_of(thing) or "event_name" not in json_of(
                thing
            ):  # or the bystanders would get it
                noisy.send(thing)
        say(one, "talk", payload=number, to=other_id)
        while (heard := hear(other))["event_name"] != "talk":
            assert heard["from_id"] != "server"
        assert heard["payload"] == number

    def json_of(thing: str | bytes) -> Json:
        with contextlib.suppress(ValueError):
            value = json.loads(thing)
            if isinstance(value, dict):
                return value
        return {}

    drive()
    wait_until(lambda: total(server) == 3, "the registry to be right")


@promise("serves a client in a WebSocket route of yours, and asks nobody who it is")
@needs_refusals
def test_the_limit_on_clients_holds_through_every_door(configure: Callable[..., None]) -> None:
    configure(max_clients=1)
    host = fastapi.FastAPI()

    @host.websocket("/mine")
    async def endpoint(websocket: fastapi.WebSocket) -> None:
        await datadivr.handle_connection(websocket)

    with TestClient(host) as client, client.websocket_connect("/mine"):
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/mine"):
            pass
        assert denied.value.status_code == 503


@promise(
    "So a page that comes in there is let in only if its host is `localhost`, an address, or listed"
)
@pytest.mark.parametrize(
    ("origin", "host", "local", "status"),
    [
        ("http://evil.example:8000", "evil.example:8000", "127.0.0.1", 403),
        ("http://evil.example:8000", "evil.example:8000", "::1", 403),
        ("http://evil.example:8000", "evil.example:8000", "::ffff:127.0.0.1", 403),
        ("http://evillocalhost:8000", "evillocalhost:8000", "127.0.0.1", 403),
        ("http://evil.example:8000", "evil.example:8000", "192.0.2.7", None),
        ("http://localhost:8000", "localhost:8000", "127.0.0.1", None),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "127.0.0.1", None),
        ("http://[::1]:8000", "[::1]:8000", "::1", None),
        ("https://listed.example", "listed.example", "127.0.0.1", None),
        ("http://a.localhost:8000", "a.localhost:8000", "127.0.0.1", None),
    ],
)
def test_a_name_that_points_to_loopback_is_no_host_of_ours(
    configure: Callable[..., None], origin: str, host: str, local: str, status: int | None
) -> None:
    configure(allowed_origins=("https://listed.example",))
    headers = [(b"origin", origin.encode()), (b"host", host.encode())]
    scope: Json = {"type": "websocket", "headers": headers, "server": (local, 8000)}
    websocket = fastapi.WebSocket(scope, None, None)  # type: ignore[arg-type]
    if status is None:
        in_a_thread(datadivr.authorize_client(websocket))
    else:
        with pytest.raises(fastapi.HTTPException) as refused:
            in_a_thread(datadivr.authorize_client(websocket))
        assert refused.value.status_code == status


@pytest.mark.parametrize("origin", ["ws://a.example", "wss://a.example:443", "https://A.example"])
def test_a_native_client_may_send_the_servers_own_address_as_its_origin(origin: str) -> None:
    assert refusal({"Host": "a.example", "Origin": origin}) is None


def test_a_bearer_may_offer_a_version_beside_its_token(configure: Callable[..., None]) -> None:
    configure(client_token="let-me-in")
    assert refusal(None, ["bearer", "let-me-in", "v1"]) is None


def test_clients_that_come_one_after_another_all_get_their_messages(
    server: Process, connect: Connect
) -> None:
    for number in range(30):
        with dial(server.ws) as client:
            assert ask(client, "m", payload=number, to="all")["payload"] == number


def test_a_connection_that_is_cut_as_it_is_accepted_has_both_events_or_none(
    live: Live, registry: None
) -> None:
    counts = {"$connect": 0, "$disconnect": 0}
    for name in counts:

        @datadivr.websocket_handler(name)
        async def count(message: WebSocketMessage, name: str = name) -> None:
            counts[name] += 1

    for _ in range(30):
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(UPGRADE)
    with dial(live.ws) as last:  # it comes after them
        id_of(last)
    wait_until(lambda: not live.server.server_state.tasks, "their end")
    assert counts["$connect"] >= 1
    assert counts["$connect"] == counts["$disconnect"]


@promise(
    "from the same machine, those whose `Host` is `localhost`, an address or listed",
    "`Host` must be `localhost`, an address, or the host of a listed origin. Any other is"
    " refused with 403",
)
def test_metrics_are_not_for_a_name_that_points_to_loopback(
    live: Live, configure: Callable[..., None]
) -> None:
    configure(allowed_origins=("https://listed.example",))
    url = f"{live.url}/metrics"
    hosts = {"evil.example:8000": 403, "localhost:8000": 200, "listed.example": 200, "[::1]": 200}
    for host, status in hosts.items():
        assert http.get(url, headers={"Host": host}).status_code == status


@promise("On any other address, and on a socket, everybody can read it.")
def test_the_metrics_are_for_any_name_of_another_address_and_of_a_socket(tmp_path: Path) -> None:
    headers = {"Host": "evil.example"}
    with TestClient(datadivr.app, base_url="http://192.0.2.7") as client:
        assert client.get("/metrics", headers=headers).status_code == 200
    command = ["-m", "uvicorn", "datadivr:app", "--uds", str(tmp_path / "socket")]
    with Process(*command) as process:
        wait_until(lambda: "running on" in process.log, "the server to start", 3 * LIMIT)
        with httpx.Client(transport=httpx.HTTPTransport(uds=command[-1])) as client:
            assert client.get("http://evil.example/metrics").status_code == 200


@promise("What only the server may say, a page believes if `from_id` is `server`.")
@pytest.mark.parametrize("way", ["no handler", "a handler", "$default"])
def test_a_client_cannot_pass_for_the_server(connect: Connect, live: Live, way: str) -> None:
    async def relay(message: WebSocketMessage) -> WebSocketMessage:
        return message

    if way != "no handler":
        datadivr.websocket_handler("news" if way == "a handler" else way)(relay)
    client, other = connect(live), connect(live)
    client_id = id_of(client)
    for to in ("all", id_of(other)):
        say(client, "news", to=to, from_id="server")
        assert hear(other) == message_from(client_id, "news", to)


@promise(
    "`$connect` is no gate: the client is connected by then, and hears what is sent to all."
    " Refuse clients in `log_in`."
)
def test_a_client_hears_all_while_its_connect_handler_refuses_it(
    connect: Connect, live: Live
) -> None:
    began, go = threading.Event(), threading.Event()

    @datadivr.websocket_handler("$connect")
    def refuse(message: WebSocketMessage) -> None:
        began.set()
        go.wait(LIMIT)
        raise fastapi.HTTPException(403, "Not you.")

    client = connect(live)
    assert began.wait(LIMIT)
    live.api.post("/messages", json={"event_name": "news"})
    assert hear(client)["event_name"] == "news"
    go.set()
    assert hear(client)["message"] == "Not you."
    assert id_of(client)


@promise("FastAPI keeps that open until the client goes.")
def test_what_a_log_in_depends_on_stays_open_until_the_client_goes() -> None:
    seen: list[str] = []

    async def get_db() -> AsyncIterator[None]:
        seen.append("open")
        yield
        seen.append("closed")

    async def log_in(db: Annotated[None, fastapi.Depends(get_db)]) -> None: ...

    host = included()
    host.dependency_overrides[datadivr.authorize_client] = log_in
    with TestClient(host) as client:
        with client.websocket_connect("/ws") as session:
            session.send_json({"event_name": "whoami"})
            session.receive_json()
            assert seen == ["open"]
        wait_until(lambda: seen == ["open", "closed"], "its end")


@promise(
    "These two find a client until its `$disconnect` handler has run. `in`, which "
    "compares with case, `len` and iteration know connected clients alone"
)
def test_a_disconnect_handler_finds_its_client_in_each_way_that_asks_for_it(
    connect: Connect, live: Live
) -> None:
    found = []

    @datadivr.websocket_handler("$disconnect")
    async def went(message: WebSocketMessage) -> None:
        client_id, clients = message.from_id, datadivr.clients
        is_same = clients.get(client_id) is clients[client_id] is clients.get(client_id, None)
        found.append((is_same, client_id in clients, client_id in list(clients), len(clients)))

    client = connect(live)
    id_of(client)
    client.close()
    wait_until(lambda: found, "its end")
    assert found == [(True, False, False, 0)]
    assert datadivr.clients.get("nobody") is None
    default: Any = "default"
    assert datadivr.clients.get("nobody", default) == "default"


@pytest.mark.parametrize(
    ("authorization", "offered", "status"),
    [
        ("Bearer of-the-proxy", "let-me-in", None),
        ("Bearer let-me-in", "of-the-page", None),
        ("Basic bGV0LW1lLWlu", "let-me-in", None),
        ("Bearer of-the-proxy", "of-the-page", 401),
    ],
)
def test_a_token_may_be_the_headers_or_the_subprotocols(
    configure: Callable[..., None], authorization: str, offered: str, status: int | None
) -> None:
    configure(client_token="let-me-in")
    assert refusal({"Authorization": authorization}, ["bearer", offered]) == status


@pytest.mark.parametrize("changed", [False, True])
def test_a_refusal_is_a_close_where_a_server_takes_nothing_else(
    configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    configure(client_token="let-me-in")
    if changed:  # FastAPI's own stack serves
        monkeypatch.setattr(datadivr.app, "user_middleware", [Middleware(WrappedReceive)])
        monkeypatch.setattr(datadivr.app, "middleware_stack", None)

    async def without_extensions(scope: Any, receive: Any, send: Any) -> None:
        scope.pop("extensions", None)  # as Daphne, and any server of before 2023
        await datadivr.app(scope, receive, send)

    with (
        pytest.raises(WebSocketDisconnect) as refused,
        TestClient(without_extensions).websocket_connect("/ws"),
    ):
        pass
    assert not isinstance(refused.value, WebSocketDenialResponse)


DOOR = """
    import datadivr
    from fastapi.testclient import TestClient

    async def at_address(scope, receive, send):
        address = {address!r}
        scope["server"] = (address, None if address.startswith("/") else 8000)
        await datadivr.app(scope, receive, send)

    async def authorize():
        pass

    if {overridden}:
        datadivr.app.dependency_overrides[datadivr.authorize_client] = authorize
    for _ in range(2):
        with TestClient(at_address).websocket_connect("/ws", subprotocols=["bearer", "let-me-in"]):
            pass
"""


@promise(
    "Where nothing is set, the log has `open_to_the_network` as the first client comes in.",
    "set `DATADIVR_CLIENT_TOKEN`, or let users log in",
)
def test_a_server_that_anybody_can_reach_and_enter_is_told_so_once(tmp_path: Path) -> None:
    public = "192.0.2.7", "2001:db8::7", "::ffff:192.0.2.7"
    private = "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "/run/datadivr.sock"
    cases: list[tuple[str, dict[str, str], int]] = [(address, {}, 1) for address in public]
    cases += [(address, {}, 0) for address in private]
    cases += [("192.0.2.7", {"DATADIVR_CLIENT_TOKEN": "let-me-in"}, 0)]
    cases += [("192.0.2.7", {"DATADIVR_ALLOWED_ORIGINS": "https://a.example"}, 0)]
    cases += [("192.0.2.7", {"OVERRIDDEN": "by a log-in of its own"}, 0)]
    scripts = [
        (textwrap.dedent(DOOR).format(address=address, overridden="OVERRIDDEN" in values), values)
        for address, values, _ in cases
    ]
    outputs = run_each(scripts, tmp_path / "out")
    for case, (status, output) in zip(cases, outputs, strict=True):
        assert (status, output.count("open_to_the_network")) == (0, case[-1]), (case, output)


def test_what_a_hosts_own_authorization_refuses_is_counted_and_logged_once_a_minute(
    live: Live, connect: Connect, records: Records
) -> None:
    async def authorize(status: int) -> None:
        raise fastapi.HTTPException(status, "Not you.")

    datadivr.app.dependency_overrides[datadivr.authorize_client] = authorize
    before = metrics(live)
    try:
        for status in (401, 403) * 2:
            with pytest.raises(InvalidStatus) as refused:
                connect(live, f"/ws?status={status}")
            assert refused.value.response.status_code == status
            assert json.loads(refused.value.response.body or b"") == {"detail": "Not you."}
    finally:
        datadivr.app.dependency_overrides.clear()
    after = metrics(live)
    for code in ("unauthorized", "forbidden"):
        series = f'errors_total{{type="{code}"}}'
        assert after[series] - before[series] == 2
        assert len(records.named(code)) == 1


def room_host(rooms: Any) -> fastapi.FastAPI:
    """Return an application whose log-in function puts its clients into rooms."""
    host = fastapi.FastAPI()
    host.include_router(datadivr.router)

    async def log_in(websocket: fastapi.WebSocket) -> None:
        websocket.state.rooms = rooms

    host.dependency_overrides[datadivr.authorize_client] = log_in
    return host


@promise(
    "A client is in it before anything else happens, with each of its devices",
    "`websocket.state.rooms`, a set of names, is joined as the client is accepted",
)
@pytest.mark.parametrize(
    "rooms", [{"garden", "user:ada"}, ["garden", "user:ada"], frozenset({"garden", "user:ada"})]
)
def test_whoever_logs_in_is_in_its_rooms_before_anything_else_happens(
    registry: None, rooms: Any
) -> None:
    seen: list[Any] = []

    @datadivr.websocket_handler("$connect")
    async def came(message: WebSocketMessage) -> WebSocketMessage:
        seen.append(datadivr.clients[message.from_id].rooms)
        news = datadivr.create_message("hello", None, "#user:ada")
        seen.append(await datadivr.broadcast(news))
        return datadivr.create_message("came", None, "#garden")

    with TestClient(room_host(rooms), headers=ADMIN) as client:
        with client.websocket_connect("/ws") as one, client.websocket_connect("/ws") as two:
            assert [one.receive_json()["event_name"] for _ in range(3)] == [
                "hello",
                "hello",
                "came",
            ]
            assert two.receive_json()["event_name"] == "hello"
            page = client.get("/clients", params={"room": "user:ada"}).json()
            assert [told["rooms"] for told in page["clients"]] == [["garden", "user:ada"]] * 2
        assert client.get("/clients", params={"room": "user:ada"}).json()["clients"] == []
    assert seen == [{"garden", "user:ada"}, 1, {"garden", "user:ada"}, 2]


@pytest.mark.parametrize("rooms", [{"a b"}, {""}, {"#garden"}, {"x\nall - {}"}, {5}, "user:ada"])
def test_whoever_logs_in_with_a_bad_room_does_not_get_in(registry: None, rooms: Any) -> None:
    ran: list[str] = []

    @datadivr.websocket_handler("$connect")
    async def came(message: WebSocketMessage) -> None:
        ran.append(message.from_id)

    host = room_host(rooms)
    with (
        TestClient(host) as client,
        pytest.raises((ValueError, TypeError)),
        client.websocket_connect("/ws") as session,
    ):
        session.receive_json()
    assert (ran, datadivr.clients) == ([], {})


def test_a_bad_room_of_one_client_is_logged_and_disturbs_nobody_else(
    registry: None, caplog: pytest.LogCaptureFixture
) -> None:
    host, rooms = fastapi.FastAPI(), iter([{"garden"}, {"bad room"}, {"garden"}])
    host.include_router(datadivr.router)

    async def log_in(websocket: fastapi.WebSocket) -> None:
        websocket.state.rooms = next(rooms)

    host.dependency_overrides[datadivr.authorize_client] = log_in
    with Live(host) as running:
        url = running.ws
        with dial(url) as one:
            one_id = id_of(one)
            with pytest.raises((InvalidStatus, ConnectionClosed)), dial(url) as bad:
                bad.recv(timeout=LIMIT)
            wait_until(lambda: len(datadivr.clients) == 1, "it to be out")
            with dial(url) as other:
                say(one, "m", to="#garden")
                assert hear(other) == message_from(one_id, "m", "#garden")
        assert "bad room" in caplog.text
    assert datadivr.clients == {}


def test_rooms_work_in_a_test_client() -> None:
    with (
        TestClient(datadivr.app, headers=ADMIN) as client,
        client.websocket_connect("/ws") as one,
        client.websocket_connect("/ws") as other,
    ):
        ids = []
        for session in (one, other):
            session.send_json({"event_name": "whoami", "id": 1})
            ids.append(session.receive_json()["payload"])
            assert client.put(f"/clients/{ids[-1]}/rooms/garden").status_code == 204
        one.send_json({"event_name": "m", "to": "#garden", "id": 2})
        assert one.receive_json() == ok(ids[0], 2)
        assert other.receive_json() == message_from(ids[0], "m", "#garden")
        body = {"event_name": "news", "to": "#garden"}
        assert client.post("/messages", json=body).json() == {"recipients": 2, "partial": False}
        assert client.delete(f"/clients/{ids[0]}/rooms/garden").status_code == 204
        one.receive_json()
        one.send_json({"event_name": "m", "to": "#garden", "id": 3})
        answer = one.receive_json()
        assert (answer["payload"]["code"], answer["id"]) == ("not_in_room", 3)
    assert datadivr.clients == {}


@promise("again after each loss: a new connection is in no room")
@promise("A client that goes leaves all rooms.")
def test_whoever_goes_leaves_all_rooms(connect: Connect, server: Process) -> None:
    stayer = connect(server, "/in?room=garden")
    with dial(f"ws://127.0.0.1:{server.port}/in?room=garden&room=shed") as goer:
        id_of(goer)
        listed = server.api.get("/clients?room=garden").json()
        assert (listed["total"], len(listed["clients"])) == (2, 2)
    wait_until(lambda: total(server) == 1, "it to go")
    for room, expected in (("garden", [id_of(stayer)]), ("shed", [])):
        listed = server.api.get("/clients", params={"room": room}).json()
        assert [client["id"] for client in listed["clients"]] == expected


@promise(
    'An endpoint of your own may `await datadivr.handle_connection(websocket, subprotocol="json")`.'
    " It accepts the client without asking who it is."
)
def test_an_endpoint_of_ones_own_answers_a_subprotocol_and_asks_for_no_token(
    left: None, configure: Callable[..., None]
) -> None:
    configure(client_token="of-clients")
    host = fastapi.FastAPI()
    host.include_router(datadivr.router)

    @host.websocket("/mine")
    async def mine(websocket: fastapi.WebSocket) -> None:
        await datadivr.handle_connection(websocket, subprotocol="json")

    with Live(host) as live:
        with pytest.raises(InvalidStatus):
            dial(live.ws)
        url = live.ws.replace("/ws", "/mine")
        with dial(url, subprotocols=[Subprotocol("xml"), Subprotocol("json")]) as client:
            assert client.subprotocol == "json"
            assert id_of(client)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("letter", ["x", "é", "😀"])
@promise("longest message; a longer one closes its connection with 1009")
def test_a_message_may_have_as_many_bytes_as_the_limit_and_none_more(
    live: Live, connect: Connect, configure: Callable[..., None], letter: str, more: int
) -> None:
    configure(max_message_bytes=400)

    @datadivr.websocket_handler("m")
    async def answer(message: WebSocketMessage) -> WebSocketMessage:
        return datadivr.create_message("heard", message.payload, message.from_id)

    client = connect(live)
    head, end = '{"event_name": "m", "to": "all", "payload": "', '"}'
    room = 400 + more - len(head) - len(end)
    fill, rest = divmod(room, len(letter.encode()))
    client.send(head + letter * fill + "x" * rest + end)
    if more:
        assert close_code(client) == 1009
    else:
        assert hear(client)["payload"] == letter * fill + "x" * rest


@promise(
    "A client whose cookies have more than 8 KB cannot connect. If yours are larger, raise"
    " `WEBSOCKETS_MAX_LINE_LENGTH`, a variable of the websockets package."
)
@needs_sansio
def test_large_cookies_need_a_variable_of_the_websockets_package(
    tmp_path: Path, live: Live
) -> None:
    small, large = ({"Cookie": f"session={'x' * length}"} for length in (8000, 9000))
    with dial(live.ws, additional_headers=small) as client:
        assert id_of(client)
    with pytest.raises((TimeoutError, InvalidHandshake)):  # uvicorn need not answer it
        dial(live.ws, additional_headers=large, open_timeout=2)
    with dial(live.ws, additional_headers=small) as client:
        assert id_of(client)
    command = ["-m", "uvicorn", "datadivr:app", "--port", "{port}"]
    with Process(*command, cwd=tmp_path, WEBSOCKETS_MAX_LINE_LENGTH="20000") as process:
        process.wait_until_up()
        with dial(process.ws, additional_headers=large) as client:
            assert id_of(client)


@pytest.mark.parametrize("origin", ["null", "file://"])
def test_an_origin_without_a_host_is_let_in_where_it_is_listed(
    live: Live, connect: Connect, configure: Callable[..., None], origin: str
) -> None:
    with pytest.raises(InvalidStatus) as caught:
        connect(live, origin=Origin(origin))
    assert caught.value.response.status_code == 403
    configure(allowed_origins=(origin,))
    assert id_of(connect(live, origin=Origin(origin)))


@pytest.mark.parametrize(
    ("code", "settings", "headers", "sent"),
    [
        ("invalid_message", {}, {}, {}),
        ("invalid_payload", {}, {}, {"event_name": "sum_event"}),
        ("not_in_room", {}, {}, {"event_name": "m", "to": "#garden"}),
        ("unknown_recipient", {}, {}, {"event_name": "m", "to": "nobody"}),
        ("origin_refused", {}, {"Origin": "http://elsewhere.example"}, None),
        ("unauthorized", {"client_token": "let-me-in"}, {}, None),
        ("too_many_clients", {"max_clients": 1}, {}, None),
    ],
)
def test_each_fault_of_a_client_is_counted_and_logged_once(
    live: Live,
    connect: Connect,
    configure: Callable[..., None],
    records: Records,
    code: str,
    settings: Json,
    headers: dict[str, str],
    sent: Json | None,
) -> None:
    client = connect(live)
    counted = metrics(live)
    configure(**settings)
    if sent is None:
        with pytest.raises(InvalidStatus):
            connect(live, additional_headers=headers)
    else:
        client.send(json.dumps(sent))
        assert hear(client)["payload"]["code"] == code
    now = metrics(live)
    errors = {name for name in now if name.startswith("errors_total") and now[name] > counted[name]}
    assert errors == {f'errors_total{{type="{code}"}}'}
    assert now[errors.pop()] == counted[f'errors_total{{type="{code}"}}'] + 1
    assert len(records.named(code)) == 1


# ---- The admin API: `pytest -m admin` ------------------------------------------------------------


def test_the_list_pages_through_ten_thousand_clients(api: httpx.Client, logged: list[Any]) -> None:
    ids = [fake_client(FakeConnection()).id for _ in range(10_000)]
    try:
        seen = [client["id"] for page in pages(api, 1000) for client in page["clients"]]
        assert sorted(seen) == sorted(ids)
    finally:
        datadivr.clients.clear()


@promise("They send the admin token as a bearer token, which lets in whoever brings it")
@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/clients"), ("GET", "/clients/x"), ("DELETE", "/clients/x"), ("POST", "/messages")],
)
def test_the_admin_api_asks_for_its_token(method: str, path: str, headers: dict[str, str]) -> None:
    answer = TestClient(datadivr.app).request(method, path, headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json() == {"detail": "The admin token is needed."}


@promise(
    "those with the token that the server made up | those with `DATADIVR_ADMIN_TOKEN`",
    "Otherwise the server makes up a token and prints it to standard output, which Docker keeps",
    "Otherwise the server prints a token that it makes up to standard output, which systemd keeps",
)
def test_a_token_is_made_up_and_shown_once_but_in_no_log_where_none_is_set(
    configure: Callable[..., None], logged: list[Any], made_up_token: Callable[..., str]
) -> None:
    configure(admin_token=None)
    for _ in range(2):
        with TestClient(datadivr.app) as client:
            headers = {"Authorization": f"Bearer {made_up_token()}"}
            assert client.get("/clients", headers=headers).status_code == 200
    assert logged == []


def test_a_client_is_listed_with_its_counts(connect: Connect, live: Live) -> None:
    client = connect(live)
    client_id = id_of(client)
    ask(client, "m", to="all")
    api = live.api
    page = api.get("/clients").json()
    (listed,) = page["clients"]
    assert api.get(f"/clients/{client_id}").json() == listed
    host, port = client.local_address
    assert page == {"total": 1, "next": None, "partial": False, "clients": [listed]}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z", listed.pop("connected_at"))
    assert listed == {
        "id": client_id,
        "node": client_id[:8],
        "address": f"{host}:{port}",
        "user": None,
        "messages_received": 2,
        "messages_sent": 2,
        "buffered_bytes": 0,
        "rooms": [],
    }


@promise("`next` is the `after` of the following page")
def test_the_list_pages_past_clients_who_come_and_go(connect: Connect, server: Process) -> None:
    api = server.api
    clients = [connect(server) for _ in range(5)]
    ids = [id_of(client) for client in clients]
    first = api.get("/clients?limit=2&after=").json()
    clients[1].close()  # the one that the cursor points at
    wait_until(lambda: api.get("/clients").json()["total"] == 4, "it to go")
    ids.append(id_of(connect(server)))
    second = api.get("/clients", params={"limit": 2, "after": first["next"]}).json()
    third = api.get("/clients", params={"limit": 2, "after": second["next"]}).json()
    pages = [[client["id"] for client in page["clients"]] for page in (first, second, third)]
    assert pages == [ids[:2], ids[2:4], ids[4:]]
    assert third["next"] is None


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "after=x", "after=12", f"after={'9' * 40}-a"]
)
def test_a_bad_page_is_refused(api: httpx.Client, query: str) -> None:
    assert api.get(f"/clients?{query}").status_code == 422


@promise(
    "disconnected by an administrator; `client.js` does not come back",
    "`DELETE` closes a connection with 1008, after what was already sent",
)
def test_a_client_is_disconnected_after_what_was_sent_to_it(
    connect: Connect, server: Process
) -> None:
    client, other = connect(server), connect(server)
    client_id = id_of(client)
    say(other, "last", to=client_id)
    id_of(other)
    url = f"/clients/{client_id}"
    answer = server.api.delete(url)
    assert (answer.status_code, answer.content) == (204, b"")
    assert hear(client)["event_name"] == "last"
    with pytest.raises(ConnectionClosed) as closed:
        client.recv(timeout=LIMIT)
    # granian loses a close frame while the endpoint receives.
    if "granian" not in " ".join(map(str, server.popen.args)):  # type: ignore[arg-type]
        assert closed.value.rcvd is not None
        rcvd = closed.value.rcvd
        assert (rcvd.code, rcvd.reason) == (1008, "Disconnected by an administrator")
    wait_until(lambda: server.api.get(url).status_code == 404, "its end")
    assert id_of(other)


def test_a_client_is_disconnected_while_its_handler_runs(connect: Connect, server: Process) -> None:
    client = connect(server)
    client_id = id_of(client)
    say(client, "wait")
    other = connect(server)
    assert id_of(other)
    assert server.api.delete(f"/clients/{client_id}").status_code == 204
    assert close_code(client) == 1008
    say(other, "release", payload=client_id)


@pytest.mark.parametrize("ws", ["auto", "wsproto"])
def test_a_stalled_client_is_disconnected_without_waiting_for_it(
    ws: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datadivr, "_CLOSE_SECONDS", 60)
    with Live(ws=ws) as live, raw_client(live, buffer=4096) as stalled:
        client_id = id_of(stalled)
        stall(live, client_id)
        with within(8):
            assert live.api.delete(f"/clients/{client_id}").status_code == 204
            assert live.api.get("/clients").json()["total"] == 0
        assert live.connections
        stalled.close()
        wait_until(lambda: not live.connections, "its socket's end")


@pytest.mark.parametrize("ws", ["auto", "wsproto"])
def test_a_disconnected_client_that_stays_stalled_is_cut_off(
    ws: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datadivr, "_CLOSE_SECONDS", 0.5)
    with Live(ws=ws) as live, raw_client(live, buffer=4096) as stalled:
        client_id = id_of(stalled)
        stall(live, client_id)
        assert live.api.delete(f"/clients/{client_id}").status_code == 204
        wait_until(lambda: not live.connections, "its socket's end")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_client_is_not_found(api: httpx.Client, method: str) -> None:
    answer = api.request(method, "/clients/nobody")
    assert (answer.status_code, answer.json()) == (
        404,
        {"detail": "No client with this id is connected."},
    )


@promise(
    "sends to `all`, unless it has a `to`",
    'The answer is 202, `{"recipients": 2, "partial": false}`',
)
def test_an_announcement_reaches_all_and_is_from_the_server(
    connect: Connect, server: Process
) -> None:
    clients = [connect(server) for _ in range(2)]
    for client in clients:
        id_of(client)
    announcement = {"event_name": "news", "payload": [1], "message": "Hello.", "from_id": "me"}
    answer = server.api.post("/messages", json=announcement)
    assert (answer.status_code, answer.json()) == (202, {"recipients": 2, "partial": False})
    assert [hear(client) for client in clients] == [
        announcement | {"to": "all", "from_id": "server"}
    ] * 2


def test_an_announcement_to_one_reaches_it_alone(connect: Connect, server: Process) -> None:
    one, other = connect(server), connect(server)
    announcement = {"event_name": "news", "to": id_of(one)}
    answer = server.api.post("/messages", json=announcement)
    assert answer.json() == {"recipients": 1, "partial": False}
    assert hear(one)["event_name"] == "news"
    assert ask(other, "whoami")["event_name"] == "whoami"


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b'{"event_name": "x", "to": "nobody"}', 404, "No client"),
        (b'{"event_name": "$x"}', 422, "event_name"),
        (b'{"event_name": ""}', 422, "event_name"),
        (b'{"payload": 1}', 422, "event_name"),
        (b"[]", 422, "object"),
        (b'{"event_name": "x", "to": NaN}', 422, '["body","to"]'),
        (b"[1e999]", 422, "object"),
        (b"{", 422, "Invalid JSON"),
        (b"", 422, "Invalid JSON"),
        (b'{"event_name": "\xff"}', 422, "Invalid JSON"),
        (
            b'{"event_name": "x", "payload": ' + b"[" * 5000 + b"]" * 5000 + b"}",
            422,
            "Invalid JSON",
        ),
        (b" " * (1024 * 1024 + 1), 413, "The limit is 1048576 bytes (DATADIVR_MAX_MESSAGE_BYTES)."),
    ],
)
def test_a_bad_announcement_is_refused_with_the_reason(
    api: httpx.Client, body: bytes, status: int, detail: str
) -> None:
    answer = api.post("/messages", content=body)
    assert answer.status_code == status
    assert detail in answer.text
    documented = datadivr.app.openapi()["paths"]["/messages"]["post"]["responses"][str(status)][
        "content"
    ]
    assert answer.headers["content-type"].partition(";")[0] in documented


def test_a_body_is_not_read_for_a_caller_without_the_token(live: Live, connect: Connect) -> None:
    with socket.create_connection(("127.0.0.1", live.port), LIMIT) as caller:
        caller.sendall(b"POST /messages HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        assert caller.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_body_that_ends_early_leaves_no_traceback(
    live: Live, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    with socket.create_connection(("127.0.0.1", live.port), LIMIT) as caller:
        caller.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert http.get(f"{live.url}/healthz").status_code == 200
    wait_until(lambda: not live.connections, "its end")
    assert "Traceback" not in caplog.text


@promise("series of `GET /metrics`, beside your own of prometheus-client")
def test_the_metrics_are_prometheus_text_or_openmetrics(api: httpx.Client) -> None:
    text = api.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE datadivr_clients gauge\n" in text.text
    openmetrics = api.get(
        "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert openmetrics.headers["content-type"].startswith(
        "application/openmetrics-text; version=1.0.0"
    )
    assert openmetrics.text.endswith("# EOF\n")


def test_the_metrics_are_open_unless_they_have_a_token(configure: Callable[..., None]) -> None:
    client = TestClient(datadivr.app)
    assert client.get("/metrics").status_code == 200
    configure(metrics_token="of-prometheus")
    assert client.get("/metrics").status_code == 401
    refused = client.get("/metrics", headers={"Authorization": "Bearer x"})
    assert (refused.status_code, refused.json()["detail"]) == (401, "The metrics token is needed.")


def test_a_route_of_ones_own_asks_for_the_admin_token() -> None:
    host = fastapi.FastAPI()

    @host.get("/mine", dependencies=[fastapi.Depends(datadivr.authorize_admin)])
    def mine() -> None: ...

    client = TestClient(host)
    assert client.get("/mine").status_code == 401
    assert client.get("/mine", headers=ADMIN).status_code == 200


@promise(
    "once `DATADIVR_METRICS_TOKEN` is set: those with that token or the admin token",
    "Then it needs that token, or the admin token",
    "bearer token that `/metrics` asks for; the admin token opens it too",
)
def test_the_metrics_token_and_the_admin_token_open_the_metrics_and_the_former_no_more(
    configure: Callable[..., None],
) -> None:
    configure(metrics_token="of-prometheus")
    client = TestClient(datadivr.app)
    scraper = {"Authorization": "Bearer of-prometheus"}
    for headers in (scraper, ADMIN):
        assert client.get("/metrics", headers=headers).status_code == 200
    assert client.get("/clients", headers=scraper).status_code == 401


@promise("For a health check, ask `/healthz`. It needs no token")
def test_the_health_check_is_open() -> None:
    answer = TestClient(datadivr.app).get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("protected", [False, True])  # the metrics, which alone differ
def test_schemathesis_finds_no_fault(
    tmp_path: Path,
    configure: Callable[..., None],
    ended: Callable[[], dict[str, float]],
    protected: bool,
) -> None:
    configure(metrics_token="of-prometheus" if protected else None)
    (tmp_path / "schemathesis.toml").write_text(
        "[warnings]\nfail-on = true\n"
    )  # where it met no client, say
    done = threading.Event()

    def come_back(url: str) -> None:
        while not done.is_set():
            with contextlib.suppress(ConnectionClosed), dial(url) as client:
                while True:
                    client.recv()

    with Live() as live:
        url = f"127.0.0.1:{live.port}"
        threads = [threading.Thread(target=come_back, args=(f"ws://{url}/ws",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://{url}/openapi.json"]
        command += ["--header", f"Authorization:Bearer {TOKEN}"]
        # One path's methods are two routes, each of which names its own in a 405's Allow.
        command += ["--exclude-checks", "allow_header_conformance"]
        command += ["--checks", "all", "--max-examples", "10", "--generation-deterministic"]
        command += ["--include-path", "/metrics"] if protected else []
        tested = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        wait_until(lambda: len(datadivr.clients) == 3, "those who were disconnected to be back")
        done.set()
    for thread in threads:
        thread.join(LIMIT)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert protected or ended()["admin"] > 0


def test_openapi_describes_every_answer_and_the_token(api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, status, schema in [
        ("/clients", "200", {"$ref": "#/components/schemas/ClientPage"}),
        ("/clients/{client_id}", "200", {"$ref": "#/components/schemas/ClientInfo"}),
        ("/clients/{client_id}", "404", {"type": "object"}),
        ("/clients", "401", {"type": "object"}),
    ]:
        content = document["paths"][path]["get"]["responses"][status]["content"]
        assert content["application/json"]["schema"].items() >= schema.items()
    post = document["paths"]["/messages"]["post"]
    assert post["security"] == [{"HTTPBearer": []}]
    assert set(post["responses"]) == {"202", "400", "401", "404", "413", "422", "503"}
    body = post["requestBody"]["content"]["application/json"]
    assert set(body["schema"]["properties"]) == {"event_name", "payload", "to", "message"}
    assert api.post("/messages", json=body["example"]).status_code == 202


@promise("`/docs` has all of it, with scripts from elsewhere.")
def test_the_documentations_page_loads_scripts_from_elsewhere_and_the_api_from_here(
    api: httpx.Client,
) -> None:
    page = api.get("/docs")
    assert page.status_code == 200
    assert 'src="https://' in page.text
    (url,) = re.findall(r"url: '([^']+)'", page.text)
    assert "post" in api.get(url).json()["paths"]["/messages"]


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/console"])
def test_a_monitor_may_ask_for_the_head_alone(api: httpx.Client, path: str) -> None:
    answer = api.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_clients_user_is_what_its_state_says_as_a_short_text_or_null(
    live: Live, connect: Connect
) -> None:
    connect(live)
    id_of(connect(live))

    class Detached:
        def __str__(self) -> str:
            raise RuntimeError

    client = next(iter(datadivr.clients.values()))
    users = (uuid.UUID(int=5), "\ud800", "x" * 1000, Detached(), None)
    for user, shown in zip(users, (str(users[0]), "?", "x" * 128, None, None), strict=True):
        client.websocket.state.user = user
        listed = live.api.get("/clients").json()
        assert [told["user"] for told in listed["clients"]] == [shown, None]


def test_the_documentation_says_where_the_websocket_is_and_what_goes_over_it(
    api: httpx.Client,
) -> None:
    description = api.get("/openapi.json").json()["info"]["description"]
    assert "`/ws`" in description
    (example,) = re.findall(r"`(\{.*\})`", description)
    assert datadivr.parse_message(example).event_name == "chat"
    assert set(re.findall(r"`(\w+)`", description)) >= {"to", "all", "others", "from_id", "whoami"}


def test_a_request_without_an_upgrade_is_told_what_a_proxy_must_pass_on(api: httpx.Client) -> None:
    answer = api.get("/ws")
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
    assert "Upgrade" in answer.json()["detail"]


@needs_sansio
def test_the_answer_to_a_close_frame_is_answered_by_the_end_of_the_connection_alone(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datadivr, "_CLOSE_SECONDS", 60)
    with raw_client(live) as client:
        client_id = id_of(client)
        live.api.delete(f"/clients/{client_id}")
        ((first, payload),) = unframe(client.recv(4096))
        assert (first, payload[:2]) == (0x88, struct.pack("!H", 1008))
        client.sendall(b"\x88\x82" + bytes(4) + payload[:2])
        with within(5):  # nobody waits for the limit
            assert client.recv(4096) == b""


@needs_sansio
def test_a_stop_does_not_close_again_who_is_being_closed() -> None:
    with Live() as live, raw_client(live) as client:
        client_id = id_of(client)
        live.api.delete(f"/clients/{client_id}")
        ((first, _),) = unframe(client.recv(4096))
        assert first == 0x88
        live.server.should_exit = True
        assert client.recv(4096) == b""


def test_wrong_admin_tokens_are_counted_apart_and_logged(
    live: Live, connect: Connect, logged: list[Any]
) -> None:
    before = metrics(live)
    http.get(f"{live.url}/clients")
    after = metrics(live)
    for name, change in (("admin_unauthorized", 1), ("unauthorized", 0)):
        series = f'errors_total{{type="{name}"}}'
        assert after[series] - before[series] == change
    assert [entry["event"] for entry in logged] == ["admin_unauthorized"]


@promise("A body of more than `DATADIVR_MAX_MESSAGE_BYTES` is refused with 413")
@pytest.mark.parametrize(("more", "status"), [(0, 202), (1, 413)])
def test_a_body_may_have_as_many_bytes_as_the_limit_and_none_more(
    api: httpx.Client, configure: Callable[..., None], more: int, status: int
) -> None:
    configure(max_message_bytes=400)
    body = b'{"event_name": "news"}'.ljust(400 + more)
    assert api.post("/messages", content=body).status_code == status


@promise("`PUT .../rooms/garden?listen_only=true` lets the client listen alone")
def test_a_client_joins_and_leaves_a_room_by_the_api(connect: Connect, server: Process) -> None:
    member, client = connect(server, "/in?room=garden"), connect(server)
    client_id = id_of(client)
    api = server.api
    url = f"/clients/{client_id.upper()}/rooms/garden"
    for _ in range(2):
        answer = api.put(url)
        assert (answer.status_code, answer.content) == (204, b"")
    assert api.get(f"/clients/{client_id}").json()["rooms"] == ["garden"]
    say(client, "m", to="#garden")
    assert hear(member)["event_name"] == "m"
    assert api.put(url, params={"listen_only": True}).status_code == 204
    assert ask(client, "m", to="#garden")["payload"]["code"] == "not_in_room"
    for _ in range(2):
        answer = api.delete(url)
        assert (answer.status_code, answer.content) == (204, b"")
    assert api.get(f"/clients/{client_id}").json()["rooms"] == []
    say(member, "m", to="#garden")
    hear_all(member)
    assert hear_all(client) == []


@pytest.mark.parametrize("room", GOOD_ROOMS)
def test_a_room_of_any_name_is_in_the_path_and_in_the_list(
    connect: Connect, live: Live, room: str
) -> None:
    client_id = id_of(connect(live))
    api = live.api
    url = f"/clients/{client_id}/rooms/{quote(room, safe='')}"
    assert api.put(url).status_code == 204
    page = api.get("/clients", params={"room": room}).json()
    assert [client["rooms"] for client in page["clients"]] == [[room]]
    body = {"event_name": "news", "to": f"#{room}"}
    assert api.post("/messages", json=body).json() == {"recipients": 1, "partial": False}
    assert api.delete(url).status_code == 204
    assert api.get("/clients", params={"room": room}).json()["total"] == 0


@promise("with the sentence. Routes answer 422.")
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_the_routes_of_rooms_refuse_what_they_cannot_do(
    connect: Connect, live: Live, method: str
) -> None:
    client_id = id_of(connect(live))
    with httpx.Client(base_url=live.url) as api:
        url = f"/clients/{client_id}/rooms/garden"
        answer = api.request(method, url)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        answer = api.request(method, "/clients/nobody/rooms/garden", headers=ADMIN)
        detail = "No client with this id is connected."
        assert (answer.status_code, answer.json()) == (404, {"detail": detail})
        for room in ("a b", "a\n", "a\u2028b", "#a", "a#b", "x" * 101, "a\x00", "x\nall - {}"):
            bad = f"/clients/{client_id}/rooms/{quote(room, safe='')}"
            assert api.request(method, bad, headers=ADMIN).status_code == 422, room
        if method == "PUT":
            wrong = api.request(method, url, headers=ADMIN, params={"listen_only": "perhaps"})
            assert wrong.status_code == 422
    assert datadivr.clients[client_id].rooms == frozenset()


@pytest.mark.parametrize("room", [room for room in BAD_ROOMS if room not in ("", "\ud800")])
def test_a_bad_room_is_refused_by_the_list_and_by_an_announcement(
    api: httpx.Client, room: str
) -> None:
    assert api.get("/clients", params={"room": room}).status_code == 422
    answer = api.post("/messages", json={"event_name": "x", "to": f"#{room}"})
    assert answer.status_code == 422
    assert '"to"' in answer.text


@promise("clients is no error. - Any")
def test_an_announcement_to_a_room_reaches_its_members_if_there_are_any(
    connect: Connect, server: Process
) -> None:
    member, stranger = connect(server, "/in?room=garden"), connect(server)
    id_of(member), id_of(stranger)
    url = "/messages"
    for room, recipients in (("garden", 1), ("cellar", 0)):
        body = {"event_name": "news", "payload": 1, "to": f"#{room}"}
        answer = server.api.post(url, json=body)
        expected = {"recipients": recipients, "partial": False}
        assert (answer.status_code, answer.json()) == (202, expected)
    assert hear_all(member) == [message_from("server", "news", "#garden", payload=1)]
    assert hear_all(stranger) == []
    assert server.api.post(url, json={"event_name": "x", "to": "#"}).status_code == 422


def test_the_list_of_a_room_has_its_members_with_their_rooms_sorted(
    connect: Connect, server: Process
) -> None:
    gardeners = [connect(server, "/in?room=garden&room=b&room=a&room=C") for _ in range(5)]
    connect(server, "/in?room=kitchen")
    ids = [id_of(client) for client in gardeners]
    api = server.api
    first = api.get("/clients", params={"room": "garden", "limit": 3}).json()
    rest = api.get("/clients", params={"room": "garden", "after": first["next"]}).json()
    assert [client["id"] for page in (first, rest) for client in page["clients"]] == ids
    assert (first["total"], first["partial"], rest["next"]) == (5, False, None)
    assert {tuple(client["rooms"]) for client in first["clients"]} == {("C", "a", "b", "garden")}
    assert api.get("/clients").json()["total"] == 6
    assert api.get("/clients", params={"room": "cellar"}).json() == {
        "total": 0,
        "next": None,
        "partial": False,
        "clients": [],
    }


@promise(
    "Without `room` it lists everybody",
    "`page.next` is the `after` of the next one",
)
@promise("a page of the clients of all nodes, or of a room's")
def test_list_clients_returns_pages_of_clients_to_handlers(connect: Connect, live: Live) -> None:
    pages: list[datadivr.ClientPage] = []

    @datadivr.websocket_handler("look")
    async def look(message: WebSocketMessage) -> None:
        await datadivr.join_room(message.from_id, "garden")
        first = await datadivr.list_clients(limit=1)
        pages.extend([first, await datadivr.list_clients(100, first.next or "", "garden")])

    clients = [connect(live), connect(live)]
    ids = [id_of(client) for client in clients]
    assert ask(clients[1], "look", id=1)["event_name"] == "ok"
    assert all(isinstance(page, datadivr.ClientPage) for page in pages)
    assert all(isinstance(page.clients[0], datadivr.ClientInfo) for page in pages)
    assert [(page.total, page.clients[0].id, page.clients[0].rooms) for page in pages] == [
        (2, ids[0], []),
        (1, ids[1], ["garden"]),
    ]


def test_openapi_describes_rooms(api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    path = document["paths"]["/clients/{client_id}/rooms/{room}"]
    for method in ("put", "delete"):
        assert set(path[method]["responses"]) == {"204", "401", "404", "422", "503"}
        assert path[method]["security"] == [{"HTTPBearer": []}]
    names = {parameter["name"] for parameter in path["put"]["parameters"]}
    assert names == {"client_id", "room", "listen_only"}
    parameters = document["paths"]["/clients"]["get"]["parameters"]
    assert {parameter["name"] for parameter in parameters} == {"limit", "after", "room"}
    assert "rooms" in document["components"]["schemas"]["ClientInfo"]["properties"]


@pytest.mark.parametrize("spell", [str.upper, str.title])
def test_an_id_is_the_same_in_whatever_case_it_is_written(
    connect: Connect, server: Process, spell: Callable[[str], str]
) -> None:
    client, sender = connect(server), connect(server)
    client_id = id_of(client)
    spelled = spell(client_id)
    assert spelled != client_id
    say(sender, "m", to=spelled)
    assert hear(client)["event_name"] == "m"
    api = server.api
    assert api.get(f"/clients/{spelled}").json()["id"] == client_id
    body = {"event_name": "news", "to": spelled}
    assert api.post("/messages", json=body).json()["recipients"] == 1
    assert hear(client)["event_name"] == "news"
    assert api.put(f"/clients/{spelled}/rooms/garden").status_code == 204
    assert api.get(f"/clients/{client_id}").json()["rooms"] == ["garden"]
    assert api.delete(f"/clients/{spelled}/rooms/garden").status_code == 204
    assert api.delete(f"/clients/{spelled}").status_code == 204
    assert close_code(client) in (1008, None)  # granian may lose the close frame


@promise(
    "`host.dependency_overrides[datadivr.authorize_admin]` takes your own log-in in place of the"
    " token."
)
def test_a_hosts_own_log_in_decides_who_is_an_administrator() -> None:
    async def log_in(session: Annotated[str, fastapi.Cookie()] = "") -> None:
        if session != "of-the-chief":
            raise fastapi.HTTPException(403, "Not you.")

    host = fastapi.FastAPI()
    host.include_router(datadivr.router)
    host.dependency_overrides[datadivr.authorize_admin] = log_in
    with TestClient(host, headers={"Cookie": "session=of-the-chief"}) as chief:
        assert chief.get("/clients").status_code == 200
    with TestClient(host, headers=ADMIN) as other:
        assert other.get("/clients").status_code == 403
        assert other.post("/messages", json={"event_name": "m"}).status_code == 403


@pytest.mark.parametrize("path", ["/clients", "/metrics"])
@promise("`admin_unauthorized` (or a wrong metrics token)")
def test_a_wrong_token_is_counted_once(
    live: Live, configure: Callable[..., None], path: str
) -> None:
    configure(metrics_token="numbers")
    count = datadivr._errors_total.labels("admin_unauthorized")
    before = count._value.get()
    headers = {"Authorization": "Bearer wrong"}
    assert http.get(f"{live.url}{path}", headers=headers).status_code == 401
    assert count._value.get() == before + 1


def test_an_announcement_runs_no_handler(live: Live, connect: Connect) -> None:
    called: list[WebSocketMessage] = []

    @datadivr.websocket_handler("news")
    async def news(message: WebSocketMessage) -> None:
        called.append(message)

    client = connect(live)
    assert id_of(client)
    live.api.post("/messages", json={"event_name": "news"})
    assert hear(client)["event_name"] == "news"
    assert called == []


def test_a_page_of_the_list_has_100_clients_unless_its_limit_says_otherwise(
    live: Live, connect: Connect
) -> None:
    for _ in range(101):
        connect(live)
    page = live.api.get("/clients").json()
    assert (page["total"], len(page["clients"])) == (101, 100)
    rest = live.api.get("/clients", params={"after": page["next"]}).json()
    assert (len(rest["clients"]), rest["next"]) == (1, None)


@pytest.mark.parametrize("limit", [-1, 0, 1001])
@promise("A page of the list has 1000 clients at most.")
def test_a_page_of_another_size_is_refused_in_python_too(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a limit from 1 to 1000; got {limit}"):
        in_a_thread(datadivr.list_clients(limit))


def test_a_client_is_disconnected_from_python(live: Live, connect: Connect) -> None:
    client = connect(live)
    in_a_thread(datadivr.disconnect_client(id_of(client)))
    assert close_code(client) == 1008


# ---- The application: `pytest -m application` ----------------------------------------------------


@promise("the dependencies that you may override")
@needs_refusals
def test_a_host_puts_its_own_authorization_in_place() -> None:
    async def authorize(ticket: str = "") -> None:
        if ticket != "valid":
            raise fastapi.HTTPException(402, "No ticket.")

    datadivr.app.dependency_overrides[datadivr.authorize_client] = authorize
    try:
        client = TestClient(datadivr.app)
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/ws"):
            pass
        assert denied.value.status_code == 402
        with client.websocket_connect("/ws?ticket=valid") as websocket:
            websocket.send_json({"event_name": "whoami"})
            assert websocket.receive_json()["event_name"] == "whoami"
    finally:
        datadivr.app.dependency_overrides.clear()


def deny() -> None:
    raise fastapi.HTTPException(401)


def with_dependencies() -> fastapi.FastAPI:
    changed = datadivr.App()
    changed.include_router(datadivr.router, dependencies=[fastapi.Depends(deny)])
    return changed


def reloaded_with_an_override() -> fastapi.FastAPI:
    old = datadivr.app
    old.dependency_overrides[datadivr.authorize_client] = deny
    importlib.reload(datadivr)
    return old


def with_another_route() -> fastapi.FastAPI:
    async def refuse(websocket: fastapi.WebSocket) -> None:
        deny()

    datadivr.app.router.routes.insert(0, APIWebSocketRoute("/ws", refuse))
    return datadivr.app


@needs_refusals
def test_whatever_guards_ws_is_in_force(tmp_path: Path) -> None:
    changes = [with_dependencies, reloaded_with_an_override, with_another_route]
    head = """
        import datadivr, fastapi, importlib
        from fastapi.routing import APIWebSocketRoute
        from fastapi.testclient import TestClient
        from starlette.testclient import WebSocketDenialResponse
    """
    tail = """
        try:
            with TestClient(change()).websocket_connect("/ws"):
                pass
        except WebSocketDenialResponse as refused:
            print(refused.status_code)
    """
    scripts = [
        f"{textwrap.dedent(head)}\n{inspect.getsource(deny)}\n{inspect.getsource(change)}\n"
        f"change = {change.__name__}\n{textwrap.dedent(tail)}"
        for change in changes
    ]
    outputs = run_each([(script, {}) for script in scripts], tmp_path / "out")
    assert [(status, output[-4:]) for status, output in outputs] == [(0, "401\n")] * len(changes)


def test_middleware_of_a_users_own_sees_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []

    class Watch:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
            paths.append(scope.get("path", ""))
            await self.app(scope, receive, send)

    monkeypatch.setattr(datadivr.app, "user_middleware", [Middleware(Watch)])
    monkeypatch.setattr(datadivr.app, "middleware_stack", None)
    with TestClient(datadivr.app) as client, client.websocket_connect("/ws") as session:
        session.send_json({"event_name": "whoami"})
        assert session.receive_json()["event_name"] == "whoami"
    assert "/ws" in paths


@pytest.mark.parametrize("package", ["", "myproject"])
def test_imports_of_the_package_that_this_file_implements_work(
    tmp_path: Path, package: str
) -> None:
    folder = tmp_path / package
    folder.mkdir(exist_ok=True)
    (folder / "datadivr.py").write_text((ROOT / "datadivr.py").read_text())
    name = f"{package}.datadivr".strip(".")
    statements = [
        f"from {name}.transport.messages import create_error_message",
        f"from {name}.transport.server import app",
        f"from {name}.transport import messages",
        f"import {name}.transport.messages; {name}.transport.messages.create_error_message",
        f"import {name}.transport.server; {name}.transport.server.app",
    ]
    script = f"""
        import sys; sys.path.insert(0, "")
        STATEMENT
        import {name} as datadivr
        assert datadivr.__file__.startswith({str(tmp_path)!r})
        assert datadivr.transport.server.app is datadivr.app
    """
    scripts = [script.replace("STATEMENT", statement) for statement in statements]
    reloaded = ["import importlib; importlib.reload(datadivr)", *statements]
    scripts.append(scripts[0] + "".join(f"\n        {line}" for line in reloaded))
    outputs = run_each([(script, {}) for script in scripts], tmp_path / "out", tmp_path)
    assert outputs == [(0, "")] * len(scripts)


@promise("the FastAPI application, and its routes for another one")
def test_a_host_includes_the_router(registry: None) -> None:
    asked = []
    host = fastapi.FastAPI()
    host.include_router(
        datadivr.router, prefix="/realtime", dependencies=[fastapi.Depends(lambda: asked.append(1))]
    )
    with Live(host) as live, dial(f"ws://127.0.0.1:{live.port}/realtime/ws") as client:
        assert id_of(client)
        assert live.api.get("/realtime/clients").json()["total"] == 1
    assert len(asked) == 2


@promise("does not run: the made-up admin token is shown at the first request that needs it")
def test_a_host_mounts_the_application_without_a_lifespan(
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    made_up_token: Callable[..., str],
) -> None:
    configure(admin_token=None)
    monkeypatch.setattr(datadivr._hub, "console_path", "")
    host = fastapi.FastAPI()
    host.mount("/realtime", datadivr.app)
    with Live(host) as live, dial(f"ws://127.0.0.1:{live.port}/realtime/ws") as client:
        assert id_of(client)
        assert http.get(f"{live.url}/realtime/clients").status_code == 401
        headers = {"Authorization": f"Bearer {made_up_token('/realtime/console')}"}
        assert http.get(f"{live.url}/realtime/clients", headers=headers).json()["total"] == 1


def test_a_mounted_application_has_its_admin_api_before_a_client_comes() -> None:
    script = """
        import datadivr, fastapi, os
        from fastapi.testclient import TestClient

        host = fastapi.FastAPI()
        host.mount("/realtime", datadivr.app)
        headers = {"Authorization": f"Bearer {os.environ['DATADIVR_ADMIN_TOKEN']}"}
        with TestClient(host, headers=headers) as api:
            print(api.get("/realtime/clients").json()["total"])
            print(api.post("/realtime/messages", json={"event_name": "news"}).json()["recipients"])
    """
    assert run(script) == "0\n0\n"


def test_an_endpoint_that_returns_without_an_answer_is_an_error_as_ever(live: Live) -> None:
    @datadivr.app.websocket("/silent")
    async def silent(websocket: fastapi.WebSocket) -> None: ...

    with pytest.raises(InvalidStatus) as refused:
        dial(f"ws://127.0.0.1:{live.port}/silent")
    assert refused.value.response.status_code == 500
    datadivr.app.router.routes.pop()


def test_a_slash_behind_ws_is_let_pass(connect: Connect, live: Live) -> None:
    assert id_of(connect(live, "/ws/"))


@promise("403 (the origin, or a path that is neither `/ws` nor `/ws/`)")
@pytest.mark.parametrize("path", ["/wss", "/", "/ws/more", "/clients"])
def test_a_client_of_another_path_is_refused_with_403(live: Live, path: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        dial(f"ws://127.0.0.1:{live.port}{path}")
    assert refused.value.response.status_code == 403


def test_a_wrong_path_is_logged_once_a_minute(
    connect: Connect, live: Live, logged: list[Any]
) -> None:
    def levels() -> list[str]:
        return [entry["log_level"] for entry in logged if entry.get("path") == "/elsewhere"]

    for _ in range(2):
        with pytest.raises(InvalidStatus):
            connect(live, "/elsewhere")
    wait_until(lambda: len(levels()) == 2, "the lines, which follow the answers")
    assert levels() == ["warning", "debug"]


async def let_in() -> None: ...


def included() -> fastapi.FastAPI:
    host = fastapi.FastAPI(title="shop")
    host.include_router(datadivr.router)
    return host


def mounting() -> fastapi.FastAPI:
    host = fastapi.FastAPI(title="shop")
    host.mount("/", datadivr.app)
    return host


@promise("set your override on the application that serves")
@pytest.mark.parametrize(
    ("make", "overridden", "serving"),
    [
        (included, "datadivr's", "shop"),
        (included, "the host's", None),
        (mounting, "the host's", "datadivr"),
        (mounting, "datadivr's", None),
    ],
)
def test_an_override_of_an_application_that_does_not_serve_is_named_once(
    records: Records, make: Callable[[], fastapi.FastAPI], overridden: str, serving: str | None
) -> None:
    host = make()
    app = host if overridden == "the host's" else datadivr.app
    app.dependency_overrides[datadivr.authorize_client] = let_in
    try:
        with TestClient(host) as client:
            for _ in range(2):
                with client.websocket_connect("/ws"):
                    pass
    finally:
        datadivr.app.dependency_overrides.clear()
    told = [fields["serving"] for fields in records.named("override_not_used")]
    assert [str(serving) in str(name) for name in told] == [True] * (serving is not None)


@promise("| Set `dependency_overrides` on | `host` | `datadivr.app` |")
@promise("**Overrides** belong on the application that serves the clients.")
@promise("and clients come in as if you had none")
@needs_refusals
@pytest.mark.parametrize(
    ("make", "overridden", "holds"),
    [
        (included, "the host's", True),
        (included, "datadivr's", False),
        (mounting, "the host's", False),
        (mounting, "datadivr's", True),
    ],
)
def test_an_override_refuses_where_its_application_serves_and_nowhere_else(
    make: Callable[[], fastapi.FastAPI],
    overridden: str,
    holds: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse() -> None:
        raise fastapi.HTTPException(403, "Not you.")

    host = make()
    app = host if overridden == "the host's" else datadivr.app
    monkeypatch.setitem(app.dependency_overrides, datadivr.authorize_client, refuse)
    status = None
    try:
        with TestClient(host) as client, client.websocket_connect("/ws") as session:
            session.send_json({"event_name": "whoami"})
            assert session.receive_json()["event_name"] == "whoami"
    except WebSocketDenialResponse as denied:
        status = denied.status_code
    assert status == (403 if holds else None)


@promise("has an ERROR for each refused client: leave it out of your alerts | does not |")
@promise("uvicorn logs an ERROR for each client that is refused.")
@needs_refusals
@pytest.mark.parametrize(("make", "errors"), [(included, 2), (mounting, 0)])
def test_uvicorn_logs_an_error_for_each_refused_client_of_an_included_router_alone(
    make: Callable[[], fastapi.FastAPI],
    errors: int,
    configure: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    configure(client_token="of-clients")
    with Live(make()) as live:
        for _ in range(2):
            with pytest.raises(InvalidStatus):
                dial(live.ws)
    told = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.name for record in told] == ["uvicorn.error"] * errors


@promise("must take `HTTPConnection`, as above. One that takes `Request` fails for WebSockets.")
@pytest.mark.parametrize("kind", [fastapi.Request, HTTPConnection])
def test_a_hosts_dependency_must_take_an_http_connection(kind: type[HTTPConnection]) -> None:
    async def note(connection: Any) -> None: ...

    note.__annotations__["connection"] = kind
    host = fastapi.FastAPI(dependencies=[fastapi.Depends(note)])
    host.include_router(datadivr.router)
    fails = pytest.raises(TypeError) if kind is fastapi.Request else contextlib.nullcontext()
    with TestClient(host) as client:
        assert client.get("/healthz").status_code == 200
        with fails, client.websocket_connect("/ws") as session:
            session.send_json({"event_name": "whoami"})
            assert session.receive_json()["event_name"] == "whoami"


@promise("`importlib.reload` while it runs forgets clients and handlers.")
def test_a_reload_while_it_runs_forgets_clients_and_handlers(tmp_path: Path) -> None:
    script = """
        import datadivr, importlib
        from fastapi.testclient import TestClient

        @datadivr.websocket_handler("mine")
        async def mine(message):
            return None

        with TestClient(datadivr.app) as api, api.websocket_connect("/ws") as client:
            client.send_json({"event_name": "whoami"})
            client.receive_json()
            print(len(datadivr.clients), "mine" in datadivr.get_handlers())
            importlib.reload(datadivr)
            print(len(datadivr.clients), "mine" in datadivr.get_handlers())
    """
    ((status, output),) = run_each([(script, {})], tmp_path / "out")
    assert status == 0, output
    assert re.findall(r"^\d (?:True|False)$", output, re.MULTILINE) == ["1 True", "0 False"]


# ---- Cluster: `pytest -m cluster` ----------------------------------------------------------------


@pytest.mark.parametrize("to", ["all", "others"])
def test_a_message_reaches_the_clients_of_every_node(pair: Pair, to: str) -> None:
    here, there = pair
    client_id = id_of(here)
    say(here, "m", payload="ü\n", to=to)
    message = {"event_name": "m", "payload": "ü\n", "to": to, "from_id": client_id, "message": None}
    assert hear(there) == message
    say(there, "last")
    assert hear(here) == message if to == "all" else True
    assert hear(here)["event_name"] == "last"


def test_a_message_to_an_id_reaches_that_client_on_another_node_alone(
    pair: Pair, cluster: Cluster
) -> None:
    here, there = pair
    with dial_node(cluster[2]) as bystander:
        client_id = id_of(here)
        there_id = id_of(there)
        say(here, "m", to=there_id)
        assert hear(there) == {
            "event_name": "m",
            "payload": None,
            "to": there_id,
            "from_id": client_id,
            "message": None,
        }
        say(here, "last")
        assert hear(bystander)["event_name"] == "last"


def test_a_handlers_answer_to_others_reaches_other_nodes(pair: Pair) -> None:
    here, there = pair
    client_id = id_of(here)
    say(here, "tell_others", payload=1)
    assert hear(there)["event_name"] == "told"
    assert ask(here, "double", payload=4)["to"] == client_id


def test_broadcast_reaches_every_node_and_returns_this_nodes_count(
    pair: Pair, cluster: Cluster
) -> None:
    here, there = pair
    id_of(here), id_of(there)
    assert cluster[1].api.post("/tell").json() == 1
    assert hear(here)["event_name"] == hear(there)["event_name"] == "news"


def test_an_announcement_counts_the_clients_of_all_nodes(pair: Pair, cluster: Cluster) -> None:
    here, there = pair
    id_of(here)
    for to, reached in (("all", 2), (id_of(there), 1)):
        answer = cluster[1].api.post("/messages", json={"event_name": "news", "to": to})
        assert (answer.status_code, answer.json()) == (
            202,
            {"recipients": reached, "partial": False},
        )
        assert hear(there)["event_name"] == "news"
    assert hear(here)["to"] == "all"


def test_one_senders_messages_arrive_in_order_on_other_nodes(pair: Pair) -> None:
    here, there = pair
    there_id = id_of(there)
    for number in range(300):
        say(here, "n", payload=number, to=(there_id, "all", "others")[number % 3])
    assert [hear(there)["payload"] for _ in range(300)] == list(range(300))


@pytest.mark.parametrize("named", ["a client that left", "a node that is not there"])
def test_a_message_to_an_id_that_is_nowhere_gets_its_sender_an_error(
    pair: Pair, cluster: Cluster, named: str
) -> None:
    here, there = pair
    client_id, there_id = id_of(here), id_of(there)
    unknown = there_id[:-8] + "00000000" if "client" in named else "00000000" + there_id[8:]
    expected = error(client_id, "unknown_recipient", UNKNOWN, event_name="m")
    assert ask(here, "m", to=unknown) == expected
    assert (
        cluster[1].api.post("/messages", json={"event_name": "m", "to": unknown}).status_code == 404
    )
    assert cluster[1].api.get(f"/clients/{unknown}").status_code == 404


def test_every_node_lists_all_nodes_clients_with_live_counts(pair: Pair, cluster: Cluster) -> None:
    here, there = pair
    here_id, there_id = id_of(here), id_of(there)
    ask(there, "m", to=there_id)
    for node in cluster[1:]:
        page = node.api.get("/clients").json()
        clients = {client["id"]: client for client in page["clients"]}
        assert (page["total"], page["partial"], set(clients)) == (2, False, {here_id, there_id})
        assert {client["node"] for client in page["clients"]} == {here_id[:8], there_id[:8]}
        assert clients[there_id]["messages_received"] == 2
        assert node.api.get(f"/clients/{there_id}").json() == clients[there_id]


@promise("`disconnect_client` finds the client on any node")
@promise("closes a connection of any node with 1008")
def test_a_client_is_disconnected_from_any_node(pair: Pair, cluster: Cluster) -> None:
    _, there = pair
    url = f"/clients/{id_of(there)}"
    assert cluster[1].api.delete(url).status_code == 204
    assert close_code(there) == 1008
    assert [cluster[1].api.delete(url).status_code, cluster[1].api.get(url).status_code] == [
        404,
        404,
    ]


def test_a_walk_misses_no_steady_client_while_others_come_and_go(cluster: Cluster) -> None:
    _, one, two = cluster
    wait_until_calm(cluster)
    stopped = threading.Event()

    def come_and_go(node: Node) -> None:
        while not stopped.wait(0.01):
            with contextlib.suppress(ConnectionClosed), dial_node(node) as client:
                id_of(client)

    crowd = [threading.Thread(target=come_and_go, args=[node]) for node in (one, two)]
    with contextlib.ExitStack() as stack:
        stack.callback(stopped.set)
        steady = set()
        for number in range(60):
            if number == 20:
                for thread in crowd:
                    thread.start()
            steady.add(id_of(stack.enter_context(dial_node((one, two)[number % 2]))))
        try:
            for _ in range(5):
                seen: list[str] = []
                for page in pages(one.api, 7):
                    seen += [client["id"] for client in page["clients"]]
                    assert not page["partial"]
                assert steady <= set(seen)
                assert len(seen) == len(set(seen))
        finally:
            stopped.set()
            for thread in crowd:
                thread.join(LIMIT)


class Flow:
    """Numbered messages from a client of one node, which one client of each node collects."""

    def __init__(self, pair: Pair, cluster: Cluster, stack: contextlib.ExitStack) -> None:
        self.sender = stack.enter_context(dial_node(cluster[1]))
        self.here, self.there = pair
        self.numbers = itertools.count()
        self.last = -1

    def until(self, condition: Callable[[], Any], what: str, messages: int = 1) -> None:
        """Publish, 500 messages a second, until so many have gone and something holds."""
        end = self.last + messages

        def sent() -> bool:
            for _ in range(5):
                self.last = next(self.numbers)
                say(self.sender, "n", payload=self.last, to="all")
            return self.last >= end and bool(condition())

        wait_until(sent, what, 20)

    def collected(self, client: ClientConnection) -> list[int]:
        """Read a client up to the last message."""
        numbers = [-1]
        while numbers[-1] != self.last:
            numbers.append(hear(client)["payload"])
        return numbers[1:]


@pytest.fixture
def flow(pair: Pair, cluster: Cluster) -> Iterator[Flow]:
    with contextlib.ExitStack() as stack:
        yield Flow(pair, cluster, stack)


def joins(log: str) -> tuple[int, int]:
    return log.count("redis_lost"), log.count("redis_joined")


@promise(
    "(gone, or silent for 3 s), nodes serve their own clients",
    "The log has `redis_lost`, then `redis_joined`",
    "1 while Redis answers, if there is one; 1",
    "look at Redis; at who else publishes there",
    "messages are delivered at most once, too; exactly once while Redis is up",
)
@pytest.mark.parametrize("fault", ["killed", "hanging"])
def test_an_outage_of_redis_costs_what_is_counted_and_is_over_by_itself(
    flow: Flow, cluster: Cluster, fault: str
) -> None:
    server, one, two = cluster
    counted = one.redis_errors
    before = [joins(node.log) for node in (one, two)]
    flow.until(lambda: True, "a calm start", 200)
    calm = flow.collected(flow.there)  # or what is under way would be lost with Redis
    if fault == "killed":
        server.kill()
    else:
        server.popen.send_signal(signal.SIGSTOP)
    try:
        with within(8):
            flow.until(lambda: not (one.joined or two.joined), "the loss to be noticed")
        flow.until(lambda: True, "an outage", 300)
    finally:
        if fault == "killed":
            server.start()
        else:
            server.popen.send_signal(signal.SIGCONT)
    with within(8):
        flow.until(lambda: one.joined and two.joined, "the return")
    flow.until(lambda: True, "a calm end", 200)
    here, there = flow.collected(flow.here), calm + flow.collected(flow.there)
    assert here == list(range(flow.last + 1))
    assert there == sorted(set(there))
    assert set(range(200)) | set(range(flow.last - 199, flow.last + 1)) <= set(there)
    assert one.redis_errors - counted > 100  # what was published meanwhile
    for node, (lost, joined) in zip((one, two), before, strict=True):
        assert joins(node.log) == (lost + 1, joined + 1)


@promise(
    "What cannot go to other nodes is dropped and counted",
    "A request for a client of another node is answered with 503",
)
def test_while_redis_is_down_each_node_answers_for_itself(pair: Pair, cluster: Cluster) -> None:
    server, one, _ = cluster
    here, there = pair
    here_id, there_id = id_of(here), id_of(there)
    server.kill()
    try:
        wait_until(lambda: not one.joined, "the loss to be noticed")
        page = one.api.get("/clients").json()
        assert (page["total"], page["partial"], page["clients"][0]["id"]) == (1, True, here_id)
        assert one.api.get(f"/clients/{here_id}").status_code == 200
        assert one.api.get(f"/clients/{there_id}").status_code == 503
        assert one.api.delete(f"/clients/{there_id}").status_code == 503
        counted = one.redis_errors
        assert (
            one.api.post("/messages", json={"event_name": "m", "to": there_id}).status_code == 503
        )
        assert one.api.post("/messages", json={"event_name": "m"}).json() == {
            "recipients": 1,
            "partial": True,
        }
        assert hear(here)["event_name"] == "m"
        text = "The other nodes cannot be reached now: dropped."
        expected = error(here_id, "redis", text, event_name="m", id=7)
        assert ask(here, "m", to=there_id, id=7) == expected
        assert ask(here, "last", to="all")["event_name"] == "last"
        assert one.redis_errors == counted + 4
    finally:
        server.start()


@promise(
    "none falls behind its `DATADIVR_MAX_BUFFER_BYTES` or Redis' "
    "`client-output-buffer-limit pubsub`"
)
def test_what_waits_for_a_hanging_redis_is_bounded() -> None:
    with (
        RedisServer() as server,
        Node(server.url, DATADIVR_MAX_BUFFER_BYTES="100000") as node,
        dial_node(node) as client,
    ):
        id_of(client)
        server.popen.send_signal(signal.SIGSTOP)
        try:
            for _ in range(50):
                ask(client, "m", payload="x" * 10_000, to="all")
            assert node.joined
            assert 38 <= node.redis_errors <= 41  # one or two were under way, and nine wait
        finally:
            server.popen.send_signal(signal.SIGCONT)


@promise(
    "It says that this process answers, and nothing more. Whether Redis answers is in the"
    " metric `datadivr_redis_up`"
)
def test_a_server_starts_without_redis_and_joins_when_it_appears() -> None:
    with RedisServer() as server:
        server.kill()
        with Node(server.url) as one, dial_node(one) as here:
            assert ask(here, "m", to="all")["event_name"] == "m"
            wait_until(lambda: joins(one.log) == (1, 0), "the loss")
            assert not one.joined
            server.start()
            with Node(server.url) as two, dial_node(two) as there:
                id_of(there)
                wait_until(lambda: one.joined, "the first node to join")
                say(here, "m")
                assert hear(there)["event_name"] == "m"


def test_a_killed_subscription_is_noticed_counted_and_replaced(
    pair: Pair, cluster: Cluster
) -> None:
    server, one, two = cluster
    here, there = pair

    def kill() -> float:
        before = one.redis_errors, two.redis_errors
        server.client.client_kill_filter(_type="pubsub", skipme=True)
        start = time.monotonic()
        wait_until(
            lambda: one.redis_errors == before[0] + 1 and two.redis_errors == before[1] + 1,
            "it to be noticed",
        )
        wait_until(lambda: one.joined and two.joined, "their return")
        return time.monotonic() - start

    assert statistics.median(kill() for _ in range(3)) < 1
    say(here, "m")
    assert hear(there)["event_name"] == "m"


def test_a_killed_idle_publisher_costs_nothing(pair: Pair, cluster: Cluster) -> None:
    server, one, two = cluster
    here, there = pair
    for _ in range(3):  # it is not idle while it sends what comes each second
        wait_until(lambda: one.joined and two.joined, "both nodes")
        counted = one.redis_errors
        server.client.client_kill_filter(_type="normal", skipme=True)
        say(here, "m")
        with contextlib.suppress(TimeoutError):
            assert hear(there)["event_name"] == "m"
            if one.redis_errors == counted:
                return
    pytest.fail("each time, something was lost")


@contextlib.contextmanager
def paused(node: Node) -> Iterator[None]:
    node.popen.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.popen.send_signal(signal.SIGCONT)


@promise(
    "If a node does not answer within 1 s, `page.partial` is true: its clients are "
    "missing from the list"
)
def test_a_node_that_does_not_answer_is_left_out_after_a_second(
    pair: Pair, cluster: Cluster
) -> None:
    _, one, two = cluster
    here_id, there_id = (id_of(client) for client in pair)
    with paused(two):
        start = time.monotonic()
        with within(5):
            page = one.api.get("/clients").json()
        assert time.monotonic() - start >= 1
        assert (page["partial"], [client["id"] for client in page["clients"]]) == (True, [here_id])
        assert one.api.get(f"/clients/{there_id}").status_code == 503


def test_a_node_that_was_paused_catches_up(pair: Pair, cluster: Cluster) -> None:
    server, one, two = cluster
    sender, there = pair
    counted = two.redis_errors
    with paused(two):
        for number in range(200):  # 10 MB
            ask(sender, "n", payload=number, to="all", message="x" * 50_000)
            # No faster than Redis, or the sender's node drops what it has no room for.
            server.client.ping()
        wait_until(lambda: one.api.get("/clients").json()["partial"], "a second to pass")
    assert [hear(there)["payload"] for _ in range(200)] == list(range(200))
    assert two.redis_errors == counted


@promise("What a node has missed is not counted")
def test_a_node_that_redis_has_given_up_comes_back(pair: Pair, cluster: Cluster) -> None:
    server, _, two = cluster
    sender, there = pair
    counted, (lost, joined) = two.redis_errors, joins(two.log)
    ask(sender, "n", payload=-1, to="all")
    assert hear(there)["payload"] == -1
    numbers = itertools.count()

    def cut_off() -> bool:
        for _ in range(10):
            ask(sender, "n", payload=next(numbers), to="all", message="x" * 50_000)
            # No faster than Redis, or the sender's node drops what it has no room for.
            server.client.ping()
        return server.client.pubsub_numsub("datadivr:0:all") == [(b"datadivr:0:all", 1)]

    server.client.config_set("client-output-buffer-limit", "pubsub 1mb 1mb 60")
    with paused(two):
        wait_until(cut_off, "Redis to give the node up", 20)
    server.client.config_set("client-output-buffer-limit", "pubsub 32mb 8mb 60")
    wait_until(lambda: joins(two.log) == (lost + 1, joined + 1), "its return")
    end = next(numbers)
    say(sender, "n", payload=end)
    heard = [-1]
    while heard[-1] != end:
        heard.append(hear(there)["payload"])
    assert heard == sorted(set(heard))
    assert two.redis_errors - counted == 1


@promise("They are not in the next list")
def test_a_killed_nodes_clients_are_gone_and_nobody_else_is_disturbed(
    pair: Pair, cluster: Cluster
) -> None:
    server, one, two = cluster
    here, there = pair
    with Node(server.url) as victim, dial_node(victim) as doomed:
        here_id, there_id, doomed_id = id_of(here), id_of(there), id_of(doomed)
        assert one.ids() == {here_id, there_id, doomed_id}
        victim.stop(signal.SIGKILL)
        with within(5):
            wait_until(lambda: one.ids() == two.ids() == {here_id, there_id}, "them to go")
        assert ask(here, "m", to=doomed_id)["payload"]["code"] == "unknown_recipient"
        say(here, "m")
        assert hear(there)["event_name"] == "m"
        assert not one.api.get("/clients").json()["partial"]


def test_a_stopped_nodes_clients_are_gone_at_once_and_its_last_words_are_heard(
    pair: Pair, cluster: Cluster, tmp_path: Path
) -> None:
    server, one, _ = cluster
    here, there = pair
    farewell = """
        from datadivr import app, create_message, websocket_handler

        @websocket_handler("$disconnect")
        async def farewell(message):
            return create_message("left", message.from_id, "all")
    """
    (tmp_path / "application.py").write_text(textwrap.dedent(farewell))
    with Node(server.url, tmp_path, "application:app") as node, dial_node(node) as client:
        here_id, there_id, client_id = id_of(here), id_of(there), id_of(client)
        node.popen.send_signal(signal.SIGTERM)
        assert close_code(client) == 1012
        assert hear(here)["payload"] == client_id
        assert one.ids() == {here_id, there_id}
        assert node.stop() in (0, -signal.SIGTERM)


def test_garbage_on_the_channels_is_counted_logged_and_dropped(
    pair: Pair, cluster: Cluster
) -> None:
    server, one, two = cluster
    here, there = pair
    own = id_of(there)[:8].encode()
    foreign = id_of(there).replace(own.decode(), "0" * 8).encode()
    garbage = [
        b"hello",
        b"0\nall",
        b"0\nall -",
        b"0\nask 1 [",
        b"0\nask x",
        b"0\nanswer x 1",
        b"\xff",
    ]
    garbage += [b"0\nanswer 1 {", b"0\n- - {}", b"0\n" + foreign, b"0\n%b- - {}" % foreign]
    before, lines = two.redis_errors, two.log.count("redis_garbage")
    for channel in (b"datadivr:0:all", b"datadivr:0:" + own):
        for data in garbage:
            server.client.publish(channel, data)
    say(here, "m")
    assert hear(there)["event_name"] == "m"
    assert two.redis_errors - before == 2 * len(garbage)
    assert two.log.count("redis_garbage") in {lines or 1, lines + 1}  # one a minute
    assert one.joined
    assert two.joined


@promise(
    "need a database (`redis://host/1`) or a `DATADIVR_REDIS_PREFIX` of their own",
    "begins the names of the channels there: one an installation",
)
def test_a_prefix_keeps_two_installations_apart(pair: Pair, cluster: Cluster) -> None:
    here, there = pair
    with Node(cluster[0].url, DATADIVR_REDIS_PREFIX="other") as node, dial_node(node) as stranger:
        stranger_id = id_of(stranger)
        assert node.ids() == {stranger_id}
        assert ask(here, "m", to=stranger_id)["payload"]["code"] == "unknown_recipient"
        say(here, "m", to="all")
        assert hear(there)["event_name"] == "m"
        assert ask(stranger, "mine", to="all")["event_name"] == "mine"  # and nothing before it


@needs_sansio  # others read one message a turn
def test_messages_of_one_turn_share_a_publish(cluster: Cluster, pair: Pair) -> None:
    server, one, _ = cluster
    _, there = pair

    def publishes() -> int:
        return int(server.client.info("commandstats")["cmdstat_publish"]["calls"])

    with raw_client(one) as client:
        before = publishes()
        client.sendall(masked('{"event_name": "m"}') * 200)
        for _ in range(200):
            hear(there)
        assert publishes() - before < 40  # probes among them


@promise("`redis://`, `rediss://` or `unix://`: the Redis that makes all processes one server")
@pytest.mark.parametrize("scheme", ["unix", "rediss"])
def test_redis_is_reached_through_a_socket_and_through_tls(tmp_path: Path, scheme: str) -> None:
    options = ["--unixsocket", str(tmp_path / "redis.sock")]
    url = f"unix://{tmp_path / 'redis.sock'}"
    if scheme == "rediss":
        make_certificate(tmp_path)
        port = free_port()
        key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
        options = ["--tls-port", str(port), "--tls-key-file", key, "--tls-cert-file", certificate]
        options += ["--tls-ca-cert-file", certificate, "--tls-auth-clients", "no"]
        url = f"rediss://localhost:{port}?ssl_ca_certs={certificate}"
    with RedisServer(*options), Node(url) as node:
        assert node.joined


def test_a_redis_that_needs_a_password_is_joined_with_it_and_logs_do_not_show_it(
    cluster: Cluster,
) -> None:
    with RedisServer("--requirepass", "hunter2") as server:
        url = server.url.replace("//", "//:{}@")
        with Node(url.format("hunter2")) as right, Node(url.format("wrong-word")) as wrong:
            assert right.joined
            assert not wrong.joined
            assert "redis_lost" in wrong.log
            assert "wrong-word" not in wrong.log


def test_a_redis_that_one_may_not_publish_to_is_lost_once() -> None:
    with RedisServer() as server:
        server.client.execute_command(
            "ACL", "SETUSER", "reader", "on", "nopass", "allchannels", "+@all", "-publish"
        )  # type: ignore[no-untyped-call]
        with Node(server.url.replace("//", "//reader:x@")) as node:
            server.client.execute_command("ACL", "SETUSER", "reader", "+publish")  # type: ignore[no-untyped-call]
            wait_until(lambda: joins(node.log)[1] == 1, "it to join")
            assert joins(node.log) == (1, 1)


START = """
import datadivr
from fastapi.testclient import TestClient
TestClient(datadivr.app).__enter__()
"""


def test_redis_configured_but_not_installed_stops_the_start_with_what_to_install() -> None:
    script = "import sys; sys.modules['redis'] = None\n" + START
    text = run(script, status=1, DATADIVR_REDIS_URL="redis://localhost")
    assert "DATADIVR_REDIS_URL is set, but redis is not installed: pip install redis" in text


def test_a_bad_url_stops_the_start_without_being_shown(tmp_path: Path) -> None:
    urls = [
        "http://:secret@localhost",
        "redis://:secret/x@localhost",
        "redis://:secret@localhost?ssl_ca_certs=x",
        "redis://:secret@localhost?protocol=3",
        "redis://:secret@localhost?encoding=utf-16",
        "redis://:secret@localhost?retry=3",
    ]
    scripts = [(START, {"DATADIVR_REDIS_URL": url}) for url in urls]
    outputs = run_each(scripts, tmp_path / "out")
    assert len(outputs) == len(urls)
    for url, (status, output) in zip(urls, outputs, strict=True):
        assert status == 1, url
        assert "ValueError: DATADIVR_REDIS_URL: " in output, url
        assert "secret" not in output, url


def test_redis_is_not_imported_where_it_is_not_configured() -> None:
    assert run("import sys, datadivr; print('redis' in sys.modules)") == "False\n"


@promise("can speak to every client. Use a password, `rediss://`")
def test_a_line_among_garbage_is_delivered(pair: Pair, cluster: Cluster) -> None:
    _, there = pair
    data = b'00000000\nhello\nall - {"event_name": "m"}\nall'
    cluster[0].client.publish("datadivr:0:all", data)
    assert hear(there) == {"event_name": "m"}


def test_an_error_of_one_publish_is_its_own(cluster: Cluster) -> None:
    with RedisServer() as server:
        channels = ["&datadivr:0:all", "resetchannels"]
        acl = "ACL", "SETUSER", "apart", "on", "nopass", "+@all", *reversed(channels)
        server.client.execute_command(*acl)  # type: ignore[no-untyped-call]
        server.client.execute_command("ACL", "SETUSER", "apart", "allchannels")  # type: ignore[no-untyped-call]
        with Node(server.url.replace("//", "//apart:x@")) as node, dial_node(node) as client:
            own = id_of(client)[:8]
            server.client.execute_command(*acl, f"&datadivr:0:{own}")  # type: ignore[no-untyped-call]
            counted = node.redis_errors
            elsewhere = "ffffffff-0000-8000-8000-000000000000"
            client_socket = client
            for _ in range(5):
                say(client_socket, "m", to="all")
            say(client_socket, "m", to=elsewhere)
            for _ in range(5):
                hear(client)
            wait_until(lambda: node.redis_errors == counted + 1, "the error")
            assert node.joined


def test_a_second_lifespan_in_one_event_loop_joins_again(tmp_path: Path) -> None:
    script = """
        import asyncio
        import datadivr

        async def main():
            for _ in range(2):
                async with datadivr.app.router.lifespan_context(datadivr.app):
                    print(datadivr._hub.nodes._up._value.get(), end=" ")

        asyncio.run(asyncio.wait_for(main(), 10))
    """
    with RedisServer() as server:
        output = run(script, DATADIVR_REDIS_URL=server.url, DATADIVR_LOG_LEVEL="ERROR")
        assert output == "1.0 1.0 "


@promise("Replicas, Sentinels and Redis Cluster are refused")
def test_a_replica_is_refused_with_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--replicaof", "127.0.0.1", str(cluster[0].port), "--dir", str(tmp_path)]
    with RedisServer(*options) as replica, Node(replica.url) as node:
        assert not node.joined
        assert "expected a primary" in node.log


def test_a_redis_cluster_is_refused_with_a_sentence(tmp_path: Path) -> None:
    options = [
        "--cluster-enabled",
        "yes",
        "--cluster-port",
        str(free_port()),
        "--dir",
        str(tmp_path),
    ]
    with RedisServer(*options) as server, Node(server.url) as node:
        assert not node.joined
        assert "expected a primary" in node.log


def test_two_databases_of_one_redis_are_two_installations(pair: Pair, cluster: Cluster) -> None:
    here, there = pair
    with Node(f"{cluster[0].url}/1") as node, dial_node(node) as stranger:
        assert node.ids() == {id_of(stranger)}
        say(here, "m", to="all")
        assert hear(there)["event_name"] == "m"
        assert ask(stranger, "mine", to="all")["event_name"] == "mine"  # and nothing before it


@needs_sansio  # others read one message a turn
def test_messages_to_made_up_clients_of_a_node_share_a_publish(
    pair: Pair, cluster: Cluster
) -> None:
    here, there = pair
    redis_client, node = cluster[0].client, id_of(there)[:8]
    before = redis_client.info("commandstats")["cmdstat_publish"]["calls"]
    made_up = [f"{node}-0000-8000-8000-{number:012}" for number in range(200)]
    messages = [masked(json.dumps({"event_name": "m", "to": to})) for to in made_up]
    here.socket.sendall(b"".join(messages))
    for _ in range(200):
        assert hear(here)["payload"]["code"] == "unknown_recipient"
    after = redis_client.info("commandstats")["cmdstat_publish"]["calls"]
    assert after - before < 200  # 200 there and 200 back, if each took its own


def test_calls_from_another_loop_leave_one_subscription(cluster: Cluster) -> None:
    server, one, two = cluster
    wait_until_calm(cluster)
    for _ in range(3):
        assert one.api.post("/tell_from_a_thread").json() == 0
    assert one.ids() == set()  # the other node answers after it has dealt with these
    with dial_node(one) as here, dial_node(two) as there:
        id_of(here), id_of(there)
        say(there, "m", to="all")
        assert hear(here)["event_name"] == hear(there)["event_name"] == "m"
        assert one.api.post("/tell_from_a_thread").json() == 1
        assert [hear(client)["payload"] for client in (here, there)] == [2, 2]
        for node in (one, two):
            page = node.api.get("/clients").json()
            assert (page["total"], len(page["clients"]), page["partial"]) == (2, 2, False)
        assert [hear_all(client) for client in (here, there)] == [[], []]  # nothing came twice
    assert server.client.pubsub_numsub("datadivr:0:all") == [(b"datadivr:0:all", 2)]


def test_ids_compare_without_case_on_other_nodes_too(pair: Pair, cluster: Cluster) -> None:
    here, there = pair
    client_id = id_of(there).upper()
    say(here, "m", to=client_id)
    assert hear(there)["event_name"] == "m"
    assert cluster[1].api.get(f"/clients/{client_id}").json()["id"] == client_id.lower()


def test_a_pattern_subscriber_beside_them_is_not_taken_for_a_node(
    pair: Pair, cluster: Cluster
) -> None:
    server, one, _ = cluster
    here, there = pair
    ids = {id_of(here), id_of(there)}
    nowhere = "ffffffff-0000-8000-8000-000000000000"
    with server.client.pubsub() as watcher:  # type: ignore[no-untyped-call]
        watcher.psubscribe("*")
        assert watcher.get_message(timeout=LIMIT)
        # A wait for the watcher's answer would make the list partial, and the status 503.
        page = one.api.get("/clients").json()
        assert ({client["id"] for client in page["clients"]}, page["partial"]) == (ids, False)
        assert one.api.get(f"/clients/{nowhere}").status_code == 404
        answer = one.api.post("/messages", json={"event_name": "news"}).json()
        assert answer == {"recipients": 2, "partial": False}
        assert hear(here)["event_name"] == "news"
        assert ask(here, "m", to=nowhere)["payload"]["code"] == "unknown_recipient"


def published(client: Any) -> int:
    """Return how often anybody has published to a Redis."""
    return int(client.info("commandstats").get("cmdstat_publish", {"calls": 0})["calls"])


def test_a_redis_that_could_not_save_is_up_as_long_as_it_publishes(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with RedisServer("--save", "3600", "1", "--dir", str(folder)) as server:
        folder.rmdir()
        server.client.bgsave()
        wait_until(
            lambda: server.client.info("persistence")["rdb_last_bgsave_status"] == "err",
            "the save to fail",
        )
        with pytest.raises(redis.ResponseError, match="MISCONF"):
            server.client.execute_command("PING")  # type: ignore[no-untyped-call]
        with Node(server.url) as one, Node(server.url) as two:
            before = published(server.client)
            wait_until(lambda: published(server.client) >= before + 8, "four probes of each")
            with dial_node(one) as here, dial_node(two) as there:
                id_of(there)
                say(here, "m")
                assert hear(there)["event_name"] == "m"
            for node in (one, two):
                assert joins(node.log) == (0, 1)
                assert node.redis_errors == 0


class Forgetful:
    """A NAT before a Redis: it forgets a connection that is silent for over 4 s, without a word."""

    def __init__(self, port: int) -> None:
        self.redis_port = port
        self.forgotten = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        listening = asyncio.run_coroutine_threadsafe(self.listen(), self.loop)
        self.port = listening.result(LIMIT)

    async def listen(self) -> int:
        self.server = await asyncio.start_server(self.forward, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def forward(self, here: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        heard = time.monotonic()

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            nonlocal heard
            while data := await source.read(1 << 16):
                if time.monotonic() - heard > 4 * SLOWNESS:
                    self.forgotten += 1
                    heard = -math.inf
                    continue
                heard = time.monotonic()
                target.write(data)

        with contextlib.closing(out):
            there, back = await asyncio.open_connection("127.0.0.1", self.redis_port)
            with contextlib.closing(back):
                await asyncio.wait(
                    [asyncio.create_task(copy(here, back)), asyncio.create_task(copy(there, out))],
                    return_when=asyncio.FIRST_COMPLETED,
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self.server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(LIMIT)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(LIMIT)
        self.loop.close()


def test_a_connection_that_is_forgotten_where_it_is_silent_loses_nothing() -> None:
    with (
        RedisServer() as server,
        Forgetful(server.port) as nat,
        Node(f"redis://127.0.0.1:{nat.port}") as one,
        Node(server.url) as two,
        dial_node(one) as here,
        dial_node(two) as there,
    ):
        ids = {id_of(here), id_of(there)}
        start = time.monotonic()
        wait_until(
            lambda: time.monotonic() - start > 5 * SLOWNESS, "more than a silence", pause=0.5
        )
        for number in range(10):
            say(here, "n", payload=number)
        assert [hear(there)["payload"] for _ in range(10)] == list(range(10))
        say(there, "n", payload=10)
        assert hear(here)["payload"] == 10
        page = one.api.get("/clients").json()
        assert ({client["id"] for client in page["clients"]}, page["partial"]) == (ids, False)
        assert one.redis_errors == 0
        assert joins(one.log) == (0, 1)


def test_a_sentinel_is_refused_with_a_sentence(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "sentinel.conf").write_text(f"port {port}\n")
    command = [find("redis-server"), str(tmp_path / "sentinel.conf"), "--sentinel"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path) as sentinel:
        try:
            with socket.socket() as probe:
                wait_until(lambda: not probe.connect_ex(("127.0.0.1", port)), "the sentinel")
            with Node(f"redis://127.0.0.1:{port}") as node:
                wait_until(lambda: "redis_lost" in node.log, "the loss")
                assert not node.joined
                (line,) = (line for line in node.log.splitlines() if "redis_lost" in line)
        finally:
            sentinel.terminate()
    assert "KeyError" not in line
    assert re.search("sentinel", line, re.IGNORECASE)


def test_a_password_that_was_changed_is_told_by_a_sentence() -> None:
    with (
        RedisServer("--requirepass", "hunter2") as server,
        redis.Redis(port=server.port, password="hunter2") as admin,
        Node(server.url.replace("//", "//:hunter2@")) as node,
    ):
        assert node.joined
        admin.config_set("requirepass", "another-word")
        admin.client_kill_filter(skipme=True)
        wait_until(lambda: "DATADIVR_REDIS_URL" in node.log, "the sentence")
        assert "redis_lost" in node.log
        assert not node.joined
        assert "hunter2" not in node.log


def test_the_cluster_is_left_though_a_hosts_lifespan_fails_at_the_stop(cluster: Cluster) -> None:
    script = """
        import asyncio, contextlib
        import datadivr, fastapi

        @contextlib.asynccontextmanager
        async def lifespan(_):
            yield
            raise LookupError("the host's")

        host = fastapi.FastAPI()
        host.include_router(datadivr.router)
        host.include_router(fastapi.APIRouter(lifespan=lifespan))

        async def main():
            before = asyncio.all_tasks()
            try:
                async with host.router.lifespan_context(host):
                    print(asyncio.all_tasks() > before)
            except LookupError as error:
                print(error, asyncio.all_tasks() == before)

        asyncio.run(asyncio.wait_for(main(), 10))
    """
    variables = {"DATADIVR_REDIS_URL": cluster[0].url, "DATADIVR_LOG_LEVEL": "ERROR"}
    assert run(script, **variables) == "True\nthe host's True\n"


@pytest.fixture
def gardeners(pair: Pair, cluster: Cluster) -> Iterator[Pair]:
    """Connect a client in the room "garden" to each node, beside the pair that is in none."""
    _, one, two = cluster
    path = "/in?room=garden"
    with dial_node(one, path) as here:
        id_of(here)  # its node knows of it before the other one comes
        with dial_node(two, path) as there:
            id_of(there)
            yield here, there


def settled(*clients: ClientConnection) -> list[list[Json]]:
    """Return what clients of several nodes have been sent until a message of each has arrived."""
    for number, sender in enumerate(clients):
        say(sender, "settle", payload=[number, id(sender)], to="all")
    heard: list[list[Json]] = []
    for client in clients:
        messages: list[Json] = []
        while sum(message["event_name"] == "settle" for message in messages) < len(clients):
            messages.append(hear(client))
        heard.append([message for message in messages if message["event_name"] != "settle"])
    return heard


@promise("It reaches them on all nodes")
def test_a_room_has_its_members_on_every_node(pair: Pair, gardeners: Pair) -> None:
    here, there = gardeners
    relayed = message_from(id_of(here), "m", "#garden", payload="ü\n")
    say(here, "m", payload="ü\n", to="#garden", id=7)
    assert settled(here, there, *pair) == [[ok(id_of(here), 7)], [relayed], [], []]


@pytest.mark.parametrize("way", ["publish", "reply", "POST", "a thread"])
def test_a_room_is_reached_from_a_node_that_has_no_member(
    pair: Pair, cluster: Cluster, way: str
) -> None:
    here, there = pair
    news: Json = {"event_name": "news", "payload": 1, "to": "#garden"}
    with dial_node(cluster[2], "/in?room=garden") as member:
        id_of(member)
        if way == "POST":
            answer = cluster[1].api.post("/messages", json=news)
            expected: Any = {"recipients": 1, "partial": False}
            assert (answer.status_code, answer.json()) == (202, expected)
        elif way == "a thread":
            assert cluster[1].api.post("/call/broadcast", json=list(news.values())).json() == 0
        else:
            say(here, way, payload=news)
        heard = settled(here, there, member)
    assert heard == [[], [], [message_from("server", **news)]]


def test_an_announcement_counts_a_rooms_members_on_all_nodes(
    cluster: Cluster, gardeners: Pair
) -> None:
    for room, recipients in (("garden", 2), ("cellar", 0)):
        answer = cluster[1].api.post("/messages", json={"event_name": "x", "to": f"#{room}"})
        assert (answer.status_code, answer.json()["recipients"]) == (202, recipients)


@promise(
    "`await join_room(client_id, room, listen_only=False)`, `await leave_room(client_id, "
    "room)` | for a client of any node"
)
@pytest.mark.parametrize("way", ["route", "thread"])
def test_a_client_is_put_into_a_room_and_out_of_it_from_any_node(
    pair: Pair, cluster: Cluster, gardeners: Pair, way: str
) -> None:
    _, one, two = cluster
    here, there = pair
    there_id = id_of(there)

    def change(method: str, listen_only: bool = False) -> int:
        if way == "route":
            url, query = f"/clients/{there_id.upper()}/rooms/garden", {"listen_only": listen_only}
            return one.api.request(method, url, params=query).status_code
        if method == "PUT":
            body = [there_id.upper(), "garden", listen_only]
            return one.api.post("/call/join_room", json=body).status_code
        return one.api.post("/call/leave_room", json=[there_id.upper(), "garden"]).status_code

    done = 204 if way == "route" else 200
    assert change("PUT", listen_only=True) == done
    assert ask(there, "m", to="#garden")["payload"]["code"] == "not_in_room"
    assert change("PUT") == done
    assert two.api.get(f"/clients/{there_id}").json()["rooms"] == ["garden"]
    say(there, "m", payload=1, to="#garden")
    assert hear(gardeners[0]) == message_from(there_id, "m", "#garden", payload=1)
    assert [change("DELETE"), change("DELETE")] == [done] * 2
    assert ask(there, "m", to="#garden")["payload"]["code"] == "not_in_room"
    assert settled(here, there)[0] == []


@promise("asks all nodes who is in a room")
def test_every_node_lists_a_rooms_members_on_all_nodes(
    pair: Pair, cluster: Cluster, gardeners: Pair
) -> None:
    ids = [id_of(client) for client in gardeners]
    for node in cluster[1:]:
        page = node.api.get("/clients", params={"room": "garden"}).json()
        listed = {client["id"]: client["rooms"] for client in page["clients"]}
        assert listed == {client_id: ["garden"] for client_id in ids}
        assert (page["total"], page["partial"], page["next"]) == (2, False, None)
        first = node.api.get("/clients", params={"room": "garden", "limit": 1}).json()
        assert [client["id"] for client in first["clients"]] == ids[:1]
        threaded = node.api.post("/call/list_clients", json=[100, first["next"], "garden"]).json()
        assert [client["id"] for client in threaded["clients"]] == ids[1:]
    assert ask(pair[0], "members", payload="garden")["payload"] == {
        client_id: ["garden"] for client_id in ids
    }


def test_a_node_that_does_not_answer_is_a_503_to_whoever_changes_its_clients_rooms(
    pair: Pair, cluster: Cluster
) -> None:
    there_id = id_of(pair[1])
    url = f"/clients/{there_id}/rooms/garden"
    with paused(cluster[2]):
        assert [cluster[1].api.put(url).status_code, cluster[1].api.delete(url).status_code] == [
            503,
            503,
        ]
        answer = ask(pair[0], "join", payload=["garden"], id=7)  # one's own client is here
        assert answer == ok(id_of(pair[0]), 7)
    for unknown in (there_id[:-8] + "00000000", "nobody", "x\nall - {}"):
        url = f"/clients/{quote(unknown, safe='')}/rooms/garden"
        assert cluster[1].api.put(url).status_code == 404


@pytest.mark.parametrize("named", ["a client that left", "a node that is not there", "nobody"])
def test_a_question_to_nobody_has_its_one_answer_whichever_node_says_so(
    pair: Pair, named: str
) -> None:
    here, there = pair
    here_id, there_id = id_of(here), id_of(there)
    unknown = {
        "a client that left": there_id[:-8] + "00000000",
        "a node that is not there": "00000000" + there_id[8:],
        "nobody": "nobody",
    }[named]
    for number in (7, "7", 0, ""):
        expected = error(here_id, "unknown_recipient", UNKNOWN, event_name="m", id=number)
        assert ask(here, "m", to=unknown, id=number) == expected
    assert settled(here, there) == [[], []]


def test_clients_of_two_nodes_ask_one_another(pair: Pair) -> None:
    here, there = pair
    here_id, there_id = id_of(here), id_of(there)
    for to in (there_id, there_id.upper()):
        say(here, "question", to=to, id=7)
        question = hear(there)
        assert question | {"to": there_id} == message_from(here_id, "question", there_id, id=7)
        say(there, "answer", to=here_id, id=7)
        assert hear(here) == message_from(there_id, "answer", here_id, id=7)
    assert settled(here, there) == [[], []]


@pytest.mark.parametrize("to", ["all", "others", "#garden"])
def test_a_message_relayed_to_many_loses_its_id_on_every_node(gardeners: Pair, to: str) -> None:
    here, there = gardeners
    here_id = id_of(here)
    say(here, "m", to=to, id=7)
    relayed = message_from(here_id, "m", to)
    assert settled(here, there) == [[relayed] * (to == "all") + [ok(here_id, 7)], [relayed]]


def test_messages_of_all_kinds_arrive_in_the_order_sent_on_other_nodes(gardeners: Pair) -> None:
    here, there = gardeners
    goals = ["#garden", id_of(there), "all", "others"]
    for number in range(400):
        say(here, "n", payload=number, to=goals[number % 4])
    assert [hear(there)["payload"] for _ in range(400)] == list(range(400))


# What a text of somebody else's might make of a `to`: lines of the protocol between nodes.
FORGED = '{"event_name":"forged","payload":null,"to":"all","from_id":"server","message":null}'
FORGERIES = [
    "#x\nall - " + FORGED,
    "#garden\nall - " + FORGED,
    "#garden\n",
    "#garden - " + FORGED + "\nall",
    "#\nall - " + FORGED,
    "#x\r\nall - " + FORGED,
    "all\nall - " + FORGED,
    "nobody\nall - " + FORGED,
    "THERE\nall - " + FORGED,
    "THERE\n",
    "THERE - " + FORGED,
    '#x\nask 1 ["disconnect", "THERE"]',
    'THERE\nask 1 ["disconnect", "THERE"]',
]


@pytest.mark.parametrize("to", FORGERIES, ids=json.dumps)
@pytest.mark.parametrize(
    "way",
    [
        "client",
        "publish",
        "publish_copy",
        "publish_changed",
        "reply",
        "reply_copy",
        "forward",
        "POST",
    ],
)
def test_no_text_in_a_messages_to_is_a_line_between_nodes(
    pair: Pair, cluster: Cluster, gardeners: Pair, way: str, to: str
) -> None:
    here, there = pair
    to = to.replace("THERE", id_of(there))
    before = cluster[2].redis_errors
    if way == "POST":
        answer = cluster[1].api.post("/messages", json={"event_name": "m", "to": to})
        assert answer.status_code == (422 if to[0] == "#" else 404)
    else:
        payload: Any = to
        if way in ("publish", "reply"):
            payload = {"event_name": "m", "payload": None, "to": to}
        say(
            here,
            "m" if way == "client" else way,
            payload=payload,
            to=to if way == "client" else "all",
            id=7,
        )
    heard = settled(here, there, *gardeners)
    assert heard[1:] == [[], [], []]
    if way != "POST":
        (answered,) = with_ids(heard[0])  # an error, but where a handler sent to an unknown id
        assert (answered["id"], answered["from_id"]) == (7, "server")
        if to[0] == "#":
            expected = "invalid_message" if way == "client" else "handler_error"
            assert answered["payload"]["code"] == expected
    assert cluster[2].redis_errors == before


def test_garbage_that_looks_like_a_rooms_message_is_counted_and_dropped(
    pair: Pair, cluster: Cluster, gardeners: Pair
) -> None:
    server, _, two = cluster
    garbage = [b"0\n#", b"0\n#garden", b"0\n#garden -"]
    before = two.redis_errors
    for data in garbage:
        server.client.publish("datadivr:0:all", data)
    assert settled(*pair, *gardeners) == [[]] * 4
    assert two.redis_errors - before == len(garbage)
    for data in (b"0\n# - {}", b"0\n#a b - {}", b"0\n#a/b - {}", b"0\n#\xff - {}"):
        server.client.publish("datadivr:0:all", data)
    line = message_from("server", "m", "#garden")
    good = b"0\n#\n#garden - " + json.dumps(line).encode() + b"\n#cellar - {}"
    server.client.publish("datadivr:0:all", good)
    assert settled(*pair, *gardeners) == [[], [], [line], [line]]


def test_a_rooms_message_is_one_line_on_the_channel_of_all(
    cluster: Cluster, gardeners: Pair
) -> None:
    here, there = gardeners
    here_id = id_of(here)
    with cluster[0].client.pubsub() as spy:  # type: ignore[no-untyped-call]
        spy.subscribe("datadivr:0:all")
        assert spy.get_message(timeout=LIMIT)
        say(here, "m", payload="\n", to="#garden", id=7)
        assert hear(there)["event_name"] == "m"
        heard = spy.get_message(timeout=LIMIT)
    text = '{"event_name":"m","payload":"\\n","to":"#garden","from_id":"%s","message":null}'
    expected = f"{here_id[:8]}\n#garden - {text % here_id}"
    assert heard is not None
    assert heard["data"].decode() == expected


def test_calls_from_threads_subscribe_to_redis_once(pair: Pair, cluster: Cluster) -> None:
    """With nobody connected each used to add a subscription, and messages came twice."""
    server, one, _ = cluster
    for client in pair:
        client.close()
    wait_until(lambda: not one.ids(), "the clients to go")
    before = server.client.pubsub_numsub("datadivr:0:all")
    for _ in range(3):
        one.api.post("/call/broadcast", json=["news", 1, "all"])
        one.api.post("/call/list_clients", json=[])
        one.api.post("/call/join_room", json=["nobody", "garden"])
    assert server.client.pubsub_numsub("datadivr:0:all") == before
    with (
        dial_node(one, "/in?room=garden") as here,
        dial_node(cluster[2], "/in?room=garden") as there,
    ):
        id_of(here), id_of(there)
        one.api.post("/call/broadcast", json=["news", 1, "#garden"])
        assert [len(heard) for heard in settled(here, there)] == [1, 1]


@contextlib.contextmanager
def older_node(server: RedisServer, answer: Any) -> Iterator[list[str]]:
    """Answer each question as a node of another version might, until the end."""
    over, asked = threading.Event(), []

    def listen() -> None:
        with redis.Redis(port=server.port) as client, client.pubsub() as pubsub:
            pubsub.subscribe("datadivr:0:all")
            while not over.is_set():
                message = pubsub.get_message(ignore_subscribe_messages=True, timeout=0.1)
                if message is None:
                    continue
                node, *lines = message["data"].decode().split("\n")
                for line in lines:
                    if line.startswith("ask "):
                        asked.append(line)
                        reply = f"0ld0ld00\nanswer {line.split()[1]} {json.dumps(answer)}"
                        client.publish(f"datadivr:0:{node}", reply)

    before = dict(server.client.pubsub_numsub("datadivr:0:all"))[b"datadivr:0:all"]
    thread = threading.Thread(target=listen)
    thread.start()
    wait_until(
        lambda: dict(server.client.pubsub_numsub("datadivr:0:all"))[b"datadivr:0:all"] > before,
        "it to listen",
    )
    try:
        yield asked
    finally:
        over.set()
        thread.join(LIMIT)


OLDER_CLIENT = {
    "id": "0ld0ld00-0000-8000-8000-000000000000",
    "node": "0ld0ld00",
    "address": "192.0.2.1:5",
    "user": None,
    "connected_at": "2026-01-01T00:00:00.000000Z",
    "messages_received": 0,
    "messages_sent": 0,
    "buffered_bytes": 0,
}
OLDER_KEY = "".join(str(OLDER_CLIENT[name]) for name in ("connected_at", "id"))


@pytest.mark.parametrize(
    "answer",
    [
        None,  # it does not know the question
        [1, [[OLDER_KEY, OLDER_CLIENT]]],
        [1, [[OLDER_KEY, {k: v for k, v in OLDER_CLIENT.items() if k != "user"}]]],
        [1, [[OLDER_KEY, OLDER_CLIENT | {"rooms": ["garden"], "newer": 1}]]],
    ],
    ids=["null", "without rooms", "without users", "newer"],
)
@pytest.mark.parametrize("room", ["", "garden"])
def test_nothing_that_an_older_node_answers_breaks_the_list(
    pair: Pair, cluster: Cluster, gardeners: Pair, answer: Any, room: str
) -> None:
    members = {id_of(client) for client in (gardeners if room else (*pair, *gardeners))}
    with older_node(cluster[0], answer) as asked:
        listed = cluster[1].api.get("/clients", params={"room": room} if room else {})
        assert listed.status_code == 200, listed.text
        assert members <= {client["id"] for client in listed.json()["clients"]}
        wait_until(lambda: asked, "the question")
        page = cluster[1].api.post("/call/list_clients", json=[100, "", room or None])
        assert page.status_code == 200


def test_three_nodes_share_rooms_questions_and_lists(pair: Pair, cluster: Cluster) -> None:
    server, one, two = cluster
    path = "/in?room=garden"
    with (
        Node(server.url, one.folder, "application:app") as three,
        dial_node(one, path) as first,
        dial_node(two, path) as second,
        dial_node(three, path) as third,
    ):
        members = [first, second, third]
        ids = [id_of(client) for client in members]
        say(third, "m", to="#garden", id=7)
        relayed = message_from(ids[2], "m", "#garden")
        assert settled(*members, *pair) == [[relayed], [relayed], [ok(ids[2], 7)], [], []]
        assert one.api.put(f"/clients/{ids[2]}/rooms/shed").status_code == 204
        for node in (one, two, three):
            page = node.api.get("/clients", params={"room": "garden"}).json()
            assert {client["id"] for client in page["clients"]} == set(ids)
            rooms = {client["id"]: client["rooms"] for client in page["clients"]}
            assert rooms[ids[2]] == ["garden", "shed"]
            body = {"event_name": "news", "to": "#garden"}
            assert node.api.post("/messages", json=body).json()["recipients"] == 3
        heard = settled(*members)
        assert [[message["event_name"] for message in messages] for messages in heard] == [
            ["news"] * 3
        ] * 3
        three.stop(signal.SIGKILL)
        page = one.api.get("/clients", params={"room": "garden"}).json()
        assert {client["id"] for client in page["clients"]} == set(ids[:2])


@promise("a Redis user with no more than `+@pubsub +@connection +info &datadivr:*`")
def test_the_rights_that_the_readme_gives_a_redis_user_are_enough() -> None:
    (rights,) = re.findall(r"user with no more than `(.*?)`", README)
    with RedisServer() as server:
        rules = "ACL", "SETUSER", "low", "reset", "on", ">word", *rights.split()
        server.client.execute_command(*rules)  # type: ignore[no-untyped-call]
        url = server.url.replace("//", "//low:word@")
        with Node(url) as one, Node(url) as two:
            wait_until(lambda: one.joined and two.joined, "the nodes to join")
            with dial_node(one) as here, dial_node(two) as there:
                ids = {id_of(here), id_of(there)}
                say(here, "m", to="others")
                assert hear(there)["event_name"] == "m"
                for node in (one, two):
                    page = node.api.get("/clients").json()
                    assert {client["id"] for client in page["clients"]} == ids
                    assert page["partial"] is False
            assert one.redis_errors + two.redis_errors == 0


@promise("Limits are a process's.")
def test_each_node_lets_in_as_many_clients_as_the_limit() -> None:
    with RedisServer() as server, contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(Node(server.url, DATADIVR_MAX_CLIENTS="1")) for _ in range(2)]
        wait_until(lambda: all(node.joined for node in nodes), "the nodes to join")
        with contextlib.ExitStack() as clients:
            for node in nodes:
                assert id_of(clients.enter_context(dial(node.ws)))
            for node in nodes:
                with pytest.raises(InvalidStatus) as refused:
                    dial(node.ws)
                assert refused.value.response.status_code == 503


@promise(
    "Otherwise each process makes up a token of its own, with Redis or without, and a request gets"
    " 401 from any process but one."
)
def test_the_token_that_a_process_makes_up_is_no_other_processs() -> None:
    command = ["-u", "DATADIVR_ADMIN_TOKEN", sys.executable, "-m", "uvicorn", "datadivr:app"]
    command += ["--port", "{port}"]
    env = find("env")
    with Process(*command, program=env) as one, Process(*command, program=env) as two:

        def shown(node: Process) -> str:
            node.wait_until_up()
            wait_until(lambda: "#token=" in node.log, "its token")
            (token,) = re.findall(r"#token=([\w-]+)", node.log)
            return str(token)

        tokens = shown(one), shown(two)
        for node, other, token in ((one, two, tokens[0]), (two, one, tokens[1])):
            headers = {"Authorization": f"Bearer {token}"}
            assert http.get(f"{node.url}/clients", headers=headers).status_code == 200
            assert http.get(f"{other.url}/clients", headers=headers).status_code == 401


# ---- Running it: `pytest -m running` -------------------------------------------------------------


def test_the_documented_program_runs_and_replaces_the_sum_handler(tmp_path: Path) -> None:
    program = """
        import uvicorn
        from datadivr import app, HandlerType, websocket_handler, WebSocketMessage
        from datadivr.transport.messages import create_error_message

        @websocket_handler("sum_event", HandlerType.SERVER)
        async def sum_handler(message: WebSocketMessage) -> WebSocketMessage:
            try:
                numbers = message.payload.get("numbers", [])
                return WebSocketMessage(
                    event_name="sum_result", payload={"result": sum(numbers)}, to=message.from_id
                )
            except Exception as e:
                return create_error_message(str(e), message.from_id)

        if __name__ == "__main__":
            uvicorn.run(app, host="127.0.0.1", port=8765)
    """
    port = free_port()
    program = textwrap.dedent(program).replace("8765", str(port))
    (tmp_path / "program.py").write_text(program)
    with Process("program.py", cwd=tmp_path, port=port) as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            answer = ask(client, "sum_event", payload={"numbers": [1, 2]})
            assert (answer["event_name"], answer["payload"]) == ("sum_result", {"result": 3})
            failed = ask(client, "sum_event", payload={"numbers": ["x"]})
            assert (failed["event_name"], failed["payload"]) == ("error", {"code": "error"})


def test_run_as_a_program_it_is_the_module_that_handlers_import(tmp_path: Path) -> None:
    ours = "import datadivr as again\nassert again.app is app and again.__name__ == '__main__'\n"
    head, tail = (ROOT / "datadivr.py").read_text().split('if __name__ == "__main__":\n')
    (tmp_path / "datadivr.py").write_text(f'{head}{ours}if __name__ == "__main__":\n{tail}')
    with Process("datadivr.py", "--port", "{port}", cwd=tmp_path) as process:
        process.wait_until_up()
        with dial(process.ws, max_size=None) as client:
            assert id_of(client)
            client.send("x" * (1 << 20) + "x")
            assert close_code(client) == 1009
        assert process.stop() in (0, -signal.SIGTERM)


def test_the_inline_metadata_agrees_with_the_project() -> None:
    block = re.search(
        r"^# /// script\n((?:#.*\n)+)# ///$", (ROOT / "datadivr.py").read_text(), re.MULTILINE
    )
    assert block is not None
    inline = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert inline == {
        "requires-python": project["requires-python"],
        "dependencies": project["dependencies"],
    }


@promise(
    "Run the server, with Python 3.11 or later:",
    "pip install fastapi 'uvicorn[standard]' structlog prometheus-client`.",
)
def test_the_readme_names_the_python_and_the_packages_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.findall(r"with Python (\S+) or later", README) == [
        project["requires-python"].removeprefix(">=")
    ]
    ((packages),) = re.findall(r"pip install (fastapi '.*)`\.", README)
    needed = {text.partition(">=")[0] for text in project["dependencies"]}
    assert {*shlex.split(packages), "pydantic"} == needed  # which FastAPI brings


@promise("is uvicorn's (`--ssl-keyfile`, `--ssl-certfile`) or a proxy's")
@needs_sansio
def test_a_stop_under_tls_does_not_wait_for_clients(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    tls = [
        "--ssl-keyfile",
        str(tmp_path / "key.pem"),
        "--ssl-certfile",
        str(tmp_path / "certificate.pem"),
    ]
    trust = ssl.create_default_context(cafile=tmp_path / "certificate.pem")
    with Process("-m", "uvicorn", "datadivr:app", "--port", "{port}", *tls) as process:
        wait_until(lambda: "running on" in process.log, "the server to start")
        with dial(f"wss://localhost:{process.port}/ws", ssl=trust) as client:
            assert id_of(client)
            idle = trust.wrap_socket(
                socket.create_connection(("localhost", process.port)), server_hostname="localhost"
            )
            with idle:
                idle.sendall(UPGRADE)
                assert idle.recv(4096).startswith(b"HTTP/1.1 101")
                with within(5):
                    process.stop()


@promise(
    "On SIGTERM, uvicorn's clients get a close frame (1012), and stalled ones are cut off after 2 s"
)
@needs_sansio
def test_sigterm_closes_every_client_and_ends_in_time_with_stalled_ones_connected() -> None:
    codes: list[int | None] = []
    with (
        Process("-m", "uvicorn", "datadivr:app", "--port", "{port}") as process,
        contextlib.ExitStack() as stack,
    ):
        process.wait_until_up()
        stalled = [stack.enter_context(raw_client(process, buffer=4096)) for _ in range(3)]
        url = process.ws
        clients = [stack.enter_context(dial(url, max_size=None)) for _ in range(20)]
        for client in stalled:
            stall(process, id_of(client))

        def talk(client: ClientConnection) -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    ask(client, "load", payload="x" * 100, to="all")
            codes.append(close_code(client))

        talker = threading.Thread(target=talk, args=clients[:1])
        readers = [
            threading.Thread(target=lambda c=client: codes.append(close_code(c)))
            for client in clients[1:]
        ]
        for thread in (talker, *readers):
            thread.start()
        wait_until(lambda: metrics(process)["messages_sent_total"] > 2000, "the load")
        assert total(process) == 23
        with within(5):
            status = process.stop()
        for thread in (talker, *readers):
            thread.join(LIMIT)
    assert codes == [1012] * 20
    assert status == -signal.SIGTERM
    assert "Traceback" not in process.log


@promise(
    "serve on 127.0.0.1:8765, or on `--host` and `--port`. They take 5 s at most for the stop."
)
@pytest.mark.parametrize(
    ("options", "host", "port"),
    [("", "127.0.0.1", 8765), ("--host 0.0.0.0 --port 9000", "0.0.0.0", 9000)],
)
def test_main_serves_this_machine_alone_unless_it_is_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, options: str, host: str, port: int
) -> None:
    told: Json = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: told.update(given, app=app))
    monkeypatch.setattr(sys, "argv", ["datadivr", *options.split()])
    datadivr.main()
    assert told == {
        "app": datadivr.app,
        "host": host,
        "port": port,
        "workers": 1,
        "ws_max_size": datadivr._settings().max_message_bytes,
        "timeout_graceful_shutdown": 5,
    }


WORK = """
    import asyncio
    from pathlib import Path

    from datadivr import WebSocketMessage, app, websocket_handler

    @websocket_handler("work")
    async def work(message: WebSocketMessage[int]) -> None:
        Path("begun").touch()
        await asyncio.sleep(message.payload)
        Path("done").touch()
"""


@promise("uvicorn waits for handlers, up to its `--timeout-graceful-shutdown`")
@pytest.mark.parametrize(("seconds", "limit"), [(1, 5), (30, 1)])
def test_the_stop_waits_for_a_handler_up_to_the_limit(
    tmp_path: Path, seconds: int, limit: int
) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(WORK))
    options = [*SERVERS["uvicorn"], "--timeout-graceful-shutdown", str(limit)]
    with Process(*options, cwd=tmp_path) as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            say(client, "work", payload=seconds)
            wait_until((tmp_path / "begun").exists, "the handler to begin")
            with within(5):
                process.stop()
    assert (tmp_path / "done").exists() == (seconds < limit)


HANGING = """
    import time

    import datadivr

    @websocket_handler("block")
    def block(message: WebSocketMessage[int]) -> None:
        Path("begun").touch()
        time.sleep(message.payload)

    datadivr.main()
"""


@promise("`python datadivr.py` waits 5 s at most")
@pytest.mark.parametrize("event_name", ["work", "block"])
def test_main_stops_after_5_seconds_though_a_handler_hangs(tmp_path: Path, event_name: str) -> None:
    (tmp_path / "application.py").write_text(textwrap.dedent(WORK) + textwrap.dedent(HANGING))
    with Process("application.py", "--port", "{port}", cwd=tmp_path) as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            say(client, event_name, payload=60)
            wait_until((tmp_path / "begun").exists, "the handler to begin")
            start = time.monotonic()
            process.stop()
            assert 4.5 < time.monotonic() - start < 5 + 3 * SLOWNESS


# ---- The browser's client: `pytest -m client` ----------------------------------------------------


HEALTHY = '{"status": "ok"}'
CLIENT_PAGE = """
    globalThis.tries = []; // when a connection was tried
    globalThis.failed = globalThis.checked = 0; // attempts, and questions for the server's health
    globalThis.latest = undefined;
    globalThis.states = [];
    globalThis.heard = [];
    globalThis.thrown = [];
    globalThis.reportError = (error) => thrown.push(error);
    globalThis.WebSocket = class extends WebSocket {
        constructor(...words) {
            super(...words);
            tries.push(Date.now());
            globalThis.latest = this;
            this.addEventListener("error", () => { failed += 1; });
        }
    };
    const request = fetch;
    globalThis.fetch = async (...words) => {
        try {
            const response = await request(...words);
            return new Response(await response.text(), response);
        } finally { checked += 1; }
    };
    globalThis.go = async (options) => {
        const { connect } = await import("/client.js?v=2");
        globalThis.server = connect({
            onmessage: (message) => heard.push(message),
            onstate: (...words) => states.push(words),
            ...options,
        });
        globalThis.early = states.length;
    };
    globalThis.ask = (...words) => {
        globalThis.outcome = null;
        server.ask(...words).then(
            ({ event_name, payload }) => { outcome = [event_name, payload]; },
            ({ code, message }) => { outcome = ["Error", code, message]; },
        );
    };
"""


def load_client(page: Page, url: str, module: str = "/client.js?v=2") -> None:
    """Open a page that has the client."""
    page.goto(url)
    page.evaluate(f"() => {{ {CLIENT_PAGE.replace('/client.js?v=2', module)} }}")


class Tab:
    """A page with the client and a clock that stands still; a test plays the server of `play`."""

    def __init__(self, page: Page, server: Served) -> None:
        self.page = page
        self.server = server
        self.sockets: list[WebSocketRoute] = []
        self.told: list[Json] = []  # what the server that is played has heard
        self.complaints: list[str] = []
        page.on("pageerror", lambda raised: self.complaints.append(str(raised)))
        page.clock.install(time=0)
        page.clock.pause_at(1000)
        self.load()

    def load(self) -> None:
        load_client(self.page, f"{self.server.url}/healthz")
        self.get("Math.random = () => 0")

    def _accept(self, socket: WebSocketRoute) -> None:
        self.sockets.append(socket)
        socket.on_message(lambda text: self.told.append(json.loads(text)))
        socket.on_close(lambda code, reason: None)  # a close of the page's stays without an answer

    def go(self, **options: Any) -> None:
        self.page.evaluate("(options) => go(options)", options)

    def go_in(self, **options: Any) -> None:
        self.go(**options)
        self.wait_for_state("open")

    def go_nowhere(self) -> None:
        self.go(url=f"ws://127.0.0.1:{free_port()}/ws")

    def play(self, callbacks: str = "{}") -> None:
        self.page.route_web_socket(re.compile("/played/ws$"), self._accept)
        self.load()
        self.get(f"go({{ url: '/played/ws', ...{callbacks} }})")
        self.wait_for_state("open")

    def get(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def ask(self, *words: Any) -> None:
        self.page.evaluate("(words) => ask(...words)", words)

    def outcome(self) -> Any:
        self.wait_for("outcome")
        return self.get("outcome")

    def hears(self, **message: Any) -> None:
        defaults = {"event_name": "m", "payload": None, "to": "me", "from_id": "server"}
        self.sockets[-1].send(json.dumps({**defaults, "message": None, **message}))

    def wait_for(self, condition: str) -> None:
        wait_until(lambda: self.get(condition), condition)

    def wait_for_state(self, state: str) -> None:
        self.wait_for(f"states.at(-1)?.[0] === '{state}'")

    def wait_for_told(self, count: int) -> Json:
        wait_until(lambda: self.get("1") and len(self.told) == count, "the page to speak")
        return self.told[-1]

    def wait_for_failure(self, count: int) -> None:
        """Wait until attempts have failed, and the client knows for each if the server is there."""
        self.wait_for(f"failed === {count} && checked === {count}")
        self.get("new Response('').text()")

    def run_for(self, milliseconds: int) -> None:
        self.page.clock.run_for(milliseconds)


@pytest.fixture(scope="module")
def still(browser: Browser) -> Iterator[BrowserContext]:
    """Keep a page open beside those of `context`, whose clock must go: a clock is a context's."""
    with browser.new_context() as context:
        context.new_page()
        yield context


@pytest.fixture
def tab(still: BrowserContext, live: Live) -> Iterator[Tab]:
    with still.new_page() as page:
        opened = Tab(page, live)
        yield opened
        assert opened.complaints == []


@promise("The server itself serves it, beside `/ws`")
@promise("The server serves the module, beside `/ws`; you need no file of that name")
def test_the_clients_module_is_served_to_pages_from_anywhere_until_it_changes(
    api: httpx.Client,
) -> None:
    answer = api.get("/client.js")
    assert answer.text == datadivr._files["client.js"]
    assert answer.headers["content-type"].split(";")[0] == "text/javascript"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["access-control-allow-origin"] == "*"
    head = api.head("/client.js")
    assert (head.status_code, head.text, head.headers) == (200, "", answer.headers)
    etag = answer.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):  # a proxy that compresses says W/
        answer = api.get("/client.js", headers={"If-None-Match": known})
        assert (answer.status_code, answer.text, answer.headers["etag"]) == (304, "", etag)
    assert api.get("/client.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_clients_source_is_short_and_as_prettier_leaves_it() -> None:
    assert_formatted("client.js", "babel", 140)


def test_the_clients_types_are_sound(tmp_path: Path) -> None:
    (tmp_path / "client.js").write_text(datadivr._files["client.js"])
    (tmp_path / "use.js").write_text("""
        import { connect } from "./client.js";
        const server = connect({ token: null, onmessage: ({ payload }) => payload.any,
            onstate: (state, reason) => state === "refused" && reason.length });
        server.send("chat", { text: "hi" }, { to: "#garden" });
        (await server.ask("sum_event", [1], { to: "others", timeout: 10000 })).payload;
        server.close();
        // @ts-expect-error
        connect({ onstate: (state) => state === "opened" });
    """)
    tsc = node_module("typescript/bin/tsc")
    options = "--checkJs --strict --noEmit --target es2022 --lib es2022,dom --module esnext"
    command = [find("node"), str(tsc), *options.split(), "--types", "", "client.js", "use.js"]
    assert output_of(*command, cwd=tmp_path) == ""


HOSTED = {
    "page": "<script type=module src=/script></script>",
    "worker": "<script type=module src=/start></script>",
    "script": """
        const open = (module) => import(module).then(({ connect }) => new Promise((resolve) => {
            const onstate = (state) => state === "open" && resolve(server.ask("whoami"));
            const server = connect({ onstate });
        }));
        const opened = ["/one", "/two", "/three"].map((prefix) => open(`${prefix}/client.js?v=2`));
        const ids = (await Promise.all(opened)).map(({ payload }) => payload);
        if (globalThis.document) globalThis.ids = ids;
        else postMessage(ids);
    """,
    "start": """
        const worker = new Worker("/script", { type: "module" });
        worker.onmessage = ({ data }) => { globalThis.ids = data; };
    """,
}


@promise(
    'write `import { connect } from "./client.js"`. In a page of a deeper folder, write '
    "`../client.js`",
    "The module finds the server by its own URL. It has no dependencies.",
)
@pytest.mark.parametrize("kind", ["page", "worker"])
def test_the_client_finds_its_server_below_prefixes_and_mounts_under_a_strict_policy(
    context: BrowserContext, kind: str
) -> None:
    host = fastapi.FastAPI()
    host.include_router(datadivr.router, prefix="/one")
    host.include_router(datadivr.router, prefix="/two")
    host.mount("/three", datadivr.app)

    @host.get("/{name}")
    def get(name: str) -> fastapi.Response:
        media_type = "text/html" if name == kind else "text/javascript"
        policy = "default-src 'none'; script-src 'self'; connect-src 'self'; worker-src 'self'"
        headers = {"Content-Security-Policy": policy}
        return fastapi.Response(HOSTED.get(name, ""), media_type=media_type, headers=headers)

    with Live(host) as running, context.new_page() as page:
        complaints: list[str] = []
        urls: list[str] = []
        page.on("websocket", lambda socket: urls.append(httpx.URL(socket.url).path))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"{running.url}/{kind}")
        wait_until(lambda: page.evaluate("globalThis.ids"), "three connections")
        assert set(page.evaluate("ids")) == set(datadivr.clients)
        assert kind == "worker" or sorted(urls) == ["/one/ws", "/three/ws", "/two/ws"]
        assert [text for text in complaints if "favicon" not in text] == []


def test_the_client_of_a_renamed_file_finds_it_behind_nginx_under_a_path(
    context: BrowserContext, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "datadivr.py", tmp_path / "messages.py")
    (passed,) = re.findall(r"`location (\S+) \{` and `proxy_pass", README)
    command = ["-m", "uvicorn", "messages:app", "--port", "{port}", "--root-path", passed[:-1]]
    with Process(*command, cwd=tmp_path) as process:
        configuration = block("nginx", "location").replace("location /", f"location {passed}")
        configuration = configuration.replace(":8000", f":{process.port}/")
        with nginx(tmp_path, configuration) as proxy, context.new_page() as page:
            process.wait_until_up()
            proxy.wait_until_up(f"{passed}healthz")
            url = f"{proxy.url}{passed}"
            load_client(page, f"{url}healthz", f"{url}client.js")
            page.evaluate("go()")
            wait_until(lambda: page.evaluate("states.at(-1)?.[0]") == "open", "the page")


@promise("Or import `https://other.example/client.js`, where that server lists the page's origin")
def test_a_page_from_elsewhere_imports_the_client_and_is_let_in_where_it_is_listed(
    tab: Tab, configure: Callable[..., None]
) -> None:
    configure(allowed_origins=(f"http://localhost:{tab.server.port}",))
    module = f"{tab.server.url}/client.js"
    load_client(tab.page, f"http://localhost:{tab.server.port}/healthz", module)
    tab.go_in()


@promise("// DATADIVR_CLIENT_TOKEN, or what your own log-in asks for")
def test_the_client_brings_its_token(tab: Tab, configure: Callable[..., None]) -> None:
    configure(client_token="let-me-in")
    tab.go_in(token="let-me-in")


@promise("`connect` throws a `SyntaxError`")
def test_a_token_that_no_handshake_can_carry_is_an_error_of_connect_itself(tab: Tab) -> None:
    raised = tab.get("go({ token: 'a b' }).catch((error) => `${error.name}: ${error.message}`)")
    assert re.match("SyntaxError: .* 'a b' is invalid", raised)
    assert tab.get("[tries.length, states.length]") == [0, 0]


def test_the_client_makes_no_globals_and_tells_no_state_before_connect_has_returned(
    tab: Tab,
) -> None:
    names = "Object.getOwnPropertyNames(globalThis).sort()"
    before = tab.get(names)
    tab.go_in()
    assert sorted({*tab.get(names)} - {*before}) == ["early", "server"]
    assert tab.get("[early, states]") == [0, [["connecting", ""], ["open", ""]]]


@promise("it tries again for as long as the page lives, after 0.5 to 30 s")
@pytest.mark.parametrize("luck", [0, 1])
def test_the_client_tries_again_for_ever_after_pauses_that_grow_to_30_seconds(
    tab: Tab, luck: int
) -> None:
    pauses = [500, 1000, 2000, 4000, 8000, 10000, 10000]
    tab.get(f"Math.random = () => {luck}")
    tab.go_nowhere()
    for count, shortest in enumerate(pauses, 1):
        pause = shortest * (3 if luck else 1)
        tab.wait_for_failure(count)
        tab.run_for(pause - 1)
        assert tab.get("tries.length") == count
        tab.run_for(1)
        assert tab.get("tries.length") == count + 1
    assert tab.get("states") == [["connecting", ""]]


@pytest.mark.parametrize("event", ["online", "visibilitychange"])
def test_the_client_tries_at_once_where_the_network_or_the_reader_is_back(
    tab: Tab, event: str
) -> None:
    tab.go_nowhere()
    tab.wait_for_failure(1)
    happen = f"""() => {{
        document.dispatchEvent(new Event("{event}", {{ bubbles: true }}));
        document.dispatchEvent(new Event("{event}", {{ bubbles: true }})); // while it tries
        return tries.length;
    }}"""
    if event == "visibilitychange":
        tab.get("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
        assert tab.get(happen) == 1  # the reader has left
        tab.get("Object.defineProperty(document, 'hidden', { value: false })")
    assert tab.get(happen) == 2
    tab.wait_for_failure(2)
    tab.run_for(1000)
    assert tab.get("tries.length") == 3  # the pause that was cut short is gone


def test_the_client_gives_up_a_handshake_that_has_no_end(tab: Tab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tab.go(url=f"ws://127.0.0.1:{silent.getsockname()[1]}/ws")
        tab.run_for(19_999)
        tab.run_for(500)
        assert tab.get("tries.length") == 1
        tab.run_for(1)
        assert tab.get("tries.length") == 2
        tab.get("server.close()")


@promise(
    "It imports the module `client.js`, which connects, and connects again whenever the "
    "connection is lost"
)
@promise("then the reason of the close, which may be empty, or `The server does not answer.`")
def test_the_client_comes_back_when_an_open_connection_is_lost(tab: Tab) -> None:
    tab.play()
    for count in (1, 2):  # the pause is as short as at first
        tab.sockets[-1].close(code=1013, reason="Too slow")
        tab.wait_for_state("connecting")
        tab.run_for(499)
        assert tab.get("tries.length") == count
        tab.run_for(1)
        tab.wait_for_state("open")
        assert tab.get("tries.length") == count + 1
    assert tab.get("states.slice(2, 4)") == [["connecting", "Too slow"], ["open", ""]]


@promise(
    "A page with `client.js` stays away until you load it again",
    "stays away until it is loaded again, or calls `connect` again",
)
@promise(
    "by the server with 1008, as an administrator does; that is for good, until the page is loaded"
)
def test_a_client_that_an_administrator_disconnects_stays_away(tab: Tab) -> None:
    tab.go_in()
    wait_until(lambda: datadivr.clients, "the server to have it, too")
    (client_id,) = datadivr.clients
    tab.server.api.delete(f"/clients/{client_id}")
    tab.wait_for_state("closed")
    tab.get("dispatchEvent(new Event('online'))")
    tab.run_for(100_000)
    assert tab.get("states.at(-1)") == ["closed", "Disconnected by an administrator"]
    assert tab.get("tries.length") == 1


@promise("`client.js` says `refused` after three times")
def test_a_client_that_is_refused_three_times_says_so_and_goes_on_every_30_seconds(
    tab: Tab, configure: Callable[..., None]
) -> None:
    tab.go(url=f"ws://localhost:{tab.server.port}/ws")  # of another origin than the page
    for count, pause in ((1, 500), (2, 1000)):
        tab.wait_for_failure(count)
        assert tab.get("states") == [["connecting", ""]]
        tab.run_for(pause)
    for count in (3, 4):
        tab.wait_for_failure(count)
        tab.wait_for_state("refused")
        tab.run_for(29_999)
        assert tab.get("tries.length") == count
        tab.run_for(1)
        assert tab.get("tries.length") == count + 1
    tab.wait_for_failure(5)
    configure(allowed_origins=(tab.server.url,))
    tab.get("dispatchEvent(new Event('online'))")
    tab.wait_for_state("open")
    configure(allowed_origins=())
    tab.get("latest.close()")
    tab.wait_for_state("connecting")
    tab.run_for(500)
    tab.wait_for_failure(6)
    states = tab.get("states.map(([state]) => state)")
    assert states == ["connecting", "refused", "open", "connecting"]  # one refusal is the first


@pytest.mark.parametrize("foreign", [(502, HEALTHY), (504, "<p>"), (200, "<p>")])
def test_an_answer_of_a_proxys_is_not_taken_for_a_refusal_and_ends_their_row(
    tab: Tab, foreign: tuple[int, str]
) -> None:
    answers = [(200, HEALTHY), (200, HEALTHY), foreign, (200, HEALTHY)]

    def answer(route: Route) -> None:
        status, body = answers.pop(0)
        route.fulfill(status=status, body=body)

    tab.page.route("**/gone/healthz", answer)
    tab.go(url=f"ws://127.0.0.1:{tab.server.port}/gone/ws")
    for count, pause in enumerate((500, 1000, 2000, 0), 1):
        tab.wait_for_failure(count)
        tab.run_for(pause)
    assert tab.get("states") == [["connecting", ""]]


def test_what_is_heard_of_the_servers_health_too_late_does_not_count(tab: Tab) -> None:
    asked: list[Route] = []
    tab.page.route("**/gone/healthz", lambda route: asked.append(route))
    tab.go(url=f"ws://127.0.0.1:{tab.server.port}/gone/ws")
    for count, pause in enumerate((500, 1000, 2000), 1):
        tab.wait_for(f"failed === {count}")
        tab.run_for(pause)
    wait_until(lambda: tab.get("failed") == len(asked) == 4, "the client to ask")
    for route in asked[:3]:
        route.fulfill(body=HEALTHY)
    tab.wait_for("checked === 3")
    tab.get("server.close()")
    asked[3].fulfill(body=HEALTHY)
    tab.wait_for_failure(4)
    tab.run_for(100_000)
    assert tab.get("states.map(([state]) => state)") == ["connecting", "closed"]
    assert tab.get("tries.length") == 4


@promise("A page notices within 30 s that nobody answers.")
def test_a_client_that_hears_nothing_asks_and_without_an_answer_connects_again(tab: Tab) -> None:
    tab.play()
    tab.run_for(19_999)
    assert (tab.get("states.length"), tab.told) == (2, [])
    tab.run_for(1)
    probe = tab.wait_for_told(1)
    assert probe["event_name"] == "whoami"
    tab.run_for(9_999)
    tab.hears(payload=1)  # any message is a sign of life
    tab.wait_for("heard.length === 1")
    tab.run_for(19_999)
    tab.hears(event_name="whoami", id=probe["id"])
    tab.hears(payload=2)
    tab.wait_for("heard.length === 2")
    assert tab.get("heard.map(({ payload }) => payload)") == [1, 2]  # and no answer to a probe
    tab.run_for(20_000)
    tab.wait_for_told(2)
    tab.run_for(9_999)
    assert tab.get("states.length") == 2
    tab.run_for(1 + 500)  # the old connection is never closed
    tab.wait_for_state("open")
    assert tab.get("states[2]") == ["connecting", "The server does not answer."]
    old, _ = tab.sockets
    old.send('{"event_name": "old"}')
    old.close(code=1008)
    tab.hears(event_name="new")
    tab.wait_for("heard.length === 3")
    assert tab.get("[heard[2].event_name, states.length, tries.length]") == ["new", 4, 2]


@promise("An answer is one whose `from_id` is right, too")
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ({"from_id": "server", "event_name": "ok"}, ["ok", None]),
        ({"from_id": "friend", "payload": 5}, ["m", 5]),
        ({"from_id": "friend", "event_name": "error"}, ["Error", "error", "It failed."]),
    ],
)
def test_a_question_has_its_answer_of_the_server_or_of_the_client_that_it_names_alone(
    tab: Tab, answer: Json, outcome: list[Any]
) -> None:
    tab.play()
    tab.ask("question", {"a": 1}, {"to": "friend", "message": "Please"})
    asked = tab.wait_for_told(1)
    fields = {"event_name": "question", "payload": {"a": 1}, "to": "friend", "message": "Please"}
    assert asked == {**fields, "id": asked["id"]}
    tab.hears(from_id="spy", id=asked["id"])
    tab.hears(id=asked["id"], **answer)
    assert tab.outcome() == outcome
    assert tab.get("heard.map(({ from_id }) => from_id)") == ["spy"]


@promise(
    "It returns the message that the handler addresses to the client that asked",
    "so `ask` returns a message `ok` from the server",
    "throws an `Error` whose `code` is the server's",
)
def test_questions_have_the_servers_answers(tab: Tab, connect: Connect, live: Live) -> None:
    tab.go_in()
    gone = "No client with the id in `to` is connected."
    for words, outcome in (
        (("sum_event", {"numbers": [1, 2]}), ["sum_handler_result", 3]),
        (("chat", "hi", {"to": "all"}), ["ok", None]),
        (("chat", "hi", {"to": "x"}), ["Error", "unknown_recipient", gone]),
        (("chat", "hi", {"to": "#garden"}), ["Error", "not_in_room"]),
        (("sum_event", "no numbers"), ["Error", "invalid_payload"]),
        (("", None), ["Error", "invalid_message"]),
        (("chat", None, {"message": "\ud800"}), ["Error", "invalid_message"]),
    ):
        tab.page.evaluate("(words) => ask(...JSON.parse(words))", json.dumps(words))
        assert tab.outcome()[: len(outcome)] == outcome
    friend = connect(live)
    tab.ask("question", None, {"to": id_of(friend)})
    asked = hear(friend)
    say(friend, "answer", payload=42, to=asked["from_id"], id=asked["id"])
    assert tab.outcome() == ["answer", 42]
    tab.ask("question", None, {"to": id_of(friend).upper()})  # as Swift writes it
    say(friend, "answer", payload=43, to=asked["from_id"], id=hear(friend)["id"])
    assert tab.outcome() == ["answer", 43]


def test_a_question_may_wait_without_an_end(tab: Tab, connect: Connect, live: Live) -> None:
    tab.go_in()
    friend = connect(live)
    tab.page.evaluate("(to) => ask('question', null, { to, timeout: Infinity })", id_of(friend))
    asked = hear(friend)
    tab.run_for(1000)  # a browser takes a longer timer than it knows for one that ends at once
    say(friend, "answer", payload=42, to=asked["from_id"], id=asked["id"])
    assert tab.outcome() == ["answer", 42]


@promise("or `timeout`, `lost` (the connection ended, and the server may have acted)")
@promise("10000 ms by default")
def test_a_question_without_an_answer_fails_in_time_and_its_late_answer_is_dropped(
    tab: Tab,
) -> None:
    tab.play()
    for count, question, limit in ((1, [], 10_000), (2, [None, {"timeout": 300}], 300)):
        tab.ask("question", *question)
        asked = tab.wait_for_told(count)
        tab.run_for(limit - 1)
        tab.hears()  # or it would be probed
        tab.run_for(1)
        assert tab.outcome()[:2] == ["Error", "timeout"]
        for event_name in ("late", "error"):
            tab.hears(event_name=event_name, id=asked["id"])
    tab.hears(event_name="last")
    tab.wait_for("heard.length === 3")
    assert tab.get("heard.map(({ event_name }) => event_name)") == ["m", "m", "last"]
    first, second = (told["id"] for told in tab.told)
    assert first != second


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("server.close()", "lost"),
        ("latest.dispatchEvent(new CloseEvent('close'))", "lost"),
        ("ask('m', 10n)", "invalid_message"),
    ],
)
def test_a_question_fails_at_once_with(tab: Tab, end: str, code: str) -> None:
    tab.play()
    tab.ask("question")
    tab.wait_for_told(1)
    tab.get(f"{{ {end} }}")
    assert tab.outcome()[:2] == ["Error", code]


@promise(
    'throws unless the state is "open"',
    "`send` and `ask` work; nothing is kept for later",
)
def test_outside_of_an_open_connection_send_throws_and_nothing_is_kept_for_later(tab: Tab) -> None:
    sending = "(() => { try { server.send('m') } catch (error) { return error.code } })()"
    tab.play()
    tab.sockets[-1].close()
    tab.wait_for_state("connecting")
    tab.ask("question")
    assert [tab.get(sending), *tab.outcome()[:2]] == ["closed", "Error", "closed"]
    tab.run_for(500)
    tab.wait_for_state("open")
    tab.get("server.send('first')")
    assert tab.wait_for_told(1) == {"event_name": "first", "payload": None}


HOSTILE = r"""
{
null
5
[]
"text"
{}
{"event_name": 5}
{"event_name": "error", "from_id": "server", "id": {"toString": 5}}
{"event_name": "error", "from_id": "server", "id": "ID", "message": {"toString": 5}}
{"event_name": "odd", "payload": ["\ud800", 1e999, 12345678901234567890]}
"""


def test_whatever_arrives_the_client_goes_on(tab: Tab) -> None:
    tab.play()
    tab.ask("question", None, {"timeout": 300})
    asked = tab.wait_for_told(1)
    for frame in (b"\xff", '{"event_name": "böse"}'.encode(), "[" * 100_000):
        tab.sockets[-1].send(frame)
    for text in HOSTILE.replace("ID", asked["id"]).split("\n"):
        tab.sockets[-1].send(text)
    tab.wait_for("heard.some(({ event_name }) => event_name === 'odd')")
    assert tab.get("heard.map(({ event_name }) => event_name)") == ["böse", "error", "odd"]
    odd = tab.get("heard[2].payload.map((value) => typeof value)")
    assert odd == ["string", "number", "number"]
    tab.run_for(300)
    assert tab.outcome()[:2] == ["Error", "timeout"]
    assert tab.get("[thrown.length, states.at(-1)[0]]") == [0, "open"]


def test_callbacks_that_throw_are_reported_and_do_not_end_the_client(tab: Tab) -> None:
    tab.play("""{
        onstate: (state) => { states.push([state]); throw state; },
        onmessage: async ({ event_name }) => { throw event_name; },
    }""")
    tab.hears(event_name="one")
    tab.hears(event_name="two")
    tab.wait_for("thrown.length === 4")
    assert tab.get("thrown") == ["connecting", "open", "one", "two"]


@promise("empty after `server.close()`; else the reason of the close")
def test_after_close_nothing_happens_but_that_the_client_is_closed(tab: Tab) -> None:
    tab.play()
    tab.get("{ server.close(); server.close() }")
    tab.sockets[-1].send('{"event_name": "m"}')
    tab.sockets[-1].close(code=1011)
    for event in ("online", "visibilitychange"):
        tab.get(f"document.dispatchEvent(new Event('{event}', {{ bubbles: true }}))")
    tab.run_for(100_000)
    assert tab.get("states.slice(2)") == [["closed", ""]]
    assert tab.get("[heard.length, tries.length]") == [0, 1]


def test_a_client_can_be_closed_between_two_attempts_and_during_the_first(tab: Tab) -> None:
    tab.go_nowhere()
    tab.wait_for_failure(1)
    tab.get("server.close()")
    tab.get("""import("/client.js").then(({ connect }) => {
        connect({ onstate: (...words) => states.push(words) }).close();
    })""")
    tab.run_for(100_000)
    assert tab.get("tries.length") == 2
    assert tab.get("states.map(([state]) => state)") == ["connecting", "closed", "closed"]


@promise("Node 22 needs a copy of the file")
def test_the_client_serves_node_where_a_failed_attempt_has_no_close(
    live: Live, tmp_path: Path
) -> None:
    (tmp_path / "client.mjs").write_text(datadivr._files["client.js"])
    (tmp_path / "run.mjs").write_text("""
        import { connect } from "./client.mjs";
        const [url, wrong] = process.argv.slice(2);
        const urls = [wrong, url];
        Math.random = () => 0;
        globalThis.WebSocket = class extends WebSocket {
            constructor(_, protocols) { super(urls.shift(), protocols); }
        };
        const states = [];
        await new Promise((resolve) => {
            const onstate = (state) => { states.push(state); if (state === "open") resolve(); };
            globalThis.server = connect({ url, onstate });
        });
        const { payload } = await server.ask("sum_event", { numbers: [1, 2] });
        const { code } = await server.ask("m", 1, { to: "nobody" }).catch((error) => error);
        server.close();
        console.log(JSON.stringify([states, payload, code])); // and the process ends by itself
    """)
    node = find("node")
    major = int(output_of(node, "--version")[1:].partition(".")[0])
    need(major >= 20, "Node 22, or 20 with a flag")
    flags = ["--experimental-websocket"] if major < 22 else []
    urls = [f"ws://127.0.0.1:{port}/ws" for port in (live.port, free_port())]
    command = [node, *flags, "--no-warnings", "run.mjs", *urls]
    states = [["connecting", "open", "closed"], 3, "unknown_recipient"]
    assert json.loads(output_of(*command, cwd=tmp_path)) == states


# ---- The console's page: `pytest -m console` -----------------------------------------------------


expect.set_options(timeout=LIMIT * 1000)
IMAGE = "<img src=x onerror=document.title='run'>"
THEMES: list[Literal["light", "dark"]] = ["light", "dark"]


def open_console(page: Page, server: Served, path: str = "/console", token: str = TOKEN) -> None:
    page.goto(f"{server.url}{path}")
    page.get_by_label("Admin token").fill(token)
    page.get_by_label("Admin token").press("Enter")


def rows(page: Page, table: str = "Clients") -> Locator:
    return page.get_by_role("table", name=re.compile(f"^{table}")).locator("tbody tr")


CLIENT_LIST = re.compile(r"/clients\?")


def wait_until_live(page: Page) -> None:
    expect(page.get_by_text("Live", exact=True)).to_be_visible()


def wait_for_status(page: Page, text: str) -> None:
    """Wait for what the page's head says for some seconds."""
    wait_until(lambda: text in page.evaluate("said"), text)


def fake_clients(page: Page, clients: list[Json], **answer: Any) -> None:
    """Answer the page's questions for clients in place of the server."""
    fields = {
        "node": "a" * 8,
        "address": "[2001:db8::1]:55555",
        "connected_at": "2020-12-22T22:22:22Z",
        "messages_received": 77777,
        "messages_sent": 66666,
        "buffered_bytes": 678123,
    }
    listed = [{**fields, **client} for client in clients]
    body = {"total": len(listed), "next": None, "partial": False, "clients": listed, **answer}
    page.route(CLIENT_LIST, lambda route: route.fulfill(json=body))


def test_the_consoles_source_is_short_and_as_prettier_leaves_it() -> None:
    assert_formatted("console.html", "html", 520)


def figures(messages: int = 0, clients: int = 0, errors: str = "") -> str:
    """Return what /metrics may answer."""
    counts = {"clients": clients, "messages_received_total": messages, "messages_sent_total": 0}
    return errors + "".join(f"datadivr_{name} {count}\n" for name, count in counts.items())


def fake_figures(page: Page, *answers: str) -> None:
    """Answer the page's questions for figures in place of the server, with the last for ever."""
    left = list(answers)
    page.route("**/metrics", lambda route: route.fulfill(body=left.pop(0) if left[1:] else left[0]))


def caption(page: Page, name: str) -> Locator:
    return page.get_by_role("figure", name=name).locator("figcaption")


@promise("You see the console: who is connected, and what is sent")
def test_the_console_shows_the_clients(page: Page, live: Live, connect: Connect) -> None:
    datadivr._connected.set(0)  # other tests have clients that it never counted
    clients = [connect(live), connect(live)]
    ids = [id_of(client) for client in clients]
    open_console(page, live)
    expect(rows(page)).to_have_count(2)
    for row, client, client_id in zip(rows(page).all(), clients, ids, strict=True):
        host, port = client.local_address
        expect(row.get_by_role("rowheader")).to_have_text(f"{host}:{port} {client_id}")
        expect(row.get_by_role("cell")).to_have_text(
            ["", re.compile(r":\d\d:\d\d"), "1", "1", "0", "Message Disconnect"]
        )
    expect(caption(page, "Clients connected")).to_have_text(re.compile("^Clients connected 2 peak"))
    wait_until_live(page)


@promise("shows how many messages go in and out each second")
def test_the_console_draws_rates(page: Page, live: Live, connect: Connect) -> None:
    client = connect(live)
    open_console(page, live)
    wait_until_live(page)
    sentence = "One message to three clients counts three."
    deliveries = page.get_by_role("figure", name="Deliveries out")
    expect(deliveries).to_have_accessible_description(sentence)
    line = page.get_by_role("figure", name="Messages in").locator("polyline")

    def draws() -> bool:
        ask(client, "m", to="all")
        text = caption(page, "Messages in").inner_text()
        is_drawn = " " in (line.get_attribute("points") or "")
        return is_drawn and re.search(r"\n[1-9]\d*(\.\d+)?/s\n", text) is not None

    wait_until(draws, "a line, and a rate")


def test_the_console_takes_counters_that_go_down_for_a_restart(page: Page, live: Live) -> None:
    fake_figures(page, figures(900), figures(10))
    open_console(page, live)
    expect(caption(page, "Messages in")).to_have_text(re.compile("Messages in 0/s peak 0/s since "))


SIDES = """(element) => {
    const { left, right } = element.getBoundingClientRect();
    return [left, right]; }"""


def leap(page: Page, seconds: int) -> None:
    """Have the page's clock, which is that of HASTE, leap ahead, and its figures be read then."""
    page.evaluate(
        "(ahead) => { const { now } = performance; performance.now = () => now() + ahead }",
        1000 * seconds,
    )
    count = page.evaluate("state.samples.at(-1).at")
    wait_until(lambda: page.evaluate("state.samples.at(-1).at") > count + 1, "the next figures")


def test_the_console_says_of_which_time_its_figures_are(page: Page, live: Live) -> None:
    line = 'datadivr_errors_total{{type="late"}} {}\n'
    fake_figures(page, figures(errors=line.format(2)))
    open_console(page, live)
    text = caption(page, "Messages in")
    expect(text).to_contain_text(re.compile(r"peak 0/s since \d+:\d\d:\d\d"))
    fake_figures(page, figures(errors=line.format(5)))
    error = page.get_by_role("listitem")
    expect(error).to_have_text([re.compile(r"^late\s3 since \d+:\d\d:\d\d.*, 5 in all$")])
    page.evaluate("""() => { // as after two minutes, of which the page has the figures each second
      const last = state.samples.at(-1);
      state.samples = Array.from({ length: 122 }, (_, n) => (
        { ...last, errors: { late: 1 }, at: last.at - 122 + n })); }""")
    expect(text).to_contain_text("peak 0/s in two minutes")
    expect(error).to_contain_text("4 in two minutes, 5 in all")
    leap(page, 600)  # as a page does that was hidden
    expect(text).to_contain_text("peak 0/s since ")


def test_a_chart_has_an_axis_of_two_minutes_and_fills_from_the_right(
    page: Page, live: Live
) -> None:
    fake_figures(page, figures())
    open_console(page, live)
    chart = page.get_by_role("figure", name="Messages in")
    for text in ("2 minutes ago", "1 minute ago", "now"):
        expect(chart.get_by_text(text)).to_be_visible()

    def edges() -> list[float]:
        points = (chart.locator("polyline").get_attribute("points") or "").split()
        return [float(point.split(",")[0]) for point in (points[0], points[-1])]

    forget = "state.samples.splice(0, state.samples.length - 1)"  # as if it had just begun
    page.evaluate(forget)
    wait_until(lambda: edges()[0] > -20, "the right edge")
    page.evaluate(forget)
    leap(page, 100)
    assert -120 < edges()[0] < -100
    assert edges()[1] == 0
    drawing = chart.locator("svg").evaluate(SIDES)
    assert chart.get_by_text("2 minutes ago").evaluate(SIDES)[0] == drawing[0]
    assert chart.get_by_text("now").evaluate(SIDES)[1] == pytest.approx(drawing[1], abs=1)


def test_the_console_lists_errors_by_type(page: Page, live: Live) -> None:
    named = 'datadivr_errors_total{type="a\\"b\\\\c<b>"} 3.0\n'
    fake_figures(page, figures(errors=named + 'datadivr_errors_total{type="never"} 0.0\n'))
    open_console(page, live)
    text = re.compile(r'^a"b\\c<b>\s0 since .*, 3 in all$')
    expect(page.get_by_role("listitem")).to_have_text([text])


def test_the_console_sorts_by_unsent_bytes(page: Page, live: Live) -> None:
    clients: list[Json] = [{"id": str(n), "buffered_bytes": n % 7} for n in range(45)]
    fake_clients(page, clients)
    open_console(page, live)
    expect(rows(page).first).to_contain_text("[2001:db8::1]:55555 0")
    page.get_by_label("Slowest first").check()
    expect(rows(page).get_by_role("rowheader").first).to_have_text("[2001:db8::1]:55555 6")
    expect(rows(page).get_by_role("cell").nth(4)).to_have_text("6")


@promise("`user` shows in the console and in the log, too")
def test_the_console_finds_a_client_by_address_id_user_or_room(page: Page, live: Live) -> None:
    clients: list[Json] = [{"id": f"id-{n}", "address": f"10.0.0.{n}:1"} for n in range(10)]
    clients[7] |= {"user": "bob", "rooms": ["garden"]}
    fake_clients(page, clients)
    open_console(page, live)
    for text in ("10.0.0.7:", "ID-7", "Bob", "Garden", "#garden"):
        page.get_by_label("Address, id, user or room").fill("nobody")
        expect(rows(page)).to_have_count(0)
        page.get_by_label("Address, id, user or room").fill(text)
        expect(rows(page).get_by_role("rowheader")).to_have_text(["10.0.0.7:1 bob id-7"])


def join(live: Live, client_id: str, *rooms: str) -> None:
    for room in rooms:
        url = f"/clients/{client_id}/rooms/{room}"
        assert live.api.put(url).status_code == 204


def test_the_console_shows_rooms_and_finds_clients_by_them(
    page: Page, live: Live, connect: Connect
) -> None:
    ids = [id_of(connect(live)) for _ in range(2)]
    join(live, ids[1], "garden", "user:ada")
    open_console(page, live)
    expect(page.get_by_role("columnheader", name="Rooms")).to_be_visible()
    expect(rows(page)).to_have_count(2)
    for row, rooms in zip(rows(page).all(), ("", "#garden #user:ada"), strict=True):
        expect(row.get_by_role("cell").first).to_have_text(rooms)
    page.get_by_label("Address, id, user or room").fill("user:ada")
    expect(rows(page).get_by_role("rowheader")).to_have_text([re.compile(ids[1])])


def test_the_console_lists_clients_of_a_node_that_knows_no_rooms(page: Page, live: Live) -> None:
    fake_clients(page, [{"id": "old", "user": None}, {"id": "new", "rooms": ["garden"]}])
    open_console(page, live)
    expect(rows(page)).to_have_count(2)
    page.get_by_label("Address, id, user or room").fill("garden")
    expect(rows(page).get_by_role("rowheader")).to_have_text(["[2001:db8::1]:55555 new"])


def test_ten_thousand_clients_do_not_hold_up_the_page(page: Page, live: Live) -> None:
    fake_clients(page, [{"id": "1"}])
    open_console(page, live)
    expect(rows(page)).to_have_count(1)
    page.get_by_label("Slowest first").check()
    milliseconds = page.evaluate("""() => {
      const [client] = state.clients;
      state.clients = Array.from({ length: 10000 }, (_, n) => (
        { ...client, id: `id-${n}`, buffered_bytes: (n * 7919) % 10007 }));
      return Array.from({ length: 10 }, () => {
        const began = Date.now();
        showClients();
        return Date.now() - began; }); }""")
    assert statistics.median(milliseconds) < 100


def test_the_console_says_whose_figures_it_shows(page: Page, live: Live) -> None:
    fake_clients(page, [{"id": str(n)} for n in range(3)])
    fake_figures(page, figures(clients=2))
    open_console(page, live)
    sentence = "Figures and errors are of one process or machine: 2 of 3 clients."
    expect(page.get_by_text(sentence)).to_be_visible()
    fake_figures(page, figures(clients=3))
    expect(page.get_by_text(sentence)).to_be_hidden()


def test_the_console_shows_nodes_where_there_are_several(page: Page, live: Live) -> None:
    clients = [{"id": name * 8, "node": name * 8} for name in "ab"]
    fake_clients(page, clients, partial=True)
    open_console(page, live)
    expect(page.get_by_role("columnheader", name="Node")).to_be_visible()
    expect(rows(page).first.get_by_role("cell").nth(1)).to_have_text("aaaaaaaa")
    expect(page.get_by_text("Some nodes did not answer")).to_be_visible()
    page.unroute(CLIENT_LIST)
    fake_clients(page, clients[:1])
    expect(page.get_by_role("columnheader", name="Node")).to_be_hidden()
    expect(rows(page).get_by_text("aaaaaaaa", exact=True)).to_have_count(2)  # its id, and hidden
    expect(rows(page).get_by_role("cell").nth(1)).to_have_text(re.compile(r":\d\d:\d\d"))


def test_a_small_screen_shows_each_figure_apart(page: Page, live: Live) -> None:
    fake_clients(page, [{"id": 4 * f"{name}1111111-"} for name in "ab"])
    open_console(page, live)
    wait_until_live(page)
    body = page.locator("tbody")  # its rows are redrawn
    places = """(body) => Array.from(body.rows[0].cells, (cell) => {
      const range = document.createRange(); range.selectNodeContents(cell);
      const { left, right, top, bottom } = range.getBoundingClientRect();
      return [left, right, top, bottom]; })"""
    for width in (320, 390, 768):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert 0 < body.evaluate("(body) => body.rows[0].offsetHeight") < 300  # none is squeezed
        texts = body.evaluate(places)
        for (left, right, top, bottom), other in itertools.combinations(texts, 2):
            assert right < other[0] or other[1] < left or bottom <= other[2] or other[3] <= top


def test_a_small_screen_shows_every_column_with_its_name(page: Page, live: Live) -> None:
    fake_clients(page, [{"id": "1", "rooms": ["garden"]}, {"id": "2", "node": "b" * 8}])
    page.set_viewport_size({"width": 390, "height": 900})
    open_console(page, live)
    expect(rows(page).first.locator("td")).to_have_count(8)
    cells = page.locator("tbody").evaluate(  # its rows are redrawn
        f"""(body) => Array.from(body.rows[0].querySelectorAll("td"), (cell) =>
          [getComputedStyle(cell, "::before").content, ...({SIDES})(cell)])"""
    )
    names = [name for name, *_ in cells]
    columns = ("Rooms", "Node", "Since", "Messages in", "Messages out", "Unsent bytes")
    assert names[1:-1] == [f'"{name}\\a "' for name in columns]  # each on a line of its own
    for _, left, right in cells:
        assert 0 < left < right < 390


@pytest.mark.parametrize("width", [390, 1440])
def test_an_empty_cell_is_not_read_by_the_name_of_its_column(
    page: Page, live: Live, width: int
) -> None:
    fake_clients(page, [{"id": "1", "rooms": []}])
    page.set_viewport_size({"width": width, "height": 900})
    open_console(page, live)
    expect(rows(page).get_by_role("cell").first).to_have_accessible_name("")
    expect(rows(page).get_by_role("cell").first).to_have_accessible_description("")


@pytest.mark.parametrize("theme", THEMES)
def test_the_outline_of_a_field_stands_out(
    page: Page, live: Live, theme: Literal["light", "dark"]
) -> None:
    page.emulate_media(color_scheme=theme)
    open_console(page, live)
    wait_until_live(page)
    colors = """(field) => {
      const own = getComputedStyle(field), card = getComputedStyle(field.closest(".card"));
      return [own.borderTopColor, own.backgroundColor, card.backgroundColor]; }"""

    def luminance(color: str) -> float:  # as WCAG 2 defines it
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.05 + sum(
            weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
        )

    for label in ("Event name", "Address, id, user or room", "Only events with"):
        outline, *grounds = map(luminance, page.get_by_label(label).evaluate(colors))
        assert min(max(outline, ground) / min(outline, ground) for ground in grounds) >= 3


def test_a_lost_server_and_the_last_figures_moment_are_seen_wherever_one_has_scrolled_to(
    page: Page, live: Live
) -> None:
    fake_clients(page, [{"id": str(n)} for n in range(20)])
    page.set_viewport_size({"width": 390, "height": 900})
    open_console(page, live)
    wait_until_live(page)
    expect(rows(page)).to_have_count(20)
    page.evaluate("document.querySelector('#rows').lastElementChild.scrollIntoView()")
    page.route("**/*", lambda route: route.abort())
    text = r"^The server does not answer. Trying again every second. Last figures: .*\d:\d\d:\d\d"
    expect(page.get_by_text(re.compile(text))).to_be_in_viewport()


@pytest.mark.parametrize("token", ["wrong", "tökén"])
def test_the_console_says_that_a_token_is_wrong(page: Page, live: Live, token: str) -> None:
    open_console(page, live, token=token)
    expect(page.get_by_role("alert")).to_have_text("The server refuses this token.")
    expect(page.get_by_label("Admin token")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0


def test_the_console_keeps_the_token_until_one_signs_out(page: Page, live: Live) -> None:
    open_console(page, live)
    wait_until_live(page)
    page.reload()
    wait_until_live(page)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Admin token")).to_have_value("")
    page.reload()
    expect(page.get_by_label("Admin token")).to_be_visible()


@promise("open `http://127.0.0.1:8000` followed by the text after `console=`")
def test_the_server_shows_a_link_that_opens_the_console_signed_in(
    page: Page, live: Live, configure: Callable[..., None], made_up_token: Callable[..., str]
) -> None:
    configure(admin_token=None)
    token = datadivr._admin_token()
    url = f"{live.url}/console"
    page.goto(f"{url}#token={made_up_token()}")
    assert page.url == url
    wait_until_live(page)
    page.get_by_role("button", name="Sign out").click()
    page.evaluate("(token) => { location.hash = `token=${token}` }", token)
    wait_until_live(page)
    assert page.url == url


def test_the_console_asks_for_the_token_again_once_it_is_refused(
    page: Page, live: Live, configure: Callable[..., None]
) -> None:
    open_console(page, live)
    wait_until_live(page)
    configure(admin_token="another")
    datadivr._admin_token.cache_clear()
    expect(page.get_by_role("alert")).to_have_text("The server refuses this token.")


def test_an_announcement_from_the_console_reaches_all(
    page: Page, live: Live, connect: Connect
) -> None:
    clients = [connect(live), connect(live)]
    open_console(page, live)
    page.get_by_label("Event name").fill(IMAGE)
    page.get_by_label("Sentence for people (optional)").fill("Hello, all.")
    page.get_by_label("Payload").fill('{"n": 12345678901234567890}')
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text("reached")).to_have_text(f"“{IMAGE}” reached clients: 2.")
    for client in clients:
        payload = {"n": 12345678901234567890}
        message = message_from("server", IMAGE, "all", payload=payload, message="Hello, all.")
        assert hear(client) == message
    assert page.title() == "datadivr console"


def test_an_announcement_from_the_console_reaches_one(
    page: Page, live: Live, connect: Connect
) -> None:
    clients = [connect(live), connect(live)]
    open_console(page, live)
    rows(page).nth(1).get_by_role("button", name="Message").click()
    page.keyboard.type("hint")
    page.keyboard.press("Enter")
    expect(page.get_by_text("reached")).to_have_text("“hint” reached clients: 1.")
    assert hear(clients[1])["event_name"] == "hint"
    assert ask(clients[0], "whoami")["event_name"] == "whoami"


def test_an_announcement_from_the_console_reaches_a_room(
    page: Page, live: Live, connect: Connect
) -> None:
    member, stranger = connect(live), connect(live)
    join(live, id_of(member), "garden")
    open_console(page, live)
    page.get_by_label("Event name").fill("news")
    page.get_by_label("To: all, #room or an id").fill("#garden")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text("reached")).to_have_text("“news” reached clients: 1.")
    assert hear(member) == message_from("server", "news", "#garden")
    assert hear_all(stranger) == []


def test_the_console_says_what_is_wrong_with_an_announcement(page: Page, live: Live) -> None:
    faults = [
        ("Payload, in JSON", "{oops", "in JSON at position 1"),
        ("Payload, in JSON", "hello", 'In JSON, text needs quotes: "hello".'),
        ("To: all, #room or an id", "nobody", "No client with this id is connected."),
        ("Event name", "$connect", "event_name: String should match pattern"),
    ]
    open_console(page, live)
    for label, text, fault in faults:
        page.get_by_label("Event name").fill("news")
        field = page.get_by_label(label)
        before = field.input_value()
        field.fill(text)
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("status").filter(has_text=fault)).to_be_visible()
        expect(page.locator("[aria-invalid=true]")).to_have_count(1)
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
        expect(field).to_have_accessible_description(re.compile(re.escape(fault)))
        field.fill(before)
    page.get_by_label("Event name").fill("news")
    page.keyboard.press("Enter")
    expect(page.get_by_text("reached")).to_have_text("“news” reached clients: 0.")
    expect(page.locator("[aria-invalid=true]")).to_have_count(0)


def test_an_old_outcome_goes_when_a_field_is_missing(page: Page, live: Live) -> None:
    open_console(page, live)
    name = page.get_by_label("Event name")
    button = page.get_by_role("button", name="Send")
    for pressed, key in ((name, "Enter"), (button, "Space")):
        name.fill("news")
        name.press("Enter")
        expect(page.get_by_text("reached")).to_be_visible()
        name.fill("")
        pressed.press(key)
        expect(page.get_by_text("reached")).to_have_count(0)


def watch(page: Page) -> None:
    datadivr._connected.set(len(datadivr.clients))  # which another test may have left wrong
    page.get_by_role("button", name="Watch").click()
    expect(page.get_by_text("Connection: open")).to_be_visible()
    # Its new row moves what is below the table, and a click there in that moment is lost. So does
    # the sentence that the figures are not those of all clients, if they came a moment earlier.
    expect(page.get_by_text("(this page)")).to_be_visible()
    expect(page.locator("#scope")).to_be_empty()


def messages(page: Page) -> Locator:
    return page.get_by_role("list", name="Watch messages live").get_by_role("listitem")


def test_the_console_connects_only_when_it_is_asked_to_watch(live: Live, page: Page) -> None:
    open_console(page, live)
    wait_until_live(page)
    assert total(live) == 0
    watch(page)
    assert total(live) == 1
    expect(rows(page).get_by_role("rowheader")).to_have_text([re.compile(r"^\S+ \(this page\) ")])
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Connection: closed")).to_be_visible()
    wait_until(lambda: total(live) == 0, "the page's client to go")
    expect(page.get_by_role("button", name="Watch")).to_be_focused()


def test_the_console_shows_messages_live_and_folded(
    live: Live, page: Page, connect: Connect
) -> None:
    client = connect(live)
    client_id = id_of(client)
    open_console(page, live)
    watch(page)
    payload = {"text": IMAGE, "rows": [1, 2]}
    ask(client, "chat", to="all", payload=payload)
    ask(client, "score", to="all", message="Well done.")
    expect(messages(page)).to_have_text(
        [
            re.compile(rf"\d:\d\d:\d\d.* score +{client_id} → all +Well done. +payload: null$"),
            re.compile(rf"\d:\d\d:\d\d.* chat +{client_id} → all +payload: {{.*onerror"),
        ]
    )
    folded = messages(page).nth(1).locator("pre")
    expect(folded).to_be_hidden()
    messages(page).nth(1).locator("summary").click()
    expect(folded).to_be_visible()
    message = message_from(client_id, "chat", "all", payload=payload)
    expect(folded).to_contain_text("chat")  # it is filled as it unfolds
    assert json.loads(folded.text_content() or "") == message
    assert (page.locator("img").count(), page.title()) == (0, "datadivr console")


def test_the_console_filters_messages_by_event(live: Live, page: Page, connect: Connect) -> None:
    client = connect(live)
    open_console(page, live)
    watch(page)
    for name in ("chat", "score", "chat"):
        ask(client, name, to="all")
    expect(messages(page)).to_have_count(3)
    field = page.get_by_label("Only events with")
    field.fill("SCO")
    expect(messages(page)).to_have_text([re.compile("score")])
    for _ in range(250):  # push out what is hidden, not what is looked for
        say(client, "chat", to="all")
    ask(client, "scored", to="all")
    expect(messages(page).filter(has_text="scored")).to_have_count(1)
    expect(messages(page)).to_have_count(2)
    field.fill("")
    expect(messages(page)).to_have_count(200)


def test_the_console_keeps_200_messages_the_newest_first(
    live: Live, page: Page, connect: Connect
) -> None:
    client = connect(live)
    open_console(page, live)
    watch(page)
    for n in range(230):
        say(client, f"m{n}", to="all")
    expect(messages(page).first).to_contain_text("m229 ")
    expect(messages(page)).to_have_count(200)
    expect(messages(page).last).to_contain_text("m30 ")


def test_the_list_of_messages_holds_still_while_it_is_paused_or_read(
    live: Live, page: Page, connect: Connect
) -> None:
    client = connect(live)
    open_console(page, live)
    watch(page)
    ask(client, "first", to="all")
    messages(page).locator("summary").click()
    pause = page.get_by_label("Pause")
    expect(pause).to_be_checked()
    ask(client, "second", to="all")
    wait_until(lambda: page.evaluate("state.arrived.length") == 1, "the second message")
    expect(messages(page)).to_have_text([re.compile("first")])
    expect(messages(page).locator("summary")).to_be_focused()
    pause.uncheck()
    expect(messages(page)).to_have_text([re.compile("second"), re.compile("first")])
    expect(messages(page).last.locator("pre")).to_be_visible()


def test_the_console_sends_as_a_client(live: Live, page: Page, connect: Connect) -> None:
    client = connect(live)
    open_console(page, live)
    watch(page)
    page.get_by_label("Event name").fill("hint")
    page.get_by_label("Payload").fill('{"n": 12345678901234567890}')
    page.get_by_role("button", name="Send as this page's client").click()
    expect(page.get_by_text("“hint” is sent.")).to_be_visible()
    heard = hear(client)
    assert heard["payload"] == {"n": 12345678901234567890}
    assert heard["from_id"] in datadivr.clients
    expect(messages(page)).to_have_text([re.compile("hint")])  # to all: to this page too
    page.get_by_label("Payload").fill("{oops")
    page.get_by_role("button", name="Send as this page's client").click()
    expect(page.get_by_label("Payload")).to_have_attribute("aria-invalid", "true")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send as this page's client")).to_be_hidden()


def test_the_console_asks_for_a_client_token_once_it_is_refused(
    live: Live, page: Page, connect: Connect, configure: Callable[..., None]
) -> None:
    configure(client_token="for-clients")
    open_console(page, live)
    field = page.get_by_placeholder("Client token")
    wait_until_live(page)
    expect(field).to_be_hidden()
    page.get_by_role("button", name="Watch").click()
    refused = page.get_by_text("Connection: refused")
    expect(refused).to_be_visible(timeout=3 * LIMIT * 1000)  # after some attempts
    field.fill("for-clients")
    field.press("Enter")
    expect(page.get_by_text("Connection: open")).to_be_visible()


def test_who_signs_out_watches_no_more(live: Live, page: Page, connect: Connect) -> None:
    open_console(page, live)
    watch(page)
    ask(connect(live), "chat", to="all")
    expect(messages(page)).to_have_count(1)
    page.get_by_role("button", name="Sign out").click()
    wait_until(lambda: total(live) == 1, "the page's client to go")
    assert page.locator("#messages > *").count() == 0


@pytest.mark.parametrize("button", ["Stop", "Sign out"])
def test_who_stops_before_the_connection_begins_watches_no_more(
    live: Live, page: Page, button: str
) -> None:
    open_console(page, live)
    page.evaluate(
        "(name) => (ui.watch.click(), (name === 'Stop' ? ui.watch : ui.leave).click())", button
    )
    page.evaluate("import(new URL('client.js', root)).then(() => {})")
    assert page.evaluate("'ask' in state.server") is False
    expect(page.locator("#connection")).to_have_text("Connection: closed")


def test_a_thousand_messages_a_second_do_not_hold_up_the_page(
    live: Live, page: Page, connect: Connect
) -> None:
    client = connect(live)
    open_console(page, live)
    watch(page)
    page.evaluate("""() => {
      window.drawings = 0;
      const note = () => { drawings += 1; };
      new MutationObserver(note).observe(document.querySelector("#messages"), { childList: true });
      window.frames = [];
      const count = (time) => { frames.push(time); requestAnimationFrame(count); };
      requestAnimationFrame(count); }""")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def processor_time() -> float:
        measured = devtools.send("Performance.getMetrics")["metrics"]
        return float(next(each["value"] for each in measured if each["name"] == "TaskDuration"))

    before = processor_time()
    began = time.monotonic()
    for n in range(1500):
        say(client, f"m{n}", to="all", payload={"text": "x" * 100})
        time.sleep(max(0, began + n / 1000 - time.monotonic()))
    expect(messages(page).first).to_contain_text("m1499 ")
    took = time.monotonic() - began
    assert processor_time() - before < 0.8 * took
    assert page.evaluate("drawings") < 300  # one for each message would be 1500
    frames = page.evaluate("frames")
    gaps = [after - before for before, after in itertools.pairwise(frames)]
    assert statistics.median(gaps) < 50


@promise("The console asks whether you mean it: press Disconnect again")
def test_the_console_asks_before_it_disconnects(page: Page, live: Live, connect: Connect) -> None:
    stays, goes = connect(live), connect(live)
    host, port = goes.local_address
    open_console(page, live)
    button = rows(page).nth(1).get_by_role("button", name="Disconnect")
    dialog = page.get_by_role("dialog", name=f"Disconnect {host}:{port}?")
    button.click()
    expect(dialog).to_contain_text("A page with client.js stays away until it is loaded again;")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    assert ask(goes, "whoami")["event_name"] == "whoami"
    button.click()
    dialog.get_by_role("button", name="Disconnect").click()
    assert close_code(goes) == 1008
    expect(rows(page)).to_have_count(1)
    assert id_of(stays) in rows(page).inner_text()


def test_the_console_says_that_a_client_is_not_disconnected(page: Page, live: Live) -> None:
    fake_clients(page, [{"id": "gone"}])
    open_console(page, live)
    rows(page).get_by_role("button", name="Disconnect").click()
    page.get_by_role("dialog").get_by_role("button", name="Disconnect").click()
    text = "[2001:db8::1]:55555: No client with this id is connected."
    wait_for_status(page, text)


def test_the_console_recovers_when_the_server_is_back(page: Page) -> None:
    command = ["-m", "uvicorn", "datadivr:app", "--port", "{port}"]
    with Process(*command) as first:
        first.wait_until_up()
        open_console(page, first)
        wait_until_live(page)
    expect(
        page.get_by_text("The server does not answer. Trying again every second.")
    ).to_be_visible()
    with Process(*command, port=first.port) as second:
        second.wait_until_up()
        wait_for_status(page, "The server is back.")
        wait_until_live(page)
        with dial(second.ws) as client:
            expect(rows(page)).to_contain_text(id_of(client))


def test_the_console_says_what_a_proxy_answers(page: Page, live: Live) -> None:
    answers = [502]
    page.route(
        "**/metrics",
        lambda route: route.fulfill(status=answers[-1], body=IMAGE, content_type="text/html"),
    )
    open_console(page, live)
    for status in (502, 503):
        answers.append(status)
        text = f"The server answers {status}. Trying again every second."
        expect(page.get_by_text(text)).to_be_visible()


def test_what_a_client_or_the_server_says_is_shown_as_text(
    page: Page, live: Live, connect: Connect
) -> None:
    connect(live, additional_headers={"X-Forwarded-For": IMAGE})
    page.route("**/messages", lambda route: route.fulfill(status=404, json={"detail": IMAGE}))
    open_console(page, live)
    expect(rows(page).get_by_role("rowheader")).to_contain_text(IMAGE)
    page.get_by_label("Event name").fill("news")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status").filter(has_text=IMAGE)).to_be_visible()
    assert (page.locator("img").count(), page.title()) == (0, "datadivr console")


def test_the_console_pages(page: Page, live: Live) -> None:
    fake_clients(page, [{"id": f"id-{n}"} for n in range(45)])
    open_console(page, live)
    previous, following = (page.get_by_role("button", name=name) for name in ("Previous", "Next"))
    expect(previous).to_be_disabled()
    shown = []
    for place in ("1\u201320 of 45", "21\u201340 of 45", "41\u201345 of 45"):
        expect(page.get_by_text(place)).to_be_visible()
        shown += [text.split()[1] for text in rows(page).get_by_role("rowheader").all_inner_texts()]
        if place != "41\u201345 of 45":
            following.click()
    assert shown == [f"id-{n}" for n in range(45)]
    expect(following).to_be_disabled()
    previous.click()
    expect(page.get_by_text("21\u201340 of 45")).to_be_visible()
    page.get_by_label("Address, id, user or room").fill("id-4")
    expect(page.get_by_text("1\u20136 of 6")).to_be_visible()
    page.unroute(CLIENT_LIST)
    expect(page.get_by_text("No clients")).to_be_visible()
    expect(page.get_by_role("heading", name="Clients: 0")).to_be_visible()


def test_the_console_works_by_keyboard(page: Page, live: Live, connect: Connect) -> None:
    client = connect(live)
    page.goto(f"{live.url}/console")
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect(rows(page)).to_have_count(1)
    button = rows(page).get_by_role("button", name="Disconnect")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Disconnect":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(button).to_be_focused()
    assert ask(client, "whoami")["event_name"] == "whoami"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert close_code(client) == 1008


def test_the_focus_returns_from_the_dialog_though_the_list_changes(
    page: Page, live: Live, connect: Connect
) -> None:
    connect(live)
    open_console(page, live)
    button = rows(page).first.get_by_role("button", name="Disconnect")
    button.press("Enter")
    connect(live)
    expect(page.get_by_text("Clients: 2")).to_be_attached()
    page.keyboard.press("Escape")
    expect(button).to_be_focused()
    expect(rows(page)).to_have_count(2)
    expect(button).to_be_focused()


def test_the_focus_stays_while_the_table_changes(page: Page, live: Live, connect: Connect) -> None:
    clients = [connect(live) for _ in range(3)]
    open_console(page, live)
    expect(rows(page)).to_have_count(3)
    row = rows(page).filter(has_text=id_of(clients[1]))
    button = row.get_by_role("button", name="Message")
    button.focus()
    clients[0].close()
    connect(live)
    connect(live)
    expect(rows(page)).to_have_count(4)
    expect(button).to_be_focused()
    clients[1].close()
    expect(page.get_by_role("table", name=re.compile("^Clients"))).to_be_focused()


def test_the_consoles_policy_leaves_no_way_to_run_text(browser: Browser, live: Live) -> None:
    policy = http.get(f"{live.url}/console").headers["content-security-policy"]
    assert "'unsafe-" not in policy
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(
        policy.split("; ")
    )
    with browser.new_page() as page:
        page.goto(f"{live.url}/console")
        with pytest.raises(PlaywrightError, match="TrustedHTML"):
            page.evaluate("document.body.innerHTML = '<b>bold</b>'")


def test_the_console_works_under_any_path(page: Page, registry: None) -> None:
    host = fastapi.FastAPI()
    host.include_router(datadivr.router)
    host.include_router(datadivr.router, prefix="/realtime")
    host.mount("/mounted", datadivr.app)
    with Live(host) as live:
        for path in ("/console/", "/realtime/console", "/realtime/console/", "/mounted/console"):
            page.goto(f"{live.url}{path}#token={TOKEN}")
            wait_until_live(page)
            assert page.url == f"{live.url}{path}"
            watch(page)


def test_axe_finds_nothing(live: Live, connect: Connect, browser: Browser) -> None:
    axe = node_module("axe-core/axe.min.js")
    ask(connect(live), "m", to="nobody")
    with browser.new_context(bypass_csp=True) as context:
        page = context.new_page()
        page.add_init_script(HASTE)
        page.add_init_script(path=axe)

        looks = list(itertools.product(THEMES, (390, 1440)))  # the first and last are both of both

        def violations(looks: list[tuple[Any, int]]) -> list[str]:
            """Look in themes and at widths, at which nothing may stick out."""
            broken_nodes: list[str] = []
            for theme, width in looks:
                page.emulate_media(color_scheme=theme)
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") == width
                result = page.evaluate("axe.run({ resultTypes: ['violations'] })")
                broken_nodes += [
                    f"{theme}, {width}: {broken['id']}: {node['html']}"
                    for broken in result["violations"]
                    for node in broken["nodes"]
                ]
            return broken_nodes

        open_console(page, live, token="wrong")
        expect(page.get_by_text("refuses")).to_be_visible()
        assert violations(looks[::3]) == []
        fake_clients(page, [{"id": str(n), "user": "bob"} for n in range(25)], partial=True)
        open_console(page, live)
        expect(rows(page)).to_have_count(20)
        page.get_by_label("Event name").fill("news")
        page.get_by_label("Payload").fill("{oops")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("[aria-invalid=true]")).to_have_count(1)
        page.get_by_role("button", name="Watch").click()
        expect(page.get_by_text("Connection: open")).to_be_visible()
        ask(connect(live), "m", to="all")
        expect(messages(page)).to_have_count(1)
        assert violations(looks) == []
        rows(page).first.get_by_role("button", name="Disconnect").click()
        assert violations(looks[::3]) == []
        page.keyboard.press("Escape")
        page.route("**/*", lambda route: route.abort())
        expect(page.get_by_text("does not answer")).to_be_visible()
        assert violations(looks[::3]) == []


# ---- The README: `pytest -m readme` --------------------------------------------------------------


def test_each_promise_stands_in_the_readme() -> None:
    readme = one_line(README)
    missing = [(text, name) for text, name in promises() if not text or text not in readme]
    assert list(promises())
    assert not missing


def test_each_test_has_the_mark_of_its_section() -> None:
    sections = set(re.findall(SECTION, SOURCE, re.MULTILINE))
    marks = {
        name: [mark for mark in marks_of(test) if mark in sections]
        for name, test in all_tests().items()
    }
    assert {name: found for name, found in marks.items() if len(found) != 1} == {}
    assert sections == {mark for (mark,) in marks.values()}


def test_each_block_of_the_readme_has_a_language_that_is_tested() -> None:
    languages = set(re.findall(r"^```(.*)\n(?:.*\n)*?```$", README, re.MULTILINE))
    assert languages == {"sh", "text", "json", "python", "html", "js", "yaml", "nginx", "ini"}


def test_each_link_within_the_readme_leads_to_a_heading() -> None:
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", README))
    parts = {"recipes", "reference", "contents"}
    assert links <= anchors <= links | parts | {a for a in anchors if a[0].isdigit()}


@pytest.mark.parametrize("language", ["js", "html", "json"])
def test_the_readmes_blocks_are_as_prettier_leaves_them(language: str, tmp_path: Path) -> None:
    prettier = node_module("prettier/bin/prettier.cjs")
    for number, code in enumerate(blocks(language)):
        (tmp_path / f"{number}.{language}").write_text(code)
    command = [find("node"), str(prettier), "--no-config", "--print-width=100", "--check", "."]
    output_of(*command, cwd=tmp_path)


def test_ci_runs_the_two_commands_at_the_top() -> None:
    serve, test = re.findall(r"grep -m1 '(.*)' README\.md", (ROOT / ".ci/run").read_text())
    for pattern, command in zip((serve, test), blocks("sh"), strict=False):
        assert re.fullmatch(pattern, command.strip())


def test_the_benchmarks_are_there_to_be_run() -> None:
    (marker,) = re.findall(r"`\.venv/bin/pytest -m (\w+)`", README)
    assert marker in marks_of(test_each_mix_beside_the_tutorials_pattern)


def test_the_message_of_the_readme_is_one_with_all_its_keys() -> None:
    (text,) = re.findall(r"^`({.*})`$", README, re.MULTILINE)
    message = WebSocketMessage.model_validate_json(text)
    assert json.loads(datadivr._encode(message)) == json.loads(text)
    keys = re.findall(r"^\| `(\w+)` \|", README.split("### Messages")[1], re.MULTILINE)
    assert keys[: len(WebSocketMessage.model_fields)] == list(WebSocketMessage.model_fields)


def test_the_readme_names_each_type_of_error() -> None:
    codes = re.findall(
        r"^\| `(\w+)` \|", README.split("| code | |")[1].split("\n\n")[0], re.MULTILINE
    )
    (others,) = re.findall(r"^\| `datadivr_errors_total.*", README, re.MULTILINE)
    named = [*codes, *re.findall(r"`(\w+)`", others)]
    assert sorted(named) == sorted(datadivr._ERROR_TYPES)


def test_the_readme_names_each_line_of_the_log_from_warnings_on() -> None:
    source = (ROOT / "datadivr.py").read_text()
    logged = set(re.findall(r'\b_warn\(\s*"(\w+)"', source))
    logged |= set(re.findall(r'\b_log\(\s*"(?:warning|error|critical)",\s*"(\w+)"', source))
    table = README.split("| event | what to do |")[1].split("\n\n")[0]
    described = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", table))
    errors = set(datadivr._ERROR_TYPES)  # these have a line of the table together
    assert logged - errors == described - errors


@promise("With `--workers`, each worker has those two.")
def test_all_lines_of_a_worker_but_uvicorns_first_two_are_json(tmp_path: Path) -> None:
    command = ["-m", "uvicorn", "datadivr:app", "--workers", "2", "--port", "{port}"]
    with Process(*command, cwd=tmp_path, DATADIVR_LOG_FORMAT="json") as process:
        wait_until(lambda: process.log.count("startup complete") == 2, "two workers", 3 * LIMIT)
        plain = [line for line in process.log.splitlines() if not line.startswith("{")]
    texts = [re.sub(r"\W*\[\d+\]|^INFO:\s+", "", line) for line in plain]
    first_two = ["Started server process", "Waiting for application startup."]
    assert sorted(texts[2:]) == sorted(2 * first_two)  # the parent has the two before
    assert "Started parent process" in texts[:2]


@promise(
    "uvicorn with workers exits with 0, which systemd takes for a success. One process exits with 3"
)
@pytest.mark.parametrize(
    ("workers", "code"),
    # Older uvicorns start such workers again and again.
    [((), 3), pytest.param(("--workers", "2"), 0, marks=needs_sansio)],
)
def test_a_failed_start_exits_with_the_code_that_the_readme_says(
    tmp_path: Path, workers: tuple[str, ...], code: int
) -> None:
    command = [sys.executable, "-m", "uvicorn", "datadivr:app", *workers]
    command += ["--port", str(free_port())]
    output_of(*command, cwd=tmp_path, status=code, DATADIVR_MAX_CLIENTS="many")


def parameters_of(function: Any) -> str:
    """Return a function's parameters and their defaults, as the README writes them."""
    texts = []
    for parameter in inspect.signature(function).parameters.values():
        value = parameter.default
        default = str(value) if isinstance(value, HandlerType) else json.dumps(value, default=str)
        is_needed = value is parameter.empty
        texts.append(parameter.name if is_needed else f"{parameter.name}={default}")
    return ", ".join(texts).replace("=null", "=None").replace("=false", "=False")


@promise(
    "`websocket_handler(event_name, handler_type=HandlerType.SERVER)` | registers the "
    "decorated function",
    '`WebSocketMessage(event_name, payload=None, to="others", from_id="server", '
    "message=None, id=None)`",
)
def test_the_names_of_the_readme_have_the_parameters_that_it_says() -> None:
    table = README.split("### Python API")[1].split("\n\n- ")[0]
    cells = " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    named = dict(re.findall(r"`(?:await )?(\w+)(?:\((.*?)\))?`", cells))
    for name, parameters in named.items():
        assert not parameters or parameters == parameters_of(getattr(datadivr, name)), name
    answers = {"Announcement", "App", "Client", "ClientInfo", "ClientPage", "Recipients"}
    assert named.keys() == {*datadivr.__all__} - {"InvalidMessageFormat", "sum_handler", *answers}


@promise(
    "You see these lines, among others",
    "The server made up a token for its administrator",
    "alone says `Not Found`, until you add a page to it",
)
def test_the_server_starts_with_what_the_readme_shows(tmp_path: Path) -> None:
    lines = block("text", "admin_token_generated").replace("8000", "PORT").strip()
    pattern = re.escape(lines.split("\n", 1)[1])
    pattern = re.sub(r"\d{4}\\-\S+Z", r"\\S+", pattern).replace(r"Suh1cWEz\.\.\.", r"([\w-]{43})")
    command = [sys.executable, "-m", "uvicorn", "datadivr:app", "--port", "{port}"]
    unset = ["-u", "DATADIVR_ADMIN_TOKEN", *command]
    with Process(*unset, program=find("env"), PYTHONUNBUFFERED="1", cwd=tmp_path) as process:
        process.wait_until_up()
        wait_until(lambda: "running on" in process.log, "the server to start")
        # A structlog before 24 writes no quotes.
        shown, running = pattern.replace("PORT", str(process.port)).replace("'", "'?").split("\\\n")
        tokens = re.findall(shown, process.log)
        assert re.search(running, process.log)
        token = {"Authorization": f"Bearer {tokens[0][0]}"}
        assert http.get(f"{process.url}/console").status_code == 200
        url = f"{process.url}/clients"
        assert http.get(url, headers=token).json()["total"] == 0
        assert http.get(process.url).json() == {"detail": "Not Found"}


@promise(
    """There are more ways to run the file: `uv run datadivr.py`, `.venv/bin/python datadivr.py` and
    `.venv/bin/datadivr` serve on 127.0.0.1:8765, or on `--host` and `--port`."""
)
@pytest.mark.parametrize("command", [".venv/bin/python datadivr.py", ".venv/bin/datadivr"])
def test_each_way_to_run_it_serves(tmp_path: Path, command: str) -> None:
    assert f"`{command}`" in README
    shutil.copy(ROOT / "datadivr.py", tmp_path)
    name, *options = command.removeprefix(".venv/bin/").split()
    with Process(*options, "--port", "{port}", program=find(name), cwd=tmp_path) as process:
        process.wait_until_up()
        with dial(process.ws) as client:
            assert id_of(client)


@promise("`uv run` installs what the head of `datadivr.py` names")
def test_the_container_of_the_readme_asks_for_its_token(tmp_path: Path) -> None:
    shutil.copy(ROOT / "datadivr.py", tmp_path)
    words = shlex.split(block("sh", "docker run"))
    start = words.index("uv")
    program = find(words[start])
    options = [word.replace("0.0.0.0", "127.0.0.1") for word in words[start + 1 :]]
    options[options.index("--port") + 1] = "{port}"
    tokens: Any = dict(word.split("=") for word in words if word.startswith("DATADIVR_"))
    there = subprocess.run([program, *options[:2], "--help"], cwd=tmp_path, capture_output=True)
    need(there.returncode == 0, "the packages that uv installs")
    with Process(*options, program=program, cwd=tmp_path, **tokens) as process:
        process.wait_until_up()
        with pytest.raises(InvalidStatus):
            dial(process.ws)
        bearer = {"Authorization": f"Bearer {tokens['DATADIVR_CLIENT_TOKEN']}"}
        with dial(process.ws, additional_headers=bearer) as client:
            assert id_of(client)


@promise("Those that need a program which is missing are skipped")
@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_a_missing_program_skips_a_test_and_fails_it_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    need("something", "nothing else")
    with pytest.raises(outcome, match="it needs no-such-program"):
        find("no-such-program")


@promise("If there are several, set `DATADIVR_REDIS_URL`, and write `uv run --with redis")
def test_uv_runs_the_file_with_redis(tmp_path: Path) -> None:
    shutil.copy(ROOT / "datadivr.py", tmp_path)
    ((words, name),) = re.findall(r"write\s`uv (run --with redis) (datadivr\.py)`", README)
    options, program = words.split(), find("uv")
    there = subprocess.run([program, *options, name, "--help"], cwd=tmp_path, capture_output=True)
    need(there.returncode == 0, "the packages that uv installs")
    command = [*options, name, "--port", "{port}"]
    with (
        RedisServer() as server,
        Process(*command, program=program, cwd=tmp_path, DATADIVR_REDIS_URL=server.url) as process,
    ):
        process.wait_until_up()
        wait_until(lambda: metrics(process)["redis_up"] == 1, "the node to join")


def copy_out(folder: Path, *names: str) -> None:
    """Write files of the README's into a folder."""
    for name in names:
        (folder / f"{name}.py").write_text(block("python", f"# {name}.py"))


def typed(folder: Path, commands: str, port: int, **replaced: str) -> str:
    """Type commands of the README's into a shell, for a server on another port."""
    find("curl")
    for old, new in {"localhost:8000": f"127.0.0.1:{port}", **replaced}.items():
        assert old in commands
        commands = commands.replace(old, new)
    return output_of("bash", "-ec", commands, cwd=folder)


def hear_event(client: ClientConnection, event_name: str) -> Json:
    """Return the next message of an event."""
    while (message := hear(client))["event_name"] != event_name:
        pass
    return message


def answer_to(client: ClientConnection, event_name: str, **fields: Any) -> Json:
    """Ask, and return the answer, past what comes before it."""
    say(client, event_name, id="question", **fields)
    while (message := hear(client)).get("id") != "question":
        pass
    return message


@pytest.fixture(scope="session")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Do what the tutorial's second step says, in a folder with an environment beside."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / ".venv").symlink_to(sys.prefix)
    copy_out(folder, "application")
    commands = block("sh", "mkdir").strip() + " --port {port}"
    with Process("-ec", commands, program=find("bash"), cwd=folder) as process:
        process.wait_until_up()
        (folder / "static" / "index.html").write_text(block("html", "client.js"))
        process.folder = folder  # type: ignore[attr-defined]
        yield process


@promise(
    "With `--reload` the server starts again whenever you change a Python file",
    "with it, the token stays the same",
    "The program first says `Connected to ws://localhost:8000/ws.`",
    "It has given your client an id, which stands in `to`",
    "The page shows `open`, and `hello`, which you sent from the terminal",
    "the page shows `Write something first.`, which is the sentence of the handler's "
    "`HTTPException`",
    "in a second tab, and say something in the first: both show it",
    "Start it again: within some seconds, both show `open`",
    "The lines are gone, for this handler keeps them in memory",
    "`recipients` says how many clients the message was for",
    "It lists your two tabs",
    "That page shows `closed`",
)
def test_the_tutorial_shows_what_it_says(tutorial: Process, browser: Browser) -> None:
    folder, port = tutorial.folder, tutorial.port  # type: ignore[attr-defined]
    origin = f"http://127.0.0.1:{port}"
    session = block("text", "history")
    (line,) = re.findall("^> (.*)$", session, re.MULTILINE)
    command = block("sh", "-m websockets").replace("localhost:8000", f"127.0.0.1:{port}").split()
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as terminal:
        assert terminal.stdin is not None
        assert terminal.stdout is not None
        assert "`Connected to ws://localhost:8000/ws.`" in README
        assert f"Connected to ws://127.0.0.1:{port}/ws." in terminal.stdout.readline()
        for typed_line, heard in zip(
            (None, line), re.findall("^< .*", session, re.MULTILINE), strict=True
        ):
            if typed_line is not None:
                terminal.stdin.write(f"{typed_line}\n")
                terminal.stdin.flush()
            pattern = re.escape(heard).replace(r"3d792917\-\.\.\.", "[0-9a-f-]{36}")
            while not re.search(pattern, terminal.stdout.readline()):
                pass
        terminal.stdin.close()

    with browser.new_context() as context:
        page, second = context.new_page(), context.new_page()
        state, lines = page.locator("#state"), page.locator("li")
        page.goto(origin)
        expect(state).to_have_text("open")
        expect(lines).to_have_text(["hello"])
        page.get_by_role("button").click()
        expect(state).to_have_text("Write something first.")
        second.goto(origin)
        expect(second.locator("#state")).to_have_text("open")
        page.get_by_label("Text").fill("Hi.")
        page.get_by_role("button").click()
        expect(state).to_have_text("said")
        for tab in (page, second):
            expect(tab.locator("li")).to_have_text(["hello", "Hi."])

        answer = typed(folder, block("sh", "kitchen closes"), port)
        assert answer == block("text", "recipients").strip()
        expect(lines.last).to_have_text("The kitchen closes at nine.")

        (link,) = re.findall(r"`http://localhost:8000(/console#token=choose-one)`", README)
        console = context.new_page()
        console.goto(f"{origin}{link}")
        expect(console.locator("tbody tr")).to_have_count(2)
        console.close()

        page.evaluate("""() => {
          globalThis.said = [];
          const state = document.querySelector("#state");
          const note = () => said.push(state.textContent);
          new MutationObserver(note).observe(state, { childList: true }); }""")
        (folder / "application.py").touch()
        wait_until(lambda: "connecting" in page.evaluate("said"), "the connection's loss")
        for tab in (page, second):
            expect(tab.locator("#state")).to_have_text("open", timeout=3 * LIMIT * 1000)
        expect(lines).to_have_count(0)

        bearer = {"Authorization": "Bearer choose-one"}
        first_id = http.get(f"{origin}/clients", headers=bearer).json()["clients"][0]["id"]
        http.delete(f"{origin}/clients/{first_id}", headers=bearer)
        wait_until(
            lambda: "closed" in {tab.locator("#state").inner_text() for tab in (page, second)},
            "the page that is disconnected",
        )


def test_the_tutorials_page_works_under_a_path_and_its_handlers_refuse_the_rest(
    tutorial: Process, browser: Browser, tmp_path: Path
) -> None:
    with dial(tutorial.ws) as client:
        known = {"code": "refused", "status": 404, "event_name": "said"}
        assert answer_to(client, "said", payload="I am the server")["payload"] == known
        assert answer_to(client, "say", payload=5)["payload"]["code"] == "invalid_payload"
    configuration = block("nginx", "location").replace("location /", "location /live/")
    configuration = configuration.replace(":8000", f":{tutorial.port}/")
    with nginx(tmp_path, configuration) as proxy, browser.new_context() as context:
        proxy.wait_until_up("/live/healthz")
        page = context.new_page()
        page.goto(f"{proxy.url}/live/")
        expect(page.locator("#state")).to_have_text("open")


@promise("def test_what_a_client_says_goes_to_all() -> None:")
def test_the_tests_of_the_readme_pass(tmp_path: Path) -> None:
    (tmp_path / "static").mkdir()
    copy_out(tmp_path, "application", "test_application")
    command = [sys.executable, "-m", "pytest", "-q"]
    output = output_of(*command, cwd=tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "2 passed" in output


# The README's files that do not get into each other's way, and ways into them for the tests.
SERVED = """
    from fastapi.responses import HTMLResponse

    import clock
    import missed
    import orders
    import presence
    import rooms
    import threads
    from datadivr import app, clients

    tick = clock.tick

    async def fail_once() -> None:
        clock.tick = tick
        raise ValueError("for the test")

    @app.post("/fail")
    async def fail() -> None:
        clock.tick = fail_once

    @app.post("/publish")
    async def publish(text: str) -> None:
        await missed.publish(text)

    @app.post("/forget")
    async def forget() -> None:
        missed.kept.clear()

    @app.post("/cut")
    async def cut() -> None:
        for client in list(clients.values()):
            await client.websocket.close(4000)

    @app.post("/forget_while_away")
    async def forget_while_away() -> None:
        await cut()
        await publish("lost")
        await forget()
        await publish("kept")

    @app.post("/hear")
    def hear(topic: str, data: str) -> None:  # in a thread
        threads.on_message(topic, data.encode())

    @app.get("/missed")
    async def page() -> HTMLResponse:
        return HTMLResponse('''<body><script type="module">PAGE</script>''')
"""


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("recipes")
    copy_out(folder, "clock", "missed", "orders", "presence", "rooms", "threads")
    page = block("js", '"come"')
    (folder / "served.py").write_text(textwrap.dedent(SERVED).replace("PAGE", page))
    with Process("-m", "uvicorn", "served:app", "--port", "{port}", cwd=folder) as process:
        process.wait_until_up()
        yield process


@pytest.fixture
def members(recipes: Process) -> Iterator[list[ClientConnection]]:
    """Connect three clients to the recipes' server."""
    with contextlib.ExitStack() as stack:
        url = recipes.ws
        yield [stack.enter_context(dial(url)) for _ in range(3)]
    wait_until(lambda: total(recipes) == 0, "the test's clients to go")


def run_module(page: Page, origin: str, code: str, *names: str) -> list[str]:
    """Run a module of the README's in a page, wait until it is connected, return what it logs."""
    logged: list[str] = []
    page.on("console", lambda message: logged.append(message.text))
    page.goto(f"{origin}/healthz")
    exported = f"Object.assign(globalThis, {{ {', '.join(('server', *names))} }});"
    page.add_script_tag(content=f"{code}\n{exported}", type="module")
    # The server may have the connection before the page knows that it has.
    is_open = "globalThis.server?.ask('whoami').then(() => true, () => false)"
    wait_until(lambda: page.evaluate(is_open), "the page to connect")
    return logged


def test_a_page_and_a_client_speak_in_a_room_of_the_readme(
    recipes: Process, members: list[ClientConnection], browser: Browser
) -> None:
    origin = recipes.url
    ada, bob, _ = members
    refusals = [("join", {"payload": "cellar"}), ("news", {"to": "all"})]
    texts = ["There is no such room.", "Speak in a room."]
    for (event_name, fields), text in zip(refusals, texts, strict=True):
        assert answer_to(ada, event_name, **fields)["message"] == text
    told = answer_to(ada, "chat", to="#garden")["payload"]
    assert told == {"code": "not_in_room", "event_name": "chat"}
    told = answer_to(ada, "leave", payload="a b")
    assert told["payload"] == {"code": "refused", "status": 422, "event_name": "leave"}
    assert told["message"].startswith("expected a room's name of 1 to 100 characters")
    for client in (ada, bob):
        assert answer_to(client, "join", payload="garden")["event_name"] == "ok"
    assert answer_to(bob, "leave", payload="garden")["event_name"] == "ok"
    with browser.new_context() as context:
        logged = run_module(context.new_page(), origin, block("js", '"join"'))
        assert hear_event(ada, "chat")["payload"] == "hello"
        say(ada, "chat", payload="hi", to="#garden")
        context.pages[0].wait_for_timeout(1)
        wait_until(
            lambda: context.pages[0].evaluate("1") and "chat hi #garden" in logged, "the page"
        )
    assert "chat" not in {message["event_name"] for message in hear_all(bob)}


@promise("which leaves out nobody")
@promise("In a chat whose speaker sees its own line, the handler calls `broadcast`")
def test_a_speaker_sees_its_own_line_if_the_handler_broadcasts(
    live: Live, connect: Connect
) -> None:
    (call,) = re.findall(r'`await (broadcast\(create_message\("said", .*?\)\))`', README)

    @datadivr.websocket_handler("say")
    async def say_in_garden(message: WebSocketMessage) -> None:
        await eval(call, {**vars(datadivr), "message": message})

    ada, bob, _ = clients = [connect(live) for _ in range(3)]
    for client in (ada, bob):
        in_a_thread(datadivr.join_room(id_of(client), "garden"))
    say(ada, "say", payload="hello")
    for client in (ada, bob):
        assert hear(client) == message_from("server", "said", "#garden", payload="hello")
    assert [hear_all(client) for client in clients] == [[], [], []]


@promise("A client's own `came` arrives before the answer, and those of others may")
def test_the_readme_tells_who_is_in_a_room(
    recipes: Process, members: list[ClientConnection]
) -> None:
    ada, bob, other = members
    ada_id, bob_id = answer_to(ada, "whoami")["payload"], answer_to(bob, "whoami")["payload"]

    def enter(client: ClientConnection) -> Any:
        return answer_to(client, "enter", payload="hall")["payload"]

    say(ada, "enter", payload="hall")
    assert hear_event(ada, "came")["payload"] == {ada_id: None}
    assert hear_event(ada, "here")["payload"] == {"clients": {ada_id: None}, "partial": False}
    assert enter(bob) == {"clients": {ada_id: None, bob_id: None}, "partial": False}
    assert hear_event(ada, "came")["payload"] == {bob_id: None}
    for client in (other, bob):  # the other is not in the room, and so has nothing to leave
        assert answer_to(client, "exit", payload="hall")["event_name"] == "ok"
    assert hear_event(ada, "went")["payload"] == bob_id
    assert enter(bob)["clients"] == {ada_id: None, bob_id: None}
    bob.close()
    assert hear_event(ada, "went")["payload"] == bob_id
    heard = {message["event_name"] for message in hear_all(other)}
    assert not heard & {"came", "went"}


@promise("A page that comes back says which number it saw last")
@promise("The page keeps what arrives before the answer, and shows each number once")
def test_the_page_of_the_readme_gets_what_it_missed_in_order_or_begins_anew(
    recipes: Process, browser: Browser
) -> None:
    origin = recipes.url

    def post(path: str, **params: str) -> None:
        assert http.post(f"{origin}{path}", params=params).status_code == 200

    with browser.new_context() as context:
        page = context.new_page()

        def wait_for(texts: list[str]) -> None:
            page.wait_for_function(
                "text => document.body?.innerText.split('\\n').filter(Boolean).join() === text",
                arg=",".join(texts),
                timeout=LIMIT * 1000,
            )

        post("/forget")  # what another test has published
        post("/publish", text="before")
        page.goto(f"{origin}/missed")
        wait_for(["before"])
        post("/publish", text="live")
        wait_for(["before", "live"])
        post("/cut")
        later = [str(number) for number in range(40)]
        for text in later:  # while it is away, comes back, and is there
            post("/publish", text=text)
            time.sleep(0.05)
        wait_for(["before", "live", *later])
        post("/forget_while_away")
        wait_for(["kept"])  # it has loaded again


def test_the_page_of_the_readme_asks_again_for_what_it_missed_where_the_handler_failed(
    recipes: Process, browser: Browser
) -> None:
    failures = [0, 0]

    def pass_on(route: WebSocketRoute) -> None:
        server = route.connect_to_server()

        def answer(message: str | bytes) -> None:
            asked = json.loads(message)
            if asked["event_name"] == "come" and failures:
                failures.pop()
                payload = {"code": "handler_error"}
                fields = {"to": "", "from_id": "server", "message": "It failed.", "id": asked["id"]}
                route.send(json.dumps({"event_name": "error", "payload": payload} | fields))
            else:
                server.send(message)

        route.on_message(answer)

    http.post(f"{recipes.url}/publish", params={"text": "missed"})
    with browser.new_context() as context:
        page = context.new_page()
        page.route_web_socket(re.compile("/ws$"), pass_on)
        page.goto(f"{recipes.url}/missed")
        expect(page.get_by_text("missed").last).to_be_visible()
        http.post(f"{recipes.url}/publish", params={"text": "live"})
        expect(page.get_by_text("live").last).to_be_visible()
    assert failures == []


@promise("or one failure would end the clock")
def test_the_clock_of_the_readme_ticks_each_second_and_goes_on_after_a_failure(
    recipes: Process, members: list[ClientConnection]
) -> None:
    client = members[0]
    ticks = [hear_event(client, "time")["payload"]]
    http.post(f"{recipes.url}/fail")
    while len(ticks) == 1 or ticks[-1] - ticks[-2] < 1.9:
        assert len(ticks) < LIMIT
        ticks.append(hear_event(client, "time")["payload"])
    assert "The clock goes on." in recipes.log


@promise("plain `def`: it runs in a thread")
def test_the_threads_of_the_readme_reach_clients(
    recipes: Process, members: list[ClientConnection]
) -> None:
    client = members[0]
    say(client, "report")
    assert [hear_event(client, "progress")["payload"] for _ in range(2)] == [50, 100]
    heard = {"topic": "temperature", "data": "[21.5]"}
    http.post(f"{recipes.url}/hear", params=heard)
    assert hear_event(client, "temperature")["payload"] == [21.5]


@promise(
    '"payload": "Hello, all.", "to": "all"',
    "A route of your own is open to everybody until it asks for something, such as the admin token",
)
def test_other_programs_and_routes_of_the_readme_reach_clients(
    recipes: Process, members: list[ClientConnection], tmp_path: Path
) -> None:
    client = members[0]
    url = f"{recipes.url}/orders"
    assert http.post(url).status_code == 401
    assert http.post(url, headers=ADMIN).json() == len(members)
    assert hear_event(client, "order")["payload"] == {"id": 1}
    code = block("python", "# push.py").replace("8000", str(recipes.port))
    answer = run(code.replace("choose-one", TOKEN), cwd=tmp_path)
    assert answer.strip() == "{'recipients': 3, 'partial': False}"
    assert hear_event(client, "news")["payload"] == "Hello, all."


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Serve the README's people, with a route that ends the sessions of one of them."""
    folder = tmp_path_factory.mktemp("people")
    copy_out(folder, "log_in", "person", "remove")
    code = """
        import log_in
        import remove
        from datadivr import clients
        from person import app

        @app.post("/expire")
        async def expire(user: str) -> None:
            for client in clients.values():
                if client.user == user:
                    client.websocket.state.expires = 0
            await log_in.end_expired()
    """
    (folder / "served.py").write_text(textwrap.dedent(code))
    with Process("-m", "uvicorn", "served:app", "--port", "{port}", cwd=folder) as process:
        process.wait_until_up()
        yield process


ADA, BOB = "a-secret-cookie", "another-secret-cookie"  # as in the README
FROM_ELSEWHERE = {"Cookie": f"session={ADA}", "Origin": "http://elsewhere.example"}


@promise(
    "Yours runs before a client is accepted. Where it raises, the client is refused",
    "What it puts on `websocket.state` is there for your handlers",
    "await authorize_client(websocket) # pages from elsewhere, DATADIVR_CLIENT_TOKEN",
    "Close the connections whose session is over",
)
def test_people_log_in_in_three_ways_and_a_session_ends(people: Process) -> None:
    url = f"127.0.0.1:{people.port}"
    for headers in ({}, {"Cookie": "session=wrong"}, FROM_ELSEWHERE):
        with pytest.raises(InvalidStatus) as refused:
            dial(f"ws://{url}/ws", additional_headers=headers)
        assert refused.value.response.status_code == 403
    subprotocols: Any = ["bearer", BOB]
    with (
        dial(f"ws://{url}/ws", additional_headers={"Cookie": f"session={BOB}"}) as bob,
        dial(f"ws://{url}/ws", subprotocols=subprotocols) as page,
        dial(f"ws://{url}/ws", additional_headers={"Authorization": f"Bearer {ADA}"}) as ada,
    ):
        greetings = [answer_to(client, "greet")["payload"] for client in (ada, bob, page)]
        assert greetings == ["Hello, Ada.", "Hello, Bob.", "Hello, Bob."]
        told = answer_to(bob, "news", to="all")
        assert told["payload"] == {"code": "refused", "status": 403, "event_name": "news"}
        assert answer_to(ada, "news", payload=1)["event_name"] == "ok"
        assert hear_event(bob, "news")["payload"] == 1
        http.post(f"http://{url}/expire", params={"user": "Bob"})
        assert [close_code(client) for client in (bob, page)] == [4001, 4001]
        assert answer_to(ada, "greet")["event_name"] == "greeting"


@promise(
    'The answer is `{"recipients":2,"partial":false}` where Ada has two devices open, and'
    " 0 where she has none"
)
def test_a_private_push_reaches_each_device_of_one_person(people: Process, tmp_path: Path) -> None:
    url = people.ws
    subprotocols: Any = ["bearer", ADA]
    with (
        dial(url, additional_headers={"Cookie": f"session={ADA}"}) as ada,
        dial(url, subprotocols=subprotocols) as phone,
        dial(url, additional_headers={"Cookie": f"session={BOB}"}) as bob,
    ):
        for client in (ada, phone, bob):
            answer_to(client, "whoami")
        answer = typed(tmp_path, block("sh", "#user:Ada"), people.port, **{"choose-one": TOKEN})
        assert f"`{answer}`" in README
        for client in (ada, phone):
            assert hear_event(client, "order")["payload"] == {"id": 1}
        assert hear_all(bob) == []


@promise(
    "If no client has the id, it raises an `HTTPException` 404, which the moderator gets "
    "as `refused`",
    "The connection is closed with 1008",
    "This does not keep the person out",
)
def test_a_moderator_removes_a_client(people: Process) -> None:
    url = people.ws
    with (
        dial(url, additional_headers={"Cookie": f"session={ADA}"}) as ada,
        dial(url, additional_headers={"Cookie": f"session={BOB}"}) as bob,
    ):
        bob_id = answer_to(bob, "whoami")["payload"]
        for client, payload, status in ((bob, bob_id, 403), (ada, "nobody", 404)):
            told = answer_to(client, "remove", payload=payload)["payload"]
            assert told == {"code": "refused", "status": status, "event_name": "remove"}
        assert answer_to(ada, "remove", payload=bob_id)["event_name"] == "ok"
        assert close_code(bob) == 1008
        assert answer_to(ada, "whoami")["payload"]
        with dial(url, additional_headers={"Cookie": f"session={BOB}"}) as again:
            assert answer_to(again, "whoami")["payload"]


@promise('"total": 1, "next": null, "partial": false')
def test_the_list_of_clients_is_as_the_readme_shows_it(people: Process) -> None:
    wait_until(lambda: total(people) == 0, "other tests' clients to go")
    (expected,) = (shown := json.loads(block("json", '"connected_at"')))["clients"]
    url = f"127.0.0.1:{people.port}"
    with dial(f"ws://{url}/ws", additional_headers={"Cookie": f"session={ADA}"}) as ada:
        ada_id = answer_to(ada, "whoami")["payload"]
        listed = http.get(f"http://{url}/clients", headers=ADMIN).json()
    assert expected["id"].startswith(expected["node"])
    changing = ("id", "node", "address", "connected_at")
    for name in changing:
        mask = re.sub(r"[0-9a-f]", "0", expected[name]).split(":")[0]
        assert re.sub(r"[0-9a-f]", "0", listed["clients"][0][name]).split(":")[0] == mask
        expected[name] = listed["clients"][0][name]
    assert listed == shown
    assert expected["id"] == ada_id


@promise(
    "A client without it is refused with 401",
    "The token guards `/ws` alone",
    "The page above has not kept that token, and asks for it anew when it is loaded again",
    "The answer to a wrong token is the same as to none: `A client token is needed.`",
    "Any other client sends the header `Authorization: Bearer choose-a-long-one`",
)
def test_the_token_that_all_share_is_typed_once(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "static").mkdir()
    copy_out(tmp_path, "application")
    html = f'<!doctype html><script type="module">{block("js", "prompt")}</script>'
    (tmp_path / "static" / "index.html").write_text(html)
    commands = block("sh", "choose-a-long-one").strip() + " --port {port}"
    (token,) = re.findall(r"CLIENT_TOKEN=(\S+)", commands)
    with (
        Process("-ec", commands, program=find("bash"), cwd=tmp_path) as process,
        browser.new_context() as context,
    ):
        process.wait_until_up()
        url = f"127.0.0.1:{process.port}"
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            with pytest.raises(InvalidStatus) as refused:
                dial(f"ws://{url}/ws", additional_headers=headers)
            assert refused.value.response.status_code == 401
            assert b'"A client token is needed."' in (refused.value.response.body or b"")
        with dial(f"ws://{url}/ws", additional_headers={"Authorization": f"Bearer {token}"}) as own:
            assert answer_to(own, "whoami")["payload"]
        wait_until(lambda: total(process) == 0, "that client to go")

        page = context.new_page()
        answers, errors = ["a space", "wrong", token], list[str]()
        page.on("dialog", lambda dialog: dialog.accept(answers.pop(0)))
        page.on("pageerror", lambda error: errors.append(str(error.name)))
        page.goto(f"http://{url}/")
        wait_until(lambda: page.evaluate("1") and errors, "the page to fail")
        assert errors == ["SyntaxError"]
        page.reload()  # it tries the wrong token three times, and then loads itself again
        is_kept = f"() => localStorage.getItem('token') === '{token}'"
        page.wait_for_function(is_kept, timeout=3 * LIMIT * 1000)
        assert answers == []
        page.reload()  # and asks no more
        wait_until(
            lambda: page.evaluate("1") and process.log.count("client_connected") == 3,
            "the page to come back",
        )


@promise("In a page, `ask` does this for you. Clients can ask one another, too")
@promise("`server.send(event_name, payload, { to, id })` answers another client's question")
def test_pages_of_the_readme_ask_the_server_and_one_another(live: Live, browser: Browser) -> None:
    origin = live.url
    code = block("js", '"sum_event"')
    with browser.new_context() as context:
        asking, answering = context.new_page(), context.new_page()
        for page in (asking, answering):
            run_module(page, origin, code, "sum", "double")
        assert asking.evaluate("sum(1, 2)") == 3
        own = answering.evaluate("server.ask('whoami').then(({ payload }) => payload)")
        assert asking.evaluate("id => double(21, id)", own) == 42


def test_the_browser_api_of_the_readme_talks(
    live: Live, browser: Browser, connect: Connect
) -> None:
    client = connect(live)
    client_id = answer_to(client, "whoami")["payload"]
    with browser.new_context() as context:
        page = context.new_page()
        code = block("js", "function talk()")
        logged = run_module(page, live.url, code, "talk")
        own = page.evaluate("talk().then(({ payload }) => payload)")
        assert {own, client_id} == set(datadivr.clients)
        assert hear_event(client, "chat")["payload"] == {"text": "hi"}
        states = [text for text in logged if not text.startswith("Failed to load")]  # its icon
        assert states[:2] == ["connecting ", "open "]
        in_a_thread(datadivr.disconnect_client(own))
        wait_until(
            lambda: page.evaluate("1") and "closed Disconnected by an administrator" in logged,
            "the page to be told",
        )
        page.evaluate("import('/client.js').then(({ connect }) => { connect(); })")
        wait_until(lambda: len(datadivr.clients) == 2, "the page to connect again")


@promise("The same in Python, with `pip install websockets`")
@promise("from version 13 on, connects again by itself")
def test_the_python_clients_of_the_readme_have_their_answers_and_come_back(
    tmp_path: Path, live: Live
) -> None:
    pytest.importorskip("websockets.asyncio")  # of version 13

    @datadivr.websocket_handler("$connect")
    async def pretend(message: WebSocketMessage) -> WebSocketMessage:
        """Send what another client could, with an id that it has guessed."""
        to = message.from_id
        return WebSocketMessage(event_name="fake", payload=0, to=to, from_id="other", id=1)

    for name in ("ask", "client"):
        code = block("python", f"# {name}.py").replace("8000", str(live.port))
        (tmp_path / f"{name}.py").write_text(code)
    with (
        Process("client.py", cwd=tmp_path) as process,
        Process("-u", "ask.py", cwd=tmp_path) as asking,
    ):
        wait_until(lambda: process.log == "3.0\n", "the sum")
        wait_until(lambda: asking.log == "sum_handler_result 3.0\n", "the answer")
        wait_until(lambda: len(datadivr.clients) == 1, "ask.py to go")
        (client_id,) = datadivr.clients
        in_a_thread(datadivr.disconnect_client(client_id))
        wait_until(lambda: process.log == "3.0\n3.0\n", "the second sum")


@promise("In a notebook, the server runs in a thread, and the cells have the notebook's loop")
def test_the_notebook_of_the_readme_reaches_a_client(tmp_path: Path) -> None:
    port = free_port()
    first, second = block("python", "# notebook.py").split("# The next cell:\n")
    cells = [first.replace("8000", str(port)), second]
    script = f"""
        import ast, asyncio, json, time, urllib.request
        from websockets.sync.client import connect

        def run(cell):
            code = compile(cell, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            return eval(code, names)

        async def main():
            await run(second)

        first, second = {cells!r}
        names = {{}}
        run(first)
        while True:
            try:
                urllib.request.urlopen("http://127.0.0.1:{port}/healthz")
                break
            except OSError:
                time.sleep(0.05)
        with connect("ws://127.0.0.1:{port}/ws") as client:
            asyncio.run(main())
            print(json.loads(client.recv())["payload"])
    """
    assert "from a cell" in run(script, cwd=tmp_path)


@promise(
    "Clients connect to `/realtime/ws`, pages import `/realtime/client.js`, and the "
    "console is `/realtime/console`",
    "| The host's dependencies | hold | do not hold |",
)
@pytest.mark.parametrize("way", ["include_router", "mount"])
def test_the_host_of_the_readme_serves_clients_and_the_api(way: str) -> None:
    names: dict[str, Any] = {}
    code = block("python", "# host.py")
    if way == "mount":
        (mounting,) = re.findall(r"`(host\.mount\([^`]*\))`", README)
        code, count = re.subn(r"host\.include_router\(.*\)", mounting, code)
        assert count == 1
    exec(code, names)
    with Live(names["host"]) as running:
        origin = f"{running.url}/realtime"
        for path in ("client.js", "console"):
            assert http.get(f"{origin}/{path}").status_code == 200
        with dial(f"ws://127.0.0.1:{running.port}/realtime/ws") as client:
            client_id = id_of(client)
            assert http.get(f"{origin}/clients/{client_id}", headers=ADMIN).status_code == 200
            noted = hasattr(datadivr.clients[client_id].websocket.state, "address")
            assert noted == (way == "include_router")


BESIDE = """<!doctype html>
<script type="module">
  import { connect } from "./realtime/client.js";

  const server = connect({
    onstate: async (state) => {
      if (state === "open") document.title = (await server.ask("whoami")).payload;
    },
  });
</script>
"""


@promise("Clients connect to `/realtime/ws`, pages import `/realtime/client.js`")
@pytest.mark.parametrize("way", ["include_router", "mount"])
def test_a_static_page_of_the_host_talks_to_datadivr_beside_it(
    left: None, browser: Browser, tmp_path: Path, way: str
) -> None:
    (tmp_path / "index.html").write_text(BESIDE)
    host = fastapi.FastAPI()
    if way == "mount":
        host.mount("/realtime", datadivr.app)
    else:
        host.include_router(datadivr.router, prefix="/realtime")
    host.mount("/", StaticFiles(directory=tmp_path, html=True))
    with Live(host) as running, browser.new_page() as page:
        page.goto(running.url)
        wait_until(page.title, "the page to ask")
        assert [page.title()] == list(datadivr.clients)


@promise(
    'curl -H "Authorization: Bearer $TOKEN" -X PUT localhost:8000/clients/CLIENT_ID/rooms/garden'
)
def test_the_curl_commands_of_the_readme_do_what_it_says(
    live: Live, connect: Connect, tmp_path: Path
) -> None:
    client, other = connect(live), connect(live)
    client_id = id_of(client)
    replaced = {"choose-one": TOKEN, "CLIENT_ID": client_id}
    answers = typed(tmp_path, block("sh", "/rooms/garden"), live.port, **replaced)
    listed, described, members, announced, healthy = map(
        json.loads, answers.replace("}{", "}\n{").splitlines()
    )
    assert (listed["total"], listed["clients"][0]) == (2, described)
    assert described["id"] == client_id
    assert [member["rooms"] for member in members["clients"]] == [["garden"]]
    assert hear(client)["to"] == "#garden"
    assert close_code(client) == 1008
    assert announced == {"recipients": 1, "partial": False}
    assert healthy == {"status": "ok"}
    assert hear_all(other) == []


@pytest.mark.parametrize("way", ["directly", "through nginx"])
def test_promtool_finds_no_fault_with_the_readmes_rules(tmp_path: Path, way: str) -> None:
    for name in ("prometheus", "alerts"):
        (tmp_path / f"{name}.yml").write_text(block("yaml", f"# {name}.yml"))
    if way == "through nginx":
        make_certificate(tmp_path)
        job = block("yaml", "tls_config").replace(
            "/etc/ssl/chat.example.pem", str(tmp_path / "certificate.pem")
        )
        scrape = tmp_path / "prometheus.yml"
        scrape.write_text(scrape.read_text().partition("  - job_name")[0] + job)
    command = [find("promtool"), "check", "config", "--lint-fatal", "prometheus.yml"]
    assert "5 rules found" in output_of(*command, cwd=tmp_path)


# What happens to an alert's series, each value for 15 s, and who is reported at which second.
ALERTS: dict[str, tuple[dict[str, str], dict[int, list[str]]]] = {
    "DatadivrIsDown": (
        {
            'up{job="datadivr", instance="one"}': "1x3 0x7 1x4",
            'up{job="another", instance="two"}': "0x40",
        },
        {105: [], 120: ["one"], 165: ["one"], 180: []},
    ),
    "RedisIsLost": (
        {
            'datadivr_redis_up{instance="one"}': "1x3 0x7 1x4",
            'datadivr_redis_up{instance="two"}': "1x40",
        },
        {105: [], 120: ["one"], 165: ["one"], 180: []},
    ),
    "ClientsDoNotKeepUp": (
        {
            'datadivr_errors_total{type="slow_client", instance="one"}': "0x4 1x40",
            'datadivr_errors_total{type="slow_client", instance="two"}': "3x40",
            'datadivr_errors_total{type="redis", instance="three"}': "0+1x40",
        },
        {60: [], 75: ["one"], 345: ["one"], 390: []},
    ),
    "HandlersFail": (
        {
            'datadivr_errors_total{type="handler_error", instance="one"}': "0+2x40",
            'datadivr_errors_total{type="handler_error", instance="two"}': "0+1x40",
            'datadivr_errors_total{type="redis", instance="three"}': "0+2x40",
        },
        {0: [], 360: ["one"]},
    ),
    "ClientsAreRefused": (
        {
            'datadivr_errors_total{type="unauthorized", instance="one"}': "0x4 23x40",
            'datadivr_errors_total{type="unauthorized", instance="two"}': "0x4 18x40",
            'datadivr_errors_total{type="redis", instance="three"}': "0x4 23x40",
        },
        {60: [], 300: ["one"], 390: []},
    ),
}


@promise("`ClientsDoNotKeepUp` keeps firing until 5 minutes after the last client was dropped.")
@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_of_the_readme_fires_when_it_says_and_not_otherwise(
    tmp_path: Path, alert: str
) -> None:
    rules = block("yaml", "# alerts.yml")
    assert re.findall(r"- alert: (\w+)", rules) == list(ALERTS)
    ((expr, summary),) = re.findall(rf'{alert}\n +expr: (.*)\n(?:.*\n)?.*summary: "(.*)"', rules)
    labels = dict(re.findall(r'(\w+)="(\w+)"', expr))
    series, reports = ALERTS[alert]

    def reported(instance: str) -> Json:
        text = summary.replace("{{ $labels.instance }}", instance)
        return {
            "exp_labels": {**labels, "instance": instance},
            "exp_annotations": {"summary": text},
        }

    expected = [
        {"eval_time": f"{second}s", "alertname": alert, "exp_alerts": [*map(reported, instances)]}
        for second, instances in reports.items()
    ]
    values = [{"series": name, "values": text} for name, text in series.items()]
    tests = [{"interval": "15s", "input_series": values, "alert_rule_test": expected}]
    trial = {"rule_files": ["alerts.yml"], "evaluation_interval": "15s", "tests": tests}
    (tmp_path / "alerts.yml").write_text(rules)
    (tmp_path / "trial.yml").write_text(json.dumps(trial))  # which is YAML
    command = [find("promtool"), "test", "rules", "trial.yml"]
    output_of(*command, cwd=tmp_path)


@promise(
    'all processes ("nodes"), on one machine or on several, are one server',
    "The log of each process has a line `redis_joined`",
    "whichever worker answers has the sum of all workers of the machine or container",
    "The server clears what dead workers have left in gauges, such as the number of clients",
)
def test_the_workers_of_the_readme_are_one_server_and_a_killed_one_leaves_no_gauge(
    tmp_path: Path,
) -> None:
    commands = block("sh", "--workers")
    installs = r"\.venv/bin/pip install --quiet -e '\.\[(\w+)\]' && \.venv/bin/uvicorn"
    (extra,) = re.findall(installs, commands)
    assert (
        extra
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    with RedisServer() as redis_server, contextlib.ExitStack() as stack:
        commands = re.sub(installs, f"exec {find('uvicorn')}", commands.strip())
        commands = (
            commands.replace("6379", str(redis_server.port)).replace("choose-one", TOKEN)
            + " --port {port}"
        )
        process = stack.enter_context(
            Process("-ec", commands, program=find("bash"), TMPDIR=str(tmp_path))
        )
        wait_until(
            lambda: process.log.count("redis_joined") == 4, "four workers to join", 3 * LIMIT
        )
        clients: list[ClientConnection] = []
        nodes: set[str] = set()
        while len(nodes) < 2:  # the kernel deals connections out
            clients.append(stack.enter_context(dial(process.ws)))
            nodes.add(id_of(clients[-1])[:8])
        wait_until(  # a worker that is late by a second is left out
            lambda: metrics(process)["clients"] == total(process) == len(clients), "all clients"
        )
        assert metrics(process)["redis_up"] == 1
        assert metrics(process)[f'build_info{{version="{datadivr.__version__}"}}'] == 1
        say(clients[0], "m", to="all")
        for client in clients:
            assert hear(client)["event_name"] == "m"
        wait_until(lambda: metrics(process)["messages_sent_total"] == 2 * len(clients), "the count")
        read: Callable[[Path], Any] = MmapedDict.read_all_values_from_file
        gauges = tmp_path.glob("*/gauge_livesum_*.db")
        victim = next(path for path in gauges if any(value for _, value, *_ in read(path)))
        os.kill(int(victim.stem.split("_")[-1]), signal.SIGKILL)
        wait_until(
            lambda: metrics(process)["clients"] == total(process) < len(clients),
            "its gauge to go",
        )


@promise("scrape the `/metrics` of each, without `PROMETHEUS_MULTIPROC_DIR`")
def test_servers_on_two_ports_of_the_readme_are_one_server(tmp_path: Path) -> None:
    commands = block("sh", "--port 8001")
    nodes = [Served(free_port()), Served(free_port())]
    with RedisServer() as redis_server, contextlib.ExitStack() as stack:
        numbers = {"6379": redis_server.port, "8001": nodes[0].port, "8002": nodes[1].port}
        words = {".venv/bin/uvicorn": find("uvicorn"), "choose-one": TOKEN}
        for old, new in {**numbers, **words}.items():
            assert old in commands
            commands = commands.replace(old, str(new))
        process = stack.enter_context(
            Process("-ec", commands, program=find("bash"), cwd=tmp_path, port=nodes[1].port)
        )
        for line in ("redis_joined", "running on"):
            times_two = functools.partial(lambda line: process.log.count(line) == 2, line)
            wait_until(times_two, f"two lines {line}", 3 * LIMIT)
        first, second = (stack.enter_context(dial(node.ws)) for node in nodes)
        second_id = answer_to(second, "whoami")["payload"]
        say(second, "m", to="all")
        assert [hear_event(client, "m")["from_id"] for client in (first, second)] == [second_id] * 2
        wait_until(lambda: total(nodes[0]) == total(nodes[1]) == 2, "both in both lists")


@promise(
    "With TLS, this is the whole `server` block",
    "nginx connects from the same machine, where [only listed "
    "names](#decide-who-may-do-what) are let in",
    "Start uvicorn with `--root-path /live`, which `/docs` needs",
    "Clients then connect to `wss://chat.example/live/ws`",
    "there the paths stay `/ws` and `/metrics`",
    "uvicorn takes the client's address from `X-Forwarded-For` if the proxy is on 127.0.0.1",
)
@pytest.mark.parametrize("path", ["/", "/live/"])
def test_the_readmes_nginx_passes_websockets_and_addresses_on(
    tmp_path: Path, configure: Callable[..., None], path: str
) -> None:
    configuration = block("nginx", "location")
    if path != "/":
        location, passed = re.findall(r"`(location .*?|proxy_pass \S+:8000\S+)`", README)
        for line in (location, passed):
            old = rf"{line.split()[0]} .*"
            configuration, count = re.subn(old, line, configuration)
            assert count == 1
    configure(allowed_origins=("http://app.example",))
    make_certificate(tmp_path)
    secure_port = free_port()
    configuration = re.sub(r"/etc/ssl/chat.example.(\w+)", rf"{tmp_path}/chat.\1", configuration)
    for name, given in (("chat.pem", "certificate.pem"), ("chat.key", "key.pem")):
        (tmp_path / given).rename(tmp_path / name)
    trust = ssl.create_default_context(cafile=tmp_path / "chat.pem")
    (root_path,) = re.findall(r"`--root-path (/live)`", README)
    with (
        Live(root_path=root_path if path != "/" else "") as server,
        nginx(tmp_path, configuration.replace(":8000", f":{server.port}"), secure_port) as proxy,
    ):
        proxy.wait_until_up(f"{path}healthz")
        url = f"127.0.0.1:{proxy.port}{path}"
        with dial(f"ws://{url}ws", origin=Origin("http://app.example")) as client:
            client_id = id_of(client)
            assert ask(client, "m", to="all")["from_id"] == client_id
            (told,) = http.get(f"http://{url}clients", headers=ADMIN).json()["clients"]
            assert told["address"] == ("127.0.0.1" if IS_SANSIO else client_id)
        # websockets before 13 has another name for it.
        name = "ssl_context" if "ssl_context" in inspect.signature(dial).parameters else "ssl"
        secured: Any = {name: trust}
        with dial(f"wss://localhost:{secure_port}{path}ws", **secured) as client:
            assert id_of(client)
        assert http.get(f"http://{url}ws").status_code == 426
        assert f"'{path}openapi.json'" in http.get(f"http://{url}docs").text


@promise(
    "To a socket, as with [systemd](#with-systemd): `proxy_pass http://unix:/run/datadivr/socket;`",
    "name the proxy in `--forwarded-allow-ips`",
    "The process listens on a socket, and on no port",
)
def test_the_readmes_unit_of_systemd_serves_behind_its_nginx(tmp_path: Path) -> None:
    unit = configparser.RawConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block("ini", "[Service]"))
    service = unit["Service"]
    command = service["ExecStart"]
    (passed,) = re.findall(r"`(proxy_pass http://unix:\S+)`", README)
    configuration = re.sub(r"proxy_pass .*", passed, block("nginx", "location"))
    runtime = f"/run/{service['RuntimeDirectory']}"
    for word in (command, configuration):
        assert f"{runtime}/socket" in word
    program, *options = command.replace(runtime, str(tmp_path)).split()
    assert program == f"{service['WorkingDirectory']}/.venv/bin/uvicorn"
    listed = "http://app.example"
    with (
        Process(*options, program=find("uvicorn"), DATADIVR_ALLOWED_ORIGINS=listed),
        nginx(tmp_path, configuration.replace(runtime, str(tmp_path))) as proxy,
    ):
        proxy.wait_until_up()
        with dial(proxy.ws, origin=Origin(listed)) as client:
            url = f"/clients/{id_of(client)}"
            assert proxy.api.get(url).json()["address"] == "127.0.0.1"


# A lobby of tables at which people play and watch, on any number of nodes: the test of all of it.
LOBBY = """
    from typing import Literal

    from fastapi import HTTPException, WebSocket
    from fastapi.responses import HTMLResponse
    from pydantic import BaseModel

    from datadivr import WebSocketMessage, app, authorize_client, broadcast, clients
    from datadivr import create_message, disconnect_client, join_room, leave_room, list_clients
    from datadivr import websocket_handler

    TABLES = {"chess": 2, "poker": 4}  # seats
    MODERATORS = {"Mo"}

    async def log_in(websocket: WebSocket) -> None:
        await authorize_client(websocket)
        name = websocket.query_params.get("name", "")
        if not name.isalpha():
            raise HTTPException(403, "Log in first.")
        websocket.state.user = name
        websocket.state.rooms = {"lobby", f"user:{name}"}

    app.dependency_overrides[authorize_client] = log_in

    class Seat(BaseModel):
        table: Literal["chess", "poker"]
        watch: bool = False

    async def people(room: str) -> dict[str, str]:
        page = await list_clients(limit=1000, room=room)
        return {client.id: client.user or "" for client in page.clients}

    async def tell(room: str, event_name: str, payload: object) -> None:
        await broadcast(create_message(event_name, payload, f"#{room}"))

    def name_of(message: WebSocketMessage) -> str:
        return clients[message.from_id].user or ""

    @websocket_handler("$connect")
    async def come(message: WebSocketMessage) -> WebSocketMessage:
        await tell("lobby", "came", name_of(message))
        here = sorted((await people("lobby")).values())
        return create_message("here", here, message.from_id)

    @websocket_handler("$disconnect")
    async def go(message: WebSocketMessage) -> None:
        for room in clients[message.from_id].rooms & {"lobby", *TABLES}:
            await tell(room, "went", name_of(message))

    @websocket_handler("sit")
    async def sit(message: WebSocketMessage[Seat]) -> WebSocketMessage:
        table, watch = message.payload.table, message.payload.watch
        seated = await people(f"{table}:players")
        if not watch and len(seated) >= TABLES[table] and message.from_id not in seated:
            raise HTTPException(409, "The table is full.")
        await join_room(message.from_id, table, listen_only=watch)
        if not watch:
            await join_room(message.from_id, f"{table}:players")
            await tell(table, "sat", name_of(message))
        players = sorted((await people(f"{table}:players")).values())
        return create_message("table", players, message.from_id)

    @websocket_handler("stand")
    async def stand(message: WebSocketMessage[Seat]) -> None:
        table = message.payload.table
        await tell(table, "stood", name_of(message))
        await leave_room(message.from_id, table)
        await leave_room(message.from_id, f"{table}:players")

    @websocket_handler("remove")
    async def remove(message: WebSocketMessage[str]) -> WebSocketMessage:
        if name_of(message) not in MODERATORS:
            raise HTTPException(403, "Only moderators remove people.")
        found = await people(f"user:{message.payload}")
        if not found:
            raise HTTPException(404, f"{message.payload} is not here.")
        for client_id in found:
            await disconnect_client(client_id)
        return create_message("removed", len(found), message.from_id)

    PAGE = '''<!doctype html>
    <title>Lobby</title>
    <ul id="log"></ul>
    <form><input id="move" aria-label="Move" /> <button>Send</button></form>
    <script>
      const url = location.origin.replace("http", "ws") + "/ws" + location.search;
      const socket = new WebSocket(url);
      const questions = new Map();
      let last = 0;
      function show(text) {
        document.querySelector("#log").appendChild(document.createElement("li")).textContent = text;
      }
      function ask(event_name, payload, to) {
        return new Promise((resolve, reject) => {
          questions.set((last += 1), { resolve, reject });
          socket.send(JSON.stringify({ event_name, payload, to, id: last }));
        });
      }
      socket.onopen = async () => show("at " + (await ask("sit", { table: "chess" })).payload);
      socket.onclose = ({ reason }) => show("closed: " + reason);
      socket.onmessage = ({ data }) => {
        const message = JSON.parse(data);
        const question = questions.get(message.id);
        questions.delete(message.id);
        if (!question) show(message.event_name + " " + message.payload);
        else if (message.event_name === "error") question.reject(new Error(message.message));
        else question.resolve(message);
      };
      document.querySelector("form").onsubmit = async (event) => {
        event.preventDefault();
        const move = document.querySelector("#move").value;
        await ask("move", move, "#chess").then(
          () => show("played " + move),
          (error) => show("refused: " + error.message),
        );
      };
    </script>'''

    @app.get("/lobby")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)
"""


def sit(client: ClientConnection, **seat: Any) -> Any:
    told = answer_to(client, "sit", payload={"table": "chess", **seat})
    return told["message"] or told["payload"]


@promise("To find one of another process, by its `user` for example, use `list_clients`")
def test_a_lobby_of_tables_works_on_two_nodes(
    cluster: Cluster, browser: Browser, tmp_path: Path
) -> None:
    code = textwrap.dedent(LOBBY)
    assert code.count("\n") <= 150
    (tmp_path / "lobby.py").write_text(code)
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                Node(cluster[0].url, tmp_path, "lobby:app", DATADIVR_REDIS_PREFIX="lobby")
            )
            for _ in range(2)
        ]

        def come(name: str, node: int) -> ClientConnection:
            client = stack.enter_context(dial_node(nodes[node], f"/ws?name={name}"))
            hear_event(client, "here")
            return client

        with pytest.raises(InvalidStatus):
            dial_node(nodes[0], "/ws?name=")
        ada, bob, cyd = come("Ada", 0), come("Bob", 1), come("Cyd", 0)
        mo = come("Mo", 1)
        page = browser.new_page()
        stack.callback(page.close)
        page.goto(f"{nodes[1].url}/lobby?name=Eve")
        log = page.locator("#log li")
        expect(page.get_by_text("at Eve", exact=True)).to_be_visible()
        again = come("Ada", 1)  # her other device
        assert hear_event(ada, "came")["payload"] == "Bob"

        # Two have a seat, the third may only watch; whoever is at no table hears nothing of it.
        assert sit(ada) == ["Ada", "Eve"]
        expect(page.get_by_text("sat Ada", exact=True)).to_be_visible()
        assert sit(bob) == "The table is full."
        assert sit(bob, watch=True) == ["Ada", "Eve"]
        assert sit(bob, table="bridge").startswith("payload.table: ")
        assert answer_to(ada, "move", payload="e4", to="#chess")["event_name"] == "ok"
        assert hear_event(bob, "move")["payload"] == "e4"
        expect(page.get_by_text("move e4", exact=True)).to_be_visible()
        told = answer_to(bob, "move", payload="e5", to="#chess")
        assert told["payload"] == {"code": "not_in_room", "event_name": "move"}
        page.get_by_label("Move").fill("e5")
        page.get_by_role("button").click()
        expect(page.get_by_text("played e5", exact=True)).to_be_visible()
        assert hear_event(ada, "move")["payload"] == "e5"
        assert "move" not in {message["event_name"] for message in hear_all(cyd)}

        # A person is reached on each device, and removed from both nodes by name.
        private: Json = {"event_name": "order", "payload": 1, "to": "#user:Ada"}
        assert nodes[1].api.post("/messages", json=private).json()["recipients"] == 2
        for device in (ada, again):
            assert hear_event(device, "order") == message_from("server", **private)
        told = answer_to(cyd, "remove", payload="Ada")
        assert told["payload"] == {"code": "refused", "status": 403, "event_name": "remove"}
        assert answer_to(mo, "remove", payload="Zoe")["message"] == "Zoe is not here."
        assert answer_to(mo, "remove", payload="Ada")["payload"] == 2
        assert [close_code(device) for device in (ada, again)] == [1008, 1008]
        expect(page.get_by_text("went Ada", exact=True).first).to_be_visible()
        assert hear_event(bob, "went")["payload"] == "Ada"
        assert sit(bob) == ["Bob", "Eve"]  # there is a seat now
        assert answer_to(bob, "stand", payload={"table": "chess"})["event_name"] == "ok"
        assert answer_to(mo, "remove", payload="Eve")["payload"] == 1
        expect(log.last).to_have_text("closed: Disconnected by an administrator")
        page_of = nodes[0].api.get("/clients", params={"room": "lobby"}).json()
        assert sorted(client["user"] for client in page_of["clients"]) == ["Bob", "Cyd", "Mo"]


@promise("so that numbers rise when the server starts again")
def test_the_numbers_of_the_readmes_news_rise_when_the_server_starts_again(tmp_path: Path) -> None:
    copy_out(tmp_path, "missed")
    script = """
        import asyncio, logging
        logging.disable()
        import missed

        async def publish():
            for _ in range(3):
                await missed.publish("news")
                print("number", missed.kept[-1]["number"])

        asyncio.run(publish())
    """
    output = run(script, cwd=tmp_path) + run(script, cwd=tmp_path)
    numbers = [int(number) for number in re.findall(r"^number (\d+)$", output, re.MULTILINE)]
    assert len(numbers) == 6
    assert numbers == sorted(set(numbers))


@promise(
    "nginx passes on `/metrics`, too, under the host of your pages, which is listed. Set"
    " `DATADIVR_METRICS_TOKEN`, or everybody can read it."
)
def test_everybody_can_read_the_metrics_through_the_readmes_nginx_until_a_token_is_set(
    tmp_path: Path, configure: Callable[..., None]
) -> None:
    configure(allowed_origins=("https://chat.example",))
    configuration = block("nginx", "location")
    with (
        Live() as server,
        nginx(tmp_path, configuration.replace(":8000", f":{server.port}")) as proxy,
    ):
        proxy.wait_until_up()

        def status(host: str, **headers: str) -> int:
            url = f"{proxy.url}/metrics"
            return int(http.get(url, headers={"Host": host, **headers}).status_code)

        assert status("chat.example") == 200
        assert status("evil.example") == 403
        configure(metrics_token="of-prometheus")
        assert status("chat.example") == 401
        assert status("chat.example", Authorization="Bearer of-prometheus") == 200


@promise("They need no sticky sessions.")
def test_the_readmes_nginx_may_pass_each_client_and_request_to_any_node(
    tmp_path: Path, cluster: Cluster, pair: Pair
) -> None:
    nodes = cluster[1:]
    servers = " ".join(f"server 127.0.0.1:{node.port};" for node in nodes)
    configuration = block("nginx", "location").replace("127.0.0.1:8000", "nodes")
    configuration = f"upstream nodes {{ {servers} }}\n{configuration}"
    with nginx(tmp_path, configuration) as proxy, contextlib.ExitStack() as stack:
        proxy.wait_until_up()
        clients = [stack.enter_context(dial(proxy.ws)) for _ in range(6)]
        ids = {id_of(client) for client in clients}
        own = {id_of(client) for client in pair}
        found: list[dict[str, str]] = []

        def all_are_found() -> bool:
            lists = [proxy.api.get("/clients").json()["clients"] for _ in range(4)]
            found[:] = [{told["id"]: told["node"] for told in each} for each in lists]
            return all(set(page) == ids | own for page in found)

        wait_until(all_are_found, "all clients, by either node")
        assert len({node for id_, node in found[0].items() if id_ in ids}) == 2
        say(clients[0], "m", to="all")
        assert {hear(client)["event_name"] for client in clients} == {"m"}
        for client_id in ids:
            assert proxy.api.get(f"/clients/{client_id}").status_code == 200


# ---- Benchmarks: `pytest -m benchmark` -----------------------------------------------------------
#
# Each server runs in a process of its own, on one processor where there are two, and this process
# on another. The servers take turns within a round, and what counts is the ratio of the medians:
# the machine's own speed drops out.

TUTORIAL = '''
    """The pattern that FastAPI tutorials teach: one awaited send_json per client."""

    import uuid
    from typing import Any, Literal

    from fastapi import FastAPI, WebSocket, WebSocketDisconnect
    from pydantic import BaseModel

    app = FastAPI()
    clients: dict[WebSocket, str] = {}
    rooms: dict[str, set[WebSocket]] = {}

    class Message(BaseModel):
        event_name: str
        payload: Any | None = None
        to: str = "others"
        from_id: str = "server"
        message: str | None = None

    @app.get("/healthz")
    async def health() -> str:
        return "ok"

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        client_id = clients[websocket] = str(uuid.uuid4())
        try:
            while True:
                message = Message.model_validate(await websocket.receive_json())
                message.from_id = client_id
                if message.event_name == "join":
                    rooms.setdefault("#" + message.payload, set()).add(websocket)
                    continue
                data = message.model_dump()
                for member in list(rooms.get(message.to, ())):
                    if member is not websocket:
                        await member.send_json(data)
                for other, other_id in list(clients.items()):
                    others = message.to == "others" and other is not websocket
                    if others or message.to in ("all", other_id):
                        await other.send_json(data)
        except WebSocketDisconnect:
            del clients[websocket]
            for members in rooms.values():
                members.discard(websocket)
'''
ROOMS = """
    from datadivr import WebSocketMessage, app, join_room, websocket_handler

    @websocket_handler("join")
    async def join(message: WebSocketMessage) -> None:
        await join_room(message.from_id, message.payload)
"""
INCLUDING = """
    import datadivr
    import fastapi
    app = fastapi.FastAPI()
    app.include_router(datadivr.router)
"""
MOUNTING = """
    import datadivr
    import fastapi
    app = fastapi.FastAPI()
    app.mount("/", datadivr.app)
"""

SOCKETIO = '''
    """python-socketio with its Redis manager."""

    import os

    import socketio
    from fastapi import FastAPI

    manager = socketio.AsyncRedisManager(os.environ["DATADIVR_REDIS_URL"])
    server = socketio.AsyncServer(async_mode="asgi", client_manager=manager)

    @server.on("msg")
    async def relay(session_id, message):
        await server.emit("msg", message)

    @server.on("join")
    async def join(session_id, room):
        await server.enter_room(session_id, room)

    @server.on("say")
    async def say(session_id, message):
        await server.emit("msg", message, room=message["to"], skip_sid=session_id)

    http = FastAPI()

    @http.get("/healthz")
    async def health() -> str:
        return "ok"

    app = socketio.ASGIApp(server, http)
'''


class BrowserPeer(Peer):
    """A client that offers permessage-deflate: marks are compressed, so it counts frames."""

    upgrade = (
        UPGRADE[:-2]
        + b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
    )
    unread = b""
    kinds: tuple[bytes, ...] = (b"",)  # what a frame that counts begins with

    def count(self, data: bytes) -> int:
        self.unread += data
        frames = 0
        while len(self.unread) >= 4:
            head, length = 2, self.unread[1]
            if length == 126:
                head, length = 4, int.from_bytes(self.unread[2:4])
            if len(self.unread) < head + length:
                break
            frames += self.unread[head : head + length].startswith(self.kinds)
            self.unread = self.unread[head + length :]
        return frames


class SocketIoPeer(BrowserPeer):
    """A client that speaks Socket.IO: it counts the answer to its hello, and events."""

    upgrade = UPGRADE.replace(b"/ws", b"/socket.io/?EIO=4&transport=websocket")
    hello = masked("40")
    kinds = (b"40", b"42")

    @staticmethod
    def to_all(size: int) -> bytes:
        return masked('42["msg",' + json.dumps({"message": "x" * size}) + "]")

    @staticmethod
    def join(room: str) -> bytes:
        return masked(f'42["join","{room}"]')

    @staticmethod
    def to_room(size: int, room: str) -> bytes:
        return masked('42["say",' + json.dumps({"to": room, "message": "x" * size}) + "]")


# macOS cannot bind a process to a processor.
PROCESSORS = sorted(getattr(os, "sched_getaffinity", lambda _: ())(0))


def bind(process_id: int, processors: list[int]) -> None:
    if processors:
        os.sched_setaffinity(process_id, processors)


SCRIPTS = {
    "datadivr": "from datadivr import app",
    "tutorial": TUTORIAL,
    "socketio": SOCKETIO,
    "with_rooms": ROOMS,
    "included": INCLUDING,
    "mounted": MOUNTING,
}


@contextlib.contextmanager
def pinned(folder: Path, name: str, *options: str, **variables: Any) -> Iterator[Process]:
    """Run one of the servers, on a processor of its own where there are two."""
    with serve(folder / name, SCRIPTS[name], *options, **variables) as process:
        bind(process.popen.pid, PROCESSORS[:1])
        bind(0, PROCESSORS[1:] or PROCESSORS)
        try:
            yield process
        finally:
            bind(0, PROCESSORS)


def report(capsys: pytest.CaptureFixture[str], *rows: tuple[object, ...]) -> None:
    with capsys.disabled():
        print("", *("| " + " | ".join(map(str, row)) + " |" for row in rows), sep="\n")


def processor_seconds(process: Process) -> float:
    fields = Path(f"/proc/{process.popen.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# By mix: clients, messages, how many are in flight, bytes of each, publishers, and rooms.
MIXES = {
    "one message at a time": (200, 300, 1, 64, 1, 0),
    "16 in flight": (200, 1600, 16, 64, 1, 0),
    "everybody to everybody": (200, 2000, 200, 128, 200, 0),
    "2,000 clients": (2000, 160, 16, 64, 1, 0),
    "16 KB": (200, 160, 16, 16384, 1, 0),
    "6 KB, permessage-deflate": (200, 400, 8, 6000, 1, 0),
    "echo: one client to itself": (1, 40000, 64, 64, 1, 0),
    "a room of 200, all talk": (200, 2000, 200, 64, 200, 1),
    "20 rooms of 10, all talk": (200, 16000, 200, 64, 200, 20),
}


def test_each_mix_beside_the_tutorials_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}

    async def run(process: Process, name: str, share: int) -> tuple[float, float]:
        """Return the deliveries a second, and microseconds of processor time a delivery."""
        clients, messages, window, size, publishers, rooms = MIXES[name]
        async with Load(process.port, peer=BrowserPeer if "deflate" in name else Peer) as load:
            await load.connect(clients)
            if rooms:
                await load.join(rooms)
            before, first = processor_seconds(process), load.peers[0].deliveries
            if rooms:
                rate = await load.talk_in_rooms(messages // share // clients, rooms, size)
            else:
                rate = await load.publish(messages // share, window, text_to_all(size), publishers)
            spent = processor_seconds(process) - before
            deliveries = sum(peer.deliveries for peer in load.peers) - first * clients
        return rate, spent / deliveries * 1e6

    for _ in range(3):
        for server, share in (("with_rooms", 1), ("tutorial", 8)):  # the slow one does a part
            with pinned(tmp_path, server) as process:
                for name in MIXES:
                    found.setdefault((name, server), []).append(
                        asyncio.run(run(process, name, share))
                    )
    head = ("mix", "deliveries/s", "tutorial's", "ratio", "us a delivery", "tutorial's", "ratio")
    rows: list[tuple[object, ...]] = [head, ("---",) * len(head)]
    for name in MIXES:
        (ours, own), (theirs, their) = (
            map(statistics.median, zip(*found[name, server], strict=True))
            for server in ("with_rooms", "tutorial")
        )
        rates = (f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f}x")
        rows.append((name, *rates, f"{own:.2f}", f"{their:.2f}", f"{own / their:.2f}x"))
        assert own < their
    report(capsys, *rows)


def test_a_message_to_a_room_of_one_beside_one_to_an_id(
    loop: FakeLoop, capsys: pytest.CaptureFixture[str]
) -> None:
    class Sink(FakeConnection):
        def write(self, data: bytes) -> None: ...

    clients = [fake_client(Sink()) for _ in range(600)]
    for client in clients:
        datadivr._hub.join_room(client, f"user:{client.id}")

    def microseconds(addresses: list[str]) -> float:
        start = time.process_time()
        for _ in range(20):
            for to in addresses:
                datadivr._hub.publish(to, b"x" * 150)
            datadivr._hub.flush()
        return (time.process_time() - start) / 20 / len(addresses) * 1e6

    ways = [client.id for client in clients], [f"#user:{client.id}" for client in clients]
    gc.freeze()  # the collector would look through all of pytest's objects now and then
    rounds = [[microseconds(way) for way in ways] for _ in range(9)]
    gc.unfreeze()
    direct, room = map(statistics.median, zip(*rounds, strict=True))
    report(capsys, ("us a message to an id, and to a room of one", f"{direct:.2f}", f"{room:.2f}"))
    assert room < 2 * direct


def test_two_nodes_beside_socketio_and_what_redis_costs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(importlib.util.find_spec("socketio"), "python-socketio")
    # Each with its nodes, its messages, and its rooms, in which all talk.
    settings: dict[str, tuple[str, int, int, int]] = {
        "two nodes": ("with_rooms", 2, 3000, 0),
        "two nodes of python-socketio": ("socketio", 2, 100, 0),
        "two nodes, 10 rooms": ("with_rooms", 2, 6000, 10),
        "two nodes of python-socketio, 10 rooms": ("socketio", 2, 400, 10),
        "one node with Redis": ("with_rooms", 1, 3000, 0),
        "one node without": ("with_rooms", 1, 3000, 0),
    }
    rates: dict[str, list[float]] = {name: [] for name in settings}

    async def run(ports: list[int], app: str, messages: int, rooms: int) -> float:
        peer = SocketIoPeer if app == "socketio" else Peer
        async with Load(*ports, peer=peer) as load:
            await load.connect(200)
            if peer is SocketIoPeer:
                await load.until(1)
            if rooms:
                await load.join(rooms)
                rate = await load.talk_in_rooms(messages // 200, rooms, 64)
            else:
                rate = await load.publish(messages, 16, peer.to_all(64))
        return rate

    with RedisServer() as server:
        os.sched_setaffinity(server.popen.pid, PROCESSORS[1:] or PROCESSORS)
        for _ in range(3):
            for name, (app, nodes, messages, rooms) in settings.items():
                url = "" if "without" in name else server.url
                with contextlib.ExitStack() as stack:
                    pins = [pinned(tmp_path, app, DATADIVR_REDIS_URL=url) for _ in range(nodes)]
                    ports = [stack.enter_context(pin).port for pin in pins]
                    rates[name].append(asyncio.run(run(ports, app, messages, rooms)))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    ratio = medians["two nodes"] / medians["two nodes of python-socketio"]
    in_rooms = medians["two nodes, 10 rooms"] / medians["two nodes of python-socketio, 10 rooms"]
    kept = medians["one node with Redis"] / medians["one node without"]
    rows = [(name, f"{rate:,.0f}") for name, rate in medians.items()]
    report(capsys, ("200 clients", "deliveries/s"), ("---", "---"), *rows)
    ratios = f"to python-socketio {ratio:.1f}x, in rooms {in_rooms:.1f}x"
    report(capsys, (ratios, f"with Redis to without {kept:.2f}"))
    assert ratio > 15
    assert in_rooms > 5
    assert kept > 0.8


def test_size_and_arrival_beside_the_tutorials_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures: dict[str, list[tuple[float, float]]] = {}

    async def run(process: Process) -> tuple[float, float]:
        async with Load(process.port) as warm_up:
            await warm_up.connect(200)
        await asyncio.sleep(1)
        async with Load(process.port) as load:
            before, start = resident(process), time.perf_counter()
            await load.connect(4000)
            seconds = time.perf_counter() - start
            await asyncio.sleep(1)
            size = resident(process) - before
        return size / 4000, 4000 / seconds

    for _ in range(3):
        for server in ("datadivr", "tutorial", "included", "mounted"):
            with pinned(tmp_path, server) as process:
                figures.setdefault(server, []).append(asyncio.run(run(process)))
    ours, theirs, included, mounted = (
        tuple(map(statistics.median, zip(*runs, strict=True))) for runs in figures.values()
    )
    report(
        capsys,
        ("4,000 clients", "datadivr", "tutorial", "ratio", "include_router", "mount"),
        ("---",) * 6,
        *(
            (
                row,
                *(f"{run[i]:,.0f}" for run in (ours, theirs)),
                f"{ours[i] / theirs[i]:.2f}x",
                *(f"{run[i]:,.0f}" for run in (included, mounted)),
            )
            for i, row in enumerate(("bytes an idle client", "connections accepted a second"))
        ),
    )
    assert ours[0] < mounted[0] < included[0]
    assert ours[0] < theirs[0]


def test_a_stalled_client_costs_the_others_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = 4 * 1024 * 1024
    with pinned(tmp_path, "datadivr") as process:

        def run(stall: bool) -> tuple[float, int, int]:
            measure = functools.partial(resident, process)
            return asyncio.run(publish_beside_a_stalled(process, 200, 4000, measure, stall=stall))

        runs = [(run(False), run(True)) for _ in range(5)]
    ratio = statistics.median(stalled[0] / free[0] for free, stalled in runs)
    grown = max(stalled[1] for _, stalled in runs)
    report(
        capsys,
        (
            "deliveries/s of 200 with a stalled client, to without",
            f"{ratio:.2f}x",
            f"+{grown:,} bytes",
        ),
    )
    assert [stalled[2] for _, stalled in runs] == [1, 2, 3, 4, 5]
    assert ratio >= 0.95
    assert grown < 2 * limit


def test_ten_thousand_clients_are_held_at_once(tmp_path: Path, many_files: None) -> None:
    with pinned(tmp_path, "datadivr") as process:
        asyncio.run(hold_clients(process, 10_000))


def test_clients_that_come_and_go_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cycles = 50_000
    with pinned(tmp_path, "datadivr") as process:
        come_and_go(process, cycles // 5)
        settled = resident(process)
        come_and_go(process, cycles // 5 * 4)
        grown = resident(process) - settled
        after = metrics(process)
    report(
        capsys,
        (f"{cycles:,} clients that came and went", f"{grown:+,} bytes after the first fifth"),
    )
    assert (after["clients"], after["connections_total"]) == (0, cycles)
    assert (
        sum(value for name, value in after.items() if name.startswith("disconnections")) == cycles
    )
    assert grown < 2 * 1024 * 1024


def talk_during_a_flood(server: Served, messages: int) -> list[float]:
    """Return the seconds that each message of a pair took, up to the end of a flood."""

    async def talk() -> list[float]:
        async with Load(server.port) as flood, Load(server.port) as pair:
            await flood.connect(1)
            await pair.connect(2)
            flood.peers[0].transport.write(
                masked('{"event_name": "x", "to": "nobody"}') * messages + text_to_all(0)
            )
            times: list[float] = []
            while flood.peers[0].deliveries <= len(times):  # until the one after the flood has come
                start = time.perf_counter()
                pair.peers[len(times) % 2].transport.write(text_to_all(0))
                await pair.until(len(times) + 1)
                times.append(time.perf_counter() - start)
        return times

    return asyncio.run(talk())


def test_a_flood_leaves_the_others_their_latency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pinned(tmp_path, "datadivr") as process:
        times = sorted(talk_during_a_flood(process, 100_000))
    p99 = times[int(len(times) * 0.99)]
    report(
        capsys, (f"p99 of {len(times)} messages during a flood of 100,000", f"{p99 * 1000:.1f} ms")
    )
    assert len(times) > 100
    assert p99 < 0.020


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_large_messages_to_many_clients_share_their_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    if loop == "asyncio" and sys.version_info < (3, 12):
        pytest.skip("asyncio copies what it buffers before Python 3.12")

    async def run(process: Process) -> int:
        async with Load(process.port) as load:
            await load.connect(500)
            await load.publish(3, 1, text_to_all(1_000_100))
            before = highest = resident(process)
            publishing = asyncio.create_task(load.publish(100, 4, text_to_all(1_000_100)))
            while not publishing.done():
                await asyncio.wait((publishing,), timeout=0.05)
                highest = max(highest, resident(process))
            await publishing
            assert [peer.deliveries for peer in load.peers] == [103] * 500
        return highest - before

    with pinned(tmp_path, "datadivr", "--loop", loop) as process:
        grown = asyncio.run(run(process))
    report(capsys, (f"100 messages of 1 MB to 500 clients, {loop}", f"{grown:+,} bytes"))
    assert grown < 64 * 1024 * 1024


# ---- The marks of the sections -------------------------------------------------------------------


def mark_the_tests() -> None:
    """Give each test the mark of the section that it stands in."""
    marking: Callable[[Any], Any] | None = None
    for line in SOURCE.splitlines():
        if line.startswith("# ---- "):
            found = re.match(SECTION, line)
            marking = getattr(pytest.mark, found[1]) if found else None
        name = re.match(r"(?:async def |def |class |)([Tt]est\w+)\b", line)
        if marking and name and name[1] in all_tests():
            globals()[name[1]] = marking(globals()[name[1]])


def print_promises() -> None:
    """Print a table of the README's promises and the tests that hold each."""
    held: dict[str, list[str]] = {}
    for promised, test in promises():
        held.setdefault(promised, []).append(f"`{test}`")
    print("| promise | tests |", "| --- | --- |", sep="\n")
    for promised, names in held.items():
        print("|", promised.replace("|", r"\|"), "|", ", ".join(names), "|")


mark_the_tests()

if __name__ == "__main__":
    print_promises()
