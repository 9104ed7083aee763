"""Nobody reads the owner's files through the studio, whatever is asked of Gradio; and what it is asked is bounded."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import psutil
import pytest

from deradiff.studio import guard
from real_servers import asked, news, raw, studio, usual_values

FILES = pytest.mark.attack("files of the owner through the studio")
REQUESTS = pytest.mark.attack("requests that the page would not make")
BODIES = pytest.mark.attack("bodies without bound")
SECRET = b"the owner's secret, 7c1f"
MOST_AT_ONCE = 40
"""Events in the queue of Gradio, which takes 64."""


class Through:
    """In the guard's place: lets everything through."""

    def __init__(self, app: Any, **_: Any) -> None:
        self.app = app

    async def __call__(self, *asgi: Any) -> None:
        await self.app(*asgi)


@pytest.fixture
def secrets(tmp_path: Path) -> list[Path]:
    """Files outside the studio's folder; one of them by the name of an image."""
    files = [tmp_path / "owner" / name for name in ("secret", "secret.png", "secret.svg")]
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(SECRET)
    return files


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server of this machine, and what it was asked for."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SECRET)

        def log_message(self, *_: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_address[1]}/secret.png", requests
    listening.shutdown()
    listening.server_close()


def forms(file: Path, url: str) -> list[Any]:
    """How a page may name a file, or an address, inside of a value."""
    meta = {"_type": "gradio.FileData"}
    plain = {"path": str(file), "meta": meta}
    return [
        plain,
        {"value": plain},
        [plain],
        {"a": [{"b": plain}]},
        [[plain, "caption"]],
        {"image": plain, "caption": None},
        {"schedule": plain, "steps": 25},
        plain | {"url": file.as_uri(), "orig_name": "x.png"},
        {"path": file.name, "url": file.as_uri(), "meta": meta},
        {"path": file.as_uri(), "meta": meta},
        {"path": f"/proc/self/root{file}", "meta": meta},
        {"path": f"{Path.cwd()}/../../../../../../../..{file}", "meta": meta},
        plain | {"is_stream": True},
        {"path": url, "meta": meta},
        plain | {"url": url},
        {"path": str(file)},
        str(file),
        file.as_uri(),
        url,
        {"__type__": "update", "value": plain},
        {"video": plain, "subtitles": plain},
        {"files": [plain], "text": "x"},
    ]


class Thief:
    """Tries all of Gradio's reactions with every form in every input, and keeps all that is answered."""

    def __init__(self, port: int, blocks: gr.Blocks) -> None:
        self.port, self.blocks = port, blocks
        self.answers: list[bytes] = []
        self.statuses: set[int] = set()
        self.sessions = (f"thief{number}" for number in count())

    def ask(self, path: str, body: Any = None, **how: Any) -> int:
        status, headers, answer = asked(self.port, path, body, **how)
        self.answers += [answer, repr(headers).encode()]
        self.statuses.add(status)
        return status

    def sends(self, every: list[Any], chosen: tuple[str, ...] = ()) -> None:
        """Every form to every input of the `chosen` reactions; without any, to all reactions, one form an input."""
        turn = cycle(every)
        for number, reaction in self.blocks.fns.items():
            if chosen and reaction.name not in chosen:
                continue
            usual = usual_values(reaction)
            bodies = [
                {"fn_index": number, "data": [*usual[:place], form, *usual[place + 1 :]], "event_data": form}
                for place in range(len(usual))
                for form in (every if chosen else [next(turn)])
            ]
            for first in range(0, len(bodies), MOST_AT_ONCE):
                self._send(reaction, bodies[first : first + MOST_AT_ONCE])

    def _send(self, reaction: Any, bodies: list[dict[str, Any]]) -> None:
        session, waiting = next(self.sessions), 0
        for body in bodies:
            if reaction.queue:
                waiting += self.ask("/gradio_api/queue/join", body | {"session_hash": session}) == 200
            else:
                self.ask("/gradio_api/run/predict", body | {"session_hash": session})
        if waiting:
            self.answers.append(news(self.port, session, waiting))

    def took(self, folder: Path) -> bool:
        """Whether some byte of the secret was answered, or stands where the studio serves files from."""
        copies = [file for file in folder.rglob("*") if file.is_file() and SECRET in file.read_bytes()]
        return bool(copies) or any(SECRET in answer for answer in self.answers)


TAKING = ("delete", "use", "family", "restep", "use_file")
"""Reactions that do little with the values they are given: enough for what Gradio does with these before."""


@FILES
def test_no_reaction_hands_out_a_file(tmp_path: Path, secrets: list[Path], elsewhere: Any) -> None:
    url, requests = elsewhere
    with studio(tmp_path / "library") as (port, desk, blocks):
        thief = Thief(port, blocks)
        named = [form for form in forms(secrets[1], url) if not isinstance(form, str)]
        thief.sends(named)
        thief.sends(named, TAKING)
        assert thief.statuses == {400, 403}  # a file is refused before Gradio looks at it
        assert len(thief.answers) > 2 * len(blocks.fns) > 60
        thief.sends([str(secrets[1]), secrets[1].as_uri(), url], TAKING)
        assert not thief.took(desk.folder) and requests == []


