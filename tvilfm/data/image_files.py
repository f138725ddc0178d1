"""Which files are images, and where they are: one list of suffixes and one walk for every reader and command.

Files that operating systems and network disks write (`._a.jpg`, `Thumbs.db`) are ignored. Symbolic links are followed,
and each real file is listed once, under its real path if the folder contains it. A link to a folder above itself is a
loop and is not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from tvilfm.place import Place

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # in any case
_SYSTEM_NAMES = frozenset(["thumbs.db", "desktop.ini", ".ds_store", "__macosx", "@eadir"])


def is_system(name: str) -> bool:
    """Return whether an operating system or a network disk wrote a file or folder of this name."""
    return name.startswith("._") or name.lower() in _SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Return whether a file of this name is read as an image."""
    return name.lower().endswith(SUFFIXES)


def list_files(folder: Place | Path) -> list[str]:
    """Return the sorted paths of all files below a folder, relative to it, without system files.

    Args:
        folder: folder on a disk or in an object store; a missing one has no files.
    """
    place = folder if isinstance(folder, Place) else Place(str(folder))
    if not place.is_local:
        return sorted(_stored_files(place))
    root = place.path
    return sorted(path.removeprefix(root).lstrip("/") for path in _real_files(root))


def list_images(folder: Place | Path) -> list[str]:
    """Return those of `list_files` that are images."""
    return [name for name in list_files(folder) if is_image(name)]


def images_in(folder: Path) -> list[Path]:
    """Return the images directly in a folder, sorted by name, each real file once."""
    paths = [path for path in sorted(folder.iterdir()) if is_image(path.name) and not is_system(path.name)]
    first: dict[str, Path] = {}
    for path in sorted(paths, key=Path.is_symlink):  # files before links
        first.setdefault(os.path.realpath(path) if path.is_symlink() else os.path.abspath(path), path)
    return sorted(first.values())


def require_text_names(where: object, names: Iterable[str]) -> None:
    """Check that names can be stored as text. Archives from other systems leave names that are not UTF-8.

    Raises:
        ValueError: a name is not UTF-8; the message contains it with escaped bytes.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            raise ValueError(
                f"{where}: expected file names in UTF-8, got '{shown}' (often Latin-1). Rename the file, for example "
                "with `convmv -f latin1 -t utf8 --notest -r` on the folder."
            ) from None


def patterns(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by pattern: `visible/7/1/a.jpg` has the pattern `visible/*/*/*.jpg`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        *folders, file = name.split("/")
        parts = [*folders[:1], *("*" for _ in folders[1:]), f"*{PurePosixPath(file).suffix.lower()}"]
        groups.setdefault("/".join(parts), []).append(name)
    return groups


def _stored_files(place: Place) -> Iterator[str]:
    from pyarrow import fs

    folders = [place.path]
    while folders:
        for info in place.filesystem.get_file_info(fs.FileSelector(folders.pop(), allow_not_found=True)):
            if is_system(info.base_name):
                continue
            if info.type == fs.FileType.Directory:
                folders.append(info.path)
            else:
                yield info.path.removeprefix(f"{place.path}/")


def _real_files(root: str) -> Iterator[str]:
    """Yield one path per real file. Links are followed after everything else, so real paths come first."""
    folders = [root] if os.path.isdir(root) else []
    folder_links: list[str] = []
    file_links: list[str] = []
    seen_folders: set[str] = set()
    seen_files: set[str] = set()
    while folders or folder_links:
        linked = not folders
        folder = folder_links.pop(0) if linked else folders.pop()
        real = os.path.realpath(folder)
        if real in seen_folders or (linked and _is_above(real, folder)):
            continue
        seen_folders.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system(entry.name):
                    continue
                if _is_folder(entry):
                    (folder_links if entry.is_symlink() else folders).append(entry.path)
                elif entry.is_symlink():
                    file_links.append(entry.path)
                elif (file := f"{real}/{entry.name}") not in seen_files:
                    seen_files.add(file)
                    yield entry.path
        folder_links.sort()
    for link in sorted(file_links):
        if (file := os.path.realpath(link)) not in seen_files:
            seen_files.add(file)
            yield link


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that point at each other
        return False


def _is_above(folder: str, link: str) -> bool:
    """Return whether a link to this folder is a loop: the folder contains the link."""
    return os.path.commonpath([folder, os.path.realpath(os.path.dirname(link))]) == folder
