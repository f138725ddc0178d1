"""Write a folder's ranking as one self-contained HTML file: images are embedded, names are escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tvilfm.data.images import thumbnail
from tvilfm.data.pixels import decode
from tvilfm.retrieval.found import Found, printable
from tvilfm.terms import DepthRange

HEIGHT = 224  # of an image, in pixels
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em}"
    "main,header{display:flex;flex-wrap:wrap;gap:1em}"
    "figure{margin:0;width:12em;overflow-wrap:anywhere}"
    f"img{{height:{HEIGHT}px;max-width:100%;object-fit:contain}}"
    "figcaption span{color:#555}"
)


def write_contact_sheet(
    ranking: Sequence[Found],
    folder: Path,
    path: Path,
    *,
    images: Sequence[Path] = (),
    sentence: str | None = None,
    depth_range: DepthRange = None,
) -> None:
    """Write the images of a ranking with their names, scores and shares.

    Args:
        ranking: result of `find`.
        folder: the ranked folder.
        path: the HTML file.
        images: images of the query, shown first.
        sentence: sentence of the query.
        depth_range: `data.depth_range` of the model.
    """
    query = [_figure(image, escape(printable(image.name)), depth_range) for image in images]
    if sentence:
        query.append(f"<p>{escape(sentence)}</p>")
    rows = [_figure(folder / row.path, _caption(row), depth_range) for row in ranking]
    path.write_text(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>tvilfm find</title>'
        f"<style>{_STYLE}</style>\n<h1>Query</h1>\n<header>{''.join(query)}</header>\n"
        f"<h1>Ranking</h1>\n<main>\n{chr(10).join(rows)}\n</main></html>\n",
        encoding="utf-8",
    )


def _caption(row: Found) -> str:
    shares = ", ".join(f"{escape(name)} {share:.3f}" for name, share in row.shares.items())
    return f"<b>{row.rank}</b> {escape(printable(row.path))}<br>{row.score:.4f} <span>({shares})</span>"


def _figure(image: Path, caption: str, depth_range: DepthRange) -> str:
    try:
        pixels = decode(image.read_bytes(), height=None, width=None, name=str(image), depth_range=depth_range)
        source = base64.b64encode(thumbnail(pixels, height=HEIGHT)).decode()
    except (OSError, ValueError):  # removed or changed since it was encoded
        source = ""
    return f'<figure><img alt="" src="data:image/jpeg;base64,{source}"><figcaption>{caption}</figcaption></figure>'
