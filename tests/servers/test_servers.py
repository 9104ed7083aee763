"""What both servers owe their visitors: connections, cookies, other sites, and a path behind a reverse proxy."""

import http.server
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from browsing import command, page, settled
from deradiff.servers import access, connections
from deradiff.study import server as study_server
from deradiff.study.votes import Votes
from real_servers import asked, raw, served, studio
from small_study import begun

CONNECTIONS = pytest.mark.attack("silent connections")
COOKIES = pytest.mark.attack("cookies of other servers")
SITES = pytest.mark.attack("cross-site requests")
PROXIES = pytest.mark.attack("a path behind a reverse proxy")

TOKEN, OTHER = "a-token-that-is-long-enough", "another-token-long-enough"

KINDS = ("studio", "study")


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Votes]:
    with begun(tmp_path_factory.mktemp("study"), most_participants=1000) as opened:
        yield opened


@pytest.fixture
def start(votes: Votes, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a server of a kind, and gives its port."""
    with ExitStack() as closing:

        def begin(kind: str, token: str | None = None, root: str = "") -> int:
            if kind == "studio":
                return closing.enter_context(studio(tmp_path / "library", token, root))[0]
            return closing.enter_context(served(study_server.app(votes, token, root)))

        yield begin


# -- connections ------------------------------------------------------------------------------------------------------

OWING = {
    "nothing": b"",
    "half a head": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    "half a body": b"POST /begin HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nslow",
    "half a chunk": b"POST /begin HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nslow",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a WebSocket": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
}


@CONNECTIONS
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_comes_while_many_connections_say_nothing(
    start: Callable[..., int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 4.0)
    monkeypatch.setattr(connections, "BODY_SECONDS", 4.0)
    port = start(kind)
    held = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(120)]
    for opened, said in zip(held, [*OWING.values()] * 20, strict=True):
        opened.sendall(said)
    begun_at = time.monotonic()
    assert asked(port, "/")[0] == 200
    assert time.monotonic() - begun_at < 2
    for opened in held:  # none is held for ever, however its bytes come
        opened.settimeout(10)
        with suppress(ConnectionResetError):
            while opened.recv(65_536):
                pass
        opened.close()
    assert time.monotonic() - begun_at < 20


@CONNECTIONS
def test_bytes_that_drip_buy_no_time(start: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(connections, "BODY_SECONDS", 1.0)
    port = start("study")
    for said in (OWING["half a head"], OWING["half a body"]):
        with socket.create_connection(("127.0.0.1", port), 10) as opened:
            opened.sendall(said)
            begun_at = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() < begun_at + 5:
                    opened.sendall(b"x")
                    time.sleep(0.05)
            assert time.monotonic() - begun_at < 4


@CONNECTIONS
def test_where_there_are_too_many_the_silent_ones_make_way(votes: Votes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_open_files", lambda: connections.SPARE_FILES + 20)
    with served(study_server.app(votes)) as port:
        held = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(60)]
        assert all(asked(port, "/")[0] == 200 for _ in range(5))
        for opened in held:
            opened.close()


@CONNECTIONS
def test_an_answer_that_nobody_reads_is_given_up(start: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no limit of time for what is not read")
    with access.bound("127.0.0.1", 0) as listening:
        connections.server(None, listening)
        asking = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == connections.UNREAD_SECONDS * 1000
        asking.close()
        accepted.close()


@CONNECTIONS
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_bounded(start: Callable[..., int], kind: str) -> None:
    port = start(kind)
    head = b"GET /%s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n%s\r\n"
    for said in (
        head % (b"?" + b"x" * 70_000, b""),
        head % (b"", b"X-Long: " + b"x" * 70_000 + b"\r\n"),
        head % (b"", b"X-Many: 1\r\n" * 200),
        head % (b"", b"X-%d: 1\r\n" % 1 * 8000),
    ):
        assert raw(port, said).split(b" ")[1] in (b"400", b"431")
    assert raw(port, head % (b"?prompt=" + b"%E7%8C%AB" * 2000, b"")).split(b" ")[1] == b"200"


# -- cookies ----------------------------------------------------------------------------------------------------------


def enter(port: int, token: str, root: str = "", headers: dict[str, str] | None = None) -> tuple[str, str, str]:
    """Open a link: the cookie's name, its value and what the browser is told about it."""
    status, told, body = asked(port, f"{root}/?token={token}&lam=1", headers=headers)
    assert status == 303 and told["location"] == f"{root}/?lam=1" and token not in repr(told) + body.decode()
    name, _, rest = told["set-cookie"].partition("=")
    value, _, flags = rest.partition("; ")
    return name, value, flags


@COOKIES
def test_servers_on_one_host_keep_out_of_each_others_way(start: Callable[..., int]) -> None:
    ports = [start("studio", TOKEN), start("studio", OTHER), start("studio", TOKEN), start("study", TOKEN)]
    tokens = [TOKEN, OTHER, TOKEN, TOKEN]
    cookies = [enter(port, token)[:2] for port, token in zip(ports, tokens, strict=True)]
    assert len({name for name, _ in cookies}) == 4
    jar = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies)}
    assert [asked(port, "/", headers=jar)[0] for port in ports] == [200] * 4
    for name, value in cookies:  # what another server is sent opens no other door, under any name
        for (own, _), port in zip(cookies, ports, strict=True):
            expected = 200 if own == name else 401
            assert asked(port, "/", headers={"Cookie": f"{own}={value}"})[0] == expected


