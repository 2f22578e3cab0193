"""A proxy in front of an S3 server that spoils a share of the requests. A process of its own; seeded.

    python tests/faults/proxy.py --upstream http://127.0.0.1:4566 --rate 0.05 --seed 7

prints its port. GET /-/counts gives the number of requests by what was done with them; POST /-/rules with JSON changes
the rules while it runs: {"rate": 0.2}, {"kinds": ["stall"]}, {"expired": ["KEY ID", ...]}, {"read_only": true}.
"""

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace

KINDS = ("slowdown", "error", "reset", "cut", "stall", "swallow")
"""503 SlowDown; 500 InternalError; reset before the server saw it; reset in mid answer; silence; a write that the
server did and whose answer is lost. `cut` is for requests that read and `swallow` for those that write."""
BODY = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
    "<RequestId>{request}</RequestId></Error>"
)
FAILURES = {
    "slowdown": (503, "Slow Down", "SlowDown", "Please reduce your request rate."),
    "error": (500, "Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "Forbidden", "AccessDenied", "Access Denied"),
    "expired": (403, "Forbidden", "ExpiredToken", "The provided token has expired."),
}


@dataclass
class Rules:
    """What is spoiled. Changed while the proxy runs."""

    rate: float = 0.0
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    stall_s: float = 5.0
    expired: list[str] = field(default_factory=list)
    """Access key ids whose time is over."""
    read_only: bool = False
    """True if nobody may write."""
    deaf: bool = False
    """True if If-None-Match is ignored, as old servers do."""


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    head: bytes
    """Request line and headers, without the empty line."""
    body: bytes

    @property
    def writes(self) -> bool:
        return self.method in ("PUT", "POST", "DELETE")

    def header(self, name: str) -> str:
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.decode("latin-1").partition(":")
            if key.strip().lower() == name:
                return value.strip()
        return ""

    def without(self, name: str) -> "Request":
        lines = [line for line in self.head.split(b"\r\n") if not line.lower().startswith(f"{name}:".encode())]
        return replace(self, head=b"\r\n".join(lines))


@dataclass(frozen=True)
class Answer:
    status: int
    content: bytes
    closes: bool


class Proxy:
    def __init__(self, host: str, port: int, rules: Rules):
        self.upstream = (host, port)
        self.rules = rules
        self.counts: Counter[str] = Counter()
        self.drawn = 0

    def fault(self, request: Request) -> str | None:
        """What to do to the next request: the n-th draw of a seed is always the same."""
        rules = self.rules
        key = request.header("authorization").partition("Credential=")[2].partition("/")[0]
        if key in rules.expired:
            return "expired"
        if rules.read_only and request.writes:
            return "denied"
        self.drawn += 1
        rng = random.Random(f"{rules.seed} {self.drawn}")
        if rng.random() >= rules.rate:
            return None
        kinds = [kind for kind in rules.kinds if kind != ("cut" if request.writes else "swallow")]
        return rng.choice(kinds) if kinds else None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, and one to the server for as long as it lasts."""
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while request := await read_request(reader, writer):
                if request.target.startswith("/-/"):
                    writer.write(self.control(request))
                    continue
                kind = self.fault(request)
                self.counts[kind or "forwarded"] += 1
                if kind in FAILURES:
                    writer.write(failure(kind, request.method))
                    continue
                if kind == "stall":
                    await asyncio.sleep(self.rules.stall_s)
                if kind in ("stall", "reset"):
                    return reset(writer)
                if server is None:
                    server = await asyncio.open_connection(*self.upstream, limit=2**22)
                answer = await forward(request.without("if-none-match") if self.rules.deaf else request, *server)
                if kind == "cut" and len(answer.content) > 1:
                    writer.write(answer.content[: len(answer.content) // 2])
                    await writer.drain()
                if kind is not None:
                    return reset(writer)
                writer.write(answer.content)
                await writer.drain()
                if answer.closes:
                    return None
        except (OSError, asyncio.IncompleteReadError):
            return None  # the client went away
        finally:
            for end in (writer, *(server[1:] if server else ())):
                end.close()

    def control(self, request: Request) -> bytes:
        if request.target == "/-/rules":
            for name, value in json.loads(request.body).items():
                setattr(self.rules, name, value)
        body = json.dumps(self.counts).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def failure(kind: str, method: str) -> bytes:
    status, reason, code, message = FAILURES[kind]
    body = BODY.format(code=code, message=message, request=uuid.uuid4()).encode()
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a peer does that knows nothing of the connection."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
    except asyncio.IncompleteReadError:
        return None
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    bare = Request(method, target, head, b"")
    if bare.header("expect").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = bare.without("expect").head
    return Request(method, target, head, await read_body(reader, bare.header))


async def read_body(reader: asyncio.StreamReader, header: object) -> bytes:
    """The body as it is on the wire."""
    assert callable(header)
    if "chunked" in header("transfer-encoding").lower():
        parts = []
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            chunk = await reader.readexactly(size + 2)
            parts += [line, chunk]
            if size == 0:
                return b"".join(parts)
    length = int(header("content-length") or 0)
    return await reader.readexactly(length) if length else b""


async def forward(request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Answer:
    """Send a request to the server and return its whole answer."""
    writer.write(request.head + b"\r\n\r\n" + request.body)
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    answer = Request("", "", head[:-4], b"")
    status = int(head.split(b" ", 2)[1])
    empty = request.method == "HEAD" or status in (204, 304)
    body = b"" if empty else await read_body(reader, answer.header)
    return Answer(status, head + body, answer.header("connection").lower() == "close")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", required=True, help="http://host:port of the server")
    parser.add_argument("--rate", type=float, default=0.0, help="share of the requests that is spoiled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stall-s", type=float, default=5.0, help="how long a stalled request is held")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    host, _, port = arguments.upstream.removeprefix("http://").rstrip("/").partition(":")
    rules = Rules(arguments.rate, tuple(arguments.kinds), arguments.seed, arguments.stall_s)
    proxy = Proxy(host, int(port), rules)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=2**22)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(0)
