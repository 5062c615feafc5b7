"""The one exception family: everything a user can cause is a ``QatError``.

A message is one sentence with four facts: what was expected, what came, where, and what to do.
What only a programmer can cause is an ``assert``.
"""


class QatError(Exception):
    """Base of every error that a user can cause; the command line prints it without a traceback."""


class SpecError(QatError):
    """A number format, rule or scheme that contradicts itself."""


class ConfigError(QatError):
    """A recipe, key or value on the command line that does not exist or does not fit."""


class DataError(QatError):
    """A data set that is missing, empty, malformed or does not fit the model."""


class CheckpointError(QatError):
    """A checkpoint that is missing, unreadable, unsafe or made for another model."""


class GraphError(QatError):
    """A model that cannot be traced, planned or quantized."""


class CalibrationError(QatError):
    """A site that saw no data, or no finite data."""


class TrainingError(QatError):
    """A run that cannot go on: a loss that is not finite, a folder that cannot be written."""


class ExportError(QatError):
    """A converted model that has no form in the requested file."""


class VerificationError(QatError):
    """An exported file that does not predict what training predicted."""


def printable(text: object, limit: int = 200) -> str:
    """Return a text of unknown origin as one line: escapes for what a terminal would act on.

    Args:
        text: A name or a message of another library.
        limit: Most characters; the end of a longer one is left out.
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return line if len(line) <= limit else f"{line[:limit]}..."


def reason(error: BaseException) -> str:
    """Return what an error says, in one printable line, with its class where it is not ours."""
    text = printable(" ".join(str(error).split()), 300)
    return text if isinstance(error, QatError) else f"{type(error).__name__} ({text})"
