"""Keep quiet what other packages say when `import mohge` imports them, and what its user can do nothing about:
transformers imports torchao where that is installed, and torchao reports its files for other devices."""

import logging


def _is_news(record: logging.LogRecord) -> bool:
    if record.name == "torchao":
        return not record.getMessage().startswith("Failed to load ")
    about_torchao = any(getattr(value, "__module__", "").startswith("torchao.") for value in record.args or ())
    return not (about_torchao and record.msg.startswith("%s is an Enum subclass"))


for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).addFilter(_is_news)
