"""An engine where a diffusers pipeline expects its U-Net.

    pipe = DDIMPipeline.from_pretrained("google/ddpm-cifar10-32", unet=EngineUNet("unet.plan"))

An engine of the network alone (`--graph eps`) takes any scheduler that visits whole timesteps. An engine of whole steps
predicts noise too, but only at its sampler's timesteps. Guidance and noise corrections belong to our own loop: a
pipeline does its own guidance, and makes no correction.
"""

from collections.abc import Mapping
from dataclasses import replace
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
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.batching import split_rows
from gaq_export.diffusion.conditioning import GUIDANCE, UNCONDITIONAL
from gaq_export.errors import GaqError

LOOP_INPUTS = ("x", "t", "step", "noise", "previous", GUIDANCE)  # inputs of an engine that are no condition
TEXT = "encoder_hidden_states"


class EngineUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An open engine, called as `UNet2DModel` and `UNet2DConditionModel` are.

    It keeps the engine open; `close` it, or use it in a `with` statement. `to` sets the device and type that a pipeline
    sees; where and in which type the engine computes was decided when it was built.

    Attributes:
        file: the engine file.
        predict_noise: the engine, called as (x, t), or (x, t, cond).

    Args:
        source: the engine file.
        gpu: number of the GPU, for an engine of GPUs.

    Raises:
        EngineError: the file is damaged, or the engine cannot run here.
    """

    config_name = "config.json"

    def __init__(self, source: str | Path | EngineFile, *, gpu: int = 0) -> None:
        super().__init__()
        self.file = replace(source if isinstance(source, EngineFile) else load_engine_file(source), gpu=gpu)
        provenance = record_of(self.file).provenance
        self.register_to_config(**provenance.network_config)
        # The one tensor that `to` can move: ModelMixin reads its device and dtype from it.
        self.register_buffer("place", torch.zeros(()), persistent=False)
        self._engine = session.open_engines(self.file)
        self.predict_noise = session.noise_predictor(self._engine, self.file)
        self._timesteps = provenance.schedule.num_train
        inputs = {spec.name: getattr(torch, spec.dtype) for spec in self._engine.inputs}
        self._guided = GUIDANCE in inputs
        self._condition_specs = {
            n: kind for n, kind in inputs.items() if n not in LOOP_INPUTS and not n.startswith(UNCONDITIONAL)
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
            encoder_hidden_states: (N, tokens, channels), if the network takes prompts.
            class_labels: (N,), if it takes classes.
            added_cond_kwargs: further conditions, by name.
            return_dict: False for a tuple.
            others: what some pipelines pass on; each has to be None.

        Returns:
            The noise, with the shape, type and device of `sample`, wrapped as diffusers' networks wrap theirs.

        Raises:
            GaqError: a timestep that the engine does not have, or anything else that it does not take.
        """
        # Pipelines pass some of these along as None or {} even where they are not used.
        unsupported = sorted(name for name, value in others.items() if value is not None and value != {})
        if unsupported:
            raise GaqError(
                f"{self.file.path} takes no {', '.join(unsupported)}: leave it out, or use the float network."
            )
        count = len(sample)
        inputs = {TEXT: encoder_hidden_states, "class_labels": class_labels, **(added_cond_kwargs or {})}
        condition = self._rows({name: value for name, value in inputs.items() if value is not None}, count)
        # Engines exchange NumPy arrays: whatever the pipeline computes with, they take float32 on the CPU.
        rows = {"x": sample.detach().to("cpu", torch.float32), "t": self._whole(timestep, count), **condition}
        batches = split_rows(rows, self.file.batch[0], self.file.batch[2])
        noise = torch.cat([self._predict(batch) for batch in batches])[:count].to(sample)
        if not return_dict:
            return (noise,)
        return UNet2DConditionOutput(sample=noise) if TEXT in self._condition_specs else UNet2DOutput(sample=noise)

    def _rows(self, condition: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """Return the condition, (N, ...) each, in the engine's types."""
        if condition.keys() != self._condition_specs.keys():
            raise GaqError(
                f"{self.file.path} takes {sorted(self._condition_specs) or 'no condition'} beside sample and timestep; "
                f"found {sorted(condition) or 'nothing'}."
            )
        rows = {name: value.detach().to("cpu", self._condition_specs[name]) for name, value in condition.items()}
        # (1, ...) for all images -> (N, ...)
        return {name: row.reshape(-1, *row.shape[1:]).expand(count, *row.shape[1:]) for name, row in rows.items()}

    def _whole(self, timestep: Tensor | float, count: int) -> Tensor:
        """Return timesteps as (N,) int64."""
        t = torch.as_tensor(timestep).to("cpu").reshape(-1)  # () or (N,) -> (1,) or (N,)
        if bool(((t != t.round()) | (t < 0) | (t >= self._timesteps)).any()):
            raise GaqError(
                f"{self.file.path} takes whole timesteps from 0 to {self._timesteps - 1}; found {t.tolist()}. "
                "Use a scheduler that visits those."
            )
        return t.to(torch.int64).expand(count)

    def _predict(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the noise of one batch that the engine takes."""
        condition = {name: rows[name].contiguous() for name in self._condition_specs}
        if self._guided:  # with the same condition on both sides, guidance of any scale returns the plain noise
            condition |= {f"{UNCONDITIONAL}{name}": row for name, row in condition.items()} | {GUIDANCE: torch.ones(1)}
        args = (rows["x"].contiguous(), rows["t"].contiguous())
        noise: Tensor = self.predict_noise(*args, condition) if condition else self.predict_noise(*args)
        return noise

    def save_pretrained(self, *args: object, **options: object) -> None:
        """Refuse: an engine belongs to the machine it was built for, and is already in files that can be copied.

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
