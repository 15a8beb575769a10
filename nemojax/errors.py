"""The one error type that means "your input is wrong", as opposed to "nemojax is wrong"."""


class InputError(ValueError):
    """A file, tensor or argument that the caller gave cannot be used.

    The message is one line: it names the file, tensor or argument, the numbers that clash, and what to do.
    The command line prints it and exits with code 2, without a traceback.
    """
