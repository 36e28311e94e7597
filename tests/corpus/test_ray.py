"""The Ray engine: the files of the local one, also when a worker is killed."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import st_embfilter
from st_embfilter.corpus.cluster import shard_starts
from st_embfilter.corpus.inputs import MARKS, Position, Rows, find_inputs, index_rows
from st_embfilter.errors import CorpusError
from tests.conftest import DEMO_LM, contents


def test_shards_start_where_reading_finds_their_rows(tmp_path: Path) -> None:
    for name, count in (("a.txt", MARKS + 7), ("b.txt", 0), ("c.txt", 2 * MARKS)):
        (tmp_path / name).write_text("".join(f"{name} {i}\n" for i in range(count)))
    inputs = find_inputs([tmp_path])
    whole = list(Rows(inputs))
    starts = shard_starts(inputs, [index_rows(file, "text", None) for file in inputs], 1000)
    assert len(starts) == -(-len(whole) // 1000)
    for shard, start in enumerate(starts):
        assert shard * 1000 - start.number < MARKS
        assert next(iter(Rows(inputs, start=start))) == whole[start.number]
    assert shard_starts([], [], 1000) == [Position()]


# The workers import torch: minutes on a busy machine, so Ray is not in the extra dev.
ray = pytest.importorskip("ray", reason="needs the extra ray")
psutil = pytest.importorskip("psutil")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = st_embfilter.from_causal_lm(DEMO_LM, device="cpu", show_progress_bar=False)
    return st_embfilter.save_pretrained(found, tmp_path_factory.mktemp("ray") / "model")


def write(path: Path, count: int) -> Path:
    lines = [json.dumps({"text": f"text {i} " + "x " * (i % 60)}) for i in range(count)]
    path.write_text("\n".join([*lines, "bad", ""]))
    return path


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_one_of_which_is_killed(model: Path, tmp_path: Path) -> None:
    inputs = [write(tmp_path / "in.jsonl", 800)]
    options = {"shard_rows": 40, "npy": True, "show_progress_bar": False, "precision": "int8"}
    whole = st_embfilter.encode_corpus(model, inputs, tmp_path / "whole", **options).path
    killed = []

    def kill() -> None:
        """Kills a worker when there are two and some shards are done."""
        while not killed:
            time.sleep(0.1)
            workers = []
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has gone
                    if "MapWorker" in " ".join(process.cmdline()):
                        workers.append(process)
            if len(list((tmp_path / "out").glob("shard-*"))) >= 3 and len(workers) == 2:
                os.kill(workers[0].pid, signal.SIGKILL)
                killed.append(workers[0].pid)

    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        done = st_embfilter.encode_corpus(
            model, inputs, tmp_path / "out", engine="ray", workers=(2, 2), **options
        )
        assert killed
        assert (done.rows, done.bad) == (800, 1)
        assert contents(done.path) == contents(whole)
        with pytest.raises(CorpusError, match=r"row 800 of .*in.jsonl: no JSON.*finished shards"):
            st_embfilter.encode_corpus(
                model, inputs, tmp_path / "strict", engine="ray", strict=True, **options
            )
    finally:
        ray.shutdown()
