"""Reach a Ray cluster, or start one on this machine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gaq_export.errors import GaqError


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster to which this process is connected.

    Attributes:
        ray: the package, which is an extra.
        address: as the user gave it.
        cpus: processor cores of all machines, at least 1.
        gpus: GPUs of all machines.
    """

    ray: Any
    address: str
    cpus: int
    gpus: int


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """Yield the cluster at an address; what runs there for this process ends with the context.

    Args:
        address: of the cluster, or "local" to start one on this machine.

    Raises:
        GaqError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise GaqError("Ray is not installed: pip install 'gaq-export[ray]'.") from None
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True, **options)
    except (ConnectionError, ValueError) as error:
        raise GaqError(f"No Ray cluster at {address!r}: {' '.join(str(error).split())}") from error
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        yield Cluster(ray=ray, address=address, cpus=max(1, cpus), gpus=gpus)
    finally:
        ray.shutdown()
