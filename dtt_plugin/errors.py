"""The one exception that users see as a sentence instead of a traceback."""

from __future__ import annotations


class DttError(Exception):
    """Bad input. The message is one sentence: what is wrong, in which file or argument, what to do.

    The command line prints it and exits with code 2.
    """


class MissingDataError(DttError):
    """Data, or a library for it, that is not shipped and not at hand; the message says how to get it."""


class LoadAnew(DttError):
    """A loaded model can't be put under the arm that is asked for; one that is loaded for it can."""
