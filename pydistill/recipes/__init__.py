"""Whole jobs on real models, run by the command line; nothing else imports them."""


class UsageError(ValueError):
    """A request that cannot be met here; its one sentence is for the user."""
