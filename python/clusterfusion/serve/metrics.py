"""Figures for Prometheus, by vLLM's names where they mean the same."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from clusterfusion.engine import Engine
from clusterfusion.results import Statistics

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_TOKEN_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """A registry of its own, with the engine's figures read when they are asked for."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        """Takes the name that stands in the label ``model_name``."""
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(engine, model_name))
        labels = {"model_name": model_name}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, list(labels), registry=self._registry, buckets=buckets)
            return made.labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, list(labels), registry=self._registry).labels(**labels)

        self._finished = Counter(
            "vllm:request_success",
            "Texts that have ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._model_name = model_name
        self._answers = Counter(
            "clusterfusion:http_responses",
            "Answers, by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._new_tokens = counter("vllm:generation_tokens", "New tokens.")
        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self._between = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time a token behind the first, of each text.",
            _TOKEN_SECONDS,
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", _SECONDS
        )
        self._queue = histogram(
            "vllm:request_queue_time_seconds", "Waiting for a place and for memory.", _SECONDS
        )
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", "Spent on the prompt.", _SECONDS
        )
        self._decode = histogram(
            "vllm:request_decode_time_seconds", "Spent in decode steps.", _SECONDS
        )
        self._prompt_sizes = histogram("vllm:request_prompt_tokens", "Of each text.", _TOKENS)
        self._new_sizes = histogram("vllm:request_generation_tokens", "Of each text.", _TOKENS)

    def note_text(
        self,
        statistics: Statistics,
        reason: str,
        first_token_seconds: float | None,
        seconds_per_token: float | None,
    ) -> None:
        """Counts a text that has ended."""
        self._finished.labels(self._model_name, reason).inc()
        self._prompt_tokens.inc(statistics.prompt_tokens)
        self._new_tokens.inc(statistics.new_tokens)
        self._prompt_sizes.observe(statistics.prompt_tokens)
        self._new_sizes.observe(statistics.new_tokens)
        self._queue.observe(statistics.queue_seconds)
        self._prefill.observe(statistics.prefill_seconds)
        self._decode.observe(statistics.decode_seconds)
        if first_token_seconds is not None:
            self._first.observe(first_token_seconds)
        if seconds_per_token is not None:
            self._between.observe(seconds_per_token)

    def note_request(self, seconds: float) -> None:
        """Counts a request that was computed to its end."""
        self._whole.observe(seconds)

    def note_answer(self, path: str, status: int) -> None:
        """Counts an answer."""
        self._answers.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineFigures(Collector):
    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        now = self._engine.serving_statistics()
        in_use = now.kv_pages_in_use - now.kv_pages_cached
        gauges = {
            "vllm:num_requests_running": ("Texts that hold memory.", now.sequences_active),
            "vllm:num_requests_waiting": ("Texts that wait for it.", now.sequences_waiting),
            "vllm:kv_cache_usage_perc": (
                "Share of the KV cache that texts use, 0 to 1.",
                in_use / now.kv_pages if now.kv_pages else 0.0,
            ),
        }
        counters = {
            "vllm:prefix_cache_queries": ("Prompt tokens looked up.", now.prompt_tokens),
            "vllm:prefix_cache_hits": ("Of these, found.", now.prefix_hit_tokens),
            "vllm:num_preemptions": ("Texts that gave way to older ones.", now.preemptions),
        }
        for kind, figures in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in figures.items():
                family = kind(name, text, labels=["model_name"])
                family.add_metric([self._model_name], value)
                yield family
