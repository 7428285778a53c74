# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "fastapi>=0.164.0",
#     "uvicorn[standard]>=0.52.4",
#     "pydantic>=2.9.0",
#     "structlog>=23.1.0",
#     "prometheus-client>=0.20.0",
# ]
# ///
# ruff: noqa: E501
"""A WebSocket message server with an HTTP admin API, in one file.

Copy this file into a project and run ``uvicorn datadivr:app``. Clients connect to ``/ws`` and send JSON messages
to ``all``, to ``others`` or to one client's id. A handler registered for a message's event answers it; a message
without a handler is relayed as it is::

    from datadivr import WebSocketMessage, app, websocket_handler

    @websocket_handler("greet")
    async def greet(message: WebSocketMessage) -> WebSocketMessage:
        return WebSocketMessage(event_name="greeting", payload="hello", to=message.from_id)

Settings are environment variables; one that is empty counts as not set:

==================================== =========== ==================================================================
DATADIVR_ADMIN_TOKEN                 random      bearer token of the admin API; a random one is logged at the start
DATADIVR_CLIENT_TOKEN                none        bearer token that clients must bring
DATADIVR_ALLOWED_ORIGINS             none        comma-separated origins, besides the server's own; ``*`` allows any
DATADIVR_MAX_MESSAGE_BYTES           1048576     longest message, in bytes of UTF-8
DATADIVR_MAX_MESSAGES_PER_SECOND     0           messages a second from one client; 0 is no limit
DATADIVR_MAX_CLIENTS                 0           clients connected at once; 0 is no limit
DATADIVR_MAX_BUFFER_BYTES            4194304     bytes unsent to one client, above which it is dropped
DATADIVR_COMPRESS_MIN_BYTES          1024        shortest message compressed once for all that can; 0 is none
DATADIVR_PROTECT_METRICS             false       whether ``/metrics`` asks for the admin token
DATADIVR_REDIS_URL                   none        ``redis://...``, of the Redis that makes all processes one server
DATADIVR_REDIS_PREFIX                datadivr    begins the names of the channels there: one a server
DATADIVR_LOG_LEVEL                   INFO        DEBUG, INFO, WARNING, ERROR or CRITICAL
DATADIVR_LOG_FORMAT                  console     console or json
==================================== =========== ==================================================================
"""

import argparse
import asyncio
import base64
import functools
import hashlib
import hmac
import inspect
import itertools
import json
import logging
import math
import operator
import os
import re
import secrets
import struct
import sys
import threading
import time
import uuid
import zlib
from collections import defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, get_args

import structlog
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response, WebSocket
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import Message, Receive, Scope, Send
from typing_extensions import TypeVar

__version__ = "1.0.0"

# ---- Settings ------------------------------------------------------------------------------------

# RFC 9110, 5.6.2: what an Authorization header and a WebSocket subprotocol can both carry.
Token = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]
Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/?#@]+)$")]


class Settings(BaseModel):
    """The limits and secrets of one process; the table at the head of this file says what each is."""

    admin_token: Token | None = None
    client_token: Token | None = None
    allowed_origins: Annotated[
        tuple[Origin, ...], BeforeValidator(lambda text: text.lower().replace(" ", "").split(","))
    ] = ()
    max_message_bytes: PositiveInt = 1024 * 1024
    max_messages_per_second: NonNegativeInt = 0
    max_clients: NonNegativeInt = 0
    max_buffer_bytes: PositiveInt = 4 * 1024 * 1024
    compress_min_bytes: NonNegativeInt = 1024
    protect_metrics: bool = False
    redis_url: Annotated[str, Field(pattern="^(rediss?|unix)://")] | None = None
    redis_prefix: str = "datadivr"
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(str.upper)
    ] = "INFO"
    log_format: Annotated[Literal["console", "json"], BeforeValidator(str.lower)] = "console"


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings from `DATADIVR_*` variables.

    Raises:
        ValueError: names each variable that is wrong, what was expected, and what came, but for what is secret.

    """
    values = {
        name: value
        for name in Settings.model_fields
        if (value := environ.get(f"DATADIVR_{name.upper()}"))
    }
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        wrong = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            came = "" if name.endswith(("token", "redis_url")) else f" (it is {values[name]!r})"
            wrong.append(f"DATADIVR_{name.upper()}: {detail['msg']}{came}")
        raise ValueError("; ".join(wrong)) from None


settings = read_settings(os.environ)
logger = structlog.get_logger("datadivr")

if not structlog.is_configured():
    _plain = (
        structlog.dev.plain_traceback
    )  # the default formatter shows local variables, and so payloads
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(
                [
                    structlog.dev.ConsoleRenderer(
                        colors=sys.stdout.isatty(), exception_formatter=_plain
                    )
                ]
                if settings.log_format == "console"
                else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log_level]
        ),
    )


_warned_at: dict[str, float] = {}


def warn(event: str, **fields: str) -> None:
    """Log what anybody can bring about: once a minute as a warning, else for DEBUG."""
    first = time.monotonic() - _warned_at.get(event, -math.inf) > 60
    if first:
        _warned_at[event] = time.monotonic()
    (logger.warning if first else logger.debug)(event, **fields)


# ---- Messages ------------------------------------------------------------------------------------

EVERYBODY = ("all", "others")
EventName = Annotated[str, Field(min_length=1, max_length=128)]
UnreservedEventName = Annotated[EventName, Field(pattern=r"^[^$]")]


class InvalidMessageFormat(ValueError):  # noqa: N818  # a promised name
    """Raised for text or bytes that are not a message; says which field is wrong and what was expected."""


class InvalidPayload(ValueError):  # noqa: N818  # as the promised one
    """Raised for a payload that is not of a handler's type; says which fields are wrong and what was expected."""


PayloadT = TypeVar("PayloadT", default=Any)


class WebSocketMessage(BaseModel, Generic[PayloadT]):
    """One message, as it goes over the wire in JSON.

    Attributes:
        event_name: 1 to 128 characters; names that begin with ``$`` are the server's own.
        payload: anything that JSON can hold, or what the type in `WebSocketMessage[type]` can. Numbers that JSON has
            no name for (NaN, infinity) go out as null.
        to: ``all``, ``others`` (everybody but the client whose message is being handled), or one client's id.
        from_id: the sender's id, or ``server``.
        message: a sentence for people, or None.

    """

    event_name: EventName
    payload: PayloadT = None  # type: ignore[assignment]  # Any by default
    to: str = "others"
    from_id: str = "server"
    message: str | None = None


class ClientMessage(WebSocketMessage):
    """What a client may send."""

    event_name: UnreservedEventName


def create_message(
    event_name: str, payload: Any, to: str, message: str | None = None
) -> WebSocketMessage:
    """Make a message from the server."""
    return WebSocketMessage(event_name=event_name, payload=payload, to=to, message=message)


def create_error_message(error_msg: str, to: str, code: str = "error") -> WebSocketMessage:
    """Make an `error` message: a sentence for people in `message`, a `code` for programs in `payload`."""
    return create_message("error", {"code": code}, to, error_msg)


def describe(error: ValidationError) -> str:
    """Say which fields are wrong and what was expected, without the input."""
    if error.error_count() > 20:  # a list of a megabyte can hold as many as it has items
        return f"{error.error_count()} fields are wrong"
    return "; ".join(
        f"{'.'.join(map(str, detail['loc'])) or 'message'}: {detail['msg']}"
        for detail in error.errors(include_input=False, include_url=False)
    )


def encode(message: WebSocketMessage) -> bytes:
    """Make the JSON that goes over the wire, with all five keys.

    Raises:
        PydanticSerializationError: the payload holds something that JSON cannot.

    """
    return WebSocketMessage.__pydantic_serializer__.to_json(message)


# ---- Handlers ------------------------------------------------------------------------------------

Answer = WebSocketMessage | None
Handler = Callable[[WebSocketMessage], Answer | Awaitable[Answer]]
HandlerT = TypeVar("HandlerT", bound=Handler)


class HandlerType(Enum):
    """Where a handler runs. The server runs those of SERVER and BOTH; CLIENT is for clients written in Python."""

    SERVER = "server"
    CLIENT = "client"
    BOTH = "both"


_registry: dict[HandlerType, dict[str, tuple[Handler, type[WebSocketMessage] | None]]] = {
    handler_type: {} for handler_type in HandlerType
}


def websocket_handler(
    event_name: str, handler_type: HandlerType = HandlerType.SERVER
) -> Callable[[HandlerT], HandlerT]:
    """Register the decorated function for an event; the last registration of a name wins.

    The function takes a `WebSocketMessage` and returns one, which goes to its `to`, or None. A coroutine function
    runs in the event loop, which it must not block, a plain one in the thread pool (AnyIO's, of 40 threads). One
    client's messages are handled one after the other, so a handler that awaits long holds up its own client alone. The
    names `$connect` and `$disconnect` are for clients that came and went.

    Where its parameter is annotated `WebSocketMessage[type]`, it runs for payloads of that type alone, such as a
    pydantic model; for others, the sender gets an `invalid_payload` error that names the fields.

    Raises:
        NameError: the annotation is text and names a type that is not there, or not yet.

    """

    def register(handler: HandlerT) -> HandlerT:
        registered = handler, _find_type(handler)
        for kind in HandlerType if handler_type is HandlerType.BOTH else (handler_type,):
            _registry[kind][event_name] = registered
        return handler

    return register


def _find_type(handler: Handler) -> type[WebSocketMessage] | None:
    """Return the kind of `WebSocketMessage` that a handler's parameter is annotated with; None for any."""
    try:
        parameter = next(iter(inspect.signature(handler, eval_str=True).parameters.values()))
    except (
        Exception
    ):  # it has none, or is written in C, or its annotations are text that names what is not there
        with suppress(ValueError):
            if "WebSocketMessage[" in str(inspect.signature(handler)):
                raise
        return None
    named = (
        parameter.annotation,
        *get_args(parameter.annotation),
    )  # it may stand in Annotated, or with None
    kinds = {
        kind for kind in named if isinstance(kind, type) and issubclass(kind, WebSocketMessage)
    }
    return kinds.pop() if len(kinds) == 1 and WebSocketMessage not in kinds else None


def get_handlers(handler_type: HandlerType) -> dict[str, Handler]:
    """Return the handlers of one type, by event name. Those of BOTH are among the other two types' too."""
    return {event_name: handler for event_name, (handler, _) in _registry[handler_type].items()}


