"""The one error of this package that a caller can fix."""


class KernelError(Exception):
    """A matrix, a tensor or a backend that cannot serve: one line that says what, where, and what to do."""
