"""Who gets into the studio, and what a browser cannot reach; the command's refusals."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from deradiff.cli import app as commands
from deradiff.servers import access
from deradiff.studio import page, scenes, server
from deradiff.studio.image_requests import Desk
from deradiff.studio.models import LoadedModels, MachineSettings
from deradiff.studio.sources import Sources
from messages import naming

TOKEN = "a-token-long-enough-to-guess"
START = scenes.scene("digits", ["digits:100"], "a red seven", [0.5])


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk(LoadedModels(Sources(), MachineSettings(device="cpu"), lambda: 1.0))
    yield desk
    desk.close()


def client(desk: Desk, library: Path, token: str | None = None, base: str = "http://127.0.0.1:7860") -> TestClient:
    return TestClient(server.app(desk, START, library, token), base_url=base, follow_redirects=False)


def test_the_first_page_loads_nothing_from_elsewhere(desk: Desk, tmp_path: Path) -> None:
    with client(desk, tmp_path) as browser:
        answer = browser.get("/")
        assert answer.status_code == 200 and "deradiff studio" in answer.text
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        config = browser.get("/config").json()
        assert not config.get("analytics_enabled", False)


@pytest.mark.parametrize("host", ["evil.example.org", "127.0.0.1.evil.org", "192.168.0.7:7860", ""])
def test_a_web_site_that_points_its_name_here_is_refused(desk: Desk, tmp_path: Path, host: str) -> None:
    with client(desk, tmp_path) as browser:
        for path in ("/", "/config", "/gradio_api/queue/join"):
            answer = browser.get(path, headers={"host": host})
            assert answer.status_code == 403 and "open to the machine alone" in answer.text
        assert browser.get("/config", headers={"host": "localhost:7860"}).status_code == 200


def test_another_web_site_asks_for_nothing(desk: Desk, tmp_path: Path) -> None:
    with client(desk, tmp_path) as browser:
        answer = browser.post("/gradio_api/queue/join", json={}, headers={"sec-fetch-site": "cross-site"})
        assert answer.status_code == 403 and "another web site" in answer.text


def test_with_a_token_only_its_link_opens_the_door(desk: Desk, tmp_path: Path) -> None:
    with client(desk, tmp_path, TOKEN, "http://studio.example.org") as browser:
        for path in ("/", "/config", "/?token=wrong", "/assets/x.js", "/gradio_api/upload", f"/config?token={TOKEN}"):
            assert browser.get(path).status_code == 401, path
        assert "question mark and all" in browser.get("/").text
        answer = browser.get(f"/?token={TOKEN}&prompt=a%20%26b&lam=1")
        assert answer.status_code == 303 and answer.headers["location"] == "/?prompt=a+%26b&lam=1"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie
        assert browser.get("/").status_code == 200 and browser.get("/config").status_code == 200


def test_paths_from_the_browser_never_reach_the_file_system(desk: Desk, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "mine.json").write_text('{"secret": 1}')
    shown = desk.folder / "shown"
    shown.mkdir()
    (shown / "image.png").write_bytes(b"png")
    with client(desk, library) as browser:
        here = Path(server.__file__)
        for path in (
            "/etc/passwd",
            here,
            library / "mine.json",
            "pyproject.toml",
            "../../etc/passwd",
            "%2e%2e/%2e%2e/etc/passwd",
            f"{shown}/../../../etc/passwd",
            "file:///etc/passwd",
            "http://127.0.0.1:1/x",
        ):
            answer = browser.get(f"/gradio_api/file={path}")
            assert answer.status_code in (400, 403, 404), path
            assert "secret" not in answer.text and "root:" not in answer.text
        for path in ("/static/../../../etc/passwd", "/assets/..%2f..%2f..%2fetc%2fpasswd", "/theme.css/../../x"):
            assert "root:" not in browser.get(path).text


def test_uploads_are_limited_in_size_and_kind(desk: Desk, tmp_path: Path) -> None:
    with client(desk, tmp_path) as browser:
        big = b"\x89PNG" + b"0" * (page.LARGEST_UPLOAD + 1)
        answer = browser.post("/gradio_api/upload", files={"files": ("big.png", big, "image/png")})
        assert answer.status_code == 413
        many = [("files", (f"{i}.png", b"0" * 2**20, "image/png")) for i in range(20)]
        assert browser.post("/gradio_api/upload", files=many).status_code == 413
        fine = browser.post("/gradio_api/upload", files={"files": ("small.png", b"\x89PNG", "image/png")})
        assert fine.status_code == 200
        [stored] = fine.json()
        assert Path(stored).is_relative_to(desk.folder)  # and goes when the studio closes
        escaping = browser.post("/gradio_api/upload", files={"files": ("../../up.png", b"\x89PNG", "image/png")})
        assert escaping.status_code != 200 or Path(escaping.json()[0]).resolve().is_relative_to(desk.folder)
    served = client(desk, tmp_path).app
    config = served.routes[-1].app.get_blocks().config  # type: ignore[attr-defined]
    [upload] = [its for its in config["components"] if its["props"].get("elem_id") == "upload"]
    assert upload["props"]["file_types"] == [".png"]


def test_what_waits_is_bounded(desk: Desk, tmp_path: Path) -> None:
    blocks = client(desk, tmp_path).app.routes[-1].app.get_blocks()  # type: ignore[attr-defined]
    assert blocks._queue.max_size == server.MOST_QUEUED
    assert blocks.api_open is False


# -- the command ------------------------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(commands, ["studio", *arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_two_studios_on_one_port() -> None:
    with access.bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        said = refused("--port", str(port))
    assert f"port {port}" in said and "127.0.0.1" in said and "--port" in said


def test_another_address_needs_a_token() -> None:
    assert "--token" in refused("--host", "0.0.0.0")
    assert "16 to 200" in refused("--host", "0.0.0.0", "--token", "short")


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--reward", "beauty"], ["'beauty'"]),
        (["--models", "/nowhere/at/all"], ["--models", "/nowhere/at/all"]),
        (["--anchor", "digits:7"], ["'digits:7'"]),
        (["--device", "abacus"], ["'abacus'"]),
        (["org/model"], ["--anchor"]),
        (["--anchor", "digits:100", "--anchor", "digits:30"], ["NAME=SOURCE"]),
    ],
)
def test_a_studio_that_cannot_be_opened_says_why(arguments: list[str], values: list[str]) -> None:
    assert re.search(naming(*values), refused("--port", "0", *arguments))


def test_a_library_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused("--port", "0", "--library", str(tmp_path / "file"))