async def handle_msg(message: WebSocketMessage) -> Answer:
    """Run the message's handler and return its answer. A message without a handler is its own answer.

    Raises:
        InvalidPayload: the payload is not of the type that the handler's annotation names.
        TypeError: the handler returned something that is neither a `WebSocketMessage` nor None.
        Exception: whatever the handler raised.

    """
    handler, kind = _registry[HandlerType.SERVER].get(message.event_name, (None, None))
    if handler is None:
        return message
    if kind is not None:
        try:
            message = kind.model_validate_json(encode(message))
        except ValidationError as error:
            raise InvalidPayload(describe(error)) from None
    with handler_seconds.labels(message.event_name).time():
        if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
            type(handler).__call__
        ):
            result = handler(message)
        else:
            result = await run_in_threadpool(handler, message)
        answer = await result if inspect.isawaitable(result) else result
    if answer is not None and not isinstance(answer, WebSocketMessage):
        raise TypeError(
            f"a handler returns a WebSocketMessage or None, not {type(answer).__name__}"
        )
    return answer


@websocket_handler("whoami")
async def whoami_handler(message: WebSocketMessage) -> WebSocketMessage:
    """Tell the sender its own id."""
    return create_message("whoami", message.from_id, message.from_id)


@websocket_handler("sum_event")
async def sum_handler(message: WebSocketMessage) -> WebSocketMessage:
    """Answer `{"numbers": [...]}` with `sum_handler_result`: their sum, a float, correctly rounded (`math.fsum`)."""
    try:
        return create_message("sum_handler_result", _sum(message.payload), message.from_id)
    except ValueError as error:
        errors_total.labels("invalid_payload").inc()
        return create_error_message(str(error), message.from_id, "invalid_payload")


def _sum(payload: Any) -> float:
    if not isinstance(payload, dict):
        raise ValueError(f"payload: expected an object, got {type(payload).__name__}")
    numbers = payload.get("numbers")
    if not isinstance(numbers, list):
        raise ValueError(f"payload.numbers: expected a list, got {type(numbers).__name__}")
    floats = []
    for index, number in enumerate(numbers):
        try:
            floats.append(float(number))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"payload.numbers[{index}]: expected a number that a float can hold"
            ) from None
    with suppress(ValueError, OverflowError):
        if math.isfinite(total := math.fsum(floats)):
            return total
    raise ValueError("payload.numbers: expected a finite sum")


# ---- Metrics -------------------------------------------------------------------------------------

MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)
REASONS = "client admin slow_client keepalive message_too_big server_stop".split()
ERROR_TYPES = (
    "invalid_message invalid_payload unknown_recipient handler_error rate_limited message_too_big slow_client "
    "origin_refused unauthorized too_many_clients redis"
).split()
NO_LABELS: Mapping[str, Iterable[str]] = {}


def _metric(
    kind: type[MetricT],
    name: str,
    documentation: str,
    labels: Mapping[str, Iterable[str]] = NO_LABELS,
    **options: Any,
) -> MetricT:
    """Register a metric whose known label values start at 0, or share the one that another copy of this file made."""
    try:
        metric = kind(name, documentation, tuple(labels), **options)
    except ValueError:
        metric = REGISTRY._names_to_collectors[name]  # type: ignore[assignment]  # there is no public way to get it
    for values in labels.values():
        for value in values:
            metric.labels(value)
    return metric


clients_gauge = _metric(
    Gauge, "datadivr_clients", "Clients connected now.", multiprocess_mode="livesum"
)
connections_total = _metric(Counter, "datadivr_connections_total", "Clients that connected.")
disconnections_total = _metric(
    Counter, "datadivr_disconnections_total", "Clients that went, by reason.", {"reason": REASONS}
)
messages_received_total = _metric(
    Counter, "datadivr_messages_received_total", "Messages received from clients."
)
messages_sent_total = _metric(
    Counter, "datadivr_messages_sent_total", "Messages delivered, one a client."
)
bytes_sent_total = _metric(
    Counter, "datadivr_bytes_sent_total", "Bytes sent to clients in messages and their headers."
)
uncompressed_bytes_total = _metric(
    Counter,
    "datadivr_uncompressed_bytes_total",
    "Bytes of the messages sent to clients, before compression.",
)
errors_total = _metric(Counter, "datadivr_errors_total", "Errors, by type.", {"type": ERROR_TYPES})
handler_seconds = _metric(
    Histogram,
    "datadivr_handler_seconds",
    "Seconds that a handler took.",
    {"event_name": _registry[HandlerType.SERVER]},
)


def collect_metrics() -> CollectorRegistry:
    """Return the metrics of this process, or with `PROMETHEUS_MULTIPROC_DIR` the sum over all live workers.

    Raises:
        ValueError: `PROMETHEUS_MULTIPROC_DIR` is not a directory.

    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return REGISTRY
    for path in Path(folder).glob("gauge_live*_[0-9]*.db"):
        pid = int(path.stem.rpartition("_")[2])
        with suppress(
            PermissionError, FileNotFoundError
        ):  # it runs, as another user; another worker was first
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


# ---- Clients -------------------------------------------------------------------------------------

# The first byte of a frame: FIN and the opcode (RFC 6455, 5.2); RSV1 where it is compressed (RFC 7692, 6).
TEXT, COMPRESSED_TEXT, CLOSE = 0x81, 0xC1, 0x88
WINDOW_BITS = 12  # what uvicorn agrees to at most
CLOSE_SECONDS = 2.0  # what a client has to read what is unsent and to answer a close frame
Framing = Callable[[bytes], bytes]
UVICORN_PROTOCOL = "uvicorn.protocols.websockets.websockets_sansio_impl.WebSocketsSansIOProtocol"


def frame(payload: bytes, first: int = TEXT) -> bytes:
    """Frame a payload as a server does, without a mask, so that every client gets the same bytes (RFC 6455, 5.2)."""
    length = len(payload)
    if length < 126:
        return bytes((first, length)) + payload
    if length < 65536:
        return struct.pack("!BBH", first, 126, length) + payload
    return struct.pack("!BBQ", first, 127, length) + payload


def frame_compressed(payload: bytes) -> bytes:
    """Frame a payload, deflated by itself, so that it is the same bytes for every client (RFC 7692, 7.2.1)."""
    if len(payload) >= settings.compress_min_bytes:
        deflater = zlib.compressobj(1, wbits=-WINDOW_BITS)
        deflated = deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)[:-4]
        if len(deflated) < len(payload):
            return frame(deflated, COMPRESSED_TEXT)
    return frame(payload)


def choose_framing(protocol: Any) -> Framing:
    """Return what frames a client's messages; uvicorn's own compressor of it then keeps no context either."""
    for extension in protocol.conn.extensions if protocol and settings.compress_min_bytes else ():
        if (
            extension.name == "permessage-deflate"
            and extension.local_max_window_bits >= WINDOW_BITS
        ):
            extension.local_no_context_takeover = True
            vars(extension).pop("encoder", None)
            return frame_compressed
    return frame


def unframe(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut bytes that `frame` made back into first bytes and payloads."""
    start = 0
    while start < len(data):
        first, length = data[start : start + 2]
        start += 2
        if length > 125:
            size = 2 if length == 126 else 8
            length = int.from_bytes(data[start : start + size])
            start += size
        yield first, data[start : start + length]
        start += length


class AsgiTransport(asyncio.WriteTransport):
    """A transport over ASGI's `send`, for servers and test clients that share none of their own.

    It costs a task a client and a coroutine a message. A close frame ends `receive`, and the endpoint then closes the
    WebSocket in `finish`: under granian a close from another task is lost while the endpoint receives.
    """

    def __init__(
        self, websocket: WebSocket, receive: Receive, socket: asyncio.WriteTransport | None
    ) -> None:
        self._websocket = websocket
        self._receive = receive
        self._socket = socket
        self._receiving = False
        self._unsent = 0
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._close_frame: tuple[int, str] | None = None
        self._writer = asyncio.create_task(self._write())

    def write(self, data: Any) -> None:
        self._unsent += len(data)
        self._queue.put_nowait(data)

    def get_write_buffer_size(self) -> int:
        return self._unsent

    def is_closing(self) -> bool:
        return self._writer.done()

    def abort(self) -> None:
        self._writer.cancel()
        if self._socket:
            self._socket.abort()

    async def _write(self) -> None:
        try:
            while True:
                data = await self._queue.get()
                for first, payload in unframe(data):
                    if first == CLOSE:
                        self._close_frame = int.from_bytes(payload[:2]), payload[2:].decode()
                        return None if self._receiving else await self._close()
                    await self._websocket.send_text(payload.decode())
                self._unsent -= len(data)
        except Exception as error:  # servers differ in what a send to a client that went raises
            logger.debug("asgi_send_failed", error=repr(error))

    async def _close(self) -> None:
        close_frame, self._close_frame = self._close_frame, None
        if close_frame:
            with suppress(Exception):  # the client went meanwhile, or does not read
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._websocket.close(*close_frame)

    async def receive(self) -> Message:
        """Return the next ASGI message, or a disconnect once this side has closed."""
        reader = asyncio.ensure_future(self._receive())
        self._receiving = True
        try:
            await asyncio.wait((reader, self._writer), return_when=asyncio.FIRST_COMPLETED)
            return reader.result() if reader.done() else {"type": "websocket.disconnect"}
        finally:
            self._receiving = False
            reader.cancel()

    async def finish(self) -> None:
        """Stop writing, and send the close frame that was written, if one was."""
        self._writer.cancel()
        await self._close()


@functools.cache
def _warn_of_adapter(server: str) -> None:
    logger.warning(
        "fanout_through_asgi", server=server, hint=f"full speed needs {UVICORN_PROTOCOL}"
    )


def open_transport(websocket: WebSocket) -> tuple[asyncio.WriteTransport, Receive, Any]:
    """Return what carries frames to a client, what receives from it, and uvicorn's protocol object or None.

    Under uvicorn `receive` is a bound method of the protocol object, which has the connection's transport.
    """
    receive = websocket._receive
    protocol = getattr(receive, "__self__", None)
    server = f"{type(protocol).__module__}.{type(protocol).__qualname__}"
    if server == UVICORN_PROTOCOL:
        return protocol.transport, receive, protocol  # type: ignore[union-attr]
    _warn_of_adapter(server)
    adapter = AsgiTransport(websocket, receive, getattr(protocol, "transport", None))
    return adapter, adapter.receive, None


