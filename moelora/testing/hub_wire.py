"""The wire of the local hub: what came in, what goes out, what is made to go wrong. Begin with Request and Reply.

`HttpListener` is the thin part that speaks HTTP; it hands a `Request` to one function and writes the `Reply` it
gets back. A `Fault` is a scripted failure: it changes, delays or replaces the replies to matching requests.
"""

import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it arrived. `host` is "hub" or "storage"; header names are in lower case."""

    host: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    def __str__(self) -> str:
        return f"{self.method} {self.path}" if self.host == "hub" else f"{self.method} {self.host}:{self.path}"

    @property
    def token(self) -> str | None:
        """The bearer token that was sent."""
        return self.headers.get("authorization", "").removeprefix("Bearer ").strip() or None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer; an empty header is not sent. `hang_up_after` closes the connection after so many bytes of the body."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hang_up_after: int | None = None


def json_reply(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON answer."""
    with_type = {"Content-Type": "application/json", **(headers or {})}
    return Reply(status=status, headers=with_type, body=json.dumps(content).encode())


def error_reply(status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    """An answer that refuses; the client picks its exception class by the header X-Error-Code."""
    codes = {"X-Error-Code": code} if code else {}
    explained = {"X-Error-Message": message, **codes, **(headers or {})}
    return json_reply({"error": message}, status=status, headers=explained)


def with_range(request: Request, reply: Reply) -> Reply:
    """The part of the body that the request's `Range: bytes=first-last` asks for (206), or all of it (200)."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None or asked.groups() == ("", ""):
        return reply
    total = len(reply.body)
    first, last = asked.groups()
    start = int(first) if first else max(total - int(last), 0)
    stop = min(int(last) + 1, total) if first and last else total
    if start >= total or start >= stop:
        return Reply(status=416, headers={"Content-Range": f"bytes */{total}"})
    headers = {**reply.headers, "Content-Range": f"bytes {start}-{stop - 1}/{total}"}
    return replace(reply, status=206, headers=headers, body=reply.body[start:stop])


@dataclass(kw_only=True)
class Fault:
    """A scripted failure for the next `times` requests whose path contains `path` (and whose method matches).

    `status` replaces the answer, with `retry_after` seconds in its header; `drop_headers` leaves headers out;
    `add_headers` sets some; `truncate_to` sends that many bytes and says so, `hang_up_after` announces all and hangs
    up; `corrupt` flips the last byte; `hang_s` waits first.
    """

    path: str
    method: str | None = None
    times: int = 1
    status: int | None = None
    retry_after: int | None = None
    drop_headers: tuple[str, ...] = ()
    add_headers: dict[str, str] = field(default_factory=dict)
    truncate_to: int | None = None
    hang_up_after: int | None = None
    corrupt: bool = False
    hang_s: float = 0.0

    def matches(self, request: Request) -> bool:
        """Whether this request is to fail now."""
        return self.times > 0 and self.path in request.path and self.method in (None, request.method)

    def spoil(self, reply: Reply) -> Reply:
        """The reply with everything wrong that this fault asks for."""
        if self.status is not None:
            reply = error_reply(self.status, None, "scripted failure")
        if self.retry_after is not None:
            reply = replace(reply, headers={**reply.headers, "Retry-After": str(self.retry_after)})
        body = reply.body if self.truncate_to is None else reply.body[: self.truncate_to]
        if self.corrupt and body:
            body = body[:-1] + bytes([body[-1] ^ 0xFF])
        return replace(
            reply,
            headers={**reply.headers, **dict.fromkeys(self.drop_headers, ""), **self.add_headers},
            body=body,
            hang_up_after=self.hang_up_after,
        )


class HttpListener(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1 and answers every request with `respond(request)`.

    The storage goes by another host name than the hub, as a content network does: clients before huggingface_hub 2
    tell by the name alone, not by the port, which redirects leave the hub.
    """

    daemon_threads = True

    def __init__(self, host: str, respond: Callable[[Request], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host: str = host
        self.respond: Callable[[Request], Reply] = respond

    @property
    def url(self) -> str:
        """Where it listens."""
        name = "localhost" if self.host == "storage" else "127.0.0.1"
        return f"http://{name}:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no event; anything else is reported as usual."""
        import sys

        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the listener for the reply and writes it. One request a connection: nothing lingers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, HttpListener)
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            host=self.server.host,
            method=self.command,
            path=parts.path,
            query=parse_qs(parts.query),
            headers=headers,
            body=self._read_body(headers),
        )
        self._write(self.server.respond(request))

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the server keeps its requests in a list."""

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _write(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), "Connection": "close", **reply.headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: reply.hang_up_after])
        if reply.hang_up_after is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
