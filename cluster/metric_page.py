"""The metric library's side of metrics: families from the list of names, and the page that Prometheus scrapes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from quire.common.http_pages import Page
from quire.common.messages import Distribution, Sample
from quire.common.metric_names import METRICS, Metric


class Families(Collector):
    """Samples that were taken elsewhere, by family, each family once. For one scrape."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}

    def add(self, metric: Metric, labels: Sequence[str], value: float) -> None:
        """One sample of a counter or gauge, with a value for each of its labels."""
        family = self._families.get(metric.name)
        if family is None:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = self._families[metric.name] = kind(metric.name, metric.meaning, labels=metric.labels)
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily), metric.name
        _check(metric, labels)
        family.add_metric(labels, value)

    def add_histogram(self, metric: Metric, labels: Sequence[str], *, counts: Sequence[int], total: float) -> None:
        """One histogram; counts by bucket, not yet summed up."""
        family = self._families.get(metric.name)
        if family is None:
            family = self._families[metric.name] = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        assert isinstance(family, HistogramMetricFamily), metric.name
        _check(metric, labels)
        buckets, running = [], 0
        for edge, count in zip([*map(float, metric.edges), float("inf")], counts, strict=True):
            running += count
            buckets.append((str(edge) if edge != float("inf") else "+Inf", float(running)))
        family.add_metric(labels, buckets=buckets, sum_value=total)

    def add_samples(self, labels: Sequence[str], samples: Iterable[Sample]) -> None:
        """Samples from a message; `labels` go before their own. Those of metrics that this version does not know are left out."""
        for sample in samples:
            if sample.metric in METRICS:
                self.add(METRICS[sample.metric], (*labels, *sample.labels), sample.value)

    def add_distributions(self, labels: Sequence[str], distributions: Iterable[Distribution]) -> None:
        for entry in distributions:
            metric = METRICS.get(entry.metric)
            if metric is not None and len(entry.counts) == len(metric.edges) + 1:
                self.add_histogram(metric, (*labels, *entry.labels), counts=entry.counts, total=entry.total)

    def collect(self) -> Iterator[Family]:
        yield from self._families.values()


def page_of(collectors: Iterable[Collector], headers: Mapping[str, str]) -> Page:
    """What the collectors have, in the format that the scraper asks for."""
    encode, content_type = choose_encoder(headers.get("accept", ""))
    return Page(encode(_All(collectors)), content_type)


class _All(Collector):
    """Several collectors as one."""

    def __init__(self, collectors: Iterable[Collector]) -> None:
        self._collectors = collectors

    def collect(self) -> Iterator[Family]:
        for collector in self._collectors:
            yield from collector.collect()


def _check(metric: Metric, labels: Sequence[str]) -> None:
    assert len(labels) == len(metric.labels), (metric.name, labels)
