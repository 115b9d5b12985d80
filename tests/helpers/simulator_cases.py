"""A machine whose times are easily worked out by hand."""

from mohge.training.simulation.hardware import Hardware


MACHINE = Hardware(
    name="round numbers",
    flops_per_second=1000.0,
    memory_bytes_per_second=500.0,
    kernel_overhead_seconds=3.0,
    link_bytes_per_second=10.0,
    link_latency_seconds=0.5,
    node_size=2,
    inter_node_bytes_per_second=2.0,
    inter_node_latency_seconds=1.0,
    element_bytes=2,
)
