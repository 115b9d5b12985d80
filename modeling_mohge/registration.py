"""Importing this registers the classes of this package with the Auto classes of transformers."""

# First: it says in one line what the imports below cannot, where transformers is too old for them.
from .versions_mohge import OLDEST_TRANSFORMERS  # isort: skip # noqa: F401

import transformers
from transformers.models.auto import configuration_auto

from . import modeling_mohge
from .configuration_mohge import MoHGEConfig
from .modeling_mohge import (
    AUTO_MAP,
    MoHGEForCausalLM,
    MoHGEForSequenceClassification,
    MoHGEForTokenClassification,
    MoHGEModel,
    MoHGEPreTrainedModel,
    record_routing,
)


if "mohge" in configuration_auto.CONFIG_MAPPING:  # as announced, which the class itself now replaces
    configuration_auto.CONFIG_MAPPING._mapping = configuration_auto.CONFIG_MAPPING_NAMES
transformers.AutoConfig.register("mohge", MoHGEConfig)
# `save_pretrained` then copies the code beside the weights, for `trust_remote_code=True` where mohge is missing.
MoHGEConfig.register_for_auto_class()
for auto_class, path in AUTO_MAP.items():
    model_class = getattr(modeling_mohge, path.rsplit(".", 1)[1])
    getattr(transformers, auto_class).register(MoHGEConfig, model_class)
    model_class.register_for_auto_class(auto_class)

__all__ = [
    "MoHGEConfig",
    "MoHGEForCausalLM",
    "MoHGEForSequenceClassification",
    "MoHGEForTokenClassification",
    "MoHGEModel",
    "MoHGEPreTrainedModel",
    "record_routing",
]
