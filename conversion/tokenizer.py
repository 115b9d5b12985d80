"""The tokenizer of a source: the class it loads as, and whether beside the result it still makes the same ids."""

from contextlib import suppress
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .checkpoint import TOKENIZER_FILES


_TEXTS = ("", " ", "Hello world", "  two spaces", "one at the end ", "a  b   c", "\ttab\n\n\nlines \r\n  indented")
_TEXTS += ("1 23 456.78 9,000 0x1F", "I'm sure they'll DON'T", "def f(x): return {x: 'y'}", "https://a.b/c?d=e_f#g")
_TEXTS += (
    "Größe, naïve, cafe\u0301",
    "Привет, мир",
    "日本語のテキスト",
    "नमस्ते दुनिया",
    "مرحبا",
    "🙂👩‍👩‍👧 ½ ①\u00a0\u200b",
)
"""In which tokenizers differ."""
_CHAT = (
    {"role": "user", "content": "  What is 1 + 2?\n"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "Und 日本語?"},
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer of a source as transformers loads it, None where there is none.

    Raises:
        ValueError: if it cannot be loaded, or has code of its own, which is not run.
    """
    if not any(file.is_file() for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return None
    try:
        code = get_tokenizer_config(folder).get("auto_map")
        code = code.get("AutoTokenizer") if isinstance(code, dict) else code
        tokenizer = None if code else AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # those of tokenizers, of a package that is missing, and of Python for broken files
        raise ValueError(
            f"the tokenizer of {folder} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}"
            "): mend that, or take its files out to convert without a tokenizer"
        ) from error
    if code:
        raise ValueError(
            f"the tokenizer of {folder} is code, {next(filter(None, code))}, which is not run: save it as a class of "
            "transformers, or take `auto_map` out of tokenizer_config.json if such a class does"
        )
    return tokenizer


def about(tokenizer: PreTrainedTokenizerBase, embedding: int) -> dict:
    """Class and number of ids of a tokenizer, and the rows that the model has for them, for a receipt."""
    ids = max(tokenizer.get_vocab().values()) + 1
    return {"class": type(tokenizer).__name__, "ids": ids, "embedding": embedding}


def describe(facts: dict) -> str:
    """What [`about`] found, on a line."""
    beyond = f", MORE than the {facts['embedding']} of the embedding" if facts["ids"] > facts["embedding"] else ""
    return f"{facts['class']}, {facts['ids']} ids{beyond}"


def compare(before: PreTrainedTokenizerBase, folder: Path) -> dict:
    """
    What the tokenizer that transformers loads from `folder` makes of texts, against the source's.

    Returns:
        `dict`: its class as `"class_after"`, the number of `"texts"`, and those that became `"different"`; one of them
        is the conversation that the chat template writes.
    """
    after = load_tokenizer(folder)
    special = sorted({*before.all_special_tokens, *getattr(before, "get_added_vocab", dict)()})
    texts = [*_TEXTS, *(f"{token} a{token}b  {token}\n1" for token in special)]
    found, kept = _read(before, texts), _read(after, texts)
    different = [text for text in found | kept if found.get(text) != kept.get(text)]
    return {"class_after": type(after).__name__, "texts": len(found), "different": different}


def _read(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict:
    found = {}
    for text in texts:
        whole, plain = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
        found[text] = whole, plain, tokenizer.decode(plain)
    with suppress(Exception):  # there is no template, or it refuses such a conversation in its own way
        found["a conversation"] = tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True)
    return found