node_ids: dict[int, str] = globals().get(
    "node_ids", {}
)  # by process: a fork is another node, a reload is not


def node_id() -> str:
    """Return 32 bits, in hexadecimal, that name this process among those that share a Redis."""
    pid = os.getpid()
    if pid not in node_ids:
        node_ids[pid] = secrets.token_hex(4)
    return node_ids[pid]


def make_client_id() -> str:
    """Make a UUID whose first 32 bits name the node that holds the client (version 8: RFC 9562, 5.8)."""
    random = str(uuid.uuid4())
    return f"{node_id()}{random[8:14]}8{random[15:]}"


class Client:
    """One connected client. Users may read `id`, `address`, `connected_us` and the counts."""

    def __init__(
        self, address: str, transport: asyncio.WriteTransport, log: "Log", protocol: Any = None
    ) -> None:
        self.id = make_client_id()
        self.address = address
        self.connected_us = time.time_ns() // 1000
        self.transport = transport
        self.protocol = protocol  # uvicorn's, which knows who closed the connection
        self.framing = choose_framing(protocol)
        self.log = log
        self.messages_received = 0
        self.sent_apart = 0  # what it was sent, less what its log holds
        self.warned: frozenset[str] = (
            frozenset()
        )  # the kinds of errors that were logged as warnings
        self.tokens = float(settings.max_messages_per_second)
        self.refilled_at = self.limited_at = -math.inf

    @property
    def messages_sent(self) -> int:
        return self.log.total + self.sent_apart

    @property
    def buffered_bytes(self) -> int:
        """Bytes written to it that its socket has not yet taken."""
        with suppress(RuntimeError):  # uvloop's answer for a socket that is closed
            return self.transport.get_write_buffer_size()
        return 0

    def take_token(self) -> bool:
        """Count a message against `max_messages_per_second`, a token bucket that holds one second's, or refuse it."""
        rate, now = settings.max_messages_per_second, self.log.loop.time()
        self.tokens = min(float(rate), self.tokens + (now - self.refilled_at) * rate)
        self.refilled_at = now
        if self.tokens >= 1:
            self.tokens -= 1
            return True
        if now - self.limited_at >= 1:
            self.limited_at = now
            self.report(
                "rate_limited", f"More than {rate} messages a second: dropped.", "rate_limited"
            )
        else:
            errors_total.labels("rate_limited").inc()
        return False

    def report(self, code: str, text: str, event: str, **fields: Any) -> None:
        """Count an error of this client's, log it (the first of its kind as a warning), and tell the client."""
        errors_total.labels(code).inc()
        log = logger.debug if code in self.warned else logger.warning
        self.warned |= {code}
        log(event, client_id=self.id, error=text, **fields)
        self.log.insert(self, encode(create_error_message(text, self.id, code)))

    def report_unknown(self) -> None:
        self.report(
            "unknown_recipient", "No client with the id in `to` is connected.", "unknown_recipient"
        )

    def disconnect(self, code: int, text: str, reason: str) -> None:
        """Send what was published so far and a close frame, and forget the client; nobody waits for it to read them."""
        if self.id in clients:
            self.log.flush()
            self.leave(reason, frame(struct.pack("!H", code) + text.encode(), CLOSE))

    def end(self) -> str:
        """Return the reason for which its connection ended, where it was not this file that closed it."""
        closed = self.protocol and self.protocol.conn.close_sent
        if not closed or self.protocol.conn.close_rcvd_then_sent:
            return "client"
        return {1009: "message_too_big", 1011: "keepalive", 1012: "server_stop"}.get(
            closed.code, "client"
        )

    def leave(self, reason: str, close_frame: bytes = b"") -> None:
        """Forget the client, however it went: the one way out. A socket that is not closed 2 s later is cut."""
        if clients.pop(self.id, None) is None:
            return
        self.log.remove(self)
        clients_gauge.dec()
        disconnections_total.labels(reason).inc()
        if reason in ERROR_TYPES:
            errors_total.labels(reason).inc()
        if not self.log.loop.is_closed():
            if close_frame and not self.transport.is_closing():
                self.transport.write(close_frame)
            self.log.loop.call_later(CLOSE_SECONDS, self.transport.abort)
        logger.info("client_disconnected", client_id=self.id, reason=reason)


clients: dict[str, Client] = globals().get("clients", {})  # a reload keeps those who are connected


# ---- Fan-out -------------------------------------------------------------------------------------

Edit = tuple[
    int, int, bytes | None
]  # start and end in the turn's log, and the message in their place
GATHER_CLIENTS = 16  # with fewer, one more turn of the loop costs more than one more write a client
GATHER_TURNS = 8
GATHER_BYTES = 16384  # with more, clients have nothing to do while they wait for it
SWEEP_SECONDS = 1.0


class InLoop:
    """What lives in one event loop and may be called from the thread of another."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.get_ident()

    def call(self, function: Callable[..., None], *args: Any) -> bool:
        """Run a function in this loop: at once, or soon where that is another thread's. False if it is closed."""
        if self.thread == threading.get_ident() and not self.loop.is_closed():
            function(*args)
            return True
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # it is closed: nobody is there
            self.abandon()
            return False
        return True

    def abandon(self) -> None:
        """Clean up after a loop that was found closed."""


class Log(InLoop):
    """The messages of one turn of an event loop, and the clients that get them when the turn ends.

    A client whose bytes differ carries edits to the turn's messages: the sender of an "others" message cuts it out, a
    message to one client is put in at the place where the log then ended, and a client that came in mid-turn cuts
    what came before it. So all clients see one order, and a turn costs one write a client, not one a message.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.clients: dict[str, Client] = {}
        self.messages: list[bytes] = []
        self.edits: dict[Client, list[Edit]] = {}
        self.received = 0  # messages received in this turn
        self.published = 0  # messages published in this turn, those to one client among them
        self.published_bytes = 0
        self.unscanned_bytes = 0  # published since backpressure was last looked at
        self.scheduled = False
        self.total = 0  # messages to everybody, ever
        loop.call_later(SWEEP_SECONDS, self._sweep)

    def abandon(self) -> None:
        for client in tuple(self.clients.values()):
            client.leave("client")

    def add(self, client: Client) -> None:
        self.clients[client.id] = client
        client.sent_apart = -self.total
        if self.messages:
            self.edits[client] = [(0, len(self.messages), None)]

    def remove(self, client: Client) -> None:
        self.clients.pop(client.id, None)
        self.edits.pop(client, None)
        if not self.clients:
            logs.pop(self.loop, None)

    def append(self, message: bytes, sender: Client | None = None) -> None:
        """Publish to every client but the sender."""
        place = len(self.messages)
        self.messages.append(message)
        self.total += 1
        if sender is not None and sender.id in self.clients:
            self.edits.setdefault(sender, []).append((place, place + 1, None))
            sender.sent_apart -= 1
        self._published(len(message))

    def insert(self, client: Client, message: bytes) -> None:
        """Publish to one client."""
        if client.id in self.clients:
            place = len(self.messages)
            self.edits.setdefault(client, []).append((place, place, message))
            client.sent_apart += 1
            self._published(len(message))

    def _published(self, size: int) -> None:
        self.published += 1
        self.published_bytes += size
        self.schedule()

    def schedule(self) -> None:
        """Flush soon: in the next turn, or later while that finds more messages."""
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self._tick, self.published, GATHER_TURNS)

    def _tick(self, seen: int, turns: int) -> None:
        growing = turns and self.published > seen and self.published_bytes < GATHER_BYTES
        if growing and len(self.clients) >= GATHER_CLIENTS:
            self.loop.call_soon(self._tick, self.published, turns - 1)
        else:
            self.flush()

    def flush(self) -> None:
        """Write what was published to every client that keeps up."""
        self.scheduled = False
        self.unscanned_bytes += self.published_bytes
        if self.unscanned_bytes > settings.max_buffer_bytes // 16:
            self.unscanned_bytes = 0
            self._drop_slow_clients()
        messages_received_total.inc(self.received)
        self.received = self.published = self.published_bytes = 0
        messages, self.messages = self.messages, []
        edits, self.edits = self.edits, {}
        if not messages and not edits:
            return
        compressible = max(map(len, messages), default=0) >= settings.compress_min_bytes
        ends = list(itertools.accumulate(map(len, messages), initial=0))
        forms: dict[Framing, tuple[bytes, list[int]]] = {}
        reached = sent_bytes = apart = apart_bytes = 0
        for client in self.clients.values() if messages else edits:
            if client.transport.is_closing():  # uvloop raises on a write to it
                continue
            framing = client.framing if compressible else frame
            form = forms.get(framing)
            if form is None:
                frames = [framing(message) for message in messages]
                form = forms[framing] = (
                    b"".join(frames),
                    list(itertools.accumulate(map(len, frames), initial=0)),
                )
            own = form[0]
            if client in edits:
                own = apply_edits(*form, edits[client], client.framing)
                for start, end, message in edits[client]:
                    apart += (message is not None) - (end - start)
                    apart_bytes += len(message or b"") - (ends[end] - ends[start])
            client.transport.write(own)
            reached += 1
            sent_bytes += len(own)
        messages_sent_total.inc(reached * len(messages) + apart)
        uncompressed_bytes_total.inc(reached * ends[-1] + apart_bytes)
        bytes_sent_total.inc(sent_bytes)

    def _drop_slow_clients(self) -> None:
        for client in tuple(self.clients.values()):
            if client.buffered_bytes > settings.max_buffer_bytes:
                logger.warning(
                    "slow_client_dropped", client_id=client.id, buffered_bytes=client.buffered_bytes
                )
                client.leave(
                    "slow_client", frame(struct.pack("!H", 1013) + b"Too slow: reconnect", CLOSE)
                )

    def _sweep(self) -> None:
        """Forget clients whose connection has ended while they had bytes unsent: nobody else would tell of it."""
        for client in tuple(self.clients.values()):
            if client.transport.is_closing():
                client.leave(client.end())
        if self.clients:
            self.loop.call_later(SWEEP_SECONDS, self._sweep)


def apply_edits(data: bytes, places: list[int], edits: list[Edit], framing: Framing) -> bytes:
    """Return one client's own bytes of a turn; `places` has where each message begins in `data`, and its end."""
    turn = memoryview(data)
    own: list[bytes | memoryview] = []
    last = 0
    for start, end, message in edits:
        own.append(turn[places[last] : places[start]])
        if message is not None:
            own.append(framing(message))
        last = end
    own.append(turn[places[last] :])
    return b"".join(own)


