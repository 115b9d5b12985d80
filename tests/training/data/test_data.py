"""Text as training sees it: whatever its form, the same documents make the same sequences, and stay apart."""

import json
import os
from collections.abc import Callable
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from model_cases import ATTENTIONS, VOCABULARY, assert_close, make_model
from pretrain_runs import documents, make_tokenizer, write_jsonl
from tokenizers.processors import TemplateProcessing

from mohge.training.data import packing
from mohge.training.data.corpus import STANDARD_LIBRARY, standard_library_texts
from mohge.training.data.packing import collate_packed, packed_blocks, read_rows
from mohge.training.data.sources import TextSource, parse_sources


LENGTH = 32
DOCUMENTS = [*documents(), documents(1)[0] * 40, "0 times 0 is 0.\n", "", documents(2)[1]]
"""Among them one of many sequences, two shorter than one, and an empty one."""
TOKENIZER = make_tokenizer()
IDS = [[*ids, TOKENIZER.eos_token_id] for ids in TOKENIZER(DOCUMENTS)["input_ids"] if ids]


@pytest.fixture(autouse=True)
def _own_fast_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s at each end of a parquet stream


def blocks(*sources: TextSource | Path, tokenizer=TOKENIZER, length: int = LENGTH, **kwargs) -> list[list[list[int]]]:
    sources = [source if isinstance(source, TextSource) else TextSource(str(source)) for source in sources]
    rows = packed_blocks(sources, tokenizer, length, **kwargs)
    return [[torch.as_tensor(row[name]).tolist() for name in ("input_ids", "position_ids")] for row in rows]


def expected_blocks(ids: list[list[int]], length: int = LENGTH, drop_last: bool = True) -> list[list[list[int]]]:
    """Documents joined and cut, token by token."""
    tokens = [(token, document) for document, row in enumerate(ids) for token in row]
    result = []
    for start in range(0, len(tokens), length):
        part = tokens[start : start + length]
        positions = list(accumulate(pairwise([part[0], *part]), lambda n, pair: (n + 1) * same(pair), initial=-1))[1:]
        if len(part) == length or not drop_last:
            result.append([[token for token, _ in part], positions])
    return result


def same(pair) -> bool:
    return pair[0][1] == pair[1][1]


# The same documents, whatever their form.


def write_folder(write: Callable, ending: str, folder: Path, texts: list[str]) -> Path:
    folder = folder / "texts"
    folder.mkdir()
    for n, text in enumerate(texts):
        write(folder / f"{n:03}.{ending}", text)
    return folder


def write_table(method: str, path: str, folder: Path, texts: list[str]) -> Path:
    getattr(Dataset.from_dict({"number": range(len(texts)), "text": texts}), method)(folder / path)
    return folder / path


