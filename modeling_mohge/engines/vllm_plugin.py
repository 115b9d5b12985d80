"""vLLM's plugin: `vllm serve FOLDER --trust-remote-code` runs the experts with the code of the checkpoint, at the
widths that they have, and with `mohge_kernels`. vLLM's own experts are all as wide as the widest."""


def register():
    """Called by vLLM in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("MoHGEForCausalLM", "mohge_engines.vllm_model:MoHGEForCausalLM")
