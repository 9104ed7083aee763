"""What of a prompt a pipeline's tokenizers leave out: text encoders read so many tokens, and no more.

The tokenizers are observed while the pipeline calls them, so that their limits, special tokens and templates are those
of the pipeline, whichever it is; what is drawn does not change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from threading import Lock, RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

SHOWN = 80
"""Characters of a prompt, and of what it lost, that a message shows."""


class PromptCut(UserWarning):
    """A prompt was cut."""


@dataclass(frozen=True)
class Cut:
    """What one prompt lost.

    Attributes:
        prompt: as the tokenizers were given it.
        tokenizers: the pipeline's components that cut it there.
        limit: how many tokens they keep, special ones counted.
        lost: the words behind (or before) them.
    """

    prompt: str
    tokenizers: tuple[str, ...]
    limit: int
    lost: str

    @property
    def words(self) -> str:
        """The cut as a sentence."""
        read = f"{' and '.join(self.tokenizers)} {'read' if len(self.tokenizers) > 1 else 'reads'} {self.limit} tokens"
        return f"the prompt {_short(self.prompt)!r} was cut: {read}, so {_short(self.lost)!r} is lost"

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


_heard: WeakKeyDictionary[Any, dict[tuple[str, int, str], list[str]]] = WeakKeyDictionary()
"""What was cut, by pipeline: (prompt, limit, lost) and the tokenizers that cut there."""


@contextmanager
def watched(pipe: Any, tokenizers: Mapping[str, Any] | None = None) -> Iterator[None]:
    """While this lasts, hear which prompts a pipeline's tokenizers cut; each is warned of once (`PromptCut`).

    Of anything but a pipeline, name its `tokenizers`.
    """
    known = _heard.setdefault(pipe, {})
    before = set(known)

    def hear(name: str) -> Callable[[str, int, str], None]:
        def heard(prompt: str, limit: int, lost: str) -> None:
            names = known.setdefault((prompt, limit, lost), [])
            if name not in names:
                names.append(name)

        return heard

    with ExitStack() as stack:
        for name, tokenizer in _tokenizers(pipe if tokenizers is None else tokenizers).items():
            stack.enter_context(_observed(tokenizer, hear(name)))
        yield
    for cut in cuts(pipe):
        if (cut.prompt, cut.limit, cut.lost) not in before:
            warnings.warn(cut.words, PromptCut, stacklevel=2)


@contextmanager
def taking_turns(pipe: Any) -> Iterator[None]:
    """While this lasts, uses of the pipeline's tokenizers take turns, which pipelines of other threads may share."""
    with ExitStack() as stack:
        for tokenizer in _tokenizers(pipe).values():
            stack.enter_context(_observed(tokenizer, None))
        yield


def _tokenizers(pipe: Any) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerBase

    parts = pipe if isinstance(pipe, Mapping) else getattr(pipe, "components", {})
    return {name: part for name, part in parts.items() if isinstance(part, PreTrainedTokenizerBase)}


def cuts(pipe: Any, prompts: Sequence[str | None] | None = None) -> list[Cut]:
    """The cuts heard of so far, of these prompts or of all.

    The pipeline may have changed a prompt's case, or put it into a template of its encoder's.
    """
    heard = [Cut(prompt, tuple(names), limit, lost) for (prompt, limit, lost), names in _heard.get(pipe, {}).items()]
    if prompts is None:
        return heard
    wanted = {_plain(prompt) for prompt in prompts if prompt}
    return [cut for cut in heard if _plain(cut.prompt) in wanted or _in_template(cut.prompt, wanted)]


_LISTENERS = "_deradiff_listeners"
"""The attribute of a class with those who are told of its calls, and in which thread each listens."""

_listening = Lock()


@contextmanager
def _observed(tokenizer: Any, hear: Callable[[str, int, str], None] | None) -> Iterator[None]:
    """While this lasts, `hear` is told of every text that the tokenizer cuts in this thread.

    Pipelines of several threads may share a tokenizer: whoever ends last gives it its own class back.
    """
    listener = get_ident(), hear
    with _listening:
        if _LISTENERS not in vars(type(tokenizer)):
            # Python looks special methods up in the class; a subclass passes for its own wherever a pipeline asks.
            tokenizer.__class__ = _that_tells(type(tokenizer))
        kind = type(tokenizer)
        listeners = getattr(kind, _LISTENERS)
        listeners.append(listener)
    try:
        yield
    finally:
        with _listening:
            listeners.remove(listener)
            if not listeners and type(tokenizer) is kind:
                tokenizer.__class__ = kind.__mro__[1]


def _that_tells(kind: Any) -> Any:
    """A subclass of a tokenizer's class whose calls tell the listeners of what they cut.

    Whatever encodes takes turns: a fast tokenizer keeps the padding and truncation of the present call in itself, and
    another thread's would take their place. Pipelines with textual inversion use `tokenize` as well as calls.
    """
    listeners: list[tuple[int, Callable[[str, int, str], None] | None]] = []
    turn = RLock()

    def call(self: Any, text: Any = None, *arguments: Any, **options: Any) -> Any:
        with turn:
            return in_turn(self, text, *arguments, **options)

    def in_turn(self: Any, text: Any, *arguments: Any, **options: Any) -> Any:
        hearing = [hear for thread, hear in tuple(listeners) if hear is not None and thread == get_ident()]
        limit = options.get("max_length") or self.model_max_length
        if hearing and options.get("truncation") in (True, "longest_first", "only_first"):
            special = options.get("add_special_tokens", True)
            for prompt in [text] if isinstance(text, str) else text if isinstance(text, list | tuple) else []:
                lost = _lost(kind, self, prompt, limit, special) if isinstance(prompt, str) else None
                if lost is not None:
                    for hear in hearing:
                        hear(prompt, limit, lost)
        return kind.__call__(self, text, *arguments, **options)

    def one_by_one(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def in_its_turn(*arguments: Any, **options: Any) -> Any:
            with turn:
                return method(*arguments, **options)

        return in_its_turn

    own: dict[str, Any] = {name: one_by_one(getattr(kind, name)) for name in ("encode", "tokenize")}
    own |= {"__call__": call, "__module__": kind.__module__, _LISTENERS: listeners}
    return type(kind.__name__, (kind,), own)


def _lost(kind: Any, tokenizer: Any, text: str, limit: int, special: bool) -> str | None:
    """The part of `text` beyond `limit` tokens; None where nothing is."""
    own: dict[str, Any] = {"add_special_tokens": special, "verbose": False}
    ids = kind.__call__(tokenizer, text, **own)["input_ids"]
    if len(ids) <= limit:
        return None
    left = tokenizer.truncation_side == "left"
    kept: dict[str, Any] = own | {"truncation": True, "max_length": limit}
    if tokenizer.is_fast:
        spans = kind.__call__(tokenizer, text, **kept, return_offsets_mapping=True)["offset_mapping"]
        places = [span for span in spans if span[1] > span[0]]
        if left:
            return text[: min((start for start, _ in places), default=len(text))].strip()
        return text[max((end for _, end in places), default=0) :].strip()
    count = len(ids) - len(kind.__call__(tokenizer, text, **kept)["input_ids"])
    content = kind.__call__(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]
    return str(tokenizer.decode(content[:count] if left else content[-count:])).strip()


def _in_template(text: str, prompts: Collection[str]) -> bool:
    """Whether one of `prompts` stands in `text`, if that is what an encoder that chats is given."""
    return "<|" in text and any(prompt in _plain(text) for prompt in prompts)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