logs: dict[asyncio.AbstractEventLoop, Log] = globals().get("logs", {})


def deliver(to: str, data: bytes, sender: Client | None = None) -> int:
    """Send a message's JSON to those clients of this process that `to` names, and return how many these are."""
    if to not in EVERYBODY:
        client = clients.get(to)
        return int(client is not None and client.log.call(client.log.insert, client, data))
    left_out = sender if to == "others" else None
    count = 0
    for log in tuple(logs.values()):
        if log.call(log.append, data, left_out):
            count += len(log.clients) - (left_out is not None and left_out.id in log.clients)
    return count


def publish(
    message: WebSocketMessage, sender: Client | None = None, asker: Client | None = None
) -> int:
    """Send a message to its `to`, wherever that is connected, and return how many clients of this process it addresses.

    "others" leaves the sender out; the asker is told where nobody has the id.
    """
    data = encode(message)
    count = deliver(message.to, data, sender)
    if message.to in EVERYBODY:
        if link := join():
            link.send(link.everybody, TO_ALL, data)
    elif not count:
        node = find_node(message.to)
        if node and (link := join()):
            link.send_to_one(node, message.to, data, asker)
        elif asker:
            asker.report_unknown()
    return count


async def broadcast(message: WebSocketMessage, sender: WebSocket | None = None) -> int:
    """Send a message from anywhere in the application to its `to`.

    It returns once the message is on its way to all of them, without waiting for any; a client that does not keep up
    is dropped (`DATADIVR_MAX_BUFFER_BYTES`).

    Args:
        message: what to send; its `from_id` is "server" unless set.
        sender: the WebSocket that "others" leaves out; without it, "others" are all.

    Returns:
        How many clients of this process it addressed; 0 for an id that is not connected to it.

    Raises:
        PydanticSerializationError: the payload holds something that JSON cannot.

    """
    return publish(
        message, clients.get(sender.scope.get("datadivr.client_id", "")) if sender else None
    )


# ---- Cluster -------------------------------------------------------------------------------------

# What one PUBLISH carries: a header (version, node, and how many messages that node had published on the channel), then
# items: a kind, a length in bytes, and so many bytes.
HEADER, ITEM = struct.Struct("!4s8sQ"), struct.Struct("!BI")
VERSION = b"ddv1"
TO_ALL, TO_ONE, PUSH, UNKNOWN, ASK, ANSWER, PROBE = range(7)  # the first three are messages
ANSWER_SECONDS = 1.0
PROBE_SECONDS = 0.25
LOST_PROBES = 12  # without a word from Redis, after which it is lost
BEHIND_SECONDS = 1.0  # a node whose own probe takes longer has a backlog to read
STALLED_SECONDS = 0.25  # in which a client that reads has read something
RETRY_SECONDS = 0.1
REJOIN_SECONDS = (
    0.3  # after which the other nodes that lost Redis are back too, and hear what is published
)
Told = Callable[
    [int | None], None
]  # is told how many nodes heard an item, or None where it could not go


def open_pool(url: str) -> Any:
    """Return the redis-py pool that makes connections.

    Raises:
        RuntimeError: redis-py is not installed.
        ValueError: redis-py cannot read the URL, or an option in it; the URL is not shown, for its password.

    """
    try:
        from redis.asyncio import ConnectionPool
    except ImportError:
        raise RuntimeError(
            "DATADIVR_REDIS_URL is set, but redis is not installed: pip install redis"
        ) from None
    own: dict[str, Any] = {"protocol": 2, "decode_responses": False, "encoding": "utf-8"}
    own |= {"socket_timeout": None, "socket_connect_timeout": None}
    try:
        made = ConnectionPool.from_url(url, **own)
        made.make_connection()  # type: ignore[no-untyped-call]
    except Exception:  # redis-py raises much for an option that it does not know, or not so
        raise ValueError(
            "DATADIVR_REDIS_URL: expected a URL and options that redis-py can read"
        ) from None
    if changed := [name for name, value in own.items() if made.connection_kwargs[name] != value]:
        raise ValueError(f"DATADIVR_REDIS_URL: expected no option {', '.join(changed)}")
    return made


pool: Any = open_pool(settings.redis_url) if settings.redis_url else None


def find_node(client_id: str) -> str | None:
    """Return the other node that a client's id names, or None."""
    named = re.fullmatch(
        r"([0-9a-f]{8})-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", client_id
    )
    return named[1] if named and named[1] != node_id() else None


def parse_batch(data: bytes) -> tuple[str, int, list[tuple[int, bytes]]]:
    """Return the node that published a batch, how many messages it had published on the channel, and the items.

    Raises:
        ValueError: the data is not such a batch from its first byte to its last.

    """
    items = []
    try:
        version, node, sequence = HEADER.unpack_from(data)
        end = HEADER.size
        while version == VERSION and end < len(data):
            kind, length = ITEM.unpack_from(data, end)
            start = end + ITEM.size
            end = start + length
            items.append((kind, data[start:end]))
    except struct.error as error:
        raise ValueError(str(error)) from None
    if version != VERSION or end != len(data):
        raise ValueError(
            f"expected a batch of version {VERSION!r}, got {len(data)} bytes that begin {data[:4]!r}"
        )
    return node.decode(), sequence, items


