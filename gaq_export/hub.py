"""Fetch a model from the Hugging Face hub, or say at once that it is out of reach.

In: a repository and perhaps a commit. Out: a local folder and the commit it holds. A cached commit is used without
asking the network; otherwise one short request finds out whether the hub answers, because the client's own downloads
retry for half a minute before giving up.
"""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from gaq_export.checkpoint import PICKLE, SAFETENSORS
from gaq_export.errors import GaqError

TIMEOUT_S = 10.0
_CONFIGS = ["config.json", "scheduler_config.json"]


def fetch(repo: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder of a hub model, downloading config, scheduler config and weights if need be.

    Args:
        repo: Repository, "owner/name".
        revision: Commit to fetch, or None for the newest.

    Returns:
        The local folder and the full commit hash.

    Raises:
        GaqError: If the hub is out of reach, or has no such repository or commit.
    """
    cached = _cached(repo, revision)
    if cached is not None and revision is not None:
        return cached, cached.name
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
        files = [sibling.rfilename for sibling in info.siblings or []]
        weights = SAFETENSORS if SAFETENSORS in files else PICKLE
        folder = snapshot_download(repo, revision=revision, allow_patterns=[*_CONFIGS, weights], etag_timeout=TIMEOUT_S)
    # The transport library, and with it the class of a network error, changes between versions of the client.
    except Exception as error:
        if cached is not None:
            return cached, cached.name
        at = f" at commit {revision}" if revision else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GaqError(f"Cannot fetch {repo}{at} from the Hugging Face hub ({reason}).") from error
    return Path(folder), Path(folder).name


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the cached folder if it is complete enough to load."""
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    has_weights = any((folder / name).is_file() for name in (SAFETENSORS, PICKLE))
    return folder if has_weights and (folder / "config.json").is_file() else None
