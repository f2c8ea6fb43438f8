"""The one exception that means: the user can fix this, and the message says how."""


class UserError(Exception):
    """A cause and a remedy in one line, naming the file, the field and the value. The command line exits with 2."""