class Batch:
    """Items that go in one PUBLISH."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.items: list[bytes] = []
        self.size = self.messages = 0
        self.told: list[Told] = []

    def add(self, kind: int, body: bytes, told: Told | None) -> None:
        self.items += ITEM.pack(kind, len(body)), body
        self.size += len(body)
        self.messages += kind <= PUSH
        if told:
            self.told.append(told)

    def end(self, nodes: int | None) -> None:
        """Tell how many nodes heard it; None: it is lost, and counted."""
        if nodes is None:
            errors_total.labels("redis").inc(self.messages)
        for told in self.told:
            told(nodes)


class Link(InLoop):
    """A process's two connections to Redis: one publishes, the other hears what the other nodes publish.

    What comes while a pipeline is under way waits for the next. Nothing is published twice, and nothing is kept until
    a lost Redis returns: the other nodes would not be there to hear it.
    """

    def __init__(self) -> None:
        super().__init__(asyncio.get_running_loop())
        self.everybody = self.channel("all")
        self.sign = VERSION, node_id().encode()
        self.tried = asyncio.Event()  # whether Redis is there is known
        self.up = False
        self.waiting: list[Batch] = []
        self.waiting_bytes = 0
        self.under_way: deque[Batch] = deque()
        self.woken = asyncio.Event()
        self.published: defaultdict[str, int] = defaultdict(
            int
        )  # messages that Redis has taken, by channel
        self.heard: dict[tuple[str, str], int] = {}  # the same of each other node
        self.probe_heard = 0.0  # when the last probe that came back was sent
        self.patience = (
            0.0  # how late a probe may be until a backlog must be read, whoever falls behind
        )
        self.unheard = self.unanswered = 0  # probes since either connection brought something
        self.answers: dict[int, asyncio.Queue[Any]] = {}
        self.numbers = itertools.count()
        self.redis_up = _metric(
            Gauge, "datadivr_redis_up", "Whether Redis answers.", multiprocess_mode="livemin"
        )
        self.redis_up.set(0)
        self.task = self.loop.create_task(self._run())

    def channel(self, node: str) -> str:
        return f"{settings.redis_prefix}:{node}"

    def send(self, channel: str, kind: int, body: bytes, told: Told | None = None) -> None:
        """Publish an item with the others of this turn; from any thread."""
        self.call(self._append, channel, kind, body, told)

    def _append(self, channel: str, kind: int, body: bytes, told: Told | None) -> None:
        lost = self.tried.is_set() and not self.up
        if lost or (
            self.waiting_bytes and self.waiting_bytes + len(body) > settings.max_buffer_bytes
        ):
            dropped = Batch(channel)
            dropped.add(kind, body, told)
            return dropped.end(None)
        if not self.waiting or self.waiting[-1].channel != channel:
            self.waiting.append(Batch(channel))
        self.waiting[-1].add(kind, body, told)
        self.waiting_bytes += len(body)
        self.woken.set()
        return None

    def send_to_one(self, node: str, client_id: str, data: bytes, asker: Client | None) -> None:
        """Send a message to another node's client; the asker is told if it is not there."""

        def told(nodes: int | None) -> None:
            if nodes == 0 and asker:
                asker.log.call(asker.report_unknown)

        self.send(
            self.channel(node),
            TO_ONE,
            f"{client_id}{asker.id if asker else '':36}".encode() + data,
            told,
        )

    async def confirm(self, channel: str, kind: int, body: bytes) -> int | None:
        """Publish an item and return how many nodes heard it; None if it could not go."""
        nodes: asyncio.Future[int | None] = self.loop.create_future()

        def told(count: int | None) -> None:
            if not nodes.done():
                nodes.set_result(count)

        self.send(channel, kind, body, told)
        return await nodes

    async def ask(self, channel: str, request: Sequence[Any]) -> tuple[list[Any], bool]:
        """Have the other nodes on a channel perform a request; return what they answer within 1 s, and if one did not.

        It runs in this link's loop.
        """
        number = next(self.numbers)
        answers: list[Any] = []
        queue = self.answers[number] = asyncio.Queue()
        body = json.dumps([number, *request]).encode()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                nodes = await self.confirm(channel, PUSH if request[0] == "push" else ASK, body)
                while nodes is not None and len(answers) < nodes - (channel == self.everybody):
                    answers.append(await queue.get())
            return answers, nodes is None
        except TimeoutError:
            return answers, True
        finally:
            del self.answers[number]

    async def stop(self) -> None:
        """Publish what waits, in 1 s at most, and leave."""
        with suppress(TimeoutError):
            if not self.task.done():
                await asyncio.wait_for(self.confirm(self.channel(node_id()), PROBE, self._now()), 1)
        while (
            not self.task.done()
        ):  # before Python 3.13 a TaskGroup swallows a cancel that meets an error
            self.task.cancel()
            await asyncio.wait([self.task], timeout=RETRY_SECONDS)
        self.redis_up.set(0)

    async def _run(self) -> None:
        while True:
            publisher, subscriber = pool.make_connection(), pool.make_connection()
            try:
                async with asyncio.timeout(LOST_PROBES * PROBE_SECONDS):
                    await publisher.connect()
                    await subscriber.connect()
                    await subscriber.send_command(
                        "SUBSCRIBE", self.everybody, self.channel(node_id())
                    )
                    for _ in range(2):
                        await subscriber.read_response()
                    await publisher.send_command(
                        "PUBLISH", self.channel(node_id()), HEADER.pack(*self.sign, 0)
                    )
                    await publisher.read_response()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._hear(subscriber))
                    tasks.create_task(self._publish(publisher))
                    tasks.create_task(self._probe())
            except* Exception as errors:
                self._lose(errors.exceptions[0])
            finally:
                await publisher.disconnect(nowait=True)
                await subscriber.disconnect(nowait=True)
            await asyncio.sleep(RETRY_SECONDS)

    def _lose(self, error: Exception) -> None:
        if self.up or not self.tried.is_set():
            logger.warning("redis_lost", error=f"{type(error).__name__}: {error}")
            errors_total.labels("redis").inc()
        self.tried.set()
        self.up = False
        self.redis_up.set(0)
        for batch in (*self.under_way, *self.waiting):
            batch.end(None)
        self.under_way.clear()
        self.waiting, self.waiting_bytes = [], 0

    def _now(self) -> bytes:
        return struct.pack("!d", self.loop.time())

    async def _probe(self) -> None:
        """Say that Redis is there, and notice when it is there no longer, though its connections may be."""
        if self.tried.is_set():
            await asyncio.sleep(REJOIN_SECONDS)
        self.probe_heard, self.unheard, self.unanswered = self.loop.time(), 0, 0
        self.up = True
        self.tried.set()
        self.redis_up.set(1)
        logger.info("redis_joined", node=node_id())
        while max(self.unheard, self.unanswered) < LOST_PROBES:
            self.send(self.channel(node_id()), PROBE, self._now())
            await asyncio.sleep(
                PROBE_SECONDS
            )  # a count, not a clock: a process that was paused has not lost Redis
            self.unheard += 1
            self.unanswered += 1
        raise TimeoutError(f"nothing heard for {LOST_PROBES * PROBE_SECONDS} s")

    async def _publish(self, publisher: Any) -> None:
        while True:
            await self.woken.wait()
            self.woken.clear()
            self.under_way.extend(self.waiting)
            self.waiting = []
            commands, sequences = [], self.published.copy()
            for batch in self.under_way:
                header = HEADER.pack(*self.sign, sequences[batch.channel])
                commands.append(("PUBLISH", batch.channel, b"".join((header, *batch.items))))
                sequences[batch.channel] += batch.messages
            await publisher.send_packed_command(
                publisher.pack_commands(commands), check_health=False
            )
            while self.under_way:
                nodes = await publisher.read_response()
                self.unanswered = 0
                batch = self.under_way.popleft()
                self.waiting_bytes -= batch.size
                if (
                    nodes
                ):  # or a client could fill memory with the channels of nodes that it made up
                    self.published[batch.channel] += batch.messages
                batch.end(nodes)

    async def _hear(self, subscriber: Any) -> None:
        everybody, own = self.everybody.encode(), b"".join(self.sign)
        allowance, unpaced = YIELD_BYTES, 0
        while True:
            _, channel, data = await subscriber.read_response()
            self.unheard = 0
            if channel != everybody or not data.startswith(own):  # what it published comes back
                self._take(channel.decode(), data)
            unpaced += len(data)
            if unpaced > settings.max_buffer_bytes // 16:
                unpaced = 0
                await self._catch_up()
            allowance -= max(len(data), YIELD_BYTES // YIELD_MESSAGES)
            if allowance <= 0:
                allowance = YIELD_BYTES
                await asyncio.sleep(0)

    async def _catch_up(self) -> None:
        """Wait for clients that read, since a backlog comes faster than they take it; as long as the pause, at most."""
        if self.loop.time() - self.probe_heard < BEHIND_SECONDS:
            return
        self.patience = self.patience or 2 * (self.loop.time() - self.probe_heard)
        least, waited = math.inf, 0.0
        while self.loop.time() - self.probe_heard < self.patience and waited < STALLED_SECONDS:
            sizes = [client.buffered_bytes for client in tuple(clients.values())]
            unsent = sum(size for size in sizes if size > settings.max_buffer_bytes // 4)
            if not unsent:
                return
            waited = 0 if unsent < least else waited + 0.01
            least = min(least, unsent)
            self.unheard = 0
            await asyncio.sleep(0.01)

    def _take(self, channel: str, data: bytes) -> None:
        try:
            node, sequence, items = parse_batch(data)
            missed = sequence - self.heard.get((node, channel), sequence)
            self.heard[node, channel] = sequence + sum(kind <= PUSH for kind, _ in items)
            if missed > 0:
                errors_total.labels("redis").inc(missed)
                logger.warning("redis_messages_missed", node=node, messages=missed)
            for kind, body in items:
                self._act(node, kind, body)
        except Exception as error:
            errors_total.labels("redis").inc()
            warn("redis_garbage", channel=channel, error=repr(error))

    def _act(self, node: str, kind: int, body: bytes) -> None:
        if kind == TO_ALL:
            deliver("all", body)
        elif kind == TO_ONE:
            if not deliver(body[:36].decode(), body[72:]):
                self.send(self.channel(node), UNKNOWN, body[36:72])
        elif kind == UNKNOWN:
            if asker := clients.get(body.decode()):
                asker.log.call(asker.report_unknown)
        elif kind in (PUSH, ASK):
            number, *request = json.loads(body)
            self.send(self.channel(node), ANSWER, json.dumps([number, perform(request)]).encode())
        elif kind == ANSWER:
            number, answer = json.loads(body)
            if number in self.answers:  # it may come late
                self.answers[number].put_nowait(answer)
        elif kind == PROBE:
            (self.probe_heard,) = struct.unpack("!d", body)
            if self.loop.time() - self.probe_heard < BEHIND_SECONDS:
                self.patience = 0.0
        else:
            raise ValueError(f"unknown kind {kind}")


_link: Link | None = globals().get("_link")
_joining = threading.Lock()


def join() -> Link | None:
    """Return the link to the other nodes, started here if there is none; None without `DATADIVR_REDIS_URL`."""
    global _link
    if pool:
        with _joining:
            if _link is None or _link.task.done() or _link.loop.is_closed():
                _link = Link()
    return _link


def perform(request: Sequence[Any]) -> Any:
    """Perform a request for the clients of this process, whichever node it came to; None where there is no answer."""
    match request:
        case ["list", limit, after]:
            order = operator.attrgetter("connected_us", "id")
            rest = (client for client in tuple(clients.values()) if order(client) > tuple(after))
            page = sorted(rest, key=order)[: limit + 1]
            return len(clients), [(client.connected_us, describe_client(client)) for client in page]
        case ["get", client_id] if client := clients.get(client_id):
            return describe_client(client)
        case ["disconnect", client_id] if client := clients.get(client_id):
            return client.log.call(
                client.disconnect, 1008, "Disconnected by an administrator", "admin"
            )
        case ["push", to, text]:
            return deliver(to, text.encode())
    return None


async def ask(to: str, *request: Any) -> tuple[list[Any], bool]:
    """Perform a request on all nodes, or on the one that holds a client; return the answers, and if one is missing."""
    answers = [perform(request)]
    node = find_node(to)
    if (node or to in EVERYBODY) and (link := join()):
        asked = asyncio.run_coroutine_threadsafe(
            link.ask(link.channel(node or "all"), request), link.loop
        )
        others, partial = await asyncio.wrap_future(asked)
        return answers + others, partial
    return answers, False


# ---- The WebSocket endpoint ----------------------------------------------------------------------

YIELD_BYTES = 65536  # what one client may send before the others' turn comes
YIELD_MESSAGES = 16


def _bearer_matches(token: str, expected: str) -> bool:
    return hmac.compare_digest(token.encode(), expected.encode())


Refusal = tuple[int, str, str, dict[str, str]]  # status, type of error, text, and what is logged


def _refuse(status: int, error: str, text: str, fields: dict[str, str]) -> NoReturn:
    errors_total.labels(error).inc()
    warn(error, **fields)
    raise HTTPException(status, text, {"WWW-Authenticate": "Bearer"} if status == 401 else None)


def _same_host(origin: str, host: str) -> bool:
    scheme, _, netloc = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return port is not None and netloc.removesuffix(port) == host.lower().removesuffix(port)


def _find_fault(websocket: WebSocket) -> Refusal | None:
    origin = websocket.headers.get("origin")
    if origin is not None and not (
        {"*", origin.lower()} & set(settings.allowed_origins)
        or _same_host(origin, websocket.headers.get("host", ""))
    ):
        hint = "add it to DATADIVR_ALLOWED_ORIGINS to let it in"
        return (
            403,
            "origin_refused",
            f"Origin {origin} is not allowed.",
            {"origin": origin, "hint": hint},
        )
    if settings.client_token is not None:
        scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
        offered = websocket.scope.get("subprotocols", [])
        if scheme.lower() != "bearer" and len(offered) == 2 and offered[0] == "bearer":
            scheme, token = offered
        if scheme.lower() != "bearer" or not _bearer_matches(token.strip(), settings.client_token):
            return (
                401,
                "unauthorized",
                "A client token is needed.",
                {"hint": "it must bring DATADIVR_CLIENT_TOKEN"},
            )
    return None


async def authorize_client(websocket: WebSocket) -> None:
    """Refuse a client from a foreign page, or without the token: the answer comes before the upgrade.

    A FastAPI dependency: put your own in its place with `app.dependency_overrides[authorize_client]`. A foreign page
    is one whose `Origin` (RFC 6454) is neither the request's `Host` nor in `DATADIVR_ALLOWED_ORIGINS`. The token comes
    in `Authorization: Bearer` or, from a browser, as the second of the subprotocols `["bearer", token]`.

    Raises:
        HTTPException: 403 for the origin, 401 for the token.

    """
    if fault := _find_fault(websocket):
        _refuse(*fault)


def _is_full() -> bool:
    return 0 < settings.max_clients <= len(clients)


def _refuse_if_full() -> None:
    if _is_full():
        _refuse(503, "too_many_clients", f"{settings.max_clients} clients are connected.", {})


async def websocket_endpoint(websocket: WebSocket) -> None:
    """Authorize a client and serve it until it goes.

    Raises:
        HTTPException: 401, 403 (see `authorize_client`), or 503 where `DATADIVR_MAX_CLIENTS` are connected.

    """
    await authorize_client(websocket)
    _refuse_if_full()
    await handle_connection(websocket)


async def handle_connection(websocket: WebSocket) -> None:
    """Accept a client without asking who it is, and serve it until it goes."""
    transport, receive, protocol = open_transport(websocket)
    join()
    loop = asyncio.get_running_loop()
    log = logs.get(loop) or logs.setdefault(loop, Log(loop))
    address = f"{websocket.client.host}:{websocket.client.port}" if websocket.client else ""
    client = Client(address, transport, log, protocol)
    clients[client.id] = (
        client  # before anything is awaited, or more than DATADIVR_MAX_CLIENTS could come in
    )
    clients_gauge.inc()
    connections_total.inc()
    try:
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept("bearer" if offered[:1] == ["bearer"] else None)
        log.add(client)
        websocket.scope["datadivr.client_id"] = client.id
        logger.info("client_connected", client_id=client.id, address=address)
        await _announce(client, "$connect")
        await _serve(client, receive)
    finally:
        client.leave(client.end())
        if isinstance(transport, AsgiTransport):
            await transport.finish()
        else:
            protocol.close_sent = (
                True  # or uvicorn's stop would send a close frame after the one it has answered
            )
        await _announce(client, "$disconnect")


async def _announce(client: Client, event_name: str) -> None:
    if event_name in _registry[HandlerType.SERVER]:
        await _handle(client, WebSocketMessage(event_name=event_name, from_id=client.id))


async def _serve(client: Client, receive: Receive) -> None:
    """Handle a client's messages, one after the other, until it goes."""
    handlers = _registry[HandlerType.SERVER]
    allowance = YIELD_BYTES
    while (event := await receive())["type"] == "websocket.receive":
        data = event.get("text")
        if data is None:
            data = event["bytes"]
        if (message := _read(client, data)) is not None:
            if message.event_name in handlers:
                await _handle(client, message)
            else:
                publish(message, client, client)
        client.log.schedule()
        allowance -= max(len(data), YIELD_BYTES // YIELD_MESSAGES)
        if allowance <= 0:  # a queue that is not empty lets nobody else run
            allowance = YIELD_BYTES
            await asyncio.sleep(0)


def _read(client: Client, data: str | bytes) -> WebSocketMessage | None:
    """Make a message from what a client sent, or tell it what is wrong."""
    if client.id not in clients:
        return None  # it was sent a close frame: what it still sends is read, so that its own close is seen
    client.messages_received += 1
    client.log.received += 1
    limit = settings.max_message_bytes
    if len(data) * 4 > limit and len(data.encode() if isinstance(data, str) else data) > limit:
        client.disconnect(1009, f"The limit is {limit} bytes", "message_too_big")
        return None
    if settings.max_messages_per_second and not client.take_token():
        return None
    try:
        message = ClientMessage.__pydantic_validator__.validate_json(data)
    except ValidationError as error:
        client.report("invalid_message", describe(error), "invalid_message_format")
        return None
    message.from_id = client.id
    return message  # type: ignore[no-any-return]


async def _handle(client: Client, message: WebSocketMessage) -> None:
    """Run the handler of a message of a client's, or about it, and send its answer."""
    try:
        answer = await handle_msg(message)
        if answer is not None:
            publish(answer, client, client)
    except InvalidPayload as error:
        client.report("invalid_payload", str(error), "invalid_payload")
    except (Exception, asyncio.CancelledError):
        if (task := asyncio.current_task()) and task.cancelling():
            raise  # it is this connection that is cancelled, not something that the handler awaited
        client.report(
            "handler_error",
            f"The handler of {message.event_name!r} failed.",
            "handler_error",
            exc_info=True,
        )


# ---- The admin API -------------------------------------------------------------------------------


class Detail(BaseModel):
    """Why a request was refused."""

    detail: str


class ClientInfo(BaseModel):
    """One connected client."""

    id: str = Field(examples=["5f0c2a91-52d5-8cf0-9f5a-1c6e3d0a9b48"])
    node: str = Field(description="The process that holds it.", examples=["5f0c2a91"])
    address: str = Field(
        description="Host and port of its end of the connection.", examples=["127.0.0.1:50514"]
    )
    connected_at: datetime
    messages_received: int
    messages_sent: int
    buffered_bytes: int = Field(description="Bytes unsent: how far it is behind.")


class ClientPage(BaseModel):
    """A page of the list of clients, oldest first."""

    total: int = Field(description="Clients connected now.")
    next: str | None = Field(
        description="The `after` of the next page; null on the last.", examples=[None]
    )
    partial: bool = Field(
        description="Whether a node did not answer, so that its clients are missing."
    )
    clients: list[ClientInfo]


class Announcement(BaseModel):
    """A message from the server."""

    event_name: UnreservedEventName
    payload: Any = None
    to: str = Field("all", description="`all`, `others` (the same here), or one client's id.")
    message: str | None = None


class Recipients(BaseModel):
    """How many clients a message was sent to."""

    recipients: int
    partial: bool = Field(
        description="Whether a node did not answer, so that its clients are not counted."
    )


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"] = "ok"


@functools.cache
def admin_token() -> str:
    """Return the admin API's token; where none is set, make one up and log it, once."""
    if settings.admin_token is not None:
        return settings.admin_token
    token = secrets.token_urlsafe(32)
    logger.warning(
        "admin_token_generated", token=token, hint="set DATADIVR_ADMIN_TOKEN to choose it"
    )
    return token


_bearer = HTTPBearer(
    auto_error=False, description="DATADIVR_ADMIN_TOKEN, or the token that the server logged."
)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def authorize_admin(credentials: Credentials) -> None:
    """Refuse a request without the admin token.

    Raises:
        HTTPException: 401.

    """
    expected = admin_token()
    if credentials is None or not _bearer_matches(credentials.credentials, expected):
        errors_total.labels("unauthorized").inc()
        raise HTTPException(401, "The admin token is needed.", {"WWW-Authenticate": "Bearer"})


async def authorize_scrape(credentials: Credentials) -> None:
    """Refuse a scrape without the admin token where `DATADIVR_PROTECT_METRICS` is on."""
    if settings.protect_metrics:
        await authorize_admin(credentials)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """At the start log the admin token if one was made up, and find out whether Redis is there; leave it at the end."""
    admin_token()
    link = join()
    if link is None or link.loop is not asyncio.get_running_loop():
        yield
        return
    await link.tried.wait()
    yield
    await link.stop()


router = APIRouter(lifespan=lifespan)
admin = APIRouter(dependencies=[Depends(authorize_admin)], responses={401: {"model": Detail}})
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Detail}, 503: {"model": Detail}}


def describe_client(client: Client) -> dict[str, Any]:
    return ClientInfo(
        id=client.id,
        node=client.id[:8],
        address=client.address,
        connected_at=datetime.fromtimestamp(client.connected_us / 1e6, UTC),
        messages_received=client.messages_received,
        messages_sent=client.messages_sent,
        buffered_bytes=client.buffered_bytes,
    ).model_dump(mode="json")


async def _ask_owner(client_id: str, *request: Any) -> Any:
    answers, partial = await ask(client_id, *request)
    for answer in filter(None, answers):
        return answer
    if partial:
        raise HTTPException(503, "The node that holds this client does not answer.")
    raise HTTPException(404, "No client with this id is connected.")


@admin.get("/clients")
async def list_clients(
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[
        str, Query(pattern=r"^([0-9]{1,17}-[0-9a-f-]{36})?$", description="`next` of a page.")
    ] = "",
) -> ClientPage:
    """List the connected clients, oldest first."""
    since, _, last_id = after.partition("-")
    answers, partial = await ask("all", "list", limit, (int(since or 0), last_id))
    found = sorted((us, client["id"], client) for _, page in answers for us, client in page)
    more = "{}-{}".format(*found[limit - 1]) if len(found) > limit else None
    page = [client for _, _, client in found[:limit]]
    return ClientPage(
        total=sum(count for count, _ in answers), next=more, partial=partial, clients=page
    )


@admin.get("/clients/{client_id}", responses=NOT_FOUND)
async def get_client(client_id: str) -> ClientInfo:
    """Describe one connected client."""
    return ClientInfo(**await _ask_owner(client_id, "get", client_id))


@admin.delete("/clients/{client_id}", status_code=204, responses=NOT_FOUND)
async def disconnect_client(client_id: str) -> None:
    """Disconnect a client, after what was already sent to it, with code 1008."""
    await _ask_owner(client_id, "disconnect", client_id)


@admin.route(
    "/clients/{client_id}",
    "HEAD OPTIONS PATCH POST PUT QUERY TRACE".split(),
    include_in_schema=False,
)
async def _refuse_method(_: Request) -> NoReturn:
    # RFC 9110, 15.5.6: what the resource allows, while each of its two routes would name its own method alone
    raise HTTPException(405, headers={"Allow": "GET, DELETE"})


@admin.post(
    "/messages",
    status_code=202,
    max_body_size=settings.max_message_bytes,
    responses={
        **NOT_FOUND,
        400: {"model": Detail},
        413: {"model": Detail, "content": {"text/plain": {"schema": {"type": "string"}}}},
        422: {
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}
            }
        },
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": Announcement.model_json_schema(),
                    "example": {"event_name": "news", "message": "Hello, all."},
                }
            },
        }
    },
)
async def post_message(request: Request) -> Recipients:
    """Send a message to all clients, or to one."""
    try:
        announcement = Announcement.model_validate_json(await request.body())
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise HTTPException(400, describe(error)) from None
        details = error.errors(include_url=False, include_input=False)
        raise RequestValidationError(
            [{**detail, "loc": ("body", *detail["loc"])} for detail in details]
        ) from None
    except ClientDisconnect:
        raise HTTPException(400, "The body ended early.") from None
    text = encode(WebSocketMessage(**dict(announcement))).decode()
    if announcement.to not in EVERYBODY:
        return Recipients(
            recipients=await _ask_owner(announcement.to, "push", announcement.to, text),
            partial=False,
        )
    answers, partial = await ask("all", "push", "all", text)
    return Recipients(recipients=sum(answers), partial=partial)


