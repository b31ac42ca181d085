"""Inspect a model, and check its results."""

import json
from dataclasses import asdict, fields
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
        typer.Argument(
            help="Folder or Hub id of a model. Default: the small model in the package."
        ),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Also compute how much GPU memory each task needs."),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="With --memory: rows in a batch. Default: 1.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="With --memory: positions of a row (prompt, images, answer). Default: 2048, or "
            "the model's context length if that is shorter."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="With --memory: images (or crops) of a row. Default: 1.")
    ] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Show the parts and settings of a model.

    Print the parameters of each component, the tokens of an image or crop, the preprocessing and
    the dtype. The weights are not loaded.
    """
    given = {"batch_size": batch_size, "length": length, "images": images}
    size = {name: value for name, value in given.items() if value is not None}
    if size and not memory:
        option = f"--{next(iter(size)).replace('_', '-')}"
        raise ValueError(f"{option} needs --memory: add it, or leave {option} out.")
    config, facts = _facts(place(folder))
    if as_json:
        say_json({**facts, "memory": _memory(config, size)} if memory else facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            for component, count in value.items():
                say(f"{name + ': ' + component:32} {count:>14,}")
        else:
            say(f"{name:32} {value if isinstance(value, str) else format(value, ','):>14}")
    if memory:
        _say_memory(config, size)


def _memory(config: Any, size: dict[str, int]) -> dict[str, Any]:
    """Task -> bytes by use, their total, and GB of the smallest card with enough memory."""
    from ..memory import memory_of_tasks, smallest_card

    return {
        task: {**asdict(found), "total": found.total, "card": smallest_card(found.total)}
        for task, found in memory_of_tasks(config, **size)
    }


def _say_memory(config: Any, size: dict[str, int]) -> None:
    from ..memory import CARDS, Memory, memory_of_tasks, smallest_card, usual_length

    rows, images = size.get("batch_size", 1), size.get("images", 1)
    length = size.get("length", usual_length(config))
    say("")
    say(f"GPU memory (GB), batch size {rows}, {length:,} positions and {images} image(s) a row:")
    names = [*(one.name for one in fields(Memory)), "total", "smallest card"]
    say(f"{'':26} {' '.join(f'{name:>11}' for name in names)}")
    for task, found in memory_of_tasks(config, **size):
        card = smallest_card(found.total)
        shown = [f"{value / 1e9:11.3f}" for value in (*asdict(found).values(), found.total)]
        shown.append(f"{f'{card} GB' if card else f'over {CARDS[-1]} GB':>13}")
        say(f"{task:26} {' '.join(shown)}")


def _facts(folder: str) -> tuple[Any, dict[str, Any]]:
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
    facts = {
        "model": folder,
        "parameters": {**parameters, "total": sum(parameters.values())},
        f"tokens per {square}": config.num_image_tokens,
        f"{square} size": config.vision_config.image_size,
        "preprocessing": preprocessing,
        "context length": config.text_config.max_position_embeddings,
        "dtype": str(config.dtype).removeprefix("torch."),
    }
    return config, facts


@app.command()
@report_mistakes
def check(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of a model. Default: the small model in the package, which is "
            "also compared with stored numbers."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device to run on, for example cuda:0 or cpu. Default: a GPU if there is one."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Data type to compute in. Default: the dtype of the checkpoint that --model "
            "names, or float32 for the model in the package."
        ),
    ] = None,
    attn_implementation: Annotated[
        str | None,
        typer.Option(help="Attention implementation, for example eager, sdpa or flex_attention."),
    ] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Check that a model computes correct results here.

    Paste the output at the top of a bug report.

    The exit code is 1 if a check fails.
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
