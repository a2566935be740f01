"""What stands between the network and Gradio: which paths are served, to whom, and what a request may hold."""

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

log = logging.getLogger("captioner.app")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# The login page and what it shows itself with. Everything else is for those who are logged in.
PUBLIC = re.compile(
    r"/|/health|/log(in|out)/?|/(assets|static|svelte)/.+|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon"
)
# What the page and the API use. Gradio has other routes: some ask other hosts, some show what other people did.
SERVED = re.compile(
    r"/config/?|/gradio_api/(info/?|openapi\.json|app_id/?|user/?|login_check/?|upload|upload_progress|startup-events"
    r"|theme\.css|queue/(join|data|status)|call/.+|(run|api)/.+|file=.+|heartbeat/.+|cancel|reset/?)"
)
CALL = re.compile(r"/gradio_api/(?P<way>queue/join|call/v2|call|run|api)(/(?P<name>[^/]+))?/?")
FILE_OF_ANOTHER_HOST = re.compile(r"/gradio_api/file=\s*[a-z][a-z0-9+.-]+:.*", re.IGNORECASE | re.DOTALL)
UPLOAD = "/gradio_api/upload"
MOST_IGNORED = 500_000_000  # bytes of a request that are read only so that the client reads the refusal
MOST_BYTES = 4_000_000  # of a request that calls a function; photos are uploaded before

LINK = "This server asks no other host for anything: download the photo, and upload the file."
NOT_UPLOADED = "This file was not uploaded, or it was deleted since: upload it again."
NO_FILE = (
    'A photo should be named by the path that its upload gave: {"path": ..., "meta": {"_type": "gradio.FileData"}}.'
)
UNREADABLE = "The server cannot read this request. The cause is in its log; the other requests are not affected."


class Gate:
    """ASGI middleware that answers what is not served, and hands everything else on.

    Args:
        app: the next application.
        page: the page's functions.
        gradio: Gradio's application, which knows who is logged in.
    """

    def __init__(self, app: Any, page: gr.Blocks, gradio: Any) -> None:
        self.app, self.page, self.gradio = app, page, gradio

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        problem = self.refuse(scope)
        if path == UPLOAD:
            receive, send = patient(receive, send)
        if problem is None and scope["method"] == "POST" and (called := CALL.fullmatch(path)):
            body = await read(receive)
            if body is None:
                return None  # the client is gone
            problem = self.refuse_call(called["way"], called["name"], body)
            receive = replayed(body, receive)
        if problem is None:
            with contextlib.suppress(ClientDisconnect):
                await self.app(scope, receive, send)
            return None
        status, detail = problem
        return await JSONResponse({"detail": detail}, status)(scope, receive, send)

    def refuse(self, scope: Scope) -> tuple[int, Any] | None:
        """Status and reason where a path is not served, or not to this client."""
        path = scope["path"]
        if PUBLIC.fullmatch(path):
            return None
        if self.gradio.auth is not None and not self.logged_in(scope):
            return 401, {"error": "Not authenticated", "auth_message": None}
        if FILE_OF_ANOTHER_HOST.fullmatch(path):
            return 403, LINK
        return None if SERVED.fullmatch(path) else (404, "Not Found")

    def logged_in(self, scope: Scope) -> bool:
        """Whether the request carries a cookie that Gradio gave at a login."""
        cookies = HTTPConnection(scope).cookies
        names = (f"access-token-{self.gradio.cookie_id}", f"access-token-unsecure-{self.gradio.cookie_id}")
        return any(cookies.get(name) in self.gradio.tokens for name in names)

    def refuse_call(self, way: str, name: str | None, body: bytes) -> tuple[int, str] | None:
        """Status and reason where a call cannot be put into a batch with others."""
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
        """As `refuse_call`, where each value has a name."""
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
    """The body of a request, only its beginning where it is too large; None where the client went away."""
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
    """The same, but an answer waits for the end of the request.

    A client that still sends when the connection is closed sees an error of the network, and not the reason.
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


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for the next application, which has not seen the body yet."""
    waiting = [body]

    async def again() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


class Page(gr.Blocks):
    """Gradio's page, where a request that cannot be read fails alone.

    Gradio reads the inputs of a whole batch before it calls the function, so that one file that was never uploaded
    would fail everybody. Here the function gets a `Refused` in place of that file, or of all inputs of that request.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> list[Any]:
        """The values of one request, as the function gets them."""
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
    """A value without the files in it that cannot be used, and those by their place in the list. Raises Refused."""
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
    """The list with what was refused in its place."""
    if not refused:
        return value
    rest = iter(value or [])
    return [refused[place] if place in refused else next(rest) for place in range(len(value or []) + len(refused))]


def check_files(value: Any) -> None:
    """Raise Refused where a value has a file in it that was not uploaded to this server."""
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
    """Whether a path is that of a file in the folder of uploads, whichever links and dots are in it."""
    try:
        real = Path(os.path.realpath(path))
        return real.is_relative_to(os.path.realpath(get_upload_folder())) and real.is_file()
    except (OSError, ValueError):  # a name that is too long, or with a zero in it
        return False
