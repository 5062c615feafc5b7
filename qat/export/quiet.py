"""Let a library work without its progress marks, notices and warnings about itself."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Drop warnings, log records and what Python prints until the block ends; errors still rise.

    Args:
        level: The highest level of log records that are dropped.
    """
    logging.disable(level)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
