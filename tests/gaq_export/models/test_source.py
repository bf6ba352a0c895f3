from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaq_export.errors import GaqError
from gaq_export.models.source import BUNDLED, MODULE, ORIGINAL, PACK, SourceKind, WeightSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WRITTEN = {  # what records say, byte for byte
    "bundled": BUNDLED,
    "random": WeightSource.random(0),
    "random:7": WeightSource.random(7),
    "hub:google/ddpm-church-256": WeightSource.hub("google/ddpm-church-256"),
    f"hub:google/ddpm-church-256@{COMMIT}": WeightSource.hub("google/ddpm-church-256", COMMIT),
    "module": MODULE,
    "original": ORIGINAL,
    "pack": PACK,
    "/models/digits": WeightSource.at(Path("/models/digits")),
    "/models/sd-v1-4.ckpt": WeightSource.at(Path("/models/sd-v1-4.ckpt")),
}
NAMES = st.text(st.characters(categories=["L", "N"], include_characters="-_."), min_size=1)


@pytest.mark.parametrize("text", WRITTEN)
def test_the_text_of_a_record_is_read_and_written_again_byte_for_byte(text: str) -> None:
    assert WeightSource.parse(text) == WRITTEN[text]
    assert str(WRITTEN[text]) == text


def sources() -> st.SearchStrategy[WeightSource]:
    """Return a strategy for all sources there are."""
    commits = st.none() | st.text("0123456789abcdef", min_size=40, max_size=40)
    hub = st.builds(WeightSource.hub, st.tuples(NAMES, NAMES).map("/".join), commits)
    seeds = st.builds(WeightSource.random, st.integers(0, 2**63 - 1))
    paths = st.builds(WeightSource.at, st.lists(NAMES, max_size=4).map(lambda parts: Path("/", *parts)))
    return st.one_of(st.sampled_from([BUNDLED, MODULE, ORIGINAL, PACK]), seeds, hub, paths)


@given(sources())
def test_reading_undoes_writing(source: WeightSource) -> None:
    assert WeightSource.parse(str(source)) == source


@pytest.mark.parametrize("text", ["bundled.d", "./bundled", "hub", "modules/a", "path", "randomly", r"C:\models\a"])
def test_what_only_looks_like_another_kind_is_a_path(text: str) -> None:
    assert WeightSource.parse(text) == WeightSource.at(Path(text))


@pytest.mark.parametrize("seed", ["x", "-1", "1.5"])
def test_a_seed_that_is_no_whole_number_is_refused(seed: str) -> None:
    with pytest.raises(GaqError, match=rf"--weights random:{seed} must be a whole number, as in random:7"):
        WeightSource.parse(f"random:{seed}")


@pytest.mark.parametrize("seed", [str(2**63), "9" * 5000])
def test_a_seed_that_no_generator_takes_is_refused(seed: str) -> None:
    with pytest.raises(
        GaqError, match=r"^The seed in --weights random:[0-9]{1,53} must be 9223372036854775807 at most\.$"
    ):
        WeightSource.parse(f"random:{seed}")


def test_only_what_the_caller_alone_has_is_not_public() -> None:
    private = {source.kind for source in WRITTEN.values() if not source.public}
    assert private == {SourceKind.MODULE, SourceKind.ORIGINAL, SourceKind.PACK, SourceKind.PATH}
