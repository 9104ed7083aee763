"""How a test holds a message: by the values in it and not by its words, which may be reworded."""

import re


def naming(*values: object) -> str:
    """A pattern for `match=`: every one of these values stands in the message, whole, in whatever order and words.

    A value is whole where no letter, digit or decimal of a longer one goes on at its ends: 1 is not in 10 or in 0.1.
    """
    return "(?s)^" + "".join(f"(?=.*{_whole(str(value))})" for value in values)


def _whole(value: str) -> str:
    begins = (r"(?<!\w)" if re.match(r"\w", value) else "") + (r"(?<!\d\.)" if re.match(r"\d", value) else "")
    ends = (r"(?!\w)" if re.search(r"\w$", value) else "") + (r"(?!\.\d)" if re.search(r"\d$", value) else "")
    return begins + re.escape(value) + ends