FORMS = {
    "jsonl": lambda folder, texts: write_jsonl(folder / "a.jsonl", texts),
    "json": lambda folder, texts: write_jsonl(folder / "a.json", texts),
    "csv": partial(write_table, "to_csv", "a.csv"),
    "parquet": partial(write_table, "to_parquet", "a.parquet"),
    "folder of txt": partial(write_folder, Path.write_text, "txt"),
    "folder of jsonl": partial(write_folder, lambda path, text: write_jsonl(path, [text]), "jsonl"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_the_documents_one_after_the_other(form, streaming, tmp_path):
    source = FORMS[form](tmp_path, DOCUMENTS)
    assert blocks(source, streaming=streaming) == expected_blocks(IDS)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_file_is_one_document(streaming, tmp_path):
    (tmp_path / "a.txt").write_text(DOCUMENTS[40])
    assert blocks(tmp_path / "a.txt", streaming=streaming) == expected_blocks([IDS[40]])


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_are_taken_as_they_are(streaming, tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"input_ids": IDS, "text": ["other"] * len(IDS)}).to_parquet(path)
    assert blocks(path, tokenizer=None, streaming=streaming) == expected_blocks(IDS)


def test_standard_library():
    train, held_out = standard_library_texts()
    rows = read_rows(TextSource(STANDARD_LIBRARY), streaming=True)
    assert [row["text"] for row in islice(rows, 5)] == train[:5]
    ids = [[*row, TOKENIZER.eos_token_id] for row in TOKENIZER(held_out, verbose=False)["input_ids"] if row]
    source = TextSource(STANDARD_LIBRARY, split="validation")
    assert blocks(source, length=512, drop_last=False) == expected_blocks(ids, 512, drop_last=False)


def test_held_out_files_are_neither_trained_on_nor_tables():
    train, held_out = standard_library_texts()
    known, kept = (
        {line for text in texts for line in map(str.strip, text.splitlines())} for texts in (train, held_out)
    )
    lines = [line for line in kept if len(line) > 20]
    assert sum(line in known for line in lines) < 0.05 * len(lines)
    assert not any("codecs.charmap_build(decoding_table)" in text for text in train + held_out)
    assert 150_000 < sum(map(len, held_out)) < 400_000
    assert sum(map(len, train)) > 4_500_000
    assert max(train, key=len).startswith("# -*- coding")  # the language reference, whose lines are strings, stays


def test_part_of_a_split_and_another_column(tmp_path):
    lines = [json.dumps({"body": text, "text": "other"}) for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert blocks(TextSource(str(tmp_path / "a.jsonl"), split="train[:10]", column="body")) == expected_blocks(
        IDS[:10]
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_only_a_tail_is_left_out(streaming, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    kept = blocks(source, streaming=streaming, drop_last=False)
    assert kept == expected_blocks(IDS, drop_last=False)
    assert 0 < len(kept[-1][0]) < LENGTH
    assert blocks(source, streaming=streaming) == kept[:-1]
    assert [token for ids, _ in kept for token in ids] == list(chain.from_iterable(IDS))


def test_text_shorter_than_a_sequence_is_kept_without_drop_last(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:1])
    assert blocks(source, length=1000, drop_last=False) == expected_blocks(IDS[:1], 1000, drop_last=False)


@pytest.mark.parametrize("length", [2, 7, len(IDS[0]), len(IDS[0]) + 1])
def test_any_length(length, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert blocks(source, length=length) == expected_blocks(IDS, length)


def test_missing_text_is_an_empty_document(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("", DOCUMENTS[0], None, DOCUMENTS[1])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert blocks(tmp_path / "a.jsonl") == expected_blocks(IDS[:2])


@pytest.mark.parametrize("streaming", [False, True])
def test_column_with_the_name_of_ours_says_nothing_about_documents(streaming, tmp_path):
    lines = [json.dumps({"text": text, "continues": "yes", "ends": False}) for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert blocks(tmp_path / "a.jsonl", streaming=streaming) == expected_blocks(IDS)


# Documents that are read in pieces.


@pytest.fixture
def pieces(tmp_path, monkeypatch) -> Path:
    """A folder of documents, most of which are read in several pieces."""
    monkeypatch.setattr(packing, "_PIECE", 60)
    folder = FORMS["folder of txt"](tmp_path, DOCUMENTS)
    rows = read_rows(TextSource(str(folder)))
    assert len(rows) > 2 * len(DOCUMENTS)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_document_in_pieces_is_one_document(streaming, pieces):
    assert blocks(pieces, streaming=streaming) == expected_blocks(IDS)


def test_special_tokens_are_those_of_documents_and_not_of_pieces(pieces):
    """A Llama tokenizer puts one token in front, a T5 tokenizer one at the end."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<bos>"], special_tokens=True)
    begin = tokenizer.convert_tokens_to_ids("<bos>")
    template = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", begin), ("<eos>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer.eos_token_id == 0
    assert tokenizer(DOCUMENTS[0])["input_ids"] == [begin, *IDS[0]]
    assert blocks(pieces, tokenizer=tokenizer) == expected_blocks([[begin, *ids] for ids in IDS])


def test_shuffled_stream_keeps_pieces_of_a_document_together(pieces):
    shuffled = blocks(pieces, streaming=True, shuffle_buffer=1000, drop_last=False)
    expected = expected_blocks(IDS, drop_last=False)
    assert shuffled != expected
    assert sorted(shuffled) == sorted(expected)


def test_stream_does_not_hold_much_of_a_long_text(tmp_path, monkeypatch):
    """A piece has a million characters: some tens of them as tokens are gigabytes."""
    (tmp_path / "a.txt").write_text("0 times 0 is 0.\n" * 1000)
    monkeypatch.setattr(packing, "_PIECE", 16)
    read, rows_of = [], packing._text_file_rows

    def counted(**kwargs):
        for row in rows_of(**kwargs):
            read.append(row)
            yield row

    monkeypatch.setattr(packing, "_text_file_rows", counted)
    rows = packed_blocks([TextSource(str(tmp_path / "a.txt"))], TOKENIZER, LENGTH, streaming=True)
    read.clear()
    assert len(next(iter(rows))["input_ids"]) == LENGTH
    assert 1 < len(read) < 40


# Documents do not see each other.


MODELS = {
    "plain": {},
    "latent": ATTENTIONS["latent"],
    "sliding window": ATTENTIONS["sliding_window"],
    "grouped_top_k": {"router_type": "grouped_top_k", "router_logit_ema_strength": 0.5},
}
PARTS = [[5, 11, 7], [1, 1, 14, 6, 1], [23]]
"""Lengths of the documents of each sequence."""


def packed_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            "input_ids": torch.randint(1, VOCABULARY, (sum(lengths),), generator=generator).numpy(),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).numpy(),
        }
        for lengths in PARTS
    ]
    return collate_packed(rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_document_has_the_logits_and_the_loss_that_it_has_alone(kind, attention):
    model = make_model(**MODELS[kind])
    model.set_attn_implementation(attention)
    batch = packed_batch()
    with torch.no_grad():
        outputs = model(**batch, use_cache=False)  # as Trainer has it; a cache holds one document
        losses, targets = 0.0, 0
        for ids, lengths, logits in zip(batch["input_ids"], PARTS, outputs.logits, strict=True):
            for document, packed in zip(ids.split(lengths), logits.split(lengths), strict=True):
                alone = model(document[None]).logits[0]
                assert_close(packed, alone)
                losses += F.cross_entropy(alone[:-1], document[1:], reduction="sum").item()
                targets += len(document) - 1
    assert outputs.loss.item() == pytest.approx(losses / targets, rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_no_gradient_goes_from_a_document_to_another(kind, attention):
    """Exactly none, whereas logits of other documents may move by rounding, with the tokens that share an expert."""
    model = make_model(**MODELS[kind])
    model.set_attn_implementation(attention)
    batch = packed_batch()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, position_ids=batch["position_ids"], use_cache=False).logits
    logits[0, 5:16].square().sum().backward()
    reached = embeddings.grad.ne(0).any(-1)
    assert reached[0, 5:16].all()
    assert reached.sum() == 11


def test_first_tokens_are_no_targets_and_all_others_are():
    batch = packed_batch()
    first = batch["position_ids"] == 0
    assert first.sum() == sum(map(len, PARTS))
    assert (batch["labels"][first] == -100).all()
    assert torch.equal(batch["labels"][~first], batch["input_ids"][~first])
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


# Mixtures.


def numbered_source(folder: Path, source: int, count: int, weight: float | None) -> TextSource:
    """Sequences of LENGTH tokens of one value each, 1000 times the source's number plus that of the sequence."""
    path = folder / f"{source}.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [1000 * source + n] * LENGTH}) + "\n" for n in range(count)))
    return TextSource(str(path), weight=weight)


def drawn(sources: list[TextSource], **kwargs) -> list[int]:
    """Numbers of the sequences of a mixture."""
    found = blocks(*sources, tokenizer=None, **kwargs)
    assert all(ids == ids[:1] * LENGTH and positions == list(range(LENGTH)) for ids, positions in found)
    return [ids[0] for ids, _ in found]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares_of_the_tokens(streaming, tmp_path):
    weights = (3, 1, 6)
    sources = [numbered_source(tmp_path, n, 150, weight) for n, weight in enumerate(weights)]
    numbers = drawn(sources, streaming=streaming)
    assert set(numbers) == {1000 * n + i for n in range(3) for i in range(150)}, "each is used up"
    for n, weight in enumerate(weights):
        share, expected = sum(number // 1000 == n for number in numbers) / len(numbers), weight / 10
        assert abs(share - expected) < 3 * (expected * (1 - expected) / len(numbers)) ** 0.5
        own = [number % 1000 for number in numbers if number // 1000 == n]
        assert own == [i % 150 for i in range(len(own))], "in order, and from the start again"


def test_seed_draws_another_mixture(tmp_path):
    sources = [numbered_source(tmp_path, n, 50, 1) for n in range(2)]
    first, again, other = (drawn(sources, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_sources_without_weights_are_used_once(tmp_path):
    sources = [numbered_source(tmp_path, n, count, None) for n, count in enumerate((5, 20))]
    assert drawn(sources) == [*range(5), *range(1000, 1020)]


def test_streams_without_weights_are_drawn_evenly(tmp_path):
    sources = [numbered_source(tmp_path, n, 400, None) for n in range(2)]
    numbers = drawn(sources, streaming=True)[:400]
    first = [number for number in numbers if number < 1000]
    assert 160 < len(first) < 240
    assert first == list(range(len(first)))


# The cache.


@pytest.mark.parametrize("form", ["jsonl", "folder of txt", "folder of jsonl", "parquet"])
def test_second_call_reads_the_cache(form, tmp_path):
    sources = [TextSource(str(FORMS[form](tmp_path, DOCUMENTS)))]

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}

    first = packed_blocks(sources, TOKENIZER, LENGTH)
    before = files()
    assert any("cache-" in name for name in before), "of the tokens too"
    second = packed_blocks(sources, make_tokenizer(), LENGTH)
    assert files() == before
    assert [file["filename"] for file in second.cache_files] == [file["filename"] for file in first.cache_files]


@pytest.mark.parametrize("form", ["jsonl", "folder of txt", "folder of jsonl", "parquet"])
def test_changed_file_is_noticed(form, tmp_path):
    changed = [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]]
    source = FORMS[form](tmp_path, DOCUMENTS)
    first = blocks(source)
    if source.is_dir():
        source.rename(tmp_path / "old")
    assert FORMS[form](tmp_path, changed) == source
    later = os.stat(tmp_path).st_mtime + 60
    for path in [source, *source.glob("*")]:
        os.utime(path, (later, later))
    assert blocks(source) == expected_blocks([IDS[1], IDS[0], *IDS[2:]]) != first


def test_other_tokenizer_and_other_length_are_noticed(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    other = make_tokenizer()
    other.add_tokens(["times"])
    for tokenizer, length in ((TOKENIZER, LENGTH), (other, LENGTH), (TOKENIZER, LENGTH + 1)):
        ids = [[*row, 0] for row in tokenizer(DOCUMENTS)["input_ids"] if row]
        assert blocks(source, tokenizer=tokenizer, length=length) == expected_blocks(ids, length)


# What is refused.


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("{path: a", "which is no YAML mapping"),
        ("{path: a} b", "which is no YAML mapping"),
        ("{[1]: 2}", "which is no YAML mapping"),
        ("{path: a, wieght: 1}", "unknown key `wieght`: use path, name, split, column, weight, revision"),
        ("{path: a, 1: 2}", "unknown key `1`"),
        ("{a, b}", "unknown key `a`"),
        ("{}", "without `path`"),
        ("", "without `path`"),
        ("{weight: 1}", "without `path`"),
        ("{path: 5}", "`path` of 5"),
        ("{path: [a]}", "`path` of"),
        ("{path: a, split: [b]}", "`split` of a is"),
        ("{path: a, split: null}", "`split` of a is"),
        ("{path: a, column: null}", "`column` of a is"),
        ("{path: a, name: 3}", "`name` of a is 3"),
        *(
            (f"{{path: a, weight: {weight}}}", "`weight` of a is")
            for weight in ("0", "-1", "half", "[1]", ".nan", ".inf", "true")
        ),
    ],
)
def test_broken_entry_is_refused(entry, reason):
    with pytest.raises(ValueError, match="`some_argument`") as refusal:
        parse_sources([entry], "some_argument")
    assert reason in str(refusal.value)


def test_entries_are_paths_and_mappings():
    entries = ["org/a", "{path: org/b, name: c, split: 'test[:5]', column: d, weight: 0.5, revision: e}"]
    with pytest.raises(ValueError, match=r"`datasets` has entries with and without `weight`"):
        parse_sources(entries, "datasets")
    assert parse_sources(entries[:1], "datasets") == [TextSource("org/a")]
    assert parse_sources(entries[1:], "datasets") == [TextSource("org/b", "c", "test[:5]", "d", 0.5, "e")]


def lines(row: str, broken: str = "") -> bytes:
    return (f"{row}\n" * 50 + broken).encode()


BROKEN = {
    "no/such/folder/a.jsonl": (None, {}, "no/such/folder/a.jsonl cannot be read"),
    "missing folder": (None, {}, "missing folder cannot be read"),
    "a.docx": (b"text", {}, "its ending is .docx, not one of .txt, .jsonl"),
    "ending": (b"text", {}, "its ending is missing"),
    "empty.txt": (b"", {}, "empty.txt"),
    "empty.jsonl": (b"", {}, "empty.jsonl"),
    "latin.txt": (b"caf\xe9 " * 100, {}, "latin.txt cannot be read"),
    "broken.jsonl": (lines('{"text": "a b c d e f g"}', '{"tex'), {}, "broken.jsonl cannot be read"),
    "broken.parquet": (b"text", {}, "broken.parquet cannot be read"),
    "body.jsonl": (
        lines('{"body": "a b c"}'),
        {},
        "has no column `text`: name its text column as `column`, one of body",
    ),
    "number.jsonl": (lines('{"text": 5}'), {}, "number.jsonl"),
    "list.jsonl": (lines('{"text": ["a b c", "d e f"]}'), {}, "list.jsonl"),
    "mapping.jsonl": (lines('{"text": {"a": "b c d"}}'), {}, "mapping.jsonl"),
    "words.jsonl": (lines('{"input_ids": "a b c"}'), {}, "words.jsonl"),
    "fractions.jsonl": (lines('{"input_ids": [0.5, 1.5, 2.5]}'), {}, "fractions.jsonl"),
    "nothing.jsonl": (lines('{"text": null}'), {}, "nothing.jsonl is shorter than `sequence_length` (32 tokens)"),
    "short.txt": (b"short", {}, "short.txt is shorter than `sequence_length` (32 tokens): give more text"),
    "split.jsonl": (lines('{"text": "a"}'), {"split": "test"}, "split.jsonl cannot be read"),
    "part.jsonl": (lines('{"text": "a"}'), {"split": "train[:x"}, "part.jsonl cannot be read"),
    "split.txt": (lines("a"), {"split": "test"}, "it has no split `test`: use train"),
    "standard-library": (None, {"split": "test"}, "it has no split `test`: use train or validation"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_text_is_refused_by_name(name, streaming, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, options, reason = BROKEN[name]
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        blocks(TextSource(name, **options), streaming=streaming)
    assert reason in str(refusal.value)


def test_text_without_tokenizer_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match=r"a.jsonl has text, and .* no tokenizer: name one as `tokenizer`"):
        blocks(source, tokenizer=None)


@pytest.mark.parametrize("length", [0, -1])
def test_sequence_length_must_be_positive(length, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match=rf"`sequence_length` is {length}"):
        blocks(source, length=length)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_licence_beside_the_data_is_no_data(streaming, tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", DOCUMENTS)
    (folder / "LICENSE.txt").write_text("All mine.\n")
    assert blocks(folder, streaming=streaming) == expected_blocks(IDS)


def test_what_the_tokenizer_puts_in_front_stays_there(tmp_path):
    """Also where it is the end-of-sequence token, as in OPT; and nothing of what it puts behind."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<cls>", "<sep>"], special_tokens=True)
    begin, end = tokenizer.convert_tokens_to_ids(["<cls>", "<sep>"])
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    for template, first in (("<cls> $A <sep>", begin), ("<eos> $A", 0)):
        specials = [("<cls>", begin), ("<sep>", end), ("<eos>", 0)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
        assert blocks(source, tokenizer=tokenizer) == expected_blocks([[first, *ids] for ids in IDS])
