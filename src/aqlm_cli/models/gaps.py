"""Tensors that a model's files lack for the network of its config.json, as transformers reports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def why_unfit(report: Mapping[str, Any], name_of: Callable[[str], str] = str) -> str | None:
    """Reason why tensors with a wrong shape, or missing ones, make the files unusable; None if every one fits.

    `report` is the loading info of transformers; `name_of` gives the name in the files of a parameter.
    """
    missing = sorted(report["missing_keys"])
    mismatched = sorted((key, list(shape), list(wanted)) for key, shape, wanted in report["mismatched_keys"])
    if mismatched:
        key, shape, wanted = mismatched[0]
        more = f" (and {len(mismatched) - 1} more differ)" if len(mismatched) > 1 else ""
        fault = f"has {name_of(key)} of the shape {shape}, and its config.json asks for {wanted}{more}"
    elif missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        fault = f"lacks the tensor {missing[0]}{more}, which its config.json asks for"
        if report["unexpected_keys"]:
            fault += f", and has {min(report['unexpected_keys'])}, which transformers does not use"
    else:
        return None
    return f"{fault}; fetch the model again"
