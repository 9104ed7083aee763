"""A small study of a small experiment whose images no model drew: for the tests of plans, pages and votes."""

import re
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from deradiff.experiments import running
from deradiff.study import server, tiles
from deradiff.study.plan import StudyPlan, parse_plan
from deradiff.study.votes import Votes
from small_experiment import Fake, silent, small

PROMPTS = ["the digit one", "the digit two", "<b>three</b> & more"]


def experiment(folder: Path, **changes: Any) -> Path:
    """Ten seeds of three prompts, by the reference and two models."""
    plan = small(
        **{
            "prompts": {"few": {"prompts": PROMPTS, "seeds": "0:9"}},
            "methods": [{"method": "reference"}, {"method": "model"}],
            "batch_size": 32,
            **changes,
        }
    )
    running.run(plan, folder, Fake, silent)
    return folder


def data(**changes: Any) -> dict[str, Any]:
    """A plan for that experiment, in a folder beside the plan, as plain data."""
    configuration = {
        "name": "few",
        "experiment": "experiment",
        "sampling": "ancestral",
        "prompt_set": "few",
        "methods": {"strong": "strong", "weak": "weak"},
        "seeds": "0:9",
        "prompts": PROMPTS,
    }
    own = changes.pop("configuration", {})
    return {
        "name": "small",
        "pairs_per_participant": 3,
        "attention_checks": 1,
        "configurations": [configuration | own],
        **changes,
    }


def planned(**changes: Any) -> StudyPlan:
    """The same, read."""
    return parse_plan(data(**changes), "the small study")


def voted(votes: Votes) -> None:
    """Have one participant answer everything: the real images against noise, else what is on the left."""
    key = votes.begin().result()
    while (shown := votes.current(key)) is not None:
        noise_is_left = len({*shown.left}) == 1
        votes.vote(key, shown.id, answers("right" if noise_is_left else "left")).result()


def begun(tmp_path: Path, **changes: Any) -> Votes:
    """A study that is ready to be served, of an experiment that is made where there is none."""
    if not (tmp_path / "experiment").exists():
        experiment(tmp_path / "experiment")
    return tiles.ready(tmp_path / "study", planned(**changes), tmp_path, lambda *_: None)


def client(votes: Votes, token: str | None = None, **options: Any) -> TestClient:
    """A browser of its own."""
    return TestClient(server.app(votes, token), base_url="http://127.0.0.1", **options)


def pair_in(page: str) -> str:
    """The id of the pair that a page shows."""
    found = re.search(r'name="pair" value="([^"]+)"', page)
    assert found is not None, page
    return found[1]


def answers(answer: str = "left", **others: str) -> dict[str, str]:
    """The same answer to all three questions, or to all but some."""
    return dict.fromkeys(("diversity", "aesthetics", "agreement"), answer) | others
