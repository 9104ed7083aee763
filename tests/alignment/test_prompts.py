"""Prompt lists from every kind of file, from the hub by name, and what is refused."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError

from deradiff.alignment import prompts
from deradiff.alignment.prompts import load_prompts
from messages import naming

FILES = {
    "list.txt": "\ufeff# a comment\n a cat \n\na dog\r\na cat\n",
    "list.yaml": "- a cat\n- a dog\n- a cat\n",
    "named.yml": "prompts: [a cat, a dog, a cat]",
    "list.json": '["a cat", "a dog", "a cat "]',
    "objects.json": '[{"prompt": "a cat"}, "a dog", {"text": "a cat"}]',
    "objects.jsonl": '{"caption": "a cat"}\n\n{"prompt": "a dog"}\n{"prompt": "a cat"}\n',
    "table.csv": "id,Prompt\n1,a cat\n2,a dog\n3,a cat\n",
}
WITH_CATEGORIES = {
    "mapping.yaml": 'animals: [a cat, a dog]\nwords: [the word "yes"]\n',
    "mapping.json": '{"animals": ["a cat", "a dog"], "words": ["the word \\"yes\\""]}',
    "table.csv": 'prompt,category\na cat,animals\na dog,animals\n"the word ""yes""",words\n',
    "table.tsv": 'Prompt\tCategory\tNote\na cat\tanimals\t\na dog\tanimals\t"\nthe word "yes"\twords\tx\n',
    "objects.jsonl": "\n".join(
        json.dumps({"text": text, "style": style})
        for text, style in [("a cat", "animals"), ("a dog", "animals"), ('the word "yes"', "words")]
    ),
}


