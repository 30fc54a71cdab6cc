"""Text, and the token windows that are cut from it. The only file that imports `datasets`.

A source is `builtin` (reference text inside Python's standard library), a data set of the hub by its usual short name,
or a local file. Each gives documents. Windows are cut from them in two ways:

- for calibration, documents shuffled by the seed and joined by the end-of-text token, cut one after another;
- for evaluation as GPTQ does it (github.com/IST-DASLab/gptq, datautils.py), so that perplexities compare with
  published ones.
"""

from __future__ import annotations

import random
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from aqlm_cli.errors import DataError
from aqlm_cli.mixture import SELF, share_windows
from aqlm_cli.textfiles import FILE_KINDS, read_texts

Split: TypeAlias = Literal["calibration", "evaluation"]

NO_CONNECTION_NEEDED = f"`builtin` or a local file ({', '.join(FILE_KINDS)})"

# Far above the 3 to 5 of English text, so that a shuffle has something to choose from and enough tokens come out.
CHARACTERS_PER_TOKEN = 10

GPTQ_C4_WINDOWS = 256


class TextTokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Windows:
    """Token windows for calibration, and the name of the source of each."""

    ids: Tensor  # [windows, length], int64
    sources: tuple[str, ...]


# --------------------------------------------------------------------------------------------------------- windows


def calibration_windows(
    spec: str,
    sequences: int | None,
    sequence_length: int,
    seed: int,
    tokenizer: TextTokenizer,
    sampled: Tensor | None = None,
) -> Windows:
    """Windows of every source in the order of `spec`; see `parse_sources`.

    `sequences` is the total: not needed where every source has a count, shared equally by those that have none.
    `sampled` `[windows, sequence_length]` are those of `self`; DataError where it is named and there are none.
    """
    shares = share_windows(spec, sequences)
    if sampled is None and SELF in dict(shares):
        raise DataError(f"{SELF}: only `aqlm finetune` samples text from the model; choose another source or file")
    rows, names = [], []
    for name, windows in shares:
        if name == SELF and sampled is not None:
            rows.append(sampled[:windows])
            sampled = sampled[windows:]  # each once, should `self` be named again
        else:
            texts = documents(name, "calibration", characters=windows * sequence_length * CHARACTERS_PER_TOKEN)
            rows.append(_cut(name, texts, windows, sequence_length, seed, tokenizer))
        names += [name] * windows
    return Windows(torch.cat(rows), tuple(names))


def _cut(
    name: str, texts: Iterable[str], windows: int, length: int, seed: int, tokenizer: TextTokenizer
) -> Tensor:  # [windows, length]
    end_of_text = tokenizer.eos_token_id
    if end_of_text is None:
        raise DataError("the model's tokenizer has no end-of-text token, which must stand between documents")
    shuffled = [text for text in texts if text.strip()]
    random.Random(f"{seed}/documents").shuffle(shuffled)
    tokens: list[int] = []
    for text in shuffled:
        if tokens:
            tokens.append(end_of_text)
        tokens += tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) >= windows * length:
            break
    if len(tokens) < windows * length:
        raise DataError(
            f"{name}: asked {windows} windows of {length} tokens, found {len(tokens) // length}; "
            f"lower --sequences or --sequence-length, or add another source"
        )
    return torch.tensor(tokens[: windows * length]).view(windows, length)


def evaluation_windows(name: str, sequence_length: int, tokenizer: TextTokenizer) -> Tensor:  # [windows, length]
    """GPTQ's protocol: documents joined by two newlines, tokenized once as the tokenizer does by default, cut into
    windows without overlap, the rest dropped. Hub c4 is its other protocol: 256 random windows of long documents."""
    texts = documents(name, "evaluation")
    if name == "c4":
        return _windows_of_long_documents(name, texts, sequence_length, tokenizer)
    tokens = tokenizer.encode("\n\n".join(texts), add_special_tokens=True)
    windows = len(tokens) // sequence_length
    if windows == 0:
        raise DataError(
            f"{name} has {len(tokens)} tokens, fewer than one window of {sequence_length}; lower --sequence-length"
        )
    return torch.tensor(tokens[: windows * sequence_length]).view(windows, sequence_length)


def _windows_of_long_documents(
    name: str, texts: list[str], length: int, tokenizer: TextTokenizer
) -> Tensor:  # [GPTQ_C4_WINDOWS, length]
    """Draw documents until one is longer than the window, draw its place, 256 times; Python's generator, seed 0."""
    draw = random.Random(0)
    too_short: set[int] = set()
    rows: list[list[int]] = []
    while len(rows) < GPTQ_C4_WINDOWS:
        if len(too_short) == len(texts):
            raise DataError(f"no document of {name} is longer than {length} tokens; lower --sequence-length")
        number = draw.randint(0, len(texts) - 1)
        if number in too_short:
            continue
        tokens = tokenizer.encode(texts[number], add_special_tokens=True)
        if len(tokens) <= length:
            too_short.add(number)
            continue
        start = draw.randint(0, len(tokens) - length - 1)
        rows.append(tokens[start : start + length])
    return torch.tensor(rows)


# ------------------------------------------------------------------------------------------------------- documents


def documents(name: str, split: Split, characters: int | None = None) -> list[str]:
    """The texts of one source in their own order.

    A data set that is streamed from the hub is read only until about `characters` have come. A local file has no
    splits: keeping text for calibration apart from text for evaluation is up to the user.
    """
    if name == "builtin":
        texts = _builtin(split)
    elif name in HUB:
        texts = _from_hub(name, split, characters)
    elif Path(name).exists():
        texts = read_texts(Path(name))
    else:
        raise DataError(f"there is no text source {name!r}; choose {', '.join(HUB)}, builtin, or a file")
    if not any(text.strip() for text in texts):
        raise DataError(f"{name} has no text; choose another source")
    return texts


def _builtin(split: Split) -> list[str]:
    """The language reference that `help()` shows, a document a topic; those after 4/5 of all characters evaluate.

    Not covered: the topics repeat each other in places, some 4 % of the evaluation text stands in the rest, too.
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
    """Arguments of `datasets.load_dataset`, and the share of the characters that comes from there."""

    arguments: Mapping[str, Any]
    share: float = 1.0


def _redpajama(part: str, billions: float) -> HubFiles:
    """One file of the sample, weighed by the tokens of its part in the full data set, 1,210 billion (from its card)."""
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
        # The card gives the five crawls as one; they are taken as equal.
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
        raise DataError(f"{name} has no part kept for {split}; choose another source, such as wikitext2 or builtin")
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
            room = characters if files.arguments.get("streaming") else None
            texts += _take((str(row["text"]) for row in rows), None if room is None else int(room * files.share))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{name} could not be read: {reason}; or choose {NO_CONNECTION_NEEDED}") from error
    return texts


def _answers(url: str) -> bool:
    """Asked first, and once, since `datasets` retries for half a minute where there is no connection."""
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except urllib.error.HTTPError:  # an answer, if not a friendly one
        return True
    except OSError:
        return False


def _take(texts: Iterable[str], characters: int | None) -> Iterator[str]:
    """Texts until their lengths add up to `characters`, the last one cut: one book must not outweigh all else."""
    for text in texts:
        yield text if characters is None else text[:characters]
        if characters is not None:
            characters -= len(text)
            if characters <= 0:
                return
