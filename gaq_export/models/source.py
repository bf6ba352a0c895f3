"""Where to get a network's weights again, as one short text that plans, engines and packs record.

    bundled               beside the program, under the model's name
    random, random:7      drawn with seed 0, or 7
    hub:OWNER/NAME@COMMIT the Hugging Face hub; without "@COMMIT" the newest commit
    module                the caller's own module, which only the caller has
    original              the authors' own checkpoint, which the user has to fetch
    pack                  the folder that holds the record itself
    anything else         the path of a folder or a checkpoint

In: such a text, as the user or a record gives it. Out: a `WeightSource`, whose `str` is that text again. Records hold
the text and not the fields, because a user can pass that text to `--weights`.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from calib.config import LARGEST_SEED
from gaq_export.errors import GaqError


class SourceKind(StrEnum):
    """How to get the weights; except for PATH, the value is the first word of the text."""

    BUNDLED = "bundled"
    RANDOM = "random"
    HUB = "hub"
    MODULE = "module"
    ORIGINAL = "original"
    PACK = "pack"
    PATH = "path"


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where to get weights again; made by `parse`, `random`, `hub` or `at`, or one of the constants below.

    Attributes:
        kind: How to get them.
        seed: For RANDOM, the seed of the weights.
        repository: For HUB, "owner/name".
        commit: For HUB; None for the newest.
        path: For PATH, a folder or a checkpoint.
    """

    kind: SourceKind
    seed: int = 0
    repository: str = ""
    commit: str | None = None
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` of a source gives.

        Raises:
            GaqError: If the seed of random weights is no whole number.
        """
        word, colon, rest = text.partition(":")  # a path may hold a colon too, so only two words are special
        if word == SourceKind.RANDOM:
            if rest and not rest.isdecimal():
                raise GaqError(f"The seed in --weights {text} must be a whole number, as in random:7.")
            if len(rest) > 19 or int(rest or 0) > LARGEST_SEED:
                raise GaqError(f"The seed in --weights {text[:60]} must be {LARGEST_SEED} at most.")
            return cls.random(int(rest or 0))
        if word == SourceKind.HUB and colon:  # "hub" alone is a folder of that name
            repository, _, commit = rest.partition("@")
            return cls.hub(repository, commit or None)
        return cls(kind=SourceKind(text)) if text in _BARE else cls.at(Path(text))

    @classmethod
    def random(cls, seed: int) -> Self:
        """Return the source of weights drawn with `seed`."""
        return cls(kind=SourceKind.RANDOM, seed=seed)

    @classmethod
    def hub(cls, repository: str, commit: str | None = None) -> Self:
        """Return a repository "owner/name" of the Hugging Face hub at a commit, or its newest."""
        return cls(kind=SourceKind.HUB, repository=repository, commit=commit)

    @classmethod
    def at(cls, path: Path) -> Self:
        """Return the source of weights in a folder or a checkpoint."""
        return cls(kind=SourceKind.PATH, path=path)

    def __str__(self) -> str:
        match self.kind:
            case SourceKind.RANDOM:
                # Seed 0 is left out: one source has one text, so records can be compared.
                return f"random:{self.seed}" if self.seed else "random"
            case SourceKind.HUB:
                return f"hub:{self.repository}@{self.commit}" if self.commit else f"hub:{self.repository}"
            case SourceKind.PATH:
                return str(self.path)
            case _:
                return self.kind.value

    @property
    def public(self) -> bool:
        """Whether anyone can get the weights from this alone, without a file of the user's."""
        return self.kind in (SourceKind.BUNDLED, SourceKind.RANDOM, SourceKind.HUB)


_BARE = (SourceKind.BUNDLED, SourceKind.MODULE, SourceKind.ORIGINAL, SourceKind.PACK)
BUNDLED, MODULE, ORIGINAL, PACK = (WeightSource(kind=kind) for kind in _BARE)