@router.get(
    "/metrics",
    dependencies=[Depends(authorize_scrape)],
    responses={
        200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}},
        401: {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Detail"}}}},
    },
    response_class=PlainTextResponse,
    openapi_extra={
        "security": [{}]
    },  # DATADIVR_PROTECT_METRICS decides whether the token is needed
)
async def get_metrics(request: Request) -> Response:
    """Report the metrics in Prometheus' text format, or in OpenMetrics where that is asked for."""
    generate, content_type = choose_encoder(request.headers.get("accept", ""))
    text = await asyncio.to_thread(
        lambda: generate(collect_metrics())
    )  # files of many workers take their time
    return Response(text, media_type=content_type)


@router.get("/healthz")
async def get_health() -> Health:
    """Say that the server answers."""
    return Health()


@router.websocket("/ws")
async def _admit(websocket: WebSocket, _: Annotated[None, Depends(authorize_client)]) -> None:
    _refuse_if_full()
    await handle_connection(websocket)


router.include_router(admin)


def _allowed(tag: str) -> str:
    """Return the source by which a Content-Security-Policy allows the one inline element of the console's page."""
    text = CONSOLE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@router.get("/console", include_in_schema=False)
@router.get("/console/", include_in_schema=False)
async def get_console() -> HTMLResponse:
    """Serve the console: a page without data, which asks for the admin token and uses nothing but this API."""
    policy = (
        f"default-src 'none'; script-src {_allowed('script')}; style-src {_allowed('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return HTMLResponse(
        CONSOLE, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    )


