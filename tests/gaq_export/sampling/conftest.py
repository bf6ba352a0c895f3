from pathlib import Path

import pytest

from engines import EngineFile
from gaq_export.sampling import shards
from tests.gaq_export.sampling.drawing import NUM, draw


@pytest.fixture(scope="session")
def alone(tiny_step_engine: EngineFile, tmp_path_factory) -> Path:
    """Return the folder of the shards that one worker drew."""
    out: Path = tmp_path_factory.mktemp("alone")
    made = draw(tiny_step_engine, out)
    assert made.drawn == NUM
    assert made.digest == shards.digest(out)
    return out
