"""Bad data is an error that names file and line; good data of every form is read."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from st_embfilter.errors import DataError
from st_embfilter.evaluation.data import read_labelled, read_pairs, read_texts
from st_embfilter.evaluation.tasks import ClassificationTask, ClusteringTask, RetrievalTask, STSTask


def write(folder: Path, **files: str) -> Path:
    """Files whose names have __ for dots and ___ for slashes."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def test_pairs_of_every_form(tmp_path: Path) -> None:
    expected = [('a "q", b', "c", 1.5), ("d\u2028e", "f", 2.0), ("g", "", 0.0)]
    body = '"a ""q"", b",c,1.5\n"d\u2028e",f,2\ng,,0\n'
    plain = write(tmp_path, plain__csv=body) / "plain.csv"
    assert read_pairs(plain) == expected
    named = '\ufeffscore,Sentence2,sentence1\n1.5,c,"a ""q"", b"\n\n2,f,d\u2028e\n0,,g\n'
    assert read_pairs(write(tmp_path, named__csv=named) / "named.csv") == expected
    tabs = 'a "q", b\tc\t1.5\r\nd\u2028e\tf\t2\r\ng\t\t0\r\n'
    assert read_pairs(write(tmp_path, tabs__tsv=tabs) / "tabs.tsv") == expected
    packed = tmp_path / "packed.tsv.gz"
    packed.write_bytes(gzip.compress(tabs.encode()))
    assert read_pairs(packed) == expected
    assert STSTask.read(packed).info.name == "packed"


def test_labelled_texts_of_every_form(tmp_path: Path) -> None:
    write(tmp_path, a__csv='text,category\n"x\ny",one\nz,two\n', t__txt="x\nz\n")
    assert read_labelled(tmp_path / "a.csv") == [(2, "x\ny", "one"), (4, "z", "two")]
    write(tmp_path, labels__txt="one\ntwo\n")
    assert read_labelled(tmp_path / "t.txt") == [(1, "x", "one"), (2, "z", "two")]
    assert read_texts(tmp_path / "t.txt") == ["x", "z"]


PAIRS_HEADER = "sentence1,sentence2,score\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold at least one row, got an empty file"),
        ("\n\n", "must hold at least one row, got an empty file"),
        ("sentence1,score\na,1\n", "line 1: needs the columns sentence1, sentence2, score"),
        ("a,b\nc,d\n", "line 1: needs the columns sentence1, sentence2, score"),
        ("a,b,high\nc,d,1\n", "line 1: needs the columns"),
        (PAIRS_HEADER + "a,b,1\nc,d,high\n", "line 3: the score must be a number, got 'high'"),
        (PAIRS_HEADER + "a,b,1\nc,d,nan\n", "line 3: the score must be a number, got 'nan'"),
        (PAIRS_HEADER + '"a\nb",c,1\nd,e\n', "line 4: needs 3 fields, got 'd, e'"),
        (PAIRS_HEADER + '"a"x,c,1\n', "line 2: "),
        (PAIRS_HEADER + "a,b,1\nc,d,2\n", "must hold at least 3 pairs, got 2"),
    ],
)
def test_bad_pairs(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path, pairs__csv=content)
    with pytest.raises(DataError, match=r"pairs.csv") as caught:
        STSTask.read(tmp_path / "pairs.csv")
    assert message in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the file must exist, got .*none.csv"):
        STSTask.read(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("a,b,1\nd\xe9,e,2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.csv, line 2: must be UTF-8"):
        STSTask.read(tmp_path / "latin.csv")
    whole = gzip.compress(b"".join(b"a%d,b,1\n" % i for i in range(999)))
    for damaged in (
        whole[:-9],
        whole[:99] + bytes(64) + whole[163:],
        whole[:-4] + b"abcd",
        b"\x1f",
    ):
        (tmp_path / "broken.csv.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"broken.csv.gz must be readable"):
            STSTask.read(tmp_path / "broken.csv.gz")
    with pytest.raises(DataError, match=r"a table must be a .csv or .tsv file, got .*pairs.json"):
        STSTask.read(write(tmp_path, pairs__json="[]") / "pairs.json")
    with pytest.raises(DataError, match=r"empty.txt must hold at least 1 texts, got 0"):
        read_texts(write(tmp_path, empty__txt="\n") / "empty.txt")


GOOD = {
    "corpus__jsonl": '{"_id": "d1", "title": "t", "text": "x"}\n{"_id": "d2", "text": "y"}\n',
    "queries__jsonl": '{"_id": "q1", "text": "x"}\n',
    "qrels___test__tsv": "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n",
}


def test_beir_folder(tmp_path: Path) -> None:
    task = RetrievalTask.read(write(tmp_path / "demo", **GOOD))
    assert task.documents == {"d1": "t x", "d2": "y"}
    assert task.judgements == {"q1": {"d1": 2, "d2": 0}}
    assert (task.info.name, task.info.split, task.info.metric) == ("demo", "test", "ndcg_at_10")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus__jsonl", "", "corpus.jsonl must hold at least one text, got an empty file"),
        ("corpus__jsonl", '{"_id": "d1"}\n', "corpus.jsonl, line 1: must be an object with _id"),
        ("corpus__jsonl", '{"_id": "d1", "text": "x"}\n[]', "corpus.jsonl, line 2: must be a JSON"),
        ("queries__jsonl", "{", "queries.jsonl, line 1: must be JSON"),
        (
            "queries__jsonl",
            '{"_id": "q1", "text": "x"}\n{"_id": "q1", "text": "y"}\n',
            "queries.jsonl, line 2: every _id must be there once, got 'q1' again",
        ),
        ("qrels___test__tsv", "q1\td1\t1\nq1\td9\t1\n", "line 2: no document has the id 'd9'"),
        ("qrels___test__tsv", "q9\td1\t1\n", "line 1: no query has the id 'q9'"),
        ("qrels___test__tsv", "a\tb\tc\nq1\td1\t0.5\n", "line 2: must be query id, document id"),
        ("qrels___test__tsv", "q1\td1\t0\n", "must judge a document relevant"),
    ],
)
def test_bad_beir_folders(tmp_path: Path, file: str, content: str, message: str) -> None:
    write(tmp_path, **(GOOD | {file: content}))
    with pytest.raises(DataError) as caught:
        RetrievalTask.read(tmp_path)
    assert message in str(caught.value)
    assert file.rsplit("___", maxsplit=1)[-1].replace("__", ".") in str(caught.value)


