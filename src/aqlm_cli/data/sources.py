"""Text: the documents of a source. The only file that imports `datasets`.

A source is `builtin` (reference text inside Python's standard library), a data set of the hub by its usual short name,
or a local file. sequences.py cuts them into sequences.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from aqlm_cli.data.chats import Chat, kind_of
from aqlm_cli.data.files import FILE_KINDS, Document, read_texts
from aqlm_cli.errors import DataError
from aqlm_cli.events import Emit, silent

Split: TypeAlias = Literal["calibration", "evaluation"]

NO_CONNECTION_NEEDED = f"`builtin` or a local file ({FILE_KINDS})"

# ------------------------------------------------------------------------------------------------------- documents


def documents(name: str, split: Split, characters: int | None = None, emit: Emit = silent) -> list[Document]:
    """The documents of one source in their own order.

    A data set that is streamed from the hub is read only until about `characters` have come. A local file has no
    splits: keeping text for calibration apart from text for evaluation is up to the user.
    """
    refuse_unknown(name)
    texts: Sequence[Document]
    if name == "builtin":
        texts = builtin_texts(split)
    elif name in HUB:
        texts = _from_hub(name, split, characters)
    else:
        texts = read_texts(Path(name), emit)
    if not any(isinstance(text, Chat) or text.strip() for text in texts):
        raise DataError(f"{name} has no text; choose another source")
    return list(texts)


def refuse_unknown(name: str) -> None:
    """DataError for a name that is neither that of a source nor of a file."""
    # os.path, as pathlib's raises where the name is too long, or a directory is closed to us
    if name != "builtin" and name not in HUB and not os.path.exists(name):
        raise DataError(f"unknown text source {name!r}; choose {', '.join(HUB)}, builtin, or a file that exists")


def builtin_texts(split: Split) -> list[str]:
    """Python's language reference as in `help()`, one document per topic; those after 4/5 of all characters evaluate.

    Not covered: the topics repeat each other in places; some 4 % of the evaluation text is in the rest, too.
    """
    from pydoc_data.topics import topics

    texts = [topics[key] for key in sorted(topics)]
    boundary = sum(map(len, texts)) * 4 // 5
    chosen, start = [], 0
    for text in texts:
        if (start >= boundary) == (split == "evaluation"):
            chosen.append(text)
        start += len(text)
    return chosen


# ------------------------------------------------------------------------------------------------------------- hub


@dataclass(frozen=True)
class HubFiles:
    """Arguments of `datasets.load_dataset`, and the share of the characters that it contributes."""

    arguments: Mapping[str, Any]
    share: float = 1.0


def _redpajama(part: str, billions: float) -> HubFiles:
    """One file of the sample, weighted by the tokens of its part in the full set, 1,210 billion (from its card)."""
    # Read as plain JSON: the repository's own loading script is refused by datasets >= 4.
    url = f"hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/{part}_sample.jsonl"
    return HubFiles({"path": "json", "data_files": url, "split": "train", "streaming": True}, billions / 1210)


_WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
_C4_TRAIN = "en/c4-train.00000-of-01024.json.gz"
_C4_VALIDATION = "en/c4-validation.00000-of-00008.json.gz"

HUB: Mapping[str, Mapping[Split, tuple[HubFiles, ...]]] = {
    "wikitext2": {
        "calibration": (HubFiles({**_WIKITEXT, "split": "train"}),),
        "evaluation": (HubFiles({**_WIKITEXT, "split": "test"}),),
    },
    "c4": {
        "calibration": (
            HubFiles({"path": "allenai/c4", "data_files": _C4_TRAIN, "split": "train", "streaming": True}),
        ),
        "evaluation": (HubFiles({"path": "allenai/c4", "data_files": _C4_VALIDATION, "split": "train"}),),
    },
    "redpajama": {
        # The card lists the five crawls as one; they get equal shares.
        "calibration": (
            *(_redpajama(f"cc_{crawl}", 878 / 5) for crawl in ("2019-30", "2020-05", "2021-04", "2022-05", "2023-06")),
            _redpajama("c4", 175),
            _redpajama("github", 59),
            _redpajama("arxiv", 28),
            _redpajama("book", 26),
            _redpajama("wikipedia", 24),
            _redpajama("stackexchange", 20),
        ),
    },
}


def _from_hub(name: str, split: Split, characters: int | None) -> list[str]:
    if split not in HUB[name]:
        raise DataError(f"{name} has no {split} split; choose another source, such as wikitext2 or builtin")
    import datasets

    if not (datasets.config.HF_HUB_OFFLINE or _answers(datasets.config.HF_ENDPOINT)):
        raise DataError(
            f"{name} is on {datasets.config.HF_ENDPOINT}, which does not answer; check the connection, or choose "
            f"{NO_CONNECTION_NEEDED}"
        )
    texts: list[str] = []
    for files in HUB[name][split]:
        try:
            rows = datasets.load_dataset(**files.arguments)
            limit = characters if files.arguments.get("streaming") else None
            texts += _take((_text_of(name, row) for row in rows), None if limit is None else int(limit * files.share))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{name} could not be read: {reason}; fix it or choose {NO_CONNECTION_NEEDED}") from error
    return texts


@contextmanager
def reading_hub(name: str) -> Iterator[None]:
    """Let other code read data sets of the hub: from the cache alone where the hub does not answer.

    Without this `datasets` asks for each of them again, for half a minute. Raises DataError for what cannot be read;
    `name` is what the user asked for.
    """
    import datasets
    import huggingface_hub

    bars = not datasets.are_progress_bars_disabled()
    configs: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [config.HF_HUB_OFFLINE for config in configs]
    offline = any(before) or not _answers(datasets.config.HF_ENDPOINT)
    try:
        datasets.disable_progress_bars()
        for config in configs:
            config.HF_HUB_OFFLINE = offline
        yield
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        fix = "it is not in the cache, and the hub does not answer: check the connection" if offline else "fix it"
        raise DataError(f"{name} could not be read: {reason}; {fix}") from error
    finally:
        for config, value in zip(configs, before, strict=True):
            config.HF_HUB_OFFLINE = value
        if bars:
            datasets.enable_progress_bars()


def _text_of(name: str, row: Mapping[str, Any]) -> str:
    """The text of a row; empty if it has none."""
    text = row.get("text")
    if not isinstance(text, str | None):
        raise DataError(f"{name} has {kind_of(text)} as `text`; choose {NO_CONNECTION_NEEDED}")
    return text or ""


def _answers(url: str) -> bool:
    """True if the server responds. Checked first, since `datasets` retries for half a minute without a connection."""
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except urllib.error.HTTPError:  # a response, even if an error
        return True
    except OSError:
        return False


def _take(texts: Iterable[str], characters: int | None) -> Iterator[str]:
    """Texts until their lengths add up to `characters`, the last one truncated: one book must not dominate."""
    for text in texts:
        yield text if characters is None else text[:characters]
        if characters is not None:
            characters -= len(text)
            if characters <= 0:
                return
