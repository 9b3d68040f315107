"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: one line that says what was found, where, what was expected, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