def test_beir_folder_without_judgements(tmp_path: Path) -> None:
    write(tmp_path, **{k: v for k, v in GOOD.items() if "qrels" not in k})
    with pytest.raises(DataError, match=r"must hold qrels/test.tsv or qrels-test.tsv or qrels.tsv"):
        RetrievalTask.read(tmp_path)


HEADER = "text,label\n"
TWO_EACH = "a,x\nb,x\nc,y\nd,y\n"


def classification(folder: Path) -> None:
    ClassificationTask.read(folder)


def clustering(folder: Path) -> None:
    ClusteringTask.read(folder / "train.csv")


@pytest.mark.parametrize(
    ("read", "train", "test", "message"),
    [
        (classification, "text\na\n", "", "train.csv, line 1: needs the columns text and label"),
        (classification, HEADER, "", "train.csv must hold at least 2 texts, got 0"),
        (
            classification,
            f"{HEADER}{TWO_EACH}e,z\n",
            "",
            "train.csv, line 6: the label 'z' must have two examples, got one",
        ),
        (
            classification,
            HEADER + TWO_EACH,
            f"{HEADER}a,x\nb,w\n",
            "test.csv, line 3: the label 'w' has no training example",
        ),
        (classification, f"{HEADER}a,x\nb,\n", "", "train.csv, line 3: needs a label"),
        (
            clustering,
            f"{HEADER}a,x\nb,x\n",
            "",
            "train.csv must have at least two labels",
        ),
        (clustering, f"{HEADER}a,x\nb,x\nc,y\n", "", "train.csv, line 4: the label 'y' must have"),
    ],
)
def test_bad_labels(
    tmp_path: Path, read: Callable[[Path], None], train: str, test: str, message: str
) -> None:
    write(tmp_path, train__csv=train, test__csv=test or HEADER + TWO_EACH)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert message in str(caught.value)


def test_texts_and_labels_that_do_not_match(tmp_path: Path) -> None:
    write(tmp_path, titles__txt="a\nb\nc\n", labels__txt="1\n2\n")
    with pytest.raises(DataError, match=r"titles.txt and labels.txt must have the same number"):
        ClusteringTask.read(tmp_path / "titles.txt")
    write(tmp_path, labels__txt="1\n\n2\n")
    with pytest.raises(DataError, match=r"labels.txt, line 2: needs a label, got an empty line"):
        ClusteringTask.read(tmp_path / "titles.txt")
    with pytest.raises(DataError, match=r"must hold test.csv or test.tsv"):
        ClassificationTask.read(write(tmp_path, train__csv=HEADER + TWO_EACH))
