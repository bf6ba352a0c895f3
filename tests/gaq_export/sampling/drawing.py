"""Drawing a few shards with the tiny engine, for the tests of shards and workers."""

from pathlib import Path

from engines import EngineFile
from gaq_export import pipeline
from gaq_export.sampling.sample import Streamed

NUM, SHARD = 14, 3  # five files, the last of two images


def draw(engine: EngineFile, out: Path, **options: object) -> Streamed:
    return pipeline.sample_shards(engine.path, num=NUM, seed=5, batch=2, shard=SHARD, out=out, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def command_line(process: Path) -> bytes:
    """Return the command line of a process by its folder in /proc, nothing if it has ended."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # gone meanwhile
        return b""
