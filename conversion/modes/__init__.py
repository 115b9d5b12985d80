"""The modes of `mohge convert`."""

from .base import MODES, Converted, Layer, Mode
from .dense import Copy, Residual, Shards
from .export import Export
from .mixtures import Regroup
from .split import Split
from .trim import Trim


__all__ = ["MODES", "Converted", "Copy", "Export", "Layer", "Mode", "Regroup", "Residual", "Shards", "Split", "Trim"]
