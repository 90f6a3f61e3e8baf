"""Counters and histograms that are told of every token: prometheus_client's own cost each of them many times as much."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Counter(Collector):
    """Of one thread, with one label; other threads may ask for it."""

    def __init__(self, name: str, doc: str, label: tuple[str, str], registry: CollectorRegistry):
        self._told, self._value, self.value = (name, doc, [label[0]]), label[1], 0
        registry.register(self)

    def inc(self, amount: int) -> None:
        self.value += amount

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._told[0], self._told[1], labels=self._told[2])
        family.add_metric([self._value], self.value)
        yield family


class Histogram(Collector):
    """Of one thread, with one label. `bounds`: upper ends of its buckets, rising; what is above them is counted too."""

    def __init__(self, name: str, doc: str, label: tuple[str, str], bounds: Sequence[float], registry: CollectorRegistry):
        self._told, self._value = (name, doc, [label[0]]), label[1]
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0
        registry.register(self)

    def observe(self, amount: float) -> None:
        self._counts[bisect_left(self._bounds, amount)] += 1
        self._sum += amount

    def collect(self) -> Iterator[Metric]:
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._told[0], self._told[1], labels=self._told[2])
        family.add_metric([self._value], list(zip(ends, accumulate(self._counts), strict=True)), self._sum)
        yield family
