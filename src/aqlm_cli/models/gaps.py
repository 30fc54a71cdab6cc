"""What the files of a model lack of the network that its config.json asks for, as transformers reports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def why_unfit(report: Mapping[str, Any], name_of: Callable[[str], str] = str) -> str | None:
    """What to say of tensors that are of another shape, or not there at all; None where every one fits.

    `report` is the loading info of transformers, and `name_of` how the files call a parameter of the network.
    """
    missing = sorted(report["missing_keys"])
    mismatched = sorted((key, list(found), list(wanted)) for key, found, wanted in report["mismatched_keys"])
    if mismatched:
        key, found, wanted = mismatched[0]
        more = f" (and {len(mismatched) - 1} more differ)" if len(mismatched) > 1 else ""
        fault = f"has {name_of(key)} of the shape {found}, and its config.json asks for {wanted}{more}"
    elif missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        fault = f"lacks the tensor {missing[0]}{more}, which its config.json asks for"
        if report["unexpected_keys"]:
            fault += f", and has {min(report['unexpected_keys'])}, which transformers has no place for"
    else:
        return None
    return f"{fault}; fetch the model again"
