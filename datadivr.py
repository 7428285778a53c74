# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "fastapi>=0.115.0",
#     "uvicorn[standard]>=0.30.0",
#     "pydantic>=2.9.0",
#     "structlog>=23.1.0",
#     "prometheus-client>=0.20.0",
# ]
# ///
"""A WebSocket message server with an HTTP admin API, in one file.

Copy it into a project, register handlers, and run ``uvicorn datadivr:app``::

    from datadivr import WebSocketMessage, app, websocket_handler

    @websocket_handler("greet")
    async def greet(message: WebSocketMessage) -> WebSocketMessage:
        return WebSocketMessage(event_name="greeting", payload="hello", to=message.from_id)

The way of a message through this file: `handle_connection` accepts a client, and `_read_messages`
takes what it sends. `parse_message` makes a `WebSocketMessage` of it, `handle_msg` runs its event's
handler, and `_publish` sends the answer, or a message without a handler as it is. `_Room.publish`
adds it to the `_Turn`: all that is published in one turn of the event loop. When that is over,
`_Room.flush` writes it to each client at once, through a `_UvicornConnection` or an
`_AsgiConnection`; `_peers` takes it to the other processes, if there are any.
"""

import argparse
import asyncio
import base64
import difflib
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import re
import secrets
import struct
import sys
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Generic, Literal, NamedTuple, get_args, get_origin
from urllib.parse import parse_qs, urlsplit
from weakref import WeakValueDictionary

import structlog
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response, WebSocket
from fastapi.concurrency import run_in_threadpool
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.params import Depends as Dependency
from fastapi.params import Param
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, SchemaValidator, Url
from pydantic_core.core_schema import ErrorType
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypeVar

if sys.version_info >= (3, 14):
    import annotationlib

__all__ = [
    "Announcement", "App", "Client", "ClientInfo", "ClientPage", "HandlerType",
    "InvalidMessageFormat", "Recipients", "WebSocketMessage", "app", "authorize_admin",
    "authorize_client", "broadcast", "clients", "create_error_message", "create_message",
    "disconnect_client", "get_handlers", "handle_connection", "handle_msg", "main",
    "parse_message", "router", "sum_handler", "websocket_endpoint", "websocket_handler",
]  # fmt: skip
__version__ = "1.0.0"

# ---- Settings and logging ------------------------------------------------------------------------

# What both an Authorization header and a WebSocket subprotocol can carry (RFC 9110, 5.6.2).
_Token = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]


def _normalise_origin(text: str) -> str:
    """Return an origin as browsers write it: lower case, ASCII, and without a default port."""
    text = text.strip().lower()
    if text in ("*", "null", "file://"):
        return text
    if not re.fullmatch(r"[a-z0-9+.-]+://[^/\\@?#*\s]+", text):
        raise ValueError("expected scheme://host or scheme://host:port")
    return str(Url(text)).removesuffix("/")


_Origin = Annotated[str, AfterValidator(_normalise_origin)]
_Origins = Annotated[tuple[_Origin, ...], BeforeValidator(lambda text: text.split(","))]
_Positive = Annotated[int, Field(gt=0)]
_Limit = Annotated[int, Field(ge=0)]  # 0 is no limit
_Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class _Settings(BaseModel, alias_generator=lambda name: f"DATADIVR_{name.upper()}"):
    """One process's secrets and limits, each from ``DATADIVR_`` and its name in capitals."""

    admin_token: _Token | None = None  # of the admin API; a random one is made up and logged
    client_token: _Token | None = None  # that clients must bring
    metrics_token: _Token | None = None  # that /metrics asks for, if it is not the admin's
    allowed_origins: _Origins = ()  # of pages from elsewhere, by commas; "*" is any
    max_message_bytes: _Positive = 1024 * 1024  # from a client, in UTF-8
    max_messages_per_second: _Limit = 0  # from one client; the others are dropped
    max_clients: _Limit = 0  # connected at once
    max_buffer_bytes: _Positive = 4 * 1024 * 1024  # unsent to one client, which is then dropped
    compress_min_bytes: _Limit = 1024  # of a message that is compressed, once for all; 0 is none
    redis_url: Annotated[str, Field(pattern="^(rediss?|unix)://")] | None = None
    redis_prefix: str = "datadivr"  # of channels' names: one per installation
    log_level: Annotated[_Level, BeforeValidator(str.upper)] = "INFO"
    log_format: Annotated[Literal["console", "json"], BeforeValidator(str.lower)] = "console"


def _read_settings(environ: Mapping[str, str]) -> _Settings:
    """Read the settings from variables; ValueError names each that is wrong, but no secret."""
    protected = environ.get("DATADIVR_PROTECT_METRICS", "").lower()  # as older versions had it
    if protected not in ("", "0", "false") and "DATADIVR_METRICS_TOKEN" not in environ:
        raise ValueError("DATADIVR_PROTECT_METRICS: set DATADIVR_METRICS_TOKEN in its place")
    # An empty variable counts as unset, but for a token: one that was not injected is an error.
    variables = {name: text for name, text in environ.items() if text or name.endswith("_TOKEN")}
    try:
        return _Settings.model_validate(variables)
    except ValidationError as error:
        faults = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            is_secret = name.endswith(("TOKEN", "REDIS_URL")) and variables[name]
            came = "" if is_secret else f" (it is {variables[name]!r})"
            faults.append(f"{name}: {detail['msg']}{came}")
        raise ValueError("; ".join(faults)) from None


_settings = _read_settings(os.environ)
_is_log_ours = not structlog.is_configured()  # as the host project may have done
_processors: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]


def _format_uvicorns_log() -> None:
    """Make uvicorn's own lines JSON too, where ours are and no format of its user's is set."""
    if not _is_log_ours or _settings.log_format != "json":
        return
    renderer = structlog.processors.JSONRenderer()
    formatter = structlog.stdlib.ProcessorFormatter(renderer, foreign_pre_chain=_processors)
    handlers = logging.getLogger("uvicorn").handlers + logging.getLogger("uvicorn.access").handlers
    for handler in handlers:
        if type(handler.formatter).__module__ == "uvicorn.logging":
            handler.setFormatter(formatter)


if _is_log_ours:
    # The default formatter of tracebacks shows local variables, and so payloads.
    _plain, _is_tty = structlog.dev.plain_traceback, sys.stdout.isatty()
    _renderer: Any = structlog.dev.ConsoleRenderer(colors=_is_tty, exception_formatter=_plain)
    if _settings.log_format == "json":
        _renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*_processors, _renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, _settings.log_level)),
        logger_factory=structlog.stdlib.LoggerFactory(),  # whose handlers never raise
    )
    logging.getLogger("datadivr").setLevel(_settings.log_level)
    if not logging.getLogger("datadivr").hasHandlers():
        logging.getLogger("datadivr").addHandler(logging.StreamHandler(sys.stdout))
    _format_uvicorns_log()
_log = structlog.get_logger("datadivr")
_variables = [str(field.alias) for field in _Settings.model_fields.values()]
for _variable in os.environ.keys() - set(_variables):
    for _meant in difflib.get_close_matches(_variable.upper(), _variables, 1, 0.89):
        _log.critical("unknown_setting", variable=_variable, hint=f"perhaps {_meant} is meant")
_warned_at: dict[tuple[str, object], float] = {}


def _warn(event: str, **fields: Any) -> None:
    """Log what anybody can bring about: once a minute as a warning, otherwise for DEBUG."""
    key = event, fields.get("event_name")  # one handler's faults must not hide another's
    now = time.monotonic()
    if now - _warned_at.get(key, -math.inf) < 60:
        _log.debug(event, **fields)
    else:
        _warned_at[key] = now
        _log.warning(event, **fields)


# ---- Messages ------------------------------------------------------------------------------------

_EVERYBODY = ("all", "others")
_EventName = Annotated[str, Field(min_length=1, max_length=128)]
_UnreservedEventName = Annotated[_EventName, Field(pattern=r"^[^$]")]
_PayloadT = TypeVar("_PayloadT", default=Any)


class InvalidMessageFormat(ValueError):  # noqa: N818  # a promised name
    """Says which fields are wrong; `code` is "invalid_message", or "invalid_payload"."""

    def __init__(self, text: str, code: str = "invalid_message") -> None:
        super().__init__(text)
        self.code = code


class WebSocketMessage(BaseModel, Generic[_PayloadT]):
    """One message, as it goes over the wire in JSON, with all five keys."""

    event_name: _EventName  # 1 to 128 characters; those that begin with "$" are the server's own
    payload: _PayloadT = None  # type: ignore[assignment]  # any JSON, or `WebSocketMessage[type]`
    to: str = "others"  # all but the sender; or "all", or one client's id
    from_id: str = "server"  # or the id of the client that sent it
    message: str | None = None  # a sentence for people


class _ClientMessage(WebSocketMessage):
    event_name: _UnreservedEventName


def _stop_early(schema: Any) -> Any:
    """Have lists end at their first wrong item: all of a megabyte's take 0.2 s and more."""
    if type(schema) in (list, tuple):
        return type(schema)(map(_stop_early, schema))
    if isinstance(schema, dict):
        is_schema = isinstance(schema.get("type"), str)  # or it is a model's fields, by name
        kept = ("default", "metadata", "serialization") if is_schema else ()
        parts = schema.items()
        schema = {key: part if key in kept else _stop_early(part) for key, part in parts}
        if schema.get("type") in ("list", "tuple", "set", "frozenset"):
            schema["fail_fast"] = True
    return schema


# Kinds of errors whose sentence has nothing of the input in it, but for what a validator says.
_PLAIN_ERRORS = {*get_args(ErrorType)} - {"import_error", "uuid_parsing"}


class _Validator:
    """What makes messages of one type; it says which fields are wrong, without the input."""

    def __init__(self, message_type: Any, code: str) -> None:
        schema = _stop_early(TypeAdapter(message_type).core_schema)
        try:
            self._validate = SchemaValidator(schema, _use_prebuilt=False).validate_json
        except TypeError:  # pydantic before 2.12, which makes all of it anew
            self._validate = SchemaValidator(schema).validate_json
        self._schema = repr(schema)
        self._code = code

    def __call__(self, data: str | bytes) -> WebSocketMessage:
        try:
            message: WebSocketMessage = self._validate(data)
            return message
        except ValidationError as error:
            text = f"{error.error_count()} fields are wrong"
            if error.error_count() <= 20:  # a dict of a megabyte can have as many as it has keys
                details = error.errors(include_input=False, include_url=False)
                text = "; ".join(map(self._describe, details))[:500]
            raise InvalidMessageFormat(text, self._code) from None

    def _describe(self, detail: ErrorDetails) -> str:
        path = []
        for part in detail["loc"]:  # a key that is not of the schema is input
            is_known = isinstance(part, int) or repr(part) in self._schema
            path.append(str(part) if is_known else "*")
        text = detail["msg"]
        if detail["type"] == "union_tag_invalid":
            text = f"Expected one of the tags {detail['ctx']['expected_tags']}"
        elif detail["type"] not in _PLAIN_ERRORS:
            text = f"Input is not valid ({detail['type']})"
        return f"{'.'.join(path) or 'message'}: {text}"


