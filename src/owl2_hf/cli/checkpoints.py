"""Make, convert, check and publish model folders."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .app import app, report_mistakes, say, say_json
from .loading import place
from .options import JSON, Debug, Dtype, Overwrite

_CONVERT_HELP = """Convert a checkpoint of the original into a folder that transformers loads, or back.

SOURCE is recognised by what it holds, not by its name:

\b
- the original's Hugging Face layout: config.json with pytorch_model.bin, numbered .bin shards or safetensors
  (mPLUG-Owl2, Q-Align, OneAlign, Q-Instruct, Co-Instruct, Compare2Score, DeQA-Score, DocOwl 1.5, mPLUG-Owl2.1)
- Megatron: release/, iter_*/ with its tracker file, or mp_rank_00/ ...; one or several tensor-parallel ranks;
  config.json and tokenizer come from --base, the published model's sizes are taken without it
- a LoRA fine-tune: adapter_config.json, the adapter and non_lora_trainables.bin; needs its --base model
- this package's own format: nothing to do, unless for --to original, another --dtype or a --preset

What a scorer is asked is written beside the weights: as the source's scorer.json says, or its config.json, or the
code beside it, which is read and never run; --preset says it where none of them does.
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
            help="Layout to write: for transformers, for the original's code, or a PEFT adapter."
        ),
    ] = Target.ours,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Base model of a LoRA fine-tune; config.json and tokenizer for Megatron."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder or file to read the tokenizer from, where the source has none."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Which scorer it is, where it cannot be seen: one-align, deqa, q-instruct or q-instruct-boost."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the weights; as they are if not given.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one weight file.")] = "5GB",
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Convert NaN and infinite values and report them."),
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
            f"{source} is in this package's format already: nothing to convert, {target} was not made"
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
            help="Checkpoint that it was converted from: compare every tensor, and logits."
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="As for convert, where --against needs it.")
    ] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Check a converted folder: every tensor, the configuration, tokenizer and processor, and an answer's logits."""
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
            help="Folder or Hub id of a CLIP or DINOv2 ViT, or of a model of this family; a fresh one if not given."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of an image in pixels; the vision model's own if not given."
        ),
    ] = None,
    num_queries: Annotated[
        int, typer.Option(min=1, help="Learnable queries of the visual abstractor.")
    ] = 64,
    num_abstractor_layers: Annotated[
        int, typer.Option(min=1, help="Layers of the visual abstractor.")
    ] = 6,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the weights; the language model's if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is made anew.")] = 0,
    overwrite: Overwrite = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Make a new model from a stock LLaMA and, optionally, a stock vision encoder, ready for training."""
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
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Write vision encoder and connector as an ONNX file, and compare what it computes with torch."""
    from ..export import export_vision

    difference = export_vision(place(model), target)
    if as_json:
        say_json({"file": str(target), "difference": difference})
        return
    say(f"{target}: pixel_values to image_features, at most {difference:.1e} from torch")


@app.command()
@report_mistakes
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a model, as convert or save_pretrained makes it.")
    ],
    repo_id: Annotated[str, typer.Argument(help="namespace/name on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository, if it is made now.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; main if not given.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and list what would go; no network.")
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
    say(f"{total} would go to {report.repo_id}" if dry_run else f"{total}: {report.url}")
