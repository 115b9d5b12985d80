"""A dense model becomes a mixture of experts of different width, and goes on training:
`python conversion/examples/upcycle.py [DENSE] [OUT] [STEPS]`.

DENSE is a folder or Hub id of a dense model, such as Qwen/Qwen3-0.6B; without one, a tiny Llama is made on the spot.
"""

import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

import mohge
from mohge.training.data.corpus import standard_library_texts, train_tokenizer


dense, out, steps = (*sys.argv[1:], *("tiny-llama", "upcycled", "50")[len(sys.argv) - 1 :])
if dense == "tiny-llama" and not Path(dense).exists():
    tokenizer = train_tokenizer(standard_library_texts()[0], 4096)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(dense)
    tokenizer.save_pretrained(dense)

# The feed-forward stays as a shared expert; routed experts beside it start at zero, so that nothing changes at first.
receipt = mohge.convert(dense, out, mode="residual", widths=[64, 128, 256], experts_per_group=[4, 4, 4], top_k=2)
print(f"exact: {receipt['exact']}, relative error of the logits {receipt['logits']['relative_error_median']:.1g}")

train = f"mohge train --model {out} --datasets standard-library --output_dir {out}-trained --max_steps {steps}"
settings = "--learning_rate 1e-3 --sequence_length 128 --per_device_train_batch_size 8 --report_to none"
subprocess.run([sys.executable, "-m", *train.split(), *settings.split()], check=True)
