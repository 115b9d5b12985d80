"""From a config to a trained model that writes: `python training/examples/pretrain.py [FOLDER] [STEPS]`.

Some three minutes of CPU time, without network: the text is the Python standard library's own.
"""

import sys

from transformers import TrainingArguments

from mohge import MoHGEConfig, MoHGEForCausalLM, MoHGETrainer
from mohge.training.data.corpus import standard_library_texts, train_tokenizer
from mohge.training.data.packing import TextSource, collate_packed, packed_blocks


folder, steps = (*sys.argv[1:], *("first-model", "200")[len(sys.argv) - 1 :])

tokenizer = train_tokenizer(standard_library_texts()[0], 4096)
blocks = packed_blocks([TextSource("standard-library")], tokenizer, 256)

config = MoHGEConfig(
    vocab_size=len(tokenizer),
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=6,
    moe_intermediate_sizes=[64, 128, 192, 256],  # one width for each group
    num_experts_per_group=4,
    num_experts_per_tok=4,
    num_groups_per_tok=2,
    shared_expert_intermediate_size=128,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
model = MoHGEForCausalLM(config)
arguments = TrainingArguments(
    folder,
    max_steps=int(steps),
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
    logging_steps=20,
    save_strategy="no",
    report_to=[],
)
trainer = MoHGETrainer(model=model, args=arguments, train_dataset=blocks, data_collator=collate_packed)
trainer.train()
trainer.save_model(folder)
tokenizer.save_pretrained(folder)

prompt = tokenizer("def read_file(path):\n", return_tensors="pt", return_token_type_ids=False).to(model.device)
tokens = model.eval().generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
