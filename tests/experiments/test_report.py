"""The report holds every exhibit and needs no other file; what cannot be drawn is named, and the rest goes on."""

import base64
import csv
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from PIL import Image

from deradiff.experiments import running
from deradiff.experiments.plan import Plan
from deradiff.experiments.reporting import report, report_page
from deradiff.experiments.reporting.exhibits import Exhibit, as_csv
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store
from deradiff.files import pages
from small_experiment import Fake, silent, small


class Parsed(HTMLParser):
    """What a page consists of; tags that are not balanced are in `wrong`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[str]:
        return [value for attribute, value in self.attributes if attribute == name]


def figure() -> Figure:
    drawn = Figure(figsize=(3, 2))
    drawn.subplots().plot([1, 2, 3])
    return drawn


def exhibit(key: str = "one", **changes: Any) -> Exhibit:
    plain = Exhibit(key, "Section", f"Title of {key}", "Caption.", ("name", "value"), (("a", 1.5), ("b", float("nan"))))
    return replace(plain, **changes)


def each(*found: Exhibit | Exception) -> Callable[[Results], Iterator[Exhibit]]:
    """A generator of these exhibits, which ends where one is an error."""

    def gather(results: Results) -> Iterator[Exhibit]:
        for one in found:
            if isinstance(one, Exception):
                raise one
            yield one

    return gather


Write = Callable[..., tuple[report.WrittenReport, Parsed]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the report of a small experiment, made of the exhibits given by sort."""

    def written(plan: Plan | None = None, executor: Fake | None = None, out: str = "report", **sorts: Any) -> Any:
        plan = plan or small()
        running.run(plan, tmp_path / "run", lambda: executor or Fake(), silent)
        monkeypatch.setattr(report, "GATHERED", sorts)
        with Store(tmp_path / "run", write=False) as store:
            found = report.write(plan, store, tmp_path / out)
        return found, Parsed(found.files[0].read_text(encoding="utf-8"))

    return written


def test_every_exhibit_is_on_the_page_and_in_files(write: Write, tmp_path: Path) -> None:
    sheet = Image.new("RGB", (40, 30), "red")
    (files, failed), page = write(
        a=each(exhibit("drawn", figure=figure()), exhibit("sheet", picture=sheet), exhibit("table"))
    )
    assert failed == [] and not page.wrong
    names = ["report.html", "drawn.png", "drawn.svg", "drawn.csv", "sheet.png", "sheet.csv", "table.csv"]
    out = tmp_path / "report"
    assert [file.name for file in files] == names == sorted(names, key=names.index)
    assert sorted(file.name for file in out.iterdir()) == sorted([".deradiff-report.json", *names])
    with Image.open(out / "drawn.png") as png, Image.open(out / "sheet.png") as red:
        assert png.size == (600, 400) and red.getpixel((3, 3)) == (255, 0, 0)
    assert ElementTree.parse(out / "drawn.svg").getroot().tag.endswith("svg")
    with (out / "table.csv").open(encoding="utf-8", newline="") as lines:
        assert list(csv.reader(lines)) == [["name", "value"], ["a", "1.5"], ["b", ""]]
    smaller = min((out / "drawn.png", out / "drawn.svg"), key=lambda file: file.stat().st_size)
    sources = [value for value in page.all("src")]
    assert [base64.b64decode(value.partition(",")[2]) for value in sources] == [
        smaller.read_bytes(),
        (out / "sheet.png").read_bytes(),
    ]
    assert sources[0].startswith("data:image/svg+xml" if smaller.suffix == ".svg" else "data:image/png")
    assert all(words in page.text for words in ("Title of drawn", "Title of sheet", "Title of table", "Caption."))


def test_links_lead_somewhere_and_ids_are_unique(write: Write, tmp_path: Path) -> None:
    other = exhibit("three", section="Other, β & λ")
    _, page = write(a=each(exhibit("one"), exhibit("two")), b=each(other, exhibit("four")))
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    assert {"section-1", "section-2", "about", "one", "two", "three", "four"} <= set(ids)
    for link in page.all("href"):
        assert link[1:] in ids if link.startswith("#") else (tmp_path / "report" / link).is_file()
    order = [page.text.rindex(f"Title of {name}") for name in ("one", "two", "four", "three")]
    assert order == sorted(order)  # exhibits of one section stand together


def test_nothing_from_outside_becomes_markup(write: Write) -> None:
    evil = {
        place: f'<script>"{place}" & more</script>'
        for place in (
            "prompt",
            "substitute",
            "section",
            "title",
            "caption",
            "heading",
            "cell",
            "error",
            "warning",
        )
    }

    def gather(results: Results) -> Iterator[Exhibit]:
        warnings.warn(evil["warning"], stacklevel=1)
        yield exhibit(
            "evil",
            section=evil["section"],
            title=evil["title"],
            caption=evil["caption"],
            figure=figure(),
            header=(evil["heading"],),
            rows=((evil["cell"],),),
        )
        raise ValueError(evil["error"])

    prompts = {"few": {"prompts": [evil["prompt"]], "seeds": 0, "substitute_for": evil["substitute"]}}
    _, page = write(small(prompts=prompts), a=gather)
    assert not page.wrong and "script" not in page.tags
    assert [place for place, text in evil.items() if text not in page.text] == []


