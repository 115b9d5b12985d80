"""
Load a model folder where mohge cannot be imported, and write down what it computes. Run as a script, in a process of
its own: `python -I reload.py FOLDER INPUTS OUTPUTS PROMPT`.
"""

import sys
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:  # it must not be imported before `main` has hidden mohge
    from transformers import PreTrainedModel

CACHE_TOLERANCE = 1e-2
"""Largest [`cache_error`] that rounding explains: faults of the cache that were tried make it 0.08 to 1.8."""


@torch.no_grad()
def cache_error(model: "PreTrainedModel", ids: torch.Tensor) -> float:
    """
    How far greedy generation with a cache is from what one forward without a cache computes for the same tokens.

    Rounding may send a token to another expert, and then its logits, few as such tokens are, differ by more than
    rounding. So this is the median over the steps, and what a fault of the cache does to every step stays in it.

    Args:
        model (`PreTrainedModel`): A causal language model, in evaluation mode.
        ids (`torch.Tensor` of shape `[B, S]`): Sequences. Their first half is the prompt, and as much is generated.

    Returns:
        `float`: Relative error of a step's logits, in the sequence where it is largest.
    """
    prompt = ids[:, : (ids.shape[1] + 1) // 2]
    steps = ids.shape[1] - prompt.shape[1] + 1  # the last token generated is not read again
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        use_cache=True,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        min_new_tokens=steps,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
    )
    cached = torch.stack(generated.logits, dim=1)
    whole = model(generated.sequences[:, :-1], use_cache=False).logits[:, -steps:]
    errors = (cached - whole).norm(dim=-1) / whole.norm(dim=-1)
    return errors.median(dim=-1).values.max().item()


def main(folder: str, inputs: str, outputs: str, prompt: str):
    sys.modules.update(dict.fromkeys(("mohge", "mohge_kernels")))  # importing them fails: the copied code has to do

    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = load_file(inputs)
    if "prompt" in given:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        encoded = tokenizer(prompt, return_tensors="pt")["input_ids"]
        if not torch.equal(encoded, given["prompt"]):
            raise ValueError("the tokenizer encodes otherwise than the original")
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            raise ValueError(f"the weights have {problem.replace('_', ' ')}, such as {sorted(found[problem])[0]}")
    with torch.no_grad():
        computed = {name: model.eval()(ids).logits for name, ids in given.items()}
    save_file(computed | {"cache_error": torch.tensor(cache_error(model, given["tokens"]))}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
