"""The tokenizer of a source: the class it loads as, and whether beside the result it still makes the same ids."""

from contextlib import suppress
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from mohge.model_cards.folder import TOKENIZER_FILES, check_folder, matching_files
from mohge.model_cards.names import A_TOKENIZER, may_be_on_hub, not_found


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


def load_tokenizer(place: str | Path) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer of a folder or Hub id as transformers loads it, None where a folder has none. Code that lies there is
    not run.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if Path(place).is_dir() and not matching_files(Path(place), TOKENIZER_FILES):
        return None
    if not Path(place).exists() and not may_be_on_hub(str(place)):
        raise ValueError(not_found(str(place), A_TOKENIZER))
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        tokenizer("a")  # some fields of its config are not looked at before
        for name, value in get_tokenizer_config(place).items():
            if name != "tokenizer_class":  # the others are saved again: a class forgets some, such as `legacy`
                tokenizer.init_kwargs.setdefault(name, value)
        return tokenizer
    except Exception as error:  # those of tokenizers, of a package that is missing, and of Python for broken files
        raise ValueError(
            f"the tokenizer of {place} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}"
            "): mend that, or take its files out to go without a tokenizer"
        ) from error


def required_tokenizer(place: str | Path) -> PreTrainedTokenizerBase:
    """[`load_tokenizer`] of a folder that is first checked, or Hub id, that has one, or else raises a `ValueError`."""
    if Path(place).is_dir():
        check_folder(Path(place))
    tokenizer = load_tokenizer(place)
    if tokenizer is None:
        raise ValueError(f"{place} has no tokenizer: save the model's there")
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
