"""Write what is generated of the documentation, and check every link. Run by ``make docs``.

The help of ``qz`` and the command reference come from the app itself, the picture of the rooms from the imports, and
the JSON Schemas from the types of the reports.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from rooms import picture

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference" / "commands.md"
HELP = ROOT / "cli" / "help.txt"
ARCHITECTURE = ROOT / "docs" / "explanation" / "architecture.md"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMAS = ROOT / "docs" / "reference" / "json-schema"
PICTURE = ROOT / "docs" / "explanation" / "rooms.svg"
LINK = re.compile(r"(?<!!)\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def reference() -> str:
    """The command reference in Markdown, from what Typer knows of the app."""
    from qz.cli.app import app

    group: Any = typer.main.get_command(app())
    parts = [
        "# Commands\n",
        "<!-- Written by `make docs` from the app itself. Changes belong into cli/options/ and the commands. -->\n",
        f"{first_line(group.help)}\n",
        "| command | |\n|---|---|",
        *(f"| [`qz {name}`](#qz-{name}) | {cell(first_line(c.help))} |" for name, c in group.commands.items()),
        "\nOptions of `qz` itself:\n",
        options_table(group),
    ]
    for name, command in group.commands.items():
        arguments = " ".join(p.metavar for p in command.params if p.param_type_name == "argument")
        parts += [f"\n## qz {name}\n", f"```text\nqz {name} {arguments} [OPTIONS]\n```\n", paragraphs(command.help)]
        for panel, params in panels(command).items():
            parts += [f"\n**{panel}**\n", options_table(command, params)]
    return "\n".join(parts).rstrip() + "\n"


def help_text() -> str:
    """The help of ``qz`` itself on a wide terminal, which the command shows without importing Typer."""
    from qz.cli.app import app

    group: Any = typer.main.get_command(app())
    group.rich_markup_mode = None
    os.environ["COLUMNS"] = "80"
    with group.make_context("qz", ["inspect"]) as context:
        return f"{group.get_help(context)}\n"


def panels(command: Any) -> dict[str, list[Any]]:
    """The parameters of a command under the headings that its help shows, arguments first."""
    found: dict[str, list[Any]] = {}
    for param in sorted(command.params, key=lambda p: p.param_type_name != "argument"):
        if not getattr(param, "hidden", False):
            heading = "Arguments" if param.param_type_name == "argument" else param.rich_help_panel or "Options"
            found.setdefault(heading, []).append(param)
    return found


def options_table(command: Any, params: list[Any] | None = None) -> str:
    lines = ["| option | | default |", "|---|---|---|"]
    for param in command.params if params is None else params:
        names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
        if param.param_type_name == "argument":
            names = f"`{param.metavar}`"
        elif param.metavar:
            names += f" `{param.metavar}`"
        lines.append(f"| {names} | {cell(param.help or '')} | {default(param)} |")
    return "\n".join(lines)


def default(param: Any) -> str:
    """The default as the help shows it, or nothing."""
    if isinstance(param.show_default, str):
        return f"`{param.show_default}`"
    if param.show_default is False or param.default in (None, False) or param.required:
        if param.secondary_opts and param.default is False:
            return f"`{param.secondary_opts[0]}`"
        return "required" if param.required else ""
    return f"`{param.opts[0]}`" if param.default is True else f"`{param.default}`"


def first_line(text: str | None) -> str:
    return (text or "").strip().split("\n\n")[0].replace("\n", " ")


def paragraphs(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").strip().split("\n\n"))


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


class Untitled(GenerateJsonSchema):
    """Without a title for each key, which would say its name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  as pydantic calls it
        return False


def schemas() -> dict[str, str]:
    """A JSON Schema for each command's ``--json``, the line that ends one that fails, and the record, by file name."""
    from qz.json_reports import OF_COMMANDS, ExitError, WrittenRecord

    made = {}
    for name, report in {**OF_COMMANDS, "error": ExitError, "record": WrittenRecord}.items():
        schema = {"$schema": DIALECT, **TypeAdapter(report).json_schema(schema_generator=Untitled)}
        title = "qz.json" if report is WrittenRecord else f"qz {name} --json"
        made[f"{name}.json"] = json.dumps({**schema, "title": title}, indent=2) + "\n"
    return made


def pages() -> list[Path]:
    """Every Markdown page of the repository."""
    folders = (ROOT / "docs", ROOT / "benchmarks", ROOT / "demo")
    return sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))])


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+\s+(.+?)\s*$", FENCE.sub("", text), re.MULTILINE)
    found: set[str] = set()
    for heading in headings:
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 1
        name = slug
        while name in found:
            name, number = f"{slug}-{number}", number + 1
        found.add(name)
    return found


def broken_links(page: Path) -> Iterator[str]:
    """What is wrong with the links of one page: files and headings that are not there."""
    text = page.read_text(encoding="utf-8")
    for match in LINK.finditer(FENCE.sub("", text)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            if not target.startswith(("https://", "mailto:")):
                yield f"{page.relative_to(ROOT)}: {target} is not https"
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT):
            yield f"{page.relative_to(ROOT)}: {target} does not exist"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{page.relative_to(ROOT)}: {target}: no such heading"


def main() -> None:
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    REFERENCE.write_text(reference(), encoding="utf-8")
    HELP.write_text(help_text(), encoding="ascii")
    SCHEMAS.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        (SCHEMAS / name).write_text(schema, encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")
    problems = [problem for page in pages() for problem in broken_links(page)]
    if problems:
        sys.exit("\n".join(problems))
    print(f"{REFERENCE.relative_to(ROOT)} is written; the links of {len(pages())} pages lead somewhere.")


if __name__ == "__main__":
    main()
