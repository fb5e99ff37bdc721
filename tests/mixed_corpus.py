"""Megabytes of mixed text from what is where the tests run: code, languages, all of Unicode."""

from __future__ import annotations

import importlib.util
import random
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import babel.localedata

_PART = 20_000  # characters of a text
_OF_A_KIND = 25_000  # characters of each language
# Packages of the tests with code in languages of many kinds.
_PACKAGES = ("sphinx", "furo", "numpy", "textual", "playwright", "torch")
_CODE = (
    ".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".hpp", ".cu", ".cuh", ".cpp", ".f90", ".f", ".js", ".ts",
    ".css", ".scss", ".html", ".jinja", ".json", ".toml", ".yaml", ".md", ".sh", ".ps1", ".scm", ".sty",
    ".svg", ".csv", ".proto", ".txt",
)  # fmt: skip
_SPACES = " \t\n\r\v\f\u0085\u00a0\u1680\u2003\u2028\u2029\u202f\u3000"
_DIGITS = "0123456789٠١٢٣٤٥०१२३๐๑๒𝟘𝟙²³½¾ⅣⅫ①"
_ENDINGS = ("'s", "'S", "'t", "'RE", "'ve", "'M", "'ll", "'lL", "'D", "’s", "’ll")
_CONTROL = [
    chr(code)
    for code in (*range(32), *range(127, 160), 0xAD, 0xFEFF, 0xFFFD, 0xFFFE, 0x200B, 0x202E, 0xE0041)
]
_EMOJI = [chr(code) for code in (*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F6D0), *range(0x2600, 0x27C0))]
_JOINS = (
    "\u200d",
    "\ufe0f",
    "\u20e3",
    *map(chr, range(0x1F3FB, 0x1F400)),
    *map(chr, range(0x1F1E6, 0x1F200)),
)


def mixed_corpus() -> list[str]:
    """Texts of some 20,000 characters, the same from call to call."""
    made = [*_code(), *_languages(), *_planes(), *_runs()]
    whole = "".join(made)
    return [whole[at : at + _PART] for at in range(0, len(whole), _PART)]


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _code() -> Iterator[str]:
    roots = [Path(__file__).parents[1] / name for name in ("mer", "docs", "tests", "deploy", "protos")]
    roots.append(Path(sysconfig.get_path("stdlib")) / "json")
    for name in _PACKAGES:
        roots.append(_package(name))
    left = dict.fromkeys(_CODE, _OF_A_KIND)
    for root in roots:
        for path in sorted(root.rglob("*.*")):
            if left.get(path.suffix, 0) > 0 and path.is_file():
                text = path.read_text(errors="replace")[: min(_PART, left[path.suffix])]
                left[path.suffix] -= len(text)
                yield text


def _languages() -> Iterator[str]:
    """Sphinx's messages as translated, and what babel has to say in every language."""
    for path in sorted(_package("sphinx").glob("locale/*/LC_MESSAGES/sphinx.po")):
        yield path.read_text()[-5_000:]
    for name in babel.localedata.locale_identifiers():
        if "_" not in name:
            yield "; ".join(_strings(babel.localedata.load(name, merge_inherited=False)))[:1500] + "\n"


def _strings(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for value in data.values():
            yield from _strings(value)


def _planes() -> Iterator[str]:
    """Every character, in order and in none with neighbours; of ideographs and of what is unassigned some."""
    rng = random.Random(1)
    characters: list[str] = []
    for code in range(0x110000):
        kind = unicodedata.category(chr(code))
        if kind == "Cs" or (kind in ("Cn", "Co") and code % 997):
            continue
        name = unicodedata.name(chr(code), "")
        if name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT", "EGYPTIAN")) and code % 5:
            continue
        characters.append(chr(code))
    yield "".join(characters)
    rng.shuffle(characters)
    yield "".join(each + rng.choice(("", "", " ", "\n", "\u0301", "e", "Bb", "1")) for each in characters)


def _runs() -> Iterator[str]:
    """What the patterns are about: spaces, digits, contractions, cases, punctuation, emoji of parts."""
    rng = random.Random(2)
    pools = [
        _SPACES, " ", "\n", _DIGITS, "0123456789", "abcxyzÄÖüßéñ", "ABCXYZÄÖÜÉǅ",
        "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "。，、！？「」…—“”«»", "多专家模型日本語かなカナ한국어",
        "नमस्ते किताब สวัสดี ភាសា বাংলা", "مرحبا עברית فارسی", _CONTROL, _EMOJI, _JOINS, _ENDINGS,
    ]  # fmt: skip
    for _ in range(50_000):
        yield "".join(rng.choices(rng.choice(pools), k=rng.choice((1, 1, 2, 3, 4, 7, 20))))
