"""`mer completion SHELL`: what a shell needs to complete commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from mer.cli.main import cli


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that makes SHELL complete mer's commands and options.

    \b
    bash:  mer completion bash > ~/.local/share/bash-completion/completions/mer
    zsh:   mer completion zsh > a file _mer in a directory of $fpath
    fish:  mer completion fish > ~/.config/fish/completions/mer.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "mer", "_MER_COMPLETE").source())
