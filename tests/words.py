"""Check that text for people avoids the words of docs/writing.md: `python -m tests.words`, part of `make lint`."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
GUIDE = "docs/writing.md"
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".j2", ".html", ".toml", ".cff")


def avoided(guide: str) -> list[str]:
    """Return the words of the table's first column; a verb stands for all its forms."""
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", guide, re.MULTILINE)
    return [word.strip() for row in rows if not row.startswith(("do not", "---")) for word in row.split(",")]


def text_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and the text that people read: of Python, comments and strings."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(content.splitlines(), 1)
        return
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type in kinds:
            yield from enumerate(token.string.splitlines(), token.start[0])


def main() -> int:
    """Print every use of an avoided word; return 1 if there is one."""
    words = avoided((REPOSITORY / GUIDE).read_text(encoding="utf-8"))
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))}|mend(?:s|ed|ing))\b", re.IGNORECASE)
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, text=True, capture_output=True, check=True).stdout
    uses = [
        f"{name}:{line}: {match[0]}"
        for name in listed.splitlines()
        if name.endswith(SUFFIXES) and name not in (GUIDE, "tests/words.py")
        for line, text in text_of(REPOSITORY / name)
        if (match := pattern.search(text))
    ]
    print("\n".join(uses) or "words: none to avoid")
    return int(bool(uses))


if __name__ == "__main__":
    sys.exit(main())
