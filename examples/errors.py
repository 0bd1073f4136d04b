"""The one exception that the examples show to the user without a traceback."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and the remedy."""
