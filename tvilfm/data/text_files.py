"""Text files as Windows and other systems write them: byte order marks, and encodings that are not UTF-8."""

from __future__ import annotations

import codecs
from pathlib import Path

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: Path) -> str:
    """Return the text of a file; see `decode_text`."""
    return decode_text(path.read_bytes(), str(path))


def decode_text(content: bytes, name: str) -> str:
    """Return the text of UTF-8, or of UTF-16 with a byte order mark, without the mark.

    Args:
        content: bytes of a file.
        name: path of the file, for the message.

    Raises:
        ValueError: the file has another encoding; the message contains the line and the likely encoding. GBK and
            Latin-1 bytes are not decoded, because each is also valid text of the other.
    """
    encoding = next((known for mark, known in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        likely = _likely(content)
        raise ValueError(
            f"{name}:{line}: expected UTF-8, got {content[error.start : error.start + 4]!r} (likely {likely}). "
            f"Convert the file: iconv -f {likely} -t UTF-8."
        ) from None


def _likely(content: bytes) -> str:
    """Return GBK if all bytes above ASCII are pairs of its common characters, otherwise ISO-8859-1 (Latin-1)."""
    try:
        content.decode("gb2312")
    except UnicodeDecodeError:
        return "ISO-8859-1"
    return "GBK"
