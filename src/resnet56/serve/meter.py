"""What is counted, in the form that Prometheus collects."""

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

SIZES = (1, 2, 4, 8, 16)  # images
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Meter:
    """The counters of one server; `ProcessCollector` adds memory and time where it can (Linux)."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "resnet56_requests", "Requests answered.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "resnet56_request_seconds",
            "Time from a request's head to the end of its answer.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.images = Counter("resnet56_images", "Pictures classified.", registry=self.registry)
        self.batches = Histogram(
            "resnet56_batch_images",
            "Pictures in a run of the network.",
            buckets=SIZES,
            registry=self.registry,
        )

    def page(self) -> bytes:
        """All of it, as text."""
        return generate_latest(self.registry)
