"""Files that are whole or not there."""

import os
from pathlib import Path


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
