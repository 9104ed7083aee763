"""What stands before the pages of the studio and of a study: who is let in, and how much is read of them.

What a person sends is written nowhere: an error of ours is told in the terminal by its kind and its place alone.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlencode

from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response

from deradiff.servers.access import DAYS, Admission

log = logging.getLogger(__name__)

LONGEST_HEAD = 65_536
"""Bytes of a request's first line and headers. A link with two long prompts has some 40,000."""

MOST_HEADERS = 100

MOST_HELD = 256 * 2**20
"""Bytes of the large bodies of all requests that are answered at once."""

SMALL = 16_384
"""Bytes of a body that are read whatever else is held: pages ask in less than this, mostly."""

MOST_HELD_BY_ONE = MOST_HELD // 4
"""The same of one visitor: whoever sends much and never ends it is in nobody's way but their own."""

DRAINED = 4
"""A body up to so many times too long is read to its end, and forgotten: its browser hears then what was wrong."""

VISITOR = "deradiff.visitor"
"""In a request's scope: whose it is, by the number in the cookie or else by address."""

FORWARDED_HOST, FORWARDED_SCHEME = b"x-forwarded-host", b"x-forwarded-proto"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLong(Exception):
    """A body has more bytes than its page reads."""


class TooMuchHeld(Exception):
    """More is held already than there is room for."""


