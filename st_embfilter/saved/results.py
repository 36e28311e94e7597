"""Result rows, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from st_embfilter.errors import DataError
from st_embfilter.files.staging import replace_file
from st_embfilter.text import read_json

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Result:
    """One score: a configuration on a task. Its fields are the keys of `results.jsonl`.

    Scores are as MTEB gives them: correlations in [-1, 1], all others in [0, 1].

    Attributes:
        task: Name of the task.
        task_type: STS, Retrieval, Classification, Clustering ...
        dataset: Name of the data.
        revision: Version of the data; for local files a hash of their bytes.
        split: Part of the data.
        metric: Name of the score, as in MTEB.
        configuration: "raw", "truncate", "bulk", "offset:128", "whiten" ...
        dims: Width of the embeddings.
        full_dims: Width of the raw embeddings.
        start: First kept singular direction of a contiguous band.
        needs_data: Whether the configuration was fitted on texts.
        fitted_on: On which ones.
        score: The task's main score.
        low: Lower bound of the score's bootstrap interval, None where it cannot be resampled.
        high: Upper bound.
        delta: The score minus the raw model's.
        delta_low: Lower bound of the paired bootstrap interval of delta.
        delta_high: Upper bound.
        std: Standard deviation over seeds, for the mean over random directions.
        level: Coverage of the intervals.
        resamples: Bootstrap samples.
        units: Pairs, queries or texts that were resampled.
        model: Folder name or Hub id of the language model.
        prompt: Prompt recipe, None for plain text.
        pooling: Pooling mode.
        normalize: Whether embeddings had unit length.
        max_seq_length: Longest text in tokens.
        measured_by: Whose code computed the score, with its version.
        command: The command line that gave this row, if it was one.
        layers: Number of blocks that were run, in a sweep over depth; None for all of them.
    """

    task: str
    task_type: str
    dataset: str
    revision: str | None
    split: str
    metric: str
    configuration: str
    dims: int
    full_dims: int
    start: int | None
    needs_data: bool
    fitted_on: str | None
    score: float
    low: float | None
    high: float | None
    delta: float
    delta_low: float | None
    delta_high: float | None
    std: float | None
    level: float
    resamples: int
    units: int
    model: str | None
    prompt: str | None
    pooling: str | None
    normalize: bool
    max_seq_length: int | None
    measured_by: str
    command: str | None = None
    layers: int | None = None

    @property
    def verdict(self) -> str:
        """Sign of delta if its interval excludes zero, "=" if it does not, "?" without one."""
        if self.delta_low is None or self.delta_high is None:
            return "?"
        return "+" if self.delta_low > 0 else "-" if self.delta_high < 0 else "="

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


def write_results(rows: Iterable[Result], file: str | os.PathLike[str]) -> None:
    """Writes JSON Lines, or CSV if the name ends in .csv; the file is replaced at once."""
    stream = io.StringIO()
    if Path(file).suffix == ".csv":
        writer = csv.DictWriter(stream, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    else:
        stream.writelines(f"{row.to_json()}\n" for row in rows)
    replace_file(file, stream.getvalue().encode())


def read_results(file: str | os.PathLike[str]) -> list[Result]:
    """Reads JSON Lines that `write_results` wrote; unknown keys are left out.

    Raises:
        DataError: Names the file and the line.
    """
    path = Path(file)
    names = {field.name for field in fields(Result)}
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"the results must be readable, got {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = read_json(line, f"{path}, line {number}:", DataError)
            rows.append(Result(**{key: record[key] for key in record if key in names}))
        except TypeError as error:
            raise DataError(f"{path}, line {number}: must be a result row, got {error}") from error
    return rows


def results_frame(rows: Sequence[Result]) -> pd.DataFrame:
    """The rows as a pandas table."""
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows])
