"""Look into a model, and check that it computes what it should."""

import json
from typing import Annotated, Any

import typer

from ..naming import naming_model
from .app import app, report_mistakes, say, say_json
from .loading import place
from .options import JSON, Debug, Dtype


@app.command()
@report_mistakes
def info(
    folder: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id of a model; the small bundled one if not given."),
    ] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Show components, parameters, tokens of an image or crop, preprocessing and dtype; the weights are not loaded."""
    facts = _facts(place(folder))
    if as_json:
        say_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            for component, count in value.items():
                say(f"{name + ': ' + component:32} {count:>14,}")
        else:
            say(f"{name:32} {value if isinstance(value, str) else format(value, ','):>14}")


def _facts(folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    with naming_model(folder):
        config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("mplug_owl2", "mplug_owl2_1"):
        raise ValueError(
            f"{folder}: expected a model of type 'mplug_owl2', got '{config.model_type}'."
        )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    components = {**dict(model.model.named_children()), "lm_head": model.lm_head}
    if config.tie_word_embeddings:
        del components["lm_head"]
    parameters = {
        name: sum(p.numel() for p in module.parameters()) for name, module in components.items()
    }
    try:
        preprocessing = AutoProcessor.from_pretrained(folder).image_processor.image_aspect_ratio
        is_cropped = preprocessing == "anchors"
    except (OSError, ValueError, AttributeError):
        preprocessing = "no processor in this folder"
        is_cropped = config.connector_type == "h_reducer"
    square = "crop" if is_cropped else "image"
    return {
        "model": folder,
        "parameters": {**parameters, "total": sum(parameters.values())},
        f"tokens per {square}": config.num_image_tokens,
        f"{square} size": config.vision_config.image_size,
        "preprocessing": preprocessing,
        "context length": config.text_config.max_position_embeddings,
        "dtype": str(config.dtype).removeprefix("torch."),
    }


@app.command()
@report_mistakes
def check(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of a model; the small bundled one, with its stored numbers, if not given."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where to run, for instance cuda:0 or cpu; a GPU if there is one."),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Type of the numbers; float32, or what the checkpoint of --model says."),
    ] = None,
    attn_implementation: Annotated[
        str | None,
        typer.Option(help="Attention to run with, for instance eager, sdpa or flex_attention."),
    ] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Check that models compute on this machine what they should; begin an issue report with the output.

    The exit code is 1 where a check fails.
    """
    from ..checks import check as run

    report = run(
        model,
        device=device,
        dtype=dtype and dtype.value,
        attn_implementation=attn_implementation,
        on_line=None if as_json else typer.echo,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    if not report.ok:
        raise typer.Exit(1)
