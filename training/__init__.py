"""Training of MoHGE models with Hugging Face Trainer."""

from importlib import import_module


_MODULES = {
    "MoHGETrainer": "loop.trainer",
    "PeerWatchdog": "loop.watchdog",
    "RouterLogCallback": "loop.callbacks",
    "RouterScheduleCallback": "loop.callbacks",
    "RouterStatistics": "loop.metrics",
    "RouterTraffic": "loop.traffic",
    "StopSignalCallback": "loop.callbacks",
}


def __getattr__(name: str):
    """Import what is asked for: `Trainer` takes seconds to import, and most commands do without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = [
    "MoHGETrainer",
    "PeerWatchdog",
    "RouterLogCallback",
    "RouterScheduleCallback",
    "RouterStatistics",
    "RouterTraffic",
    "StopSignalCallback",
]
