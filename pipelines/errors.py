"""The one error that users see: a single line, exit code 2."""


class InputError(Exception):
    """Something at the boundary is wrong: the message names what was found and what was needed."""
