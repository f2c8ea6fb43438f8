"""Files and folders that are whole or not there."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from mspt.errors import UserError


def write(path, data):
    """Write bytes or text beside path, flush them to the disk, then rename: path never holds a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


@contextmanager
def new_folder(path):
    """Yield a folder beside path to write into; when that went well it is flushed to the disk and renamed.

    Raises UserError where path is there already.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: is there already; remove it or choose another name")
    aside = path.with_name(f".{path.name}.partial")
    if aside.exists():  # left by a killed process
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in filter(Path.is_file, aside.rglob("*")):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside)
        raise
