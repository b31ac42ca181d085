"""Make, convert, check and publish model folders."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .app import app, report_mistakes, say, say_json
from .loading import place
from .options import JSON, Debug, Device, Dtype, Overwrite, Preset

_CONVERT_HELP = """Convert a checkpoint of the original into a folder that transformers loads, or back.

SOURCE is recognised by its files, not by its name:

\b
- the original's Hugging Face layout: config.json with pytorch_model.bin, numbered .bin shards
  or safetensors (mPLUG-Owl2, Q-Align, OneAlign, Q-Instruct, Co-Instruct, Compare2Score,
  DeQA-Score, DocOwl 1.5, mPLUG-Owl2.1)
- Megatron: release/, iter_*/ with its tracker file, or mp_rank_00/ ..., with one or several
  tensor-parallel ranks. --base names the folder with config.json and tokenizer. Without --base,
  the sizes of the published model are used.
- a LoRA fine-tune: adapter_config.json, the adapter and non_lora_trainables.bin. Needs --base.
- this package's own format: nothing is converted, except with --to original, another --dtype or
  a --preset

For a scorer, the prompt and levels are written beside the weights. They come from the source's
scorer.json, its config.json, or the code beside it, which is read and never run. Give --preset if
none of these names the scorer.
"""


class Target(str, Enum):
    """Layouts that `convert` writes."""

    ours = "ours"
    original = "original"
    adapter = "adapter"


@app.command(help=_CONVERT_HELP)
@report_mistakes
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[
        Target,
        typer.Option(
            help="Layout to write: ours for transformers, original for the original code, "
            "adapter for PEFT."
        ),
    ] = Target.ours,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Base model of a LoRA fine-tune. For a Megatron checkpoint: folder with "
            "config.json and tokenizer."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder or file to read the tokenizer from, if the source has none."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Which scorer the source is, if its files do not tell: one-align, deqa, "
            "q-instruct or q-instruct-boost."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Data type of the weights. Default: keep the data type of each weight."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one weight file.")] = "5GB",
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Keep NaN and infinite values, and report them, instead of stopping.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    from ..conversion import convert as convert_checkpoint

    report = convert_checkpoint(
        source,
        target,
        to=to.value,
        base=base,
        tokenizer=tokenizer,
        preset=preset,
        dtype=dtype and dtype.value,
        max_shard_size=max_shard_size,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        on_file=lambda name: say(f"reading {name}", err=True),
    )
    if as_json:
        say_json(vars(report))
    elif report.is_noop:
        say(
            f"{source} is in this package's format already: nothing to convert, {target} was not "
            "created"
        )
    else:
        say(f"{target}: {report.summary()}")


@app.command()
@report_mistakes
def verify(
    target: Annotated[Path, typer.Argument(help="Folder of a converted model.")],
    against: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint that the model was converted from. Every tensor and the logits are "
            "compared."
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Base model of the --against checkpoint; see convert --help."),
    ] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Check a converted folder.

    Check every tensor, the configuration, the tokenizer, the processor, and the logits of an
    answer.
    """
    from ..conversion.verify import verify as verify_folder

    checks = verify_folder(target, against, base)
    if as_json:
        say_json({"ok": True, "checks": checks})
        return
    for check in checks:
        say(f"- {check}")
    say("ok")


