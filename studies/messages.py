"""Messages for a terminal: one line, of printable characters, never longer than a few lines of it."""

import re

LIMIT = 300
"""Characters of an error line."""
LONGEST_WORD = 160
"""Characters of a path or value in a line that is too long."""


def one_line(words: str, limit: int = LIMIT) -> str:
    """`words` in one line of at most `limit` characters.

    White space becomes single spaces, and what cannot be printed (colours of a terminal, bytes that are no text) an escape.
    A line that is too long loses the middle of its long words, paths and values, and then its own: the beginning names what
    is wrong, the end the way out.
    """
    line = printable(words)
    if len(line) > limit:
        line = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: without_middle(word.group(), LONGEST_WORD), line)
    return without_middle(line, limit)


def printable(words: str) -> str:
    """`words` with single spaces for white space, and escapes for what cannot be printed."""
    spaced = " ".join(words.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in spaced)


def without_middle(text: str, limit: int) -> str:
    """The beginning and the end of a text that is longer than `limit`, with dots between them."""
    if len(text) <= limit:
        return text
    head = (limit - 3) * 3 // 5
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"
