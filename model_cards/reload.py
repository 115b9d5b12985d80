"""
Load a model folder where mohge cannot be imported, and write down what it computes. Run as a script, in a process of
its own: `python -I reload.py FOLDER INPUTS OUTPUTS PROMPT`.
"""

import sys


def main(folder: str, inputs: str, outputs: str, prompt: str):
    sys.modules.update(dict.fromkeys(("mohge", "mohge_kernels")))  # importing them fails: the copied code has to do

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = load_file(inputs)
    if "prompt" in given:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
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
        save_file({name: model.eval()(ids).logits for name, ids in given.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
