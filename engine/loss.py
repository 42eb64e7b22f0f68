"""`Loss`: every reason why a group computes fewer useful tokens than its matrix products would allow."""

from enum import StrEnum


class Loss(StrEnum):
    """Where time goes that does no useful matrix product at peak rate; the values are labels of a metric.

    A batch smaller than the dense batch costs more per token than a full one: that excess is KV-limited where requests
    waited for blocks, sequence-limited where they waited for a row (`max_sequences`), else traffic-limited.
    `CPU_GAP` is time with a request open in which the ranks computed nothing: what passed and was no step's own. On a
    GPU the device is idle then, between the last work of one step and the first of the next. `PADDING` are rows that
    were computed to fill a step of a fixed size, as CUDA graphs are: none on a CPU.
    """

    NO_REQUESTS = "no_requests"
    TRAFFIC_LIMITED_BATCH = "traffic_limited_batch"
    KV_LIMITED_BATCH = "kv_limited_batch"
    SEQUENCE_LIMITED_BATCH = "sequence_limited_batch"
    PADDING = "padding"
    CPU_GAP = "cpu_gap"
    GEMM_BELOW_PEAK = "gemm_below_peak"
    EXPOSED_ATTENTION = "exposed_attention"
    EXPOSED_NETWORK = "exposed_network"
    OTHER_OPERATIONS = "other_operations"
    DISCARDED_TOKENS = "discarded_tokens"

    @property
    def description(self) -> str:
        """For people."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    Loss.NO_REQUESTS: "no requests",
    Loss.TRAFFIC_LIMITED_BATCH: "small batch: traffic",
    Loss.KV_LIMITED_BATCH: "small batch: KV cache",
    Loss.SEQUENCE_LIMITED_BATCH: "small batch: sequences",
    Loss.PADDING: "padding",
    Loss.CPU_GAP: "CPU gap between steps",
    Loss.GEMM_BELOW_PEAK: "GEMM below its peak",
    Loss.EXPOSED_ATTENTION: "exposed attention",
    Loss.EXPOSED_NETWORK: "exposed network",
    Loss.OTHER_OPERATIONS: "other memory-bound",
    Loss.DISCARDED_TOKENS: "discarded tokens",
}
