"""A mixture of experts to convert, where none is at hand: `python conversion/examples/mixture.py [OUT] [STEPS]`.

OUT is an OLMoE of 1 million parameters, trained on the Python standard library's own text: about a minute of CPU time.
"""

import sys

from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainingArguments

from mohge.training.data.corpus import standard_library_texts, train_tokenizer
from mohge.training.data.packing import TextSource, collate_packed, packed_blocks


out, steps = (*sys.argv[1:], *("olmoe", "300")[len(sys.argv) - 1 :])

tokenizer = train_tokenizer(standard_library_texts()[0], 1024)
config = OlmoeConfig(
    vocab_size=len(tokenizer),
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_experts=12,
    num_experts_per_tok=4,
    max_position_embeddings=256,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
arguments = TrainingArguments(
    out,
    max_steps=int(steps),
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    logging_steps=20,
    save_strategy="no",
    report_to=[],
)
text = packed_blocks([TextSource("standard-library")], tokenizer, 128)
trainer = Trainer(OlmoeForCausalLM(config), arguments, train_dataset=text, data_collator=collate_packed)
trainer.train()
trainer.save_model(out)
tokenizer.save_pretrained(out)
