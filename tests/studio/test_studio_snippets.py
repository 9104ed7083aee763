"""What one copies from the studio is one command and one program, whatever a link, a picture or a person wrote."""

import ast
import re
import subprocess
import unicodedata
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from deradiff.studio import page_settings, scenes, snippets

COPIED = pytest.mark.attack("control characters in what is copied")

INVISIBLE = [chr(code) for code in (*range(0x20), 0x7F, *range(0x80, 0xA0), 0x2028, 0x2029, 0x202E, 0x2066)]

HOSTILE = [
    "a cat'; touch owned; '",
    "$(touch owned)",
    "`touch owned`",
    'a" & touch owned & "',
    "-n",
    "--out=/etc",
    "!!",
    "%s %n",
    "a cat \\",
    "'''",
    '"""',
    "{owned}",
    "\\x1b[2J",
    "a #b",
    "~root",
    "*",
    "漢字 🐈‍⬛ é",
    "x" * 2000,
]


def visible(text: str) -> bool:
    """Whether nothing in a line is a control, a line's end or half a character."""
    return not {*map(unicodedata.category, text)} & {"Cc", "Cs", "Zl", "Zp"} and chr(0x202E) not in text


def copied(prompt: str, negative: str | None = None) -> tuple[list[str], dict[str, object]]:
    """What a shell makes of the command, and Python of the program, for this prompt."""
    settings = scenes.scene("digits", ["digits:100"], prompt, [0.5], negative_prompt=negative)
    command, program = snippets.command(settings), snippets.program(settings, "cpu", "float32")
    for text in (command, *program.splitlines()):
        assert visible(text)
    shell = "deradiff() { printf '%s\\0' \"$@\"; }\n" + command
    said = subprocess.run(["sh", "-c", shell], capture_output=True, check=True)
    assert said.stderr == b""
    compile(program, "program", "exec")
    [call] = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call) and _name(node) == "pipe"]
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    given: dict[str, object] = {"prompt": ast.literal_eval(call.args[0])}
    if negative is not None:
        given["negative_prompt"] = ast.literal_eval(values["negative_prompt"])
    return said.stdout.decode().split("\0")[:-1], given


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


@COPIED
@pytest.mark.parametrize("text", HOSTILE)
def test_a_prompt_is_one_word_of_the_command_and_one_text_of_the_program(text: str) -> None:
    words, given = copied(text, text)
    assert given == {"prompt": text, "negative_prompt": text}
    for option in ("--prompt", "--negative-prompt"):
        assert (words[words.index(option) + 1] == text) if option in words else (f"{option}={text}" in words)


@COPIED
@pytest.mark.parametrize("character", INVISIBLE)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "reference", "anchor"])
def test_what_nobody_sees_is_not_copied(character: str, field: str) -> None:
    values = {"prompt": "a cat", "reference": "digits", "anchor": "digits:100", "lam": "0.5"}
    values[field] = f"a{character}b"
    link = "&".join(f"{name}={_quoted(value)}" for name, value in values.items())
    try:
        settings = scenes.read(link)
    except ValueError as error:
        assert visible(str(error))
        return
    assert field in ("prompt", "negative_prompt")
    assert "a b" in snippets.command(settings) and "a b" in snippets.program(settings, "cpu", "float32")


@COPIED
def test_half_a_character() -> None:
    with pytest.raises(ValueError, match="U\\+D800"):
        copied("a\ud800b")


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


@COPIED
def test_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    bomb = PngImagePlugin.PngInfo()
    bomb.add_text("deradiff", "[" * 100_000)
    Image.new("1", (9, 9)).save(tmp_path / "deep.png", pnginfo=bomb)
    huge = PngImagePlugin.PngInfo()
    huge.add_text("deradiff", "0" * 80_000_000, zip=True)
    Image.new("1", (9, 9)).save(tmp_path / "huge.png", pnginfo=huge)
    Image.new("1", (30_000, 30_000)).save(tmp_path / "wide.png")
    (tmp_path / "cut.png").write_bytes(page_settings.PNG + b"\0\0\0\rIHDR")
    Image.new("L", (9, 9)).save(tmp_path / "other.png", format="TIFF")
    (tmp_path / "nothing.png").write_bytes(b"")
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError, match=re.escape(file.name)) as raised:
            page_settings._in_png(file)
        assert str(tmp_path) not in str(raised.value)
