"""mohge: heterogeneous mixture-of-experts language models for Hugging Face Transformers.

Importing this package registers `model_type="mohge"` with the Auto classes of transformers. What it offers is imported
when it is asked for, by name or, of the Auto classes, by the first `"mohge"` that they meet: torch and transformers
take seconds to import. That leans on attributes of transformers' table that are not public: where they are gone, all
is imported here.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from . import quiet  # noqa: F401
from .lazy import lazy_names


if TYPE_CHECKING:  # what a type checker reads
    from .conversion.api import convert
    from .registration import (
        MoHGEConfig,
        MoHGEForCausalLM,
        MoHGEForSequenceClassification,
        MoHGEForTokenClassification,
        MoHGEModel,
        MoHGEPreTrainedModel,
        record_routing,
    )
    from .training.loop.trainer import MoHGETrainer

    __version__: str

__all__ = [
    "MoHGEConfig",
    "MoHGEForCausalLM",
    "MoHGEForSequenceClassification",
    "MoHGEForTokenClassification",
    "MoHGEModel",
    "MoHGEPreTrainedModel",
    "MoHGETrainer",
    "__version__",
    "convert",
    "record_routing",
]
_ELSEWHERE = {"MoHGETrainer": "training.loop.trainer", "__version__": "version", "convert": "conversion.api"}
__getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(__all__, "registration") | _ELSEWHERE)

_AUTO = "transformers.models.auto.configuration_auto"


def _knows_table() -> bool:
    """Whether the table of config classes is as [`_announce`] needs it, by its source: importing it takes long."""
    source = Path(find_spec("transformers").origin).parent / "models" / "auto" / "configuration_auto.py"
    names = ("self._mapping", "self._modules", "CONFIG_MAPPING_NAMES")
    return source.is_file() and all(name in source.read_text(encoding="utf-8") for name in names)


def _announce(auto):
    """Let the table of config classes ask this package for the one of `"mohge"`, as it asks modules of its own."""
    auto.CONFIG_MAPPING._mapping = {**auto.CONFIG_MAPPING_NAMES, "mohge": "MoHGEConfig"}
    auto.CONFIG_MAPPING._modules["mohge"] = sys.modules[__name__]


class _WhenImported:
    """An import hook that announces this package as soon as that table is there."""

    def find_spec(self, name, path=None, target=None):
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_announce(module):
            execute(module)
            _announce(module)

        spec.loader.exec_module = execute_and_announce
        return spec


if not _knows_table():
    from . import registration  # noqa: F401
elif _AUTO in sys.modules:
    _announce(sys.modules[_AUTO])
else:
    sys.meta_path.insert(0, _WhenImported())
