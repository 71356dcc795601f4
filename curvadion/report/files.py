"""Files that are there whole or not at all."""

import os
from pathlib import Path


def replace_file(file: Path, content: str | bytes) -> None:
    """Write a file such that there is the old one or the new one, also if this process is killed or the
    machine stops meanwhile."""
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
