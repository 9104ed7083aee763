"""The studio as a web application on one address, until it is stopped."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from deradiff.servers.access import HEADERS as EVERYWHERE
from deradiff.servers.access import Admission
from deradiff.studio.image_requests import Desk
from deradiff.sweep.settings import Settings

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

try:
    import gradio as gr
    import gradio.routes
    from fastapi import FastAPI
    from starlette.responses import PlainTextResponse, Response

    from deradiff.servers.connections import serve
    from deradiff.servers.gate import Gate
    from deradiff.studio import guard, html, page
except ImportError as error:
    raise ImportError(
        f"the studio needs {error.name}, a part of the studio extra: pip install 'deradiff[studio]'"
    ) from None

__all__ = ["app", "serve"]

MOST_QUEUED = 64
"""Things that pages have asked for and that were not begun."""

MOST_AT_ONCE = 16
"""Things that are answered at once; of images one is drawn at a time all the same."""

MOST_PAGES = 1000
"""Pages whose values are kept; the one used longest ago is forgotten first."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Nothing is loaded from elsewhere. Gradio's own pages need inline scripts."""

HEADERS = EVERYWHERE | {"Content-Security-Policy": POLICY}

REFUSED = {
    400: "This was not understood: reload the page.",
    401: "This link is not complete: open all of the link that the studio printed, question mark and all.",
    403: "This is not possible.",
    404: "There is no such page.",
    405: "There is no such page.",
    413: "Too large: a PNG of 16 MB at most is read here.",
    429: "That was very much within a short time: wait for ten minutes.",
    503: "The studio is busy: try again in a moment.",
}


def app(desk: Desk, start: Settings, library: Path, token: str | None = None, root: str = "") -> FastAPI:
    """The studio of `desk` as an application; with a `token`, for those alone who have it.

    `root` is the path under which a reverse proxy serves it.
    """
    from deradiff.studio.wiring import connect

    os.environ["GRADIO_TEMP_DIR"] = gradio.routes.DEFAULT_TEMP_DIR = str(desk.folder)  # not one for all users in /tmp
    with gr.Blocks(title="deradiff studio", analytics_enabled=False, delete_cache=(600, 7200)) as blocks:
        connect(blocks, desk, start, library)
    blocks.queue(max_size=MOST_QUEUED, default_concurrency_limit=MOST_AT_ONCE, api_open=False)
    blocks.state_session_capacity = MOST_PAGES
    guard.as_launched(blocks)
    served = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    served.add_middleware(guard.Guard, blocks=blocks, folder=desk.folder, refused=_refusal)
    served.add_middleware(
        Gate,
        admission=Admission(secrets.token_hex(4), token, "studio", root),
        longest=_longest,
        refused=_refusal,
        headers=HEADERS,
    )
    return gr.mount_gradio_app(
        served,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=True,
        max_file_size=page.LARGEST_UPLOAD,
        theme=page.theme(),
        css_paths=html.PAGES / "studio.css",
        head_paths=html.PAGES / "head.html",
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        blocked_paths=[str(library)],
        root_path=root or None,
        app_kwargs={"openapi_url": None},
    )


def _longest(path: str) -> int:
    return guard.LONGEST_UPLOAD if path == guard.UPLOAD else guard.LONGEST_VALUES


def _refusal(status: int, message: str | None = None) -> Response:
    return PlainTextResponse(message or REFUSED.get(status, REFUSED[403]), status)
