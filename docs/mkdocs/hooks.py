"""What of the site isn't in docs/: the benchmarks' results, which pages link to, and what `fastddpm COMMAND --help` prints."""

from pathlib import Path

import click
from mkdocs.structure.files import File

from fastddpm.cli import cli

RESULTS = "benchmarks/results"
HELP = "<!-- help -->"


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for path in sorted((root / RESULTS).iterdir()):
        files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown, **_):
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/").replace(HELP, "\n\n".join(helps()))


def helps():
    with click.Context(cli, info_name="fastddpm", terminal_width=100, **cli.context_settings) as fastddpm:
        for name, command in cli.commands.items():
            with click.Context(command, fastddpm, info_name=name) as context:
                yield f"## fastddpm {name}\n\n```text\n{command.get_help(context)}\n```"
