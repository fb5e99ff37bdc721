"""Writes the manual pages: python tools/man.py DIR. They are made of what `--help` says, by click-man."""

import sys
from importlib.metadata import version
from pathlib import Path

import click
from click_man.core import write_man_pages

from mer.cli.main import COMMANDS, cli

if len(sys.argv) != 2:
    sys.exit(f"usage: {sys.argv[0]} DIR")
Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
context = click.Context(cli)
# click-man looks for commands where `mer` has none before one is asked for.
commands = {name: cli.get_command(context, name) for name in COMMANDS}
for name, line in COMMANDS.items():
    commands[name].short_help = line
whole = click.Group("mer", commands, help=cli.help)
write_man_pages("mer", whole, version=version("mer"), target_dir=sys.argv[1])