@COOKIES
@pytest.mark.parametrize("kind", KINDS)
def test_a_cookie_tells_no_token_and_cannot_be_made_up(start: Callable[..., int], kind: str) -> None:
    port = start(kind, TOKEN)
    name, value, flags = enter(port, TOKEN)
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= {*flags.split("; ")}
    number, _, signature = value.partition(".")
    for forged in (TOKEN, number, f"{number}.", f"0{value}", f"{number}.{signature[:-1]}0x", "", ".", f".{signature}"):
        assert asked(port, "/", headers={"Cookie": f"{name}={forged}"})[0] == 401
    assert enter(port, TOKEN)[1] != value  # each browser is somebody else


@COOKIES
def test_a_participant_is_let_in_again_after_a_restart_with_the_same_token_alone(votes: Votes) -> None:
    with served(study_server.app(votes, TOKEN)) as port:
        name, value, _ = enter(port, TOKEN)
    for token, status in ((TOKEN, 200), (OTHER, 401)):
        with served(study_server.app(votes, token)) as port:
            assert asked(port, "/", headers={"Cookie": f"{name}={value}"})[0] == status


# -- other sites ------------------------------------------------------------------------------------------------------

POSTS = {"studio": "/gradio_api/run/predict", "study": "/begin"}

NEWS = {"studio": "/gradio_api/heartbeat/a", "study": "/pair"}


@SITES
@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_others_are_told_by_where_they_come_from(
    start: Callable[..., int], kind: str, token: str | None
) -> None:
    port = start(kind, token)
    known: dict[str, str] = {}
    if token is not None:
        name, value, _ = enter(port, token)
        known = {"Cookie": f"{name}={value}"}
    own = f"127.0.0.1:{port}"
    foreign = (
        "http://evil.example",
        "null",
        f"http://127.0.0.1:{port + 1}",
        "http://127.0.0.1",
        f"http://localhost:{port}",
        f"http://{own}.evil.example",
        f"http://evil.example/{own}",
        f"http://{own}@evil.example",
        "file://",
        "chrome-extension://abcdef",
        f"ftp://{own}",
        "http://[::1",
        "http://127.0.0.1:99999",
    )
    for origin in foreign:
        for method, path in (("POST", POSTS[kind]), ("GET", NEWS[kind]), ("OPTIONS", POSTS[kind]), ("GET", "/")):
            asks = {"Origin": origin, "Access-Control-Request-Method": "POST"} | known
            status, told, _ = asked(port, path, b"" if method == "POST" else None, method, asks)
            assert status == 403, (origin, method)
            assert not [each for each in told if each.startswith("access-control-")]
    for site in ("cross-site", "same-site", "nonsense"):
        for method, path in (("POST", POSTS[kind]), ("GET", NEWS[kind]), ("GET", "/")):
            asks = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors"} | known
            assert asked(port, path, b"" if method == "POST" else None, method, asks)[0] == 403
        visit = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"} | known  # somebody followed a link
        assert asked(port, "/", headers=visit)[0] == 200
        assert asked(port, POSTS[kind], b"", headers=visit)[0] == 403
    assert asked(port, POSTS[kind], b"", headers={"Referer": "http://evil.example/x"} | known)[0] == 403
    for asks in ({}, {"Origin": f"http://{own}"}, {"Origin": f"http://{own}", "Sec-Fetch-Site": "same-origin"}):
        status, told, _ = asked(port, POSTS[kind], b"", headers=asks | known)
        assert status in (303, 400) and not [each for each in told if each.startswith("access-control-")]


