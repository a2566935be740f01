"""Checks before Gradio: which routes are served, to whom, and what a request may contain."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import JSONResponse

from .service import Refused, shown
from .uploads import Uploads

log = logging.getLogger("captioner.app")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# The login page and its assets. Everything else requires a login, if there is an --auth-file.
PUBLIC = re.compile(
    r"/|/health|/log(in|out)/?|/(assets|static|svelte)/.+|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon"
)
# The routes that the page and the API use. Others of Gradio connect to other hosts, or show what other users did.
SERVED = re.compile(
    r"/config/?|/gradio_api/(info/?|openapi\.json|app_id/?|user/?|login_check/?|upload|upload_progress|startup-events"
    r"|theme\.css|queue/(join|data|status)|call/.+|(run|api)/.+|file=.+|heartbeat/.+|cancel|reset/?)"
)
CALL = re.compile(r"/gradio_api/(?P<way>queue/join|call/v2|call|run|api)(/(?P<name>[^/]+))?/?")
FILE_OF_ANOTHER_HOST = re.compile(r"/gradio_api/file=\s*[a-z][a-z0-9+.-]+:.*", re.IGNORECASE | re.DOTALL)
UPLOAD = "/gradio_api/upload"
STRIDE = 16_000_000  # bytes of an upload after which the room for it is checked again
# Gradio's page describes the API, also to those who are not logged in.
API_INFO = re.compile(rb"window\.gradio_api_info = .*?;</script>", re.DOTALL)
NO_API_INFO = b'window.gradio_api_info = {"named_endpoints": {}, "unnamed_endpoints": {}};</script>'
MOST_IGNORED = 500_000_000  # bytes of a refused request that are read and ignored, so that the client gets the answer
MOST_BYTES = 4_000_000  # of a request that calls a function; photos are uploaded separately

LINK = "This server asks no other host for anything: download the photo, and upload the file."
NOT_UPLOADED = "This file was not uploaded, or it was deleted since: upload it again."
NO_FILE = (
    'A photo should be named by the path that its upload gave: {"path": ..., "meta": {"_type": "gradio.FileData"}}.'
)
FULL = "The server has no room for this upload: send less, or try again later."
UNREADABLE = "The server cannot read this request. The cause is in its log; the other requests are not affected."


class Gate:
    """ASGI middleware that refuses requests that the page and the API do not make, and passes the others on.

    Args:
        app: the next application.
        page: the page, with the functions that may be called.
        gradio: Gradio's application, which holds the logins.
        uploads: the folder of uploads.
    """

    def __init__(self, app: Any, page: gr.Blocks, gradio: Any, uploads: Uploads) -> None:
        self.app, self.page, self.gradio, self.uploads = app, page, gradio, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse one request, or pass it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        problem = self.refuse(scope)
        if path == UPLOAD:
            receive, send = patient(receive, send)
            if problem is None:
                return await self.upload(scope, receive, send)
        if problem is None and scope["method"] == "POST" and (called := CALL.fullmatch(path)):
            body = await read(receive)
            if body is None:
                return None  # the client is gone
            problem = self.refuse_call(called["way"], called["name"], body)
            receive = replayed(body, receive)
        if problem is None:
            if path == "/" and self.gradio.auth is not None and not self.logged_in(scope):
                scope, send = without_api_info(scope, send)
            with contextlib.suppress(ClientDisconnect):
                await self.app(scope, receive, send)
            return None
        status, detail = problem
        return await JSONResponse({"detail": detail}, status)(scope, receive, send)

    async def upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload on as long as the folder has room; otherwise end it and answer 507."""
        room, received = await self.uploads.make_room(), 0

        async def receive_part() -> MutableMapping[str, Any]:
            nonlocal room, received
            message = await receive()
            received += len(message.get("body", b""))
            if received >= STRIDE:
                room, received = await self.uploads.make_room(), 0
            return message if room else {"type": "http.disconnect"}

        async def send_answer(message: MutableMapping[str, Any]) -> None:
            if room:
                await send(message)

        if room:
            with contextlib.suppress(ClientDisconnect):
                await self.app(scope, receive_part, send_answer)
        if not room:
            await JSONResponse({"detail": FULL}, 507)(scope, receive, send)

    def refuse(self, scope: Scope) -> tuple[int, Any] | None:
        """Status and reason if a path is not served, or not to this client; else None."""
        path = scope["path"]
        if PUBLIC.fullmatch(path):
            return None
        if self.gradio.auth is not None and not self.logged_in(scope):
            return 401, {"error": "Not authenticated", "auth_message": None}
        if FILE_OF_ANOTHER_HOST.fullmatch(path):
            return 403, LINK
        return None if SERVED.fullmatch(path) else (404, "Not Found")

    def logged_in(self, scope: Scope) -> bool:
        """Whether the request has a cookie that Gradio issued at a login."""
        cookies = HTTPConnection(scope).cookies
        names = (f"access-token-{self.gradio.cookie_id}", f"access-token-unsecure-{self.gradio.cookie_id}")
        return any(cookies.get(name) in self.gradio.tokens for name in names)

    def refuse_call(self, way: str, name: str | None, body: bytes) -> tuple[int, str] | None:
        """Status and reason if the body of a call does not fit its function; else None.

        Gradio gathers calls into batches, where a call of the wrong form would make the others fail.
        """
        if len(body) > MOST_BYTES:
            return 413, f"The request has more than {MOST_BYTES:,} bytes; upload photos before you name them."
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            return 400, "The request is not JSON."
        if not isinstance(values, dict):
            return 400, f"The request should be a JSON object, not {shown(values)}."
        if way == "call/v2":
            return self.refuse_named(name or "", values)
        function = values.get("fn_index")
        if way == "call" or (function is None and name):
            matching = [number for number, fn in self.page.fns.items() if fn.api_name == name]
            function = matching[0] if matching else None
        if not isinstance(function, int) or function not in self.page.fns:
            return 404, f"There is no function {shown(name or function)}."
        data, wanted = values.get("data"), len(self.page.fns[function].inputs)
        if not isinstance(data, list) or len(data) != wanted:
            given = len(data) if isinstance(data, list) else shown(data)
            return 400, f'The request should have a list "data" of {wanted} values, not {given}.'
        return None

    def refuse_named(self, name: str, values: dict[str, Any]) -> tuple[int, str] | None:
        """As `refuse_call`, for a call whose values have names."""
        endpoint = self.page.get_api_info()["named_endpoints"].get(f"/{name}")
        if endpoint is None:
            return 404, f"There is no function {shown(name)}."
        parameters = {one["parameter_name"]: one["parameter_has_default"] for one in endpoint["parameters"]}
        if unknown := [key for key in values if key not in parameters]:
            return 400, f"There is no parameter {shown(unknown[0])}; there are {', '.join(parameters)}."
        if missing := [key for key, optional in parameters.items() if not optional and key not in values]:
            return 400, f"The parameter {missing[0]} is missing."
        return None


