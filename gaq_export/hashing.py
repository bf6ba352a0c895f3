"""sha256 of files, read in pieces."""

import hashlib
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hex; raise OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