@app.command()
@report_mistakes
def init(
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    language: Annotated[str, typer.Option(help="Folder or Hub id of a LLaMA with its tokenizer.")],
    vision: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of a CLIP or DINOv2 ViT, or of a model of this family. "
            "Default: a new vision encoder with random weights."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Width and height of an image in pixels. Default: the vision model's."
        ),
    ] = None,
    num_queries: Annotated[
        int, typer.Option(min=1, help="Learnable queries of the visual abstractor.")
    ] = 64,
    num_abstractor_layers: Annotated[
        int, typer.Option(min=1, help="Layers of the visual abstractor.")
    ] = 6,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type of the weights. Default: the language model's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the new random weights.")] = 0,
    overwrite: Overwrite = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Make a new model, ready for training.

    Combine a LLaMA and, optionally, a pretrained vision encoder with a new visual abstractor.
    """
    from ..conversion import initialize

    report = initialize(
        language,
        target,
        vision,
        image_size,
        num_queries,
        num_abstractor_layers,
        dtype and dtype.value,
        seed,
        overwrite,
    )
    if as_json:
        say_json(vars(report))
        return
    say(f"{target}: {report.summary()}")
    for note in report.notes:
        say(f"- {note}")


@app.command()
@report_mistakes
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model, or 'default'.")],
    target: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    scorer: Annotated[
        bool, typer.Option("--scorer", help="Export a whole scorer, from pixels to scores.")
    ] = False,
    task: Annotated[str, typer.Option(help="With --scorer: task of the preset.")] = "quality",
    preset: Preset = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Export the vision encoder and connector, or a whole scorer, to ONNX.

    Compare the results of the file with those of torch.
    """
    from ..export import export_scorer, export_vision

    if not scorer and (task != "quality" or preset is not None):
        say("owl2-hf: --task and --preset need --scorer", err=True)
        raise typer.Exit(2)
    if not scorer:
        difference, outputs = export_vision(place(model), target), "image_features"
    else:
        difference = export_scorer(place(model), target, task, preset)
        outputs = "scores and level_logits"
    if as_json:
        say_json({"file": str(target), "difference": difference})
        return
    say(f"{target}: pixel_values to {outputs}, differs from torch by at most {difference:.1e}")


class RoundTo(str, Enum):
    """Types of rounded weights."""

    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


class RoundBy(str, Enum):
    """Packages that round weights."""

    torchao = "torchao"
    llmcompressor = "llmcompressor"


@app.command()
@report_mistakes
def quantize(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a model, 'default' or 'default-scorer'.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[RoundTo, typer.Option(help="Data type of the quantised weights.")] = RoundTo.int8,
    by: Annotated[
        RoundBy,
        typer.Option(
            help="Package to quantise with. Only llmcompressor stores int4 in half a byte."
        ),
    ] = RoundBy.torchao,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale in int4. Default: the largest of 128 to 8 that fits."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Opinions to evaluate a scorer on: CSV, JSON, JSON lines, Parquet, or a data set."
        ),
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(help="Folder that relative image paths in --data start from.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Use only this part of the rows.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Image or folder to test on, instead of --data. Can be repeated."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", help="Question to ask about each image. Can be repeated."),
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Round the weights of a model, and write what is lost to its model card."""
    from ..compression import QUESTIONS
    from ..compression import quantize as quantize_model

    if data is not None and image:
        say("owl2-hf: use --data or --image, not both", err=True)
        raise typer.Exit(2)
    report = quantize_model(
        model,
        target,
        to.value,
        by.value,
        group_size,
        data,
        image_folder,
        split,
        image or (),
        question or QUESTIONS,
        device,
        overwrite,
    )
    if as_json:
        say_json(report.to_dict())
        return
    say(f"{target}: {report.summary()}")
    say(f"measured on {report.losses.subject}:")
    for line in report.losses.lines():
        say(f"- {line}")


@app.command()
@report_mistakes
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a model, made by convert or save_pretrained.")
    ],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, as namespace/name.")],
    private: Annotated[
        bool,
        typer.Option("--private", help="Make the repository private, if it does not exist yet."),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to. Default: main.")] = None,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", help="Open a pull request instead of changing the branch."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the folder and list the files to upload. Do not use the network.",
        ),
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Check a model folder and upload it to the Hub."""
    from ..hub import push as push_folder

    report = push_folder(folder, repo_id, private or None, revision, create_pr, dry_run)
    if as_json:
        say_json(vars(report))
        return
    for name, size in report.files:
        say(f"{size:>16,}  {name}")
    total = f"{len(report.files)} files, {sum(size for _, size in report.files):,} bytes"
    say(f"{total} would be uploaded to {report.repo_id}" if dry_run else f"{total}: {report.url}")
