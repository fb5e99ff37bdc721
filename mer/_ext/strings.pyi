"""Arrays of strings as GGUF files have them: of each the length in eight bytes, little-endian, then UTF-8."""

def skip(data: bytes, at: int, count: int) -> tuple[int, int]:
    """Walk over up to `count` strings from `at` on, which may be behind the end of `data`.

    Returns where the first begins that is not whole in `data`, and how many were passed.
    """

def decode(data: bytes, at: int, count: int) -> tuple[list[str], int]:
    """`count` strings from `at` on, and where they end.

    Raises IndexError where `data` ends before they do, UnicodeDecodeError.
    """
