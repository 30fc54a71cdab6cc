"""Write docs/reference/{cli,run-file,python}.md from the commands, the settings and the docstrings.

    python docs/reference/generate.py

A test compares the pages with what this would write.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

import aqlm_cli
import aqlm_kernels
from aqlm_cli.cli.app import app
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.run_file import preset_path
from aqlm_cli.spec.section import Section

HERE = Path(__file__).resolve().parent
GENERATED = "<!-- Written by docs/reference/generate.py; run `make docs-reference` after a change. -->\n\n"


def pages() -> dict[str, str]:
    """Every page by its name."""
    return {"cli.md": cli_page(), "run-file.md": run_file_page(), "python.md": python_page()}


# ------------------------------------------------------------------------------------------------------- commands


def cli_page() -> str:
    group: Any = typer.main.get_command(app)
    about = str(group.help).partition("\b")[0].strip()
    parts = [f"# Commands\n\n{GENERATED}{about}\n"]
    rows = [(f"[`aqlm {name}`](#aqlm-{name})", short_help(command)) for name, command in sorted(group.commands.items())]
    parts.append(table(("command", "does"), rows))
    parts.append(
        "Most options have no default of their own: where one is not given, the [run file](run-file.md), the preset or "
        "the default of the run file counts. `aqlm COMMAND --help` shows the same.\n"
    )
    parts += [command_section(name, command) for name, command in sorted(group.commands.items())]
    return "\n".join(parts)


def short_help(command: Any) -> str:
    return str(command.help).strip().partition("\n\n")[0].replace("\n", " ")


def command_section(name: str, command: Any) -> str:
    """One command: usage, text, example, arguments and options."""
    context = command.context_class(command, info_name=f"aqlm {name}")
    text, _, example = str(command.help).partition("\b")
    records = [(parameter, *parameter.get_help_record(context)) for parameter in command.get_params(context)]
    rows = {
        kind: [
            (f"`{without_types(words)}`", said)
            for parameter, words, said in records
            if parameter.param_type_name == kind
        ]
        for kind in ("argument", "option")
    }
    usage = " ".join(["aqlm", name, *(words.strip("`") for words, _ in rows["argument"]), "[OPTIONS]"])
    parts = [f"## aqlm {name}\n", f"```\n{usage}\n```\n", f"{inspect.cleandoc(text)}\n"]
    if example:
        lines = inspect.cleandoc(example).split("\n")[1:]
        parts.append("\n".join(["```", *(line.strip() for line in lines), "```\n"]))
    return "\n".join(parts + [table((kind, "meaning"), rows[kind]) for kind in rows if rows[kind]])


def without_types(words: str) -> str:
    """`--seed INTEGER` for `--seed <int>`, in which versions of typer differ; `MODEL` for `MODEL <str>`."""
    names = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "path": "PATH"}
    if not words.startswith("-"):
        return words.partition(" <")[0]
    return re.sub(r"<(?:list\[)?(\w+)\]?(?: range)?>", lambda match: names.get(match[1], match[1].upper()), words)


# ------------------------------------------------------------------------------------------------------- run file


def run_file_page() -> str:
    comments = comments_of(preset_path("default").read_text(encoding="utf-8"))
    introduction = (
        "A run file is YAML, one section for each stage, and names only what differs from the defaults. Flags beat the "
        "run file, which beats the preset, which beats the defaults. An unknown key is an error that names the nearest "
        "valid one.\n\n"
        "```\naqlm run FILE\naqlm quantize MODEL --config FILE\n```\n\n"
        "[`configs/default.yaml`](../../configs/default.yaml) has every setting with its default. A finished run "
        "keeps its complete settings in `run.yaml`.\n"
    )
    parts = [f"# Run file\n\n{GENERATED}{introduction}"]
    for title, section in sections(RunConfig):
        rows = settings_rows(title, section, comments)
        parts.append(f"## {title or 'Outside of all sections'}\n\n" + prose(own_doc(section)))
        parts.append(table(("key", "value", "default", "meaning"), rows))
    return "\n".join(parts)


def sections(model: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """The section itself and those inside it, by their dotted keys."""
    yield path, model
    for name, inner in model.sections().items():
        yield from sections(inner, f"{path}.{name}" if path else name)


def settings_rows(path: str, section: type[Section], comments: Mapping[str, str]) -> list[tuple[str, ...]]:
    schema = section.model_json_schema()
    rows = []
    for name, field in section.model_fields.items():
        if name not in section.sections():
            key = f"{path}.{name}" if path else name
            default = "" if field.is_required() else f"`{as_yaml(field.default)}`"
            rows.append((f"`{name}`", value_words(schema["properties"][name]), default, comments.get(key, "")))
    return rows


def value_words(schema: Mapping[str, Any]) -> str:
    """Values that a JSON schema allows, in words: "integer, at least 1, or null"."""
    if "anyOf" in schema:
        return ", or ".join(value_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return "list"
    name = {"string": "text", "boolean": "true or false"}.get(schema["type"], schema["type"])
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    return ", ".join([name, *(f"{word} {schema[key]:g}" for key, word in limits.items() if key in schema)])


def as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def comments_of(text: str) -> dict[str, str]:
    """Dotted key -> the comment behind it in a YAML file, with the lines of comment alone that follow.

    Sections that are themselves a comment, as they belong to another method than the default one, count too.
    """
    found: dict[str, str] = {}
    path: list[str] = []
    for line in re.sub(r"(?m)^  # ( *)(?=\S)", r"  \1", text).splitlines():
        key = re.match(r"( *)([a-z_0-9]+):", line)
        comment = line.partition("#")[2].strip() if "#" in line else ""
        if key:
            path[len(key[1]) // 2 :] = [key[2]]
            found[".".join(path)] = comment
        elif comment and path and line.startswith("  "):
            found[".".join(path)] += f" {comment}"
    return found


# --------------------------------------------------------------------------------------------------------- Python


def python_page() -> str:
    parts = [f"# Python\n\n{GENERATED}".rstrip("\n") + "\n"]
    for module in (aqlm_cli, aqlm_kernels):
        parts.append(f"## {module.__name__}\n\n{prose(inspect.getdoc(module) or '')}")
        parts += [name_section(name, getattr(module, name)) for name in getattr(module, "__all__", ())]
    return "\n".join(parts)


def name_section(name: str, thing: Any) -> str:
    if inspect.isclass(thing):
        members = [text for key, member in vars(thing).items() if (text := member_section(name, key, member))]
        return "\n".join([f"### {name}\n\n{prose(own_doc(thing))}", *members])
    if isinstance(thing, types.FunctionType):
        return f"### {name}\n\n```python\n{signature(name, thing)}\n```\n\n{prose(inspect.getdoc(thing) or '')}"
    return f"### {name}\n\n{prose(constant_words(thing))}"


def own_doc(thing: type) -> str:
    """The docstring of this class; not the one that dataclasses make of its fields."""
    text = inspect.cleandoc(vars(thing).get("__doc__") or "")
    return "" if text.startswith(f"{thing.__name__}(") else text


def member_section(owner: str, name: str, member: Any) -> str | None:
    """A method or property of a class, where it is public and documented."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    if name.startswith("_") or not isinstance(function, types.FunctionType) or not function.__doc__:
        return None
    head = f"#### {owner}.{name}\n\n"
    if not isinstance(member, property):
        head += f"```python\n{signature(name, function)}\n```\n\n"
    return head + prose(inspect.cleandoc(function.__doc__))