# ---- The application -----------------------------------------------------------------------------


class App(FastAPI):
    """A FastAPI application that leaves its own stack out for clients of `/ws`: a third of their memory and time.

    Clients to refuse go through it, and all do where middleware, dependencies or the routes of `app` were changed.
    FastAPI's own telemetry does not see those who do not.
    """

    def _admits(self, websocket: WebSocket) -> bool:
        path = websocket.scope["path"].removeprefix(websocket.scope.get("root_path", ""))
        instrumented = self.user_middleware or "build_middleware_stack" in vars(self)
        untouched = self is app and self.router.routes[: len(_routes)] == _routes
        if path != "/ws" or not untouched or instrumented or self.dependency_overrides:
            return False
        return not _is_full() and not _find_fault(websocket)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and self._admits(
            websocket := WebSocket(scope, receive, send)
        ):
            await handle_connection(websocket)
            return
        await super().__call__(scope, receive, send)
        for _ in range(
            200
        ):  # uvicorn logs an error where this returns before a refused connection is lost
            if getattr(getattr(receive, "__self__", None), "handshake_complete", True):
                break
            await asyncio.sleep(0.01)


app = App(title="datadivr", version=__version__)
app.include_router(router)
_routes = list(app.router.routes)

# Code written for the package that this file implements imports from `datadivr.transport.messages` and
# `datadivr.transport.server`: the import system finds each of them in `sys.modules` once it has imported this file.
# Run as a program, this file is known under its own name too, or a handler's import of it would make a second copy.
if __name__ in sys.modules:
    _name = __spec__.name if __spec__ else Path(__file__).stem
    transport = messages = server = sys.modules[_name] = sys.modules[__name__]
    for _path in ("transport", "transport.messages", "transport.server"):
        sys.modules[f"{_name}.{_path}"] = sys.modules[__name__]


def main() -> None:
    """Run the server: `python datadivr.py [--host HOST] [--port PORT]`."""
    import uvicorn

    parser = argparse.ArgumentParser(
        description="A WebSocket message server with an HTTP admin API."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765)
    uvicorn.run(
        app,
        ws_max_size=settings.max_message_bytes,
        timeout_graceful_shutdown=5,
        **vars(parser.parse_args()),
    )


