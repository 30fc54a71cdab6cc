"""Treatment of a layer: the method that quantizes it, and the scheme that it is stored in."""

from __future__ import annotations

from dataclasses import dataclass

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.methods import METHODS, known_methods
from aqlm_cli.spec.schemes import RefinedScheme, Scheme, parse_scheme


@dataclass(frozen=True)
class Treatment:
    """A method and a scheme of one of its families; prints as the word that it is parsed from, `aqlm:2x8g8`."""

    method: str
    scheme: Scheme

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"there is no method {self.method!r}; choose {known_methods()}")
        method = METHODS[self.method]
        if self.scheme.kind not in method.families:
            wanted = f"{' or '.join(method.families)} schemes such as {method.scheme}"
            raise UsageError(f"method {self.method} takes {wanted}, not {self.scheme}")
        if method.refuses is not None and (reason := method.refuses(self.scheme)) is not None:
            raise UsageError(f"method {self.method} does not take {self.scheme}: {reason}")

    def __str__(self) -> str:
        return f"{self.method}:{self.scheme}"

    @property
    def finer(self) -> Treatment | None:
        """The treatment that this one is with coarser codebooks; None for any other."""
        return None if self.scheme.finer is None else Treatment(self.method, self.scheme.finer)

    @property
    def base(self) -> Treatment | None:
        """The treatment of the base of a refined scheme; None for any other."""
        if not isinstance(self.scheme, RefinedScheme):
            return None
        return Treatment(method_for(self.scheme.base, self.method), self.scheme.base)


def parse_treatment(text: str, preferred: str | None = None) -> Treatment:
    """The treatment of `METHOD:SCHEME`, or of a scheme alone: by `preferred`, or by the first method that takes it.

    Raises UsageError for an unknown method or scheme, and for a scheme that the method does not take.
    """
    method, colon, word = text.rpartition(":")
    scheme = parse_scheme(word)
    if colon:
        return Treatment(method, scheme)
    return Treatment(method_for(scheme, preferred), scheme)


def method_for(scheme: Scheme, preferred: str | None = None) -> str:
    """`preferred` where it takes the scheme, else the first method of the table that does."""
    taking = [
        name
        for name, method in METHODS.items()
        if scheme.kind in method.families and (method.refuses is None or method.refuses(scheme) is None)
    ]
    return preferred if preferred in taking else taking[0]
