"""What is counted and timed: vLLM's names behind our prefix, so that dashboards made for it work."""

import time
from collections import Counter as CountBy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quant.measure.measurement import Measurement
from server.api.choice import Finish
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.pool.states import Served
from server.types import Status

LABELS = ("model", "variant", "backend")
FIRST_TOKEN_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
BETWEEN_TOKENS_S = (
    0.002,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
WHOLE_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """Counts what passes through this process; what engines say of themselves is read when asked for."""

    def __init__(self, pool: Pool, jobs: Jobs) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.generation_tokens = self._counter("generation_tokens", "Tokens sampled")
        self.success = Counter(
            "quantserve:request_success",
            "Answers by the reason of their end; abort: an error, or a client that left",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        self.first_token = self._histogram("time_to_first_token_seconds", FIRST_TOKEN_S)
        self.between_tokens = self._histogram("inter_token_latency_seconds", BETWEEN_TOKENS_S)
        self.whole = self._histogram("e2e_request_latency_seconds", WHOLE_S)
        self.queued = self._histogram("request_queue_time_seconds", WHOLE_S)
        self.rejections = Counter(
            "quantserve:request_rejections",
            "Requests that were refused or failed, by the error's code",
            ("code",),
            registry=self.registry,
        )
        self.registry.register(EngineCollector(pool))
        self.registry.register(PoolCollector(pool, jobs))
        self.registry.register(VariantCollector(pool))
        ProcessCollector(registry=self.registry)

    def ended(self, route: str, status: int, code: str | None) -> None:
        """A request was answered; `code` where it was by an error."""
        if code is not None:
            self.rejections.labels(code).inc()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"quantserve:{name}", text, LABELS, registry=self.registry)

    def _histogram(self, name: str, buckets: Iterable[float]) -> Histogram:
        text = name.replace("_", " ")
        return Histogram(f"quantserve:{name}", text, LABELS, registry=self.registry, buckets=tuple(buckets))


class Meter:
    """Times one request from its arrival, load and queue included. What it counts is known to others at its
    end; a request that has to begin again counts once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived = time.perf_counter()
        self._labels: tuple[str, str, str] = ("", "", "")
        self._begun = False
        self._loaded_s = 0.0  # from the arrival to the engine
        self._ended: list[Timer] = []

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._ended:
            timer.count()

    def begin(self, served: Served, prompt_tokens: int) -> None:
        self._labels = _labels(served)
        self._loaded_s = time.perf_counter() - self._arrived
        if not self._begun:
            self._begun = True
            self._metrics.prompt_tokens.labels(*self._labels).inc(prompt_tokens)

    def again(self) -> None:
        """Its engine died before it answered: another one is asked."""
        self._ended.clear()

    @contextmanager
    def sequence(self) -> Iterator["Timer"]:
        """Around one answer of the request."""
        timer = Timer(self._metrics, self._labels, self._arrived, self._loaded_s)
        try:
            yield timer
        finally:
            timer.end()
            self._ended.append(timer)


class Timer:
    def __init__(
        self, metrics: Metrics, labels: tuple[str, str, str], arrived: float, loaded_s: float
    ) -> None:
        self._first = metrics.first_token.labels(*labels)
        self._between = metrics.between_tokens.labels(*labels)
        self._generated = metrics.generation_tokens.labels(*labels)
        self._metrics, self._labels, self._arrived, self._loaded_s = metrics, labels, arrived, loaded_s
        self._last: float | None = None
        self._seconds = 0.0
        self.finish: Finish | None = None

    def waited(self, seconds: float) -> None:
        """In the engine, for a slot."""
        self._metrics.queued.labels(*self._labels).observe(self._loaded_s + seconds)

    def tokens(self, count: int) -> None:
        """So many have arrived together. They share the time since the last ones; that before the first token
        is its own."""
        if not count:
            return
        now = time.perf_counter()
        after, between_s = count, 0.0
        if self._last is None:
            self._first.observe(now - self._arrived)
            after -= 1
        else:
            between_s = (now - self._last) / count
        for _ in range(after):
            self._between.observe(between_s)
        self._last = now
        self._generated.inc(count)

    def end(self) -> None:
        self._seconds = time.perf_counter() - self._arrived

    def count(self) -> None:
        """After its end."""
        self._metrics.success.labels(*self._labels, self.finish or "abort").inc()
        self._metrics.whole.labels(*self._labels).observe(self._seconds)


Read = Callable[[Status], float]
GAUGES: Mapping[str, tuple[str, Read]] = {
    "num_requests_running": ("Sequences being decoded", lambda status: status.running),
    "num_requests_waiting": ("Sequences waiting for a slot", lambda status: status.waiting),
    "num_requests_held": (
        "Sequences, running or waiting, that are not computed because nobody reads them",
        lambda status: status.held,
    ),
    "kv_cache_usage_perc": (
        "Share of KV memory in use, 1 is all",
        lambda status: status.kv_used_tokens / max(1, status.kv_total_tokens),
    ),
}
COUNTERS: Mapping[str, tuple[str, Read]] = {
    "num_preemptions": ("Sequences preempted since the engine started", lambda status: status.preemptions),
    "prefix_cache_queries": (
        "Prompt tokens looked up in the prefix cache",
        lambda status: status.prompt_tokens,
    ),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache", lambda status: status.cached_tokens),
}


class EngineCollector(Collector):
    """What the engines last said of themselves."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterable[Metric]:
        for name, (text, read) in GAUGES.items():
            gauge = GaugeMetricFamily(f"quantserve:{name}", text, labels=LABELS)
            for labels, status in self._engines():
                gauge.add_metric(labels, read(status))
            yield gauge
        for name, (text, read) in COUNTERS.items():
            counter = CounterMetricFamily(f"quantserve:{name}", text, labels=LABELS)
            for labels, status in self._engines():
                counter.add_metric(labels, read(status))
            yield counter

    def _engines(self) -> Iterator[tuple[tuple[str, str, str], Status]]:
        for engine in self._pool.engines():
            yield _labels(engine.served), engine.status


FIGURES: Mapping[str, tuple[str, Callable[[Measurement], float | None]]] = {
    "variant_kl": ("Mean KL divergence from the source, nats per token", lambda one: one.kl.mean.value),
    "variant_top1": ("Share of tokens on which source and variant agree", lambda one: one.top1.value),
    "variant_bits_per_weight": ("Bits per weight of the whole file", lambda one: one.bits_per_weight),
    "variant_bytes": ("Bytes of the variant's files", lambda one: one.bytes),
    "variant_tokens_per_second": (
        "Answer tokens a second, eight requests together, when it was measured",
        lambda one: one.speed.decode_8 if one.speed else None,
    ),
}


class VariantCollector(Collector):
    """What was measured of the built variants."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterable[Metric]:
        measured = [
            ((model.id, one.name), one.measurement)
            for model in self._pool.catalog.models
            for one in self._pool.gatekeeper.of_model(model)
            if one.measurement is not None
        ]
        for name, (text, read) in FIGURES.items():
            gauge = GaugeMetricFamily(f"quantserve:{name}", text, labels=LABELS[:2])
            for labels, found in measured:
                if (value := read(found)) is not None:
                    gauge.add_metric(labels, value)
            yield gauge


def _labels(served: Served) -> tuple[str, str, str]:
    return served.model, served.recipe, served.backend


class PoolCollector(Collector):
    """Loads, evictions, restarts, memory and jobs."""

    def __init__(self, pool: Pool, jobs: Jobs) -> None:
        self._pool = pool
        self._jobs = jobs

    def collect(self) -> Iterable[Metric]:
        yield self._by_variant("engine_loads", "Engines that became ready", self._pool.loads)
        yield self._by_variant("engine_evictions", "Engines unloaded for others", self._pool.memory.evictions)
        restarts = {engine.served.id: engine.restarts for engine in self._pool.engines()}
        yield self._by_variant("engine_restarts", "Engines that died and were started again", restarts)
        budget = GaugeMetricFamily(
            "quantserve:memory_budget_bytes", "What engines may hold", labels=["device"]
        )
        held = GaugeMetricFamily("quantserve:memory_held_bytes", "Reserved or used", labels=["device"])
        for device, amount in self._pool.memory.budgets.items():
            budget.add_metric([device], amount)
        for device, amount in self._pool.memory.held.items():
            held.add_metric([device], amount)
        yield budget
        yield held
        yield GaugeMetricFamily(
            "quantserve:loads_waiting", "Loads that wait for memory", value=self._pool.memory.waiting
        )
        yield self._job_states()

    def _by_variant(self, name: str, text: str, counts: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(f"quantserve:{name}", text, labels=("model", "variant"))
        for id, count in counts.items():
            model, _, variant = id.partition(":")
            family.add_metric([model, variant], count)
        return family

    def _job_states(self) -> Metric:
        family = GaugeMetricFamily("quantserve:jobs", "Remembered jobs", labels=("kind", "state"))
        for (kind, state), count in CountBy((job.kind, job.state) for job in self._jobs.list()).items():
            family.add_metric([kind, state], count)
        return family
