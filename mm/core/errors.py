"""The one error type that is shown to a user without a traceback.

Its message says what was wrong, with the value, and what to do about it. The command line turns it into one line on
stderr and exit code 1; a script sees an ordinary ValueError.
"""

from __future__ import annotations

import json

from mm.core.nouns import with_article


class UserError(ValueError):
    """Something the caller can put right: a missing file, a bad option, a prompt the model cannot read.

    The message is one line: what does not print is escaped, and of a very long one the middle is left out. Names and
    values in it may come from files of others.
    """

    def __init__(self, message: object = "") -> None:
        """Takes the message, cleaned."""
        super().__init__(_clean(str(message)))


def _clean(text: str, most: int = 1000) -> str:
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def shown(value: object, most: int = 60) -> str:
    """A value for an error message: one line of ASCII, cut short, so that no file floods or garbles a terminal.

    Args:
        value: anything that JSON can hold; other objects are shown by their type.
        most: the longest result, in characters.

    Returns:
        The value as JSON, with "..." at the end where it was cut.
    """
    if isinstance(value, str):
        text = json.dumps(value[: most + 1])
    elif isinstance(value, dict | list | tuple) and len(value) > most:
        text = f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} values"
    elif isinstance(value, int) and value.bit_length() > 64:
        text = f"a whole number of {value.bit_length()} bits"
    else:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            text = with_article(type(value).__name__)
    return text if len(text) <= most else text[: most - 3] + "..."
