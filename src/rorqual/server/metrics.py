"""Figures for Prometheus, under the names that dashboards for vLLM already read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from rorqual.server.models import Models
    from rorqual.server.usage import Usage

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2.0)
_E2E = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 600.0)
CONTENT_TYPE = openmetrics.CONTENT_TYPE_LATEST


class Metrics:
    """Counters and histograms of one server; gauges are read from its engines when asked."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineGauges(models))
        label = ("model_name",)

        def counter(name: str, text: str, labels: tuple[str, ...] = label) -> Counter:
            return Counter(f"vllm:{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, label, buckets=buckets, registry=self._registry)

        self._prompt = counter("prompt_tokens", "Prompt tokens of finished requests")
        self._generation = counter("generation_tokens", "Completion tokens of finished requests")
        self._cached = counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache")
        self._success = counter("request_success", "Finished requests", ("model_name", "finished_reason"))
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token", _TTFT)
        self._itl = histogram("inter_token_latency_seconds", "Between tokens of one completion", _ITL)
        self._itls: dict[str, Any] = {}  # by model: finding one again costs more than its observation
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end", _E2E)
        self._answers = Counter(
            "rorqual:http_requests", "Answers", ("route", "status"), registry=self._registry
        )
        self._errors = Counter("rorqual:errors", "Errors by code", ("code",), registry=self._registry)

    def first_token(self, model: str, seconds: float, request_id: str) -> None:
        """Time to first token of a request."""
        self._ttft.labels(model).observe(seconds, {"request_id": request_id[:64]})

    def next_tokens(self, model: str, seconds: float, count: int) -> None:
        """`count` tokens that came together, `seconds` after those before."""
        child = self._itls.get(model)
        if child is None:
            child = self._itls[model] = self._itl.labels(model)
        for _ in range(count):
            child.observe(seconds / count)

    def finished(self, model: str, usage: Usage, outcome: str, seconds: float, request_id: str) -> None:
        """What a request used in the end."""
        self._prompt.labels(model).inc(usage.prompt)
        self._generation.labels(model).inc(usage.completion)
        self._cached.labels(model).inc(usage.cached)
        self._success.labels(model, outcome).inc()
        self._e2e.labels(model).observe(seconds, {"request_id": request_id[:64]})

    def answered(self, route: str, status: int) -> None:
        """An answer has begun."""
        self._answers.labels(route, str(status)).inc()

    def error(self, code: str) -> None:
        """An error was answered, with a status or within a stream."""
        self._errors.labels(code).inc()

    def exposition(self) -> bytes:
        """The page that /metrics answers (OpenMetrics, with request ids as exemplars)."""
        # The default escaping would turn the colons of the names into underscores.
        return openmetrics.generate_latest(self._registry, escaping=openmetrics.ALLOWUTF8)


class _EngineGauges(Collector):
    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        gauges = {
            "num_requests_running": ("Completions in the batch", lambda s: s.running),
            "num_requests_waiting": ("Completions in the queue", lambda s: s.waiting),
            "kv_cache_usage_perc": (
                "Share of cache blocks in use",
                lambda s: s.blocks_used / (s.blocks_total or 1),
            ),
            "num_preemptions": ("Completions put back for want of blocks", lambda s: s.preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up", lambda s: s.prefix_query_tokens),
            "prefix_cache_hits": ("Prompt tokens found", lambda s: s.prefix_hit_tokens),
        }
        for name, (text, read) in gauges.items():
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            for bridge_model in {id(m.bridge): m for m in reversed(self._models.all())}.values():
                family.add_metric([bridge_model.name], read(bridge_model.bridge.stats()))
            yield family