CONSOLE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>datadivr console</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page);
  --page: light-dark(#f2f5f6, #0c1316); --card: light-dark(#fff, #141d21); --line: light-dark(#d8e1e4, #2a393f);
  --edge: light-dark(#84959c, #62757d); --text: light-dark(#13232a, #e3ecef); --muted: light-dark(#4e626b, #9fb2ba);
  --accent: light-dark(#0b6a73, #5ccdd4); --bad: light-dark(#b3261e, #ff9389); --good: light-dark(#1a7347, #62d29c) }
* { box-sizing: border-box; margin: 0; background: none; scroll-margin-top: 4em } dialog::backdrop { background: #0008 }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px } [tabindex="-1"] { outline: none }
body { max-width: 1320px; margin: auto; padding: 0 16px 16px; overflow-wrap: anywhere }
[hidden], body:not(.nodes) .node, .signed #login, body:not(.signed) :is(#board, #out) { display: none !important }
h1 { font-size: 18px; margin-right: auto; padding: 12px 0 } h2 { font-size: 15px } caption, label { font-weight: 700 }
:is(h1, caption) span, small, figcaption, thead, td::before, tbody::after { color: var(--muted); font-weight: 400 }
small, figcaption, label, thead, td::before, :is(td, header) button, .fault, #state { font-size: 13px }
header { position: sticky; top: 0; z-index: 1; background: var(--page) } #notice { width: 100% }
header, .bar { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: 6px 12px }
#state::before { content: "\25cf\a0" / "" } [data-now=live] #state::before { color: var(--good) }
#notice:not(:empty) { padding: 10px 16px; margin-bottom: 8px; border: 1px solid; border-radius: 12px }
[data-now=gone] #state::before, [data-now=gone] #notice, .fault { color: var(--bad) } label { display: block }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px; min-width: 0 }
.grid { display: grid; grid: auto / repeat(auto-fit, minmax(clamp(13em, (44em - 100%) * 999, 100%), 1fr)); gap: 16px }
#board > .grid ~ * { margin-top: 16px } #board { margin-top: 10px } form .bar, nav, dialog > * + * { margin-top: 14px }
figure p { font-size: 30px; font-weight: 600; line-height: 1.3 } tbody:empty::after { content: "None" }
svg { width: 100%; height: 80px; overflow: visible; border: dashed var(--edge); border-width: 1px 0 }
path { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linecap: round; vector-effect: non-scaling-stroke }
input, textarea, button { font: inherit; color: inherit; border: 1px solid var(--edge); border-radius: 8px }
input, textarea { display: block; width: 100%; padding: 7px 10px; margin: 4px 0 6px; font: 15px system-ui, sans-serif }
button { padding: 5px 1em; cursor: pointer } :is(td, header) button { padding: 3px 9px } * + button { margin-left: 6px }
.primary { background: var(--accent); border-color: var(--accent); color: var(--card); font-weight: 600 }
[aria-disabled=true] { color: var(--muted); cursor: default } .danger, [aria-invalid=true] { border-color: var(--bad) }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums } caption { text-align: left }
th, td { text-align: right; padding: 7px 0 7px 14px; font-weight: 400; white-space: nowrap }
tbody tr { border-top: 1px solid var(--line) } th:first-child { text-align: left; padding-left: 0; white-space: normal }
th small { display: block; font-family: ui-monospace, monospace } #slowest button:first-child { display: none }
#login, dialog { width: min(420px, 100% - 32px); margin: 10vh auto; color: inherit } label { margin-top: 8px }
@media (max-width: 900px) { .wide th, #clients td:last-child { grid-column: 1 / -1 } .wide .node { display: none }
  .wide thead { position: absolute; clip-path: inset(50%) } .wide button { padding: 6px 14px }
  .wide tr { display: grid; grid: auto / repeat(4, auto); gap: 0 14px; padding: 8px 0; justify-content: space-between }
  .wide :is(th, td) { padding: 4px 0; text-align: left; white-space: normal } .wide td { overflow-wrap: normal }
  #slowest td + td { grid-column: 4 } .wide td:not(:last-child)::before { content: attr(title) / ""; display: block } }
</style><header><h1>datadivr <span>console</span></h1><p id="state"></p><button id="out">Sign out</button>
  <p id="notice" role="status"></p></header>
<main id="main" tabindex="-1"><form id="login" class="card"><h2>Sign in</h2>
<label>Admin token <input id="token" type="password" autocomplete="off" required aria-describedby="token-fault"></label>
  <p id="token-fault" class="fault" role="alert"></p><small>DATADIVR_ADMIN_TOKEN, or the one in the server's log</small>
  <p class="bar"><button class="primary">Open the console</button></p></form>
<div id="board"><div class="grid" id="charts"></div>
<p class="node"><small>Charts and errors: the node or machine that answers. Clients: all.</small></p><div class="grid">
  <div class="grid"><section class="card"><table tabindex="-1"><caption>Errors</caption><thead><tr><th scope="col">Type
    <th scope="col">Last 2 min<th scope="col">In all</thead><tbody id="errors"></table></section>
  <section class="card"><table class="wide" tabindex="-1"><caption>Slowest clients</caption><thead><tr>
    <th scope="col">Client<th scope="col">Unsent<th scope="col">Actions</thead><tbody id="slowest"></table></section>
  </div><form id="announce" class="card"><h2>Announcement</h2>
    <label>To <input id="to" value="all" required aria-describedby="to-fault to-hint"></label>
    <p id="to-fault" class="fault" role="alert"></p><small id="to-hint">“all” or a client's id</small>
    <label>Event name <input id="name" required></label><label>Message <input id="message"></label>
    <label>Payload, in JSON <textarea id="payload" rows="2" aria-describedby="payload-fault"></textarea></label>
    <p id="payload-fault" class="fault" role="alert"></p>
    <p class="bar"><button class="primary">Send</button><span id="sent" role="status"></span></p></form></div>
<section class="card"><p id="partial" class="fault" hidden>Some nodes did not answer.</p>
    <table class="wide" tabindex="-1"><caption>Clients <span id="total"></span></caption>
      <thead><tr><th scope="col">Client<th scope="col" class="node">Node<th scope="col">Since<th scope="col">In
      <th scope="col">Out<th scope="col">Unsent<th scope="col">Actions</thead><tbody id="clients"></table>
    <nav id="pages" class="bar" aria-label="Pages of clients"><button id="previous">Previous</button>
      <span id="place"></span><button id="next">Next</button></nav></section></div></main>
<dialog id="ask" class="card" aria-labelledby="question"><h2 id="question"></h2>
  <p>It gets what was already sent to it, then its connection is closed with code 1008. It may connect again.</p>
  <form method="dialog" class="bar"><button>Cancel</button><button class="danger" value="1">Disconnect</button></form>
</dialog><template id="chart"><figure class="card"><h2></h2><p></p><small></small><svg role="img" viewBox="0 0 120 40"
  preserveAspectRatio="none"><path/></svg><figcaption class="bar">2 min ago<span>now</span></figcaption></figure>
</template><script>
const ui = Object.fromEntries(Array.from(document.querySelectorAll("[id]"), (node) => [node.id, node]));
const base = new URL(location.pathname.endsWith("/") ? ".." : ".", location), { dataset, classList } = document.body;
let token = sessionStorage.getItem("datadivr"), samples = [], clients = [], page = 0, last = {}, due = 0, running, fade;
const el = (tag, properties) => Object.assign(document.createElement(tag), properties);
const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const show = (now, label, notice) => { dataset.now = now; say(ui.state, label); say(ui.notice, notice); };
const tell = (text) => { say(ui.notice, text); clearTimeout(fade); fade = setTimeout(say, 5000, ui.notice, ""); };
const fault = (id, text) => { say(ui[`${id}-fault`], text); ui[id].ariaInvalid = !!text; if (text) ui[id].focus(); };
const number = (n) => n.toLocaleString("en", n < 1e5 ? { maximumFractionDigits: +(n < 100) } : { notation: "compact" });
const bytes = (n) => n < 1e3 ? `${n} B` : n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(1)} MB`;
const time = (d) => d.toLocaleString([], { timeStyle: "short", dateStyle: Date.now() - d > 8e7 ? "short" : void 0 });
async function api(path, options) {
  const own = token, headers = { Authorization: `Bearer ${own}` }, signal = AbortSignal.timeout(5000);
  const answer = await fetch(new URL(path, base), { ...options, headers, signal, cache: "no-store" }).catch(() => null);
  const body = await answer?.text().catch(() => null);
  if (own === token && answer?.status === 401) leave("The server refuses this token.");
  if (own !== token || typeof body !== "string") throw Error(token ? "The server does not answer." : "Signed out.");
  const json = /json/.test(answer.headers.get("content-type")) && JSON.parse(body || null);
  if (answer.ok) return json || body;
  const details = [json.detail ?? `The server answers ${answer.status}.`].flat();
  throw Error(details.map((d) => d.msg ? `${d.loc.at(-1)}: ${d.msg}` : d).join("; "), { cause: answer.status });
}
function leave(text) {
  [token, samples, page, last, due] = ["", [], 0, {}, 0];
  sessionStorage.removeItem("datadivr"); classList.remove("signed"); ui.ask.close();
  show("out", "Signed out", ""); fault("token", text); ui.token.focus();
}
async function run() { // one request after the other, for as long as somebody is signed in and looks
  if (running) return;
  for (running = true; token && !document.hidden; await new Promise((done) => setTimeout(done, 1000))) try {
    const start = performance.now(), before = dataset.now;
    if (start > due) due = start + 2000 + await walk();
    await measure();
    if (before === "live") continue; else show("live", "Live", "");
    sessionStorage.setItem("datadivr", token); if (before === "gone") tell("The server is back.");
    if (!classList.contains("signed")) { classList.add("signed"); ui.main.focus({ preventScroll: true }); }
  } catch ({ message }) {
    if (token) show("gone", "No answer", `${message} Trying again every second.${last.seen ?? ""}`); due = 0;
  }
  running = false;
}
function fill(id, items, texts) { // rows are changed in place: the focus and the place on the page stay where they are
  const body = ui[id], focused = document.activeElement, old = new Map(Array.from(body.rows, (row) => [row.key, row]));
  const rows = items.map((item) => old.get(item.id) ?? makeRow(body.parentNode, item));
  for (const row of old.values()) if (!rows.includes(row)) row.remove();
  rows.forEach((row, index) => {
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index]);
    texts(items[index]).forEach((text, cell) => say(row.cells[cell + 1], text));
  });
  const focus = focused.isConnected ? focused : body.parentNode;
  if (document.activeElement !== focus) focus.focus({ preventScroll: true });
}
function makeRow(table, { id, address }) {
  const row = el("tr", { key: id }), head = el("th", { scope: "row", textContent: address ?? id });
  const cells = Array.from(table.rows[0].cells, ({ className, innerText: title }) => el("td", { className, title }));
  row.append(head, ...cells.slice(1));
  if (address === undefined) return row;
  const button = (text, onclick) => el("button", { onclick, textContent: text, ariaLabel: `${text} ${address}` });
  head.append(el("small", { textContent: id }));
  row.lastChild.append(button("Message", () => { ui.to.value = id; ui.name.focus(); }), button("Disconnect", () => {
    say(ui.question, `Disconnect ${address}?`);
    Object.assign(ui.ask, { returnValue: "", client: { id, address } }).showModal();
  }));
  return row;
}
function turn(to) {
  const count = Math.ceil(clients.length / 20) || 1; page = Math.max(0, Math.min(to, count - 1));
  fill("clients", clients.slice(20 * page, 20 * page + 20), (c) => [c.node ?? "", time(new Date(c.connected_at)),
    number(c.messages_received), number(c.messages_sent), bytes(c.buffered_bytes)]);
  say(ui.place, `Page ${page + 1} of ${count}`);
  [ui.pages.hidden, ui.previous.ariaDisabled, ui.next.ariaDisabled] = [count === 1, page === 0, page === count - 1];
}
async function walk() {
  const answers = [{ next: "", clients: [] }];
  while (answers.at(-1).next !== null) answers.push(await api(`clients?limit=1000&after=${answers.at(-1).next}`));
  clients = answers.flatMap((answer) => answer.clients);
  const behind = clients.filter((c) => c.buffered_bytes).sort((a, b) => b.buffered_bytes - a.buffered_bytes);
  fill("slowest", behind.slice(0, 5), (c) => [bytes(c.buffered_bytes)]);
  classList.toggle("nodes", new Set(clients.map((c) => c.node)).size > 1);
  ui.partial.hidden = !answers.some((answer) => answer.partial);
  say(ui.total, number(clients.length)); turn(page); return clients.length;
}
async function measure() {
  const now = {}, errors = {}, text = await api("metrics"), at = performance.now() / 1000;
  for (const [, name, type, value] of text.matchAll(/^datadivr_(\w+)(?:\{type="((?:[^"\\]|\\.)*)"\})? (\S+)/gm))
    if (name === "errors_total") errors[JSON.parse(`"${type}"`)] = +value; else now[name] = +value;
  const rate = (name) => now[name] >= last[name] ? (now[name] - last[name]) / (at - last.at) : null;
  samples.push({ at, errors, values: [now.clients, rate("messages_received_total"), rate("messages_sent_total")] });
  samples = samples.filter((sample) => sample.at > at - 120);
  last = { ...now, at, seen: ` The figures are from ${time(new Date())}.` };
  charts.forEach((draw) => draw(at));
  const types = Object.keys(errors).filter((type) => errors[type]), before = samples[0].errors;
  const recent = (type) => errors[type] - (before[type] <= errors[type] ? before[type] : 0);
  fill("errors", types.map((id) => ({ id })), ({ id }) => [number(recent(id)), number(errors[id])]);
}
const charts = ["Clients connected", "Messages in", "Deliveries out"].map((title, index) => {
  const card = ui.chart.content.firstChild.cloneNode(true), [heading, figure, top, svg] = card.children;
  const unit = index ? "/s" : ""; heading.append(title); ui.charts.append(card);
  return (at) => {
    const values = samples.map((sample) => sample.values[index]), most = Math.max(0, ...values), now = values.at(-1);
    const ten = 10 ** Math.floor(Math.log10(most || 1)), limit = ten * [1, 2, 5, 10, 20].find((n) => n * ten > most);
    const path = samples.map((sample, i) => values[i] === null ? "" :
      `${values[i - 1] == null ? "M" : "L"}${120 + sample.at - at} ${40 - 40 * values[i] / limit}h0`);
    svg.firstChild.setAttribute("d", path.join(""));
    say(figure, now === null ? "-" : number(now) + unit); say(top, `scale to ${number(limit)}${unit}`);
    svg.ariaLabel = `${title}: ${figure.textContent} now, at most ${number(most)}${unit} in the last two minutes`;
  };
});
ui.ask.onclose = ({ target: { returnValue, client } }) => returnValue &&
  api(`clients/${client.id}`, { method: "DELETE" }).then(() => `${client.address} is disconnected.`, (e) => e.message)
  .then((text) => { due = 0; tell(text); });
ui.announce.onsubmit = (event) => {
  const [to, event_name, message, payload] = [ui.to, ui.name, ui.message, ui.payload].map(({ value }) => value.trim());
  event.preventDefault(); fault("payload", ""); fault("to", ""); say(ui.sent, "");
  try { JSON.parse(payload || "null"); } catch (error) { return fault("payload", `Not JSON: ${error.message}`); }
  // The payload goes out as it was typed, because JavaScript would round large numbers.
  const body = `{"payload":${payload || null},` + JSON.stringify({ to, event_name, message: message || null }).slice(1);
  api("messages", { method: "POST", body }).then(
    ({ recipients: n, partial }) =>
      say(ui.sent, `“${event_name}” reached ${n}${partial ? " or more" : ""} client${n === 1 ? "" : "s"}.`),
    ({ message, cause }) => cause === 404 ? fault("to", message) : say(ui.sent, message));
};
ui.login.onsubmit = (event) => {
  event.preventDefault(); leave(""); token = ui.token.value.trim();
  if (/[^!-~]/.test(token)) leave("The server refuses this token."); else { show("wait", "Connecting", ""); run(); }
};
ui.out.onclick = () => leave(""); document.onvisibilitychange = run;
ui.previous.onclick = () => turn(page - 1); ui.next.onclick = () => turn(page + 1);
if (token) { classList.add("signed"); run(); } else leave("");
</script>
"""

if __name__ == "__main__":
    main()
