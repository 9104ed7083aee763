"""The studio as a web application on one address, until it is stopped."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from deradiff import access
from deradiff.settings import Settings
from deradiff.studio.desk import Desk
from deradiff.studio.models import Machine, Models
from deradiff.studio.sources import Sources

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, RedirectResponse, Response

    from deradiff.studio import page
except ImportError as error:
    raise ImportError(
        f"the studio needs {error.name}, a part of the studio extra: pip install 'deradiff[studio]'"
    ) from None

MOST_QUEUED = 64
"""Things that pages have asked for and that were not begun."""

MOST_AT_ONCE = 16
"""Things that are answered at once; of images one is drawn at a time all the same."""

CONNECTIONS = 400

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Nothing is loaded from elsewhere. Gradio's own pages need inline scripts."""

HEADERS = access.HEADERS | {"Content-Security-Policy": POLICY}

REFUSED = {401: "This link is not complete: open all of the link that the studio printed, question mark and all."}


def app(desk: Desk, start: Settings, library: Path, token: str | None = None, mark: str = "studio") -> FastAPI:
    """The studio of `desk` as an application; with a `token`, for those alone who have it."""
    from deradiff.studio.wiring import connect

    os.environ["GRADIO_TEMP_DIR"] = str(desk.folder)
    with gr.Blocks(title="deradiff studio", analytics_enabled=False, delete_cache=(600, 7200)) as blocks:
        connect(blocks, desk, start, library)
    blocks.queue(max_size=MOST_QUEUED, default_concurrency_limit=MOST_AT_ONCE, api_open=False)
    served = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    served.middleware("http")(_door(access.Admission(mark, token, "studio")))
    return gr.mount_gradio_app(
        served, blocks, path="/", footer_links=[], run_history=False, ssr_mode=False, show_error=True,
        max_file_size=page.LARGEST_UPLOAD, theme=page.theme(), css_paths=page.PAGES / "studio.css",
        head_paths=page.PAGES / "head.html", enable_monitoring=False, mcp_server=False, pwa=False,
        blocked_paths=[str(library)],
    )  # fmt: skip


def desk_of(sources: Sources, machine: Machine, scored_by: tuple[str, ...] = ()) -> Desk:
    """A desk with no models in memory yet."""
    return Desk(Models(sources, machine), scored_by)


def serve(application: FastAPI, listening: Any) -> None:
    """Serve until the process is told to stop. No address of anybody is written down."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, limit_concurrency=CONNECTIONS, server_header=False,
        timeout_graceful_shutdown=3,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, _stopped)  # uvicorn hands the signal on when it has ended, and the rest is to end too
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def _stopped(*_: Any) -> None:
    raise KeyboardInterrupt


def _door(admission: access.Admission) -> Any:
    """Asks `access.Admission` about every request, and has the browser keep a token that came in the link."""

    async def admit(request: Request, call_next: Any) -> Response:
        path = request.url.path
        refused = admission.refusal(request.method, path, request.headers, request.cookies, request.query_params)
        if refused is not None:
            words = refused.words or REFUSED.get(refused.status, "This is not possible.")
            return PlainTextResponse(words, refused.status, HEADERS)
        if request.method == "POST" and path.endswith("/upload"):
            length = request.headers.get("content-length", "")
            if not length.isdecimal() or int(length) > page.LARGEST_UPLOAD:
                return PlainTextResponse("Too large: a PNG of 16 MB at most is read here.", 413, HEADERS)
        if admission.token is not None and admission.in_link(path, request.query_params):
            others = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
            response: Response = RedirectResponse(f"/?{urlencode(others)}" if others else "/", 303, HEADERS)
            response.set_cookie(
                admission.cookie, admission.token, max_age=access.DAYS * 86_400, httponly=True, samesite="lax",
                secure=request.url.scheme == "https",
            )  # fmt: skip
            return response
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return admit