def test_an_exhibit_that_raises_is_named_and_the_others_go_on(write: Write) -> None:
    def late(results: Results) -> Iterator[Exhibit]:
        return map(lambda key: exhibit(key) if key != "b" else 1 / 0, ("a", "b", "c"))  # type: ignore[arg-type, return-value]

    error = KeyError("no such model")
    error.add_note("heat of dpo")
    broken = figure()
    broken.axes[0].set_title("$\\frac{$")
    (files, failed), page = write(
        first=each(exhibit("one"), error, exhibit("never")),
        second=late,
        third=each(exhibit("broken", figure=broken)),
        fourth=each(exhibit("last")),
    )
    assert [key for key, _ in failed] == ["first", "second", "broken"]
    assert failed[0][1] == "KeyError: 'no such model' (heat of dpo)" and "ZeroDivisionError" in failed[1][1]
    assert [file.stem for file in files[1:]] == ["one", "a", "c", "last"]
    assert all(words in page.text for _, words in failed) and not page.wrong


def test_what_cannot_even_begin_is_named(write: Write) -> None:
    def never(results: Results) -> Iterator[Exhibit]:
        raise RuntimeError("no features")

    (files, failed), _ = write(first=never, second=each(exhibit("one")))
    assert failed == [("first", "RuntimeError: no features")] and [file.stem for file in files[1:]] == ["one"]


def test_warnings_are_passed_on_beside_their_exhibit(write: Write) -> None:
    def warning(results: Results) -> Iterator[Exhibit]:
        yield exhibit("one")
        warnings.warn("fewer samples than features", stacklevel=1)
        warnings.warn("fewer samples than features", stacklevel=1)
        yield exhibit("two")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, page = write(a=warning)
    assert page.text.count("fewer samples than features") == 1
    assert page.text.index("fewer samples") > page.text.rindex("Title of two")


def test_names_that_are_taken_get_a_number(write: Write) -> None:
    (files, _), _ = write(a=each(exhibit("same"), exhibit("Same"), exhibit("../same")))
    assert [file.name for file in files[1:]] == ["same.csv", "same-2.csv", "same-3.csv"]


def test_ways_of_sampling_stand_apart(write: Write) -> None:
    steps = {"scheduler": "euler-a", "guidance_scale": 1.0}
    plan = small(sampling={"fast": {**steps, "steps": 2}, "slow": {**steps, "steps": 4}})
    (files, failed), page = write(plan, a=each(exhibit("one"), ValueError("no")))
    assert [file.name for file in files[1:]] == ["fast-one.csv", "slow-one.csv"]
    assert [key for key, _ in failed] == ["a by fast", "a by slow"]
    assert "Section, fast" in page.text and "Section, slow" in page.text and "Images, slow" in page.text


def test_the_same_results_give_the_same_bytes(write: Write) -> None:
    (first, _), _ = write(a=each(exhibit("one", figure=figure())))
    (second, _), _ = write(out="again", a=each(exhibit("one", figure=figure())))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_the_page_says_where_everything_comes_from(write: Write, tmp_path: Path) -> None:
    seeds = {"source": "digits", "count": 2, "draw_seed": 3, "seeds": "0:1", "substitute_for": "the 40 prompts"}
    plan = small(prompts={"few": seeds})
    _, page = write(plan, Fake(), a=each(exhibit()))
    planned = len(_contents(plan, tmp_path))
    assert f"{planned} of {planned} planned images are there" in page.text
    assert "The prompts few are a substitute for the 40 prompts." in page.text
    assert "digits, drawn with seed 3" in page.text and "made with" in page.text and "torch" in page.text
    assert "Missing" not in page.text and "could not" not in page.text


def test_missing_images_and_failed_scores_are_told(write: Write, tmp_path: Path) -> None:
    plan = small()
    running.run(plan, tmp_path / "run", Fake, silent)
    contents = _contents(plan, tmp_path)
    bad, lost = list(contents)[:2]
    with Store(tmp_path / "run") as store:
        store.put_scores("scores", "digits", [(store.drawn()[bad], None, "ValueError: <no>")])
        store.put_scores("scores", "gone", [(store.drawn()[bad], None, "of another plan")])
        store.forget([lost])
        page = Parsed(report_page.page([Results(plan, store)], store, [], []))
    assert f"Missing: 1 of {len(contents)} images." in page.text
    assert "1 score could not be computed" in page.text and "of another plan" not in page.text
    assert "ValueError: <no>" in page.text and bad in page.text and not page.wrong


def _contents(plan: Plan, folder: Path) -> dict[str, Any]:
    with Store(folder / "run", write=False) as store:
        return dict(running.contents(plan, store, fresh=False).drawings)


def test_cells_are_readable() -> None:
    shown = [report_page.cell(x) for x in (None, float("nan"), True, 1234, 0.000512345, -12.3456, 23456.7, "a<b", 3.0)]
    assert shown == ["–", "–", "yes", "1,234", "0.0005123", "−12.35", "23,457", "a<b", "3"]


def test_long_tables_stay_in_their_file(write: Write) -> None:
    rows = tuple((f"name {i}", i) for i in range(report_page.LONGEST + 1))
    _, page = write(a=each(exhibit("long", figure=figure(), rows=rows), exhibit("table", rows=rows)))
    assert page.text.count("name 150") == 1  # where there is no figure, the table is shown


def test_tables_set_words_apart() -> None:
    macros = pages.templates(Path(pages.__file__).parent).get_template("macros.html").module
    table = str(macros.table(["a", "b"], [["x", "1"]], [1]))  # type: ignore[attr-defined]
    assert '<td>x</td><td class="words">1</td>' in table and '<th>a</th><th class="words">b</th>' in table


def test_csv_writes_what_is_not_known_as_nothing() -> None:
    data = as_csv(("a", "b,c"), ((float("nan"), None), (0.1 + 0.2, "λ\n1")))
    assert list(csv.reader(io.StringIO(data.decode()))) == [["a", "b,c"], ["", ""], ["0.30000000000000004", "λ\n1"]]
