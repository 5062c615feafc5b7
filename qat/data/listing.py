"""The image files of a folder with one sub-folder for each class, in ImageFolder's order.

Only the listing of folders says what a file is: nothing is opened, and no file is asked for by
itself, which would take minutes for millions of them on a network.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from qat.errors import DataError, printable
from qat.files import kind

Folders = dict[tuple[int, int], str]


def list_folder(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """List the classes and files of a folder; classes that begin with a dot are left out.

    Args:
        folder: A folder with one sub-folder of images for each class.

    Returns:
        The classes in alphabetical order, and file and class number of each image.

    Raises:
        DataError: If there is no such folder, no class in it, a class without images, a pipe with
            the name of an image, or a folder that links lead to twice.
    """
    if (what := kind(folder)) != "a folder":
        raise DataError(
            f"expected {printable(folder)} to hold one sub-folder of images for each class, got: "
            f"{what}; correct data.root or fill the folder."
        )
    folders = [entry.name for entry in _scan(folder) if _kind(entry) == "a folder"]
    classes = sorted(name for name in folders if not name.startswith("."))
    seen: Folders = {}
    samples: list[tuple[str, int]] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        files = [file for _, part in sorted(_walk(folder / name, seen)) for file in sorted(part)]
        samples += [(file, label) for file in files]
        empty += [name] * (not files)
    if empty or not classes:
        shown = ", ".join(printable(name, 40) for name in empty[:5]) or "there is none"
        raise DataError(
            f"expected {printable(folder)} to hold one sub-folder of images for each class, but "
            f"without images ({', '.join(IMG_EXTENSIONS)}): {shown}; correct data.root or fill "
            "the folder."
        )
    return classes, samples


def _walk(folder: Path, seen: Folders) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below one, and itself, with the paths of the images in it."""
    waiting = [str(folder)]
    while waiting:
        path = waiting.pop()
        _refuse_second_visit(path, seen)
        entries = _scan(path)
        waiting += [entry.path for entry in entries if _kind(entry) == "a folder"]
        yield path, [entry.path for entry in entries if _is_image(entry)]


def _refuse_second_visit(path: str, seen: Folders) -> None:
    """Remember a folder; links that go round in a circle would never end."""
    status = Path(path).stat()
    first = seen.setdefault((status.st_dev, status.st_ino), path)
    if first != path:
        raise DataError(
            f"expected each folder of images once, got '{printable(path)}', which links lead to "
            f"'{printable(first)}' again; remove the link."
        )


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether an entry has the name of an image and is a file."""
    if not entry.name.lower().endswith(IMG_EXTENSIONS) or (what := _kind(entry)) == "a folder":
        return False
    if what != "a file":
        raise DataError(
            f"expected an image file at '{printable(entry.path)}', got: {what}; remove it."
        )
    return True


def _kind(entry: os.DirEntry[str]) -> str:
    """Return what :func:`~qat.files.kind` does, without asking for plain files and folders."""
    if entry.is_file(follow_symlinks=False):
        return "a file"
    return "a folder" if entry.is_dir(follow_symlinks=False) else kind(entry.path)


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"expected a folder that can be read at '{printable(folder)}', got {error.strerror}: "
            "correct its rights or remove it."
        ) from error
