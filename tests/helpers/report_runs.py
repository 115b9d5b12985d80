"""A small training run, really trained, for the tests of `mohge report`."""

from html.parser import HTMLParser
from pathlib import Path

from transformers import PreTrainedTokenizerFast, TrainingArguments, default_data_collator, set_seed

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.training import MoHGETrainer
from mohge.training.data.corpus import token_blocks, train_tokenizer


CONTEXT = 64
TAG = "</script><b>"
"""A token that would break a page if it were not escaped."""
TEXT = "".join(
    f"def rule_{i % 7}(x):{TAG}\n    return x * {i} + {i % 13} if x > {i % 5} else rule_{(i + 1) % 7}(x)\n\n"
    for i in range(150)
)


EDGES = {
    "layers of different widths": {
        "per_layer_config": {
            1: {"moe_intermediate_sizes": [16, 40], "num_experts_per_group": 3},
            2: {"moe_intermediate_sizes": [16, 24, 32, 48]},
        },
        "mlp_only_layers": [0],
    },
    "one group": {"moe_intermediate_sizes": [16], "num_experts_per_group": 8, "router_type": "top_k"},
    "one width": {"moe_intermediate_sizes": [16, 16], "num_experts_per_group": 4, "router_type": "top_k"},
    "empty slots": {"router_type": "top_p", "router_top_p": 0.3, "num_experts_per_tok": 6},
    "removed experts": {
        "moe_intermediate_sizes": [0, 24, 40],
        "num_experts_per_group": 4,
        "per_layer_config": {1: {"moe_intermediate_sizes": [0, 0, 0]}},
    },
    "one layer": {"num_hidden_layers": 1},
    "many layers": {"num_hidden_layers": 60},
    "mixture": {
        "backbone_config": {
            "model_type": "olmoe",
            "num_key_value_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 3,
        },
        "shared_expert_intermediate_size": 0,
    },
    "many groups": {"moe_intermediate_sizes": [*range(4, 132)], "num_experts_per_group": 2, "num_hidden_layers": 2},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.add_tokens([TAG])
    return tokenizer


def make_config(tokenizer: PreTrainedTokenizerFast, **overrides) -> MoHGEConfig:
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "moe_intermediate_sizes": [8, 16, 24, 40],
        "num_experts_per_group": [2, 4, 4, 6],
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 16,
        "router_aux_loss_coef": 0.02,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return MoHGEConfig(**{**values, **overrides})


def save_model(folder: Path, **overrides) -> MoHGEForCausalLM:
    """A model with random weights and its tokenizer, without a record of training."""
    set_seed(0)
    tokenizer = make_tokenizer()
    model = MoHGEForCausalLM(make_config(tokenizer, **overrides)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def train_run(folder: Path, steps: int = 24, **overrides) -> MoHGETrainer:
    """A run as `mohge train` leaves it, with checkpoints, and the text it was trained on as `text.txt` beside it."""
    set_seed(0)
    tokenizer = make_tokenizer()
    blocks = token_blocks([TEXT], tokenizer, CONTEXT)
    trainer = MoHGETrainer(
        MoHGEForCausalLM(make_config(tokenizer, **overrides)),
        TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=steps // 3,
            save_steps=steps // 3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            prediction_loss_only=True,
        ),
        train_dataset=blocks,
        eval_dataset=blocks.select(range(4)),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    folder.with_name("text.txt").write_text(TEXT, encoding="utf-8")
    return trainer


class Page(HTMLParser):
    """What stands on a page: text of headings, of everything, and the pictures."""

    def __init__(self, content: str):
        super().__init__()
        self.titles: list[str] = []
        self.words: list[str] = []
        self.pictures: list[str] = []
        self.alternatives: list[str] = []
        self.tips: list[str] = []
        self.facts: dict[str, str] = {}
        self._tags: list[str] = []
        self._term = ""
        self.feed(content)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "svg":
            self.pictures.append(values["class"])
            if values["class"] == "wide":
                self.alternatives.append(values["aria-label"])
        if tag != "meta":
            self._tags.append(tag)

    def handle_endtag(self, tag):
        assert self._tags.pop() == tag  # every element is closed

    def handle_data(self, data):
        where = self._tags[-1] if self._tags else ""
        if "svg" in self._tags:
            self.tips += [data] if where == "title" else []
            return
        if where in ("style", "") or not data.strip():
            return
        self.words.append(data.strip())
        if where in ("h1", "h2", "h3"):
            self.titles.append(data.strip())
        elif where == "dt":
            self._term = data
        elif where == "dd":
            self.facts.setdefault(self._term, data)
