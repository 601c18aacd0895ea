"""What Prometheus is told of a service."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """The gauges and counters of one service; rates are Prometheus's to take."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.waiting = Gauge(
            "earthformer_forecasts_waiting", "Forecasts in the queue", registry=self.registry
        )
        self.running = Gauge("earthformer_forecasts_running", "Forecasts being drawn", registry=self.registry)
        self.ended = Counter(
            "earthformer_forecasts_ended", "Forecasts by how they ended", ["status"], registry=self.registry
        )
        self.rejected = Counter(
            "earthformer_forecasts_rejected", "Forecasts turned away by a full queue", registry=self.registry
        )
        self.members = Counter("earthformer_members", "Members drawn", registry=self.registry)
        self.chunk_seconds = Histogram(
            "earthformer_chunk_seconds",
            "From asking a replica for a chunk of members to its sums",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.retries = Counter(
            "earthformer_chunk_retries", "Chunks asked for again, for a replica died", registry=self.registry
        )
        self.device_seconds = Counter(
            "earthformer_device_seconds", "Time that replicas' devices drew", registry=self.registry
        )

    def text(self) -> bytes:
        """All of it, in Prometheus's own format."""
        return generate_latest(self.registry)