_validate_client_message = _Validator(_ClientMessage, "invalid_message")
# Makes bytes, where `model_dump_json` makes text; raises PydanticSerializationError for a payload
# that JSON cannot hold. NaN and infinity become null.
_encode = partial(TypeAdapter(WebSocketMessage).dump_json, by_alias=True)


def parse_message(data: str | bytes) -> WebSocketMessage:
    """Make a message of the JSON that a client sent; InvalidMessageFormat names what is wrong."""
    return _validate_client_message(data)


def create_message(
    event_name: str, payload: Any, to: str, message: str | None = None
) -> WebSocketMessage:
    """Make a message from the server."""
    return WebSocketMessage(event_name=event_name, payload=payload, to=to, message=message)


def create_error_message(error_msg: str, to: str, code: str = "error") -> WebSocketMessage:
    """Make an `error` message: a sentence in `message`, and a `code` for programs in `payload`."""
    return create_message("error", {"code": code}, to, error_msg)


# ---- Handlers ------------------------------------------------------------------------------------

_Answer = WebSocketMessage | None
_Handler = Callable[[WebSocketMessage], _Answer | Awaitable[_Answer]]
_HandlerT = TypeVar("_HandlerT", bound=_Handler)


class HandlerType(Enum):
    """Who runs a handler: this server (SERVER, BOTH), or a client of one's own (CLIENT, BOTH).

    No client is in this file: one in Python finds what to run with `get_handlers`.
    """

    SERVER = "server"
    CLIENT = "client"
    BOTH = "both"


# By the event's name: the handler, whether it runs in the event loop, what its payloads must be.
_Registered = tuple[_Handler, bool, _Validator | None]
_handlers: dict[HandlerType, dict[str, _Registered]] = {kind: {} for kind in HandlerType}


def websocket_handler(
    event_name: str, handler_type: HandlerType = HandlerType.SERVER
) -> Callable[[_HandlerT], _HandlerT]:
    """Register the decorated function for an event; the last registration of a name wins.

    It takes a `WebSocketMessage` and returns one, which goes to its `to`, or None. A coroutine
    function runs in the event loop, which it must not block, a plain one in one of AnyIO's 40
    threads. `$connect` and `$disconnect` are the events of a client that came or went, `$default`
    is any event without a handler of its own. Annotated `WebSocketMessage[type]`, it runs for such
    payloads alone; others get an `invalid_payload`.

    Raises:
        TypeError: it is written without parentheses, or the function does not take one message.
        ValueError: no message can have this name.
        NameError: the annotation is text and names a type that is not there, or not yet.
    """
    if not isinstance(event_name, str):
        raise TypeError(f'write @websocket_handler("event"), got {event_name!r} as the event')
    if not re.fullmatch(r"\$connect|\$disconnect|\$default|[^$][\s\S]{0,127}", event_name):
        expected = "$connect, $disconnect, $default, or 1 to 128 characters that begin without $"
        raise ValueError(f"expected {expected}, got {event_name!r}")

    def register(handler: _HandlerT) -> _HandlerT:
        called = handler if inspect.isroutine(handler) else type(handler).__call__
        registered = handler, inspect.iscoroutinefunction(called), _find_validator(handler)
        for kind in HandlerType if handler_type is HandlerType.BOTH else (handler_type,):
            _handlers[kind][event_name] = registered
        return handler

    return register


def _find_validator(handler: _Handler) -> _Validator | None:
    """Return what validates a handler's messages; None where these may have any payload."""
    name = getattr(handler, "__name__", type(handler).__name__)
    options: dict[str, Any] = {}
    if sys.version_info >= (3, 14):  # which would evaluate all annotations
        options["annotation_format"] = annotationlib.Format.FORWARDREF
    try:
        called = inspect.signature(handler, follow_wrapped=False, **options)
        parameter = next(iter(inspect.signature(handler, **options).parameters.values()), None)
    except ValueError:  # it is written in C
        return None
    try:
        called.bind(None)
    except TypeError:
        raise TypeError(f"{name}{called}: a handler takes one message") from None
    for other in called.parameters.values():
        if isinstance(other.default, (Dependency, Param)):
            raise TypeError(f"{name}{called}: a handler takes one message, and no dependencies")
    annotation = parameter.annotation if parameter is not None else None
    function: Any = inspect.unwrap(getattr(handler, "func", handler))  # of a functools.partial
    if not inspect.isroutine(function):
        function = type(function).__call__
    names = {"WebSocketMessage": WebSocketMessage, **getattr(function, "__globals__", {})}
    try:
        annotation = getattr(annotation, "__forward_arg__", annotation)
        if isinstance(annotation, str):
            annotation = eval(annotation, names)
        if not _mentions_payload(annotation):
            return None
        return _Validator(annotation, "invalid_payload")
    except Exception as error:
        text = f"{name}: {annotation!r} cannot be read; is each name in it defined by now?"
        raise NameError(text) from error


def _mentions_payload(annotation: Any) -> bool:
    """Tell whether an annotation has a `WebSocketMessage[type]` in it; NameError for a text."""
    if isinstance(annotation, (str, ForwardRef)):
        raise NameError(annotation)
    for name in ("__value__", "__supertype__", "__bound__"):  # of `type`, NewType, TypeVar
        annotation = getattr(annotation, name, None) or annotation
    if inspect.isclass(annotation) and issubclass(annotation, WebSocketMessage):
        return annotation is not WebSocketMessage
    if get_origin(annotation) is Annotated:
        return _mentions_payload(get_args(annotation)[0])
    return any(_mentions_payload(part) for part in get_args(annotation))


def get_handlers(handler_type: HandlerType = HandlerType.SERVER) -> dict[str, _Handler]:
    """Return the handlers of one type, those of BOTH among them, by event name."""
    return {name: handler for name, (handler, *_) in _handlers[handler_type].items()}


def _find_handler(event_name: str) -> tuple[str, _Registered | None]:
    """Return the event whose handler runs for this one, itself or `$default`, and that handler."""
    handlers = _handlers[HandlerType.SERVER]
    if event_name not in handlers and not event_name.startswith("$"):
        event_name = "$default"
    return event_name, handlers.get(event_name)


async def handle_msg(message: WebSocketMessage) -> WebSocketMessage | None:
    """Run a message's handler and return its answer; without a handler, the message is that.

    Raises:
        InvalidMessageFormat: the payload is not of the type that the handler's annotation names.
        TypeError: the handler returned something that is neither a `WebSocketMessage` nor None.
    """
    event_name, registered = _find_handler(message.event_name)
    if registered is None:
        return None if message.event_name.startswith("$") else message
    handler, runs_in_loop, validator = registered
    if validator is not None:
        message = validator(_encode(message))
    with _handler_seconds.labels(event_name).time():
        answer = handler(message) if runs_in_loop else await run_in_threadpool(handler, message)
        if inspect.isawaitable(answer):
            answer = await answer
    if answer is not None and not isinstance(answer, WebSocketMessage):
        raise TypeError(f"expected a WebSocketMessage or None, got {type(answer).__name__}")
    return answer


@websocket_handler("whoami")
async def _whoami_handler(message: WebSocketMessage) -> WebSocketMessage:
    return create_message("whoami", message.from_id, message.from_id)


class _Numbers(BaseModel):
    numbers: list[Annotated[float, Field(allow_inf_nan=False)]]


_validate_numbers = _Validator(WebSocketMessage[_Numbers], "invalid_payload")


@websocket_handler("sum_event")
async def sum_handler(message: WebSocketMessage) -> WebSocketMessage:
    """Answer `{"numbers": [...]}` with their sum, a float (`math.fsum`), or an error message."""
    try:
        numbers = _validate_numbers(_encode(message)).payload.numbers
        return create_message("sum_handler_result", math.fsum(numbers), message.from_id)
    except InvalidMessageFormat as error:
        text = str(error)
    except OverflowError:
        text = "payload.numbers: Sum should be a finite number"
    _errors_total.labels("invalid_payload").inc()
    return create_error_message(text, message.from_id, "invalid_payload")


# ---- Metrics -------------------------------------------------------------------------------------

_MetricT = TypeVar("_MetricT", Counter, Gauge, Histogram)
_ERROR_TYPES = (
    "invalid_message", "invalid_payload", "unknown_recipient", "handler_error", "rate_limited",
    "message_too_big", "slow_client", "origin_refused", "unauthorized", "too_many_clients",
    "admin_unauthorized", "redis",
)  # fmt: skip


def _declare(kind: type[_MetricT], name: str, text: str, *labels: str, **options: Any) -> _MetricT:
    """Register a metric, or share that of a second copy of this file, or of its reload."""
    registered: dict[str, Any] = getattr(REGISTRY, "_names_to_collectors", {})
    return registered.get(f"datadivr_{name}") or kind(f"datadivr_{name}", text, labels, **options)


_connected = _declare(Gauge, "clients", "Clients connected now.", multiprocess_mode="livesum")
_connections_total = _declare(Counter, "connections_total", "Clients that connected.")
_disconnections_total = _declare(Counter, "disconnections_total", "Clients that went.", "reason")
_received_total = _declare(Counter, "messages_received_total", "Messages from clients.")
_sent_total = _declare(Counter, "messages_sent_total", "Messages delivered, one per client.")
_bytes_sent_total = _declare(Counter, "bytes_sent_total", "Bytes of the frames sent to clients.")
_errors_total = _declare(Counter, "errors_total", "Errors.", "type")
_unsent_bytes_max = _declare(
    Gauge, "unsent_bytes_max", "Bytes unsent to the slowest client.", multiprocess_mode="livemax"
)
_build_info = _declare(
    Gauge, "build_info", "1, by version.", "version", multiprocess_mode="livemax"
)
_build_info.labels(__version__).set(1)
_handler_seconds = _declare(Histogram, "handler_seconds", "Seconds in a handler.", "event_name")

# A series that is there from the start, at 0, shows its first event as an increase.
for _reason in ("client", "admin", "slow_client", "keepalive", "message_too_big", "server_stop"):
    _disconnections_total.labels(_reason)
for _type in _ERROR_TYPES:
    _errors_total.labels(_type)
for _event_name in _handlers[HandlerType.SERVER]:
    _handler_seconds.labels(_event_name)


