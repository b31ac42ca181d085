"""The `owl2-hf` command."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="mPLUG-Owl2 and its family: ask about pictures, look into checkpoints, convert them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JSON = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def _report_mistakes(command: Callable) -> Callable:
    """A user's mistake ends in one line and exit code 1, never in a traceback."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        from huggingface_hub.errors import StrictDataclassError

        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, StrictDataclassError) as error:
            if kwargs.get("debug"):
                raise
            typer.echo(f"owl2-hf: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None

    return wrapped


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """transformers' errors do not always say which model they are about."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"model {model!r}: {error}") from error


@app.command()
@_report_mistakes
def describe(
    image: Annotated[str | None, typer.Argument(help="Path or URL of a picture; a bundled one if not given.")] = None,
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about it.")] = "What is this?",
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a model; the small bundled one if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    device: Annotated[str | None, typer.Option(help="Where to run, for instance cuda:0 or cpu.")] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Ask a question about a picture; the answer streams as it is made."""
    from transformers import TextStreamer, pipeline

    if image is None:
        from .default import default_pictures

        image = str(next(iter(default_pictures().values())))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    loaded, processor = _load(model)
    pipe = pipeline("image-text-to-text", model=loaded, processor=processor, device=device)
    streamer = None if as_json else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    outputs = pipe(
        text=[{"role": "user", "content": parts}],
        return_full_text=False,
        max_new_tokens=max_new_tokens,
        generate_kwargs={"streamer": streamer, "do_sample": False},
    )
    if as_json:
        answer = outputs[0]["generated_text"].strip()
        typer.echo(json.dumps({"image": image, "question": question, "answer": answer}))


@app.command()
@_report_mistakes
def info(
    folder: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of a model; the small bundled one if not given.")
    ] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Show components, parameters, tokens of a picture, preprocessing and dtype, without loading the weights."""
    from .default import default_dir

    facts = _facts(folder or str(default_dir()))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            for component, count in value.items():
                typer.echo(f"{name + ': ' + component:32} {count:>14,}")
        else:
            typer.echo(f"{name:32} {value if isinstance(value, str) else format(value, ','):>14}")


@app.command()
@_report_mistakes
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint in the original's Hugging Face layout.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder or file to read the tokenizer from, where the source has none.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one weight file.")] = "5GB",
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of the original into a folder that transformers loads."""
    from .conversion import convert as convert_checkpoint

    report = convert_checkpoint(
        source, target, tokenizer, max_shard_size, on_file=lambda name: typer.echo(f"reading {name}", err=True)
    )
    if as_json:
        typer.echo(json.dumps(vars(report)))
        return
    typer.echo(
        f"{report.target}: {report.num_parameters:,} parameters in {report.num_tensors} tensors, {report.dtype}; "
        f"{len(report.dropped)} dropped, {len(report.rebuilt)} rebuilt; "
        + ("no tokenizer" if report.tokenizer is None else f"tokenizer from {report.tokenizer}")
    )


def _load(model: str | None) -> tuple[Any, Any]:
    """A model and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    if model is None:
        from .default import load_default

        logging.disable_progress_bar()  # it takes no time
        return load_default()
    with _naming(model):
        return AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)


def _facts(folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    with _naming(folder):
        config = AutoConfig.from_pretrained(folder)
    if config.model_type != "mplug_owl2":
        raise ValueError(f"{folder}: expected a model of type 'mplug_owl2', got '{config.model_type}'.")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    components = {**dict(model.model.named_children()), "lm_head": model.lm_head}
    if config.tie_word_embeddings:
        del components["lm_head"]
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in components.items()}
    try:
        preprocessing = AutoProcessor.from_pretrained(folder).image_processor.image_aspect_ratio
    except (OSError, ValueError, AttributeError):
        preprocessing = "no processor in this folder"
    return {
        "model": folder,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "tokens per picture": config.num_image_tokens,
        "picture size": config.vision_config.image_size,
        "preprocessing": preprocessing,
        "context length": config.text_config.max_position_embeddings,
        "dtype": str(config.dtype).removeprefix("torch."),
    }
