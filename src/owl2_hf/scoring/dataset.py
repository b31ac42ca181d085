"""Score a whole data set into one file, with one process or several. Workers decode images.

A row of the output holds `image`, the row's other columns, `score`, `std`, the probability of each
level, and `error`, which says why a row has no score.
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from .batches import BatchScorer, Prepared, as_columns, output_names
from .parts import Table, check_kind
from .prefix import with_prefix
from .scorer import Scorer
from .sources import Row, Source, all_columns, open_sources

ROWS_OF_A_PART = 128


@dataclass(frozen=True)
class Summary:
    """What became of a data set.

    Args:
        rows: All of the output.
        errors: Those of them without a score.
        found: Those that an earlier run had scored, as far as this process met them.
    """

    rows: int
    errors: int
    found: int


def score_dataset(
    scorer: Scorer,
    sources: Sequence[Any],
    out: str | Path,
    task: str = "quality",
    column: str = "image",
    split: str | None = None,
    image_folder: str | Path | None = None,
    allow_outside: bool = False,
    num_workers: int | None = None,
    part_rows: int = ROWS_OF_A_PART,
    overwrite: bool = False,
) -> Summary | None:
    """Score a data set into a CSV or Parquet file.

    A run that ended early goes on where it stopped when it is called again. Where torchrun or
    accelerate started several processes, they share the rows, and the first of them writes the
    file.

    Args:
        sources, column, split, image_folder, allow_outside: As in
            `owl2_hf.scoring.sources.open_sources`.
        out: A `.csv` or `.parquet` file. Until it is whole, its rows are in the folder `OUT.parts`
            beside it.
        task: As for `Scorer`; for "video" the sources are videos.
        num_workers: Processes that decode; half the processors, at most 8, if not given. 0 decodes
            in this process.
        part_rows: Rows that are written together, rounded up to whole batches: what a killed
            process may lose.
        overwrite: Begin anew, whatever is there.

    Returns:
        The counts; `None` in all processes but the first.

    Raises:
        ValueError: If a source cannot be read, the output is there already or was begun with other
            settings, or the model gives NaN.
    """
    check_kind(out)
    scorer._prompt(task)
    ranks = Ranks()
    is_video = task == "video"
    found = open_sources(sources, column, split, image_folder, allow_outside, is_video)
    scorer = with_prefix(scorer)
    columns = all_columns(found)
    names = output_names(columns, scorer)
    table = _table(out, scorer, [(names[name], kind) for name, kind in columns.items()])
    part_rows = -(-part_rows // scorer.batch_size) * scorer.batch_size
    if ranks.is_first:
        table.begin(_settings(scorer, task, part_rows, table.names), overwrite)
    ranks.wait()
    run = _Run(scorer, task, table, names, part_rows, ranks)
    run.score(found, ranks.share_of(num_workers))
    ranks.wait()
    return Summary(*table.finish(run.parts), run.found) if ranks.is_first else None


class _Run:
    """One process's way through a data set."""

    def __init__(
        self,
        scorer: Scorer,
        task: str,
        table: Table,
        names: Mapping[str, str],
        part_rows: int,
        ranks: "Ranks",
    ):
        self.scorer, self.table, self.names = scorer, table, names
        self.part_rows, self.ranks = part_rows, ranks
        self.parts: list[Path] = []  # of all processes, in order
        self.found = 0
        self.batches = BatchScorer(scorer, task)
        # Batches that the workers are preparing: its part, its rows, and whether it is the part's
        # last.
        self.pending: deque[tuple[Path, list[Row], bool]] = deque()

    def score(self, sources: Sequence[Source], num_workers: int) -> None:
        loader = DataLoader(
            self.batches.prepare,
            batch_size=None,
            sampler=self._batches(sources),  # any iterable works here
            num_workers=num_workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # batches come ready
            worker_init_fn=_begin_worker,
        )
        with self._progress_bar(sources) as self.bar:
            done: list[dict[str, Any]] = []
            for prepared in loader:
                part, rows, is_last = self.pending.popleft()
                done += self._output(rows, prepared)
                if is_last:
                    self.table.write_part(part, done)
                    done = []
                self.bar.update(len(rows))

    def _batches(self, sources: Sequence[Source]) -> Iterator[list[Row]]:
        """The batches of this process's parts that are not there yet."""
        rows = (row for source in sources for row in source)
        size = self.scorer.batch_size
        for index in count():
            own = list(islice(rows, self.part_rows))
            if not own:
                return
            part = self.table.part(index, own)
            self.parts.append(part)
            if index % self.ranks.size != self.ranks.rank:
                continue
            if part.exists():
                self.found += len(own)
                if not self.bar.disable:
                    self.bar.initial += len(own)  # so that the bar shows this run's speed
                    self.bar.update(len(own))
                continue
            for start in range(0, len(own), size):
                batch = own[start : start + size]
                self.pending.append((part, batch, start + size >= len(own)))
                yield batch

    def _output(self, rows: Sequence[Row], prepared: Prepared) -> Iterator[dict[str, Any]]:
        for row, score in zip(rows, self.batches.scores(rows, prepared), strict=True):
            output = {self.names[name]: value for name, value in row.values.items()}
            yield {**output, "image": row.name, **as_columns(score)}

    def _progress_bar(self, sources: Sequence[Source]) -> tqdm:
        is_shown = sys.stderr.isatty() and self.ranks.is_first
        counts = [source.count() for source in sources] if is_shown else []
        total = None
        if counts and None not in counts:
            total = sum(counts) // self.ranks.size  # type: ignore[arg-type]
        return tqdm(total=total, unit=" images", disable=not is_shown, file=sys.stderr)


class Ranks:
    """The processes that share a data set; one, unless torchrun or accelerate started more.

    They only wait for each other, through gloo, and for as long as it takes: the slowest may need
    hours more.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_first, self._group = self.rank == 0, None
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(self._group)

    def share_of(self, num_workers: int | None) -> int:
        """Worker processes of each process, as many as asked for, or its share of this machine's
        processors.
        """
        if num_workers is not None:
            return num_workers
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return max(1, min(8, (os.cpu_count() or 1) // (2 * local)))


def local_device() -> str | None:
    """The GPU of this process among those that torchrun or accelerate started; `None` where there
    are none.
    """
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ['LOCAL_RANK']}"


def _table(out: str | Path, scorer: Scorer, columns: list[tuple[str, Any]]) -> Table:
    scores = ("score", "std", *scorer.levels)
    number = None
    if Path(out).suffix.lower() == ".parquet":
        from .tables import import_parquet

        number = import_parquet(out).float64()
    ends = [("image", None), *columns, *((name, number) for name in scores), ("error", None)]
    return Table(out, ends, scores)


def _settings(scorer: Scorer, task: str, part_rows: int, columns: Sequence[str]) -> dict[str, Any]:
    """What a run must not change when it goes on."""
    return {
        "model": str(getattr(scorer.model, "name_or_path", "")),
        "dtype": str(scorer.model.dtype),
        "preset": asdict(scorer.preset),
        "task": task,
        "batch size": scorer.batch_size,
        "part rows": part_rows,
        "crops": scorer.crops,
        "original reading": scorer.original_reading,
        "columns": list(columns),
    }


def _as_it_is(prepared: Prepared) -> Prepared:
    return prepared


def _begin_worker(index: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
