"""The split of the calibration set: sequences that measure the Hessians, and those held out to validate block fits.

Quantization follows it, and the cost estimate counts with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from aqlm_cli.spec.quantize import QuantizeConfig


@dataclass(frozen=True)
class CalibrationSplit:
    """Sequences of each part; the measured ones come first."""

    measured: int
    held_out: int

    @property
    def total(self) -> int:
        """Sequences that go through the model; those beyond it are left out."""
        return self.measured + self.held_out


def split_sequences(section: QuantizeConfig, sequences: int) -> CalibrationSplit:
    """Split so many sequences, or none. At most a quarter is held out, and none where `fit.epochs` is 0.

    Some are held out also where the method is not fitted by default, so that methods are compared on the same ones.
    """
    held_out = (
        min(section.fit.held_out, max(1, sequences // 4), max(0, sequences - 1)) if section.fit.epochs != 0 else 0
    )
    return CalibrationSplit(min(section.statistics_sequences, sequences - held_out), held_out)