class Gate:
    """Stands before an application, which gets the requests that are let in, with their bodies, and no others.

    `longest` says how many bytes of a body are read at a path; `refused(status, message)` is the page that says why
    something is not done; `headers` are added to every answer; `open_paths` are shown to anybody.
    """

    def __init__(
        self,
        app: Any,
        admission: Admission,
        longest: Callable[[str], int],
        refused: Callable[[int, str | None], Response],
        headers: Mapping[str, str],
        open_paths: frozenset[str] = frozenset(),
    ) -> None:
        self.app, self.admission, self.longest, self.refused = app, admission, longest, refused
        self.headers, self.open_paths = headers, open_paths
        self._held: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answered(scope, receive, _Answer(send, self.headers))
        else:  # no page of ours opens a WebSocket
            await send({"type": "websocket.close", "code": 1008})

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        scope = {**scope, **_place(scope, self.admission.root)}
        body, counted = bytearray(), 0
        try:
            response = self._turned_away(scope)
            if response is None:
                async for piece in self._body(scope, receive):
                    body += piece
                    if len(body) > SMALL:
                        counted += len(piece)
                        self._held[scope.get(VISITOR, "")] += len(piece)
                await self.app({**scope, **_as_the_browser(scope)}, replayed(bytes(body), receive), answer)
                return
        except TooLong:
            response = self.refused(413, None)
        except TooMuchHeld:
            response = self.refused(503, None)
        except ClientDisconnect:
            return
        except Exception as error:
            log.error("a page could not be answered: %s", without_values(error))
            response = self.refused(500, None)
        finally:
            self._held[scope.get(VISITOR, "")] -= counted
            self._held += Counter()  # without those who hold nothing any more
        if not answer.begun:
            await response(scope, receive, answer)

    def _turned_away(self, scope: Scope) -> Response | None:
        """The answer to a request that the application does not get; None for one that it does."""
        request, path = Request(scope), path_below(scope)
        if len(scope["headers"]) > MOST_HEADERS or _head(scope) > LONGEST_HEAD:
            return self.refused(431, None)
        if not path:
            return RedirectResponse(f"{self.admission.root}/?{request.url.query}".rstrip("?"), 307)
        if path in self.open_paths:
            return None
        refused = self.admission.refusal(request.method, path, request.headers, request.cookies, request.query_params)
        if refused is not None:
            return self.refused(*refused)
        scope[VISITOR] = self.admission.visitor(request.cookies) or (request.client.host if request.client else "")
        as_asked = Request({**scope, **_as_the_browser(scope)})
        return self._first_visit(as_asked) if self.admission.in_link(path, request.query_params) else None

    def _first_visit(self, request: Request) -> Response:
        """Have the browser keep who it is, and take the token out of its address."""
        others = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
        query = f"?{urlencode(others)}" if others else ""
        response = RedirectResponse(f"{self.admission.root}/{query}", 303, {"Cache-Control": "no-store"})
        keep(response, request, self.admission.cookie, self.admission.new_visitor(), self.admission.cookie_path)
        return response

    async def _body(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """The pieces of the body. Raises `TooLong`, at once where it was said to be, and `TooMuchHeld`."""
        longest = self.longest(path_below(scope))
        announced = Request(scope).headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > DRAINED * longest:
            raise TooLong
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = message.get("body", b"")
            length += len(piece)
            if length > DRAINED * longest:
                raise TooLong
            held, own = self._held.total() + len(piece), self._held[scope.get(VISITOR, "")] + len(piece)
            if length > SMALL and (held > MOST_HELD or own > MOST_HELD_BY_ONE):
                raise TooMuchHeld
            if length <= longest:
                yield piece
            more = message.get("more_body", False)
        if length > longest:
            raise TooLong


class _Answer:
    """Sends an answer on with our headers, and without those that let other sites read it, which Gradio adds."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send, self._headers = send, {name.lower().encode(): value.encode() for name, value in headers.items()}
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            kept = [pair for pair in message.get("headers", []) if not pair[0].lower().startswith(b"access-control-")]
            names = {name.lower() for name, _ in kept}
            message = {**message, "headers": kept + [pair for pair in self._headers.items() if pair[0] not in names]}
        await self._send(message)


def path_below(scope: Scope) -> str:
    """A request's path, below the one under which a proxy serves the pages."""
    return str(scope["path"])[len(scope.get("root_path", "")) :]


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body`, which was read already, and then what else comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def keep(response: Response, request: Request, name: str, value: str, path: str, samesite: Any = "lax") -> None:
    """Have the browser keep `value`, out of reach of scripts.

    "lax" where it is needed by whoever comes by a link from elsewhere, "strict" where not.
    """
    response.set_cookie(
        name,
        value,
        max_age=DAYS * 86_400,
        path=path,
        httponly=True,
        samesite=samesite,
        secure=request.url.scheme == "https",
    )


def without_values(error: BaseException) -> str:
    """An error by its kind and where it was raised: its own words may hold what somebody sent."""
    places = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{places}"


def _head(scope: Scope) -> int:
    fields = sum(len(name) + len(value) for name, value in scope["headers"])
    return fields + len(scope.get("raw_path") or b"") + len(scope["query_string"])


def _place(scope: Scope, root: str) -> Scope:
    """A request's path with `root`, which a proxy may have left away, and what may be believed of its headers.

    What proxies tell of hosts and schemes is believed with a `root` alone, which says that there is one: without it,
    anybody could make it up.
    """
    path = scope["path"]
    if path != root and not path.startswith(f"{root}/"):
        path = root + path
    believed = {FORWARDED_HOST, FORWARDED_SCHEME} if root else set()
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name in believed or not (name.startswith((b"x-forwarded-", b"x-gradio-")) or name == b"forwarded")
    ]
    return {"path": path, "raw_path": path.encode(), "root_path": root, "headers": headers}


def _as_the_browser(scope: Scope) -> Scope:
    """The host and the scheme that the browser asked for, where a proxy tells them."""
    sent = {name: value.split(b",")[0].strip() for name, value in scope["headers"]}
    headers = [(name, value) for name, value in scope["headers"] if name not in (FORWARDED_HOST, FORWARDED_SCHEME)]
    if host := sent.get(FORWARDED_HOST):
        headers = [(name, host if name == b"host" else value) for name, value in headers]
    return {"headers": headers, "scheme": "https" if sent.get(FORWARDED_SCHEME) == b"https" else scope["scheme"]}
