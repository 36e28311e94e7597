"""Token counts: streamed, saved, smoothed, read from files of several kinds."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from st_embfilter.errors import CorpusError, FormatError, ProvenanceError, ShapeError
from st_embfilter.lens.counts import Sampler, TokenCounts, count_tokens, read_texts
from tests.conftest import word_tokenizer


def counted(*texts: str) -> TokenCounts:
    return count_tokens(texts, word_tokenizer(), show_progress_bar=False)


def test_counts_every_token_and_adds_none() -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_bos_token = True
    found = count_tokens(
        ["the cup of the tea", "tea", "", "zzz"], tokenizer, show_progress_bar=False
    )
    names = {"the": 2, "cup": 1, "of": 1, "tea": 2, "<unk>": 1, "<s>": 0, "w30": 0}
    for name, count in names.items():
        assert found.counts[tokenizer.convert_tokens_to_ids(name)] == count
    assert (found.total, found.texts) == (7, 4)


def test_long_texts_are_counted_whole() -> None:
    assert counted("tea " * 500).total == 500  # the tokenizer's limit is 64


def test_reads_a_stream_batch_by_batch() -> None:
    ahead = 0

    def endless() -> Iterator[str]:
        nonlocal ahead
        for _ in range(2500):
            ahead += 1
            yield "tea"
        raise CorpusError("end")

    with pytest.raises(CorpusError, match="end"):
        count_tokens(endless(), word_tokenizer(), show_progress_bar=False)
    assert ahead == 2500
    assert (
        count_tokens(
            (text for text in ["tea"] * 2500), word_tokenizer(), show_progress_bar=False
        ).counts.max()
        == 2500
    )


@pytest.mark.parametrize("smoothing", [1.0, 0.5, 1e-6])
def test_smoothing_is_additive_over_all_rows(smoothing: float) -> None:
    found = counted("tea tea cup")
    logs = found.log_probabilities(250, smoothing=smoothing)
    total = 3 + smoothing * 250
    assert float(logs.exp().sum()) == pytest.approx(1)
    ids = word_tokenizer().convert_tokens_to_ids(["tea", "cup", "of"])
    for token, count in zip([*ids, 249], [2, 1, 0, 0], strict=True):
        assert float(logs[token].exp()) == pytest.approx((count + smoothing) / total)


def test_smoothing_and_rows_are_checked() -> None:
    with pytest.raises(CorpusError, match="smoothing must be > 0"):
        counted("tea").log_probabilities(200, smoothing=0)
    with pytest.raises(ShapeError, match="got token id 10 and 5 rows"):
        counted("tea").log_probabilities(5)
    # Fewer rows than tokens are fine as long as none of the missing ones occurs.
    assert counted("tea").log_probabilities(11).shape == (11,)


def test_groups() -> None:
    counts = torch.zeros(1000, dtype=torch.int64)
    counts[100:400] = 5
    counts[400:410] = 50
    counts[200] = 1
    groups = TokenCounts(counts, 1, "").groups(20)
    assert groups["frequent"].tolist() == [*range(400, 410), *range(100, 110)]
    assert groups["rare"].tolist() == [200, *range(399, 380, -1)]
    drawn = groups["random"]
    assert len(set(drawn.tolist())) == 20
    assert torch.equal(drawn, TokenCounts(counts, 1, "").groups(20)["random"])
    assert bool((counts[drawn] == 0).any())


def test_saved_counts_are_small_and_the_same(tmp_path: Path) -> None:
    found = counted("tea tea cup of zzz")
    found.save(tmp_path / "new" / "counts.safetensors")
    read = TokenCounts.load(tmp_path / "new" / "counts.safetensors")
    assert torch.equal(read.counts, found.counts)
    assert (read.texts, read.vocabulary) == (found.texts, found.vocabulary)
    assert (tmp_path / "new" / "counts.safetensors").stat().st_size < 500
    read.check_tokenizer(word_tokenizer())
    other = word_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ProvenanceError, match="count the corpus again with this model"):
        read.check_tokenizer(other)


def test_damaged_counts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "counts.safetensors"
    with pytest.raises(FormatError, match="must hold token counts"):
        TokenCounts.load(file)
    file.write_text("not a safetensors file, but long enough to look at")
    with pytest.raises(FormatError, match="must hold token counts"):
        TokenCounts.load(file)
    broken = counted("tea")
    broken.counts[10] = -4
    broken.save(file)
    with pytest.raises(FormatError, match="must be >= 0, got -4"):
        TokenCounts.load(file)
    tensors = {"ids": torch.tensor([1], dtype=torch.int32), "counts": torch.tensor([1])}
    for key, value in (("size", 10**30), ("size", 0), ("size", -1), ("texts", 10**30)):
        about = {"size": "20", "texts": "3", "vocabulary": "0" * 64} | {key: str(value)}
        save_file(tensors, file, metadata=about)
        with pytest.raises(FormatError, match=r"must speak of 1 to .* tokens"):
            TokenCounts.load(file)


def test_an_empty_corpus_is_an_error() -> None:
    with pytest.raises(CorpusError, match="at least one token, got 2 texts with none"):
        counted("", " ")


def test_text_and_column_files_hold_the_same_texts(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pandas as pd

    texts = ["first text", "second, with a comma", "third"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n  \n")
    rows = [{"id": i, "body": text} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    assert list(read_texts(str(tmp_path / "a.txt"))) == texts
    for suffix in ("jsonl", "csv", "tsv", "parquet"):
        assert list(read_texts(str(tmp_path / f"a.{suffix}"), "body")) == texts, suffix
    with pytest.raises(CorpusError, match="must have the column 'text', got id, body"):
        list(read_texts(str(tmp_path / "a.parquet"), "text"))


def test_columns_of_lists(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": ["a", "b"]}\n{"t": "c"}\n')
    assert list(read_texts(str(tmp_path / "a.jsonl"), "t")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", b"a\n", "text", "a text file has no columns"),
        ("a.txt", b"\xff\xfe\xff", None, "must be UTF-8 text"),
        ("a.jsonl", b"{}\n", None, "needs the name of a column, got none"),
        ("a.jsonl", b'{"b": 1}\n', "a", "line 1: must have 'a', got b"),
        ("a.jsonl", b"3\n", "a", "line 1: must be a JSON object, got 3"),
        ("a.jsonl", b"{\n", "a", "line 1: must be JSON"),
        ("a.jsonl", b'{"a": 1}\n', "a", "must hold texts, got int"),
        ("a.csv", b"a\n1\n", None, "needs the name of a column"),
        ("none.txt", None, None, "must be a file or a dataset's Hub id"),
        (".", None, None, "must be a file or a dataset's Hub id"),
    ],
)
def test_malformed_corpora(
    tmp_path: Path, name: str, content: bytes | None, column: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(read_texts(str(tmp_path / name), column))


def test_the_sampler_passes_all_on_and_keeps_a_fair_share() -> None:
    texts = [str(i) for i in range(1000)]
    kept = torch.zeros(1000)
    for seed in range(100):
        sampler = Sampler(texts, 50, seed=seed)
        assert list(sampler) == texts
        assert len(set(sampler.sample)) == 50
        kept[[int(text) for text in sampler.sample]] += 1
    # 5 of 100 draws expected for each text, 50 times that in each decile with sigma below 3.
    assert (kept.reshape(10, 100).sum(dim=1) - 500).abs().max() < 80
    few = Sampler(texts[:3], 50)
    list(few)
    assert few.sample == texts[:3]
