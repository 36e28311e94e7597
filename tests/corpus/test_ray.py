"""The Ray engine: the files of the local one, also when a worker is killed."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import st_embfilter
from st_embfilter.corpus import cluster as cluster_engine
from st_embfilter.corpus.cluster import shard_starts
from st_embfilter.corpus.inputs import MARKS, Position, Rows, find_inputs, index_rows
from st_embfilter.errors import CorpusError, WorkerError
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
def test_without_a_cluster_it_starts_its_own(model: Path, tmp_path: Path) -> None:
    inputs = [write(tmp_path / "in.jsonl", 60)]
    options = {"shard_rows": 20, "show_progress_bar": False}
    whole = st_embfilter.encode_corpus(model, inputs, tmp_path / "whole", **options).path
    found = st_embfilter.encode_corpus(model, inputs, tmp_path / "out", engine="ray", **options)
    assert contents(found.path) == contents(whole)
    assert not ray.is_initialized()


#: Memory that Ray may use beyond what is used already, in bytes.
MARGIN = 4 << 30

#: A module of a model that ends badly at a long text, while a file named `poison` lies beside it:
#: by an allocation that fails, as the system ends a process when memory is short, by taking more
#: memory than Ray lets a node use, or already when a worker loads it.
POISON = """
import os, pathlib, signal, torch

PLACE = pathlib.Path({place!r})

class Poison(torch.nn.Module):
    def forward(self, features):
        if features["input_ids"].shape[1] > 100 and (PLACE / "poison").exists():
            if (PLACE / "poison").read_text() == "allocate":
                torch.empty(1 << 62, dtype=torch.uint8)
            with (PLACE / "deaths").open("a") as file:
                file.write("x")
            if (PLACE / "poison").read_text() == "grow":
                held = [torch.ones({grow} >> 5) for _ in range(8)]  # of 4 bytes
                signal.sigtimedwait([], 60)  # Ray looks a few times a second
                return features
            os.kill(os.getpid(), signal.SIGKILL)
        return features

    def save(self, *arguments, **options):
        pass

    @classmethod
    def load(cls, *arguments, **options):
        if (PLACE / "poison").exists() and (PLACE / "poison").read_text() == "load":
            import ray

            if ray.get_runtime_context().get_actor_id() is not None:
                with (PLACE / "deaths").open("a") as file:
                    file.write("l")
                os.kill(os.getpid(), signal.SIGKILL)
        return cls()
"""


@pytest.fixture
def poisoned(model: Path, tmp_path: Path) -> Path:
    """The model with that module, and texts of which the 51st is long."""
    place = tmp_path / "model"
    shutil.copytree(model, place)
    (place / "poison.py").write_text(POISON.format(place=str(tmp_path), grow=2 * MARGIN))
    modules = json.loads((place / "modules.json").read_text())
    (place / "embfilter.json").unlink()  # a model of somebody else
    modules.append({"idx": len(modules), "name": "p", "path": "", "type": "poison.Poison"})
    (place / "modules.json").write_text(json.dumps(modules))
    lines = (f"text {i} {'word ' * 200 * (i == 50)}\n" for i in range(60))
    (tmp_path / "in.txt").write_text("".join(lines))
    return place


def run(model: Path, name: str, **options: object) -> Path:
    return st_embfilter.encode_corpus(
        model,
        [model.parent / "in.txt"],
        model.parent / name,
        shard_rows=10,
        trust_remote_code=True,
        show_progress_bar=False,
        **options,  # type: ignore[arg-type]
    ).path


def fails(model: Path, how: str, said: str) -> None:
    """One error, and the shards before the long text."""
    (model.parent / "poison").write_text(how)
    with pytest.raises(WorkerError, match=f"{said}; [1-5] finished shards? stays? in"):
        run(model, "parts", engine="ray")
    shards = {path.name for path in (model.parent / "parts").glob("shard-*")}
    assert shards
    assert "shard-000005.parquet" not in shards


DIED = "a worker died, also when its work was tried again.* smaller batch size help"


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_kills_a_worker_that_takes_the_memory_of_its_node(
    poisoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    if memory.available < 3 * MARGIN:
        pytest.skip("needs 12 GiB of memory that is free")
    monkeypatch.setattr(cluster_engine, "_RETRIES", 1)
    whole = contents(run(poisoned, "whole"))
    allowed = 1 - (memory.available - MARGIN) / memory.total
    with monkeypatch.context() as patched:
        patched.setenv("RAY_memory_usage_threshold", f"{allowed:.4f}")
        fails(poisoned, "grow", DIED)
    assert (tmp_path / "deaths").read_text() == "xx"  # once again, and no more
    (tmp_path / "poison").unlink()
    assert contents(run(poisoned, "parts", engine="ray")) == whole


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Of this machine, with room for two workers."""
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
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

    threading.Thread(target=kill, daemon=True).start()
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


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_worker_without_memory_is_one_error_and_shards_stay(
    poisoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_engine, "_RETRIES", 1)
    whole = contents(run(poisoned, "whole"))
    fails(poisoned, "allocate", "allocate memory.* smaller batch size helps")
    fails(poisoned, "kill", DIED)
    assert (tmp_path / "deaths").read_text() == "xx"  # once again, and no more
    monkeypatch.setattr(cluster_engine, "_RESTARTS", 1)
    fails(poisoned, "load", DIED)
    assert "xxll" in (tmp_path / "deaths").read_text()  # Ray Data may have begun another worker
    (tmp_path / "poison").unlink()
    assert contents(run(poisoned, "parts", engine="ray")) == whole
