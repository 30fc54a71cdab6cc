"""The sessions of README and of the quickstart run as they stand, on a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers import commands, pages, tiny_models

SMALL = """
model: tiny
threads: 1
calibrate: {data: "builtin:8", sequence_length: 32, statistics_sequences: 2}
quantize: {statistics_sequences: 8, fit: {epochs: 1, sequences: 4, held_out: 4}}
eval_ppl: {data: [notes.txt], sequence_length: 32}
bench: {tokens: 2, prompt: 4, repeats: 1}
"""

SHORT: Mapping[str, str] = {
    "smollm2-135m": "tiny",
    "builtin": "notes.txt",
    "builtin:80": "builtin:8",
    "configs/smollm2-2bit.yaml": "small.yaml",
    "--time-budget": "--steps",
    "30m": "2",
}
"""Words of a command, and what takes a second where they take minutes."""

FLAGS: Mapping[str, tuple[str, ...]] = {
    "quantize": ("--config", "small.yaml"),
    "generate": ("--tokens", "4", "--threads", "1"),
    "bench": ("--threads", "1"),
    "finetune": ("--batch", "2", "--sequence-length", "16", "--data", "builtin:24"),
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_models.save("llama", tmp_path / "tiny", num_hidden_layers=1)
    (tmp_path / "notes.txt").write_text("".join(f"{number} is {number}. " for number in range(40)))
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.mark.slow
def test_every_command_succeeds_and_shows_the_tables_of_the_page(workplace: Path) -> None:
    outputs: dict[tuple[str, ...], str] = {}  # a command that stands in both is run once
    for page in (pages.ROOT / "docs" / "quickstart.md", pages.ROOT / "README.md"):
        for session in pages.sessions(page):
            program, command, *arguments = session.arguments
            assert program == "aqlm"
            if session.arguments not in outputs:
                short = [SHORT.get(word, word) for word in arguments]
                result = commands.run(command, *short, *FLAGS.get(command, ()))
                assert result.exit_code == 0, f"{' '.join(session.arguments)}: {result.output}"
                outputs[session.arguments] = result.output
            for label in pages.labels(session.output):
                replaced = label and any(
                    word.startswith(label) for word in SHORT
                )  # a table has the model's name as title
                assert replaced or label in outputs[session.arguments], (
                    f"{page.name}: {command} does not print {label!r}"
                )


def test_readme_is_short_and_says_how_to_install() -> None:
    text = (pages.ROOT / "README.md").read_bytes()
    assert len(text) <= 8192
    for word in (b"pip install .", b"uv tool install .", b"pipx install .", b".venv/bin/aqlm"):
        assert word in text


@pytest.mark.slow
def test_the_python_of_readme_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, but for the model, the text, and settings that make it short."""
    (block,) = pages.blocks(pages.ROOT / "README.md", "python")
    assert len(block.strip().splitlines()) <= 8
    for word, short in {
        '"smollm2-135m"': '"tiny", config="small.yaml"',
        '"builtin:80"': '"builtin:8"',
        '"builtin"': '"notes.txt"',
        "max_new_tokens=20": "max_new_tokens=4",
    }.items():
        assert word in block
        block = block.replace(word, short)
    names: dict[str, object] = {}
    exec(block, names)
    ratio, text = capsys.readouterr().out.strip().split("\n", 1)
    assert 0.5 < float(ratio) < 2 and text.startswith("The capital of France is")
