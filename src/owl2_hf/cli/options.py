"""Options that several commands share."""

from enum import Enum
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Data types of weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


JSON = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
AllowOutside = Annotated[
    bool,
    typer.Option(
        "--allow-outside",
        help="Also accept rows that name images outside the folder or at http(s) URLs.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Prompt, levels and preprocessing: one-align, deqa, q-instruct or "
        "q-instruct-boost. Default: the preset stored with the model, otherwise "
        "one-align."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a model that is already in the target folder.")
]
Device = Annotated[str | None, typer.Option(help="Device to run on, for example cuda:0 or cpu.")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of a model. Default: the small model in the package."),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Folder or Hub id of a model. Default: the small model in the package."),
]
Levels = Annotated[
    str | None,
    typer.Option(
        help="Your own level words, best first, separated by commas. Their values are evenly "
        "spaced."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(help="Your own prompt, with <|image|> where the image goes."),
]
OriginalReading = Annotated[
    bool,
    typer.Option(
        "--original-reading",
        help="Read files as the original code does: ignore EXIF orientation and clip 16-bit "
        "grey images.",
    ),
]
Host = Annotated[
    str, typer.Option(help="Address to listen on. Use 0.0.0.0 to listen on all network interfaces.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer, in tokens. Default: 1024.")
]
