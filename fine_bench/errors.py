"""Errors whose message is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """What was asked cannot be done; the message says why and what to do instead.

    Commands print it and end with their status for it, without a traceback.
    """


class ConfigError(UserError, ValueError):
    """The user asked for something impossible.

    The message says what was given, what was expected and what to type instead. Raised before
    anything is trained.
    """


class DataError(UserError, RuntimeError):
    """A data file is missing, unreadable or damaged.

    The message names the file, or every place that was looked at, and says how to mend it.
    Raised before anything is trained.
    """
