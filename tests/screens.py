"""What a textual program shows, as plain text, by way of the SVG that it makes of its screen."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from textual.app import App


def screen_text(app: App) -> list[str]:
    """The lines of the screen, without spaces at their ends."""
    lines = [""] * app.size.height
    drawn = ElementTree.fromstring(app.export_screenshot())
    texts = [each for each in drawn.iter("{http://www.w3.org/2000/svg}text") if "clip-path" in each.attrib]
    for each in sorted(texts, key=lambda text: float(text.attrib["x"])):
        found = re.search(r"line-(\d+)\)", each.attrib["clip-path"])
        assert found is not None
        line, text = int(found[1]), each.text or ""
        if text.strip("\n"):
            cell = float(each.attrib["textLength"]) / len(text)
            at = round(float(each.attrib["x"]) / cell)
            lines[line] = lines[line].ljust(at) + text.replace("\xa0", " ")
    return [line.rstrip() for line in lines]
