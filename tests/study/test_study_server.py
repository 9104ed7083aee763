"""The pages: from the first to thanks, and everything that is refused, with a page and a status that say so."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from deradiff.servers import access
from deradiff.study import ballots, server, tiles
from deradiff.study.votes import Busy, Votes
from messages import naming
from small_study import answers, begun, client, experiment, pair_in, planned

TOKEN = "a-token-that-is-long-enough"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    experiment(folder / "experiment")
    return folder


@pytest.fixture
def votes(drawn: Path, tmp_path: Path) -> Any:
    with tiles.ready(tmp_path / "study", planned(), drawn, lambda *_: None) as found:
        yield found


def heading(page: str) -> str:
    found = re.search(r"<h1[^>]*>(.*?)</h1>", page, re.DOTALL)
    assert found is not None, page
    return found[1]


def stored(votes: Votes) -> list[ballots.Ballot]:
    return ballots.read(votes.folder, votes.plan)


def test_a_study_from_the_first_page_to_thanks(votes: Votes) -> None:
    browser = client(votes)
    first = browser.get("/")
    assert first.status_code == 200 and "There are 4 pairs" in first.text
    assert not first.cookies  # nothing is kept before somebody agreed
    page = browser.post("/begin")
    for number in range(4):
        assert page.status_code == 200 and f"Pair {number + 1} of 4" in page.text
        images = re.findall(r'<img src="(/image/[^"]+)"', page.text)
        assert len(images) == 18 and all(browser.get(image).status_code == 200 for image in images)
        assert all(page.text.count(f'name="{key}" value="equal"') == 1 for key in answers())
        page = browser.post("/vote", data={"pair": pair_in(page.text)} | answers("right", diversity="equal"))
    assert heading(page.text) == "Thank you"
    assert len(stored(votes)) == 4 * 3
    assert {one.answer for one in stored(votes) if one.question == "diversity"} == {"equal"}
    assert heading(browser.get("/pair").text) == "Thank you"
    assert "Go on" in browser.get("/").text


def test_a_study_goes_on_after_a_restart(drawn: Path, tmp_path: Path) -> None:
    with begun_at(drawn, tmp_path) as found:
        browser = client(found)
        page = browser.post("/begin")
        page = browser.post("/vote", data={"pair": pair_in(page.text)} | answers())
        cookies = dict(browser.cookies)
    with begun_at(drawn, tmp_path) as found:
        again = client(found, cookies=cookies)
        assert pair_in(again.get("/pair").text) == pair_in(page.text)
        # Beginning anew does not make two people of one.
        assert pair_in(again.post("/begin").text) == pair_in(page.text)
        assert len(stored(found)) == 3


def begun_at(drawn: Path, tmp_path: Path) -> Votes:
    return tiles.ready(tmp_path / "study", planned(), drawn, lambda *_: None)


def test_the_cookie_is_a_random_key_for_this_study_alone(votes: Votes) -> None:
    keys = set()
    for _ in range(3):
        header = client(votes).post("/begin", follow_redirects=False).headers["set-cookie"]
        name, _, rest = header.partition("=")
        assert name == f"participant-{votes.mark}"
        key, *flags = rest.split("; ")
        assert re.fullmatch(r"[\w-]{32}", key)
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {*flags} and "Secure" not in flags
        keys.add(key)
    assert len(keys) == 3
    over_tls = client(votes, TOKEN, follow_redirects=False)
    over_tls.base_url = "https://study.example"
    assert "; Secure" in over_tls.get("/", params={"token": TOKEN}).headers["set-cookie"]


def test_pages_need_nothing_from_elsewhere_and_escape_prompts(drawn: Path, tmp_path: Path) -> None:
    changes: Any = {"title": "<script>1</script>", "introduction": 'a "b" & <i>c</i>\n\nd', "pairs_per_participant": 1}
    plan = planned(**changes, attention_checks=0, configuration={"prompts": ["<b>three</b> & more"]})
    with tiles.ready(tmp_path / "study", plan, drawn, lambda *_: None) as found:
        browser = client(found)
        pages = [browser.get("/").text, browser.post("/begin").text, browser.get("/style.css").text]
        response = browser.get("/")
    assert "&lt;script&gt;1" in pages[0] and "<p>a &#34;b&#34; &amp; &lt;i&gt;c&lt;/i&gt;</p>" in pages[0]
    assert "<blockquote>&lt;b&gt;three&lt;/b&gt; &amp; more</blockquote>" in pages[1]
    for page in pages:
        assert not re.search(r"https?:|<script|url\(", page)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_very_long_prompt_is_shown_whole_and_can_be_scrolled(tmp_path: Path) -> None:
    text = "<i>" + "x" * 10_000
    experiment(tmp_path / "experiment", prompts={"few": {"prompts": [text], "seeds": "0:8"}})
    changes: Any = {"prompts": [text], "seeds": "0:8"}
    with begun(tmp_path, pairs_per_participant=1, attention_checks=0, configuration=changes) as found:
        page = client(found).post("/begin").text
    assert "&lt;i&gt;" + "x" * 10_000 in page and '<blockquote tabindex="0"' in page


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_vote_that_misses_an_answer_is_asked_again(votes: Votes) -> None:
    browser = client(votes)
    pair = pair_in(browser.post("/begin").text)
    for given in ({"diversity": "left"}, answers("up"), {}):
        page = browser.post("/vote", data={"pair": pair} | given)
        assert page.status_code == 422 and 'role="alert"' in page.text and pair_in(page.text) == pair
    page = browser.post("/vote", data={"pair": pair, "diversity": "right"})
    assert page.text.count(" checked>") == 1 and page.text.count('class="missing"') == 2
    assert stored(votes) == []


def test_replayed_votes(votes: Votes) -> None:
    browser = client(votes)
    vote = {"pair": pair_in(browser.post("/begin").text)} | answers("left")
    following = pair_in(browser.post("/vote", data=vote).text)
    again = browser.post("/vote", data=vote)
    assert again.status_code == 200 and pair_in(again.text) == following
    other = browser.post("/vote", data=vote | {"aesthetics": "right"})
    assert other.status_code == 409 and heading(other.text) == "This pair is answered already"
    assert browser.post("/vote", data={"pair": vote["pair"]}).status_code == 409
    assert [one.answer for one in stored(votes)] == ["left"] * 3


def test_forged_votes_and_votes_of_others(votes: Votes) -> None:
    mine, other = client(votes), client(votes)
    mine.post("/begin")
    theirs = pair_in(other.post("/begin").text)
    for pair in (theirs, "x" * 32, "", "1"):
        page = mine.post("/vote", data={"pair": pair} | answers())
        assert page.status_code == 403 and "not shown" in page.text
    stranger = client(votes, cookies={f"participant-{votes.mark}": "x" * 32})
    assert stranger.post("/vote", data={"pair": theirs} | answers()).status_code == 403
    assert stored(votes) == []


def test_a_participant_without_cookies(votes: Votes) -> None:
    browser = client(votes)
    assert browser.post("/begin", follow_redirects=False).status_code == 303
    browser.cookies.clear()
    for page in (browser.get("/pair"), browser.post("/vote", data={"pair": "x"} | answers())):
        assert page.status_code == 403 and "Allow cookies for this site" in page.text


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"x" * 20_000, 413), (b"pair=1&pair=2", 400), (b"\xff\xfe=1", 400), (b"&".join([b"a=1"] * 300), 400)],
)
def test_forms_that_are_none(votes: Votes, body: bytes, status: int) -> None:
    browser = client(votes)
    browser.post("/begin")
    page = browser.post("/vote", content=body, headers={"content-type": "application/x-www-form-urlencoded"})
    assert page.status_code == status and heading(page.text) == "This was not understood"


def test_images_have_opaque_names_and_no_paths(votes: Votes) -> None:
    browser = client(votes)
    secret = votes.folder / "images" / "secret.png"
    secret.write_bytes(b"secret")
    for name in ("secret.png", "../study.sqlite", "..%2Fstudy.sqlite", "%2e%2e/study.sqlite", "", "x" * 5000, "%00"):
        page = browser.get(f"/image/{name}")
        assert page.status_code == 404 and heading(page.text) == "There is no such page"
    names = [*votes.entered().values()]
    assert all(re.fullmatch(r"[0-9a-f]{32}\.png", name) for name in names) and len({*names}) == len(names)


def test_pages_that_there_are_not(votes: Votes) -> None:
    browser = client(votes)
    for page, status in ((browser.get("/docs"), 404), (browser.get("/vote"), 405), (browser.post("/pair"), 405)):
        assert page.status_code == status and heading(page.text) == "There is no such page"


def test_other_web_sites_send_nothing(votes: Votes) -> None:
    for site in ("cross-site", "same-site"):
        page = client(votes).post("/begin", headers={"sec-fetch-site": site})
        assert page.status_code == 403 and "another web site" in page.text
    elsewhere = client(votes)
    elsewhere.base_url = "http://evil.example"
    assert elsewhere.get("/").status_code == 403
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "127.0.0.2"):
        assert client(votes).get("/", headers={"host": host}).status_code == 200


def test_a_token_is_needed_once(votes: Votes) -> None:
    browser = client(votes, TOKEN)
    browser.base_url = "http://study.example"
    for path in ("/", "/pair", "/?token=another", "/?token=", f"/pair?token={TOKEN}", "/image/x.png"):
        page = browser.get(path)
        assert page.status_code == 401 and heading(page.text) == "This link is not complete"
    assert browser.post("/begin").status_code == 401
    assert browser.get("/style.css").status_code == 200
    assert browser.get(f"/?token={TOKEN}").status_code == 200
    assert browser.post("/begin").status_code == 200 and browser.get("/").status_code == 200


def test_a_full_study_and_a_busy_one(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiles.ready(tmp_path / "study", planned(most_participants=1), drawn, lambda *_: None) as found:
        browser, second = client(found), client(found)
        page, waiting = browser.post("/begin"), second.post("/begin")
        page = browser.post("/vote", data={"pair": pair_in(page.text)} | answers())
        vote = {"pair": pair_in(waiting.text)} | answers()
        for late in (client(found).post("/begin"), second.post("/vote", data=vote)):
            assert late.status_code == 403 and "all the participants" in late.text

        def busy(*_: Any) -> Any:
            raise Busy

        monkeypatch.setattr(found, "vote", busy)
        turned_away = browser.post("/vote", data={"pair": pair_in(page.text)} | answers())
        assert turned_away.status_code == 503 and heading(turned_away.text) == "Too many people are voting"


def test_an_error_of_ours_tells_nothing_of_the_machine(votes: Votes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("/secret/path")

    monkeypatch.setattr(votes, "current", broken)
    browser = client(votes, raise_server_exceptions=False)
    page = browser.post("/begin")
    assert page.status_code == 500 and heading(page.text) == "Something went wrong here"
    assert "secret" not in page.text


# -- addresses --------------------------------------------------------------------------------------------------------


def test_other_addresses_need_a_token() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        access.require_token(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.5", "study.example"):
        with pytest.raises(ValueError, match=naming(f"--host {host}")):
            access.require_token(host, None)
        access.require_token(host, TOKEN)
    for token in ("", "short", "with spaces in between", "x" * 201):
        with pytest.raises(ValueError, match=naming("token", 16, 200)):
            access.require_token("127.0.0.1", token)


def test_a_port_in_use_and_other_addresses_that_cannot_be_had() -> None:
    with access.bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert access.link(taken, "127.0.0.1", None) == f"http://127.0.0.1:{port}/"
        assert access.link(taken, "::1", TOKEN) == f"http://[::1]:{port}/?token={TOKEN}"
        assert access.link(taken, "0.0.0.0", None) == f"http://{socket.gethostname()}:{port}/"
        with pytest.raises(OSError, match=naming(f"port {port}", "127.0.0.1")):
            access.bound("127.0.0.1", port)
    with pytest.raises(OSError, match="'no such host'"):
        access.bound("no such host", 0)
    with pytest.raises(OSError, match=naming("203.0.113.1")):
        access.bound("203.0.113.1", 0)


def test_many_browsers_at_once(votes: Votes) -> None:
    """The application itself, fifty forms in flight: each acknowledged vote is there, once."""

    with ThreadPoolExecutor(20) as pool:
        given = sum(pool.map(_takes_part, [client(votes) for _ in range(20)]))
    assert given == len(stored(votes)) == 20 * 4 * 3


def _takes_part(browser: TestClient) -> int:
    page, count = browser.post("/begin"), 0
    while "Thank you" not in page.text:
        page = browser.post("/vote", data={"pair": pair_in(page.text)} | answers())
        assert page.status_code == 200
        count += 3
    return count


def test_the_server_is_named_when_its_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, server.__name__)
    with pytest.raises(ImportError, match=r"pip install 'deradiff\[study\]'"):
        importlib.import_module(server.__name__)
