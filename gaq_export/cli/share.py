"""The commands that share an engine: as a folder, through the Hugging Face hub, or on a Triton Inference Server."""

from pathlib import Path
from typing import Annotated

import typer

from gaq_export.cli.choices import SERVERS
from gaq_export.cli.options import (
    DEFAULT_RUN,
    MOST_BATCH,
    Eta,
    EvaluationFolder,
    Profile,
    RunArgument,
    SamplerName,
    Spacing,
    Steps,
    one_line_errors,
    replace_options,
)

Licence = Annotated[
    str | None,
    typer.Option("--license", help="Licence of the source model, as the hub names it; by default what its card says."),
]
WithModel = Annotated[
    bool, typer.Option("--whole", help="Include the float model even if it can be fetched from where it came from.")
]


def pack(
    run: RunArgument = DEFAULT_RUN,
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default pack in the run folder.")] = None,
    whole: WithModel = False,
    licence: Licence = None,
    evaluation: EvaluationFolder = None,
    profile: Profile = "reference",
) -> None:
    """Write one folder to share: plan, ONNX, model card, licences, and the float model if it cannot be fetched."""
    with one_line_errors():
        from gaq_export.run import Run
        from gaq_export.sharing.pack import PackOptions, write_pack

        options = PackOptions(whole=whole, licence=licence, evaluation=evaluation, profile=profile)
        packed = write_pack(Run(folder=run), out, options)
        if packed.licence is None:
            typer.echo(
                "note: the source model's licence is not known; name it with --license before you share the pack",
                err=True,
            )
        model = "with the float model" if packed.whole else "the float model is fetched again when it is needed"
        typer.echo(f"{packed.folder} ({packed.size_bytes / 1e6:.1f} MB, {model})")


def push(
    run: Annotated[Path, typer.Argument(help="Run folder of a finished calibration, or a pack.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub, OWNER/NAME.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; by default it is private.")
    ] = False,
    whole: WithModel = False,
    licence: Licence = None,
    evaluation: EvaluationFolder = None,
) -> None:
    """Upload a pack to the Hugging Face hub. A run folder is packed first."""
    with one_line_errors():
        from gaq_export.models import hub
        from gaq_export.run import Run
        from gaq_export.sharing.pack import MARK, PackOptions, read_pack, write_pack

        folder = run
        if not (run / MARK).is_file():
            options = PackOptions(whole=whole, licence=licence, evaluation=evaluation)
            folder = write_pack(Run(folder=run), options=options).folder
        record = read_pack(folder)  # checks it too: a damaged pack is not uploaded
        name = record.settings["model"]["name"]
        typer.echo(hub.upload(folder, repo, private=not public, message=f"{name}, quantized with gaq-export"))


def pull(
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub, OWNER/NAME.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pack; by default the repository's name.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag; by default the newest.")] = None,
) -> None:
    """Download a pack from the Hugging Face hub and check that it is complete."""
    with one_line_errors():
        from gaq_export import folders
        from gaq_export.models import hub
        from gaq_export.sharing.pack import MARK, read_pack

        folder = out or Path(repo.rpartition("/")[2])
        if not (folder / ".cache").is_dir():  # where the hub's client puts an unfinished download
            folders.check_replaceable(folder, MARK)
        hub.download(repo, folder, revision)
        read_pack(folder)
        typer.echo(f"{folder}; next: gaq-export build-engine --weights {folder}")


def triton(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the server's model repository and its client.")],
    backend: Annotated[
        str, typer.Option(help=f"{SERVERS}. tensorrt builds the engine on the server's GPU when it starts.")
    ] = "onnxruntime",
    largest: Annotated[
        int, typer.Option("--batch", min=1, max=MOST_BATCH, help="Images that the server may batch together.")
    ] = 16,
    steps: Steps = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    eta: Eta = None,
) -> None:
    """Write a model repository for a Triton Inference Server, and a client that runs the denoising loop."""
    with one_line_errors():
        from gaq_export import pipeline
        from gaq_export.sharing import triton_repository

        spec = replace_options(pipeline.sampler_of(run), steps=steps, name=sampler, spacing=spacing, eta=eta)
        options = triton_repository.ServingOptions(backend=backend, largest_batch=largest, sampler=spec)
        folder = triton_repository.write(run, out, options)
        typer.echo(f"{folder}; next: tritonserver --model-repository {folder / 'models'}")
