"""The one exception that a command line shows as a single line."""


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to change."""
