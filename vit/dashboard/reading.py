"""Read the records of the Attention tab through TensorBoard's data provider.

Notes:
- the provider hides files and paths, and works with both of TensorBoard's loaders;
- runs and tags are looked up in the provider's lists;
- records that cannot be shown are counted and reported, one line for each kind, beside the others.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensorboard.data.provider import DataProvider, RunTagFilter

from vit.dashboard.check import check
from vit.dashboard.format import PAIRS, PLUGIN, PROBE, RUN, STEPS, VERSION, RecordError, decode

_ALL = 100_000  # samples a series: more than anyone keeps

log = logging.getLogger("vit")


class NotFound(LookupError):
    """Reports that there is no such run, probe or step."""


class Problems:
    """Counts the records of each tag that cannot be shown, and keeps the first reason of each kind."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, type], list[Any]] = {}

    def add(self, tag: str, error: RecordError) -> None:
        self._counts.setdefault((tag, type(error)), [0, str(error)])[0] += 1

    def lines(self) -> list[str]:
        """Format one line for each tag and kind of error."""
        return [
            f"{count} record{'s' if count > 1 else ''} of {tag} cannot be shown: {reason}"
            for (tag, _), (count, reason) in self._counts.items()
        ]


class Reader:
    """Reads records for requests.

    Args:
        provider: TensorBoard's data provider.
        samples: largest number of steps of a series, from `--samples_per_plugin`; None or 0: all.
    """

    def __init__(self, provider: DataProvider, samples: int | None = None) -> None:
        self._provider, self._samples = provider, samples or _ALL

    def etag(self, ctx: Any, experiment: str) -> str:
        """Hash the lists of runs and steps, without reading data: it changes whenever the result of `runs` does."""
        query = {"experiment_id": experiment, "plugin_name": PLUGIN}
        digest = hashlib.sha256(f"{VERSION} {self._samples}".encode())
        for listed in (self._provider.list_tensors(ctx, **query), self._provider.list_blob_sequences(ctx, **query)):
            for run, tags in sorted(listed.items()):
                for tag, series in sorted(tags.items()):
                    digest.update(repr((run, tag, series.max_step, series.max_wall_time)).encode())
        return digest.hexdigest()[:32]

    def runs(self, ctx: Any, experiment: str) -> dict[str, Any]:
        """Read every run with records of this tab: the response of the route `/runs`."""
        query = {"experiment_id": experiment, "plugin_name": PLUGIN}
        names = {*self._provider.list_tensors(ctx, **query), *self._provider.list_blob_sequences(ctx, **query)}
        return {"version": VERSION, "runs": [self._run(ctx, experiment, name) for name in sorted(names)]}

    def probe(self, ctx: Any, experiment: str, run: str, number: int) -> dict[str, Any]:
        """Read the records of one probe image, ascending by step.  Raises `NotFound`."""
        tag, problems = f"{PROBE}{number:02d}", Problems()
        records = self._tensors(ctx, experiment, run, [tag], problems)
        if tag not in records:
            raise NotFound(f"there is no probe {number} in the run {run!r}")
        return {"steps": records[tag], "problems": problems.lines()}

    def pairs(self, ctx: Any, experiment: str, run: str, number: int, step: int) -> dict[str, Any]:
        """Read the pairs of one probe image at one step.  Raises `NotFound`, and `RecordError` if it is damaged."""
        tag = f"{PAIRS}{number:02d}"
        for datum in self._blobs(ctx, experiment, run, [tag]).get(tag, ()):
            if datum.step == step and len(datum.values) == 1:
                data = self._provider.read_blob(ctx, blob_key=datum.values[0].blob_key)
                return _read(tag, data, step)
        raise NotFound(f"there are no pairs of probe {number} at step {step} in the run {run!r}")

    def _run(self, ctx: Any, experiment: str, run: str) -> dict[str, Any]:
        problems = Problems()
        records = self._tensors(ctx, experiment, run, [RUN, STEPS], problems)
        info = records[RUN][-1] if records.get(RUN) else None
        if info is not None:
            del info["step"]
            for record in [step for step in records.get(STEPS, ()) if len(step["probes"]) != len(info["probes"])]:
                records[STEPS].remove(record)
                problems.add(STEPS, RecordError("the record is of another number of probes than the run"))
        blobs = self._blobs(ctx, experiment, run, None)
        pairs = sorted({datum.step for tag, series in blobs.items() if tag.startswith(PAIRS) for datum in series})
        lines = problems.lines()
        if info is None and not lines:
            lines = [f"there is no record {RUN}: the run is not written yet, or its file is damaged"]
        return {"run": run, "info": info, "steps": records.get(STEPS, []), "pairs": pairs, "problems": lines}

    def _tensors(
        self, ctx: Any, experiment: str, run: str, tags: Sequence[str], problems: Problems
    ) -> dict[str, list[dict[str, Any]]]:
        """Decode the records of one run by tag; a tag without data is not in the result."""
        series_by_run = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=self._samples,
            run_tag_filter=RunTagFilter(runs=[run], tags=list(tags)),
        )
        result = {}
        for tag, series in series_by_run.get(run, {}).items():
            records: dict[int, dict[str, Any]] = {}
            for datum in series:
                try:
                    records[datum.step] = _read(tag, _bytes(datum.numpy), datum.step)
                except RecordError as error:
                    problems.add(tag, error)
            result[tag] = [records[step] for step in sorted(records)]
        return result

    def _blobs(self, ctx: Any, experiment: str, run: str, tags: Sequence[str] | None) -> Mapping[str, Any]:
        series_by_run = self._provider.read_blob_sequences(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=self._samples,
            run_tag_filter=RunTagFilter(runs=[run], tags=None if tags is None else list(tags)),
        )
        return series_by_run.get(run, {})


def _read(tag: str, data: bytes, step: int) -> dict[str, Any]:
    record = decode(data)
    record["step"] = step  # TensorBoard's step, so that all series agree
    check(tag, record)
    return record


def _bytes(value: Any) -> bytes:
    """Read the one text of a tensor of any shape."""
    items: Iterator[Any] = iter(value.ravel().tolist())
    data = next(items, None)
    if not isinstance(data, bytes):
        raise RecordError("the record is damaged: not bytes")
    return data
