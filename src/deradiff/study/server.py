"""The pages of a study: the first page, pair after pair, thanks. An answer is acknowledged once it is on the disk.

Nothing is known about a participant but a random key in a cookie. A browser never names a file, and everything that is
shown is escaped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from deradiff import access
from deradiff.study.plan import ANSWERS, PAIR
from deradiff.study.votes import AlreadyAnswered, Busy, Full, NotShown, Votes

try:
    import jinja2
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from fastapi.responses import HTMLResponse, RedirectResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException as Refusal
except ImportError as error:
    raise ImportError(
        f"serving a study needs {error.name}, a part of the study extra: pip install 'deradiff[study]'"
    ) from None

PAGES = Path(__file__).parent / "pages"

LONGEST_FORM = 16_384
"""Bytes of a form; a vote has some hundred."""

CONNECTIONS = 600
"""At once; more are answered with status 503. A browser opens about six."""

HEADERS = access.HEADERS | {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
}

_BEGIN = "Begin at the first page."

REFUSED: dict[int, tuple[str, str]] = {
    400: ("This was not understood", "Go back, and send the form of the page."),
    401: ("This link is not complete", "Open all of the link that you were given, question mark and all."),
    403: ("This is not possible", _BEGIN),
    404: ("There is no such page", _BEGIN),
    405: ("There is no such page", _BEGIN),
    409: ("This pair is answered already", "The first answer stays."),
    413: ("This was not understood", "Go back, and send the form of the page."),
    500: ("Something went wrong here", "What you sent before is kept. Go back, and send this again in a moment."),
    503: ("Too many people are voting", "What you sent before is kept. Go back, and send this again in a moment."),
}  # fmt: skip
"""The heading of what is refused, and the words where nothing more is known."""

NO_COOKIE = (
    "Your browser did not send the cookie by which your answers are kept together. Allow cookies for this site, then "
    "begin at the first page. The cookie holds a random number and nothing about you."
)

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PAGES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip


def app(votes: Votes, token: str | None = None) -> FastAPI:
    """The study of `votes` as an application; with a `token`, for those alone who have it."""
    door = _Door(votes.mark, token)
    served = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(door.admit)])
    served.add_exception_handler(Refusal, _refused)
    served.add_exception_handler(Busy, _busy)
    served.add_exception_handler(Exception, _broken)
    cookie = f"participant-{votes.mark}"
    plan = votes.plan

    @served.get("/")
    async def first(request: Request) -> Response:
        response = _page("first.html", plan=plan, known=votes.knows(request.cookies.get(cookie, "")))
        door.remember(request, response)
        return response

    @served.post("/begin")
    async def begin(request: Request) -> Response:
        response = RedirectResponse("/pair", 303, HEADERS)
        if not votes.knows(request.cookies.get(cookie, "")):
            try:
                key = await asyncio.wrap_future(votes.begin())
            except Full:
                raise HTTPException(403, "The study has all the participants that it needs. Thank you.") from None
            _set_cookie(request, response, cookie, key)
        return response

    @served.get("/pair")
    async def pair(request: Request) -> Response:
        return _pair(votes, _participant(request, votes, cookie))

    @served.post("/vote")
    async def vote(request: Request) -> Response:
        key = _participant(request, votes, cookie)
        form = await _form(request)
        answers = {name: value for name, value in form.items() if name != PAIR}
        try:
            await asyncio.wrap_future(votes.vote(key, form.get(PAIR, ""), answers))
        except NotShown:
            raise HTTPException(403, "The vote is for a pair that you were not shown, and was not counted.") from None
        except AlreadyAnswered:
            raise HTTPException(409, "You have answered this pair before, and that answer stays.") from None
        except ValueError:
            return _pair(votes, key, chosen=answers, status=422)
        return RedirectResponse("/pair", 303, HEADERS)

    @served.get("/image/{name}")
    async def image(name: str) -> Response:
        path = votes.image(name)
        if path is None:
            raise HTTPException(404)
        kind = "image/png" if path.suffix == ".png" else "image/jpeg"
        kept = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(await run_in_threadpool(path.read_bytes), media_type=kind, headers=HEADERS | kept)

    @served.get("/style.css")
    async def style() -> Response:
        kept = {"Cache-Control": "max-age=3600"}
        return Response((PAGES / "style.css").read_bytes(), media_type="text/css", headers=HEADERS | kept)

    return served


def serve(application: FastAPI, listening: Any) -> None:
    """Serve until the process is told to stop; requests that were begun are finished. No address is written down."""
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, limit_concurrency=CONNECTIONS, server_header=False,
        timeout_graceful_shutdown=5, lifespan="off",
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])


# -- who asks ---------------------------------------------------------------------------------------------------------


class _Door:
    """Asks `access.Admission` about every request of the study."""

    def __init__(self, mark: str, token: str | None) -> None:
        self._admission = access.Admission(mark, token, "study")

    async def admit(self, request: Request) -> None:
        """Raise `HTTPException` for a request that is not let in."""
        path = request.url.path
        if path == "/style.css":  # the pages that refuse wear it too
            return
        refused = self._admission.refusal(request.method, path, request.headers, request.cookies, request.query_params)
        if refused is not None:
            raise HTTPException(*refused)

    def remember(self, request: Request, response: Response) -> None:
        """Have the browser keep a token that came in the link."""
        token = self._admission.token
        if token is not None and self._admission.in_link(request.url.path, request.query_params):
            _set_cookie(request, response, self._admission.cookie, token)


def _participant(request: Request, votes: Votes, cookie: str) -> str:
    """The key of the participant who asks. Raises `HTTPException` without one, or with one that is nobody's."""
    key = request.cookies.get(cookie, "")
    if not votes.knows(key):
        raise HTTPException(403, NO_COOKIE)
    return key


def _set_cookie(request: Request, response: Response, name: str, value: str) -> None:
    response.set_cookie(
        name,
        value,
        max_age=access.DAYS * 86_400,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, each once. Raises `HTTPException` for one that is too long or no form."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_FORM:
            raise HTTPException(413, "The form is longer than any of this study's.")
    try:
        fields = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)
    except ValueError:
        raise HTTPException(400, "This is no form of this study's.") from None
    if len({name for name, _ in fields}) < len(fields):
        raise HTTPException(400, "A question was answered twice in one form.")
    return dict(fields)


# -- pages ------------------------------------------------------------------------------------------------------------


def _pair(votes: Votes, key: str, *, chosen: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """The pair that waits for this participant, or thanks."""
    shown = votes.current(key)
    if shown is None:
        return _page("thanks.html", plan=votes.plan)
    return _page(
        "pair.html",
        status,
        plan=votes.plan,
        pair=shown,
        answers=ANSWERS,
        chosen=chosen or {},
        incomplete=chosen is not None,
    )


def _page(name: str, status: int = 200, **values: Any) -> HTMLResponse:
    content = _templates.get_template(name).render(**values)
    return HTMLResponse(content, status, HEADERS | {"Cache-Control": "no-store"})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    unexplained = error.detail == HTTPStatus(error.status_code).phrase
    return _refusal(error.status_code, None if unexplained else error.detail)


async def _busy(request: Request, error: Exception) -> Response:
    return _refusal(503)


async def _broken(request: Request, error: Exception) -> Response:
    return _refusal(500)


def _refusal(status: int, words: str | None = None) -> Response:
    heading, usual = REFUSED.get(status, REFUSED[400])
    links = {"back": status != 401, "onward": status == 409}
    return _page("refused.html", status, heading=heading, words=words or usual, **links)
