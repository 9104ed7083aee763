"""Stored images keep their names: what decides an image is hashed as ever, whatever the code calls it."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from deradiff.experiments.plan import parse_plan
from deradiff.experiments.running import contents
from deradiff.experiments.store import Store

METHODS: dict[str, list[dict[str, Any]]] = {
    "reference": [{"method": "reference"}],
    "models": [{"method": "model"}],
    "mixture": [{"method": "realign", "anchors": ["strong"], "lam": [0.0, 0.5, 1.0]}],
    "extrapolation": [{"method": "realign", "anchors": ["strong"], "lam": [1.5, -0.25]}],
    "targets": [{"method": "realign", "anchors": ["strong"], "targets": ["weak"]}],
    "particles": [{"method": "realign", "anchors": ["weak"], "lam": [0.5], "particles": 4}],
    "particles at zero": [{"method": "realign", "anchors": ["weak"], "lam": [0.0], "particles": 4}],
    "several": [{"method": "combine", "lams": [{"weak": 0.2, "strong": 0.7}, {"strong": 0.0, "weak": 0.2}]}],
    "several particles": [{"method": "combine", "lams": [{"weak": 0.2, "strong": 0.7}], "particles": 2}],
    "annealed": [
        {"method": "anneal", "anchors": ["strong"], "lam": [1, 0.5, 0], "schedules": ["power: 2", "step:0.3"]},
    ],
    "splines": [{"method": "anneal", "anchors": ["weak"], "schedules": ["spline:0/0,0.5/0.3,1/1", "sigmoid:5"]}],
    "interpolated": [{"method": "interpolate", "anchors": ["strong"], "lam": [0.0, 0.5, 1.0, 1.25]}],
    "one model twice": [{"method": "combine", "lams": [{"strong": 0.4, "twin": 0.1}, {"twin": 0.4, "strong": 0.1}]}],
    "noise": [{"method": "optimize-noise", "reward": "digits"}],
    "noise of another pipeline": [
        {"method": "optimize-noise", "reward": "bold", "iterations": 3, "steps": 1, "pipeline": "turbo"}
    ],
}

SAMPLINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "guided away": {"scheduler": "euler-a", "steps": 3, "guidance_scale": 2.5, "negative_prompt": "blå, 猫"},
    "sized": {"scheduler": "ddim", "steps": 7, "guidance_scale": 1.0, "height": 64, "width": 64},
}

RECORDED = {
    ("reference", "as it is"): (4, "a59c1ada3644c706b45ad8044a8a7fa9"),
    ("reference", "guided away"): (4, "0997f5fb596d8e7ace39e64e283cf33f"),
    ("reference", "sized"): (4, "d07b56bb2a57e692b5873f23af54b8a0"),
    ("models", "as it is"): (12, "37e428977f6928b21e9e6c54a223b637"),
    ("models", "guided away"): (12, "26c6d1b670434672376291eadc38f15c"),
    ("models", "sized"): (12, "d9010ce0c2d91641840179468e566fe2"),
    ("mixture", "as it is"): (12, "f9101cd8e21bfad85c1ca20848ae52a4"),
    ("mixture", "guided away"): (12, "eb3337a36a7a62cbb9a579ddbe52f8e8"),
    ("mixture", "sized"): (12, "6ead4c48efd032f7d2294bee181bd2b1"),
    ("extrapolation", "as it is"): (8, "ab8bc79a2c150e8bb3f4ff7536d13987"),
    ("extrapolation", "guided away"): (8, "66a73a8f54aedd2e21566fea92f65f56"),
    ("extrapolation", "sized"): (8, "03354011ec4d5797b79f09811a9afaa0"),
    ("targets", "as it is"): (4, "b3cd73b52d5b5c591cc8108054e3c51c"),
    ("targets", "guided away"): (4, "f67568054641091e0850b693795eba12"),
    ("targets", "sized"): (4, "39bf3f9cd0e453338eee3c6a8b35c6ad"),
    ("particles", "as it is"): (4, "f09005c27a85d1b4bd8bfe96e030e7e4"),
    ("particles", "guided away"): (4, "7ea96500b090faf50d13a00257d291b1"),
    ("particles", "sized"): (4, "e64e1e4b6469d7661b820e11df9d830d"),
    ("particles at zero", "as it is"): (4, "02d20990989bf46296623711fe65d29f"),
    ("particles at zero", "guided away"): (4, "3160e445aa0a3e2ec2fd36b1a8194612"),
    ("particles at zero", "sized"): (4, "4a5342b2f0491c7a8bbaa4d894ba40fc"),
    ("several", "as it is"): (8, "a79d8d11eaa507202e03b79fd69fa74f"),
    ("several", "guided away"): (8, "20423fbe15984847140bc8a1e895b302"),
    ("several", "sized"): (8, "362e0b7fe874ca3e25d6d5d1513ad7b0"),
    ("several particles", "as it is"): (4, "a7e626865cc1efc1a3c60f6b5717be24"),
    ("several particles", "guided away"): (4, "2bc7d8c47a3a27fde2ae794051d2295e"),
    ("several particles", "sized"): (4, "ac1ff9ee64f48ea6ca52096b4de4c4d8"),
    ("annealed", "as it is"): (24, "c4fa12e998b4ca906cec4c03cc99a7ff"),
    ("annealed", "guided away"): (24, "69815997315aa98ded4936443024f82c"),
    ("annealed", "sized"): (24, "5562400fa6c2167dac1f5d71bf17fcc7"),
    ("splines", "as it is"): (8, "321e4f1d651fd2bd895c29a7aec1ff38"),
    ("splines", "guided away"): (8, "0aa2175f36ecaa6d52c5f0edfdfb29b1"),
    ("splines", "sized"): (8, "15a6862827722846c35f37a646ec8222"),
    ("interpolated", "as it is"): (16, "428dc117c963f968f5d21a9c74ef8487"),
    ("interpolated", "guided away"): (16, "933fdc39d7dc0d48bff8e9129ef52d3e"),
    ("interpolated", "sized"): (16, "195463e35b9b5523c988b6b265ee9f5b"),
    ("one model twice", "as it is"): (8, "1cf1d15bc590e6d68f5cfb1d8953e484"),
    ("one model twice", "guided away"): (8, "d6fe605eb7a85c74884f4e7dfd7e9b23"),
    ("one model twice", "sized"): (8, "a00ffea1dc18ac70d805db699fc74280"),
    ("noise", "as it is"): (4, "d56cf42a8bb50260f8dbc854e597d5b2"),
    ("noise", "sized"): (4, "1aae5d7b23827b85c3df15f40c6eeb57"),
    ("noise of another pipeline", "as it is"): (4, "6db5d6efe2d94d15541c4fee77e8de43"),
    ("noise of another pipeline", "sized"): (4, "12424ddcab576f12a77f7c00a7ab7152"),
}
"""How many images there are, and a hash of all their identities, as version 0.1 computed them."""


SUMS = {"": "r", "strong": "s", "twin": "s", "weak": "w", "turbo": "t"}
"""Of the weights."""


def identities(folder: Path, methods: str, sampling: str) -> list[str]:
    plan = parse_plan(
        {
            "name": "identities",
            "reference": "digits",
            "dtype": "float16" if sampling == "sized" else "float32",
            "models": {
                "weak": {"source": "digits:500", "beta": 500, "family": "dpo"},
                "strong": {"source": "digits:30", "beta": 30, "family": "dpo"},
                "twin": {"source": "digits:30", "beta": 30, "family": "dpo"},
            },
            "prompts": {"few": {"prompts": ["the digit one", 'ü "two"'], "seeds": [0, 2**63 - 1]}},
            "sampling": {"main": SAMPLINGS[sampling]},
            "methods": METHODS[methods],
        },
        "the plan",
    )
    with Store(folder / "store", create=True) as store:
        store.remember("fingerprints", {name: {"sha256": digest} for name, digest in SUMS.items()})
        return list(contents(plan, store, fresh=False).cells.values())


@pytest.mark.parametrize(("methods", "sampling"), RECORDED)
def test_the_identities_of_images_are_those_of_version_0_1(tmp_path: Path, methods: str, sampling: str) -> None:
    named = identities(tmp_path, methods, sampling)
    assert (len(named), hashlib.sha256("".join(named).encode()).hexdigest()[:32]) == RECORDED[methods, sampling]
