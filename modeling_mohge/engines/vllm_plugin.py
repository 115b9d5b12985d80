"""vLLM's plugin: `vllm serve FOLDER --trust-remote-code` runs the experts with the code of the checkpoint, at the
widths that they have, and with `mohge_kernels`. vLLM's own experts are all as wide as the widest."""


def register():
    """Called by vLLM in each of its processes."""
    from vllm import ModelRegistry

    from mohge_kernels import cpu

    cpu.few_rows = 8  # batches are small, and another batch gives other bits here anyway
    ModelRegistry.register_model("MoHGEForCausalLM", "mohge_engines.vllm_model:MoHGEForCausalLM")
