"""The one exception a user is meant to read, how others are told in a line, and texts of others shown."""

import unicodedata


class UserError(Exception):
    """Bad input: one line that says what was found, where, what was expected, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """What an error says, in a line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def printable(text: str) -> str:
    """A text for a terminal, signs that would move its cursor or change its colours as escapes; lines stay lines."""

    def harmless(sign: str) -> bool:  # spaces of all scripts, and what joins letters in some, are
        return sign.isprintable() or sign in "\n\u200c\u200d" or unicodedata.category(sign) == "Zs"

    return "".join(sign if harmless(sign) else repr(sign)[1:-1] for sign in text)
