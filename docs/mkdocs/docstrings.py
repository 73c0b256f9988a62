"""Docstrings as Markdown. They say `name: what it is` of arguments and attributes, one after the other in plain lines, which
Markdown would run together: here each becomes an item of a list, and what is indented becomes code."""

import re
import textwrap

import griffe


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            parts = re.split(r"\n\n+", obj.docstring.value)
            obj.docstring.value = "\n\n".join(as_markdown(part, described_in(obj)) for part in parts)


def described_in(obj: griffe.Object) -> set[str]:
    """What its docstring may describe: a function's arguments; a class's attributes, and the arguments that make one."""
    if obj.is_class:
        init = obj.members.get("__init__")
        return {*obj.attributes, *(described_in(init) if init else ())}
    return {parameter.name for parameter in obj.parameters} if obj.is_function else set()


def as_markdown(paragraph: str, names: set[str]) -> str:
    """Where a line begins with some of `names` and a colon, each such line or sentence becomes an item."""
    if paragraph.startswith("    "):
        return f"```\n{textwrap.dedent(paragraph)}\n```"
    paragraph = re.sub(r"(`[^`]*`)|\*", lambda part: part[1] or r"\*", paragraph)  # a product, and never an emphasis
    name = "|".join(sorted(names)) or "(?!)"
    item = rf"((?:{name})(?:, (?:{name}))*):(?=\s)"
    if not re.search(rf"^{item}", paragraph, re.MULTILINE):
        return paragraph
    text = re.sub(rf"(?:(?:^|\n) *|(?<=\.) |; ){item}", r"\n- **\1**:", paragraph)
    text = re.sub(r"\n +", "\n", text).replace("\n-", "\n\n-", 1)
    return re.sub(r"\s(?=Raises [A-Z])", "\n\n", text).strip()
