"""The commands that hand an engine on: as a folder, by way of the Hugging Face hub, to a Triton Inference Server."""

from pathlib import Path
from typing import Annotated

import typer

from gaq_export.cli.options import Eta, SamplerName, Spacing, Steps, changed, one_line_errors

RunArgument = Annotated[Path, typer.Argument(help="Folder of a finished calibration.")]
Licence = Annotated[
    str | None, typer.Option("--license", help="Of the source model, as the hub names it; what its card says if none.")
]
Judged = Annotated[
    Path | None,
    typer.Option("--evaluation", help="Folder that `evaluate` wrote; evaluation, if it is about the engine."),
]
Whole = Annotated[bool, typer.Option("--whole", help="With the float model, even where it can be found again.")]


def pack(
    run: RunArgument = Path("gaq-run"),
    out: Annotated[Path | None, typer.Option(help="The folder; pack in the run folder by default.")] = None,
    whole: Whole = False,
    licence: Licence = None,
    evaluation: Judged = None,
    profile: Annotated[str, typer.Option(help="Of the ONNX file, as for `export`.")] = "reference",
) -> None:
    """Write one folder to share: plan, ONNX, model card, licences, and the float model if it is nowhere else."""
    with one_line_errors():
        from gaq_export.run import Run
        from gaq_export.sharing.pack import write_pack

        made = write_pack(Run(folder=run), out, whole=whole, licence=licence, judged=evaluation, profile=profile)
        if made.licence is None:
            typer.echo(
                "note: the source model's licence was not found; say it with --license before you share", err=True
            )
        inside = "with the float model" if made.whole else "the float model is fetched again when it is needed"
        typer.echo(f"{made.folder} ({made.size_bytes / 1e6:.1f} MB, {inside})")


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished calibration, or a pack.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub, OWNER/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="A new repository is for all; private otherwise.")] = False,
    whole: Whole = False,
    licence: Licence = None,
    evaluation: Judged = None,
) -> None:
    """Put a pack on the Hugging Face hub; a run is packed first. New repositories are private."""
    with one_line_errors():
        from gaq_export.models import hub
        from gaq_export.run import Run
        from gaq_export.sharing.pack import MARK, read_pack, write_pack

        folder = run
        if not (run / MARK).is_file():
            folder = write_pack(Run(folder=run), whole=whole, licence=licence, judged=evaluation).folder
        record = read_pack(folder)
        name = record["settings"]["model"]["name"]
        typer.echo(hub.upload(folder, repo, private=not public, message=f"{name}, quantized with gaq-export"))


def pull(
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub, OWNER/NAME.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pack; the repository's name by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag; the newest by default.")] = None,
) -> None:
    """Fetch a pack from the Hugging Face hub and check that it is whole."""
    with one_line_errors():
        from gaq_export import run as runs
        from gaq_export.models import hub
        from gaq_export.sharing.pack import MARK, read_pack

        folder = out or Path(repo.rpartition("/")[2])
        if not (folder / ".cache").is_dir():  # where the client keeps what it had when it was stopped
            runs.check_replaceable(folder, MARK)
        hub.download(repo, folder, revision)
        read_pack(folder)
        typer.echo(f"{folder}; next: gaq-export build-engine --weights {folder}")


def triton(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the server's model repository and its client.")],
    backend: Annotated[
        str, typer.Option(help="onnxruntime, onnxruntime-cuda, or tensorrt, which builds on the server's GPU.")
    ] = "onnxruntime",
    most: Annotated[int, typer.Option("--batch", min=1, help="Images that the server may put together.")] = 16,
    steps: Steps = None,
    sampler: SamplerName = None,
    spacing: Spacing = None,
    eta: Eta = None,
) -> None:
    """Write a model repository for a Triton Inference Server, and the client that runs the loop."""
    with one_line_errors():
        from gaq_export import pipeline
        from gaq_export.sharing import triton_repository

        spec = changed(pipeline.sampler_of(run), steps=steps, name=sampler, spacing=spacing, eta=eta)
        made = triton_repository.write(run, out, backend=backend, most=most, sampler=spec)
        typer.echo(f"{made}; next: tritonserver --model-repository {made / 'models'}")
