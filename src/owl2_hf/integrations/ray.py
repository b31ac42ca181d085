"""Score a data set on a Ray cluster with Ray Data. Each actor holds the model.

Ray Data restarts a killed actor and repeats its unfinished work.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow
import ray
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..naming import naming_model
from ..naming import place as named
from ..scoring import Scorer, custom_preset
from ..scoring.batches import BatchScorer, as_columns, output_names
from ..scoring.prefix import with_prefix
from ..scoring.presets import preset_for
from ..scoring.sources import row_of
from ..training.messages import Place


def add_scores(
    rows: "ray.data.Dataset",
    model: str,
    *,
    preset: str | None = None,
    task: str = "quality",
    scale: tuple[float, float] | None = None,
    levels: Sequence[str] | None = None,
    prompt: str | None = None,
    batch_size: int = 8,
    crops: bool = False,
    original_reading: bool = False,
    dtype: str = "auto",
    column: str = "image",
    image_folder: str | None = None,
    allow_outside: bool = False,
    num_actors: int = 1,
    num_gpus: float = 0,
    **options: Any,
) -> "ray.data.Dataset":
    """The rows with `score`, `std`, the probability of each level, and `error`, which says why a
    row has no score.

    A column of the rows that has such a name becomes `input_score` and so on.

    Args:
        rows: For instance `ray.data.read_parquet(...)`.
        model: Folder or Hub id that every node can read.
        preset, task, scale, levels, prompt, batch_size, crops, original_reading: As for `owl2-hf
            score`.
        dtype: As `from_pretrained` takes it.
        column: Holds a path that every node can read, bytes, or the `{"bytes", "path"}` of
            `datasets`.
        image_folder: Where relative paths start; the actors' working directory if not given.
        allow_outside: Rows may name images outside the folder and http(s) URLs.
        num_actors: Each holds the model.
        num_gpus: Of each actor; 0 for the CPU.
        options: Others of `ray.data.Dataset.map_batches`.

    Returns:
        A data set that computes nothing until it is written or read.
    """
    setting = {
        "model": model,
        "preset": preset,
        "task": task,
        "scale": scale,
        "levels": levels,
        "prompt": prompt,
        "batch_size": batch_size,
        "crops": crops,
        "original_reading": original_reading,
        "dtype": dtype,
        "column": column,
        "place": Place(image_folder, allow_outside),
    }
    return rows.map_batches(
        Actor,
        fn_constructor_kwargs=setting,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=num_gpus,
        **options,
    )


class Actor:
    """A model that scores the batches that Ray Data sends; see `add_scores`."""

    def __init__(
        self,
        model: str,
        preset: str | None,
        task: str,
        scale: tuple[float, float] | None,
        levels: Sequence[str] | None,
        prompt: str | None,
        batch_size: int,
        crops: bool,
        original_reading: bool,
        dtype: str,
        column: str,
        place: Place,
    ):
        self.column, self.place = column, place
        with naming_model(model):
            model = named(model)
            own = custom_preset(preset_for(model, preset), task, prompt, levels)
            loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).eval()
            processor = AutoProcessor.from_pretrained(model)
        # An actor sees only the GPUs that Ray gave it.
        loaded.to("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
        scorer = Scorer(loaded, processor, own, scale, batch_size, crops, original_reading)
        self.batches = BatchScorer(with_prefix(scorer), task)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        if self.column not in table.column_names:
            raise ValueError(
                f"expected the column {self.column}, got {', '.join(table.column_names)}."
            )
        images = table.select([self.column]).to_pylist()
        rows = [row_of(row, self.column, {}, self.place, "image") for row in images]
        scores = self.batches.scores(rows, self.batches.prepare[rows])
        found = [as_columns(score) for score in scores]
        names = output_names(table.column_names, self.batches.scorer)
        names[self.column] = self.column
        table = table.rename_columns([names[name] for name in table.column_names])
        for name in ("score", "std", *self.batches.scorer.levels):
            values = pyarrow.array([one.get(name) for one in found], pyarrow.float64())
            table = table.append_column(name, values)
        errors = pyarrow.array([one.get("error") for one in found], pyarrow.string())
        return table.append_column("error", errors)
