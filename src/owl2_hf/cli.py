"""The `owl2-hf` command."""

import copy
import csv
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from .naming import DEFAULT_MODEL, naming_model
from .printing import printable

app = typer.Typer(
    help="mPLUG-Owl2 and its family: ask about pictures, look into checkpoints, convert them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say(line: str, err: bool = False) -> None:
    """Print one line; names and texts of files cannot steer the terminal or forge a second line."""
    typer.echo(printable(line), err=err)


def _say_json(value: Any) -> None:
    typer.echo(json.dumps(value))  # which escapes all but ASCII itself


JSON = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
AllowOutside = Annotated[
    bool,
    typer.Option(
        "--allow-outside", help="Rows may name pictures outside the folder and http(s) URLs."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="one-align, deqa, q-instruct or q-instruct-boost: prompt, levels, preprocessing; if not given that of a "
        "model's own training, else one-align."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


# Libraries that write to the screen while they are imported, about parts of theirs that no command needs.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


def _silence_start_up() -> None:
    """Keep warnings of other libraries' imports off the screen; their errors stay."""
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # what is wrong with an image is in the error
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _report_mistakes(command: Callable) -> Callable:
    """A user's mistake ends in one line and exit code 1, never in a traceback."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        _silence_start_up()
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _say("owl2-hf: interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if kwargs.get("debug"):
                raise
            from huggingface_hub.errors import StrictDataclassError

            is_mistake = isinstance(error, (ValueError, OSError, StrictDataclassError))
            message = (
                str(error)
                if is_mistake
                else f"unexpected {type(error).__name__}: {error}; --debug shows where"
            )
            _say(f"owl2-hf: {' '.join(message.split())}", err=True)
            raise typer.Exit(1) from None

    return wrapped


@app.command()
@_report_mistakes
def describe(
    image: Annotated[
        str | None, typer.Argument(help="Path or URL of a picture; a bundled one if not given.")
    ] = None,
    question: Annotated[
        str, typer.Option("--question", "-q", help="What to ask about it.")
    ] = "What is this?",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a model; the small bundled one if not given."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest answer, in tokens; the model's own setting if not given, or 256."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to run, for instance cuda:0 or cpu.")
    ] = None,
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

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text, keep="\n\t"), stream_end)

    streamer = (
        None
        if as_json
        else Streamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
    if max_new_tokens is None:  # in a generation config it is cut to what the context leaves
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
        _say_json({"image": image, "question": question, "answer": answer})


@app.command()
@_report_mistakes
def info(
    folder: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id of a model; the small bundled one if not given."),
    ] = None,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Show components, parameters, tokens of a picture or crop, preprocessing and dtype; the weights are not loaded."""
    facts = _facts(_place(folder))
    if as_json:
        _say_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            for component, count in value.items():
                _say(f"{name + ': ' + component:32} {count:>14,}")
        else:
            _say(f"{name:32} {value if isinstance(value, str) else format(value, ','):>14}")


class Dtype(str, Enum):
    """Types of numbers of weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
@_report_mistakes
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
    from .checks import check as run

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


_CONVERT_HELP = """Convert a checkpoint of the original into a folder that transformers loads, or back.

SOURCE is recognised by what it holds, not by its name:

\b
- the original's Hugging Face layout: config.json with pytorch_model.bin, numbered .bin shards or safetensors
  (mPLUG-Owl2, Q-Align, OneAlign, Q-Instruct, Co-Instruct, Compare2Score, DeQA-Score, DocOwl 1.5, mPLUG-Owl2.1)
- Megatron: release/, iter_*/ with its tracker file, or mp_rank_00/ ...; one or several tensor-parallel ranks;
  config.json and tokenizer come from --base, the published model's sizes are taken without it
- a LoRA fine-tune: adapter_config.json, the adapter and non_lora_trainables.bin; needs its --base model
- this package's own format: nothing to do, unless for --to original or another --dtype
"""


class Target(str, Enum):
    """Layouts that `convert` writes."""

    ours = "ours"
    original = "original"
    adapter = "adapter"


Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a model that stands in the target.")
]


class Scale(str, Enum):
    """Scales of `score`."""

    one_to_five = "1-5"
    zero_to_one = "0-1"


@app.command()
@_report_mistakes
def score(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders of images, videos; for task video also folders of videos or of a video's frames."
        ),
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a model that scores.")],
    preset: Preset = None,
    task: Annotated[
        str,
        typer.Option(
            help="quality, for a video of each frame; with one-align also aesthetics or video."
        ),
    ] = "quality",
    scale: Annotated[
        Scale | None, typer.Option(help="Lowest and highest score; the preset's if not given.")
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            help="Level words of your own, best first and separated by commas; evenly spaced."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt of your own, with <|image|> at the place of the picture."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images or crops in one forward pass.")
    ] = 8,
    crops: Annotated[
        bool,
        typer.Option(
            "--crops",
            help="Average over squares at the image's own resolution; not how the papers score, and slower.",
        ),
    ] = False,
    original_reading: Annotated[
        bool,
        typer.Option(
            "--original-reading",
            help="Read files as the originals do: EXIF turns nothing, 16-bit grey is clipped.",
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to run, for instance cuda:0 or cpu.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object in a line for each picture.")
    ] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values, the names first.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Score pictures or videos by the probabilities of level words.

    Of a video one frame a second counts. What cannot be read is named on stderr, the others are scored, and the exit
    code is 1.
    """
    from .scoring import Scorer, custom_preset, score_paths
    from .scoring.presets import preset_for

    if as_json and as_csv:
        _say("owl2-hf: give one of --json and --csv, not both", err=True)
        raise typer.Exit(2)
    with naming_model(model):
        own = preset_for(_place(model), preset)
    chosen = custom_preset(own, task, prompt, levels.split(",") if levels else None)
    bounds = None if scale is None else tuple(float(bound) for bound in scale.value.split("-"))
    loaded, processor = _load(model)
    loaded = loaded.to(device) if device else loaded
    scorer = Scorer(loaded, processor, chosen, bounds, batch_size, crops, original_reading)  # type: ignore[arg-type]
    table = csv.writer(sys.stdout, lineterminator="\n")
    if as_csv:
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # names keep their bytes
        table.writerow(["image", "score", "std", *scorer.levels])
    failed = 0
    for name, found in score_paths(scorer, images, task):
        if isinstance(found, ValueError):
            failed += 1
            message = " ".join(str(found).split())
            _say(f"owl2-hf: {message if name in message else f'{name}: {message}'}", err=True)
        elif as_json:
            _say_json({"image": name, **vars(found)})
        elif as_csv:
            shown = printable(name) if sys.stdout.isatty() else name
            table.writerow(
                [shown, *(f"{value:.6f}" for value in (found.score, found.std, *found.probs))]
            )
        else:
            low, high = found.scale
            _say(f"{found.score:.4f} of {low:g} to {high:g}, std {found.std:.4f}  {name}")
    if failed:
        raise typer.Exit(1)


@app.command(name="evaluate-scores")
@_report_mistakes
def evaluate_scores(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model that scores.")],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Opinions: CSV, JSON, JSON lines, Parquet, or a data set, with image and mos."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="In place of DATA koniq, spaq, kadid, livec, agiqa, csiq, ava or lsvq, with --root."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark, as it was unpacked.")
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="What paths of images start from; the file's own folder if not given."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Judge by this part of the rows alone.")] = None,
    preset: Preset = None,
    task: Annotated[
        str, typer.Option(help="quality; with one-align also aesthetics or video.")
    ] = "quality",
    levels: Annotated[
        str | None,
        typer.Option(
            help="Level words of your own, best first and separated by commas; evenly spaced."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt of your own, with <|image|> at the place of the picture."),
    ] = None,
    splits: Annotated[
        int, typer.Option(min=0, help="Also the median over this many random fifths of the images.")
    ] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Draws for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of splits and draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 8,
    original_reading: Annotated[
        bool,
        typer.Option(
            "--original-reading",
            help="Read files as the originals do: EXIF turns nothing, 16-bit grey is clipped.",
        ),
    ] = False,
    allow_outside: AllowOutside = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw opinions over scores, with the fit, to this file.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Write a model card with the results, a README.md.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to run, for instance cuda:0 or cpu.")
    ] = None,
    as_json: JSON = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values, the names first.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Judge a scorer by people's opinions: SRCC, KRCC, PLCC before and after the logistic fit, RMSE, with intervals.

    With standard deviations of the opinions also KL, JS and Wasserstein distances. What cannot be scored is named on
    stderr, the others count, and the exit code is 1.
    """
    from .scoring import Scorer, custom_preset, evaluate, load_opinions
    from .scoring.benchmarks import read_benchmark
    from .scoring.card import check_new, write_score_card
    from .scoring.judging import check_plot
    from .scoring.presets import preset_for

    if as_json and as_csv:
        _say("owl2-hf: give one of --json and --csv, not both", err=True)
        raise typer.Exit(2)
    if (data is None) == (benchmark is None) or (benchmark is None) != (root is None):
        _say("owl2-hf: give opinions, or --benchmark with --root", err=True)
        raise typer.Exit(2)
    if plot is not None:
        check_plot(plot)
    if card is not None:
        check_new(card)
    if benchmark is not None and root is not None:
        opinions = read_benchmark(benchmark, root, split)
    else:
        opinions = load_opinions(data, image_folder, split, allow_outside)
    with naming_model(model):
        own = preset_for(_place(model), preset)
    chosen = custom_preset(own, task, prompt, levels.split(",") if levels else None)
    loaded, processor = _load(model)
    loaded = loaded.to(device) if device else loaded
    scorer = Scorer(
        loaded, processor, chosen, batch_size=batch_size, original_reading=original_reading
    )

    def show_progress(images: int) -> None:
        if images % 1000 == 0:
            _say(f"{images:,} of {len(opinions):,} images", err=True)

    report = evaluate(scorer, opinions, task, splits, samples, seed, show_progress)
    for opinion, error in report.failed:
        _say(
            f"owl2-hf: {opinions.name}: row {opinion.row}: {' '.join(str(error).split())}", err=True
        )
    if as_json:
        _say_json(report.to_dict())
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(report.table())
    else:
        for line in report.lines():
            _say(line)
    if plot is not None:
        report.plot(plot)
    if card is not None:
        name = benchmark or (Path(str(data)).name if Path(str(data)).exists() else str(data))
        write_score_card(
            card, report, chosen, name if split is None else f"{name}, part {split}", task
        )
    if report.failed:
        raise typer.Exit(1)


@app.command()
@_report_mistakes
def analyze(
    image: Annotated[str, typer.Argument(help="Path or URL of a picture.")],
    out: Annotated[Path, typer.Option(help="Folder to write analysis.json and the figures to.")],
    question: Annotated[
        str, typer.Option("--question", "-q", help="What to ask about it.")
    ] = "What is this?",
    answer: Annotated[
        str | None,
        typer.Option(help="Answer whose attention is read; the model's own if not given."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a model; the small bundled one if not given."),
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(help="Model to compare with, usually without the modality-adaptive module."),
    ] = None,
    unrelated: Annotated[
        str | None,
        typer.Option(
            help="Picture that has nothing to do with the question: does it disturb the answer?"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    device: Annotated[
        str | None, typer.Option(help="Where to run, for instance cuda:0 or cpu.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an analysis that stands in --out.")
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Show what a model attends to: text or picture, layer by layer, and where its learnable queries look."""
    from .analysis import analyze as analyze_model
    from .analysis import check_target, plots  # noqa: F401, before the model runs: matplotlib may be missing

    check_target(out, overwrite)

    def analyze_loaded(name: str | None, answer: str | None) -> Any:
        loaded, processor = _load(name)
        return analyze_model(
            loaded.to(device) if device else loaded,
            processor,
            image,
            question,
            answer=answer,
            unrelated=unrelated,
            max_new_tokens=max_new_tokens,
            name=name or "the bundled model",
        )

    # One after the other, so that two large models need not fit side by side.
    found = analyze_loaded(model, answer)
    if without is not None:
        found.compare_with(analyze_loaded(without, found.answer))
    files = found.save(out, overwrite)
    if as_json:
        _say_json({**found.to_dict(with_maps=False), "out": str(out), "files": list(files)})
        return
    for line in found.summary():
        _say(line)
    _say(f"{out}: {', '.join(files)}")


@app.command(help=_CONVERT_HELP)
@_report_mistakes
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
    from .conversion import convert as convert_checkpoint

    report = convert_checkpoint(
        source,
        target,
        to=to.value,
        base=base,
        tokenizer=tokenizer,
        dtype=dtype and dtype.value,
        max_shard_size=max_shard_size,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        on_file=lambda name: _say(f"reading {name}", err=True),
    )
    if as_json:
        _say_json(vars(report))
    elif report.is_noop:
        _say(
            f"{source} is in this package's format already: nothing to convert, {target} was not made"
        )
    else:
        _say(f"{target}: {report.summary()}")


@app.command()
@_report_mistakes
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
    from .conversion.verify import verify as verify_folder

    checks = verify_folder(target, against, base)
    if as_json:
        _say_json({"ok": True, "checks": checks})
        return
    for check in checks:
        _say(f"- {check}")
    _say("ok")


@app.command()
@_report_mistakes
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
            min=1, help="Side of a picture in pixels; the vision model's own if not given."
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
    from .conversion import initialize

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
        _say_json(vars(report))
        return
    _say(f"{target}: {report.summary()}")
    for note in report.notes:
        _say(f"- {note}")


@app.command()
@_report_mistakes
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model, or 'default'.")],
    target: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Write vision encoder and connector as an ONNX file, and compare what it computes with torch."""
    from .export import export_vision

    difference = export_vision(_place(model), target)
    if as_json:
        _say_json({"file": str(target), "difference": difference})
        return
    _say(f"{target}: pixel_values to image_features, at most {difference:.1e} from torch")


@app.command()
@_report_mistakes
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="YAML file, or one of pretrain, instruct, lora, qlora, visual-branch, score, score-lora, score-soft, "
            "score-soft-lora."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id to train; default for the bundled one.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows to train on: .json, .jsonl, a saved data set or Hub id; opinions for a scorer; repeatable."
        ),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="Where relative paths of pictures start; the folder of the file if not given."
        ),
    ] = None,
    allow_outside: AllowOutside = False,
    out: Annotated[Path | None, typer.Option(help="Folder to make.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the recipe, for instance trainer.max_steps=100."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would train; take no step.")
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Train a model as a recipe says; several processes: torchrun --nproc-per-node N -m owl2_hf train ...

    Options win over the recipe. The folder holds the trained model, its recipe, and the curve of the losses.
    """
    from contextlib import redirect_stdout

    from .training.components import format_table
    from .training.recipe import load_recipe
    from .training.run import train as run

    given: list[str] = [] if model is None else [f"model={json.dumps(model)}"]
    given += [f"data.train={json.dumps(data)}"] if data else []
    given += (
        [f"data.image_folder={json.dumps(str(image_folder))}"] if image_folder is not None else []
    )
    given += ["data.allow_outside=true"] if allow_outside else []
    given += [f"output_dir={json.dumps(str(out))}"] if out is not None else []
    loaded = load_recipe(recipe, [*(settings or []), *given])

    def show(rows: Any) -> None:
        for line in format_table(rows).split("\n"):
            _say(line, err=True)

    with redirect_stdout(sys.stderr):  # where the Trainer's log belongs
        report = run(loaded, resume, dry_run, show)
    if as_json:
        _say_json(dataclasses.asdict(report))
    elif not dry_run:
        _say(f"{report.output_dir}: {report.summary()}")


@app.command()
@_report_mistakes
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
    from .hub import push as push_folder

    report = push_folder(folder, repo_id, private or None, revision, create_pr, dry_run)
    if as_json:
        _say_json(vars(report))
        return
    for name, size in report.files:
        _say(f"{size:>16,}  {name}")
    total = f"{len(report.files)} files, {sum(size for _, size in report.files):,} bytes"
    _say(f"{total} would go to {report.repo_id}" if dry_run else f"{total}: {report.url}")


@app.command()
@_report_mistakes
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id of a model; the small bundled one if not given."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all of the machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")
    ] = 8000,
    max_image_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Most pixels of all pictures of a request together; 89,478,485."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; 1024.")
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(min=1, help="Largest body of a request; 32 MiB.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="OWL2_HF_API_KEY", help="What clients must send; anyone may ask if not given."
        ),
    ] = None,
    allow_image_urls: Annotated[
        bool,
        typer.Option(
            "--allow-image-urls", help="Also fetch pictures from http(s) URLs on public addresses."
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to run, for instance cuda:0 or cpu.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI's clients; SIGTERM or Ctrl-C ends it."""
    from .serving import ServerSettings, bind, build_app
    from .serving import serve as run

    limits = {
        "max_image_pixels": max_image_pixels,
        "max_new_tokens": max_new_tokens,
        "max_body_bytes": max_body_bytes,
    }
    given = {name: limit for name, limit in limits.items() if limit is not None}
    settings = ServerSettings(**given, allow_image_urls=allow_image_urls, api_key=api_key)
    with bind(host, port) as sock:
        loaded, processor = _load(model)
        name = model or DEFAULT_MODEL
        served = build_app(name, loaded.to(device) if device else loaded, processor, settings)
        run(served, sock, lambda url: _say(f"serving {name} at {url}"))


@app.command()
@_report_mistakes
def demo(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id of a model; the small bundled one if not given."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all of the machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")
    ] = 7860,
    share: Annotated[
        bool,
        typer.Option(
            "--share", help="Also ask Gradio's servers for a public address, open to everybody."
        ),
    ] = False,
    max_image_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Most pixels of all pictures of a chat together; 89,478,485."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; 1024.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to run, for instance cuda:0 or cpu.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Open a web page to chat about pictures, score them, and see what a model attends to; Ctrl-C ends it."""
    from .demo import DemoSettings, build_page, show
    from .limits import bind

    limits = {"max_image_pixels": max_image_pixels, "max_new_tokens": max_new_tokens}
    settings = DemoSettings(**{name: limit for name, limit in limits.items() if limit is not None})
    with bind(host, port) as sock:
        loaded, processor = _load(model)
        name = model or DEFAULT_MODEL
        page = build_page(loaded.to(device) if device else loaded, processor, name, settings)
        show(page, sock, share, lambda url: _say(f"showing {name} at {url}"))


data_app = typer.Typer(help="Training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


@data_app.callback()
def _data() -> None:
    """Training data."""


@data_app.command(name="check")
@_report_mistakes
def check_data(
    file: Annotated[
        str,
        typer.Argument(
            help="LLaVA's JSON, JSON lines, a folder saved by datasets, or the id of a data set on the Hub; opinions "
            "also as CSV or Parquet."
        ),
    ],
    image_folder: Annotated[
        Path | None,
        typer.Option(help="What paths of pictures start from; the file's own folder if not given."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the model to train: also counts tokens, pictures included."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="With --model: count rows that this many positions truncate."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set that has several.")] = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a data set of the Hub as it arrives.")
    ] = False,
    allow_outside: AllowOutside = False,
    skip_pictures: Annotated[
        bool,
        typer.Option(
            "--skip-pictures", help="Do not open pictures, only see whether the files are there."
        ),
    ] = False,
    opinions: Annotated[
        bool,
        typer.Option(
            "--opinions", help="Rows are opinions of images (image, mos); files are recognised."
        ),
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Name every row that cannot be learned from, and why, and count the others.

    Rows are numbered from 1, rows of JSON lines and CSV by their line. The exit code is 1 where rows are bad. An
    opinion is bad, too, where its image is in another part of the data set; duplicates are named.
    """
    from .scoring.opinions import OpinionReport, check_opinions, is_opinions
    from .training.data import DataReport, check_rows

    if model is None and max_length is not None:
        raise ValueError("--max-length counts tokens, which needs --model.")
    if model is not None and skip_pictures:
        raise ValueError("--model looks into pictures: leave out --skip-pictures, or --model.")
    if model is not None and opinions:
        raise ValueError(
            "--model counts tokens of conversations: leave out --opinions, or --model."
        )

    def show_progress(rows: int) -> None:
        if rows % 10_000 == 0:
            _say(f"{rows:,} rows", err=True)

    report: OpinionReport | DataReport
    if opinions or (model is None and is_opinions(file)):
        report = check_opinions(file, image_folder, not skip_pictures, allow_outside, show_progress)
    else:
        report = check_rows(
            file,
            image_folder,
            None if model is None else _load_processor(model),
            max_length,
            split,
            streaming,
            open_images=not skip_pictures,
            allow_outside=allow_outside,
            on_row=show_progress,
        )
    if as_json:
        _say_json(asdict(report))
    else:
        for bad in [*report.bad, *(report.duplicates if isinstance(report, OpinionReport) else ())]:
            identity = "" if bad.id is None else f" (id {bad.id!r})"
            _say(f"row {bad.row}{identity}: {' '.join(bad.reason.split())}")
        for line in report.summary().split("\n"):
            _say(line)
    if report.bad:
        raise typer.Exit(1)


def _load(model: str | None) -> tuple[Any, Any]:
    """A model and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    if model in (None, DEFAULT_MODEL):
        from .default import load_default

        logging.disable_progress_bar()  # it takes no time
        return load_default()
    with naming_model(model):
        return AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(
            model
        )


def _load_processor(model: str) -> Any:
    from transformers import AutoProcessor

    with naming_model(model):
        return AutoProcessor.from_pretrained(_place(model))


def _place(model: str | None) -> str:
    """What `from_pretrained` takes for a model's name."""
    from .default import default_dir

    return str(default_dir()) if model in (None, DEFAULT_MODEL) else str(model)


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
    square = "crop" if is_cropped else "picture"
    return {
        "model": folder,
        "parameters": {**parameters, "total": sum(parameters.values())},
        f"tokens per {square}": config.num_image_tokens,
        f"{square} size": config.vision_config.image_size,
        "preprocessing": preprocessing,
        "context length": config.text_config.max_position_embeddings,
        "dtype": str(config.dtype).removeprefix("torch."),
    }
