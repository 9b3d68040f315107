"""The one exception a user is meant to read, and others in a line of it."""


class UserError(Exception):
    """Bad input: one line that says what was found, where, what was expected, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """What an error says, in a line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