async def read(receive: Receive) -> bytes | None:
    """The body of a request, cut if it is larger than MOST_BYTES; None if the client disconnected."""
    body, more, ignored = b"", True, 0
    while more and ignored < MOST_IGNORED:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part, more = message.get("body", b""), message.get("more_body", False)
        if len(body) > MOST_BYTES:
            ignored += len(part)
        else:
            body += part
    return body


def patient(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """The same functions, but an answer waits for the end of the request.

    A client that is still sending when the connection closes reports a network error instead of the answer.
    """
    more = True

    async def receive_part() -> MutableMapping[str, Any]:
        nonlocal more
        message = await receive()
        more = message.get("more_body", False)
        return message

    async def send_late(message: MutableMapping[str, Any]) -> None:
        ignored = 0
        while more and ignored < MOST_IGNORED:
            ignored += len((await receive_part()).get("body", b""))
        await send(message)

    return receive_part, send_late


def without_api_info(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """The same for the login page, with the description of the API removed."""
    start: MutableMapping[str, Any] = {}
    body = b""

    async def send_page(message: MutableMapping[str, Any]) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
            return
        body += message.get("body", b"")
        if not message.get("more_body", False):
            page = API_INFO.sub(NO_API_INFO, body)
            headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            headers.append((b"content-length", str(len(page)).encode()))
            await send({**start, "headers": headers})
            await send({"type": "http.response.body", "body": page})

    plain = [(name, value) for name, value in scope["headers"] if name.lower() != b"accept-encoding"]
    return {**scope, "headers": plain}, send_page


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, for the next application."""
    waiting = [body]

    async def again() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


class Page(gr.Blocks):
    """Gradio's page, where a request that cannot be read does not affect the others of its batch.

    Gradio reads the inputs of a whole batch before it calls the function, so one file that was never uploaded would
    make all fail. Here the function gets a `Refused` in place of that file, or of all inputs of that request.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> list[Any]:
        """The inputs of one request for the function."""
        try:
            sifted = [sift(value) for value in inputs]
            values = await super().preprocess_data(block_fn, [value for value, _ in sifted], *rest, **named)
            return [put_back(value, refused) for value, (_, refused) in zip(values, sifted, strict=True)]
        except Refused as error:
            reason = error
        except ValidationError:
            reason = Refused(NO_FILE)
        except gr.Error as error:
            reason = Refused(str(error.message))
        except Exception:
            log.exception("a request cannot be read")
            reason = Refused(UNREADABLE)
        return [reason] * len(block_fn.inputs)


def sift(value: Any) -> tuple[Any, dict[int, Refused]]:
    """A value without the files that cannot be used, and the reasons by their place in the list. Raises Refused."""
    if not isinstance(value, list):
        check_files(value)
        return value, {}
    kept: list[Any] = []
    refused: dict[int, Refused] = {}
    for place, one in enumerate(value):
        try:
            check_files(one)
            kept.append(one)
        except Refused as error:
            refused[place] = error
    return kept, refused


def put_back(value: Any, refused: dict[int, Refused]) -> Any:
    """The list with each `Refused` at its place."""
    if not refused:
        return value
    rest = iter(value or [])
    return [refused[place] if place in refused else next(rest) for place in range(len(value or []) + len(refused))]


def check_files(value: Any) -> None:
    """Raise Refused if a value contains a file that was not uploaded to this server."""
    if isinstance(value, list):
        for one in value:
            check_files(one)
    elif isinstance(value, dict) and ("path" in value or "url" in value):
        path, link = value.get("path"), value.get("url")
        name = Path(path).name if isinstance(path, str) else ""
        if any(isinstance(one, str) and "://" in one for one in ([path] if path else [link])):
            raise Refused(LINK, name)
        if not isinstance(path, str) or not uploaded(path):
            raise Refused(NOT_UPLOADED, name)
    elif isinstance(value, dict):
        for one in value.values():
            check_files(one)


def uploaded(path: str) -> bool:
    """Whether a path, once its links and dots are resolved, is a file in the folder of uploads."""
    try:
        real = Path(os.path.realpath(path))
        return real.is_relative_to(os.path.realpath(get_upload_folder())) and real.is_file()
    except (OSError, ValueError):  # a name that is too long, or contains a null byte
        return False
