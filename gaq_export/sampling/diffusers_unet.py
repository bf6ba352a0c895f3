"""An engine where a diffusers pipeline expects its U-Net.

    pipe = DDIMPipeline.from_pretrained("google/ddpm-cifar10-32", unet=EngineUNet("unet.plan"))

An engine of the network alone (`--graph eps`) takes any scheduler. One of whole steps gives its noise too, at its own
timesteps only. Guidance and corrections are of our own loop: a pipeline does its own guidance, and corrects nothing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from engines import EngineFile, load_engine_file
from gaq_export.deploy import session
from gaq_export.diffusion.conditioning import GUIDANCE, UNCONDITIONAL
from gaq_export.errors import GaqError
from gaq_export.models import provenance

OWN = ("x", "t", "step", "noise", "previous", GUIDANCE)  # inputs that are not what the network is told
TEXT = "encoder_hidden_states"


class EngineUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An open engine, called as `UNet2DModel` and `UNet2DConditionModel` are.

    It keeps the engine open; `close` it, or use it in a `with` statement. `to` says where its outputs are wanted and in
    which type; where and in what the engine computes was settled when it was built.

    Attributes:
        file: the engine file.
        noise_of: the engine, called as (x, t), or (x, t, told), as it was built.

    Args:
        source: the engine file.

    Raises:
        EngineError: the file is damaged, or the engine cannot run here.
    """

    config_name = "config.json"

    def __init__(self, source: str | Path | EngineFile) -> None:
        super().__init__()
        self.file = source if isinstance(source, EngineFile) else load_engine_file(source)
        self.register_to_config(**provenance.architecture_of(self.file.about))
        self.register_buffer("place", torch.zeros(()), persistent=False)  # what `to`, `device` and `dtype` go by
        self._engine = session.open_engines(self.file)
        schedule = provenance.schedule_of(self.file.about)
        self.noise_of, self._timesteps = session.noise_of(self._engine, self.file, schedule), schedule.num_train
        inputs = {spec.name: getattr(torch, spec.dtype) for spec in self._engine.inputs}
        self._guided = GUIDANCE in inputs
        self._condition_specs = {
            n: kind for n, kind in inputs.items() if n not in OWN and not n.startswith(UNCONDITIONAL)
        }

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: object,
    ) -> UNet2DOutput | UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise in `sample`.

        Args:
            sample: (N, C, H, W); any N, in parts of the engine's batch.
            timestep: whole training timestep, one for all or (N,).
            encoder_hidden_states: (N, tokens, channels), if the network is told a text.
            class_labels: (N,), if it is told a class.
            added_cond_kwargs: what else it is told, by name.
            return_dict: False for a tuple.
            others: what some pipelines pass on, None all of it.

        Returns:
            The noise, with the shape, type and place of `sample`, as diffusers' networks return theirs.

        Raises:
            GaqError: a timestep that the engine does not have, or anything else that it does not take.
        """
        odd = sorted(name for name, value in others.items() if value is not None and value != {})
        if odd:
            raise GaqError(f"{self.file.path} takes no {', '.join(odd)}: leave it out, or use the float network.")
        count = len(sample)
        given = {TEXT: encoder_hidden_states, "class_labels": class_labels, **(added_cond_kwargs or {})}
        condition = self._rows({name: value for name, value in given.items() if value is not None}, count)
        parts = {"x": sample.detach().to("cpu", torch.float32), "t": self._whole(timestep, count), **condition}
        noise = torch.cat([self._part(part) for part in self._parts(parts)])[:count].to(sample)
        if not return_dict:
            return (noise,)
        return UNet2DConditionOutput(sample=noise) if TEXT in self._condition_specs else UNet2DOutput(sample=noise)

    def _rows(self, given: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """Return what the network is told, (N, ...) each, in the engine's types."""
        if given.keys() != self._condition_specs.keys():
            raise GaqError(
                f"{self.file.path} takes {sorted(self._condition_specs) or 'no condition'} beside sample and timestep; "
                f"found {sorted(given) or 'nothing'}."
            )
        rows = {name: value.detach().to("cpu", self._condition_specs[name]) for name, value in given.items()}
        return {name: row.reshape(-1, *row.shape[1:]).expand(count, *row.shape[1:]) for name, row in rows.items()}

    def _whole(self, timestep: Tensor | float, count: int) -> Tensor:
        """Return timesteps as (N,) int64."""
        t = torch.as_tensor(timestep).to("cpu").reshape(-1)
        if bool(((t != t.round()) | (t < 0) | (t >= self._timesteps)).any()):
            raise GaqError(
                f"{self.file.path} takes whole timesteps from 0 to {self._timesteps - 1}; found {t.tolist()}. "
                "Use a scheduler that visits those."
            )
        return t.to(torch.int64).expand(count)

    def _parts(self, rows: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Cut rows to the engine's largest batch; the last part is filled up to its smallest with its last row."""
        least, _, most = self.file.batch
        for start in range(0, len(rows["x"]), most):
            part = {name: row[start : start + most] for name, row in rows.items()}
            short = least - len(part["x"])
            yield (
                {n: torch.cat((row, row[-1:].expand(short, *row.shape[1:]))) for n, row in part.items()}
                if (short > 0)
                else part
            )

    def _part(self, rows: Mapping[str, Tensor]) -> Tensor:
        condition = {name: rows[name].contiguous() for name in self._condition_specs}
        if self._guided:  # between a thing and the same thing, guidance has nothing to do
            condition |= {f"{UNCONDITIONAL}{name}": row for name, row in condition.items()} | {GUIDANCE: torch.ones(1)}
        args = (rows["x"].contiguous(), rows["t"].contiguous())
        noise: Tensor = self.noise_of(*args, condition) if condition else self.noise_of(*args)
        return noise

    def save_pretrained(self, *args: object, **options: object) -> None:
        """Refuse: an engine is for the machine it was built for, and is two files already.

        Raises:
            GaqError: always.
        """
        raise GaqError(
            f"An engine is not saved with a pipeline: copy {self.file.path} and its .json, or `gaq-export pack`."
        )

    def close(self) -> None:
        """Release the engine; closing twice is harmless."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
