"""The one exception type that means "the user can put this right"."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave us: a file, a YAML key, a value, a model.

    Its message is a single line that names the file or key, what was found and what to do. The command line
    prints it to stderr without a traceback and exits with code 1.

    Attributes:
        topic: what `mergekit-neuron help` is asked for to read more; None where the line says all.
    """

    topic: str | None = None


@contextmanager
def explained_by(topic: str) -> Iterator[None]:
    """Give each UserError that leaves the block, or the function that this decorates, a topic unless it has one."""
    try:
        yield
    except UserError as error:
        error.topic = error.topic or topic
        raise
