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
reads what the client sends. `parse_message` makes a `WebSocketMessage` of it, and `_handle` runs
the handler of its event. `_send_answer` sends what that returns, and `_relay` sends a message
without a handler as it is. `_Hub.publish` adds both to a `_Batch`, which holds the messages of one
turn of the event loop, or of a few. Then `_Hub.flush` writes the batch to each client at once,
through a `_UvicornConnection` or an `_AsgiConnection`. `_OtherNodes` takes the messages to the
other processes, if there are any.
"""

import argparse
import asyncio
import base64
import difflib
import hashlib
import inspect
import ipaddress
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import secrets
import struct
import sys
import time
import uuid
import warnings
import zlib
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache, partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import MethodType
from typing import Annotated, Any, Generic, Literal, NamedTuple, cast
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
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError, Url
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketState
from typing_extensions import TypeVar

__all__ = [
    "Announcement", "App", "Client", "ClientInfo", "ClientPage", "HandlerType",
    "InvalidMessageFormat", "Recipients", "WebSocketMessage", "app", "authorize_admin",
    "authorize_client", "broadcast", "clients", "create_error_message", "create_message",
    "disconnect_client", "get_handlers", "handle_connection", "handle_msg", "join_room",
    "leave_room", "list_clients", "main", "parse_message", "router", "sum_handler",
    "websocket_endpoint", "websocket_handler",
]  # fmt: skip
__version__ = "1.0.0"

# ---- Settings and logging ------------------------------------------------------------------------

# Text that fits both an Authorization header and a WebSocket subprotocol (RFC 9110, 5.6.2). A file
# with a secret often ends with a line feed, which is not part of it.
_Token = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"), BeforeValidator(str.strip)]


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
    """The secrets and limits of one process, each from the variable ``DATADIVR_<NAME>``."""

    admin_token: _Token | None = None  # of the admin API; without it a random one is made
    client_token: _Token | None = None  # clients must send it
    metrics_token: _Token | None = None  # /metrics asks for it, or for the admin token
    allowed_origins: _Origins = ()  # of pages on other hosts, separated by commas; "*" is any
    max_message_bytes: _Positive = 1024 * 1024  # of one message, in UTF-8
    max_messages_per_second: _Limit = 0  # from one client; the server drops the others
    max_clients: _Limit = 0  # connected at once
    max_buffer_bytes: _Positive = 4 * 1024 * 1024  # unsent to one client; more: removed
    compress_min_bytes: _Limit = 1024  # messages of this size or more are compressed; 0: none
    redis_url: Annotated[str, Field(pattern="^(rediss?|unix)://")] | None = None
    redis_prefix: str = "datadivr"  # of the channels' names: one for each installation
    log_level: Annotated[_Level, BeforeValidator(str.upper)] = "INFO"
    log_format: Annotated[Literal["console", "json"], BeforeValidator(str.lower)] = "console"


def _read_settings(environ: Mapping[str, str]) -> _Settings:
    """Read the settings from variables; a ValueError names each wrong one, and shows no secret."""
    # An empty variable counts as unset. An empty token is an error: its secret was not injected.
    variables = {name: text for name, text in environ.items() if text or name.endswith("_TOKEN")}
    try:
        return _Settings.model_validate(variables)
    except ValidationError as error:
        faults = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            is_secret = name.endswith(("TOKEN", "REDIS_URL")) and variables[name] != ""
            came = "" if is_secret else f" (it is {variables[name]!r})"
            faults.append(f"{name}: {detail['msg']}{came}")
        raise ValueError("; ".join(faults)) from None


@cache
def _settings() -> _Settings:
    """Return the settings, read from the environment at the first use and not at the import."""
    return _read_settings(os.environ)


_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"  # ISO 8601, in UTC


class _LastResort(logging.StreamHandler[Any]):
    """Writes records to standard output where the host has no handler that takes them.

    `logging` calls its handler of last resort only where it finds no other one. So each line is
    written once, whenever the host configures `logging`.
    """

    takes_all = False  # or the records of all loggers, and not of `datadivr` alone
    previous = logging.lastResort

    def handle(self, record: logging.LogRecord) -> Any:
        if self.takes_all or record.name == "datadivr":
            return super().handle(record)
        if self.previous is not None and record.levelno >= self.previous.level:
            return self.previous.handle(record)
        return False


class _Formatter(logging.Formatter):
    """Formats the records of all loggers as structlog does, for people or in JSON."""

    def __init__(self) -> None:
        super().__init__()
        # Its default formatter of tracebacks shows local variables, and so payloads.
        self.renderer: Any = structlog.dev.ConsoleRenderer(
            colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        if _settings().log_format == "json":
            self.renderer = structlog.processors.JSONRenderer()

    def format(self, record: logging.LogRecord) -> str:
        event = {"event": record.getMessage(), **getattr(record, "datadivr", {})}
        event["level"] = record.levelname.lower()
        event["timestamp"] = datetime.fromtimestamp(record.created, UTC).strftime(_TIME_FORMAT)
        if record.exc_info:
            lines = self.formatException(record.exc_info).split("\n")
            event["exception"] = "\n".join(map(_escape, lines))
        return str(self.renderer(None, "", event))


@cache
def _last_resort() -> _LastResort:
    """Put the handler of last resort in place; in JSON, have it write all lines of the process."""
    handler = logging.lastResort = _LastResort(sys.stdout)
    handler.setFormatter(_Formatter())
    is_configured = structlog.is_configured() or logging.getLogger().handlers
    if _settings().log_format == "json" and not is_configured:
        handler.takes_all = True
        # `logging.captureWarnings` would add a handler that hides them.
        warnings.showwarning = cast(Any, _log_warning)
        for name in ("uvicorn", "uvicorn.access"):
            for uvicorn_handler in logging.getLogger(name).handlers:
                # A formatter of the user's stays.
                if type(uvicorn_handler.formatter).__module__ == "uvicorn.logging":
                    uvicorn_handler.setFormatter(handler.formatter)
    return handler


def _log_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
    text = warnings.formatwarning(message, category, filename, lineno)
    logging.getLogger("py.warnings").warning("%s", text.strip())


def _escape(value: Any) -> Any:
    """Escape the control characters of a text: it may come from anybody, and go to a terminal."""
    if not isinstance(value, str) or value.isprintable():
        return value
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in value)


def _log(level: str, event: str, exc_info: BaseException | None = None, **fields: Any) -> None:
    """Log by the host's structlog if it is configured by now, otherwise by `logging`.

    Formatters of `logging` get a line of text; the fields are in the record's `datadivr`.
    """
    printable = {name: _escape(value) for name, value in fields.items()}
    with suppress(Exception):  # a log that cannot be written must not cost a client its connection
        if structlog.is_configured():
            if exc_info is not None:
                printable["exc_info"] = exc_info
            getattr(structlog.get_logger("datadivr"), level)(event, **printable)
            return
        logger = logging.getLogger("datadivr")
        if logger.level == logging.NOTSET:
            logger.setLevel(_settings().log_level)
        logger.disabled = False  # `dictConfig` disables the loggers that it finds
        _last_resort()
        line = " ".join([event, *(f"{name}={value!r}" for name, value in fields.items())])
        extra = {"datadivr": {"event": event, **printable}}
        getattr(logger, level)("%s", line, exc_info=exc_info, extra=extra)


_logged_at: dict[tuple[str, object], float] = {}


def _warn(event: str, level: str = "warning", **fields: Any) -> None:
    """Log what any client can cause: once a minute at its level, otherwise at DEBUG."""
    key = event, fields.get("event_name")  # one handler's faults must not hide another's
    now = time.monotonic()
    if now - _logged_at.get(key, -math.inf) < 60:
        level = "debug"
    else:
        _logged_at[key] = now
    _log(level, event, **fields)


@cache
def _check_environment() -> None:
    """Warn once of settings that are probably wrong."""
    settings = _settings()
    variables = [str(field.alias) for field in _Settings.model_fields.values()]
    for variable in os.environ.keys() - set(variables):
        for meant in difflib.get_close_matches(variable.upper(), variables, 1, 0.89):
            _log("critical", "unknown_setting", variable=variable, hint=f"is {meant} meant?")
    if settings.max_buffer_bytes < settings.max_message_bytes:
        hint = "DATADIVR_MAX_BUFFER_BYTES should be at least DATADIVR_MAX_MESSAGE_BYTES"
        _log("warning", "small_buffer", hint=hint)
    is_reloaded = {"--reload", "dev"} & set(sys.argv)  # one server, which runs in a child process
    is_worker = multiprocessing.parent_process() is not None and not is_reloaded
    has_workers = os.environ.get("WEB_CONCURRENCY", "1") != "1"
    runs_in_gunicorn = os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn")
    if settings.redis_url is None and (is_worker or has_workers or runs_in_gunicorn):
        hint = "if there are several workers, they are one server only with DATADIVR_REDIS_URL"
        _log("warning", "processes_are_apart", hint=hint)
    if settings.redis_url is not None and settings.admin_token is None:
        hint = "each process makes up an admin token of its own; set DATADIVR_ADMIN_TOKEN"
        _log("warning", "admin_tokens_differ", hint=hint)


# ---- Metrics -------------------------------------------------------------------------------------

_MetricT = TypeVar("_MetricT", Counter, Gauge, Histogram)
_ERROR_TYPES = (
    "invalid_message", "invalid_payload", "unknown_recipient", "not_in_room", "refused",
    "handler_error", "rate_limited", "message_too_big", "slow_client", "origin_refused",
    "unauthorized", "forbidden", "too_many_clients", "admin_unauthorized", "redis",
)  # fmt: skip


def _declare(kind: type[_MetricT], name: str, text: str, *labels: str, **options: Any) -> _MetricT:
    """Register a metric, or return the one that another copy or load of this file registered."""
    registered: dict[str, Any] = getattr(REGISTRY, "_names_to_collectors", {})
    return registered.get(f"datadivr_{name}") or kind(f"datadivr_{name}", text, labels, **options)


_connected = _declare(Gauge, "clients", "Clients connected now.", multiprocess_mode="livesum")
_rooms_gauge = _declare(Gauge, "rooms", "Rooms with clients in them.", multiprocess_mode="livesum")
_connections_total = _declare(Counter, "connections_total", "Clients that connected.")
_disconnections_total = _declare(Counter, "disconnections_total", "Clients that went.", "reason")
_received_total = _declare(Counter, "messages_received_total", "Messages from clients.")
_sent_total = _declare(Counter, "messages_sent_total", "Messages delivered, one per client.")
_bytes_sent_total = _declare(Counter, "bytes_sent_total", "Bytes of the frames sent to clients.")
_errors_total = _declare(Counter, "errors_total", "Errors.", "type")
_unsent_bytes_max = _declare(
    Gauge, "unsent_bytes_max", "Bytes unsent to the slowest client.", multiprocess_mode="livemax"
)
_build_info = _declare(Gauge, "build_info", "Version.", "version", multiprocess_mode="livemax")
_build_info.labels(__version__).set(1)
_handler_seconds = _declare(Histogram, "handler_seconds", "Seconds in a handler.", "event_name")

# A series that is there from the start, at 0, shows its first event as an increase.
for _reason in ("client", "admin", "slow_client", "keepalive", "message_too_big", "server_stop"):
    _disconnections_total.labels(_reason)
for _type in _ERROR_TYPES:
    _errors_total.labels(_type)


def _collect_metrics() -> CollectorRegistry:
    """Return this process's metrics, or, with `PROMETHEUS_MULTIPROC_DIR`, all live workers'."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return REGISTRY
    # A killed worker leaves its gauges. (On Windows, `os.kill` would stop a live worker.)
    gauges = Path(folder).glob("gauge_live*_[0-9]*.db") if os.name == "posix" else ()
    for path in gauges:
        with suppress(PermissionError):  # it runs, as another user
            try:
                os.kill(int(path.stem.rpartition("_")[2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
    registry = CollectorRegistry()
    collector: Any = MultiProcessCollector
    collector(registry, folder)
    return registry


# ---- Messages ------------------------------------------------------------------------------------

_EVERYBODY = ("all", "others")
_EventName = Annotated[str, Field(min_length=1, max_length=128)]
_UnreservedEventName = Annotated[_EventName, Field(pattern=r"^[^$]")]
_PayloadT = TypeVar("_PayloadT", default=Any)
_MessageId = Annotated[int, Field(strict=True)] | Annotated[str, Field(max_length=128)]
_ROOM_NAME = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\ud800-\udfff/#]{1,100}")


class _RoomNameError(HTTPException, ValueError):
    """A ValueError that refuses the message of the client that chose the room's name."""

    def __init__(self, text: str) -> None:
        super().__init__(422, text)

    def __str__(self) -> str:
        return str(self.detail)


def _check_room(room: Any, error: type[ValueError] = ValueError) -> str:
    """Return a room's name; raise an error if it is not valid."""
    if not isinstance(room, str) or not _ROOM_NAME.fullmatch(room):
        text = "a room's name of 1 to 100 characters, without white space, control characters, /, #"
        raise error(f"expected {text}; got {room!r}")
    return room


def _check_to(to: str) -> str:
    """Return what a message is addressed to; raise ValueError if its room's name is not valid."""
    if to[:1] == "#":
        _check_room(to[1:])
    return to


class InvalidMessageFormat(ValueError):
    """Says which fields are wrong; `code` is "invalid_message" or "invalid_payload"."""

    def __init__(self, text: str, code: str = "invalid_message") -> None:
        super().__init__(text)
        self.code = code


class WebSocketMessage(BaseModel, Generic[_PayloadT]):
    """One message: JSON with five keys, and a sixth, `id`, if that is set."""

    event_name: _EventName  # 1 to 128 characters; those that begin with "$" are the server's own
    payload: _PayloadT = cast(Any, None)  # any JSON, or `WebSocketMessage[type]`
    # "others" (all but the sender), "all", the id of one client, or "#" and the name of a room.
    to: Annotated[str, AfterValidator(_check_to)] = "others"
    from_id: str = "server"  # or the id of the client that sent it
    message: str | None = None  # a sentence for people
    id: _MessageId | None = None  # the sender's mark for this message; the answer has it too


class _ClientMessage(WebSocketMessage):
    event_name: _UnreservedEventName
    to: str = "others"  # `parse_message` checks it: a validator in Python would be slower


_Validate = Callable[[str | bytes], Any]


def _describe_faults(error: ValidationError) -> str:
    """Name the wrong fields in 500 characters at most; few of pydantic's texts quote a value."""
    if error.error_count() > 20:  # a megabyte can hold a hundred thousand
        return f"{error.error_count()} fields are wrong"
    faults = []
    for detail in error.errors(include_input=False, include_url=False):
        place = ".".join(map(str, detail["loc"])) or "message"
        faults.append(f"{place}: {detail['msg']}")
    return "; ".join(faults)[:500]


# The method `validate_json` of the adapter itself would take half a microsecond more.
_validate_client_message: _Validate = TypeAdapter(_ClientMessage).validator.validate_json


def parse_message(data: str | bytes) -> WebSocketMessage:
    """Make a message of the JSON that a client sent.

    Raises:
        InvalidMessageFormat: it is not a message; the text names the fields that are wrong.
    """
    try:
        message: WebSocketMessage = _validate_client_message(data)
        _check_to(message.to)
        return message
    except ValidationError as error:
        raise InvalidMessageFormat(_describe_faults(error)) from None
    except ValueError as error:
        raise InvalidMessageFormat(f"to: {error}"[:500]) from None


_event_name: TypeAdapter[Any] = TypeAdapter(_EventName)
_message_id: TypeAdapter[Any] = TypeAdapter(_MessageId)


def _read_about(data: str | bytes) -> WebSocketMessage:
    """Read the event and the id of what may be no message, as far as they are right."""
    about = WebSocketMessage.model_construct(event_name="", id=None)
    with suppress(ValueError, RecursionError):  # it is no JSON
        found = json.loads(data)  # which takes lone surrogates, as pydantic does not
        for name, adapter in (("event_name", _event_name), ("id", _message_id)):
            with suppress(ValidationError, TypeError, KeyError):
                setattr(about, name, adapter.validate_python(found[name]))
    return about


def _to_list(value: Any) -> Any:
    """Return what numpy's and pandas' values are in Python; TypeError for other foreign types."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__}")


# Makes bytes, where `model_dump_json` makes text. NaN and infinity become null.
_to_json = TypeAdapter(WebSocketMessage).serializer.to_json
_payload_to_json = TypeAdapter(Any).serializer.to_json
_WITHOUT_ID = {"id"}


def _encode(message: WebSocketMessage) -> bytes:
    """Return a message as JSON.

    Raises:
        PydanticSerializationError: JSON cannot hold its payload; the text names place and type.
    """
    left_out = _WITHOUT_ID if message.id is None else None
    try:
        return _to_json(message, by_alias=True, exclude=left_out, fallback=_to_list)
    except PydanticSerializationError as error:
        place, value = _find_unencodable(message.payload, "payload")
        text = f"{place}: {type(value).__name__} cannot go out as JSON: {error}"
        raise PydanticSerializationError(text) from None


@cache
def _check_type(kind: type) -> None:
    """Raise TypeError unless messages of this type can go out whole."""
    if not issubclass(kind, WebSocketMessage):
        raise TypeError(f"expected a WebSocketMessage, got {kind.__name__}")
    if own := kind.model_fields.keys() - WebSocketMessage.model_fields.keys():
        raise TypeError(f"{kind.__name__}: {', '.join(sorted(own))} belongs in `payload`")


def _find_unencodable(value: Any, place: str) -> tuple[str, Any]:
    """Return the innermost part that JSON cannot hold, and where it is."""
    for _ in range(20):  # a list that contains itself has no innermost part
        parts: Any = value if isinstance(value, list | tuple) else ()
        named = dict(value) if isinstance(value, Mapping | BaseModel) else dict(enumerate(parts))
        for name, part in named.items():
            try:
                _payload_to_json(part, fallback=_to_list)
            except PydanticSerializationError:
                value, place = part, f"{place}.{name}"
                break
        else:
            break
    return place, value


def create_message(
    event_name: str,
    payload: Any,
    to: str,
    message: str | None = None,
    id: int | str | None = None,
) -> WebSocketMessage:
    """Make a message from the server.

    Raises:
        ValueError: a field is wrong, such as a room's name in `to` (pydantic's ValidationError).
    """
    return WebSocketMessage(event_name=event_name, payload=payload, to=to, message=message, id=id)


def create_error_message(
    error_msg: str, to: str, code: str = "error", id: int | str | None = None
) -> WebSocketMessage:
    """Make an `error` message: a sentence in `message`, and a `code` for programs in `payload`."""
    return create_message("error", {"code": code}, to, error_msg, id)


# ---- Handlers ------------------------------------------------------------------------------------

_Answer = WebSocketMessage | None
_Handler = Callable[[WebSocketMessage], _Answer | Awaitable[_Answer]]
_HandlerT = TypeVar("_HandlerT", bound=_Handler)


class HandlerType(Enum):
    """Where a handler runs: in this server (SERVER, BOTH), or in a client (CLIENT, BOTH).

    This file has no client. One of your own in Python finds its handlers with `get_handlers`.
    """

    SERVER = "server"
    CLIENT = "client"
    BOTH = "both"


class _Registered(NamedTuple):
    handler: _Handler
    runs_in_loop: bool  # or in a thread
    validate: _Validate | None  # makes its messages of JSON; None where it takes any
    seconds: Histogram


_handlers: dict[HandlerType, dict[str, _Registered]] = {kind: {} for kind in HandlerType}
_server_handlers = _handlers[HandlerType.SERVER]
_replaced_events: list[str] = []  # logged when the server starts, and not at the import


def websocket_handler(
    event_name: str, handler_type: HandlerType = HandlerType.SERVER
) -> Callable[[_HandlerT], _HandlerT]:
    """Register the decorated function for an event; the last registration of a name wins.

    The function takes a `WebSocketMessage`. It returns None, or a message that is sent to its `to`;
    there "others" and a room leave out the client whose message the function was given. A
    coroutine function runs in the event loop and must not block it. A plain function runs in one
    of AnyIO's 40 threads. A client that connects or leaves has the event `$connect` or
    `$disconnect`; `$default` is any event without a handler of its own. A function whose parameter
    is annotated `WebSocketMessage[type]` runs for such payloads alone; for others the sender gets
    an `invalid_payload`. If it raises an HTTPException, the sender gets a `refused`.

    Raises:
        TypeError: it is written without parentheses, or the function does not take one message.
        ValueError: no message can have this name.
        NameError: an annotation names something that is not defined, or not yet.
    """
    if not isinstance(event_name, str):
        raise TypeError(f'write @websocket_handler("event"), got {event_name!r} as the event')
    if not re.fullmatch(r"\$connect|\$disconnect|\$default|[^$][\s\S]{0,127}", event_name):
        expected = "$connect, $disconnect, $default, or 1 to 128 characters that begin without $"
        raise ValueError(f"expected {expected}, got {event_name!r}")

    def register(handler: _HandlerT) -> _HandlerT:
        seconds = _handler_seconds.labels(event_name)
        registered = _Registered(handler, _runs_in_loop(handler), _make_validator(handler), seconds)
        if event_name in _handlers[HandlerType.BOTH]:  # it is replaced wherever it is
            for handlers in _handlers.values():
                handlers.pop(event_name, None)
            _replaced_events.append(event_name)
        for kind in HandlerType if handler_type is HandlerType.BOTH else (handler_type,):
            if event_name in _handlers[kind]:
                _replaced_events.append(event_name)
            _handlers[kind][event_name] = registered
        return handler

    return register


def _runs_in_loop(handler: _Handler) -> bool:
    """Tell whether a handler is a coroutine function; TypeError if it is a generator function."""
    function: Any = handler.func if isinstance(handler, partial) else handler
    if not inspect.isroutine(function):
        function = type(function).__call__
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{_name_of(handler)}: a handler returns a message, and yields none")
    return inspect.iscoroutinefunction(function)


def _make_validator(handler: _Handler) -> _Validate | None:
    """Return what makes a handler's messages of JSON; None where it takes them as they came."""
    name = _name_of(handler)
    try:
        called = inspect.signature(handler, follow_wrapped=False)  # `bind` needs the outer one
        parameters = [*inspect.signature(handler, eval_str=True).parameters.values()]
    except ValueError:  # it is written in C, and has no annotations
        return None
    except Exception as error:
        text = f"{name}: {error}; its annotations must name what is defined when it is registered"
        raise NameError(text) from error
    try:
        called.bind(None)
    except TypeError:
        raise TypeError(f"{name}{called}: a handler takes one message") from None
    if any(isinstance(parameter.default, Dependency | Param) for parameter in parameters):
        raise TypeError(f"{name}{called}: a handler takes one message, and no dependencies")
    # A decorator may give its function more than the message: the parameter that both name alike.
    outer = next(iter(called.parameters), "")
    named = {parameter.name: parameter.annotation for parameter in parameters}
    annotation = named.get(outer, next(iter(named.values()), Any))
    if annotation in (inspect.Parameter.empty, Any, WebSocketMessage):
        return None
    try:
        validate: _Validate = TypeAdapter(annotation).validator.validate_json
    except (NameError, PydanticUserError) as error:
        text = f"{name}: {error}; its annotations must name what is defined when it is registered"
        raise NameError(text) from error
    return validate


def _name_of(handler: _Handler) -> str:
    return getattr(handler, "__name__", type(handler).__name__)


def get_handlers(handler_type: HandlerType = HandlerType.SERVER) -> dict[str, _Handler]:
    """Return the handlers of one type, those of BOTH among them, by event name."""
    return {name: registered.handler for name, registered in _handlers[handler_type].items()}


def _find_handler(event_name: str) -> tuple[str, _Registered | None]:
    """Return the event under which a handler is registered, this one or `$default`, and it."""
    if event_name not in _server_handlers and not event_name.startswith("$"):
        event_name = "$default"
    return event_name, _server_handlers.get(event_name)


def _validate_payload(validate: _Validate, message: WebSocketMessage) -> Any:
    try:
        return validate(_encode(message))
    except ValidationError as error:
        raise InvalidMessageFormat(_describe_faults(error), "invalid_payload") from None


async def _run_handler(
    registered: _Registered, message: WebSocketMessage
) -> tuple[WebSocketMessage, _Answer]:
    """Run a handler; return the message that it was given, and its answer."""
    handler, runs_in_loop, validate, seconds = registered
    if validate is not None:
        message = _validate_payload(validate, message)
        if not isinstance(message, WebSocketMessage):
            kind = type(message).__name__
            raise TypeError(f"{_name_of(handler)}: its annotation makes a {kind} of a message")
    began = time.perf_counter()
    try:
        answer = handler(message) if runs_in_loop else await run_in_threadpool(handler, message)
        if inspect.isawaitable(answer):
            answer = await answer
    finally:
        seconds.observe(time.perf_counter() - began)
    if answer is not None:
        _check_type(type(answer))
    return message, answer


async def handle_msg(message: WebSocketMessage) -> WebSocketMessage | None:
    """Run a message's handler and return its answer; without a handler, return the message.

    Raises:
        InvalidMessageFormat: the payload is not of the type that the handler's annotation names.
        TypeError: the handler returned something that is neither a `WebSocketMessage` nor None.
    """
    _, registered = _find_handler(message.event_name)
    if registered is None:
        return None if message.event_name.startswith("$") else message
    _, answer = await _run_handler(registered, message)
    return answer


@websocket_handler("whoami")
async def _whoami_handler(message: WebSocketMessage) -> WebSocketMessage:
    return create_message("whoami", message.from_id, message.from_id)


class _Numbers(BaseModel):
    numbers: list[Annotated[float, Field(allow_inf_nan=False)]]


_validate_numbers: _Validate = TypeAdapter(WebSocketMessage[_Numbers]).validator.validate_json


@websocket_handler("sum_event")
async def sum_handler(message: WebSocketMessage) -> WebSocketMessage:
    """Answer `{"numbers": [...]}` with their sum, a float (`math.fsum`), or an error message."""
    try:
        parsed = _validate_payload(_validate_numbers, message)
        total = math.fsum(parsed.payload.numbers)
        return create_message("sum_handler_result", total, message.from_id)
    except InvalidMessageFormat as error:
        text = str(error)
    except OverflowError:
        text = "payload.numbers: Sum should be a finite number"
    _errors_total.labels("invalid_payload").inc()
    _warn("invalid_payload", event_name=message.event_name, error=text)
    answer = create_error_message(text, message.from_id, "invalid_payload")
    answer.payload["event_name"] = message.event_name
    return answer


# ---- Frames --------------------------------------------------------------------------------------

# A frame's first byte: FIN, the opcode (RFC 6455, 5.2), RSV1 where it is compressed (RFC 7692, 6).
_TEXT, _COMPRESSED_TEXT = 0x81, 0xC1
_WINDOW_BITS = 12  # the smallest window for which frames are compressed; uvicorn offers 12
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
    """Frame a payload, compressed without the context of earlier payloads (RFC 7692, 7.2.1)."""
    if len(payload) >= _settings().compress_min_bytes:
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

_CLOSE_SECONDS = 2.0  # for a client to read what is unsent, and to answer a close frame
_CLOSE_REASONS = {1009: "message_too_big", 1011: "keepalive", 1012: "server_stop"}


class _UvicornConnection:
    """Carries frames to a client of uvicorn's WebSocket protocol, through its asyncio transport.

    Only this class, and `_pause` and `_resume` below it, use private parts of uvicorn and
    websockets. If one is missing, the constructor raises AttributeError before it changes anything.
    """

    __slots__ = ("_protocol", "framing", "is_closing", "unsent", "write")

    # The parts of uvicorn's protocol (0.50 to 0.54), its transport, and its connection, which is
    # websockets' (13 to 17), that this class uses.
    _look_at_parts = attrgetter(
        *("receive", "read_paused", "writable", "close_sent", "shutdown", "handshake_complete"),
        *("transport.is_closing", "transport.get_write_buffer_size", "transport.write"),
        *("transport.set_write_buffer_limits", "transport.pause_reading", "transport.abort"),
        *("transport.resume_reading", "transport.close", "conn.send_close", "conn.data_to_send"),
        *("conn.close_sent", "conn.close_rcvd_then_sent", "conn.extensions"),
    )

    def __init__(self, protocol: Any) -> None:
        self._look_at_parts(protocol)
        connection = protocol.conn
        size = "max_message_size" if hasattr(connection, "max_message_size") else "max_size"
        largest = getattr(connection, size)  # websockets before 16 has the second name
        self._protocol = protocol
        # Bound, since a flush calls them for every client. uvloop raises where a transport that
        # is closing is asked what is unsent, or written to.
        self.is_closing: Callable[[], bool] = protocol.transport.is_closing
        self.unsent: Callable[[], int] = protocol.transport.get_write_buffer_size
        self.write: Callable[[bytes], None] = protocol.transport.write
        self.framing: _Framing = _frame
        for extension in connection.extensions if _settings().compress_min_bytes else ():
            if extension.local_max_window_bits >= _WINDOW_BITS:  # it is permessage-deflate
                # What uvicorn itself compresses for this client must need no context either.
                extension.local_no_context_takeover = True
                vars(extension).pop("encoder", None)
                self.framing = _frame_compressed
        # websockets inflates all frames of one read before this file sees the first of them.
        limit = _settings().max_message_bytes
        setattr(connection, size, min(largest or limit, limit))
        self.pause_reading_while_unsent(protocol)

    @staticmethod
    def pause_reading_while_unsent(protocol: Any) -> None:
        """Stop reading from a client that does not read, while its unsent bytes are at the limit.

        uvicorn answers pings past this file, and would keep an answer to each in memory.
        """
        _resume(protocol)  # it fails here if a part is missing, before a method is replaced
        protocol.pause_writing = MethodType(_pause, protocol)
        protocol.resume_writing = MethodType(_resume, protocol)
        limit = _settings().max_buffer_bytes
        protocol.transport.set_write_buffer_limits(limit, limit)

    def receive(self) -> Awaitable[Message]:
        message: Awaitable[Message] = self._protocol.receive()
        return message

    def close(self, code: int, reason: str) -> None:
        # Without this, websockets would answer the client's close frame with a second one, after
        # which browsers report 1006, and uvicorn's stop would send one of its own.
        connection = self._protocol.conn
        if connection.close_sent is None:
            connection.send_close(code, reason)
            self.write(b"".join(connection.data_to_send()))
            self._protocol.shutdown = self._protocol.transport.close

    def abort(self) -> None:
        self._protocol.transport.abort()

    def close_reason(self) -> str:
        """Return why the connection ended, if this file did not close it."""
        close_sent = self._protocol.conn.close_sent
        if close_sent is None or self._protocol.conn.close_rcvd_then_sent:
            return "client"
        return _CLOSE_REASONS.get(close_sent.code, "client")

    def mark_closed(self, websocket: WebSocket) -> None:
        """Tell uvicorn of the close, or its stop sends a frame after the client's close frame."""
        self._protocol.close_sent = True
        # As its own `receive` and `close` would.
        websocket.client_state = websocket.application_state = WebSocketState.DISCONNECTED

    @staticmethod
    def mark_refused(receive: Receive) -> None:
        """Tell uvicorn that a handshake was answered, or it logs an error for each refusal."""
        protocol: Any = getattr(receive, "__self__", None)
        if getattr(protocol, "initial_response", None):
            protocol.handshake_complete = True


def _pause(protocol: Any) -> None:
    protocol.writable.clear()  # uvicorn's `send`, which a host's endpoint may call, waits
    protocol.transport.pause_reading()


def _resume(protocol: Any) -> None:
    protocol.writable.set()
    if not protocol.read_paused:  # by uvicorn, whose queue is not empty
        protocol.transport.resume_reading()


class _AsgiConnection:
    """Carries frames to a client of any other server: a task of its own calls ASGI's `send`."""

    def __init__(self, websocket: WebSocket, protocol: Any) -> None:
        self.framing: _Framing = _end_line
        self._websocket = websocket
        self._transport = getattr(protocol, "transport", None)  # uvicorn's with --ws wsproto
        self._is_wrapped = protocol is None
        self._is_closed = False
        self._unsent = 0
        self._end: Message = {}  # the server's last event
        self._queue: asyncio.Queue[bytes | tuple[int, str]] = asyncio.Queue()
        self._receiving: asyncio.Future[Message] = asyncio.Future()
        self._writer = asyncio.create_task(self._write_queue())
        self.is_closing: Callable[[], bool] = self._writer.done

    async def receive(self) -> Message:
        """Return the next ASGI message, or a disconnect once this side has closed."""
        self._receiving = receiving = asyncio.ensure_future(self._websocket.receive())
        try:
            await asyncio.wait((receiving, self._writer), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done() and not self._is_closed:
                self._end = receiving.result()
                return self._end
        finally:
            receiving.cancel()
        await asyncio.wait((self._writer,))
        return {"type": "websocket.disconnect"}

    def unsent(self) -> int:
        if self._transport is None or self._transport.is_closing():
            return self._unsent
        # What is being sent now is in both.
        return max(self._unsent, int(self._transport.get_write_buffer_size()))

    def write(self, data: bytes) -> None:
        self._unsent += len(data)
        self._queue.put_nowait(data)

    def close(self, code: int, reason: str) -> None:
        self._queue.put_nowait((code, reason))

    def abort(self) -> None:
        self._writer.cancel()
        if self._transport is not None:
            self._transport.abort()

    def close_reason(self) -> str:
        # Behind a wrapper uvicorn's stop says 1012, without the reason that a client's close has.
        is_stop = self._end.get("code") == 1012 and "reason" not in self._end
        return "server_stop" if is_stop and self._is_wrapped else "client"

    def mark_closed(self, _: WebSocket) -> None:
        self._writer.cancel()
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Read and ignore messages: hypercorn 0.18 cannot close before it has passed them on."""
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
            self._receiving.cancel()  # granian 2.8 sends no close frame while it is being received
            await WebSocket.close(self._websocket, *data)
        except Exception as error:  # servers differ in what a send to a client that went raises
            _log("debug", "asgi_send_failed", error=repr(error))


def _open_connection(websocket: WebSocket) -> _UvicornConnection | _AsgiConnection:
    receive = getattr(websocket, "_receive", None)  # under uvicorn, its protocol's method
    protocol = getattr(receive, "__self__", None)
    try:
        return _UvicornConnection(protocol)
    except Exception as error:
        server = type(protocol).__module__ if protocol else getattr(receive, "__module__", "")
        hint = "full speed needs uvicorn's default WebSocket protocol, and its `receive` unwrapped"
        _warn("fanout_through_asgi", server=server, error=repr(error), hint=hint)
    with suppress(Exception):  # uvicorn's protocol for --ws wsproto has what this takes
        _UvicornConnection.pause_reading_while_unsent(protocol)
    return _AsgiConnection(websocket, protocol)


# ---- Clients -------------------------------------------------------------------------------------

_EVERYBODY_ONLY = frozenset({""})
_CLIENT_ID = re.compile(r"([0-9a-f]{8})-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def _read_state(websocket: WebSocket, name: str) -> Any:
    """Return what the project has set on `websocket.state`, without the memory that this takes."""
    return websocket.scope.get("state", {}).get(name)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Client:
    """One connected client, for users to read; the fields from `connection` on are internal."""

    id: str  # a UUID
    node: str  # the process that holds it: the first 32 bits of the id
    address: str  # host and port of its end of the connection
    connected_at: str  # in UTC, as ISO 8601
    websocket: WebSocket  # Starlette's: its headers, and `state` for what is known of it
    connection: _UvicornConnection | _AsgiConnection
    task: asyncio.Task[Any]  # the task that serves it: to ask for the current one takes longer
    heard: frozenset[str] = _EVERYBODY_ONLY  # its rooms; "" is everybody's
    silent_in: frozenset[str] = frozenset()  # rooms to which it may not send
    messages_received: int = 0
    messages_sent: int = 0  # to it
    removed_because: str = ""  # a reason that the metrics count, once it is removed
    is_cut_off: bool = False  # by this side, so that what it still sends is ignored
    large_batch_bytes: int = 0  # allowed above the limit, until it has read a batch that large
    second_began: float = -math.inf  # for the limit on messages a second
    messages_this_second: int = 0

    @property
    def rooms(self) -> frozenset[str]:
        """The rooms that it is in; after it has left, those that it was in."""
        return self.heard - _EVERYBODY_ONLY

    @property
    def buffered_bytes(self) -> int:
        """Bytes unsent: they were written to it, and its socket has not yet taken them."""
        return 0 if self.connection.is_closing() else self.connection.unsent()

    @property
    def user(self) -> str | None:
        """`str(websocket.state.user)`, cut to 128 characters; None if it is not set."""
        user = _read_state(self.websocket, "user")
        with suppress(Exception):  # of a `str` that is the project's own
            return None if user is None else str(user)[:128].encode(errors="replace").decode()
        return None

    def log_fields(self) -> dict[str, Any]:
        """Return the fields that log lines about it have."""
        user = self.user
        return {"client_id": self.id} if user is None else {"client_id": self.id, "user": user}


class _Clients(dict[str, Client]):
    """Clients by id, in the order in which they came. Ids compare without case (RFC 9562, 4).

    `clients[id]` and `clients.get(id)` find a client that has left, too, until its `$disconnect`
    handler has run. `in`, `len` and iteration know connected clients alone, `in` by the exact id.
    """

    def __init__(self) -> None:
        self.left: WeakValueDictionary[str, Client] = WeakValueDictionary()

    def __missing__(self, client_id: str) -> Client:
        return self.get_connected(client_id) or self.left[client_id.lower()]

    def get(self, client_id: str, default: Any = None) -> Any:
        return self.get_connected(client_id) or self.left.get(client_id.lower(), default)

    def get_connected(self, client_id: str) -> Client | None:
        return super().get(client_id.lower())


clients = _Clients()


# ---- Fan-out -------------------------------------------------------------------------------------

# A batch waits for more messages: with fewer clients the wait costs more than it saves, after so
# many turns of the loop it ends, and with more bytes clients would have nothing to do meanwhile.
_GATHER_CLIENTS = 16
_GATHER_TURNS = 8
_GATHER_BYTES = 16384
_SWEEP_SECONDS = 1.0
_UNKNOWN_RECIPIENT = "unknown_recipient", "No client with the id in `to` is connected."


class _Shared:
    """What the clients that hear the same rooms of a batch share."""

    def __init__(self, places: Sequence[int], frames: list[bytes]) -> None:
        self.places = places  # of its messages in the batch
        self.frames = frames
        self.joined = b"".join(frames)
        # Where each frame begins in `joined`, and where the last ends; filled for the first edit.
        self.starts: list[int] = []


class _Batch:
    """What was published since the last flush, mostly in one turn of the event loop.

    Clients that hear the same of its rooms get the same bytes, unless they have *edits*. An edit
    (place, message) inserts a message before that place; (place, None) leaves out the one there. So
    a batch costs one write per client, not one per message, and all clients see one order.
    """

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.places: dict[str, list[int]] = {}  # by room, of its messages; "" is everybody's
        self.edits: dict[Client, list[tuple[int, bytes | None]]] = {}
        self.size = 0  # bytes of all messages, those to one client among them
        self._frames: dict[_Framing, list[bytes]] = {}
        self._shared: dict[tuple[_Framing, frozenset[str]], _Shared] = {}

    def add(self, message: bytes, room: str = "", left_out: Client | None = None) -> None:
        place = len(self.messages)
        if left_out is not None:
            self.edits.setdefault(left_out, []).append((place, None))
        self.messages.append(message)
        self.places.setdefault(room, []).append(place)
        self.size += len(message)

    def add_for(self, client: Client, message: bytes) -> None:
        self.edits.setdefault(client, []).append((len(self.messages), message))
        self.size += len(message)

    def frames_for(self, client: Client) -> tuple[bytes, int]:
        """Return the frames that a client gets, and how many messages these are."""
        framing = client.connection.framing
        shared = self._shared.get((framing, client.heard)) or self._share(framing, client.heard)
        if client not in self.edits:
            return shared.joined, len(shared.frames)
        if not shared.starts:
            shared.starts = [*itertools.accumulate(map(len, shared.frames), initial=0)]
        view, starts = memoryview(shared.joined), shared.starts
        parts: list[bytes | memoryview] = []
        count = len(shared.frames)
        next_start = 0
        has_all = count == len(self.messages)
        for place, message in self.edits[client]:
            # A message that is left out is among the places: who joins or leaves flushes first.
            index = place if has_all else bisect_left(shared.places, place)
            parts.append(view[next_start : starts[index]])
            if message is None:
                next_start = starts[index + 1]
                count -= 1
            else:
                next_start = starts[index]
                parts.append(framing(message))
                count += 1
        parts.append(view[next_start:])
        return b"".join(parts), count

    def _share(self, framing: _Framing, heard: frozenset[str]) -> _Shared:
        rooms = frozenset(room for room in heard if room in self.places)
        shared = self._shared.get((framing, rooms))  # others may hear the same of these rooms
        if shared is None:
            if framing not in self._frames:
                self._frames[framing] = [framing(message) for message in self.messages]
            frames = self._frames[framing]
            places: Sequence[int] = sorted(itertools.chain(*(self.places[room] for room in rooms)))
            shared = _Shared(places, [frames[place] for place in places])
            self._shared[framing, rooms] = shared
        self._shared[framing, heard] = shared
        return shared


class _OtherNodes:
    """The other processes ("nodes") of this server: none, unless Redis is configured."""

    def start(self) -> None: ...
    async def wait_until_known(self) -> None: ...
    async def stop(self) -> None: ...

    def publish(self, to: str, message: bytes, reply_to: str = "") -> None:
        """Send a message to their clients.

        If no client has the id in `to`, the client `reply_to` gets an error.
        """
        if reply_to:
            _send_unknown_recipient(reply_to, message)

    async def query(self, request: Sequence[Any]) -> tuple[list[Any], bool]:
        """Have them run a request; return the answers, and whether one is missing."""
        return [], False


class _Hub:
    """The clients and rooms of this process, and the batch that is written to them next.

    It lives in one event loop. Nothing is locked: whatever calls it runs in that loop.
    """

    def __init__(self) -> None:
        self.loop: Any = None
        self.node = ""  # this process's part of its clients' ids
        self.console_path = ""  # with its prefix, or its mount; "" until it is known
        self.arriving = 0  # clients that are being accepted
        self.rooms: dict[str, set[Client]] = {}  # those with clients in them
        self.batch = _Batch()
        self.received = self.sent = self.sent_bytes = 0  # not yet added to the metrics
        self.nodes = _OtherNodes()
        self.make_nodes: Callable[[], _OtherNodes] = _OtherNodes  # the section Cluster replaces it

    def enter(self) -> None:
        """Move into the running event loop: RuntimeError where clients are in another one."""
        loop = asyncio.get_running_loop()
        if loop is self.loop:
            return
        if (clients or self.arriving) and not self.loop.is_closed():
            hint = "in tests, write `with TestClient(app) as client:`"
            raise RuntimeError(f"clients are connected in another event loop; {hint}")
        if self.loop is not None and self.loop.is_running():
            asyncio.run_coroutine_threadsafe(self.nodes.stop(), self.loop)
        nodes = self.make_nodes()  # which raises where its setting is wrong
        clients.clear()
        self.rooms.clear()
        _connected.set(0)
        _rooms_gauge.set(0)
        self.loop = loop
        self.node = secrets.token_hex(4)
        self.batch = _Batch()
        self.nodes = nodes
        loop.call_later(_SWEEP_SECONDS, self._sweep, self.node, loop.time() + _SWEEP_SECONDS)
        _check_environment()
        for event_name in dict.fromkeys(_replaced_events):
            _log("debug", "handler_replaced", event_name=event_name)
        _replaced_events.clear()
        # Two copies of this file share the metrics, so the first leaves its name at one of them.
        if vars(_connected).setdefault("served_by", __name__) != __name__:
            other = vars(_connected)["served_by"]
            _warn("served_twice", names=f"{other}, {__name__}", hint="import it under one name")
        nodes.start()

    def enter_if_free(self) -> None:
        """Move into the running event loop, unless the server runs in another one."""
        if self.loop is None or not self.loop.is_running():
            self.enter()

    def add(self, client: Client, rooms: Collection[str] = ()) -> None:
        self.flush()  # what was published before it came is not for it
        clients[client.id] = client
        for room in rooms:
            self.join_room(client, room)
        _connected.inc()
        _connections_total.inc()
        _log("info", "client_connected", address=client.address, **client.log_fields())

    def join_room(self, client: Client, room: str, listen_only: bool = False) -> None:
        if room not in client.heard:
            if room in self.batch.places:
                self.flush()  # what was published before it came is not for it
            if client.removed_because:  # by the flush
                return
            self.rooms.setdefault(room, set()).add(client)
            client.heard |= {room}
            _rooms_gauge.set(len(self.rooms))
        client.silent_in = client.silent_in | {room} if listen_only else client.silent_in - {room}

    def leave_room(self, client: Client, room: str) -> None:
        if room in client.heard:
            if room in self.batch.places:
                self.flush()  # what was published before it left is for it
            if not client.removed_because:  # by the flush
                client.heard -= {room}
                client.silent_in -= {room}
                self._remove_member(client, room)

    def _remove_member(self, client: Client, room: str) -> None:
        members = self.rooms[room]
        members.discard(client)
        if not members:
            del self.rooms[room]
        _rooms_gauge.set(len(self.rooms))

    def publish(self, to: str, message: bytes, sender: Client | None = None) -> int:
        """Send a message to the clients of this process that `to` names; return their number."""
        was_empty = not self.batch.size
        room = to[1:] if to[:1] == "#" else ""
        if room or to in _EVERYBODY:
            members: Any = self.rooms.get(room) if room else clients
            if not members:
                return 0
            is_member = sender is not None and not sender.removed_because and room in sender.heard
            left_out = sender if is_member and to != "all" else None
            self.batch.add(message, room, left_out)
            count = len(members) if left_out is None else len(members) - 1
        else:
            client = clients.get_connected(to)
            if client is None:
                return 0
            self.batch.add_for(client, message)
            count = 1
        if was_empty:
            self.loop.call_soon(self._tick, self.batch.size, _GATHER_TURNS)
        return count

    def _tick(self, previous_size: int, turns_left: int) -> None:
        """Flush, or wait for one more turn of the loop while each of them brings more messages."""
        grows = previous_size < self.batch.size < _GATHER_BYTES
        if grows and turns_left and len(clients) >= _GATHER_CLIENTS:
            self.loop.call_soon(self._tick, self.batch.size, turns_left - 1)
        else:
            self.flush()

    def flush(self) -> None:
        """Write what was published to every client that keeps up."""
        if not self.batch.size:
            return
        batch, self.batch = self.batch, _Batch()
        recipients: Collection[Client] = clients.values()
        if "" not in batch.places:  # it is for some clients alone
            members = (self.rooms.get(room, ()) for room in batch.places)
            recipients = set(batch.edits).union(*members)
        limit = _settings().max_buffer_bytes
        is_large = batch.size > limit
        sent = sent_bytes = 0
        # Most clients get the same frames as the one before them.
        frames, count, framing, heard = b"", 0, None, None
        for client in tuple(recipients):
            connection = client.connection
            is_doubtful = connection.is_closing() or connection.unsent() > limit
            if is_doubtful and self.drop_if_gone_or_slow(client):
                continue
            if client in batch.edits:
                frames, count = batch.frames_for(client)
                heard = None  # the next client gets others
            elif client.heard is not heard or connection.framing is not framing:
                frames, count = batch.frames_for(client)
                framing, heard = connection.framing, client.heard
            if not frames:
                continue  # the client has sent all of these messages itself
            connection.write(frames)
            client.messages_sent += count
            sent += count
            sent_bytes += len(frames)
            if is_large:
                client.large_batch_bytes = max(client.large_batch_bytes, len(frames))
        self.sent += sent
        self.sent_bytes += sent_bytes

    def count_traffic(self) -> None:
        """Add the counts to the metrics: once a second, for each `inc` takes 0.25 microseconds."""
        received, sent, sent_bytes = self.received, self.sent, self.sent_bytes
        self.received = self.sent = self.sent_bytes = 0
        _received_total.inc(received)
        _sent_total.inc(sent)
        _bytes_sent_total.inc(sent_bytes)

    def drop_if_gone_or_slow(self, client: Client) -> bool:
        """Remove a client whose connection has ended, or that does not keep up."""
        if client.removed_because:
            return True
        if client.connection.is_closing():
            self.remove(client, client.connection.close_reason())
            return True
        unsent, limit = client.buffered_bytes, _settings().max_buffer_bytes
        if unsent <= limit:
            client.large_batch_bytes = 0
        if unsent <= limit + client.large_batch_bytes:
            return False
        self.remove(client, "slow_client", 1013, "Too slow: reconnect")
        hint = "DATADIVR_MAX_BUFFER_BYTES is the limit"
        _warn("slow_client_dropped", buffered_bytes=unsent, hint=hint, **client.log_fields())
        return True

    def _sweep(self, node: str, due: float) -> None:
        """Check all clients: uvicorn reports none that stalls while it closes, or only pings."""
        if node != self.node:
            return  # the hub has moved into another loop
        late = self.loop.time() - due
        self.loop.call_later(_SWEEP_SECONDS, self._sweep, node, self.loop.time() + _SWEEP_SECONDS)
        if late > 1:
            hint = "something blocked the event loop; write handlers that block with plain `def`"
            _warn("loop_blocked", seconds=round(late, 1), hint=hint)
        most = 0
        for client in tuple(clients.values()):
            if not self.drop_if_gone_or_slow(client):
                most = max(most, client.buffered_bytes)
        _unsent_bytes_max.set(most)
        self.count_traffic()

    def remove(self, client: Client, reason: str, code: int = 0, text: str = "") -> None:
        """Remove a client; nothing else does. A code also closes it, after what was published."""
        if code:
            self.flush()
        if clients.pop(client.id, None) is None:
            return
        clients.left[client.id] = client
        for room in client.rooms:
            self._remove_member(client, room)
        self.batch.edits.pop(client, None)
        client.removed_because = reason
        client.is_cut_off = bool(code)
        # A client that does not read would keep its socket open for as long as it likes.
        self.loop.call_later(_CLOSE_SECONDS, client.connection.abort)
        _connected.dec()
        _disconnections_total.labels(reason).inc()
        if reason in _ERROR_TYPES:
            _errors_total.labels(reason).inc()
        _log("info", "client_disconnected", reason=reason, **client.log_fields())
        if code and not client.connection.is_closing():
            client.connection.close(code, text)  # it raises if a handler's code is not valid


_hub = _Hub()


def _publish(to: str, data: bytes, sender: Client | None = None, reply_to: str = "") -> int:
    """Send a message to the clients of all nodes; return how many clients are addressed here.

    If no client has the id in `to`, the client `reply_to` gets an error.
    """
    count = _hub.publish(to, data, sender)
    if to in _EVERYBODY:
        _hub.nodes.publish("all", data)  # their "others" too, for the sender is here
    elif to.startswith("#"):
        _hub.nodes.publish(to, data)
    elif not count and to.lower() != reply_to:  # the sender itself has left
        _hub.nodes.publish(to, data, reply_to)
    return count


def _send(message: WebSocketMessage, sender: Client | None = None, reply_to: str = "") -> int:
    """Check, encode and publish a message that is the server's, a handler's or a host's own."""
    _check_type(type(message))
    return _publish(_check_to(message.to), _encode(message), sender, reply_to)


def _send_error(
    client_id: str,
    code: str,
    text: str,
    about: WebSocketMessage | None = None,
    payload: Mapping[str, Any] | None = None,
    **fields: Any,
) -> None:
    """Count and log an error of a client's, and tell it; `about` is the message at fault."""
    _errors_total.labels(code).inc()
    client = clients.get(client_id)
    described = {"client_id": client_id} if client is None else client.log_fields()
    _warn(code, error=text, **described, **fields)
    _tell_error(client_id, code, text, about, payload)


def _tell_error(
    client_id: str,
    code: str,
    text: str,
    about: WebSocketMessage | None,
    payload: Mapping[str, Any] | None = None,
) -> None:
    error = create_error_message(text, client_id, code, about.id if about is not None else None)
    if about is not None and about.event_name:
        error.payload["event_name"] = about.event_name
    error.payload.update(payload or {})
    _send(error)


def _send_unknown_recipient(client_id: str, message: bytes) -> None:
    """Tell a client that nobody has the id that its message is addressed to."""
    _send_error(client_id, *_UNKNOWN_RECIPIENT, _read_about(message))


async def _in_server(function: Callable[..., Any], *arguments: Any) -> Any:
    """Await a function in the server's event loop, whichever loop and thread this is called in."""
    loop = _hub.loop
    if loop is asyncio.get_running_loop():
        return await function(*arguments)
    refusal = HTTPException(503, "No server runs in this process.")
    if loop is None or not loop.is_running():
        raise refusal
    answer = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(function(*arguments), loop))
    while not (await asyncio.wait([answer], timeout=1))[0]:
        if not loop.is_running():  # it stopped before it came to this
            raise refusal
    return answer.result()


async def broadcast(message: WebSocketMessage, sender: WebSocket | None = None) -> int:
    """Send a message to its `to`, and return how many clients of this process that addresses.

    "others" and a room are all but `sender`, a client's WebSocket. The function waits for no
    client; one that does not keep up is dropped (`DATADIVR_MAX_BUFFER_BYTES`). It can be awaited
    in any event loop of the server's process: the server's own sends the message. Where no server
    runs in the process, it logs a warning and returns 0. A plain function in one of AnyIO's
    threads calls it with `anyio.from_thread.run(broadcast, message)`.

    Raises:
        TypeError: it is no `WebSocketMessage`, or a subclass with fields that would be lost.
        ValueError: its `to` is a room without a right name.
        PydanticSerializationError: JSON cannot hold its payload; the text names place and type.
    """
    _check_type(type(message))
    try:
        to, data = _check_to(message.to), _encode(message)
    except ValueError as error:
        _errors_total.labels("handler_error").inc()
        _warn("broadcast_failed", "error", event_name=message.event_name, error=str(error))
        raise
    try:
        count: int = await _in_server(_broadcast, to, data, sender)
    except HTTPException:
        _warn("broadcast_to_nobody", hint="other programs send with POST /messages")
        return 0
    return count


async def _broadcast(to: str, data: bytes, sender: WebSocket | None) -> int:
    client_id = sender.scope.get("datadivr.client_id", "") if sender is not None else ""
    return _publish(to, data, clients.get_connected(client_id))


def _run_request(request: Sequence[Any]) -> Any:
    """Run a request here, whichever node it came to; return None if it is not for here.

    A request is an action, a target ("all", a room, or the id of a client), and arguments.
    """
    client = clients.get_connected(request[1])
    match request:
        case ["list", _, limit, after, *rooms]:
            listed = _hub.rooms.get(rooms[0], ()) if rooms else clients.values()
            found = [(client.connected_at + client.id, client) for client in listed]
            page = sorted(entry for entry in found if entry[0] > after)[: limit + 1]
            return len(listed), [[key, _client_info(client)] for key, client in page]
        case ["publish", to, text] if client or to in _EVERYBODY or to.startswith("#"):
            return _hub.publish(to, text.encode())
        case ["get", _] if client:
            return _client_info(client)
        case ["join", _, room, listen_only] if client:
            _hub.join_room(client, _check_room(room), listen_only)
        case ["leave", _, room] if client:
            _hub.leave_room(client, room)
        case ["disconnect", _] if client:
            _hub.remove(client, "admin", 1008, "Disconnected by an administrator")
        case _:
            return None
    return True


def _client_info(client: Client) -> dict[str, Any]:
    """Describe a client as a `ClientInfo`, in JSON."""
    names = ("id", "node", "address", "user", "connected_at", "messages_received", "messages_sent")
    fields = {name: getattr(client, name) for name in (*names, "buffered_bytes")}
    return {**fields, "rooms": sorted(client.rooms)}


async def _query_nodes(*request: Any) -> tuple[list[Any], bool]:
    """Run a request on all nodes, or on the one that holds a client.

    Returns:
        The answers, and whether one is missing.

    Raises:
        HTTPException: 404, no client has this id; 503, the node that has it does not answer, or no
            server runs in this process.
    """
    answers, is_partial = await _in_server(_query_from_here, request)
    if not answers and is_partial:
        raise HTTPException(503, "The node that holds this client does not answer.")
    if not answers:
        raise HTTPException(404, "No client with this id is connected.")
    return answers, is_partial


async def _query_from_here(request: Sequence[Any]) -> tuple[list[Any], bool]:
    own_answer = _run_request(request)
    others, partial = await _hub.nodes.query(request)
    return [answer for answer in (own_answer, *others) if answer is not None], partial


# ---- The WebSocket endpoint ----------------------------------------------------------------------

_YIELD_BYTES = 65536  # or 16 messages: after these a client's task lets the others run
_WEB_SCHEMES = ("http", "https", "ws", "wss")
# `app.dependency_overrides`, to warn if another application serves the clients.
_app_overrides: dict[Callable[..., Any], Callable[..., Any]] = {}


def _is_allowed_origin(text: str, connection: HTTPConnection) -> bool:
    """Tell whether a page's origin is listed, or of the host that its request is for."""
    with suppress(ValueError):  # the Origin, or the Host, is not valid
        origin = _normalise_origin(text)
        if origin in _settings().allowed_origins:
            return True
        scheme = origin.partition("://")[0]
        own = _normalise_origin(f"{scheme}://{connection.headers.get('host', '')}")
        if scheme in _WEB_SCHEMES and origin == own and not _is_rebound(connection):
            return True
    return "*" in _settings().allowed_origins


def _is_loopback(connection: HTTPConnection) -> bool:
    """Tell whether a request came in on a loopback address."""
    server, _ = connection.scope.get("server") or ("", 0)
    return server.removeprefix("::ffff:").startswith("127.") or server == "::1"


def _is_rebound(connection: HTTPConnection) -> bool:
    """Tell whether a request came in on a loopback address under a foreign name (DNS rebinding).

    Names that are not foreign are localhost, addresses, and the hosts of listed origins.
    """
    host = re.sub(r":\d+$", "", connection.headers.get("host", "localhost").lower()).rstrip(".")
    is_address = host.startswith("[") or host.replace(".", "").isdigit()
    is_local = is_address or host == "localhost" or host.endswith(".localhost")
    allowed = _settings().allowed_origins
    is_listed = "*" in allowed or host in [urlsplit(origin).hostname for origin in allowed]
    return _is_loopback(connection) and not is_local and not is_listed


class _RefusedError(HTTPException):
    """A refusal that is counted and logged."""


def _refuse(status: int, code: str, text: str, hint: str) -> HTTPException:
    """Count and log that a client may not come in; return the exception that says so."""
    _errors_total.labels(code).inc()
    _warn(code, error=text, hint=hint)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return _RefusedError(status, text, headers)


async def _count_refusals() -> AsyncIterator[None]:
    """Count and log what an authorization of the host's own refuses."""
    try:
        yield
    except StarletteHTTPException as error:
        if not isinstance(error, _RefusedError) and error.status_code in (401, 403):
            code = "unauthorized" if error.status_code == 401 else "forbidden"
            hint = "the project's own authorization raised this"
            _refuse(error.status_code, code, str(error.detail), hint)
        raise


async def authorize_client(websocket: WebSocket) -> None:
    """Check where a client comes from, and its token: a FastAPI dependency.

    `app.dependency_overrides[authorize_client]` replaces it. The `Origin` (RFC 6454) must be that
    of the request's `Host`, or listed (`DATADIVR_ALLOWED_ORIGINS`). The token
    (`DATADIVR_CLIENT_TOKEN`) is in `Authorization: Bearer`, or the second of the subprotocols
    `["bearer", token]`.

    Raises:
        HTTPException: 403, the page's origin is not allowed; 401, the token is missing or wrong.
    """
    origin = websocket.headers.get("origin")
    if origin is not None and not _is_allowed_origin(origin, websocket):
        hint = "add it to DATADIVR_ALLOWED_ORIGINS to let it in"
        raise _refuse(403, "origin_refused", f"Origin {origin} is not allowed.", hint)
    expected = _settings().client_token
    if expected is None:
        return
    scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
    given = [token.strip()] if scheme.lower() == "bearer" else []  # it may be a proxy's
    offered = websocket.scope.get("subprotocols", [])
    if len(offered) > 1 and offered[0].lower() == "bearer":
        given.append(offered[1])
    if not any(secrets.compare_digest(text.encode(), expected.encode()) for text in given):
        hint = "a client must send DATADIVR_CLIENT_TOKEN"
        raise _refuse(401, "unauthorized", "A client token is needed.", hint)


def _warn_of_open_door(websocket: WebSocket) -> None:
    """Warn where everybody in a network may come in."""
    settings = _settings()
    overrides = getattr(websocket.scope.get("app"), "dependency_overrides", {})
    is_guarded = settings.client_token is not None or authorize_client in overrides
    has_chosen = bool(settings.allowed_origins) or _read_state(websocket, "user") is not None
    if is_guarded or has_chosen or _is_loopback(websocket):
        return
    with suppress(ValueError):  # the server has no IP address: it is a socket's path, or a test's
        ipaddress.ip_address((websocket.scope.get("server") or ("",))[0])
        hint = "anybody on this network can connect; DATADIVR_CLIENT_TOKEN asks for a token"
        _warn("open_to_the_network", hint=hint)


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

    `subprotocol` is one that the client offered (RFC 6455, 1.9). By default it is "bearer", if the
    client offered that first.
    The client joins the rooms in `websocket.state.rooms`, if there are any.

    Raises:
        HTTPException: 503, `DATADIVR_MAX_CLIENTS` are connected.
        ValueError: `websocket.state.rooms` is no collection of rooms' names.
        RuntimeError: other clients are connected in another event loop.
    """
    _hub.enter()
    limit = _settings().max_clients
    if 0 < limit <= len(clients) + _hub.arriving:
        hint = "DATADIVR_MAX_CLIENTS is the limit"
        raise _refuse(503, "too_many_clients", f"{limit} clients are connected.", hint)
    rooms = _read_state(websocket, "rooms") or ()
    if isinstance(rooms, str):
        expected = "a set of rooms' names in `websocket.state.rooms`"
        raise ValueError(f"expected {expected}; got {rooms!r}")
    rooms = tuple(map(_check_room, rooms))
    offered = websocket.scope.get("subprotocols", [])
    if subprotocol is None and offered and offered[0].lower() == "bearer":
        subprotocol = offered[0]
    _hub.arriving += 1  # or more than DATADIVR_MAX_CLIENTS could come in at once
    try:
        await websocket.accept(subprotocol)
    finally:
        _hub.arriving -= 1
    client = _make_client(websocket)
    _hub.add(client, rooms)
    _warn_of_open_door(websocket)
    try:
        await _handle_own(client, "$connect")
        await _read_messages(client)
    finally:
        _hub.remove(client, client.connection.close_reason())
        client.connection.mark_closed(websocket)
        delattr(websocket, "close")  # it refers to the client, which refers to the WebSocket
        await _handle_own(client, "$disconnect", client.removed_because)


def _make_client(websocket: WebSocket) -> Client:
    # The id is a UUID of version 8 (RFC 9562, 5.8), whose first 32 bits name the node.
    random = str(uuid.uuid4())
    client_id = f"{_hub.node}{random[8:14]}8{random[15:]}"
    websocket.scope["datadivr.client_id"] = client_id
    address = _format_address(websocket) or client_id
    now = datetime.now(UTC).strftime(_TIME_FORMAT)
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    connection = _open_connection(websocket)
    client = Client(client_id, _hub.node, address, now, websocket, connection, task)
    object.__setattr__(websocket, "close", MethodType(_close, client))
    return client


async def _close(client: Client, code: int = 1000, reason: str | None = None) -> None:
    """Close a client for a handler: no frame may follow the close frame (RFC 6455, 5.5.1)."""
    _hub.remove(client, "client", code, reason or "")


async def _read_messages(client: Client) -> None:
    """Handle a client's messages, one after the other, until it goes."""
    allowance = _YIELD_BYTES
    limit = _settings().max_message_bytes
    messages_per_second = _settings().max_messages_per_second
    while (event := await client.connection.receive())["type"] == "websocket.receive":
        data = event.get("text") or event.get("bytes") or ""  # hypercorn sends both keys
        allowance -= max(len(data), _YIELD_BYTES // 16)
        if allowance <= 0:  # a queue that is not empty lets nobody else run
            allowance = _YIELD_BYTES
            await asyncio.sleep(0)
            _hub.drop_if_gone_or_slow(client)
        if client.removed_because == "slow_client":
            return  # a client that does not read is not read any more
        if client.is_cut_off:  # its close frame is still to come
            continue
        client.messages_received += 1
        _hub.received += 1
        # A character is up to 4 bytes of UTF-8.
        if len(data) * 4 > limit and len(data.encode() if isinstance(data, str) else data) > limit:
            text = f"DATADIVR_MAX_MESSAGE_BYTES is {limit}"
            _hub.remove(client, "message_too_big", 1009, text)
            continue
        if messages_per_second and _exceeds_rate(client, data, messages_per_second):
            continue
        try:
            message = parse_message(data)
        except InvalidMessageFormat as error:
            _send_error(client.id, error.code, str(error), _read_about(data))
            continue
        # `message.from_id = ...` takes pydantic a microsecond.
        vars(message)["from_id"] = client.id
        event_name, registered = _find_handler(message.event_name)
        if registered is None:
            _relay(client, message)
        else:
            await _handle(client, message, event_name, registered)


def _exceeds_rate(client: Client, data: str | bytes, limit: int) -> bool:
    """Count a message; tell whether it is one too many in this second."""
    now = time.monotonic()
    if now - client.second_began >= 1:
        client.second_began = now
        client.messages_this_second = 0
    client.messages_this_second += 1
    if client.messages_this_second <= limit:
        return False
    about = _read_about(data)
    # A message with an id has its answer. For the others the client is told once a second.
    if client.messages_this_second == limit + 1 or about.id is not None:
        text = f"More than {limit} messages a second: dropped."
        _send_error(client.id, "rate_limited", text, about)
    else:
        _errors_total.labels("rate_limited").inc()
    return True


async def _handle_own(client: Client, event_name: str, payload: str | None = None) -> None:
    """Run the handler of `$connect` or `$disconnect`, if there is one."""
    if (registered := _server_handlers.get(event_name)) is not None:
        message = WebSocketMessage(event_name=event_name, payload=payload, from_id=client.id)
        await _handle(client, message, event_name, registered)


async def _handle(
    client: Client, message: WebSocketMessage, event_name: str, registered: _Registered
) -> None:
    """Run the handler of a client's message, and send what comes of it."""
    to, question_id = message.to, message.id
    # Before Python 3.13 a TaskGroup does not lower this count again.
    cancelled_before = client.task.cancelling()
    try:
        try:
            handled, answer = await _run_handler(registered, message)
        finally:
            vars(message)["id"] = question_id  # whatever the handler has made of it
        vars(handled)["id"] = question_id  # a copy, where the handler names a type
        if answer is handled and answer.to == to:
            _relay(client, answer)
        else:
            _send_answer(client, handled, answer)
    except asyncio.CancelledError as error:
        if client.task.cancelling() > cancelled_before:
            raise  # it is this connection that is cancelled, not what the handler awaited
        _send_handler_error(client, message, event_name, error)
    except InvalidMessageFormat as error:
        if error.code == "invalid_payload":
            _send_error(client.id, error.code, str(error), message, event_name=event_name)
        else:
            _send_handler_error(client, message, event_name, error)
    except StarletteHTTPException as error:
        if not client.removed_because:  # it has nobody to tell
            status = {"status": error.status_code}
            fields: dict[str, Any] = {"event_name": event_name, "level": "info"}
            text = str(error.detail).encode(errors="replace").decode()  # a file's name, perhaps
            _send_error(client.id, "refused", text, message, status, **fields)
    except (Exception, SystemExit) as error:
        _send_handler_error(client, message, event_name, error)


def _relay(client: Client, message: WebSocketMessage) -> None:
    """Send a client's message on as it is, if it may."""
    is_room = message.to.startswith("#")
    room = message.to[1:]
    if is_room and (room not in client.heard or room in client.silent_in):
        text = "To send to a room, a client must be in it, and allowed to do more than listen."
        _send_error(client.id, "not_in_room", text, message)
        return
    sent = message
    is_to_many = is_room or message.to in _EVERYBODY
    if is_to_many and message.id is not None:  # another client could take the id for its own
        sent = message.model_copy(update={"id": None})
    data = _encode(sent)
    limit = _settings().max_message_bytes
    if len(data) > limit:
        text = (
            f"It would go out with more than {limit} bytes (DATADIVR_MAX_MESSAGE_BYTES): dropped."
        )
        _send_error(client.id, "message_too_big", text, message)
        return
    _publish(message.to, data, client, client.id)
    if is_to_many and message.id is not None:
        _send(create_message("ok", None, client.id, id=message.id))


def _send_answer(
    client: Client, message: WebSocketMessage, answer: WebSocketMessage | None
) -> None:
    """Send what a handler returned, and see that a message with an id has one answer with it."""
    question_id = message.id
    is_answered = question_id is None
    if answer is not None and question_id is not None:
        if answer.to.lower() == client.id and answer.id in (None, question_id):
            answer = answer.model_copy(update={"id": question_id})
            is_answered = True
        elif answer.id == question_id:  # it is a question of this client alone
            answer = answer.model_copy(update={"id": None})
    if answer is not None:
        _send(answer, client, client.id)
    if not is_answered:
        _send(create_message("ok", None, client.id, id=question_id))


def _send_handler_error(
    client: Client, message: WebSocketMessage, event_name: str, error: BaseException
) -> None:
    text = f"The handler of {event_name!r} failed."
    fields: dict[str, Any] = {"event_name": event_name, "exc_info": error, "level": "error"}
    _send_error(client.id, "handler_error", text, message, **fields)


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    _last_resort()
    _hub.enter_if_free()
    loop = asyncio.get_running_loop()
    if _hub.loop is loop:
        await _hub.nodes.wait_until_known()
    try:
        yield
    finally:  # a host's own lifespan may fail at the stop
        if _hub.loop is loop:
            await _hub.nodes.stop()


router = APIRouter(lifespan=_lifespan)


@router.websocket("/ws", dependencies=[Depends(_count_refusals), Depends(authorize_client)])
@router.websocket("/ws/", dependencies=[Depends(_count_refusals), Depends(authorize_client)])
async def _serve_client(websocket: WebSocket) -> None:
    overrides = getattr(websocket.app, "dependency_overrides", {})
    if authorize_client in _app_overrides and authorize_client not in overrides:
        _warn_of_override(websocket.app)
    await handle_connection(websocket)


def _warn_of_override(serving: Any) -> None:
    serves = f"{type(serving).__name__} {getattr(serving, 'title', '')!r}"
    hint = "set dependency_overrides[authorize_client] on the application that serves the clients"
    _warn("override_not_used", "critical", serving=serves, hint=hint)


@router.get("/ws", include_in_schema=False)
async def _ask_for_upgrade() -> None:
    text = "Expected a WebSocket handshake: a proxy must pass on `Upgrade` and `Connection`."
    raise HTTPException(426, text, {"Upgrade": "websocket"})


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
    rooms: list[str] = Field([], description="The names of the rooms that it is in.")


class ClientPage(BaseModel):
    """A page of the list of clients, oldest first."""

    total: int = Field(description="Clients connected now, or in the room that was asked for.")
    next: str | None = Field(description="The `after` of the next page; null on the last.")
    partial: bool = Field(description="Whether a node did not answer: its clients are missing.")
    clients: list[ClientInfo]


class Announcement(BaseModel):
    """A message from the server."""

    event_name: _UnreservedEventName
    payload: Any = None
    to: Annotated[str, AfterValidator(_check_to)] = Field(
        "all", description="`all`, `others` (the same here), a client's id, or `#` and a room."
    )
    message: str | None = None


class Recipients(BaseModel):
    """How many clients a message was sent to, and whether a node did not answer."""

    recipients: int
    partial: bool


@cache
def _admin_token() -> str:
    """Return the admin API's token; where none is set, make one up and show it, once."""
    token = _settings().admin_token
    if token is None:
        token = secrets.token_urlsafe(32)
        text, hint = "admin_token_generated", "DATADIVR_ADMIN_TOKEN chooses it"
        # It opens the page signed in. What follows # goes to no server.
        console = f"{_hub.console_path or '/console'}#token={token}"
        # It goes past all loggers: whatever their level, and into nobody's records.
        record = logging.LogRecord("datadivr", logging.CRITICAL, __file__, 0, text, None, None)
        record.datadivr = {"event": text, "token": token, "console": console, "hint": hint}
        _last_resort().emit(record)
    return token


_bearer = HTTPBearer(auto_error=False, description="The admin token, or that of /metrics.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _require_token(credentials: _Credentials, kind: str, *tokens: str) -> None:
    given = (credentials.credentials if credentials is not None else "").encode()
    if not any(secrets.compare_digest(given, token.encode()) for token in tokens):
        hint = (
            f"DATADIVR_{kind.upper()}_TOKEN; the admin token, set or shown at the start, opens all"
        )
        raise _refuse(401, "admin_unauthorized", f"The {kind} token is needed.", hint)


async def authorize_admin(credentials: _Credentials) -> None:
    """Raise HTTPException 401 unless the request carries the admin token: a FastAPI dependency."""
    _require_token(credentials, "admin", _admin_token())


async def _enter_loop(request: Request) -> None:
    """Do what the lifespan does, where none has run because a host mounts the application."""
    if not _hub.console_path:
        _hub.console_path = f"{request.scope.get('root_path', '')}/console"
    _hub.enter_if_free()


@asynccontextmanager
async def _show_admin_token(serving: FastAPI) -> AsyncIterator[None]:
    with suppress(Exception):  # the application that runs this has no such route of its own
        _hub.console_path = serving.root_path + serving.url_path_for("_get_console")
    _admin_token()
    yield


# For the OpenAPI document: errors that are raised, and a body that FastAPI does not read.
_DETAIL: dict[str, Any] = {"model": dict[str, Any]}
_BODY = {"schema": Announcement.model_json_schema(), "example": {"event_name": "news"}}
_FIND_REFUSALS: dict[int | str, Any] = {404: _DETAIL, 503: _DETAIL}
_PageSize = Annotated[int, Query(ge=1, le=1000)]
_OPENMETRICS = {"application/openmetrics-text": {"schema": {"type": "string"}}}
_After = Annotated[str, Query(pattern=r"^([0-9T:.-]{26}Z[0-9a-f-]{36})?$")]
_RoomName = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f\x7f-\x9f/#]{1,100}$")]

_admin = APIRouter(
    lifespan=_show_admin_token,
    dependencies=[Depends(_enter_loop), Depends(authorize_admin)],
    responses={401: _DETAIL},
)


@_admin.get("/clients")
async def list_clients(
    limit: _PageSize = 100, after: _After = "", room: _RoomName | None = None
) -> ClientPage:
    """List the clients of all nodes, or those in a room, oldest first.

    `limit` is the size of a page, `after` the `next` of the page before.

    Raises:
        ValueError: `limit` is not from 1 to 1000, or `room` is not a room's name.
        HTTPException: 503, no server runs in this process.
    """
    if not 1 <= limit <= 1000:
        raise ValueError(f"expected a limit from 1 to 1000; got {limit}")
    # A node of an older version knows no rooms.
    rooms = [] if room is None else [_check_room(room, _RoomNameError)]
    answers, partial = await _query_nodes("list", "all", limit, after, *rooms)
    found = sorted(itertools.chain.from_iterable(page for _, page in answers))
    return ClientPage(
        total=sum(count for count, _ in answers),
        next=found[limit - 1][0] if len(found) > limit else None,
        partial=partial,
        clients=[ClientInfo(**client) for _, client in found[:limit]],
    )


@_admin.get("/clients/{client_id}", responses=_FIND_REFUSALS)
async def _get_client(client_id: str) -> ClientInfo:
    """Describe one connected client."""
    answers, _ = await _query_nodes("get", client_id)
    return ClientInfo(**answers[0])


@_admin.delete("/clients/{client_id}", status_code=204, responses=_FIND_REFUSALS)
async def disconnect_client(client_id: str) -> None:
    """Disconnect a client of any node, after what was already sent to it, with code 1008.

    Raises:
        HTTPException: 404, no client has this id; 503, the node that has it does not answer.
    """
    await _query_nodes("disconnect", client_id)


@_admin.put("/clients/{client_id}/rooms/{room}", status_code=204, responses=_FIND_REFUSALS)
async def join_room(client_id: str, room: _RoomName, listen_only: bool = False) -> None:
    """Put a client of any node into a room: it gets the room's messages, and may send there.

    With `listen_only` it may not send there. The client is in the room until `leave_room`, or
    until it leaves. Rooms need no setup. To join again changes `listen_only` alone.

    Raises:
        ValueError: `room` is not a room's name: 1 to 100 characters without white space, control
            characters, `/` and `#`.
        HTTPException: 404, no client has this id; 503, the node that has it does not answer.
    """
    await _query_nodes("join", client_id, _check_room(room, _RoomNameError), listen_only)


@_admin.delete("/clients/{client_id}/rooms/{room}", status_code=204, responses=_FIND_REFUSALS)
async def leave_room(client_id: str, room: _RoomName) -> None:
    """Undo `join_room`, with the same errors; nothing happens if the client is not in the room."""
    await _query_nodes("leave", client_id, _check_room(room, _RoomNameError))


@_admin.post(
    "/messages",
    status_code=202,
    responses=dict.fromkeys((400, 404, 413, 422, 503), _DETAIL),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": _BODY}}},
)
async def _post_message(request: Request) -> Recipients:
    """Send a message to all clients, to a room, or to one client."""
    body = bytearray()
    limit = _settings().max_message_bytes
    try:
        # FastAPI would read a body of any length, before it asks for the token.
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                text = f"The limit is {limit} bytes (DATADIVR_MAX_MESSAGE_BYTES)."
                raise HTTPException(413, text)
        announcement = Announcement.model_validate_json(body)
    except ClientDisconnect:
        raise HTTPException(400, "The body ended early.") from None
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        faults = [{**detail, "loc": ("body", *detail["loc"])} for detail in details]
        raise RequestValidationError(faults) from None
    message = _encode(WebSocketMessage(**dict(announcement))).decode()
    counts, partial = await _query_nodes("publish", announcement.to, message)
    return Recipients(recipients=sum(counts), partial=partial)


@router.head("/metrics", include_in_schema=False)
@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": _OPENMETRICS}, 401: {"content": {"application/json": {}}}},
    openapi_extra={"security": [{}]},  # DATADIVR_METRICS_TOKEN decides whether it needs a token
)
async def _get_metrics(request: Request, credentials: _Credentials) -> Response:
    """Report the metrics in Prometheus' text format, or in OpenMetrics where that is asked for."""
    if (metrics_token := _settings().metrics_token) is not None:
        _require_token(credentials, "metrics", metrics_token, _admin_token())
    elif _is_rebound(request):
        host = request.headers["host"]
        hint = "add http:// and the host to DATADIVR_ALLOWED_ORIGINS to let it in"
        raise _refuse(403, "origin_refused", f"Host {host} is not allowed.", hint)
    try:
        generate, content_type = choose_encoder(request.headers.get("accept", ""))
    except TypeError:  # it asks for a version that is no number
        generate, content_type = choose_encoder("")
    _hub.count_traffic()
    text = await asyncio.to_thread(lambda: generate(_collect_metrics()))  # files take their time
    return Response(text, media_type=content_type)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def _get_health(response: Response) -> dict[str, str]:
    """Say that the server answers, to pages from elsewhere too."""
    response.headers["Access-Control-Allow-Origin"] = "*"
    return {"status": "ok"}


# By name. They stand at the end of this file, where they are in no reader's way.
_files: dict[str, str] = {}


@router.api_route("/client.js", methods=["GET", "HEAD"], include_in_schema=False)
async def _get_client_js(request: Request) -> Response:
    """Serve the browser's client: a module that pages, from elsewhere too, import."""
    text = _files["client.js"]
    etag = f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Access-Control-Allow-Origin": "*"}
    if etag in request.headers.get("if-none-match", ""):  # a list, of which some begin with W/
        return Response(status_code=304, headers=headers)
    return Response(text, media_type="text/javascript", headers=headers)


def _hash_of(tag: str) -> str:
    """Return the hash by which a Content-Security-Policy allows an element of the page."""
    text = _files["console.html"].partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@router.api_route("/console/", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/console", methods=["GET", "HEAD"], include_in_schema=False)
async def _get_console() -> HTMLResponse:
    """Serve the console: a page without data, which uses nothing but this API and its token."""
    policy = (
        # 'self' is for client.js, which the page imports.
        f"default-src 'none'; script-src 'self' {_hash_of('script')}; "
        f"style-src {_hash_of('style')}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return HTMLResponse(_files["console.html"], headers=headers)


router.include_router(_admin)

# ---- The application -----------------------------------------------------------------------------


async def _answer_refusal(connection: Any, error: Any) -> Any:
    """Answer an HTTPException, a WebSocket's too, as a Starlette before 0.41 does not."""
    response = await http_exception_handler(connection, error)
    if not isinstance(connection, WebSocket):
        return response
    if "websocket.http.response" in connection.scope.get("extensions", {}):
        await connection.send_denial_response(response)
    else:  # Daphne 4 has no other refusal than a close, which is a 403
        await connection.close(1008)
    return None


class App(FastAPI):
    """A FastAPI application that serves clients of `/ws` without FastAPI's own stack.

    An idle client then takes 20 KB, where an included router takes 35. If the host adds something
    that a client passes through, FastAPI's stack serves. A wrapper of the whole application sees
    clients in both cases, but their messages only if it wraps `receive`.
    """

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "websocket":
                await stack(scope, receive, send)
                return
            path = scope["path"].removeprefix(scope.get("root_path", "")).removesuffix("/")
            if path == "/ws" and not self._has_additions():
                websocket = WebSocket(scope, receive, send)
                host = getattr(scope.get("router"), "dependency_overrides_provider", None)
                if authorize_client in getattr(host, "dependency_overrides", {}):
                    _warn_of_override(self)  # the host that mounts this application has it
                try:  # `websocket_endpoint` would be one more coroutine for each client
                    await authorize_client(websocket)
                    await handle_connection(websocket)
                except HTTPException as error:
                    await _answer_refusal(websocket, error)
            else:
                await stack(scope, receive, send)
                if isinstance(scope.get("endpoint"), StaticFiles | None):  # no route serves it
                    _warn("no_such_path", path=scope["path"], hint="clients connect to /ws")
            _UvicornConnection.mark_refused(receive)

        return serve

    def _has_additions(self) -> bool:
        """Tell whether a host has added something that a client of `/ws` passes through."""
        return bool(
            self.user_middleware
            or self.dependency_overrides
            or self.exception_handlers != _EXCEPTION_HANDLERS
            or self.router.routes[: len(_APP_ROUTES)] != _APP_ROUTES
            or router.routes[: len(_ROUTER_ROUTES)] != _ROUTER_ROUTES
        )


_DESCRIPTION = """
A WebSocket message server: clients connect to `/ws`, which stands beside this API for
administrators; where there is a client token, with the subprotocols `["bearer", token]`.

Over the WebSocket go messages of JSON, such as
`{"event_name": "chat", "payload": {"any": ["JSON"]}, "to": "others", "message": null}`.
Only `event_name` is required; `to` is `all`, `others` (the default), one client's id, or `#` and
the name of a room. What arrives has the sender's id as `from_id`, or `server`. The server answers
`whoami` with a client's own id, and an `error` says what was wrong with a message. The answer to a
message with an `id` has the same `id`.
"""
app = App(title="datadivr", version=__version__, description=_DESCRIPTION)
app.dependency_overrides = _app_overrides
app.include_router(router)
app.add_exception_handler(StarletteHTTPException, _answer_refusal)
_APP_ROUTES, _ROUTER_ROUTES = list(app.router.routes), list(router.routes)
_EXCEPTION_HANDLERS = dict(app.exception_handlers)

# Code written for the package that this file implements imports `datadivr.transport.server` and the
# like. A file that runs as a program needs its own name too, or importing it makes a second copy.
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
    """Text for one node, or for "all"; without text it is a probe."""

    node: str
    text: bytes  # without a line feed: JSON has none, and `_check_to` lets none into a room's name
    tell: Callable[[int | None], object] = lambda _: None  # how many nodes hear it; None: lost

    def finish(self, nodes: int | None) -> None:
        if nodes is None and self.text:
            _errors_total.labels("redis").inc()
        self.tell(nodes)


class _RedisNodes(_OtherNodes):
    """The other processes ("nodes") that share a Redis, in which nothing is kept.

    Each subscribes to a channel of its own and to one of all. A message there is lines of text:
    the node that publishes, then any number of these, each of three words::

        all - {message}                  for all clients
        #ROOM - {message}                for the clients in a room
        CLIENT_ID REPLY_TO {message}     for one client; a - where nobody is to be told
        ask NUMBER [request]             for `_run_request`
        answer NUMBER ...                what that returned, in JSON
    """

    def __init__(self) -> None:
        url = str(_settings().redis_url)
        # So configured, redis-py repeats nothing, and raises the first error.
        options: dict[str, Any] = {"retry": None, "protocol": 2, "socket_timeout": _LOST_SECONDS}
        options |= {"encoding": "utf-8", "decode_responses": False}
        try:
            if options.keys() & parse_qs(urlsplit(url).query).keys():
                raise ValueError  # redis-py would take the URL's
            self._redis: Any = import_module("redis.asyncio").Redis.from_url(url, **options)
            self._redis.connection_pool.make_connection()
        except ImportError:
            text = "DATADIVR_REDIS_URL is set, but redis is not installed: pip install redis"
            raise RuntimeError(text) from None
        except Exception:  # redis-py raises much; what it says may show the URL, with its password
            text = f"expected a URL that redis-py can read, without {', '.join(options)}"
            raise ValueError(f"DATADIVR_REDIS_URL: {text}") from None
        database = self._redis.connection_pool.connection_kwargs.get("db") or 0
        self._prefix = f"{_settings().redis_prefix}:{database}"  # channels are of all databases
        self._answers: dict[int, asyncio.Queue[Any]] = {}  # by the number of the question
        self._up = _declare(Gauge, "redis_up", "Whether Redis is up.", multiprocess_mode="livemin")

    def start(self) -> None:
        self._node = _hub.node
        self._is_lost = False  # nor is it known at first whether Redis is there
        self._waiting: list[_Line] = []  # until they are published
        self._waiting_bytes = 0
        self._has_waiting = asyncio.Event()
        self._task: asyncio.Task[None] = _hub.loop.create_task(self._run())

    async def wait_until_known(self) -> None:
        if self._task.done():  # a lifespan has ended before in this event loop
            self.start()
        await self._publish_line(self._node)

    async def stop(self) -> None:
        with suppress(TimeoutError):  # what waits is published first
            await asyncio.wait_for(self._publish_line(self._node), 1)
        while not self._task.done():  # before Python 3.13 a TaskGroup may swallow a cancel
            self._task.cancel()
            await asyncio.wait([self._task], timeout=0.1)
        self._is_lost = True
        await self._redis.aclose()

    def publish(self, to: str, message: bytes, reply_to: str = "") -> None:
        def reply(nodes: int | None) -> None:
            if nodes == 0 and reply_to:
                _send_unknown_recipient(reply_to, message)
            elif nodes is None and reply_to:
                text = "The other nodes cannot be reached now: dropped."
                _tell_error(reply_to, "redis", text, _read_about(message))

        node = self._find_node(to)
        if node is None:
            reply(0)
        else:
            words = f"{to if node == 'all' else to.lower()} {reply_to or '-'} "
            self._add(_Line(node, words.encode() + message, reply))

    async def query(self, request: Sequence[Any]) -> tuple[list[Any], bool]:
        node = self._find_node(request[1])
        if node is None:
            return [], False
        number = secrets.randbits(32)
        queue = self._answers[number] = asyncio.Queue()
        answers: list[Any] = []
        try:
            async with asyncio.timeout(1):
                nodes = await self._publish_line(node, f"ask {number} {json.dumps(request)}")
                expected = (nodes or 0) - (1 if node == "all" else 0)  # all but this one
                while len(answers) < expected:
                    answers.append(await queue.get())
                return answers, nodes is None
        except TimeoutError:
            return answers, True
        finally:
            del self._answers[number]

    async def _publish_line(self, node: str, text: str = "") -> int | None:
        """Publish a line behind those that wait; return how many nodes hear it; None: lost."""
        hearers: asyncio.Queue[int | None] = asyncio.Queue()
        self._add(_Line(node, text.encode(), hearers.put_nowait))
        return await hearers.get()

    def _find_node(self, to: str) -> str | None:
        """Return the other node, or all, that something is for; None if there is no such node."""
        if to in _EVERYBODY or to.startswith("#"):
            return "all"
        named = _CLIENT_ID.fullmatch(to.lower())
        return named[1] if named and named[1] != self._node else None

    def _add(self, line: _Line) -> None:
        """Publish a line, with the others of this turn, unless it is lost."""
        size = self._waiting_bytes + len(line.text)
        if self._is_lost or (self._waiting and size > _settings().max_buffer_bytes):
            line.finish(None)
        else:
            self._waiting.append(line)
            self._waiting_bytes = size
            self._has_waiting.set()

    async def _run(self) -> None:
        """Stay connected: after a loss, subscribe anew on new connections."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub, asyncio.TaskGroup() as tasks:
                    await self._join(pubsub)
                    tasks.create_task(self._listen(pubsub))
                    tasks.create_task(self._publish_waiting())
                    while True:  # a NAT or load balancer would forget a connection that is silent
                        self._add(_Line(self._node, b""))
                        await asyncio.sleep(1)
            except* Exception as errors:
                for line in self._waiting:
                    line.finish(None)
                self._waiting, self._waiting_bytes = [], 0
                if not self._is_lost:
                    hint = "until DATADIVR_REDIS_URL works, this node serves its own clients alone"
                    _errors_total.labels("redis").inc()
                    _log("warning", "redis_lost", error=repr(errors.exceptions[0]), hint=hint)
                self._is_lost = True
                self._up.set(0)
            await asyncio.sleep(0.1)

    async def _join(self, pubsub: Any) -> None:
        async with asyncio.timeout(_LOST_SECONDS):
            info = await self._redis.info()  # a Sentinel has no role in it
            if info.get("role") != "master" or info.get("cluster_enabled"):
                raise ConnectionError("expected a primary, and no replica, Sentinel or Cluster")
            channels = [f"{self._prefix}:{node}" for node in ("all", self._node)]
            await pubsub.subscribe(*channels)
            await self._redis.publish(channels[1], self._node)  # it must be allowed to
            while not (await self._redis.pubsub_numsub(channels[1]))[0][1]:
                pass  # it is not subscribed yet
        self._is_lost = False
        self._up.set(1)
        _log("info", "redis_joined", node=self._node)

    async def _publish_waiting(self) -> None:
        """Publish what waits in one pipeline; what comes meanwhile waits for the next."""
        while True:
            await self._has_waiting.wait()
            self._has_waiting.clear()
            by_node = itertools.groupby(self._waiting, attrgetter("node"))
            groups = [list(lines) for _, lines in by_node]
            pipeline = self._redis.pipeline(transaction=False)
            for lines in groups:
                channel = f"{self._prefix}:{lines[0].node}"
                texts = [self._node.encode(), *(line.text for line in lines)]
                pipeline.publish(channel, b"\n".join(texts))
                pipeline.pubsub_numsub(channel)  # PUBLISH counts subscribers to patterns too
            results = await pipeline.execute(raise_on_error=False)
            for lines, sent, hearers in zip(groups, results[::2], results[1::2], strict=True):
                is_lost = isinstance(sent, Exception) or isinstance(hearers, Exception)
                del self._waiting[: len(lines)]
                for line in lines:
                    self._waiting_bytes -= len(line.text)
                    line.finish(None if is_lost else hearers[0][1])

    async def _listen(self, pubsub: Any) -> None:
        """Take what the others publish, until nothing, not even a probe, is heard for 3 s."""
        silent_seconds = 0  # counted, not timed: a process that was paused has not lost Redis
        while silent_seconds < _LOST_SECONDS:
            message = await pubsub.get_message(timeout=1)
            silent_seconds = silent_seconds + 1 if message is None else 0
            if message is not None and message["type"] == "message":
                node, *lines = message["data"].split(b"\n")
                if node != self._node.encode():
                    for line in lines or [b""]:  # to have no line is garbage too
                        self._take(node, line)
                await asyncio.sleep(0)  # or nobody else runs while there is more to take
        raise TimeoutError(f"nothing heard for {_LOST_SECONDS} s")

    def _take(self, node: bytes, line: bytes) -> None:
        """Act on a line that another node has published."""
        try:
            to, about, body = line.split(b" ", 2)
            if to.startswith(b"#") or to == b"all":
                _hub.publish(to.decode(), body)
            elif to == b"ask":
                answer = json.dumps(_run_request(json.loads(body)))
                self._add(_Line(node.decode(), b"answer %b %b" % (about, answer.encode())))
            elif to == b"answer":  # one that comes too late goes into a queue that nobody reads
                self._answers.get(int(about), asyncio.Queue()).put_nowait(json.loads(body))
            elif not _CLIENT_ID.fullmatch(to.decode()):
                raise ValueError(f"expected all, #, ask, answer or a client's id, got {to[:36]!r}")
            elif not _hub.publish(to.decode(), body) and about != b"-":
                _send_unknown_recipient(about.decode(), body)
        except Exception as error:  # it is not a line that a node publishes
            _errors_total.labels("redis").inc()
            _warn("redis_garbage", error=repr(error))


_hub.make_nodes = lambda: _RedisNodes() if _settings().redis_url else _OtherNodes()

# ---- Running it ----------------------------------------------------------------------------------


def main() -> None:
    """Run the server: `python datadivr.py [--host HOST] [--port PORT]`."""
    import uvicorn

    parser = argparse.ArgumentParser(description="A WebSocket message server with an admin API.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765)
    arguments = vars(parser.parse_args())
    limit = _settings().max_message_bytes
    uvicorn.run(app, workers=1, ws_max_size=limit, timeout_graceful_shutdown=5, **arguments)


# ---- The browser's client ------------------------------------------------------------------------

_files["client.js"] = r"""/**
 * Connect to the server, and again whenever the connection is lost, until `close()` is called or an
 * administrator disconnects the client. `url` is the server's `/ws`, where that is not beside this
 * file. `ask` rejects with an error whose `code` is the server's, `timeout`, `lost` or `closed`.
 * @typedef {{ event_name: string, payload: any, to: string, from_id: string,
 *   message: string | null, id?: number | string }} Message
 * @typedef {{ to?: string, message?: string | null, id?: number | string }} Fields
 * @typedef {Fields & { timeout?: number }} Question `timeout` is in milliseconds, 24 days at most
 * @typedef {"connecting" | "open" | "refused" | "closed"} State
 * @param {{ token?: string | null, onmessage?: (message: Message) => void, url?: string | URL,
 *   onstate?: (state: State, reason: string) => void }} [options]
 */
export function connect({ token, onmessage, onstate, url = "ws" } = {}) {
  const address = new URL(url, import.meta.url).href.replace(/^http/, "ws");
  /** @type {Map<unknown, { to?: string, resolve: Function, reject: Function }>} */
  const questions = new Map(); // by id
  const mark = crypto.getRandomValues(new Uint32Array(4)).join("-"); // that its ids begin with
  let asked = 0; // how many questions
  let state = /** @type {State} */ ("connecting");
  let socket = /** @type {WebSocket | undefined} */ (undefined); // undefined between attempts
  let timer = 0; // for the next attempt, or for what takes too long
  let failures = 0; // since the last open connection
  let refusals = 0; // failed attempts in a row while the server was healthy

  function open() {
    if (socket) return; // an event came while there was no need to hurry
    socket = new WebSocket(address, token ? ["bearer", token] : []);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      failures = refusals = 0;
      schedule(probe, 20000);
      show("open");
    };
    socket.onmessage = (event) => receive(event).catch(() => {}); // it was not a message
    socket.onclose = ({ code, reason }) => (code === 1008 ? close(reason) : lose(reason));
    socket.onerror = () => state !== "open" && lose(""); // Node: a failed attempt has no `close`
    schedule(lose, 20000);
  }

  async function receive(/** @type {MessageEvent} */ { data }) {
    schedule(probe, 20000);
    const message = JSON.parse(typeof data === "string" ? data : new TextDecoder().decode(data));
    const { event_name, payload, message: text, from_id, id } = message;
    const question = questions.get(id);
    if (!question && id?.startsWith?.(mark)) return; // it comes too late
    if (question && (from_id === "server" || from_id === question.to?.toLowerCase())) {
      if (event_name !== "error") question.resolve(message);
      else question.reject(failure(payload?.code ?? "error", text ?? "It failed.", payload));
    } else if (typeof event_name === "string") call(onmessage, message);
  }

  function probe() {
    schedule(lose, 10000);
    send("whoami", null, { id: mark }); // any message in this time shows that the server is there
  }

  function lose(reason = "The server does not answer.") {
    drop();
    const seconds = Math.min(20, 2 ** failures) * (0.5 + Math.random()); // 30 at most
    failures += 1;
    schedule(open, seconds * 1000);
    if (state === "open") show("connecting", reason);
    else countRefusal();
  }

  function drop() {
    clearTimeout(timer);
    if (socket) socket.onopen = socket.onmessage = socket.onclose = socket.onerror = null;
    socket?.close(); // takes minutes where nobody answers: it is not waited for
    socket = undefined;
    questions.forEach(({ reject }) => reject(failure("lost", "Lost: the server may have acted.")));
  }

  async function countRefusal() {
    const pause = timer;
    const health = new URL("healthz", address.replace("ws", "http")); // a page is not told why
    const asked = fetch(health, { signal: AbortSignal.timeout(5000) });
    const answer = await asked.then((response) => response.ok && response.json()).catch(() => null);
    if (timer !== pause || state === "closed") return; // the next attempt has begun
    refusals = answer?.status === "ok" ? refusals + 1 : 0;
    if (refusals < 3) return show("connecting", "The server does not answer.");
    schedule(open, 30000);
    show("refused", "The server refuses the connection.");
  }

  /** @type {(event_name: string, payload?: any, fields?: Fields) => void} */
  function send(event_name, payload = null, fields = {}) {
    if (state !== "open") throw failure("closed", "The connection is not open.");
    try {
      socket?.send(JSON.stringify({ event_name, payload, ...fields }));
    } catch (error) {
      throw failure("invalid_message", `${error}`);
    }
  }

  /** @type {(event_name: string, payload?: any, question?: Question) => Promise<Message>} */
  async function ask(event_name, payload, { timeout = 10000, ...fields } = {}) {
    const id = `${mark}-${(asked += 1)}`;
    send(event_name, payload, { ...fields, id });
    const { to } = fields;
    const late = failure("timeout", "No answer came in time.");
    const limit = setTimeout(() => questions.get(id)?.reject(late), Math.min(timeout, 2 ** 31 - 1));
    const answer = new Promise((resolve, reject) => questions.set(id, { to, resolve, reject }));
    return answer.finally(() => clearTimeout(limit)).finally(() => questions.delete(id));
  }

  function close(reason = "") {
    drop();
    globalThis.removeEventListener?.("online", open);
    globalThis.document?.removeEventListener("visibilitychange", look);
    show("closed", reason);
  }

  function schedule(/** @type {() => void} */ job, /** @type {number} */ milliseconds) {
    clearTimeout(timer);
    timer = setTimeout(job, milliseconds);
  }

  function show(/** @type {State} */ next, reason = "") {
    if (state === next) return;
    state = next;
    call(onstate, state, reason);
  }

  open();
  const look = () => document.hidden || open();
  globalThis.addEventListener?.("online", open);
  globalThis.document?.addEventListener("visibilitychange", look);
  queueMicrotask(() => state === "connecting" && call(onstate, state, "")); // after connect()
  return { send, ask, close: () => close() };
}

function failure(/** @type {string} */ code, /** @type {string} */ text, payload = null) {
  return Object.assign(new Error(text), { code, payload });
}

function call(/** @type {Function | undefined} */ callback, /** @type {any[]} */ ...values) {
  const called = new Promise((resolve) => resolve(callback?.(...values)));
  called.catch(globalThis.reportError ?? console.error); // an async function's error, too
}
"""

# ---- The console's page --------------------------------------------------------------------------

_files["console.html"] = r"""<!doctype html>
<html lang="en">
  <meta name="viewport" content="width=device-width, initial-scale=1" />
  <title>datadivr console</title>
  <link rel="icon" href="data:," />
  <style>
    :root {
      color-scheme: light dark;
      --card: light-dark(#fff, #15191c);
      --line: light-dark(#dfe4e8, #2b3238);
      --accent: light-dark(#0b6a73, #5ccdd4);
    }
    :where(:not(summary, dialog)) {
      box-sizing: border-box;
      padding: 0;
      border-collapse: collapse;
      margin: 0;
      font-family: inherit;
      font-size: inherit;
      list-style: none;
      outline-color: var(--accent);
      overflow-wrap: anywhere;
      vector-effect: non-scaling-stroke;
    }
    :is(.signed-in #credentials, body:not(.signed-in) :is(#leave, #credentials ~ *)),
    :is(dialog:not([open]), ul:empty, .alone tr :nth-child(3), :is(table:has(td), ul:has(li)) + p) {
      display: none;
    }
    body {
      padding: 0 max(1rem, 50% - 45rem) 1rem;
      color: light-dark(#1a2025, #e7ebed);
      font: 0.875rem/1.5 system-ui;
      font-variant-numeric: tabular-nums;
    }
    :where(header, .bar, .axis, figcaption) {
      display: flex;
      flex-wrap: wrap;
      align-items: center;
      justify-content: space-between;
      gap: 0.25rem 0.75rem;
    }
    :is(header > h1, .bar > :first-child, figcaption > strong) {
      flex: auto;
    }
    header {
      position: sticky;
      top: 0;
      padding: 0.75rem 0;
    }
    :where(main, .card) {
      display: grid;
      grid-template-columns: repeat(auto-fill, minmax(min(17.5rem, 100%), 1fr));
      align-content: start;
      gap: 0.75rem;
    }
    :where(.card, input:not([type="checkbox"]), button) {
      padding: 0.375rem 0.625rem;
      border: 1px solid var(--line);
      border-radius: 0.375rem;
      background: var(--card);
    }
    .card {
      align-items: end;
      padding: 1rem;
    }
    :is(.whole, .card:not(#announcement) > *, td:first-child, td:last-child) {
      flex-basis: 100%;
      grid-column: 1 / -1;
    }
    figcaption strong {
      font-size: 1.5rem;
    }
    :is(.quiet, small, label, th),
    td::before {
      color: light-dark(#57626a, #9ca7ae);
      font-size: 0.75rem;
    }
    :is(.card > label > input, svg, table) {
      width: 100%;
    }
    :is(:root, header, input, button:not(.primary):hover) {
      border-color: light-dark(#7c878f, #6b767e);
      background: light-dark(#f4f6f8, #0d1012);
    }
    .primary {
      background: var(--accent);
      color: var(--card);
    }
    :is(.bad, [aria-invalid="true"], form:has([aria-invalid="true"]) [role="status"]) {
      border-color: currentColor;
      color: light-dark(#b3261e, #ff9389);
    }
    :is(tr, li) {
      border-bottom: 1px solid var(--line);
    }
    :is(th, td, li) {
      padding: 0.25rem 0.75rem 0.25rem 0;
      text-align: left;
      white-space: pre-line;
    }
    :is(th, td):nth-child(n + 5) {
      text-align: right;
    }
    #messages {
      max-height: 28rem;
      overflow: auto;
    }
    :is(#messages li, pre) {
      font: 0.75rem/1.5 monospace;
      content-visibility: auto;
      contain-intrinsic-size: auto 2rem;
      white-space: pre-wrap;
    }
    @media (width < 72rem) {
      thead {
        display: none;
      }
      tr {
        display: grid;
        grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr));
        justify-items: start;
      }
      td:not(:first-child, :last-child)::before {
        content: attr(title) "\a";
      }
    }
  </style>
  <header>
    <h1>datadivr console</h1>
    <p id="status" role="status">Connecting</p>
    <button id="leave">Sign out</button>
  </header>
  <main>
    <form id="credentials" class="card" method="dialog">
      <label>Admin token <input id="token" type="password" autocomplete="off" required /></label>
      <p class="quiet">DATADIVR_ADMIN_TOKEN, or the one that the server shows at its start</p>
      <p id="refusal" class="bad" role="alert"></p>
      <button class="primary">Open the console</button>
    </form>
    <figure class="card" aria-label="Clients connected" id="clients"></figure>
    <figure class="card" aria-label="Messages in" id="messages_received_total"></figure>
    <figure class="card" aria-label="Deliveries out" id="messages_sent_total"></figure>
    <section class="card">
      <h2>Errors</h2>
      <ul id="errors"></ul>
      <p class="quiet">None</p>
      <p id="scope" class="quiet"></p>
    </section>
    <section class="card whole">
      <search id="filter" class="bar">
        <h2 id="count">Clients</h2>
        <label>Address, id, user or room <input id="search" type="search" /></label>
        <label><input id="slowest" type="checkbox" /> Slowest first (most unsent bytes)</label>
        <p id="place" class="quiet"></p>
        <button id="previous">Previous</button>
        <button id="next">Next</button>
      </search>
      <table id="table" aria-labelledby="count" tabindex="-1"></table>
      <p class="quiet">No clients</p>
    </section>
    <form id="announcement" class="card whole" method="dialog" aria-labelledby="news">
      <h2 id="news" class="whole">Announcement</h2>
      <label>To: all, #room or an id <input id="to" name="to" value="all" required /></label>
      <label>Event name <input id="name" name="event_name" required /></label>
      <label>Sentence for people (optional) <input name="message" /></label>
      <label>Payload, in JSON: text needs "quotes" <input name="payload" /></label>
      <button class="primary">Send</button>
      <button id="talk" hidden>Send as this page's client</button>
      <p id="outcome" class="quiet whole" role="status"></p>
    </form>
    <section class="card whole" aria-labelledby="live">
      <form id="watching" class="bar" method="dialog">
        <h2 id="live">Watch messages live</h2>
        <p id="connection" class="quiet" role="status"></p>
        <label>Only events with <input id="wanted" type="search" form="none" /></label>
        <label><input id="pause" type="checkbox" form="none" /> Pause</label>
        <input id="ticket" type="password" placeholder="Client token" autocomplete="off" hidden />
        <button id="watch">Watch</button>
      </form>
      <ul id="messages" aria-labelledby="live"></ul>
      <p class="quiet">None yet. To watch, this page connects as one more client.</p>
    </section>
  </main>
  <dialog id="confirmation" class="card" aria-labelledby="question">
    <form class="bar" method="dialog">
      <h2 id="question"></h2>
      <p>A page with client.js stays away until it is loaded again; other clients may come back.</p>
      <button>Cancel</button>
      <button id="confirm" class="bad">Disconnect</button>
    </form>
  </dialog>
  <template id="chart">
    <figcaption><span class="whole"></span> <strong></strong> <small></small></figcaption>
    <svg viewBox="-120 0 120 100" preserveAspectRatio="none" height="64" aria-hidden="true">
      <path d="M-120 0V100H0V0M-90 0V100M-60 0V100M-30 0V100" fill="none" stroke="var(--line)" />
      <polyline fill="var(--accent)" fill-opacity="0.15" stroke="var(--accent)" stroke-width="2" />
    </svg>
    <p class="quiet axis"><span>2 minutes ago</span> <span>1 minute ago</span> <span>now</span></p>
  </template>
  <script>
    const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((it) => [it.id, it]));
    const root = new URL(location.pathname.endsWith("/") ? ".." : ".", location);
    const rowsPerPage = 20;
    const names = "Client,Rooms,Node,Since,Messages in,Messages out,Unsent bytes,Action".split(",");
    const state = {
      token: "",
      timer: 0, // of the next refresh
      liveFrom: 0, // when the status may say "Live"; never, while the server is gone
      listDue: 0, // when to list the clients again
      clients: [], // as /clients lists them
      page: 0, // of the table
      samples: [], // of /metrics: two minutes back, and the one before
      span: "", // how long that is
      server: null, // to watch messages, by client.js
      own: null, // what the server answers that client's whoami
      isWatching: false, // or about to
      drawing: 0, // the timer of the next look at what arrived
      arrived: [], // the last 200 messages since that look
      kept: [], // the last 200, from which the list shows what the filter lets through
    };
    const format = (number) => number.toLocaleString([], { maximumFractionDigits: 1 });
    const roomsOf = ({ rooms = [] }) => rooms.map((it) => `#${it}`).join(" "); // older nodes: none
    const textOf = (it) => [it.address, it.user, it.id, roomsOf(it)].join("\n").toLowerCase();
    const isWanted = ({ name }) => name.includes(ui.wanted.value.toLowerCase());
    // JavaScript would round a large number: it goes out as it was typed.
    const asTyped = (_, it, { source }) => (typeof it === "number" ? JSON.rawJSON(source) : it);

    function make(tag, properties, ...content) {
      const element = Object.assign(document.createElement(tag), properties);
      element.append(...content.flat());
      return element;
    }

    async function request(path, options, token = state.token) {
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
      Object.assign(state, { token: "", listDue: 0, samples: [], arrived: [], kept: [] });
      sessionStorage.removeItem("datadivr");
      document.body.className = "";
      showStatus("Signed out");
      ui.confirmation.close();
      for (const form of document.forms) form.reset();
      state.server?.close();
      showMessages();
      ui.refusal.textContent = fault;
      ui.token.focus();
    }

    function showStatus(text, milliseconds = 0) {
      if (ui.status.textContent !== text) ui.status.textContent = text; // it is read aloud once
      state.liveFrom = performance.now() + milliseconds;
      ui.status.className = state.liveFrom === Infinity ? "bad" : "quiet";
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
      const last = state.samples.at(-1)?.date.toLocaleString() ?? "never";
      showStatus(`${message} Trying again every second. Last figures: ${last}.`, Infinity);
    }

    async function loadClients() {
      const pages = [];
      for (let after = ""; after !== null; after = pages.at(-1).next) {
        pages.push(JSON.parse(await request(`clients?limit=1000&after=${after}`)));
      }
      state.clients = pages.flatMap((page) => page.clients);
      state.listDue = performance.now() + 2000 + state.clients.length; // long lists cost more
      const [own, all] = [state.samples.at(-1).clients, state.clients.length];
      const text = `Figures and errors are of one process or machine: ${own} of ${all} clients.`;
      ui.scope.textContent = Math.abs(own - all) > all / 100 ? text : ""; // some come and go
      const rest = pages.some((page) => page.partial) ? ". Some nodes did not answer." : "";
      ui.count.textContent = `Clients: ${format(all)}${rest}`;
      ui.table.classList.toggle("alone", new Set(state.clients.map((it) => it.node)).size < 2);
      showClients();
    }

    async function loadFigures() {
      const text = await request("metrics");
      const now = { at: performance.now() / 1000, date: new Date(), errors: {} };
      const lines = text.matchAll(/^datadivr_(\w+)(?:\{type="(.*)"\})? (\S+)$/gm);
      for (const [, name, type, value] of lines) {
        // Prometheus escapes a label's text as JSON does.
        if (name === "errors_total") now.errors[JSON.parse(`"${type}"`)] = Number(value);
        else now[name] = Number(value);
      }
      while (state.samples[1]?.at <= now.at - 120) state.samples.shift();
      state.samples.push(now);
      const [{ at, date, errors }] = state.samples; // older, if this page was hidden
      const isFull = Math.abs(now.at - at - 122) < 3;
      state.span = isFull ? "in two minutes" : `since ${date.toLocaleTimeString()}`;
      document.querySelectorAll("figure").forEach(drawChart);
      showErrors(errors, now.errors);
    }

    function ratesOf(metric) {
      return state.samples.map((_, index, samples) => {
        const [before, after = before] = samples.slice(Math.max(0, index - 1));
        // A counter that went down belongs to a server that was started again.
        return Math.max(0, after[metric] - before[metric]) / (after.at - before.at || 1);
      });
    }

    function drawChart(figure) {
      if (!figure.hasChildNodes()) figure.append(ui.chart.content.cloneNode(true));
      const unit = figure.id.endsWith("_total") ? "/s" : "";
      const values = unit ? ratesOf(figure.id) : state.samples.map((sample) => sample[figure.id]);
      const most = Math.max(...values);
      const x = (index) => state.samples[index].at - state.samples.at(-1).at;
      const y = (value) => 98 - (90 * value) / (most || 1);
      const points = values.map((value, index) => `${x(index)},${y(value)}`).join(" ");
      figure.querySelector("polyline").setAttribute("points", `${x(0)},100 ${points} 0,100`);
      const [now, peak] = [values.at(-1), most].map((value) => format(value) + unit);
      const texts = [figure.ariaLabel, now, `peak ${peak} ${state.span}`];
      texts.forEach((text, index) => (figure.firstElementChild.children[index].textContent = text));
    }

    function showErrors(before, after) {
      ui.errors.replaceChildren();
      for (const [type, count] of Object.entries(after)) {
        const recent = format(Math.max(0, count - (before[type] ?? 0)));
        const text = `${type}\n${recent} ${state.span}, ${format(count)} in all`;
        if (count > 0) ui.errors.append(make("li", {}, text));
      }
    }

    function showClients(page = state.page) {
      // A button that is held down, or gets the focus back from the dialog, must not vanish.
      if (ui.rows.matches(":active") || ui.confirmation.open) return;
      const text = ui.search.value.toLowerCase();
      const found = state.clients.filter((client) => textOf(client).includes(text));
      if (ui.slowest.checked) found.sort((one, other) => other.buffered_bytes - one.buffered_bytes);
      const lastPage = Math.max(0, Math.ceil(found.length / rowsPerPage) - 1);
      state.page = Math.min(page, lastPage);
      const first = rowsPerPage * state.page;
      const shown = found.slice(first, first + rowsPerPage);
      const place = `${first + 1}\u2013${first + shown.length} of ${format(found.length)}`;
      ui.place.textContent = shown.length > 0 ? place : "";
      ui.previous.disabled = state.page === 0;
      ui.next.disabled = state.page === lastPage;
      const focused = ui.rows.querySelector(":focus");
      ui.rows.replaceChildren(...shown.map(makeRow));
      if (focused) (document.getElementById(focused.id) ?? ui.table).focus({ preventScroll: true });
    }

    function makeRow(client) {
      const { address, user, id, node, connected_at } = client;
      const mark = id === state.own?.payload ? " (this page)" : "";
      const name = [make("strong", {}, address + mark), ` ${user ?? ""}\n`, make("small", {}, id)];
      const since = new Date(connected_at).toLocaleString();
      const counts = [client.messages_received, client.messages_sent, client.buffered_bytes];
      const write = makeButton("Message", client, () => writeTo(client));
      const drop = makeButton("Disconnect", client, () => disconnect(client));
      const cells = [name, roomsOf(client), node, since, ...counts.map(format), [write, " ", drop]];
      // A small screen shows the titles in place of the head; an empty cell's would be read for it.
      const makeCell = (content, n) => make("td", { title: content && names[n] }, content);
      const row = make("tr", {}, cells.map(makeCell));
      row.cells[0].role = "rowheader";
      return row;
    }

    function makeButton(text, { id, address }, onclick) {
      return make("button", { id: text + id, ariaLabel: `${text} ${address}`, onclick }, text);
    }

    function writeTo({ id }) {
      ui.to.value = id;
      ui.name.focus();
    }

    function disconnect({ id, address }) {
      ui.question.textContent = `Disconnect ${address}?`;
      ui.confirmation.showModal();
      ui.confirm.onclick = async () => {
        const answer = request(`clients/${id}`, { method: "DELETE" });
        await answer.catch(({ message }) => showStatus(`${address}: ${message}`, 10000));
        state.listDue = 0;
      };
    }

    async function submit(send) {
      const fields = Object.fromEntries(new FormData(ui.announcement));
      try {
        const payload = JSON.parse(fields.payload || "null", asTyped);
        showOutcome(await send({ ...fields, message: fields.message || null, payload }));
      } catch (error) {
        const hint = error instanceof SyntaxError ? 'In JSON, text needs quotes: "hello". ' : "";
        showOutcome(hint + error.message, ui.announcement.elements[hint ? "payload" : error.cause]);
      }
    }

    async function announce(message) {
      const options = { method: "POST", body: JSON.stringify(message) };
      const { recipients, partial } = JSON.parse(await request("messages", options));
      return `“${message.event_name}” reached clients: ${recipients}${partial ? " or more" : ""}.`;
    }

    function talk({ event_name, payload, ...rest }) {
      state.server.send(event_name, payload, rest);
      return `“${event_name}” is sent. What comes back shows below.`;
    }

    function showOutcome(text, fault) {
      for (const field of ui.announcement.elements) field.ariaInvalid = field === fault;
      ui.outcome.textContent = text;
      fault?.setAttribute("aria-describedby", "outcome");
      fault?.focus();
    }

    async function watch() {
      if (state.isWatching) return state.server.close();
      state.server?.close(); // it goes on trying where it was refused
      const coming = (state.server = { close: () => showConnection("closed") });
      showConnection("connecting");
      const { connect } = await import(new URL("client.js", root));
      if (state.server !== coming || !state.isWatching) return; // it was stopped meanwhile
      state.server = connect({ token: ui.ticket.value, onmessage: hear, onstate: showConnection });
    }

    async function showConnection(name, reason) {
      state.isWatching = name === "connecting" || name === "open";
      ui.connection.textContent = [`Connection: ${name}`, reason].filter(Boolean).join(". ");
      ui.watch.textContent = state.isWatching ? "Stop" : "Watch";
      ui.talk.hidden = name !== "open";
      ui.ticket.hidden &&= name !== "refused";
      if (name === "open") state.own = await state.server.ask("whoami").catch(() => null);
    }

    function hear(message) {
      keep(state.arrived, { message, moment: new Date(), name: message.event_name.toLowerCase() });
      if (!ui.pause.checked) state.drawing ||= setTimeout(requestAnimationFrame, 100, showMessages);
    }

    function keep(entries, entry) {
      if (entries.push(entry) <= 200) return;
      const index = entries.findIndex((entry) => !isWanted(entry)); // what is not shown goes first
      entries.splice(Math.max(0, index), 1);
    }

    function showMessages() {
      state.drawing = 0;
      if (!ui.pause.checked) state.arrived.splice(0).forEach((entry) => keep(state.kept, entry));
      const wanted = state.kept.filter(isWanted).reverse();
      ui.messages.replaceChildren(...wanted.map((entry) => (entry.item ??= makeItem(entry))));
    }

    function makeItem({ message, moment }) {
      const { event_name, from_id, to, payload } = message;
      const way = `${event_name.padEnd(16)}  ${from_id.padEnd(36)} → ${to.padEnd(8)}`;
      const text = `${message.message ?? ""}  payload: ${JSON.stringify(payload)}`.trim();
      const line = [moment.toLocaleTimeString(), way, text.slice(0, 120)].join("  ");
      const pre = make("pre");
      const ontoggle = () => (pre.textContent = JSON.stringify(message, null, 2));
      const details = make("details", { ontoggle }, make("summary", {}, line), pre);
      return make("li", { className: event_name === "error" ? "bad" : "" }, details);
    }

    const heads = names.map((name) => make("th", {}, name));
    ui.table.createTHead().append(make("tr", {}, heads));
    ui.messages_sent_total.title = "One message to three clients counts three.";
    ui.rows = Object.assign(ui.table.createTBody(), { id: "rows" });
    window.onhashchange = start;
    ui.credentials.onsubmit = () => signIn(ui.token.value.trim());
    ui.announcement.onsubmit = (event) => submit(event.submitter === ui.talk ? talk : announce);
    ui.announcement.onclick = ({ target }) => target.type === "submit" && showOutcome("");
    ui.watching.onsubmit = () => watch().catch(({ message }) => showConnection("refused", message));
    ui.leave.onclick = () => signOut("");
    ui.filter.oninput = () => showClients(0);
    ui.previous.onclick = () => showClients(state.page - 1);
    ui.next.onclick = () => showClients(state.page + 1);
    ui.pause.onchange = ui.wanted.oninput = showMessages;
    ui.messages.onscroll = ui.messages.onpointerdown = () => (ui.pause.checked = true); // to read
    ui.messages.addEventListener("focusin", ui.messages.onscroll);
    start();
  </script>
</html>
"""

if __name__ == "__main__":
    main()