def constant_words(thing: Any) -> str:
    if isinstance(thing, Mapping):
        return f"A table with the keys {', '.join(f'`{key}`' for key in thing)}."
    if isinstance(thing, (list, tuple)):
        names = [getattr(item, "name", item) for item in thing]
        return f"A table of {', '.join(f'`{name}`' for name in names)}."
    return f"A value of the type `{type(thing).__name__}`."


def signature(name: str, function: types.FunctionType) -> str:
    """`def name(a: int) -> str`, on lines of their own where it is long."""
    whole = inspect.signature(function)
    line = unquoted(f"def {name}{whole}")
    if len(line) <= 100:
        return line
    arguments = "".join(f"    {unquoted(str(argument))},\n" for argument in whole.parameters.values())
    first = next((str(a) for a in whole.parameters.values() if a.kind is a.KEYWORD_ONLY), None)
    if first is not None:
        arguments = arguments.replace(f"    {unquoted(first)},", f"    *,\n    {unquoted(first)},", 1)
    returns = "" if whole.return_annotation is whole.empty else unquoted(f" -> {whole.return_annotation!r}")
    return f"def {name}(\n{arguments}){returns}"


def unquoted(text: str) -> str:
    """Annotations without the quotes that they have in a module of postponed annotations."""
    return re.sub(r"((?:: |-> ))'([^']*)'", r"\1\2", text)


# ------------------------------------------------------------------------------------------------------- Markdown


def prose(text: str) -> str:
    """A docstring as Markdown: code spans and indented blocks as they are, and no other character means anything."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\n(?!    )", text):
        paragraph, *code = re.split(r"(?m)(?:\A|\n\n)(?=    )", paragraph, maxsplit=1)
        if paragraph:
            spans = re.split(r"(`[^`]*`)", paragraph)
            lines += ["".join(s if s.startswith("`") else escaped(s) for s in spans), ""]
        for block in code:
            lines += ["```text", *(line[4:] for line in block.split("\n")), "```", ""]
    return "\n".join(lines).rstrip("\n") + "\n" if lines else ""


def escaped(text: str) -> str:
    return re.sub(r"([*_\[\]])", r"\\\1", text).replace("<", "&lt;")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *(tuple(map(without_bars, row)) for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def without_bars(cell: str) -> str:
    """A cell of a table; a bar inside a code span has to be written in HTML, as renderers differ on an escaped one."""
    return re.sub(r"`([^`]*\|[^`]*)`", lambda match: f"<code>{match[1].replace('|', '&#124;')}</code>", cell)


def main() -> None:
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
