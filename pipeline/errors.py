"""The one error of this package's callers."""


class InputError(ValueError):
    """A model, corpus or option that cannot be used. The message says what was expected, found, and what to do."""