@SITES
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_was_pointed_here_is_refused(start: Callable[..., int], kind: str) -> None:
    port = start(kind)
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "192.168.0.7", "[::2]:80"):
        for others in ({}, {"X-Forwarded-Host": "127.0.0.1"}, {"Forwarded": "host=127.0.0.1"}):
            for path in ("/", NEWS[kind]):
                assert asked(port, path, headers={"Host": host} | others)[0] == 403
    for host in ("127.0.0.1", f"localhost:{port}", "[::1]"):
        assert asked(port, "/", headers={"Host": host})[0] == 200


@SITES
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stranger_says_of_proxies_is_not_believed(start: Callable[..., int], kind: str) -> None:
    port = start(kind, TOKEN)
    lies = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https", "X-Gradio-Server": "http://evil.example"}
    assert "Secure" not in enter(port, TOKEN, headers=lies)[2]
    name, value, _ = enter(port, TOKEN)
    _, _, body = asked(port, "/", headers=lies | {"Cookie": f"{name}={value}"})
    assert b"evil.example" not in body
    cross = lies | {"Cookie": f"{name}={value}", "Origin": "http://evil.example"}
    assert asked(port, POSTS[kind], b"", headers=cross)[0] == 403


@SITES
@pytest.mark.parametrize("kind", KINDS)
def test_a_websocket_is_not_opened(start: Callable[..., int], kind: str) -> None:
    port = start(kind)
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n"
    for path in ("/", "/gradio_api/queue/data", "/ws"):
        answer = raw(port, f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n{upgrade}\r\n".encode())
        assert b" 101 " not in answer


# -- proxies ----------------------------------------------------------------------------------------------------------


@contextmanager
def proxied(port: int, root: str, strips: bool, host: bool = True, said: dict[str, str] | None = None) -> Iterator[int]:
    """A reverse proxy that serves `port` at `root`, and nothing else; it may keep the path, and the browser's host."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def answer(self) -> None:
            if not self.path.startswith(f"{root}/"):
                self.send_error(404)
                return
            path = self.path[len(root) :] if strips else self.path
            lines = [f"{self.command} {path} HTTP/1.0"]
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "host", *map(str.lower, said or {})):
                    lines.append(f"{name}: {value}")
            lines.append(f"Host: {self.headers['Host'] if host else f'127.0.0.1:{port}'}")
            lines += [f"{name}: {value}" for name, value in (said or {}).items()]
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                upstream.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
                while piece := upstream.recv(65_536):
                    self.wfile.write(piece)
                    self.wfile.flush()

        do_GET = do_POST = do_HEAD = answer

        def handle(self) -> None:
            with suppress(OSError):  # the browser has left
                super().handle()

        def log_message(self, *_: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening.server_address[1]
    listening.shutdown()
    listening.server_close()


@PROXIES
@pytest.mark.parametrize("strips", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_addresses_below_a_root(start: Callable[..., int], kind: str, strips: bool) -> None:
    with proxied(start(kind, TOKEN, "/the/root"), "/the/root", strips) as port:
        assert asked(port, "/the/root/")[0] == 401
        name, value, flags = enter(port, TOKEN, "/the/root")
        assert "Path=/the/root;" in f"{flags};"
        known = {"Cookie": f"{name}={value}"}
        status, _, body = asked(port, "/the/root/", headers=known)
        assert status == 200
        for address in re.findall(rb'(?:href|src|action)="(/[^"]*)"', body):
            assert address.startswith(b"/the/root/") or address == b"/manifest.json"  # Gradio's, and not needed
        origin = known | {"Origin": f"http://127.0.0.1:{port}"}
        path = f"/the/root{POSTS[kind]}"
        assert asked(port, path, b"", headers=origin)[0] in (303, 400)
        assert asked(port, path, b"", headers=known | {"Origin": "http://evil.example"})[0] == 403
        if kind == "study":
            told = asked(port, path, b"", headers=known)[1]
            assert told["location"] == "/the/root/pair" and "Path=/the/root;" in told["set-cookie"]


@PROXIES
@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_tells_the_host_and_the_scheme(start: Callable[..., int], kind: str) -> None:
    said = {"X-Forwarded-Host": "pages.example", "X-Forwarded-Proto": "https"}
    with proxied(start(kind, TOKEN, "/root"), "/root", True, False, said) as port:
        name, value, flags = enter(port, TOKEN, "/root")
        assert "Secure" in flags
        known = {"Cookie": f"{name}={value}"}
        status, _, body = asked(port, "/root/", headers=known)
        assert status == 200
        if kind == "studio":
            assert b'"root":"https://pages.example/root"' in body
        for origin, statuses in (("https://pages.example", (303, 400)), ("https://evil.example", (403,))):
            assert asked(port, f"/root{POSTS[kind]}", b"", headers=known | {"Origin": origin})[0] in statuses


def test_a_root_is_a_path() -> None:
    assert [access.require_root(root) for root in ("", "/", "/study", "/a/b-c/")] == ["", "", "/study", "/a/b-c"]
    for root in ("study", "https://x.example/study", "/a b", "//a", "/../x", "/a/./b", '/"', "/a\n"):
        with pytest.raises(ValueError, match="--root-path"):
            access.require_root(root)
    with access.bound("127.0.0.1", 0) as listening:
        assert access.link(listening, "127.0.0.1", TOKEN, "/study").endswith(f"/study/?token={TOKEN}")


@PROXIES
def test_the_studio_in_a_browser_below_a_root(tmp_path: Path, chromium: Any) -> None:
    words = ("studio", "--port", "0", "--device", "cpu", "--token", TOKEN, "--root-path", "/studio/")
    with (
        command(*words, folder=tmp_path) as link,
        proxied(int(re.findall(r":(\d+)/studio/", link)[0]), "/studio", True) as port,
        page(chromium, f"http://127.0.0.1:{port}/studio/?token={TOKEN}") as opened,
    ):
        opened.wait_for_function("document.querySelector('#status')?.textContent.includes('Exact')", timeout=100_000)
        assert opened.locator("#picture img").get_attribute("src").startswith(f"http://127.0.0.1:{port}/studio/")
        opened.wait_for_function("document.querySelector('#picture img').naturalWidth > 0")
        opened.get_by_role("tab", name="Keep and share").click()
        assert f"http://127.0.0.1:{port}/studio/?prompt=" in opened.locator("#link").inner_text()


@PROXIES
def test_the_study_in_a_browser_below_a_root(start: Callable[..., int], chromium: Any) -> None:
    with (
        proxied(start("study", TOKEN, "/study"), "/study", True) as port,
        page(chromium, f"http://127.0.0.1:{port}/study/?token={TOKEN}") as opened,
    ):
        opened.get_by_role("button", name="I agree: begin").click()
        settled(opened, lambda: opened.evaluate("[...document.images].every((image) => image.naturalWidth > 0)"))
        for fieldset in opened.locator("fieldset").all():
            fieldset.get_by_text("A", exact=True).click()
        opened.get_by_role("button", name="Submit").click()
        assert "Pair 2 of" in opened.inner_text("header")
        assert opened.evaluate("getComputedStyle(document.querySelector('.grid')).display") == "grid"
