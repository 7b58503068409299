"""Whole jobs on real models, run by the command line; nothing else imports them."""


class UsageError(ValueError):
    """A request that this machine or these arguments cannot satisfy; its one sentence is for the user."""
