"""What a log folder holds for the Attention tab, read through TensorBoard's data provider.

Notable:
- both of TensorBoard's loaders are behind the provider, so neither files nor paths are seen here;
- runs and tags are looked up among those that the provider lists;
- what cannot be shown is counted and said in a line for each kind, beside what can.
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


class Missing(LookupError):
    """There is no such run, probe or step."""


class Problems:
    """Counts the records of each tag that cannot be shown, with the first reason of each kind."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, type], list[Any]] = {}

    def add(self, tag: str, error: RecordError) -> None:
        self._counts.setdefault((tag, type(error)), [0, str(error)])[0] += 1

    def lines(self) -> list[str]:
        """One line for each kind of trouble."""
        return [
            f"{count} record{'s' if count > 1 else ''} of {tag} cannot be shown: {reason}"
            for (tag, _), (count, reason) in self._counts.items()
        ]


class Reader:
    """Reads records for one request after another.

    Args:
        provider: TensorBoard's.
        samples: steps of a series at most, as `--samples_per_plugin` has it: None for all that are there, 0 as well.
    """

    def __init__(self, provider: DataProvider, samples: int | None = None) -> None:
        self._provider, self._samples = provider, samples or _ALL

    def mark(self, ctx: Any, experiment: str) -> str:
        """A text that changes whenever `runs` would give something else; takes no reading of data."""
        own = {"experiment_id": experiment, "plugin_name": PLUGIN}
        found = hashlib.sha256(f"{VERSION} {self._samples}".encode())
        for listed in (self._provider.list_tensors(ctx, **own), self._provider.list_blob_sequences(ctx, **own)):
            for run, tags in sorted(listed.items()):
                for tag, series in sorted(tags.items()):
                    found.update(repr((run, tag, series.max_step, series.max_wall_time)).encode())
        return found.hexdigest()[:32]

    def runs(self, ctx: Any, experiment: str) -> dict[str, Any]:
        """Every run with something for this tab: the contents of the route `/runs`."""
        own = {"experiment_id": experiment, "plugin_name": PLUGIN}
        names = {*self._provider.list_tensors(ctx, **own), *self._provider.list_blob_sequences(ctx, **own)}
        return {"version": VERSION, "runs": [self._run(ctx, experiment, name) for name in sorted(names)]}

    def probe(self, ctx: Any, experiment: str, run: str, number: int) -> dict[str, Any]:
        """The records of one probe image, ascending by step.  Raises `Missing`."""
        tag, problems = f"{PROBE}{number:02d}", Problems()
        found = self._tensors(ctx, experiment, run, [tag], problems)
        if tag not in found:
            raise Missing(f"there is no probe {number} in the run {run!r}")
        return {"steps": found[tag], "problems": problems.lines()}

    def pairs(self, ctx: Any, experiment: str, run: str, number: int, step: int) -> dict[str, Any]:
        """The pairs of one probe image at one step.  Raises `Missing`, and `RecordError` for a damaged one."""
        tag = f"{PAIRS}{number:02d}"
        for datum in self._blobs(ctx, experiment, run, [tag]).get(tag, ()):
            if datum.step == step and len(datum.values) == 1:
                data = self._provider.read_blob(ctx, blob_key=datum.values[0].blob_key)
                return _read(tag, data, step)
        raise Missing(f"there are no pairs of probe {number} at step {step} in the run {run!r}")

    def _run(self, ctx: Any, experiment: str, run: str) -> dict[str, Any]:
        problems = Problems()
        found = self._tensors(ctx, experiment, run, [RUN, STEPS], problems)
        info = found[RUN][-1] if found.get(RUN) else None
        if info is not None:
            del info["step"]
            for record in [each for each in found.get(STEPS, ()) if len(each["probes"]) != len(info["probes"])]:
                found[STEPS].remove(record)
                problems.add(STEPS, RecordError("the record is of another number of probes than the run"))
        blobs = self._blobs(ctx, experiment, run, None)
        pairs = sorted({datum.step for tag, series in blobs.items() if tag.startswith(PAIRS) for datum in series})
        lines = problems.lines()
        if info is None and not lines:
            lines = [f"there is no record {RUN}: the run is not written yet, or its file is damaged"]
        return {"run": run, "info": info, "steps": found.get(STEPS, []), "pairs": pairs, "problems": lines}

    def _tensors(
        self, ctx: Any, experiment: str, run: str, tags: Sequence[str], problems: Problems
    ) -> dict[str, list[dict[str, Any]]]:
        """The decoded records of one run by tag; a tag that is not there is not in the result."""
        found = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=self._samples,
            run_tag_filter=RunTagFilter(runs=[run], tags=list(tags)),
        )
        result = {}
        for tag, series in found.get(run, {}).items():
            records: dict[int, dict[str, Any]] = {}
            for datum in series:
                try:
                    records[datum.step] = _read(tag, _bytes(datum.numpy), datum.step)
                except RecordError as error:
                    problems.add(tag, error)
            result[tag] = [records[step] for step in sorted(records)]
        return result

    def _blobs(self, ctx: Any, experiment: str, run: str, tags: Sequence[str] | None) -> Mapping[str, Any]:
        found = self._provider.read_blob_sequences(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=self._samples,
            run_tag_filter=RunTagFilter(runs=[run], tags=None if tags is None else list(tags)),
        )
        return found.get(run, {})


def _read(tag: str, data: bytes, step: int) -> dict[str, Any]:
    record = decode(data)
    record["step"] = step  # TensorBoard's word counts, so that series agree with each other
    check(tag, record)
    return record


def _bytes(value: Any) -> bytes:
    """The one text of a tensor, whatever shape the loader gives it."""
    items: Iterator[Any] = iter(value.ravel().tolist())
    data = next(items, None)
    if not isinstance(data, bytes):
        raise RecordError("the record is damaged: not bytes")
    return data
