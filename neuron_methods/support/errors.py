"""The one exception type that means "the user can put this right"."""


class UserError(Exception):
    """A mistake in what the user gave us: a file, a YAML key, a value, a model.

    Its message is a single line that names the file or key, what was found and what to do. The command line
    prints it to stderr without a traceback and exits with code 1.
    """