@FILES
@pytest.mark.parametrize("without", ["our guard", "Gradio's guard"])
def test_each_of_two_guards_holds_by_itself(
    tmp_path: Path, secrets: list[Path], elsewhere: Any, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    """A new Gradio that has other switches than `has_launched` and `is_running` fails here."""
    url, requests = elsewhere
    if without == "our guard":
        monkeypatch.setattr(guard, "Guard", Through)
    with studio(tmp_path / "library") as (port, desk, blocks):
        if without == "Gradio's guard":
            blocks.has_launched = blocks.is_running = False
        thief = Thief(port, blocks)
        thief.sends([form for file in secrets[:2] for form in forms(file, url)], ("delete", "use"))
        thief.sends(forms(secrets[2], url)[:3] + forms(secrets[1], url)[-9:], ("family", "restep", "use_file"))
        assert not thief.took(desk.folder) and requests == []


@FILES
def test_these_attacks_take_the_file_where_there_is_no_guard(
    tmp_path: Path, secrets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests above would say nothing."""
    monkeypatch.setattr(guard, "Guard", Through)
    with studio(tmp_path / "library") as (port, desk, blocks):
        blocks.has_launched = blocks.is_running = False
        thief = Thief(port, blocks)
        thief.sends(forms(secrets[1], "http://127.0.0.1:9/")[:1], TAKING)
        assert thief.took(desk.folder)


@FILES
def test_no_other_address_hands_out_a_file(tmp_path: Path, secrets: list[Path], elsewhere: Any) -> None:
    url, requests = elsewhere
    library = tmp_path / "library"
    library.mkdir()
    (library / "mine.json").write_bytes(SECRET)
    with studio(library) as (port, desk, blocks):
        (desk.folder / "link.png").symlink_to(secrets[1])
        thief = Thief(port, blocks)
        names = [str(file) for file in secrets] + [str(library / "mine.json"), str(desk.folder / "link.png"), url]
        names += [secrets[0].as_uri(), f"{desk.folder}/..{secrets[0]}", "pyproject.toml", "~/.bashrc"]
        names += [f"/proc/self/root{secrets[0]}", f"{desk.folder}/../../../..{secrets[0]}"]
        prefixes = (
            "gradio_api/file=",
            "file=",
            "gradio_api/file/",
            "gradio_api/proxy=",
            "static/",
            "assets/",
            "svelte/",
        )
        for name in [*names, *(quote(name, safe="") for name in names)]:
            for prefix in (*prefixes, "svelte/", "theme.css/", "gradio_api/custom_component/", "gradio_api/stream/"):
                thief.ask(f"/{prefix}{name}".replace(" ", "%20"))
            thief.ask(f"/?deep_link={name}")
            thief.ask(f"/config?deep_link={name}")
        for body in forms(secrets[0], url):
            for path in (
                "component_server/",
                "stream/x",
                "call/use",
                "call/v2/use",
                "api/use",
                "run/use",
                "cancel",
                "reset",
                "process_recording",
                "run-history/connect",
                "vibe-edit",
                "vibe-code",
            ):
                thief.ask(f"/gradio_api/{path}", {"data": [body], "session_hash": "a", "fn_index": 0, "code": body})
        for number, body in zip(blocks.blocks, cycle(forms(secrets[0], url)), strict=False):
            question = {"data": body, "component_id": number, "fn_name": "answer", "session_hash": "a"}
            thief.ask("/gradio_api/component_server", question)
        (desk.folder / "link.png").unlink()
        assert not thief.took(desk.folder) and requests == []


@REQUESTS
@pytest.mark.parametrize(
    "path",
    [
        "openapi.json",
        "docs",
        "redoc",
        "gradio_api/info",
        "gradio_api/openapi.json",
        "gradio_api/info?all_endpoints=1",
        "gradio_api/runs",
        "monitoring",
        "gradio_api/app_id",
        "gradio_api/queue/status",
        "gradio_api/dev/reload",
        "login",
        "gradio_api/vibe-code",
        "gradio_api/deep_link?session_hash=a",
        "gradio_api/upload_progress?upload_id=a",
    ],
)
def test_what_is_switched_off_does_not_answer(shared: tuple[int, Any, Any], path: str) -> None:
    port, _, _ = shared
    for headers in ({}, {"Accept": "application/json"}):
        assert asked(port, f"/{path}", headers=headers)[0] == 404


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Any, Any]]:
    """One studio for what leaves nothing behind."""
    with studio(tmp_path_factory.mktemp("library")) as running:
        yield running


ODD: list[Any] = [
    -1,
    -2,
    10**6,
    2**63,
    10**400,
    1.5,
    "1",
    "x",
    None,
    True,
    [],
    {},
    [1],
    float("nan"),
    "\ud800",
]
_NO_LISTS: list[Any] = [None, "x", {}, 3]
_NO_SESSIONS: list[Any] = [None, 3, "", "a/b", "x" * 99]
_NO_CHOICES: list[Any] = [None, {}, {"index": "x"}, [], 3]
_ODD_VALUES: list[Any] = [
    ["private words"],
    {"private words": 1},
    "private words",
    -7.5,
    True,
    None,
    [[[]]],
    {"steps": {}},
]


@REQUESTS
def test_odd_requests_are_refused_in_a_sentence(
    shared: tuple[int, Any, Any], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    port, _, blocks = shared
    bodies: list[Any] = [{"fn_index": index, "data": [], "session_hash": "a"} for index in ODD]
    different = {reaction.name: number for number, reaction in blocks.fns.items()}
    for number in different.values():
        reaction = blocks.fns[number]
        size = len(reaction.inputs)
        event = {"fn_index": number, "session_hash": "a"}
        bodies += [event | {"data": [None] * wrong} for wrong in {0, size - 1, size + 1, 500} - {size, -1}]
        bodies += [event | {"data": data} for data in _NO_LISTS]
        bodies += [event | {"data": [None] * size, "session_hash": session} for session in _NO_SESSIONS]
        if reaction.collects_event_data:
            bodies += [event | {"data": [None] * size, "event_data": chosen} for chosen in _NO_CHOICES]
    bodies += [b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"null", b"[]", b'{"fn_index": 1e999}']
    for body in bodies:
        for path in ("queue/join", "run/predict", "component_server", "cancel", "reset"):
            if path == "reset" and isinstance(body, dict):
                continue
            status, _, answer = asked(port, f"/gradio_api/{path}", body)
            assert 400 <= status < 500 and b"Traceback" not in answer, (path, body)
    said = "".join(capfd.readouterr()) + caplog.text
    assert "Traceback" not in said and "Error" not in said


ODDLY = ("restep", "drawn", "family", "parameter", "use", "keep", "delete", "use_file", "use_paste", "pick", "compare")


@REQUESTS
def test_values_of_the_wrong_kind_end_in_words(shared: tuple[int, Any, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """They come as far as Gradio, and its components; what they hold is not in the terminal."""
    port, _, blocks = shared
    for number, reaction in blocks.fns.items():
        if reaction.name not in ODDLY:
            continue
        for odd in _ODD_VALUES:
            data = [None if isinstance(each, gr.State) else odd for each in reaction.inputs]
            session = f"odd{number}"
            body = {"fn_index": number, "data": data, "session_hash": session}
            if reaction.queue:
                status, _, answer = asked(port, "/gradio_api/queue/join", body)
                answer = news(port, session, 1) if status == 200 else answer
            else:
                status, _, answer = asked(port, "/gradio_api/run/predict", body)
            assert b"Traceback" not in answer
    said = "".join(capfd.readouterr())
    assert "private words" not in said and "Traceback" not in said


# -- how much ---------------------------------------------------------------------------------------------------------


def chunked(path: str, size: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    return head.encode() + piece * (size // 65_536) + b"0\r\n\r\n"


@BODIES
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/upload", "/", "/gradio_api/x"])
@pytest.mark.cases(2)
def test_bodies_are_bounded_everywhere(
    shared: tuple[int, Any, Any], path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    port, desk, _ = shared
    before = psutil.Process().memory_info().rss
    told = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {300 * 2**20}\r\n\r\n"
    assert b" 413 " in raw(port, told.encode()).partition(b"\r\n")[0]  # before a byte of it was sent
    longest = guard.LONGEST_UPLOAD if path == guard.UPLOAD else guard.LONGEST_VALUES
    assert b" 413 " in raw(port, chunked(path, 2 * longest)).partition(b"\r\n")[0]
    with suppress(ConnectionError):  # the server hangs up
        assert b" 413 " in raw(port, chunked(path, 80 * 2**20)).partition(b"\r\n")[0]
    assert psutil.Process().memory_info().rss - before < 200 * 2**20
    assert not any(file.stat().st_size > 2**20 for file in desk.folder.rglob("*") if file.is_file())
    assert "".join(capfd.readouterr()) == ""


def test_a_guard_that_gradio_no_longer_has() -> None:
    blocks = gr.Blocks()
    guard.as_launched(blocks)
    with pytest.raises(AttributeError):
        guard.as_launched(blocks)  # not what it was before a launch


def test_json_that_is_none() -> None:
    for body in (b"NaN", b"[Infinity]", b'"\\ud800"', b"1" * 5000, json.dumps([[1e308 * 10]]).encode()):
        with pytest.raises(guard.NotAsked):
            guard._plain(body)
