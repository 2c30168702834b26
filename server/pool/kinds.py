"""What a job of each kind does. A kind is one row: a name, its lane, and what runs it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.pool import builds
from server.pool.records import JobRecord, Kind
from server.pool.watching import Watch
from server.process.reports import BuildAnswer

LaneName = Literal["compute", "network", "search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a job works."""

    cache: Path
    progress: Path  # a file of reports.BuildReport, replaced while the job runs
    cache_max_bytes: int | None


# Returns when the work and every process of it have ended. Cancelling it ends them, and what was done so far
# stays to be gone on with; a server that was killed starts the same record again.
Runner = Callable[[JobRecord, Place, Watch], Awaitable[BuildAnswer]]


@dataclass(frozen=True, slots=True)
class Row:
    lane: LaneName
    run: Runner


async def _build(record: JobRecord, place: Place, watch: Watch) -> BuildAnswer:
    order = builds.build_order(record, place.cache, place.progress, place.cache_max_bytes)
    return await builds.run_child(order, watch)


async def _pull(record: JobRecord, place: Place, watch: Watch) -> BuildAnswer:
    return await builds.run_child(builds.pull_order(record, place.cache, place.progress), watch)


async def _measure(record: JobRecord, place: Place, watch: Watch) -> BuildAnswer:
    return await builds.run_child(builds.measure_order(record, place.progress), watch)


async def _search(record: JobRecord, place: Place, watch: Watch) -> BuildAnswer:
    return await builds.run_child(builds.search_order(record, place.progress), watch)


KINDS: Mapping[Kind, Row] = {
    "build": Row("compute", _build),
    "pull": Row("network", _pull),
    "measure": Row("compute", _measure),
    "search": Row("search", _search),  # for as long as an hour: what a request waits for must not wait for it
}
