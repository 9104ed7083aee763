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

from deradiff.files.pages import templates
from deradiff.servers.access import HEADERS as EVERYWHERE
from deradiff.servers.access import Admission, keyed
from deradiff.study.plan import ANSWERS, PAIR
from deradiff.study.votes import AlreadyAnswered, Busy, NotShown, StudyFull, Votes

try:
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import HTMLResponse, RedirectResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException as Refusal

    from deradiff.servers.connections import serve
    from deradiff.servers.gate import Gate, keep
except ImportError as error:
    raise ImportError(
        f"serving a study needs {error.name}, a part of the study extra: pip install 'deradiff[study]'"
    ) from None

__all__ = ["app", "serve"]

PAGES = Path(__file__).parent / "pages"

LONGEST_FORM = 16_384
"""Bytes of a form; a vote has some hundred."""

HEADERS = EVERYWHERE | {
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
    431: ("This was not understood", _BEGIN),
    500: ("Something went wrong here", "What you sent before is kept. Go back, and send this again in a moment."),
    503: ("Too many people are voting", "What you sent before is kept. Go back, and send this again in a moment."),
}
"""The heading of what is refused, and the words where nothing more is known."""

FULL = "The study has all the participants that it needs, and what you sent before is kept. Thank you."

NO_COOKIE = (
    "Your browser did not send the cookie by which your answers are kept together. Allow cookies for this site, then "
    "begin at the first page. The cookie holds a random number and nothing about you."
)


def app(votes: Votes, token: str | None = None, root: str = "") -> FastAPI:
    """The study of `votes` as an application; with a `token`, for those alone who have it.

    `root` is the path under which a reverse proxy serves it.
    """
    admission = Admission(votes.mark, token, "study", root, keyed(votes.secret, token))
    pages = _Pages(votes, root)
    served = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    served.add_middleware(
        Gate,
        admission=admission,
        longest=lambda path: LONGEST_FORM,
        refused=pages.refusal,
        headers=HEADERS,
        open_paths=frozenset({"/style.css"}),  # the pages that refuse wear it too
    )
    served.add_exception_handler(Refusal, pages.refused)
    served.add_exception_handler(Busy, pages.busy)
    cookie = f"participant-{votes.mark}"

    @served.get("/")
    async def first(request: Request) -> Response:
        return pages.page("first.html", known=votes.knows(request.cookies.get(cookie, "")))

    @served.post("/begin")
    async def begin(request: Request) -> Response:
        response = RedirectResponse(f"{root}/pair", 303)
        if not votes.knows(request.cookies.get(cookie, "")):
            try:
                key = await asyncio.wrap_future(votes.begin())
            except StudyFull:
                raise HTTPException(403, FULL) from None
            keep(response, request, cookie, key, admission.cookie_path, "strict")
        return response

    @served.get("/pair")
    async def pair(request: Request) -> Response:
        return pages.pair(_participant(request, votes, cookie))

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
        except StudyFull:
            raise HTTPException(403, FULL) from None
        except ValueError:
            return pages.pair(key, chosen=answers, status=422)
        return RedirectResponse(f"{root}/pair", 303)

    @served.get("/image/{name}")
    async def image(name: str) -> Response:
        path = votes.image(name)
        if path is None:
            raise HTTPException(404)
        kind = "image/png" if path.suffix == ".png" else "image/jpeg"
        kept = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(await run_in_threadpool(path.read_bytes), media_type=kind, headers=kept)

    @served.get("/style.css")
    async def style() -> Response:
        kept = {"Cache-Control": "max-age=3600"}
        return Response((PAGES / "style.css").read_bytes(), media_type="text/css", headers=kept)

    return served


# -- who asks ---------------------------------------------------------------------------------------------------------


def _participant(request: Request, votes: Votes, cookie: str) -> str:
    """The key of the participant who asks. Raises `HTTPException` without one, or with one that is nobody's."""
    key = request.cookies.get(cookie, "")
    if not votes.knows(key):
        raise HTTPException(403, NO_COOKIE)
    return key


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, each once. Raises `HTTPException` for one that is no form."""
    try:
        fields = parse_qsl((await request.body()).decode(), keep_blank_values=True, max_num_fields=200)
    except ValueError:
        raise HTTPException(400, "This is no form of this study's.") from None
    if len({name for name, _ in fields}) < len(fields):
        raise HTTPException(400, "A question was answered twice in one form.")
    return dict(fields)


class _Pages:
    """What a study's participants see, in words that are the same below any `root`."""

    def __init__(self, votes: Votes, root: str) -> None:
        self.votes, self.root = votes, root

    def page(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page that no browser keeps."""
        content = templates(PAGES).get_template(name).render(plan=self.votes.plan, root=self.root, **values)
        return HTMLResponse(content, status, {"Cache-Control": "no-store"})

    def pair(self, key: str, *, chosen: Mapping[str, str] | None = None, status: int = 200) -> Response:
        """The pair that waits for this participant, or thanks."""
        shown = self.votes.current(key)
        if shown is None:
            return self.page("thanks.html")
        incomplete = chosen is not None
        return self.page("pair.html", status, pair=shown, answers=ANSWERS, chosen=chosen or {}, incomplete=incomplete)

    def refusal(self, status: int, message: str | None = None) -> Response:
        """Why something was not done."""
        heading, usual = REFUSED.get(status, REFUSED[400])
        links = {"back": status != 401, "onward": status == 409}
        return self.page("refused.html", status, heading=heading, message=message or usual, **links)

    async def refused(self, request: Request, error: Exception) -> Response:
        """The page of an `HTTPException`."""
        assert isinstance(error, Refusal)
        unexplained = error.detail == HTTPStatus(error.status_code).phrase
        return self.refusal(error.status_code, None if unexplained else error.detail)

    async def busy(self, request: Request, error: Exception) -> Response:
        """Too much waits to be written."""
        return self.refusal(503)