def _collect_metrics() -> CollectorRegistry:
    """Return this process's metrics, or, with `PROMETHEUS_MULTIPROC_DIR`, all live workers'."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return REGISTRY
    # A worker that was killed leaves its gauges. (On Windows, to ask for it would be Ctrl+C.)
    for path in Path(folder).glob("gauge_live*_[0-9]*.db") if os.name == "posix" else ():
        with suppress(PermissionError):  # it runs, as another user
            try:
                os.kill(int(path.stem.rpartition("_")[2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


# ---- Frames --------------------------------------------------------------------------------------

# A frame's first byte: FIN, the opcode (RFC 6455, 5.2), RSV1 where it is compressed (RFC 7692, 6).
_TEXT, _COMPRESSED_TEXT = 0x81, 0xC1
_WINDOW_BITS = 12  # of clients that can share a compressed frame; uvicorn agrees to no more
_Framing = Callable[[bytes], bytes]


def _frame(payload: bytes, first: int = _TEXT) -> bytes:
    """Frame a payload without a mask: the same bytes for every client (RFC 6455, 5.2)."""
    length = len(payload)
    if length < 126:
        return bytes((first, length)) + payload
    if length < 65536:
        return struct.pack("!BBH", first, 126, length) + payload
    return struct.pack("!BBQ", first, 127, length) + payload


def _frame_compressed(payload: bytes) -> bytes:
    """Frame a payload, compressed without the context of those before it (RFC 7692, 7.2.1)."""
    if len(payload) >= _settings.compress_min_bytes:
        compressor = zlib.compressobj(1, wbits=-_WINDOW_BITS)
        compressed = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
        compressed = compressed.removesuffix(b"\x00\x00\xff\xff")
        if len(compressed) < len(payload):
            return _frame(compressed, _COMPRESSED_TEXT)
    return _frame(payload)


def _end_line(payload: bytes) -> bytes:
    """Mark a payload's end, for servers that make the frames themselves: JSON has no line feed."""
    return payload + b"\n"


# ---- Connections ---------------------------------------------------------------------------------


class _UvicornConnection:
    """What carries frames to a client of uvicorn's WebSocket protocol: its asyncio transport.

    Nothing else in this file touches what is private to uvicorn and websockets. Where something
    of it is not there, to make one raises AttributeError.
    """

    __slots__ = ("_protocol", "framing", "is_closing", "unsent", "write")

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        # Bound, since a flush calls them for every client. uvloop raises where a transport that
        # is closing is asked what is unsent, or written to.
        self.is_closing: Callable[[], bool] = protocol.transport.is_closing
        self.unsent: Callable[[], int] = protocol.transport.get_write_buffer_size
        self.write: Callable[[bytes], None] = protocol.transport.write
        self.framing: _Framing = _frame
        # uvicorn writes its pongs past our limit: a client that does not read them is not read
        # either. (This stays set on uvicorn's protocol for wsproto, though the probe below fails.)
        limit = _settings.max_buffer_bytes
        protocol.transport.set_write_buffer_limits(limit, limit)
        protocol.pause_writing = self._pause
        protocol.resume_writing = self._resume
        self._resume()
        connection = protocol.conn
        # A probe for what is used later: AttributeError here leads to `_AsgiConnection`.
        self.close_reason()
        protocol.receive, protocol.transport.abort, connection.send_close  # noqa: B018
        connection.data_to_send  # noqa: B018
        for extension in connection.extensions if _settings.compress_min_bytes else ():
            if extension.local_max_window_bits >= _WINDOW_BITS:  # it is permessage-deflate
                # What uvicorn itself compresses for this client must need no context either.
                extension.local_no_context_takeover = True
                vars(extension).pop("encoder", None)
                self.framing = _frame_compressed
        # websockets inflates all frames of one read before this file sees the first of them.
        limit = _settings.max_message_bytes
        connection.max_message_size = min(connection.max_message_size or limit, limit)

    def receive(self) -> Awaitable[Message]:
        message: Awaitable[Message] = self._protocol.receive()
        return message

    def abort(self) -> None:
        self._protocol.transport.abort()

    def _pause(self) -> None:
        self._protocol.writable.clear()  # uvicorn's `send`, which a host's endpoint may call, waits
        self._protocol.transport.pause_reading()

    def _resume(self) -> None:
        self._protocol.writable.set()
        if not self._protocol.read_paused:  # by uvicorn, whose queue is not empty
            self._protocol.transport.resume_reading()

    def close(self, code: int, reason: str) -> None:
        # websockets must know of it, or it answers the client's close frame with a second one, at
        # which browsers say 1006; and so must uvicorn's stop, which would send one of its own.
        connection = self._protocol.conn
        if connection.close_sent is None:  # as it is not where a handler has closed its WebSocket
            connection.send_close(code, reason)
            self.write(b"".join(connection.data_to_send()))
            self._protocol.shutdown = self._protocol.transport.close

    def close_reason(self) -> str:
        """Return why the connection ended, unless it was this file that closed it."""
        close_sent = self._protocol.conn.close_sent
        if close_sent is None or self._protocol.conn.close_rcvd_then_sent:
            return "client"
        reasons = {1009: "message_too_big", 1011: "keepalive", 1012: "server_stop"}
        return reasons.get(close_sent.code, "client")

    def finish(self) -> None:
        """Tell uvicorn that it is closed: its stop would send a frame after the client's own."""
        self._protocol.close_sent = True

    @staticmethod
    def finish_refusal(receive: Receive) -> None:
        """Say that a handshake was answered, or uvicorn logs an error for each refused client."""
        protocol: Any = getattr(receive, "__self__", None)
        if getattr(protocol, "initial_response", None):
            protocol.handshake_complete = True


