"""Options that several commands share."""

from enum import Enum
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Types of numbers of weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


JSON = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
AllowOutside = Annotated[
    bool,
    typer.Option(
        "--allow-outside", help="Rows may name images outside the folder and http(s) URLs."
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
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a model that stands in the target.")
]
Device = Annotated[str | None, typer.Option(help="Where to run, for instance cuda:0 or cpu.")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of a model; the small bundled one if not given."),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Folder or Hub id of a model; the small bundled one if not given."),
]
Levels = Annotated[
    str | None,
    typer.Option(
        help="Level words of your own, best first and separated by commas; evenly spaced."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(help="Prompt of your own, with <|image|> at the place of the image."),
]
OriginalReading = Annotated[
    bool,
    typer.Option(
        "--original-reading",
        help="Read files as the originals do: EXIF turns nothing, 16-bit grey is clipped.",
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of the machine's.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens; 1024.")]
