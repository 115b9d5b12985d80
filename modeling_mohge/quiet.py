"""Keep quiet what other packages say when `import mohge` imports them, and what its user can do nothing about:
transformers imports torchao where that is installed, and torchao reports its files for other devices; `Trainer` asks
for pinned memory by default, and torch warns where there is no accelerator."""

import logging
import warnings


def _is_news(record: logging.LogRecord) -> bool:
    if record.name == "torchao":
        return not record.getMessage().startswith("Failed to load ")
    about_torchao = any(getattr(value, "__module__", "").startswith("torchao.") for value in record.args or ())
    return not (about_torchao and record.msg.startswith("%s is an Enum subclass"))


warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).addFilter(_is_news)