class _AsgiConnection:
    """What carries frames to a client of any other server: ASGI's `send`, in a task a client."""

    def __init__(self, websocket: WebSocket, protocol: Any) -> None:
        self.framing: _Framing = _end_line
        self._websocket = websocket
        self._transport = getattr(protocol, "transport", None)  # uvicorn's with --ws wsproto
        self._is_closed = False
        self._unsent = 0
        self._queue: asyncio.Queue[bytes | tuple[int, str]] = asyncio.Queue()
        self._reader: asyncio.Future[Any] = asyncio.Future()
        self._writer = asyncio.create_task(self._write_queue())
        self.is_closing: Callable[[], bool] = self._writer.done
        self.close_reason: Callable[[], str] = lambda: "client"

    async def receive(self) -> Message:
        """Return the next ASGI message, or a disconnect once this side has closed."""
        reader = asyncio.ensure_future(self._websocket.receive())
        self._reader = reader
        try:
            await asyncio.wait((reader, self._writer), return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and not self._is_closed:
                return reader.result()
        finally:
            reader.cancel()
        await asyncio.wait((self._writer,))
        return {"type": "websocket.disconnect"}

    def unsent(self) -> int:
        if self._transport is None or self._transport.is_closing():
            return self._unsent
        return self._unsent + int(self._transport.get_write_buffer_size())

    def write(self, data: bytes) -> None:
        self._unsent += len(data)
        self._queue.put_nowait(data)

    def close(self, code: int, reason: str) -> None:
        self._queue.put_nowait((code, reason))

    def abort(self) -> None:
        self._writer.cancel()
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        self._writer.cancel()
        self._reader = asyncio.ensure_future(self._read_rest())

    async def _read_rest(self) -> None:
        """Read what nobody will look at: hypercorn cannot close before it has passed that on."""
        with suppress(TimeoutError, RuntimeError):  # which receive raises once the client has gone
            async with asyncio.timeout(_CLOSE_SECONDS):
                while True:
                    await self._websocket.receive()

    async def _write_queue(self) -> None:
        try:
            while isinstance(data := await self._queue.get(), bytes):
                for text in data.decode().split("\n")[:-1]:
                    await self._websocket.send_text(text)
                self._unsent -= len(data)
            self._is_closed = True
            self._reader.cancel()  # or granian never sends the close frame
            await self._websocket.close(*data)
        except Exception as error:  # servers differ in what a send to a client that went raises
            _log.debug("asgi_send_failed", error=repr(error))


def _open_connection(websocket: WebSocket) -> _UvicornConnection | _AsgiConnection:
    receive = getattr(websocket, "_receive", None)  # under uvicorn, its protocol's method
    protocol = getattr(receive, "__self__", None)
    try:
        return _UvicornConnection(protocol)
    except AttributeError:
        hint = "full speed needs uvicorn's default WebSocket protocol, and its `receive` unwrapped"
        _warn("fanout_through_asgi", server=type(protocol or receive).__module__, hint=hint)
        return _AsgiConnection(websocket, protocol)


# ---- Clients -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False, weakref_slot=True)
class Client:
    """One connected client, for users to read; from `connection` on, it is not for them."""

    id: str  # a UUID
    node: str  # the process that holds it: the first 32 bits of the id
    address: str  # host and port of its end of the connection
    connected_at: str  # in UTC, as ISO 8601
    websocket: WebSocket  # Starlette's: its headers, and `state` for what is known of it
    connection: _UvicornConnection | _AsgiConnection
    messages_received: int = 0
    messages_sent: int = 0  # to it
    left_because: str = ""  # a reason that the metrics count, once it has left
    is_closed: bool = False  # by this side, so that what it still sends is ignored
    second_began: float = -math.inf
    messages_this_second: int = 0

    @property
    def buffered_bytes(self) -> int:
        """Bytes that were written to it and that its socket has not yet taken."""
        return 0 if self.connection.is_closing() else self.connection.unsent()

    @property
    def user(self) -> str | None:
        """Who it is, where `websocket.state.user` says so: 128 characters of its `str`."""
        user = getattr(self.websocket.state, "user", None)
        with suppress(Exception):  # of a `str` that is the project's own
            return None if user is None else str(user)[:128].encode(errors="replace").decode()
        return None

    def exceeds_rate(self) -> bool:
        """Count a message; tell whether it is more than `max_messages_per_second` allows."""
        limit = _settings.max_messages_per_second
        if not limit:
            return False
        now = time.monotonic()
        if now - self.second_began >= 1:
            self.second_began = now
            self.messages_this_second = 0
        self.messages_this_second += 1
        if self.messages_this_second <= limit:
            return False
        if self.messages_this_second == limit + 1:  # it is told once a second
            _report(self.id, "rate_limited", f"More than {limit} messages a second: dropped.")
        else:
            _errors_total.labels("rate_limited").inc()
        return True


class _Clients(dict[str, Client]):
    """Clients by id, in the order in which they came.

    `clients[id]` finds one that has left, too, as long as its handlers run; `in` does not.
    """

    def __init__(self) -> None:
        self.left: WeakValueDictionary[str, Client] = WeakValueDictionary()

    def __missing__(self, client_id: str) -> Client:
        return self.left[client_id]


_UNKNOWN_RECIPIENT = "unknown_recipient", "No client with the id in `to` is connected."
_CLIENT_ID = re.compile(r"([0-9a-f]{8})-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
clients = _Clients()


# ---- Fan-out -------------------------------------------------------------------------------------

_GATHER_CLIENTS = 16  # with fewer, a turn of the loop costs more than a second write per client
_GATHER_TURNS = 8
_GATHER_BYTES = 16384  # with more, clients would have nothing to do while they wait
_SWEEP_SECONDS = 1.0
_CLOSE_SECONDS = 2.0  # how long a client has to read what is unsent and to answer a close frame


class _Turn:
    """What was published since the last flush, mostly in one turn of the event loop.

    Every client gets the same bytes, unless it has *edits*: a place in the turn, and a message to
    put in before the one that is there, or None to leave that out. So a turn costs one write
    per client, not one per message, and all clients see one order.
    """

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.edits: dict[Client, list[tuple[int, bytes | None]]] = {}
        self.size = 0  # bytes of all messages, those to one client among them
        # By framing: the frames of all messages, and where each starts.
        self.shared: dict[_Framing, bytes] = {}
        self._starts: dict[_Framing, list[int]] = {}

    def add(self, message: bytes, left_out: Client | None = None) -> None:
        if left_out is not None:
            self.edits.setdefault(left_out, []).append((len(self.messages), None))
        self.messages.append(message)
        self.size += len(message)

    def add_for(self, client: Client, message: bytes) -> None:
        self.edits.setdefault(client, []).append((len(self.messages), message))
        self.size += len(message)

    def frames_for(self, client: Client) -> tuple[bytes, int]:
        """Return the frames that a client gets, and how many messages these are."""
        framing = client.connection.framing
        if framing not in self.shared:
            frames = [framing(message) for message in self.messages]
            self.shared[framing] = b"".join(frames)
            self._starts[framing] = list(itertools.accumulate(map(len, frames), initial=0))
        joined, count = self.shared[framing], len(self.messages)
        if client not in self.edits:
            return joined, count
        starts = self._starts[framing]
        view = memoryview(joined)
        parts: list[bytes | memoryview] = []
        next_place = 0
        for place, message in self.edits[client]:
            parts.append(view[starts[next_place] : starts[place]])
            if message is None:
                next_place = place + 1  # the message there is left out
                count -= 1
            else:
                next_place = place
                parts.append(framing(message))
                count += 1
        parts.append(view[starts[next_place] :])
        return b"".join(parts), count


class _Room:
    """Who is connected to this process, and when a turn is written to them. There is one.

    It lives in one event loop. Nothing is locked: whatever calls it runs in that loop.
    """

    def __init__(self) -> None:
        self.loop: Any = None
        self.node = ""  # this process's part of its clients' ids
        self.arriving = 0  # clients that are being accepted
        self.turn = _Turn()

    def enter(self) -> None:
        """Move into the running event loop: RuntimeError where clients are in another one."""
        loop = asyncio.get_running_loop()
        if loop is self.loop:
            return
        if clients and not self.loop.is_closed():
            hint = "in tests, write `with TestClient(app) as client:`"
            raise RuntimeError(f"clients are connected in another event loop; {hint}")
        clients.clear()
        _connected.set(0)
        self.loop = loop
        self.node = secrets.token_hex(4)
        self.turn = _Turn()
        loop.call_later(_SWEEP_SECONDS, self._sweep, self.node)
        _peers.start()

    def join(self, client: Client) -> None:
        self.flush()  # what was published before it came is not for it
        clients[client.id] = client
        _connected.inc()
        _connections_total.inc()
        _log.info("client_connected", client_id=client.id, address=client.address)

    def publish(self, to: str, message: bytes, sender: Client | None = None) -> int:
        """Send a message to the clients that `to` names here, and return how many these are."""
        was_empty = not self.turn.size
        count = 1
        if to in clients:
            self.turn.add_for(clients[to], message)
        elif to in _EVERYBODY and clients:
            left_out = clients.get(sender.id) if to == "others" and sender is not None else None
            self.turn.add(message, left_out)
            count = len(clients) if left_out is None else len(clients) - 1
        else:
            return 0
        if was_empty:
            self.loop.call_soon(self._tick, self.turn.size, _GATHER_TURNS)
        return count

    def _tick(self, previous_size: int, turns_left: int) -> None:
        """Flush, or wait for one more turn of the loop while each of them brings more messages."""
        grows = previous_size < self.turn.size < _GATHER_BYTES
        if grows and turns_left and len(clients) >= _GATHER_CLIENTS:
            self.loop.call_soon(self._tick, self.turn.size, turns_left - 1)
        else:
            self.flush()

    def flush(self) -> None:
        """Write what was published to every client that keeps up."""
        if not self.turn.size:
            return
        turn, self.turn = self.turn, _Turn()
        recipients = clients.values() if turn.messages else turn.edits  # of direct messages alone
        edits, shared, limit = turn.edits, turn.shared, _settings.max_buffer_bytes
        sent = sent_bytes = 0
        for client in tuple(recipients):
            connection = client.connection
            if connection.is_closing() or connection.unsent() > limit:
                self.check(client)
                continue
            if client in edits or connection.framing not in shared:
                frames, count = turn.frames_for(client)
            else:  # most clients: the first with this framing has filled it
                frames, count = shared[connection.framing], len(turn.messages)
            connection.write(frames)
            client.messages_sent += count
            sent += count
            sent_bytes += len(frames)
        _sent_total.inc(sent)
        _bytes_sent_total.inc(sent_bytes)

    def check(self, client: Client) -> None:
        """Drop a client whose connection has ended, or who does not keep up."""
        if client.connection.is_closing():
            self.leave(client, client.connection.close_reason())
        elif client.buffered_bytes > _settings.max_buffer_bytes:
            self.leave(client, "slow_client", 1013, "Too slow: reconnect")
            _warn("slow_client_dropped", client_id=client.id, buffered_bytes=client.buffered_bytes)

    def _sweep(self, node: str) -> None:
        """Check all clients: uvicorn reports none that stalls while it goes, or that only pings."""
        if node == self.node:
            self.loop.call_later(_SWEEP_SECONDS, self._sweep, node)
            for client in tuple(clients.values()):
                self.check(client)
            unsent = (client.buffered_bytes for client in clients.values())
            _unsent_bytes_max.set(max(unsent, default=0))

    def leave(self, client: Client, reason: str, code: int = 0, text: str = "") -> None:
        """Forget a client, the one way out; a code closes it behind what was published so far."""
        if code:
            self.flush()
        if clients.pop(client.id, None) is None:
            return
        clients.left[client.id] = client
        self.turn.edits.pop(client, None)
        client.left_because = reason
        client.is_closed = bool(code)
        if code and not client.connection.is_closing():
            client.connection.close(code, text)
        # A client that does not read would keep its socket open for as long as it likes.
        self.loop.call_later(_CLOSE_SECONDS, client.connection.abort)
        _connected.dec()
        _disconnections_total.labels(reason).inc()
        if reason in _ERROR_TYPES:
            _errors_total.labels(reason).inc()
        _log.info("client_disconnected", client_id=client.id, reason=reason)


class _Peers:
    """The other processes of this server: none, unless `_Cluster` takes the place of this."""

    def start(self) -> None: ...
    async def wait_until_known(self) -> None: ...
    async def stop(self) -> None: ...

    def publish(self, to: str, message: bytes, asker_id: str) -> None:
        """Send a message to all their clients, or to an id; who asked is told if nobody has it."""
        if asker_id:
            _report(asker_id, *_UNKNOWN_RECIPIENT)

    async def ask(self, request: Sequence[Any]) -> tuple[list[Any], bool]:
        """Have all, or who holds a client, perform a request; tell if an answer is missing."""
        return [], False


_room = _Room()
_peers = _Peers()


def _publish(message: WebSocketMessage, sender: Client | None = None, asker_id: str = "") -> int:
    """Send a message to its `to`; the client `asker_id` is told if nobody has that id."""
    data = _encode(message)
    limit = _settings.max_message_bytes
    # 128 bytes more are for the keys that the server adds to what a client sent.
    is_too_big = len(data) > limit + 128 and message.from_id == asker_id
    if is_too_big and message.event_name not in _handlers[HandlerType.SERVER]:  # it is relayed
        text = f"The limit is {limit} bytes, as it would go out: dropped."
        _report(asker_id, "message_too_big", text)
        return 0
    count = _room.publish(message.to, data, sender)
    if message.to in _EVERYBODY:
        _peers.publish("all", data, "")  # their "others" too, for the sender is here
    elif not count:
        _peers.publish(message.to, data, asker_id)
    return count


def _report(client_id: str, code: str, text: str, **fields: Any) -> None:
    """Count and log an error of a client's, and tell it."""
    _errors_total.labels(code).inc()
    _warn(code, client_id=client_id, error=text, **fields)
    _publish(create_error_message(text, client_id, code))


async def broadcast(message: WebSocketMessage, sender: WebSocket | None = None) -> int:
    """Send a message to its `to`, and return how many clients of this process that addresses.

    "others" are all but `sender`, a client's WebSocket. No client is waited for; one that does not
    keep up is dropped (`DATADIVR_MAX_BUFFER_BYTES`). A plain function in a thread calls it with
    `anyio.from_thread.run(broadcast, message)`.

    Raises:
        PydanticSerializationError: the payload holds something that JSON cannot.
        RuntimeError: clients are connected in another event loop.
    """
    if _room.loop is not asyncio.get_running_loop():
        _warn("broadcast_to_nobody", hint="other programs send with POST /messages")
    _room.enter()
    client_id = sender.scope.get("datadivr.client_id", "") if sender is not None else ""
    return _publish(message, clients.get(client_id))


# ---- The WebSocket endpoint ----------------------------------------------------------------------

_YIELD_BYTES = 65536  # what one client may send, or 16 messages, before the others' turn comes
_WEB_SCHEMES = ("http", "https", "ws", "wss")


def _is_allowed_origin(text: str, connection: HTTPConnection) -> bool:
    """Tell whether a page's origin is listed, or of the host that its request is for."""
    with suppress(ValueError):  # the Origin, or the Host, is not valid
        origin = _normalise_origin(text)
        if origin in _settings.allowed_origins:
            return True
        scheme = origin.partition("://")[0]
        own = _normalise_origin(f"{scheme}://{connection.headers.get('host', '')}")
        if scheme in _WEB_SCHEMES and origin == own and not _is_rebound(connection):
            return True
    return "*" in _settings.allowed_origins


def _is_rebound(connection: HTTPConnection) -> bool:
    """Tell whether a request came in on a loopback address under a foreign name (DNS rebinding).

    Names that are not foreign are localhost, addresses, and the hosts of listed origins.
    """
    server, _ = connection.scope.get("server") or ("", 0)
    is_loopback = server.removeprefix("::ffff:").startswith("127.") or server == "::1"
    host = re.sub(r":\d+$", "", connection.headers.get("host", "localhost").lower()).rstrip(".")
    is_address = host.startswith("[") or host.replace(".", "").isdigit()
    is_local = is_address or host == "localhost" or host.endswith(".localhost")
    allowed = _settings.allowed_origins
    is_listed = "*" in allowed or host in [urlsplit(origin).hostname for origin in allowed]
    return is_loopback and not is_local and not is_listed


def _refuse(status: int, code: str, text: str, hint: str) -> HTTPException:
    """Count and log that a client may not come in; return what says so."""
    _errors_total.labels(code).inc()
    _warn(code, error=text, hint=hint)
    return HTTPException(status, text, {"WWW-Authenticate": "Bearer"} if status == 401 else None)


async def authorize_client(websocket: WebSocket) -> None:
    """Refuse a client of a foreign page (HTTPException 403), or without the token (401).

    A FastAPI dependency, which `app.dependency_overrides[authorize_client]` replaces. The `Origin`
    (RFC 6454) must be that of the request's `Host`, or listed (`DATADIVR_ALLOWED_ORIGINS`). The
    token comes in `Authorization: Bearer` or as the second of the subprotocols `["bearer", token]`.
    """
    origin = websocket.headers.get("origin")
    if origin is not None and not _is_allowed_origin(origin, websocket):
        hint = "add it to DATADIVR_ALLOWED_ORIGINS to let it in"
        raise _refuse(403, "origin_refused", f"Origin {origin} is not allowed.", hint)
    if _settings.client_token is not None:
        scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
        offered = websocket.scope.get("subprotocols", [])
        if scheme.lower() != "bearer" and len(offered) > 1:
            scheme, token = offered[:2]
        given = token.strip() if scheme.lower() == "bearer" else ""
        if not secrets.compare_digest(given.encode(), _settings.client_token.encode()):
            hint = "a client must bring DATADIVR_CLIENT_TOKEN"
            raise _refuse(401, "unauthorized", "A client token is needed.", hint)


async def websocket_endpoint(websocket: WebSocket) -> None:
    """Do `authorize_client`, then `handle_connection`; each may raise an HTTPException."""
    await authorize_client(websocket)
    await handle_connection(websocket)


def _format_address(websocket: WebSocket) -> str:
    client, port = websocket.client or ("", 0)
    host = client or ""  # uvicorn before 0.31 has None where it trusts the client's address
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port else host  # a proxy does not pass on the port


async def handle_connection(websocket: WebSocket, subprotocol: str | None = None) -> None:
    """Accept a client without asking who it is, and serve it until it goes.

    `subprotocol` is one that the client offered (RFC 6455, 1.9); "bearer", where that came first.

    Raises:
        HTTPException: 503, `DATADIVR_MAX_CLIENTS` are connected.
        RuntimeError: other clients are connected in another event loop.
    """
    _room.enter()
    if 0 < _settings.max_clients <= len(clients) + _room.arriving:
        text = f"{_settings.max_clients} clients are connected."
        raise _refuse(503, "too_many_clients", text, "DATADIVR_MAX_CLIENTS is the limit")
    if subprotocol is None and websocket.scope.get("subprotocols", [])[:1] == ["bearer"]:
        subprotocol = "bearer"
    _room.arriving += 1  # or more than DATADIVR_MAX_CLIENTS could come in at once
    try:
        await websocket.accept(subprotocol)
    finally:
        _room.arriving -= 1
    random = str(uuid.uuid4())  # the rest of a UUID of version 8 (RFC 9562, 5.8)
    client_id = f"{_room.node}{random[8:14]}8{random[15:]}"
    address = _format_address(websocket) or client_id
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    connection = _open_connection(websocket)
    client = Client(client_id, _room.node, address, now, websocket, connection)
    websocket.scope["datadivr.client_id"] = client_id
    _room.join(client)
    try:
        await _handle(client, WebSocketMessage(event_name="$connect"))
        await _read_messages(client)
    finally:
        _room.leave(client, client.connection.close_reason())
        client.connection.finish()
        went = WebSocketMessage(event_name="$disconnect", payload=client.left_because)
        await _handle(client, went)


async def _read_messages(client: Client) -> None:
    """Handle a client's messages, one after the other, until it goes."""
    allowance = _YIELD_BYTES
    limit = _settings.max_message_bytes
    while (event := await client.connection.receive())["type"] == "websocket.receive":
        data = event.get("text") or event.get("bytes") or ""  # hypercorn sends both keys
        allowance -= max(len(data), _YIELD_BYTES // 16)
        if allowance <= 0:  # a queue that is not empty lets nobody else run
            allowance = _YIELD_BYTES
            await asyncio.sleep(0)
            _room.check(client)
        if client.left_because == "slow_client":
            return  # who does not read is not read any more
        if client.is_closed:
            continue
        client.messages_received += 1
        _received_total.inc()
        # A character is up to 4 bytes of UTF-8.
        if len(data) * 4 > limit and len(data.encode() if isinstance(data, str) else data) > limit:
            _room.leave(client, "message_too_big", 1009, f"The limit is {limit} bytes")
            continue
        if client.exceeds_rate():
            continue
        try:
            message = parse_message(data)
        except InvalidMessageFormat as error:
            _report(client.id, error.code, str(error))
            continue
        await _handle(client, message)


async def _handle(client: Client, message: WebSocketMessage) -> None:
    """Run the handler of a client's message, or of its event, and publish the answer."""
    message.from_id = client.id
    try:
        if (answer := await handle_msg(message)) is not None:
            _publish(answer, client, client.id)
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # it is this connection that is cancelled, not what the handler awaited
        event_name, _ = _find_handler(message.event_name)
        if isinstance(error, InvalidMessageFormat) and error.code == "invalid_payload":
            _report(client.id, error.code, str(error), event_name=event_name)
            return
        text = f"The handler of {event_name!r} failed."
        _report(client.id, "handler_error", text, event_name=event_name, exc_info=True)


# ---- The admin API -------------------------------------------------------------------------------


class ClientInfo(BaseModel):
    """One connected client; `node` is the process that holds it."""

    id: str
    node: str
    address: str
    user: str | None = Field(None, description="What `websocket.state.user` says, if it is set.")
    connected_at: datetime
    messages_received: int
    messages_sent: int
    buffered_bytes: int = Field(description="Bytes unsent: how far it is behind.")


class ClientPage(BaseModel):
    """A page of the list of clients, oldest first."""

    total: int = Field(description="Clients connected now.")
    next: str | None = Field(description="The `after` of the next page; null on the last.")
    partial: bool = Field(description="Whether a node did not answer: its clients are missing.")
    clients: list[ClientInfo]


class Announcement(BaseModel):
    """A message from the server."""

    event_name: _UnreservedEventName
    payload: Any = None
    to: str = Field("all", description="`all`, `others` (the same here), or one client's id.")
    message: str | None = None


class Recipients(BaseModel):
    """How many clients a message was sent to, and whether a node did not answer."""

    recipients: int
    partial: bool


@cache
def _admin_token() -> str:
    """Return the admin API's token; where none is set, make one up and log it, once."""
    if _settings.admin_token is not None:
        return _settings.admin_token
    token = secrets.token_urlsafe(32)
    page = f"/console#token={token}"  # is signed in; what follows # goes to no server
    hint = "DATADIVR_ADMIN_TOKEN chooses it"
    _log.critical("admin_token_generated", token=token, console=page, hint=hint)  # at any level
    return token


_bearer = HTTPBearer(auto_error=False, description="The admin token, or that of /metrics.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _require_token(credentials: _Credentials, kind: str, *tokens: str) -> None:
    given = (credentials.credentials if credentials is not None else "").encode()
    if not any(secrets.compare_digest(given, token.encode()) for token in tokens):
        hint = "the admin's opens everything: DATADIVR_ADMIN_TOKEN, or the one in the log"
        raise _refuse(401, "admin_unauthorized", f"The {kind} token is needed.", hint)


async def authorize_admin(credentials: _Credentials) -> None:
    """Refuse who does not bring the admin token (HTTPException 401): a FastAPI dependency."""
    _require_token(credentials, "admin", _admin_token())


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    _format_uvicorns_log()  # which `uvicorn.run` has set since
    _admin_token()
    _room.enter()
    await _peers.wait_until_known()
    yield
    await _peers.stop()


def _perform(request: Sequence[Any]) -> Any:
    """Perform a request here, whichever process it came to; None if it is not for here.

    Its first word is what to do, its second who: "all" nodes, or the one that holds a client.
    """
    match request:
        case ["list", _, limit, after]:
            found = [(client.connected_at + client.id, client) for client in clients.values()]
            page = sorted(entry for entry in found if entry[0] > after)[: limit + 1]
            return len(clients), [[key, _describe_client(client)] for key, client in page]
        case ["publish", to, text] if to in clients or to in _EVERYBODY:
            return _room.publish(to, text.encode())
        case ["get", to] if to in clients:
            return _describe_client(clients[to])
        case ["disconnect", to] if to in clients:
            _room.leave(clients[to], "admin", 1008, "Disconnected by an administrator")
            return True
    return None


def _describe_client(client: Client) -> Any:
    return {name: getattr(client, name) for name in ClientInfo.model_fields}


async def _ask(*request: Any) -> tuple[list[Any], bool]:
    """Have all, or who holds a client, perform a request; tell if an answer is missing."""
    _room.enter()
    own_answer = _perform(request)
    others, partial = await _peers.ask(request)
    answers = [answer for answer in (own_answer, *others) if answer is not None]
    if not answers and partial:
        raise HTTPException(503, "The node that holds this client does not answer.")
    if not answers:
        raise HTTPException(404, "No client with this id is connected.")
    return answers, partial


# What the OpenAPI document says of answers that are raised, and of the body that is read by hand.
_DETAIL: dict[str, Any] = {"model": dict[str, Any]}
_BODY = {"schema": Announcement.model_json_schema(), "example": {"event_name": "news"}}
_FIND_REFUSALS: dict[int | str, Any] = {404: _DETAIL, 503: _DETAIL}
_PageSize = Annotated[int, Query(ge=1, le=1000)]
_OPENMETRICS = {"application/openmetrics-text": {"schema": {"type": "string"}}}
_After = Annotated[str, Query(pattern=r"^([0-9T:.-]{26}Z[0-9a-f-]{36})?$")]

router = APIRouter(lifespan=_lifespan)
_admin = APIRouter(dependencies=[Depends(authorize_admin)], responses={401: _DETAIL})


@_admin.get("/clients", response_model=ClientPage)
async def _list_clients(limit: _PageSize = 100, after: _After = "") -> Any:
    """List the connected clients, oldest first; `after` is the `next` of a page."""
    answers, partial = await _ask("list", "all", limit, after)
    found = sorted(itertools.chain.from_iterable(page for _, page in answers))
    return {
        "total": sum(count for count, _ in answers),
        "next": found[limit - 1][0] if len(found) > limit else None,
        "partial": partial,
        "clients": [client for _, client in found[:limit]],
    }


@_admin.get("/clients/{client_id}", response_model=ClientInfo, responses=_FIND_REFUSALS)
async def _get_client(client_id: str) -> Any:
    """Describe one connected client."""
    answers, _ = await _ask("get", client_id)
    return answers[0]


@_admin.delete("/clients/{client_id}", status_code=204, responses=_FIND_REFUSALS)
async def disconnect_client(client_id: str) -> None:
    """Disconnect a client, after what was already sent to it, with code 1008.

    Raises:
        HTTPException: 404, nobody has this id; 503, the node that has it does not answer.
    """
    await _ask("disconnect", client_id)


@_admin.post(
    "/messages",
    status_code=202,
    response_model=Recipients,
    responses=dict.fromkeys((400, 404, 413, 422, 503), _DETAIL),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": _BODY}}},
)
async def _post_message(request: Request) -> Any:
    """Send a message to all clients, or to one."""
    body = bytearray()
    try:
        # FastAPI would read all of it, and before it asks for the token.
        async for chunk in request.stream():
            body += chunk
            if len(body) > _settings.max_message_bytes:
                raise HTTPException(413, f"The limit is {_settings.max_message_bytes} bytes.")
        announcement = Announcement.model_validate_json(body)
    except ClientDisconnect:
        raise HTTPException(400, "The body ended early.") from None
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        faults = [{**detail, "loc": ("body", *detail["loc"])} for detail in details]
        raise RequestValidationError(faults) from None
    text = _encode(WebSocketMessage(**dict(announcement))).decode()
    counts, partial = await _ask("publish", announcement.to, text)
    return {"recipients": sum(counts), "partial": partial}


@router.head("/metrics", include_in_schema=False)
@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": _OPENMETRICS}, 401: {"content": {"application/json": {}}}},
    openapi_extra={"security": [{}]},  # DATADIVR_METRICS_TOKEN decides whether it needs a token
)
async def _get_metrics(request: Request, credentials: _Credentials) -> Response:
    """Report the metrics in Prometheus' text format, or in OpenMetrics where that is asked for."""
    if _settings.metrics_token is not None:
        _require_token(credentials, "metrics", _settings.metrics_token, _admin_token())
    elif _is_rebound(request):
        host = request.headers["host"]
        hint = "add http:// and the host to DATADIVR_ALLOWED_ORIGINS to let it in"
        raise _refuse(403, "origin_refused", f"Host {host} is not allowed.", hint)
    try:
        generate, content_type = choose_encoder(request.headers.get("accept", ""))
    except TypeError:  # it asks for a version that is no number
        generate, content_type = choose_encoder("")
    text = await asyncio.to_thread(lambda: generate(_collect_metrics()))  # files take their time
    return Response(text, media_type=content_type)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def _get_health(response: Response) -> dict[str, str]:
    """Say that the server answers, to pages from elsewhere too."""
    response.headers["Access-Control-Allow-Origin"] = "*"
    return {"status": "ok"}


@router.websocket("/ws", dependencies=[Depends(authorize_client)])
@router.websocket("/ws/", dependencies=[Depends(authorize_client)])
async def _serve_client(websocket: WebSocket) -> None:
    await handle_connection(websocket)


@router.get("/ws", include_in_schema=False)
async def _ask_for_upgrade() -> None:
    text = "Expected a WebSocket handshake: a proxy must pass on `Upgrade` and `Connection`."
    raise HTTPException(426, text, {"Upgrade": "websocket"})


@router.api_route("/console", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/console/", methods=["GET", "HEAD"], include_in_schema=False)
async def _get_console() -> HTMLResponse:
    """Serve the console: a page without data, which uses nothing but this API and its token."""
    sources = []
    for tag in ("script", "style"):
        text = _CONSOLE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    policy = (
        f"default-src 'none'; {'; '.join(sources)}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return HTMLResponse(_CONSOLE, headers=headers)


# ---- The application -----------------------------------------------------------------------------


async def _answer_refusal(connection: Any, error: Any) -> Any:
    """Answer an HTTPException, a WebSocket's too, as a Starlette before 0.41 does not."""
    response = await http_exception_handler(connection, error)
    if not isinstance(connection, WebSocket):
        return response
    await connection.send_denial_response(response)
    return None


class App(FastAPI):
    """A FastAPI application that serves clients of `/ws` without FastAPI's own stack.

    That saves a third of an idle client's memory. It is done innermost, so what wraps the stack
    sees these clients too (FastAPI's telemetry does not). With middleware, an override, a handler
    of exceptions or a route before `/ws`, the stack serves.
    """

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            is_websocket = scope["type"] == "websocket"
            if is_websocket and not self._needs_stack(scope):
                websocket = WebSocket(scope, receive, send)
                try:  # as `websocket_endpoint`, whose frame would stay for as long as the client
                    await authorize_client(websocket)
                    await handle_connection(websocket)
                except HTTPException as error:
                    await _answer_refusal(websocket, error)
            else:
                await stack(scope, receive, send)
                if is_websocket and isinstance(scope.get("endpoint"), StaticFiles | None):
                    _warn("no_such_path", path=scope["path"], hint="clients connect to /ws")
            _UvicornConnection.finish_refusal(receive)

        return serve

    def _needs_stack(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", "")).removesuffix("/")
        routes = self.router.routes[: len(_ROUTES[0])], router.routes[: len(_ROUTES[1])]
        is_changed = self.user_middleware or self.dependency_overrides or routes != _ROUTES
        return path != "/ws" or bool(is_changed) or self.exception_handlers != _EXCEPTION_HANDLERS


_DESCRIPTION = """
A WebSocket message server: clients connect to `/ws`, which stands beside this API for
administrators; where there is a client token, with the subprotocols `["bearer", token]`.

Over the WebSocket go messages of JSON, such as
`{"event_name": "chat", "payload": {"any": ["JSON"]}, "to": "others", "message": null}`.
Only `event_name` is required; `to` is `all`, `others` (the default) or one client's id. What
arrives has the sender's id as `from_id`, or `server`. The server answers `whoami` with a client's
own id, and an `error` says what was wrong with a message.
"""
router.include_router(_admin)
app = App(title="datadivr", version=__version__, description=_DESCRIPTION)
app.include_router(router)
app.add_exception_handler(StarletteHTTPException, _answer_refusal)
_ROUTES = list(app.router.routes), list(router.routes)
_EXCEPTION_HANDLERS = dict(app.exception_handlers)

# Code written for the package that this file implements imports `datadivr.transport.server` and the
# like. Run as a program, this is known under its own name too, or to import it made a second copy.
if __name__ in sys.modules:
    _name = __spec__.name if __spec__ else Path(__file__).stem
    _module = sys.modules[_name] = sys.modules[__name__]
    _server = ("transport", "transport.messages", "transport.models", "transport.server")
    for _path in (*_server, "handlers", "handlers.registry", "exceptions"):
        sys.modules[f"{_name}.{_path}"] = _module
        setattr(_module, _path.rpartition(".")[2], _module)

# ---- Cluster -------------------------------------------------------------------------------------

_LOST_SECONDS = 3  # without a word from Redis


class _Line(NamedTuple):
    """Text for one node, or for "all"; without text it is a barrier that its sender waits for."""

    node: str
    text: bytes
    asker_id: str  # who is told where nobody hears it
    heard_by: asyncio.Future[int | None]  # how many nodes; None where it is lost

    def finish(self, nodes: int | None) -> None:
        self.heard_by.set_result(nodes)
        if nodes is None and self.text:
            _errors_total.labels("redis").inc()
        if nodes == 0 and self.asker_id:
            _report(self.asker_id, *_UNKNOWN_RECIPIENT)


class _Cluster(_Peers):
    """The other processes ("nodes") that share a Redis, in which nothing is kept.

    Each subscribes to a channel of its own and to one of all. A message there is lines of text:
    the node that publishes, then any number of these, each of three words::

        all - {message}                for all clients
        CLIENT_ID ASKER_ID {message}   for one client; a - where nobody is to be told
        ask NUMBER [request]           for `_perform`
        answer NUMBER ...              what that returned, in JSON
    """

    def __init__(self, url: str) -> None:
        try:  # so configured, redis-py repeats nothing, and raises the first error
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff

            options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "decode_responses": False}
            options |= {"protocol": 2, "encoding": "utf-8", "socket_timeout": _LOST_SECONDS}
            if options.keys() & parse_qs(urlsplit(url).query).keys():
                raise ValueError  # redis-py would take the URL's
            self._redis: Any = Redis.from_url(url, **options)
            self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        except ImportError:
            text = "DATADIVR_REDIS_URL is set, but redis is not installed: pip install redis"
            raise RuntimeError(text) from None
        except Exception:  # redis-py raises much; what it says may show the URL, with its password
            text = f"expected a URL that redis-py can read, without {', '.join(options)}"
            raise ValueError(f"DATADIVR_REDIS_URL: {text}") from None
        database = self._redis.connection_pool.connection_kwargs.get("db") or 0
        self._prefix = f"{_settings.redis_prefix}:{database}"  # channels are of all databases
        self._answers: dict[int, asyncio.Queue[Any]] = {}  # by the number of what was asked

    def start(self) -> None:
        self._up = _declare(Gauge, "redis_up", "Whether Redis is up.", multiprocess_mode="livemin")
        self._is_lost = False  # nor is it known at first whether Redis is there
        self._waiting: list[_Line] = []  # until they are published
        self._waiting_bytes = 0
        self._has_waiting = asyncio.Event()
        self._task: asyncio.Task[None] = _room.loop.create_task(self._run())

    async def wait_until_known(self) -> None:
        if self._task.done():  # a lifespan has ended before in this event loop
            self.start()
        await asyncio.wait([self._add(_room.node, b"").heard_by])  # taken by Redis, or lost

    async def stop(self) -> None:
        await asyncio.wait([self._add(_room.node, b"").heard_by], timeout=1)
        while not self._task.done():  # before Python 3.13 a TaskGroup may swallow a cancel
            self._task.cancel()
            await asyncio.wait([self._task], timeout=0.1)
        self._is_lost = True
        await self._redis.aclose()

    def publish(self, to: str, message: bytes, asker_id: str) -> None:
        node = self._find_node(to)
        if node is None:
            super().publish(to, message, asker_id)
        else:
            self._add(node, f"{to} {asker_id or '-'} ".encode() + message, asker_id)

    async def ask(self, request: Sequence[Any]) -> tuple[list[Any], bool]:
        node = self._find_node(request[1])
        if node is None:
            return [], False
        number = secrets.randbits(32)
        queue = self._answers[number] = asyncio.Queue()
        answers: list[Any] = []
        try:
            async with asyncio.timeout(1):
                line = self._add(node, f"ask {number} {json.dumps(request)}".encode())
                nodes = await asyncio.shield(line.heard_by)  # it is set later all the same
                expected = (nodes or 0) - (1 if node == "all" else 0)  # all but this one
                while len(answers) < expected:
                    answers.append(await queue.get())
                return answers, nodes is None
        except TimeoutError:
            return answers, True
        finally:
            del self._answers[number]

    def _find_node(self, to: str) -> str | None:
        if to in _EVERYBODY:
            return "all"
        named = _CLIENT_ID.fullmatch(to)
        return named[1] if named and named[1] != _room.node else None

    def _add(self, node: str, text: bytes, asker_id: str = "") -> _Line:
        """Publish a line, with the others of this turn, unless it is lost."""
        line = _Line(node, text, asker_id, _room.loop.create_future())
        size = self._waiting_bytes + len(text)
        if self._is_lost or (self._waiting and size > _settings.max_buffer_bytes):
            line.finish(None)
        else:
            self._waiting.append(line)
            self._waiting_bytes = size
            self._has_waiting.set()
        return line

    async def _run(self) -> None:
        """Stay connected: after a loss, subscribe anew on new connections."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub, asyncio.TaskGroup() as tasks:
                    await self._join(pubsub)
                    tasks.create_task(self._listen(pubsub))
                    tasks.create_task(self._publish_waiting())
            except* Exception as errors:
                for line in self._waiting:
                    line.finish(None)
                self._waiting, self._waiting_bytes = [], 0
                if not self._is_lost:
                    error = errors.exceptions[0]
                    _errors_total.labels("redis").inc()
                    _log.warning("redis_lost", error=f"{type(error).__name__}: {error}")
                self._is_lost = True
                self._up.set(0)
            await asyncio.sleep(0.1)

    async def _join(self, pubsub: Any) -> None:
        async with asyncio.timeout(_LOST_SECONDS):
            info = await self._redis.info()
            if info["role"] != "master" or info.get("cluster_enabled"):
                raise ConnectionError("expected a primary, and none of a Redis Cluster")
            channels = [f"{self._prefix}:{node}" for node in ("all", _room.node)]
            await pubsub.subscribe(*channels)
            while not await self._redis.publish(channels[1], _room.node):
                pass  # it is not subscribed yet
        self._is_lost = False
        self._up.set(1)
        _log.info("redis_joined", node=_room.node)

    async def _publish_waiting(self) -> None:
        """Publish what waits in one pipeline; what comes meanwhile waits for the next."""
        while True:
            await self._has_waiting.wait()
            self._has_waiting.clear()
            by_node = itertools.groupby(self._waiting, lambda line: line.node)
            groups = [list(lines) for _, lines in by_node]
            pipeline = self._redis.pipeline(transaction=False)
            for lines in groups:
                data = b"\n".join((_room.node.encode(), *(line.text for line in lines)))
                pipeline.publish(f"{self._prefix}:{lines[0].node}", data)
            for lines, nodes in zip(groups, await pipeline.execute(False), strict=True):
                del self._waiting[: len(lines)]
                for line in lines:
                    self._waiting_bytes -= len(line.text)
                    line.finish(nodes if isinstance(nodes, int) else None)  # or it is an error

    async def _listen(self, pubsub: Any) -> None:
        """Take what the others publish, until nothing is heard for 3 s."""
        # Silences are counted, not timed: a process that was paused has not lost Redis, but has a
        # backlog. Until its PING is answered, it takes that no faster than its clients do.
        silent_seconds = 0
        patience = 0.0  # seconds that it may still wait for them
        while silent_seconds < _LOST_SECONDS:
            message = await pubsub.get_message(timeout=1)
            if message is None:
                silent_seconds += 1
                patience = _LOST_SECONDS
                await pubsub.ping()
                continue
            silent_seconds = 0
            if message["type"] == "message":
                self._take(message["data"])
                await asyncio.sleep(0)  # or nobody else runs while there is more to take
            else:
                patience = 0.0
            most = len(clients) * _settings.max_buffer_bytes / 4
            while patience > 0 and sum(client.buffered_bytes for client in clients.values()) > most:
                patience -= 0.01
                await asyncio.sleep(0.01)
        raise TimeoutError(f"nothing heard for {_LOST_SECONDS} s")

    def _take(self, data: bytes) -> None:
        """Act on the lines that a node has published."""
        node, *lines = data.split(b"\n")
        if node == _room.node.encode():
            return
        for line in lines or [b""]:  # to have no line is garbage too
            try:
                self._act(node.decode(), *line.split(b" ", 2))
            except Exception as error:  # it is not a line that a node publishes
                _errors_total.labels("redis").inc()
                _warn("redis_garbage", error=repr(error))

    def _act(self, node: str, to: bytes, about: bytes, body: bytes) -> None:
        if to == b"ask":
            answer = json.dumps(_perform(json.loads(body)))
            self._add(node, b"answer %b %b" % (about, answer.encode()))
        elif to == b"answer":
            answer = json.loads(body)
            if int(about) in self._answers:  # it may come too late
                self._answers[int(about)].put_nowait(answer)
        elif to != b"all" and not _CLIENT_ID.fullmatch(to.decode()):
            raise ValueError(f"expected all, ask, answer or a client's id, got {to[:36]!r}")
        elif not _room.publish(to.decode(), body) and about != b"-":
            _report(about.decode(), *_UNKNOWN_RECIPIENT)


if _settings.redis_url:
    _peers = _Cluster(_settings.redis_url)

# ---- Running it ----------------------------------------------------------------------------------


def main() -> None:
    """Run the server: `python datadivr.py [--host HOST] [--port PORT]`."""
    import uvicorn

    parser = argparse.ArgumentParser(description="A WebSocket message server with an admin API.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765)
    options: dict[str, Any] = {"ws_max_size": _settings.max_message_bytes}
    uvicorn.run(app, timeout_graceful_shutdown=5, **options, **vars(parser.parse_args()))


# ---- The console's page --------------------------------------------------------------------------

_CONSOLE = r"""<!doctype html>
<html lang="en">
  <meta charset="utf-8" />
  <meta name="viewport" content="width=device-width, initial-scale=1" />
  <title>datadivr console</title>
  <link rel="icon" href="data:," />
  <style>
    :root {
      color-scheme: light dark;
      --line: light-dark(#7f8e95, #62757d);
      --accent: light-dark(#0b6a73, #5ccdd4);
      --bad: light-dark(#b3261e, #ff9389);
      --space: 1rem;
      font-family: system-ui, sans-serif;
    }
    :where(figure, h1, h2, p, ul) {
      padding: 0;
      margin: 0;
      list-style: inside;
    }
    :is(.signed-in #login, body:not(.signed-in) .private) {
      display: none;
    }
    body {
      max-width: 80rem;
      padding: 0 var(--space) var(--space);
      margin: auto;
    }
    :where(header, main, form, search) {
      display: grid;
      grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr));
      gap: var(--space);
    }
    header {
      position: sticky;
      top: 0;
      grid-template-columns: 1fr auto;
      padding: 0.5rem 0;
      background: Canvas;
    }
    :is(h1, label, button, nav) {
      align-self: end;
    }
    .whole {
      grid-column: 1 / -1;
    }
    :where(.card, input, button) {
      box-sizing: border-box;
      padding: 0.75rem var(--space);
      border: 1px solid var(--line);
      border-radius: 0.5rem;
      background: Canvas;
      font: inherit;
      overflow: auto;
    }
    label > :not([type="checkbox"]) {
      width: 100%;
    }
    main form button {
      background: var(--accent);
      color: Canvas;
    }
    :is(h1, h2) {
      font: bold 1.125rem / 2 system-ui;
    }
    figcaption::first-line {
      font-size: 1.75rem;
    }
    :is(.bad, [aria-invalid="true"], form:has([aria-invalid="true"]) [role="status"]) {
      border-color: var(--bad);
      color: var(--bad);
    }
    table {
      width: 100%;
      border-collapse: collapse;
    }
    :is(th, td) {
      padding: 0.5rem var(--space) 0.5rem 0;
      border-bottom: 1px solid var(--line);
      text-align: left;
    }
    :is(th, td):nth-child(n + 4) {
      text-align: right;
    }
    :is(figcaption, th, td) {
      white-space: pre;
    }
  </style>
  <header>
    <h1>datadivr console</h1>
    <button id="leave" class="private">Sign out</button>
    <p id="status" class="whole" role="status">Connecting</p>
  </header>
  <main id="login">
    <form id="credentials" class="card whole" method="dialog">
      <label>Admin token <input id="token" type="password" autocomplete="off" required /></label>
      <p class="whole">DATADIVR_ADMIN_TOKEN, or the one in the server's log</p>
      <p id="refusal" class="bad whole" role="alert"></p>
      <button>Open the console</button>
    </form>
  </main>
  <main id="board" class="private">
    <figure class="card" aria-label="Clients connected" data-metric="clients"></figure>
    <figure class="card" aria-label="Messages in" data-metric="messages_received_total"></figure>
    <figure class="card" aria-label="Deliveries out" data-metric="messages_sent_total"></figure>
    <section class="card">
      <h2>Errors</h2>
      <ul id="errors"></ul>
      <p id="scope"></p>
    </section>
    <search id="filter" class="card whole">
      <h2 id="count" class="whole">Clients</h2>
      <label>Address, id or user <input id="search" type="search" /></label>
      <label><input id="slowest" type="checkbox" /> Most unsent bytes first</label>
      <nav aria-label="Pages of clients">
        <p id="place"></p>
        <button id="previous">Previous</button>
        <button id="next">Next</button>
      </nav>
    </search>
    <div class="card whole">
      <table id="table" aria-labelledby="count" tabindex="-1">
        <thead>
          <tr>
            <th scope="col">Client</th>
            <th scope="col">Node</th>
            <th scope="col">Since</th>
            <th scope="col">In</th>
            <th scope="col">Out</th>
            <th scope="col">Unsent bytes</th>
            <th scope="col">Actions</th>
          </tr>
        </thead>
        <tbody id="rows"></tbody>
      </table>
    </div>
    <form id="announcement" class="card whole" method="dialog">
      <h2 class="whole">Announcement</h2>
      <label>To: all, or a client's id <input id="to" name="to" value="all" required /></label>
      <label>Event name <input id="name" name="event_name" required /></label>
      <label>Message <input name="message" /></label>
      <label>Payload, in JSON <input name="payload" /></label>
      <button>Send</button>
      <p id="outcome" class="whole" role="status"></p>
    </form>
  </main>
  <dialog id="confirmation" class="card" aria-labelledby="question">
    <form method="dialog">
      <h2 id="question" class="whole"></h2>
      <button>Cancel</button>
      <button id="confirm" class="bad">Disconnect</button>
    </form>
  </dialog>
  <template id="chart">
    <figcaption></figcaption>
    <svg width="100%" height="60" viewBox="-120 0 120 1" preserveAspectRatio="none" fill="none">
      <polyline stroke="var(--accent)" stroke-width="2" vector-effect="non-scaling-stroke" />
    </svg>
  </template>
  <script>
    const ui = {};
    for (const element of document.querySelectorAll("[id]")) ui[element.id] = element;
    const root = new URL(location.pathname.endsWith("/") ? ".." : ".", location);
    const rowsPerPage = 20;
    const state = {
      token: "",
      timer: 0, // of the next refresh
      liveFrom: 0, // when the status may say "Live"; never, while the server is gone
      listDue: 0, // when to list the clients again
      clients: [], // as /clients lists them
      page: 0, // of the table
      samples: [], // of /metrics, two minutes back
    };
    const titleOf = ({ address, user, id }) => [address, user, id].filter(Boolean).join("\n");
    const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
    const format = (number) => number.toLocaleString([], { maximumFractionDigits: 1 });
    // JavaScript would round a large number: it goes out as it was typed.
    const keepNumber = (key, value, { source }) =>
      typeof value === "number" ? JSON.rawJSON(source) : value;

    async function request(path, options) {
      const { token } = state;
      const headers = { Authorization: `Bearer ${token}` };
      const signal = AbortSignal.timeout(5000);
      const response = await fetch(root + path, { ...options, headers, signal }).catch(() => null);
      const text = await response?.text().catch(() => null);
      if (typeof text !== "string") throw new Error("The server does not answer.");
      if (token !== state.token) throw new Error("Signed out.");
      if (response.ok) return text;
      if (response.status === 401) signOut("The server refuses this token.");
      throw explain(response, text);
    }

    function explain({ status, headers }, text) {
      const isJson = headers.get("Content-Type") === "application/json";
      const { detail = `The server answers ${status}.` } = isJson ? JSON.parse(text) : {};
      if (typeof detail === "string") return new Error(detail, { cause: status === 404 && "to" });
      const [{ loc, msg }] = detail;
      return new Error(`${loc.at(-1)}: ${msg}`, { cause: loc[1] }); // the field at fault
    }

    function start() {
      const [, token] = location.hash.split("#token=");
      history.replaceState(null, "", location.pathname); // nobody shall read the token there
      signIn(token ?? sessionStorage.getItem("datadivr") ?? "");
    }

    function signIn(token) {
      state.token = token;
      if (!/^[!-~]+$/.test(token)) signOut(token ? "The server refuses this token." : "");
      refresh();
    }

    function signOut(fault) {
      Object.assign(state, { token: "", listDue: 0, samples: [] });
      sessionStorage.removeItem("datadivr");
      document.body.className = "";
      showStatus("Signed out");
      ui.confirmation.close();
      ui.credentials.reset();
      ui.refusal.textContent = fault;
      ui.token.focus();
    }

    function showStatus(text, milliseconds = 0) {
      if (ui.status.textContent !== text) ui.status.textContent = text; // it is read aloud once
      state.liveFrom = performance.now() + milliseconds;
      ui.status.classList.toggle("bad", state.liveFrom === Infinity);
    }

    async function refresh() {
      clearTimeout(state.timer);
      if (state.token && !document.hidden) await load().catch(showGone);
      state.timer = setTimeout(refresh, 1000);
    }

    async function load() {
      await loadFigures();
      if (performance.now() > state.listDue) await loadClients();
      sessionStorage.setItem("datadivr", state.token);
      document.body.className = "signed-in";
      if (state.liveFrom === Infinity) showStatus("The server is back.", 10000);
      if (performance.now() > state.liveFrom) showStatus("Live");
    }

    function showGone({ message }) {
      if (!state.token) return;
      const last = state.samples.at(-1)?.moment ?? "never";
      showStatus(`${message} Trying again every second. Last figures: ${last}.`, Infinity);
    }

    async function loadClients() {
      const pages = [];
      for (let after = ""; after !== null; after = pages.at(-1).next) {
        pages.push(JSON.parse(await request(`clients?limit=1000&after=${after}`)));
      }
      state.clients = pages.flatMap((page) => page.clients);
      state.listDue = performance.now() + 2000 + state.clients.length; // long lists cost more
      showTotals(pages.some((page) => page.partial));
      showClients();
    }

    function showTotals(isPartial) {
      const [own, all] = [state.samples.at(-1).clients, state.clients.length];
      const text = `Figures and errors are of one process or machine: ${own} of ${all} clients.`;
      ui.scope.textContent = Math.abs(own - all) > all / 100 ? text : ""; // some come and go
      const rest = isPartial ? ". Some nodes did not answer." : "";
      ui.count.textContent = `Clients: ${format(all)}${rest}`;
    }

    async function loadFigures() {
      const text = await request("metrics");
      const now = { at: performance.now() / 1000, moment: new Date().toLocaleString(), errors: {} };
      const lines = text.matchAll(/^datadivr_(\w+)(?:\{type="(.*)"\})? (\S+)$/gm);
      for (const [, name, type, value] of lines) {
        // Prometheus escapes a label's text as JSON does.
        if (name === "errors_total") now.errors[JSON.parse(`"${type}"`)] = Number(value);
        else now[name] = Number(value);
      }
      state.samples = state.samples.filter(({ at }) => at > now.at - 120).concat(now);
      document.querySelectorAll("figure").forEach(drawChart);
      showErrors();
    }

    function valuesOf(metric) {
      return state.samples.map((sample, index) => {
        const before = state.samples[index - 1] ?? sample; // the first has no rate
        if (!metric.endsWith("_total")) return sample[metric];
        // A counter that went down belongs to a server that was started again.
        return Math.max(0, sample[metric] - before[metric]) / (sample.at - before.at || 1);
      });
    }

    function drawChart(figure) {
      if (!figure.hasChildNodes()) figure.append(ui.chart.content.cloneNode(true));
      const [caption, svg] = figure.children;
      const unit = figure.dataset.metric.endsWith("_total") ? "/s" : "";
      const values = valuesOf(figure.dataset.metric);
      const most = Math.max(...values);
      const x = (index) => state.samples[index].at - state.samples.at(-1).at;
      const y = (value) => 0.95 - (0.9 * value) / (most || 1);
      const points = values.map((value, index) => `${x(index)},${y(value)}`);
      svg.firstElementChild.setAttribute("points", points.slice(1).join(" "));
      const [now, peak] = [values.at(-1), most].map((value) => format(value) + unit);
      caption.textContent = `${now}\n${figure.ariaLabel}\npeak ${peak} in two minutes`;
    }

    function showErrors() {
      const [first, last] = [state.samples[0].errors, state.samples.at(-1).errors];
      const types = Object.keys(last).filter((type) => last[type] > 0);
      const recent = (type) => Math.max(0, last[type] - (first[type] ?? 0));
      const texts = types.map((type) => `${type}: ${last[type]}, ${recent(type)} in two minutes`);
      if (texts.length === 0) texts.push("None");
      ui.errors.replaceChildren(...texts.map((textContent) => make("li", { textContent })));
    }

    function showClients(page = state.page) {
      // A button that is held down, or gets the focus back from the dialog, must not vanish.
      if (ui.rows.matches(":active") || ui.confirmation.open) return;
      const text = ui.search.value.toLowerCase();
      const found = state.clients.filter((client) => titleOf(client).toLowerCase().includes(text));
      if (ui.slowest.checked) found.sort((one, other) => other.buffered_bytes - one.buffered_bytes);
      const lastPage = Math.max(0, Math.ceil(found.length / rowsPerPage) - 1);
      state.page = Math.max(0, Math.min(page, lastPage));
      const first = rowsPerPage * state.page;
      const shown = found.slice(first, first + rowsPerPage);
      const place = `${first + 1}\u2013${first + shown.length} of ${format(found.length)}`;
      ui.place.textContent = shown.length > 0 ? place : "No clients";
      ui.previous.disabled = state.page === 0;
      ui.next.disabled = state.page === lastPage;
      const focused = ui.rows.querySelector(":focus");
      ui.rows.replaceChildren();
      shown.forEach(addRow);
      if (focused) (document.getElementById(focused.id) ?? ui.table).focus({ preventScroll: true });
    }

    function addRow(client) {
      const row = ui.rows.insertRow();
      const counts = [client.messages_received, client.messages_sent, client.buffered_bytes];
      for (const cell of [titleOf(client), client.node, new Date(client.connected_at), ...counts]) {
        row.insertCell().textContent = cell.toLocaleString();
      }
      row.cells[0].role = "rowheader";
      const message = makeButton("Message", client, writeTo);
      row.insertCell().append(message, " ", makeButton("Disconnect", client, disconnect));
    }

    function makeButton(textContent, client, action) {
      const ariaLabel = `${textContent} ${client.address}`;
      const onclick = () => action(client);
      return make("button", { id: textContent + client.id, textContent, ariaLabel, onclick });
    }

    function writeTo({ id }) {
      ui.to.value = id;
      ui.name.focus();
    }

    function disconnect({ id, address }) {
      ui.question.textContent = `Disconnect ${address}? It may connect again.`;
      ui.confirmation.showModal();
      ui.confirm.onclick = async () => {
        const answer = request(`clients/${id}`, { method: "DELETE" });
        await answer.catch(({ message }) => showStatus(`${address}: ${message}`, 10000));
        state.listDue = 0;
      };
    }

    async function announce() {
      const fields = Object.fromEntries(new FormData(ui.announcement));
      showOutcome("");
      try {
        const payload = JSON.parse(fields.payload || "null", keepNumber);
        const body = JSON.stringify({ ...fields, message: fields.message || null, payload });
        const answer = JSON.parse(await request("messages", { method: "POST", body }));
        const count = `${answer.recipients}${answer.partial ? " or more" : ""}`;
        showOutcome(`“${fields.event_name}” reached clients: ${count}.`);
      } catch (error) {
        const name = error instanceof SyntaxError ? "payload" : error.cause;
        showOutcome(error.message, ui.announcement.elements[name]);
      }
    }

    function showOutcome(text, fault) {
      for (const field of ui.announcement.elements) field.ariaInvalid = field === fault;
      ui.outcome.textContent = text;
      fault?.setAttribute("aria-describedby", "outcome");
      fault?.focus();
    }

    window.onhashchange = start;
    ui.credentials.onsubmit = () => signIn(ui.token.value.trim());
    ui.announcement.onsubmit = announce;
    ui.leave.onclick = () => signOut("");
    ui.filter.oninput = () => showClients(0);
    ui.previous.onclick = () => showClients(state.page - 1);
    ui.next.onclick = () => showClients(state.page + 1);
    start();
  </script>
</html>
"""

if __name__ == "__main__":
    main()
