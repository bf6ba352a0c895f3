"""The names that options accept, for the help texts.

The tables and enumerations that these names come from cost seconds to import, which `--help` must not take. A test
holds each list equal to its table; names whose tables import quickly are taken from there, in `options`.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """The keys of a table, or the values of an enumeration.

    Attributes:
        table: where the table is, as "module:NAME".
        names: its keys, or the values of its members, in its order.
    """

    table: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        """Return them as a phrase, "a, b or c"."""
        return either(self.names)


def either(names: Iterable[str]) -> str:
    """Return names as a phrase.

    >>> either(["ddim", "ddpm", "dpmpp-2m"])
    'ddim, ddpm or dpmpp-2m'
    """
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


# Each in the order of its table; that of the backends is the order of preference.
SAMPLERS = Names("gaq_export.diffusion.samplers:SAMPLERS", ("ddim", "ddim-clipped", "ddpm", "dpmpp-2m"))
SPACINGS = Names(
    "gaq_export.diffusion.schedule:SPACINGS", ("uniform", "from-1", "trailing", "linspace", "quad", "beta")
)
BACKENDS = Names("engines:BACKENDS", ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime", "onnxruntime-cuda"))
COMPUTE = Names("engines.base:Compute", ("float32", "float16", "bfloat16"))
NUMBERS = Names("gaq_export.deploy.record:Numbers", ("int8", "fp8"))
PORTABLE = Names("engines.base:Portable", ("version", "gpu"))
GRAPHS = Names("gaq_export.deploy.record:GraphKind", ("step", "eps"))
EXTRACTORS = Names(
    "gaq_export.evaluation.feature_extractors:EXTRACTORS", ("digits", "resnet56", "inception", "inception-clean")
)
SERVERS = Names("gaq_export.sharing.triton_repository:SERVERS", ("onnxruntime", "onnxruntime-cuda", "tensorrt"))
