"""Which image a caption belongs to: keys are paths on another machine, matched by their longest common end.

LLCM's test images are stored in `test_nir/camC/ID/`, but the keys of their captions are `nir/ID/`; both are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tvilfm.datasets.readers import DATASETS

# In a key, they follow the authors' dataset root.
_TOPS = frozenset().union(*(dataset.caption_folders for dataset in DATASETS.values()))


def published_name(image: str) -> str:
    """Return the path of an image in published files, which is `nir/ID/x.jpg` for LLCM's `test_nir/camC/ID/x.jpg`."""
    top, _, rest = image.partition("/")
    if top in ("test_vis", "test_nir") and rest.startswith("cam"):
        return f"{top.removeprefix('test_')}/{rest.partition('/')[2]}"
    return image


def names_of(images: Iterable[str]) -> dict[str, str]:
    """Return a mapping from every path that a caption file may use to the image."""
    names: dict[str, str] = {}
    for image in images:
        names.setdefault(published_name(image), image)
        names[image] = image
    return names


def match(key: str, names: Mapping[str, str]) -> str | None:
    parts = key.replace("\\", "/").split("/")
    for start in range(len(parts)):
        image = names.get("/".join(parts[start:]))
        if image is not None:
            return image
    return None


def without_root(key: str) -> str:
    parts = key.replace("\\", "/").split("/")
    tops = [i for i, part in enumerate(parts[:-1]) if part in _TOPS]
    # LLCM's test folders and your own images can have a camera folder in a top folder; use the first of adjacent ones.
    while len(tops) > 1 and tops[-2] == tops[-1] - 1:
        tops.pop()
    return "/".join(parts[tops[-1] if tops else 0 :])