def written(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_bytes(content.encode())
    return folder / name


@pytest.mark.parametrize("name", FILES)
def test_every_form_gives_its_prompts_once(name: str, tmp_path: Path) -> None:
    found = load_prompts(written(tmp_path, name, FILES[name]))
    assert found.prompts == ("a cat", "a dog") and found.duplicates == 1
    assert found.categories == (None, None) and found.source.endswith(name)


@pytest.mark.parametrize("name", WITH_CATEGORIES)
def test_categories_are_kept(name: str, tmp_path: Path) -> None:
    found = load_prompts(written(tmp_path, name, WITH_CATEGORIES[name]))
    assert found.prompts == ("a cat", "a dog", 'the word "yes"') and found.duplicates == 0
    assert found.by_category() == {"animals": ("a cat", "a dog"), "words": ('the word "yes"',)}


def test_a_count_takes_the_first_and_a_seed_draws(tmp_path: Path) -> None:
    content = "".join(f"{group}: [{', '.join(f'{group}{i}' for i in range(20))}]\n" for group in "abc")
    path = written(tmp_path, "list.yaml", content)
    everything = load_prompts(path)
    assert load_prompts(path, 25).prompts == everything.prompts[:25]
    drawn = load_prompts(path, 25, seed=3)
    assert len(set(drawn.prompts)) == 25 and set(drawn.prompts) <= set(everything.prompts)
    assert drawn == load_prompts(path, 25, seed=3) and drawn.prompts != load_prompts(path, 25, seed=4).prompts
    assert all(
        prompt.startswith(str(category)) for prompt, category in zip(drawn.prompts, drawn.categories, strict=True)
    )
    assert sorted(load_prompts(path, seed=0).prompts) == sorted(everything.prompts)
    with pytest.raises(ValueError, match=naming(path, 60, 0, 61)):
        load_prompts(path, 61)
    with pytest.raises(ValueError, match=naming("count", 0)):
        load_prompts(path, 0)


@pytest.mark.parametrize("source", ["", " "])
def test_a_path_that_was_not_given_is_no_folder(source: str) -> None:
    with pytest.raises(ValueError, match=r"no path was given.*partiprompts"):
        load_prompts(source)


@pytest.mark.parametrize(
    "name, content, values",
    [
        ("a.txt", "# nothing\n\n", ["no prompt"]),
        ("a.yaml", "", ["no prompt"]),
        ("a.json", "[]", ["no prompt"]),
        ("a.csv", "prompt,category\n", ["no prompt"]),
        ("a.yaml", "- a\n- 3\n", ["entry 2", 3]),
        ("a.yaml", "- no\n", ["entry 1", False]),
        ("a.json", '["a", " "]', ["entry 2", "empty"]),
        ("a.json", '["a"', ["JSON"]),
        ("a.yaml", "a: [b\n", ["YAML"]),
        ("a.yaml", "!!python/object/apply:os.getcwd []", ["YAML"]),
        ("a.yaml", "animals: a cat", ["'animals'"]),
        ("a.jsonl", '{"prompt": "a"}\nb', ["line 2", "JSON"]),
        (
            "a.jsonl",
            '{"words": "a"}',
            ["line 1", "'words'", "prompt, caption, text"],
        ),
        ("a.jsonl", '"a"', ["line 1", "no prompt"]),
        ("a.csv", "category,prompt\nanimals\n", ["line 2", 1, "'animals'", 2]),
        ("a.md", "a", [".txt"]),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(name: str, content: str, values: list[object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming(name, *values)):
        load_prompts(written(tmp_path, name, content))


def test_other_encodings_folders_and_unknown_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(ValueError, match=naming("a.txt", "UTF-8", "0xe4")):
        load_prompts(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=naming(tmp_path, "folder")):
        load_prompts(tmp_path)
    for source in ("hpdv2/sketches", tmp_path / "b.txt"):
        with pytest.raises(FileNotFoundError, match=naming(source, "partiprompts, partiprompts/complex, hpdv2")):
            load_prompts(source)


def test_the_papers_lists_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hf_hub_download(repo: str, file: str, *, repo_type: str) -> str:
        assert repo_type == "dataset"
        asked.append((repo, file))
        if file.endswith(".tsv"):
            rows = ["Prompt\tCategory\tChallenge\tNote", "bond\tAbstract\tBasic\t", "cats\tAnimals\tComplex\t", ""]
            return str(written(tmp_path, "PartiPrompts.tsv", "\n".join(rows)))
        path = tmp_path / Path(file).name
        return str(written(tmp_path, path.name, json.dumps([f"{path.stem} {i}" for i in range(3)])))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    parti = load_prompts("partiprompts")
    assert (parti.prompts, parti.categories) == (("bond", "cats"), ("Abstract", "Animals"))
    hard = load_prompts("partiprompts/complex")
    assert (hard.prompts, hard.categories) == (("cats",), ("Animals",))
    everything = load_prompts("hpdv2")
    assert tuple(everything.by_category()) == prompts.HPD_STYLES and len(everything) == 12
    assert load_prompts("hpdv2/photo", 2).prompts == ("photo 0", "photo 1")
    assert asked[0] == ("nateraw/parti-prompts", "PartiPrompts.tsv")
    assert asked[-1] == ("zhwang/HPDv2", "benchmark/photo.json")

    def offline(*args: Any, **others: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(OSError, match=naming("benchmark/photo.json", "zhwang/HPDv2", "no route")):
        load_prompts("hpdv2/photo")

    def gated(*args: Any, **others: Any) -> str:
        raise GatedRepoError("403 Client Error.", response=httpx2.Response(403, request=httpx2.Request("GET", "")))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    with pytest.raises(OSError, match=naming("huggingface.co/datasets/zhwang/HPDv2", "hf auth login")):
        load_prompts("hpdv2/photo")


def test_pick_a_pics_captions_are_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = [], []

    def load_dataset(repo: str, *, split: str, revision: str | None, streaming: bool, columns: list[str]) -> Any:
        assert columns == ["caption"]
        asked.append((repo, split, streaming))
        captions = ["a", "a", "", None, "b", "c", "d"]
        return ({"caption": read.append(caption) or caption} for caption in captions)  # type: ignore[func-returns-value]

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = load_prompts("pickapic-v2", 2, split="test_unique")
    assert (found.prompts, found.duplicates, len(read)) == (("a", "b"), 1, 5)
    assert asked == [("liuhuohuo2/pick-a-pic-v2", "test_unique", True)]
    assert set(load_prompts("pickapic-v1", 4, seed=1).prompts) == set("abcd")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=naming("pickapic-anonymous/pickapic_v1", "deradiff[align]")):
        load_prompts("pickapic-v1")
