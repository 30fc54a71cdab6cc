"""Errors that a user can fix.

Every class here is shown as one line that says what is wrong, where, and what to do; it ends the command with
`exit_status` and leaves nothing half published. Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

LONGEST = 4000
"""Maximum characters of a message; a longer one loses its middle."""


FOREIGN_ERRORS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError)
"""Errors that foreign code (the forward of a model in transformers) raises when it fails."""


class AqlmError(Exception):
    """Something outside this program is missing, wrong or damaged."""

    exit_status = 1

    def __str__(self) -> str:
        """One line of printable characters, also if the message quotes an untrusted file."""
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        return "".join(char if char.isprintable() else " " if char.isspace() else ascii(char)[1:-1] for char in text)


def shortened(text: str, longest: int = 80) -> str:
    """The first `longest` characters of a quotation, for use in a message."""
    return text if len(text) <= longest else f"{text[:longest]}..."


class UsageError(AqlmError):
    """A flag that cannot be read: a scheme, a number of bits, a value out of its range."""

    exit_status = 2


class ConfigError(AqlmError):
    """A run file or preset: unknown key, wrong type, settings that exclude each other."""


class ModelError(AqlmError):
    """A model that is unknown, gated, out of reach, or not a language model."""


class DataError(AqlmError):
    """Text that is missing, unreadable, out of reach, or too short for what was asked."""


class PlanError(AqlmError):
    """A selection of layers that matches nothing or leaves nothing to do."""


class ArtifactError(AqlmError):
    """A run directory or artifact that is damaged, or was made with other settings."""


class QuantizationError(AqlmError):
    """Weights or activations that no method can quantize, such as NaN."""


class StorageError(AqlmError):
    """A disk that is full, read-only, or fails while writing."""
