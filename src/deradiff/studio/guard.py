"""What a browser may ask of Gradio: the requests that the studio's page makes, with values that it can have.

Gradio answers many more (files by their paths, other people's addresses, an interface for programs, recordings), and
checks paths only in applications that were started by its own `launch()`, which the studio is not.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import gradio as gr
from gradio.exceptions import ComponentProcessingError
from pydantic import BaseModel, StrictInt, StringConstraints, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from deradiff.servers.gate import VISITOR, Message, Receive, Scope, Send, path_below, replayed, without_values
from deradiff.studio.page import LARGEST_UPLOAD

log = logging.getLogger(__name__)

LONGEST_VALUES = 256 * 2**10
"""Bytes of a page's values; a curve and two prompts have some 60,000 at most."""

UPLOAD = "/gradio_api/upload"

LONGEST_UPLOAD = LARGEST_UPLOAD + 64 * 2**10
"""Bytes of a body with a file of that size in it."""

MOST_UPLOADED = 4 * LARGEST_UPLOAD
"""Bytes that a visitor may upload within `UPLOADS_KEPT` seconds; the smallest counts as `LEAST_COUNTED`."""

LEAST_COUNTED = 2**20

MOST_UPLOADED_BY_ALL = 512 * 2**20

UPLOADS_KEPT = 600.0

MOST_STREAMS, MOST_STREAMS_OF_ALL = 100, 2000
"""Connections on which a visitor's pages wait for news; each page has two."""

MOST_SESSIONS = 200
"""Pages that a visitor may have opened and that still can be used; the first ones make way."""

MOST_WAITING = 24
"""Things that one page has asked for and that were not answered."""

SHOWN = re.compile(
    r"/|/config|/theme\.css|/gradio_api/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/gradio_api/startup-events"
    r"|/(?:assets|static|svelte)/.*"
)
"""What is read without saying whose page it is for."""

NEWS = re.compile(r"/gradio_api/heartbeat/(?P<session>[^/]*)|/gradio_api/queue/data")

FILE = "/gradio_api/file="

Session = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Event(BaseModel):
    """What a page sends when something happens on it; whatever else is in there is left out."""

    session_hash: Session
    fn_index: StrictInt
    data: list[Any]
    event_data: Any = None
    trigger_id: StrictInt | None = None


class CurveRequest(BaseModel):
    """What the curve's editor asks."""

    session_hash: Session
    component_id: StrictInt
    fn_name: str
    data: dict[str, Any]


class Ended(BaseModel):
    """What a page no longer waits for."""

    session_hash: Session
    fn_index: StrictInt
    event_id: Session


class Reset(BaseModel):
    """What a page begins anew; Gradio does nothing then."""

    event_id: Session


