"""Text files as Windows and other systems write them: byte order marks, and encodings that are not UTF-8."""

from __future__ import annotations

import codecs
from pathlib import Path

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, or of a UTF-16 file with a byte order mark, without the mark.

    Raises:
        ValueError: the file has another encoding; the message contains the line and the likely encoding. GBK and
            Latin-1 bytes are not decoded, because each is also valid text of the other.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        likely = _likely(content)
        raise ValueError(
            f"{path}:{line}: expected UTF-8, got {content[error.start : error.start + 4]!r} (likely {likely}). "
            f"Convert the file: iconv -f {likely} -t UTF-8."
        ) from None


def _likely(content: bytes) -> str:
    """Return GBK if all bytes above ASCII are pairs of its common characters, otherwise ISO-8859-1 (Latin-1)."""
    try:
        content.decode("gb2312")
    except UnicodeDecodeError:
        return "ISO-8859-1"
    return "GBK"
