"""Ask about images, and look at what a model attends to."""

import copy
from pathlib import Path
from typing import Annotated, Any

import typer

from ..printing import printable
from .app import app, report_mistakes, say, say_json
from .loading import load
from .options import JSON, Debug, Device, ModelOption


@app.command()
@report_mistakes
def describe(
    image: Annotated[
        str | None,
        typer.Argument(help="Path or URL of an image. Default: an image in the package."),
    ] = None,
    question: Annotated[
        str, typer.Option("--question", "-q", help="Question to ask about the image.")
    ] = "What is this?",
    model: ModelOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest answer, in tokens. Default: the model's setting, otherwise 256."
        ),
    ] = None,
    device: Device = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Ask a question about an image. The answer appears while it is generated."""
    from transformers import TextStreamer, pipeline

    if image is None:
        from ..default import default_pictures

        image = str(next(iter(default_pictures().values())))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    loaded, processor = load(model)
    pipe = pipeline("image-text-to-text", model=loaded, processor=processor, device=device)

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text, keep="\n\t"), stream_end)

    streamer = (
        None
        if as_json
        else Streamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
    if max_new_tokens is None:  # generate shortens a limit in generation_config to fit
        config = copy.deepcopy(loaded.generation_config)
        config.update(do_sample=False, max_new_tokens=config.max_new_tokens or 256)
        settings = {"generation_config": config}
    outputs = pipe(
        text=[{"role": "user", "content": parts}],
        return_full_text=False,
        generate_kwargs={"streamer": streamer, **settings},
    )
    if as_json:
        answer = outputs[0]["generated_text"].strip()
        say_json({"image": image, "question": question, "answer": answer})


@app.command()
@report_mistakes
def analyze(
    image: Annotated[str, typer.Argument(help="Path or URL of an image.")],
    out: Annotated[Path, typer.Option(help="Folder to write analysis.json and the figures to.")],
    question: Annotated[
        str, typer.Option("--question", "-q", help="Question to ask about the image.")
    ] = "What is this?",
    answer: Annotated[
        str | None,
        typer.Option(
            help="Answer whose attention to measure. Default: the answer that the model generates."
        ),
    ] = None,
    model: ModelOption = None,
    without: Annotated[
        str | None,
        typer.Option(
            help="Second model to compare with, usually one without the modality-adaptive module."
        ),
    ] = None,
    unrelated: Annotated[
        str | None,
        typer.Option(
            help="Image that has nothing to do with the question, to test whether it changes the "
            "answer."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an analysis that is already in --out.")
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Show what a model attends to.

    Measure the attention to text and to image tokens in each layer, and draw the parts of the image
    that each learnable query attends to.
    """
    from ..analysis import analyze as analyze_model
    from ..analysis import check_target, plots  # noqa: F401, before the model runs: matplotlib may be missing

    check_target(out, overwrite)

    def analyze_loaded(name: str | None, answer: str | None) -> Any:
        loaded, processor = load(name, device)
        return analyze_model(
            loaded,
            processor,
            image,
            question,
            answer=answer,
            unrelated=unrelated,
            max_new_tokens=max_new_tokens,
            name=name or "the bundled model",
        )

    # One after the other, so that memory for one model is enough.
    found = analyze_loaded(model, answer)
    if without is not None:
        found.compare_with(analyze_loaded(without, found.answer))
    files = found.save(out, overwrite)
    if as_json:
        say_json({**found.to_dict(with_maps=False), "out": str(out), "files": list(files)})
        return
    for line in found.summary():
        say(line)
    say(f"{out}: {', '.join(files)}")
