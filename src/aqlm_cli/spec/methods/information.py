"""Settings of the method `information`."""

from __future__ import annotations

from aqlm_cli.spec.schemes import LevelScheme, Scheme
from aqlm_cli.spec.section import Distance, Positive, Section


class InformationSettings(Section):
    """Levels whose shift makes the most even use of the codes.

    `shifts` are tried, from the median of a group less `reach` times its largest distance from there to as much more.
    """

    shifts: Positive = 201
    reach: Distance = 0.1 / 1.848


def refuses(scheme: Scheme) -> str | None:
    """Return the reason why the method does not take a scheme of its families, or None."""
    if isinstance(scheme, LevelScheme) and not scheme.shifted:
        return "it chooses shifts, which the scheme does not store; write t before the group, such as nf4tg64"
    return None
