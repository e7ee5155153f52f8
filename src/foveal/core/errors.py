"""Errors that a person can act on. The command line prints them in one line and exits with code 2.

A message says what came, what was expected, and what to do.
"""


class FovealError(Exception):
    """Base of every error caused by input, options, files or the machine rather than by a fault of ours."""


class UsageError(FovealError):
    """An argument or option that cannot be used."""


class DataError(FovealError):
    """Images or labels that cannot be used."""


class BackboneError(FovealError):
    """A backbone that is unknown, has the wrong weights, or lacks what a method needs."""


class BundleError(FovealError):
    """A Bundle that is missing, incomplete, edited, or of a newer format."""


class HubError(FovealError):
    """The Hugging Face Hub cannot be reached, refuses, or has nothing of that name."""


class MissingExtra(FovealError):
    """An optional library that is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {library}, which is not installed: pip install 'foveal[{extra}]'")
