"""Training of MoHGE models with Hugging Face Trainer."""

from mohge.lazy import lazy_names


_MODULES = {
    "MoHGETrainer": "loop.trainer",
    "PeerWatchdog": "loop.watchdog",
    "RouterLogCallback": "loop.callbacks",
    "RouterScheduleCallback": "loop.callbacks",
    "RouterStatistics": "loop.metrics",
    "RouterTraffic": "loop.traffic",
    "StopSignalCallback": "loop.callbacks",
}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
