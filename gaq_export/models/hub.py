"""Fetch a model from the Hugging Face hub, or report quickly that the hub cannot be reached.

In: a repository and perhaps a commit. Out: a local folder and the commit it holds: a network's files, or those of a
pipeline with its decoder and text encoders. A cached commit is used without a request; otherwise one short request
comes first, because the client's downloads retry for half a minute before they give up.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound

from gaq_export.errors import GaqError
from gaq_export.models.diffusers_folder import PLACES
from gaq_export.models.weight_files import DIFFUSERS, TRANSFORMERS

TIMEOUT_S = 10.0  # seconds
PARTS = ("scheduler", "vae", "vqvae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def fetch(repo: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder of a hub model, after downloading what is not in the client's cache.

    Args:
        repo: Repository, "owner/name".
        revision: Commit to fetch, or None for the newest.

    Returns:
        The local folder and the full commit hash.

    Raises:
        GaqError: If the hub is out of reach, or has no such repository or commit; the nearest in the cache is
            named.
    """
    cached = _cached(repo, revision)
    if cached is not None and revision is not None:  # a commit never changes; "the newest" has to be looked up
        return cached, cached.name
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
        files = [sibling.rfilename for sibling in info.siblings or []]
        folder = snapshot_download(repo, revision=revision, allow_patterns=wanted(files), etag_timeout=TIMEOUT_S)
    # The transport library, and with it the class of a network error, changes between versions of the client.
    except Exception as error:
        if cached is not None:  # without a connection, the newest that is here
            return cached, cached.name
        at = f" at commit {revision}" if revision else ""
        raise GaqError(
            f"Cannot fetch {repo}{at} from the Hugging Face hub ({_reason(error)}).{_nearest(repo)}"
        ) from error
    return Path(folder), Path(folder).name


def papers(repo: str, revision: str | None) -> Path | None:
    """Return a folder with a hub model's card and licences; None if they cannot be fetched."""
    patterns = ["README.md", "[Ll][Ii][Cc][Ee][Nn]*", "NOTICE*", "COPYING*"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, etag_timeout=TIMEOUT_S))
    except Exception:  # a class of the transport library, as above; a pack without a card is better than none
        return None


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a folder's files to a repository, which is created if there is none, and return its address.

    Args:
        folder: What to upload.
        repo: "owner/name", or the name alone of one of the user's repositories.
        private: Whether a new repository is private; an existing one stays as it is.
        message: Message of the commit.

    Raises:
        GaqError: The hub is out of reach, or the user may not write there.
    """
    try:
        api = HfApi()
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:
        raise GaqError(
            f"Cannot push to {repo} on the Hugging Face hub ({_reason(error)}). `hf auth login` stores a token that "
            "may write."
        ) from error
    return str(created)


def download(repo: str, folder: Path, revision: str | None) -> None:
    """Fetch all files of a repository into a folder; raise GaqError if they cannot be fetched."""
    try:
        snapshot_download(repo, revision=revision, local_dir=folder, etag_timeout=TIMEOUT_S)
    except Exception as error:
        raise GaqError(f"Cannot fetch {repo} from the Hugging Face hub ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def wanted(files: Sequence[str]) -> list[str]:
    """Return those of a repository's files that are needed: configs, vocabularies, and each folder's weights once.

    >>> wanted(["unet/config.json", "unet/diffusion_pytorch_model.bin", "flax/config.json", "README.md"])
    ['unet/config.json', 'unet/diffusion_pytorch_model.bin']
    """
    chosen = []
    # Only in the folders of a PyTorch pipeline: those of other frameworks and components are left out.
    for place in (*PLACES, *PARTS):
        inside = [file for file in files if PurePosixPath(file).parent == PurePosixPath(place)]
        names = {PurePosixPath(file).name: file for file in inside}
        chosen += [file for name, file in names.items() if name.endswith((".json", ".txt"))]
        # Repositories hold the same weights in several formats, of which one is read.
        weights = DIFFUSERS.files(names) or TRANSFORMERS.files(names)
        chosen += [names[name] for name in weights if names[name] not in chosen]
    return chosen


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the cached folder if it is complete enough to load, else None."""
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    # The cache also holds folders of interrupted downloads, and those of the card alone (`papers`).
    for place in (folder / place for place in PLACES):
        names = [path.name for path in place.iterdir()] if place.is_dir() else []
        if "config.json" in names and DIFFUSERS.preferred(names):
            return True
    return False


def _nearest(repo: str) -> str:
    """Return a sentence about the newest cached commit of a repository, or of one with a similar name; else ""."""
    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError, OSError):
        return ""
    newest: dict[str, str] = {}
    for one in cached:
        whole = [r for r in one.revisions if _is_whole(r.snapshot_path)] if one.repo_type == "model" else []
        if whole:
            newest[one.repo_id] = max(whole, key=lambda revision: revision.last_modified).commit_hash
    for name in get_close_matches(repo, newest, n=1):  # its own name is nearer than any other
        what = "another commit of it" if name == repo else f"{name}"
        return f" In the cache is {what}: --weights hub:{name}@{newest[name]}."
    return ""
