"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Bad input that the user can mend.

    The message is one line that names the thing and the remedy; jobs print it without a traceback and exit with 2.
    """
