"""mohge: heterogeneous mixture-of-experts language models for Hugging Face Transformers.

Importing this package registers `model_type="mohge"` with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

# First: it says in one line what the imports below cannot, where transformers is too old for them.
from .versions_mohge import OLDEST_TRANSFORMERS  # isort: skip # noqa: F401
from . import quiet  # isort: skip # noqa: F401

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mohge import MoHGEConfig
from .modeling_mohge import MoHGEForCausalLM, MoHGEModel, MoHGEPreTrainedModel, record_routing


AutoConfig.register("mohge", MoHGEConfig)
AutoModel.register(MoHGEConfig, MoHGEModel)
AutoModelForCausalLM.register(MoHGEConfig, MoHGEForCausalLM)
# `save_pretrained` then copies the code beside the weights, for `trust_remote_code=True` where mohge is missing.
MoHGEConfig.register_for_auto_class()
MoHGEModel.register_for_auto_class("AutoModel")
MoHGEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MoHGEConfig", "MoHGEForCausalLM", "MoHGEModel", "MoHGEPreTrainedModel", "record_routing"]
