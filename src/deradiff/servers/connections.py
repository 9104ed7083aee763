"""How long the connections of a server are held, and how many: nobody keeps others out by holding many in silence."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deradiff.servers.gate import LONGEST_HEAD

HEAD_SECONDS = 10.0
"""For a request's first line and headers, from the connection or the last answer on, however they come."""

BODY_SECONDS = 120.0
"""For its body; 16 MB at 1.2 Mbit/s."""

UNREAD_SECONDS = 30
"""For an answer that the other side does not read."""

SPARE_FILES = 256
"""Open files that are not connections: models, images, a database."""

FAREWELL_SECONDS = 3

MOST_FILES = 65_536


def serve(application: Any, listening: socket.socket) -> None:
    """Serve until the process is told to stop; requests that were begun are finished. No address is written down."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _stopped)  # uvicorn hands the signal on when it has ended, and the rest is to end too
    with suppress(KeyboardInterrupt):
        server(application, listening).run(sockets=[listening])


def server(application: Any, listening: socket.socket) -> uvicorn.Server:
    """The server that `serve` runs."""
    with suppress(OSError, AttributeError):  # Linux; accepted connections have what the listening one has
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    config = uvicorn.Config(
        application,
        http=timed(_open_files() - SPARE_FILES),
        ws="none",
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=LONGEST_HEAD,
        timeout_graceful_shutdown=FAREWELL_SECONDS,
    )
    return uvicorn.Server(config)


def timed(most: int) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1, with a limit of time for what a client owes, and of connections.

    uvicorn has none for a head or a body. hypercorn has one for heads, but speaks HTTP/2 without TLS to who asks for
    it, where that limit does not hold, and it waits for ever where an answer was given before the body's end; granian
    has one for heads, and wants to load the application itself, in another process.

    With more than `most` connections, the one that has owed something for longest makes way.
    """
    waiting: dict[H11Protocol, asyncio.TimerHandle] = {}

    class Timed(H11Protocol):
        owed: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most and waiting:
                next(iter(waiting)).transport.abort()
            self.look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.look()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.settle()

        def look(self) -> None:
            """Begin to count where the client owes something else than before."""
            state = self.conn.their_state
            if state is not self.owed:
                self.settle()
                self.owed = state
                seconds = {h11.IDLE: HEAD_SECONDS, h11.SEND_BODY: BODY_SECONDS}.get(state)
                if seconds is not None and not self.transport.is_closing():
                    waiting[self] = self.loop.call_later(seconds, self.transport.abort)

        def settle(self) -> None:
            timer = waiting.pop(self, None)
            if timer is not None:
                timer.cancel()

    return Timed


def _open_files() -> int:
    """How many files this process may have open, after it was allowed as many as it can be."""
    try:
        import resource
    except ImportError:  # Windows, where asyncio has a limit of its own
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def _stopped(*_: Any) -> None:
    raise KeyboardInterrupt
