"""A module's docstring as the help of its command."""

import re


def help_of(doc: str | None) -> str:
    """Indented paragraphs are commands to copy: click must not fill them as text."""
    return re.sub(r"\n\n(?= {4})", "\n\n\b\n", doc or "")
