"""Make of a model what serving engines run: `python conversion/examples/serve.py [FOLDER] [OUT]`.

FOLDER is a MoHGE model, by default the one that training/examples/pretrain.py makes. vLLM runs it as it is with the
plugin of this package; the padded copy, OUT, runs there without any plugin, and gives the same tokens here.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mohge


folder, out = (*sys.argv[1:], *("first-model", "padded")[len(sys.argv) - 1 :])

mohge.convert(folder, out, mode="export", pad=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("import os\n", return_tensors="pt", return_token_type_ids=False)
texts = []
for place in (folder, out):
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
assert texts[0] == texts[1], texts
print(texts[0])
print(f"\nwith the plugin:    vllm serve {folder} --trust-remote-code")
print(f"without any plugin: vllm serve {out} --trust-remote-code")
