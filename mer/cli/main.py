"""The program `mer`: its commands, and what becomes of errors."""

from __future__ import annotations

import codecs
import io
import os
import sys
import traceback
from importlib import import_module
from typing import Final

import click

from mer.errors import MerError

# Command -> its line in `mer --help`. Command X is `X` in mer/cli/X.py, which is imported when X is run:
# help and `mer doctor` need not wait for what only others use.
COMMANDS: Final = {
    "pull": "Fetch a model from the Hugging Face hub.",
    "run": "Generate text from a prompt.",
    "chat": "Talk with a model.",
    "serve": "Serve a model over HTTP, by OpenAI's API.",
    "shard": "Hold experts of a model for engines on other machines.",
    "cluster": "Run shards and engines on the machines of a Ray cluster.",
    "top": "Show what a server does, on the terminal.",
    "monitor": "Write what a server does, line by line; --json for scripts.",
    "reload": "Have a running server serve its model anew.",
    "set": "Change a running server: the memory it keeps to.",
    "convert": "Write a model in other formats, laid out for streaming.",
    "draft": "Train a head that drafts tokens for a model.",
    "verify": "Read every weight of a model and say which are damaged.",
    "inspect": "Show what a model is and what memory it needs.",
    "doctor": "Show what this machine allows and how fast it is.",
    "bundle": "Write a support file about this machine and a server.",
    "completion": "Print what makes a shell complete mer's commands.",
}

# How Python (a thread) and the dynamic linker (a library) say that the system gave them nothing more.
_SHORTAGE: Final = ("can't start new thread", "failed to map segment", "annot allocate memory")


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"mer.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mer", message="%(prog)s %(version)s")
def cli() -> None:
    """Run Mixture-of-Experts language models that are larger than memory.

    MODEL is a directory (a Hugging Face checkpoint of safetensors, or what `mer convert` made of one), a GGUF
    file, or a name: ORG/NAME, or ORG/NAME:QUANT, of a model that `mer pull` has fetched from a hub, or demo,
    the small model that comes with mer.
    """


def main() -> None:
    """Run the command line; exits with 0, 1 (an error), 2 (wrong usage) or 130 (interrupted)."""
    _prepare_streams()
    sys.exit(_run())


def _prepare_streams() -> None:
    # Python has no stream where the shell closed it (>&-). Opened in this order each gets its number back:
    # were a file of weights number 2, what a library says on stderr would go into it.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    # Text that the terminal's encoding has not is no reason to end; a path's bytes go out as they came in.
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf_8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf_8 else "replace")


def _run() -> int:
    try:
        status = cli.main(prog_name="mer", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except MerError as error:
        return _fail(str(error))
    except BrokenPipeError:
        _forget_output()
        return 1
    except MemoryError as error:
        return _fail(f"out of memory ({error}); give a smaller --ram or close other programs")
    except (RuntimeError, ImportError) as error:
        if not any(words in str(error) for words in _SHORTAGE):
            return _fail_by_bug(error)
        return _fail(
            f"{error}: out of memory or threads; raise this process's limits (ulimit -v, ulimit -u, its "
            "control group's), give fewer --threads or a smaller --ram, or close other programs"
        )
    except OSError as error:
        where = error.filename if error.filename is not None else _full_output()
        _forget_output()
        return _fail(f"{where}{': ' * bool(where)}{error.strerror or error}")
    except Exception as error:
        return _fail_by_bug(error)


def _fail(message: str) -> int:
    if os.environ.get("MER_DEBUG") == "1":
        traceback.print_exc()
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    return 1


def _fail_by_bug(error: Exception) -> int:
    return _fail(
        f"{type(error).__name__}: {error}\nThis is a bug of mer: please report it, with the command and "
        "what MER_DEBUG=1 in the environment prints."
    )


def _full_output() -> str:
    """The name of stdout where it can't be written: what it did not take is still in its buffer."""
    try:
        sys.stdout.flush()
    except OSError:
        return "standard output"
    return ""


def _forget_output() -> None:
    """What is still in the buffer of stdout can't be written; Python must not try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
