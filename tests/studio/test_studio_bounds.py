"""What the studio is asked is bounded: uploads, pages and what waits for them."""

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import pytest

from deradiff.servers import gate
from deradiff.studio import guard
from real_servers import asked, studio, usual_values

BODIES = pytest.mark.attack("bodies without bound")


def form(*files: bytes) -> tuple[bytes, dict[str, str]]:
    pieces = [
        b'--xyz\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + file for file in files
    ]
    return b"\r\n".join([*pieces, b"--xyz--\r\n"]), {"Content-Type": "multipart/form-data; boundary=xyz"}


@BODIES
def test_what_a_visitor_uploads_is_bounded_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(guard, "monotonic", lambda: now[0])
    with studio(tmp_path) as (port, desk, _):
        statuses = []
        for number in range(6):
            body, headers = form(b"\x89PNG" + bytes([number]) * 15 * 2**20)
            statuses.append(asked(port, guard.UPLOAD, body, headers=headers)[0])
        assert statuses == [200] * 4 + [429] * 2
        kept = [file for file in desk.folder.rglob("a.png")]
        assert len(kept) == 4 and all(file.parent.parent == desk.folder for file in kept)
        now[0] += guard.UPLOADS_KEPT + 1
        body, headers = form(b"\x89PNG")
        assert asked(port, guard.UPLOAD, body, headers=headers)[0] == 200
        assert [file.stat().st_size for file in desk.folder.rglob("a.png")] == [4]
        many, headers = form(*[b"x"] * 900)
        assert asked(port, guard.UPLOAD, many, headers=headers)[0] == 400
        for kind in ("text/plain", "multipart/form-data", "multipart/form-data; boundary=other", ""):
            assert asked(port, guard.UPLOAD, body, headers={"Content-Type": kind})[0] == 400


@BODIES
def test_uploads_that_stall_are_in_the_way_of_uploads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them holds what it has sent until it is given up; pages go on asking meanwhile."""
    monkeypatch.setattr(gate, "MOST_HELD_BY_ONE", 2**20)
    with studio(tmp_path) as (port, _, blocks), ExitStack() as stalled:
        [number] = [number for number, reaction in blocks.fns.items() if reaction.name == "use_paste"]
        head = f"POST {guard.UPLOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {2**18}\r\n\r\n"

        def stall() -> bool:
            connection = stalled.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall(head.encode() + b"x" * (2**18 - 10))
            return False

        def uploaded() -> int:
            body, headers = form(b"\x89PNG" + b"x" * 60_000)
            return asked(port, guard.UPLOAD, body, headers=headers)[0]

        _until(lambda: stall() or uploaded() == 503)
        body = {"fn_index": number, "data": usual_values(blocks.fns[number]), "session_hash": "a"}
        assert asked(port, "/gradio_api/queue/join", body)[0] == 200
        stalled.close()
        _until(lambda: uploaded() == 200)


def _until(look: Callable[[], bool]) -> None:
    end = monotonic() + 20
    while not look():
        assert monotonic() < end, "what was waited for did not come"
        sleep(0.1)


@BODIES
def test_pages_and_what_they_wait_for_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_SESSIONS", 5)
    monkeypatch.setattr(guard, "MOST_WAITING", 3)
    with studio(tmp_path) as (port, _, blocks):
        [number] = [number for number, reaction in blocks.fns.items() if reaction.name == "use_paste"]
        data = usual_values(blocks.fns[number])
        body = {"fn_index": number, "data": data, "session_hash": "a"}
        statuses = [asked(port, "/gradio_api/queue/join", body)[0] for _ in range(5)]
        assert statuses == [200] * 3 + [429] * 2
        body = {"fn_index": number, "data": data}
        statuses = [asked(port, "/gradio_api/queue/join", body | {"session_hash": f"b{n}"})[0] for n in range(6)]
        assert statuses == [200] * 4 + [429] * 2
        assert (
            asked(port, "/gradio_api/queue/join", body | {"session_hash": "b0"})[0] == 200
        )  # pages that are open go on


@BODIES
def test_no_folder_for_all_users_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with studio(tmp_path) as (_, desk, _):
        assert desk.folder.stat().st_mode & 0o077 == 0
        assert (desk.folder / "vibe_edit_history").is_dir()  # Gradio makes it in /tmp/gradio otherwise
