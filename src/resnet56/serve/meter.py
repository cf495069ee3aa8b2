"""Server metrics in Prometheus format."""

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

BATCH_SIZES = (1, 2, 4, 8, 16)
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Meter:
    """Metrics of one server.

    On Linux, the metrics include the memory usage and CPU time of the process.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "resnet56_requests", "HTTP requests.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "resnet56_request_seconds",
            "Time from the request headers to the end of the response.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.images = Counter("resnet56_images", "Classified images.", registry=self.registry)
        self.batches = Histogram(
            "resnet56_batch_images",
            "Images per batch.",
            buckets=BATCH_SIZES,
            registry=self.registry,
        )

    def render(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
