"""Errors whose message is meant for the person at the keyboard."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user asked for something impossible.

    The message says what was given, what was expected and what to type instead. Raised before
    anything is trained.
    """


class DataError(RuntimeError):
    """A data file is missing, unreadable or damaged.

    The message names the file, or every place that was looked at, and says how to mend it.
    Raised before anything is trained.
    """
