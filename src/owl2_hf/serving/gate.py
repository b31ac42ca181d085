"""Check path, API key, size and duration of each request before the application gets it.

An ASGI application around another. Errors have OpenAI's shape, `{"error": {"message", "type",
"code"}}`.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

METHODS = {
    "/health": "GET",
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/score": "POST",
    "/load_model": "POST",
}
MAX_WAITING = 64  # requests that are running or waiting
BODY_SECONDS = 60.0
DRAIN_SECONDS = 5.0
TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": message,
            "type": TYPES.get(status, "invalid_request_error"),
            "code": code,
        }
    }


class Refusal(Exception):
    """A request that goes no further."""

    def __init__(
        self, status: int, message: str, code: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class Gate:
    """Lets requests through to `app`, each with its whole body, and ends those whose client has
    gone.

    Args:
        api_key: What `Authorization: Bearer` must say, if not `None`; /health is open to all.
        max_body_bytes: Size of a body, also of one that comes in chunks.
    """

    def __init__(self, app: Any, api_key: str | None, max_body_bytes: int) -> None:
        self.app, self.api_key, self.max_body_bytes = app, api_key, max_body_bytes
        self.num_waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def tracked_send(message: MutableMapping[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            self._check(scope)
            if scope["method"] == "POST" and self.num_waiting >= MAX_WAITING:
                raise Refusal(
                    429,
                    f"{MAX_WAITING} requests are waiting; try again later.",
                    "busy",
                    {"retry-after": "5"},
                )
            self.num_waiting += 1
            try:
                body = await self._read_body(receive)
                await _run_while_connected(self.app, scope, body, receive, tracked_send)
            finally:
                self.num_waiting -= 1
        except Refusal as refusal:
            await _refuse(refusal, send, receive)
        except asyncio.CancelledError:  # the server is shutting down and cancels this task
            if not has_begun:
                await _refuse(Refusal(503, "the server is shutting down.", "shutting_down"), send)

    def _check(self, scope: Scope) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        method = "GET" if path.startswith("/v1/models/") else METHODS.get(path)
        if path != "/health" and self.api_key is not None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(
                key.strip(), self.api_key.encode()
            ):
                message = "expected the server's API key as 'Authorization: Bearer KEY'."
                raise Refusal(401, message, "invalid_api_key", {"www-authenticate": "Bearer"})
        if method is None:
            raise Refusal(404, f"unknown path; expected one of {', '.join(METHODS)}.", "not_found")
        if scope["method"] != method:
            raise Refusal(
                405, f"this path accepts only {method}.", "method_not_allowed", {"allow": method}
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            f"the request body must be at most {self.max_body_bytes:,} bytes.",
            "request_too_large",
        )

    async def _read_body(self, receive: Receive) -> bytes:
        async def read() -> bytes:
            body = bytearray()
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "the request body is incomplete.", "incomplete_body")
                body += message.get("body", b"")
                if len(body) > self.max_body_bytes:
                    raise self._too_large()
                if not message.get("more_body"):
                    return bytes(body)

        try:
            return await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(
                408,
                f"the request body took more than {BODY_SECONDS:g} seconds to arrive.",
                "timeout",
            ) from None


async def _run_while_connected(
    app: Any, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """The application's answer; its task is cancelled as soon as the client has gone."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.ensure_future(app(scope, replay, send))
    gone = asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _refuse(refusal: Refusal, send: Send, receive: Receive | None = None) -> None:
    """Answer with an error; what the client still sends is read for a while, so that it comes to
    read the answer.
    """
    content = json.dumps(error_body(refusal.status, str(refusal), refusal.code)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "connection": "close",
        **refusal.headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content, "more_body": True})

    async def drain(receive: Receive) -> None:
        while (await receive()).get("more_body"):
            pass

    if receive is not None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(drain(receive), DRAIN_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