class NotAsked(Exception):
    """The studio's page would not ask this; the status says how much of it was understood."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Guard:
    """Stands between `serving.Gate` and the application that Gradio makes of `blocks`, whose files are in `folder`."""

    def __init__(
        self, app: Any, blocks: gr.Blocks, folder: Path, refused: Callable[[int, str | None], Response]
    ) -> None:
        self.app, self.blocks, self.folder, self.refused = app, blocks, folder.resolve(), refused
        self._uploads = Lately(MOST_UPLOADED, MOST_UPLOADED_BY_ALL)
        self._opened = Lately(MOST_SESSIONS, blocks.state_session_capacity)
        self._streams: Counter[str] = Counter()
        self._sessions: OrderedDict[str, None] = OrderedDict()
        self._stored: OrderedDict[str, float] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, if it is one of the page's."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, path = Request(scope, receive), path_below(scope)
        try:
            if request.method in ("GET", "HEAD"):
                self._require_readable(request, path)
                await self._read(scope, receive, send, path)
            elif request.method == "POST":
                body = await request.body()
                if path == UPLOAD:
                    await self._upload(scope, body, receive, send)
                else:
                    await self._pass(scope, self._request_of(path, scope[VISITOR], body), receive, send)
            else:
                raise NotAsked(405)
        except NotAsked as error:
            await self.refused(error.status, None)(scope, receive, send)

    # -- what is read -------------------------------------------------------------------------------------------------

    def _require_readable(self, request: Request, path: str) -> None:
        if SHOWN.fullmatch(path):
            return
        if path.startswith(FILE):
            self._require_ours(path.removeprefix(FILE))
        elif news := NEWS.fullmatch(path):
            session = news["session"] or request.query_params.get("session_hash", "")
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", session):
                raise NotAsked(400)
            self._know(session, request.scope[VISITOR])
        else:
            raise NotAsked(404)

    async def _read(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """Pass a reading request on, and count it while it waits for news."""
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        scope = {**scope, "headers": headers}
        if not NEWS.fullmatch(path):
            await self.app(scope, receive, send)
            return
        visitor = scope[VISITOR]
        if self._streams[visitor] >= MOST_STREAMS or self._streams.total() >= MOST_STREAMS_OF_ALL:
            raise NotAsked(429)
        self._streams[visitor] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._streams[visitor] -= 1
            self._streams += Counter()  # forgets who has none

    def _require_ours(self, name: str) -> Path:
        """The file of the studio's by this path, which somebody made up perhaps."""
        try:
            file = Path(name).resolve()
            if Path(name).is_absolute() and file.is_relative_to(self.folder) and file.is_file():
                return file
        except (OSError, ValueError, RuntimeError):
            pass
        raise NotAsked(403)

    # -- what is sent -------------------------------------------------------------------------------------------------

    def _request_of(self, path: str, visitor: str, body: bytes) -> BaseModel:
        """What a page says with `body`, without what it would not say. Raises `NotAsked`."""
        kinds: dict[str, type[BaseModel]] = {
            "/gradio_api/queue/join": Event,
            "/gradio_api/run/predict": Event,
            "/gradio_api/component_server": CurveRequest,
            "/gradio_api/cancel": Ended,
            "/gradio_api/reset": Reset,
        }
        kind = kinds.get(path.removesuffix("/"))
        if kind is None:
            raise NotAsked(404)
        try:
            sent = kind.model_validate(_plain(body))
        except ValidationError:
            raise NotAsked(400) from None
        if isinstance(sent, Event):
            self._know(sent.session_hash, visitor)
            return self._checked(sent, queued=path.startswith("/gradio_api/queue"))
        if isinstance(sent, CurveRequest):
            self._know(sent.session_hash, visitor)
            asked = self.blocks.blocks.get(sent.component_id)
            if not isinstance(asked, gr.HTML) or sent.fn_name not in {each.__name__ for each in asked.server_fns}:
                raise NotAsked(400)
            _require_no_file(sent.data)
        if isinstance(sent, Ended) and sent.fn_index not in self.blocks.fns:
            raise NotAsked(400)
        return sent

    def _checked(self, event: Event, queued: bool) -> Event:
        reaction = self.blocks.fns.get(event.fn_index)
        if reaction is None or len(event.data) != len(reaction.inputs) or queued != bool(reaction.queue):
            raise NotAsked(400)
        if len(self.blocks._queue.pending_event_ids_session.get(event.session_hash, ())) >= MOST_WAITING:
            raise NotAsked(429)
        for component, value in zip(reaction.inputs, event.data, strict=True):
            if not isinstance(component, gr.File):
                _require_no_file(value)
        values = [
            self._file(value) if isinstance(component, gr.File) else value
            for component, value in zip(reaction.inputs, event.data, strict=True)
        ]
        chosen = None
        if reaction.collects_event_data:
            index = event.event_data.get("index") if isinstance(event.event_data, dict) else None
            if type(index) is not int:
                raise NotAsked(400)
            chosen = {"index": index, "value": None}
        return event.model_copy(update={"data": values, "event_data": chosen})

    def _file(self, value: Any) -> Any:
        """The uploaded file that a page names, and nothing else that it says of it."""
        if value is None:
            return None
        if not isinstance(value, dict) or not isinstance(value.get("path"), str):
            raise NotAsked(400)
        file = self._require_ours(value["path"])
        return {"path": str(file), "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}

    def _know(self, session: str, visitor: str) -> None:
        """Count a page that is new; raises `NotAsked` where its visitor opened too many lately."""
        if session not in self._sessions:
            if not self._opened.add(visitor, 1):
                raise NotAsked(429)
            self._sessions[session] = None
            while len(self._sessions) > self.blocks.state_session_capacity:
                self._sessions.popitem(last=False)

    async def _pass(self, scope: Scope, sent: BaseModel, receive: Receive, send: Send) -> None:
        body = json.dumps(sent.model_dump(), allow_nan=False).encode()

        async def answer(message: Message) -> None:  # Gradio says 500 where a value is none of its component's
            if message["type"] == "http.response.start" and message["status"] == 500:
                message = {**message, "status": 422}
            await send(message)

        await self.app(_with_body(scope, body, b"application/json"), replayed(body, receive), answer)

    async def _upload(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Store one file, for a while."""
        kind = dict(scope["headers"]).get(b"content-type", b"")
        boundary = re.search(rb'^multipart/form-data;.*boundary="?([^";,]{1,200})', kind, re.IGNORECASE)
        if boundary is None or not 2 <= body.count(b"--" + boundary[1]) <= 4:
            raise NotAsked(400)
        self._forget_uploads()
        if not self._uploads.add(scope[VISITOR], max(len(body), LEAST_COUNTED)):
            raise NotAsked(429)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.body" and message.get("body", b"").startswith(b"["):
                for path in json.loads(message["body"]):
                    self._stored[path] = monotonic()
                    self._stored.move_to_end(path)
            await send(message)

        # Without its query: what is remembered for a bar of progress is never forgotten.
        await self.app({**_with_body(scope, body, kind), "query_string": b""}, replayed(body, receive), noted)

    def _forget_uploads(self) -> None:
        while self._stored and next(iter(self._stored.values())) < monotonic() - UPLOADS_KEPT:
            Path(self._stored.popitem(last=False)[0]).unlink(missing_ok=True)


class Lately:
    """Adds up what visitors did within the last `UPLOADS_KEPT` seconds."""

    def __init__(self, most: int, most_of_all: int) -> None:
        self.most, self.most_of_all = most, most_of_all
        self._done: list[tuple[float, str, int]] = []

    def add(self, visitor: str, amount: int) -> bool:
        """Whether the visitor may do so much more; it is counted then."""
        self._done = [each for each in self._done if each[0] > monotonic() - UPLOADS_KEPT]
        own = sum(done for _, who, done in self._done if who == visitor)
        if own + amount > self.most or sum(done for _, _, done in self._done) + amount > self.most_of_all:
            return False
        self._done.append((monotonic(), visitor, amount))
        return True


def as_launched(blocks: gr.Blocks) -> None:
    """Switch on what Gradio's own `launch()` switches on, and have errors written down without what was sent.

    Until then Gradio takes every path for a default value of the program's own (`processing_utils._check_allowed`) and
    shows any SVG file (`_mark_svg_as_safe`). Raises `AttributeError` where Gradio no longer has these switches.
    """
    for switch in ("has_launched", "is_running"):
        if getattr(blocks, switch) is not False:
            raise AttributeError(f"Gradio's {switch} is not what it was")
        setattr(blocks, switch, True)
    process = blocks.process_api

    async def process_api(*args: Any, **kwargs: Any) -> Any:
        try:
            return await process(*args, **kwargs)
        except gr.Error as error:
            error.print_exception = False
            raise
        except ComponentProcessingError:  # a value that no component of that kind has; its words hold the value
            raise gr.Error("This was not understood: reload the page.", print_exception=False) from None
        except Exception as error:
            log.error("a page's request failed: %s", without_values(error))
            raise gr.Error("Something went wrong; the terminal says where.", print_exception=False) from None

    blocks.process_api = process_api  # type: ignore[method-assign]


def _plain(body: bytes) -> Any:
    """JSON without what Python alone takes for it. Raises `NotAsked`."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        value = json.loads(body, parse_constant=refuse)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise NotAsked(400) from None
    return value


NAMES_OF_FILES = frozenset({"path", "url", "meta", "orig_name", "is_stream", "_type", "__type__"})


def _require_no_file(value: Any) -> None:
    """Raise `NotAsked` where somewhere in `value` a file is named, as Gradio names them."""
    inside = [value]
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            if NAMES_OF_FILES & value.keys():
                raise NotAsked(400)
            inside += value.values()
        elif isinstance(value, list):
            inside += value


def _with_body(scope: Scope, body: bytes, kind: bytes) -> Scope:
    own = {b"content-type": kind, b"content-length": str(len(body)).encode()}
    others = [pair for pair in scope["headers"] if pair[0] not in own and pair[0] != b"transfer-encoding"]
    return {**scope, "headers": others + list(own.items())}
