"""Reading W_U from a Hub over real HTTP: its bytes alone; faults end well or in one sentence."""

import json
import logging
import re
import tracemalloc
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

from st_embfilter import build_filter, from_causal_lm
from st_embfilter.errors import HubError, UnembeddingError
from st_embfilter.files import hub as hub_module
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.unembedding import matrix as unembedding
from st_embfilter.unembedding.source import open_unembedding
from tests.conftest import DEMO_LM, MakeLM
from tests.hub_server import TOKEN, LocalHub

RANGE = r"/lfs/.*model.*safetensors"


def read(name: str = "org/lm", **options: object) -> EmbedFilterLayer:
    return build_filter(name, show_progress_bar=False, **options)


def same_filter(ours: EmbedFilterLayer, folder: Path) -> bool:
    expected = read(str(folder))
    return (
        torch.equal(ours.projection, expected.projection)
        and ours.metadata.provenance.sha256 == expected.metadata.provenance.sha256
    )


def cached_files(tmp_path: Path) -> set[str]:
    """Names of what is in the cache and of blobs that are not whole."""
    return {
        p.name for p in (tmp_path / "hub").rglob("*") if "snapshots" in p.parts and p.is_file()
    } | {p.name for p in tmp_path.rglob("*.incomplete")}


# What is read ------------------------------------------------------------------------------------


def test_only_the_bytes_of_the_tensor_are_served(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.add("org/lm", DEMO_LM)
    layer = read()
    stored = open_unembedding(DEMO_LM).stored
    headers = (DEMO_LM / "model.safetensors").stat().st_size - sum(8192 * 256 * 2 for _ in range(0))
    with (DEMO_LM / "model.safetensors").open("rb") as file:
        headers = 8 + int.from_bytes(file.read(8), "little")
    assert hub.sent(RANGE) == stored.nbytes + headers
    assert hub.sent() <= 1.02 * stored.nbytes + headers
    assert same_filter(layer, DEMO_LM)
    source = layer.metadata.provenance
    assert (source.model_id, source.revision) == ("org/lm", commit)
    assert cached_files(tmp_path) == {"config.json"}


@pytest.mark.parametrize("tied", [True, False])
def test_of_shards_only_one_header_and_the_tensor(
    hub: LocalHub, make_lm: MakeLM, tied: bool
) -> None:
    folder, _ = make_lm(shards="20KB", tie_word_embeddings=tied)
    hub.add("org/lm", folder)
    assert same_filter(read(), folder)
    files = {re.search(r"file=(.*)", r.path)[1] for r in hub.requests if not r.at_hub}
    assert len(files) == 1
    assert hub.sent(RANGE) <= 200 * 32 * 4 + 3000


@pytest.mark.parametrize("sharded", [True, False])
def test_bin_downloads_the_shard_that_holds_it(
    hub: LocalHub, make_lm: MakeLM, tmp_path: Path, sharded: bool
) -> None:
    folder, model = make_lm(torch_bin=True, tie_word_embeddings=False)
    if sharded:
        state = torch.load(folder / "pytorch_model.bin")
        (folder / "pytorch_model.bin").unlink()
        places = {
            key: f"pytorch_model-0000{1 + (key == 'lm_head.weight')}-of-00002.bin" for key in state
        }
        for shard in set(places.values()):
            torch.save({k: state[k] for k in state if places[k] == shard}, folder / shard)
        index = '{"weight_map": ' + str(places).replace("'", '"') + "}"
        (folder / "pytorch_model.bin.index.json").write_text(index)
    hub.add("org/lm", folder)
    found = open_unembedding("org/lm")
    assert torch.equal(torch.cat(list(found.blocks())), model.lm_head.weight)
    assert not found.stored.remote
    bins = {name for name in cached_files(tmp_path) if name.endswith(".bin")}
    assert bins == {"pytorch_model-00002-of-00002.bin" if sharded else "pytorch_model.bin"}


def test_blocks_are_requests_and_memory_is_bounded(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 2**18
    monkeypatch.setattr(
        unembedding, "_BLOCK_BYTES", 4 * block
    )  # counted in float64, stored in 16 bits
    hub.add("org/lm", {**{p.name: p.read_bytes() for p in DEMO_LM.iterdir() if p.is_file()}})
    stored = open_unembedding("org/lm").stored
    source = open_unembedding("org/lm")
    hub.requests.clear()
    tracemalloc.start()
    try:
        for _ in source.blocks():
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sizes = [request.sent for request in hub.requests if not request.at_hub]
    assert sizes == [block] * (stored.nbytes // block)
    # The one that is read, the one that is used, the one before it; the server is in here, too.
    assert peak < 6 * block < stored.nbytes


@pytest.mark.filterwarnings("ignore::st_embfilter.errors.DegenerateEdgeWarning")  # at limit 0
def test_a_remote_matrix_is_read_once_whatever_its_spectrum(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/lm", DEMO_LM)
    monkeypatch.setattr(unembedding, "_BLOCK_BYTES", 2**20)
    monkeypatch.setattr("st_embfilter.spectrum.gram.FLOAT32_TOLERANCE", 0.0)
    stored = open_unembedding("org/lm").stored
    hub.requests.clear()
    read()
    assert hub.sent(RANGE) <= 1.02 * stored.nbytes + 10_000


def test_a_whole_model_is_downloaded_once(hub: LocalHub, make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    hub.add("org/lm", folder)
    model = from_causal_lm("org/lm", device="cpu", show_progress_bar=False)
    assert same_filter(model[2], folder)
    size = (folder / "model.safetensors").stat().st_size
    assert size <= hub.sent(RANGE) <= size + 4000


def test_a_band_that_does_not_fit_costs_no_download(hub: LocalHub) -> None:
    hub.add("org/lm", DEMO_LM)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\] or an int in \[1, 256\]"):
        from_causal_lm("org/lm", keep=257)
    assert hub.sent() < 10_000


def test_a_revision_is_read(hub: LocalHub, make_lm: MakeLM) -> None:
    folder, _ = make_lm(seed=1)
    hub.add("org/lm", folder)
    other, _ = make_lm(name="other", seed=2)
    first = hub.repos["org/lm"].commits[0].sha
    hub.add("org/lm", other)
    assert same_filter(read(revision=first), folder)
    assert same_filter(read(), other)


# The cache and offline ---------------------------------------------------------------------------


def test_a_cached_file_is_read_from_disk(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/lm", DEMO_LM)
    for file in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("org/lm", file)
    before = hub.sent()
    assert same_filter(read(), DEMO_LM)
    assert hub.sent(RANGE) == before - hub.sent("config")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    assert same_filter(read(), DEMO_LM)
    assert len(hub.requests) == count


def test_offline_without_the_file(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/lm", DEMO_LM)
    read()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnembeddingError, match=r"none of them in org/lm \(offline; online, hf"):
        read()
    with pytest.raises(UnembeddingError, match=r"config.json, got none in org/other \(offline"):
        read("org/other")


def test_a_folder_goes_before_a_repository(
    hub: LocalHub, make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_lm()
    monkeypatch.chdir(folder.parent)
    assert same_filter(read("lm"), folder)
    assert not hub.requests


def test_the_token_stays_at_the_hub(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.add("org/lm", DEMO_LM, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same_filter(read(), DEMO_LM)
    assert {request.token for request in hub.requests if request.at_hub} == {TOKEN}
    assert {request.token for request in hub.requests if not request.at_hub} == {None}
    monkeypatch.delenv("HF_TOKEN")
    assert same_filter(read(token=TOKEN), DEMO_LM)
    assert TOKEN not in caplog.text
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_a_hub_that_serves_large_files_itself(hub: LocalHub, waits: list[float]) -> None:
    hub.has_storage = False
    hub.add("org/lm", DEMO_LM, private=True)
    assert same_filter(read(token=TOKEN), DEMO_LM)
    assert {request.token for request in hub.requests} == {TOKEN}
    hub.fail("cut", "resolve.*model.safetensors$", times=2, skip=2)
    hub.fail("500", "resolve.*model.safetensors$", times=1, skip=2)
    assert same_filter(read(token=TOKEN), DEMO_LM)
    hub.fail("401", "resolve.*model.safetensors$", skip=2)
    with pytest.raises(HubError, match="org/lm needs a valid token"):
        read(token=TOKEN)


def test_an_adapter_and_its_base_model(hub: LocalHub, make_lm: MakeLM) -> None:
    folder, _ = make_lm(tie_word_embeddings=False)
    commit = hub.add("org/lm", folder)
    query = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    config = {"base_model_name_or_path": "org/lm", "revision": None, "lora_alpha": 1}
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save({query: torch.ones(2, 32)}),
    }
    hub.add("org/adapter", files)
    layer = read("org/adapter")
    assert same_filter(layer, folder)
    source = layer.metadata.provenance
    assert (source.model_id, source.revision) == ("org/lm", commit)


# Faults that pass --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "options"),
    [
        ("500", "config.json", {"method": "HEAD", "times": 2}),
        ("503", "config.json", {"times": 2}),
        ("cut", "config.json", {"times": 2}),
        ("500", "resolve.*model.safetensors$", {"method": "HEAD", "times": 3}),
        ("502", "/lfs/", {"times": 3}),
        ("429", "/lfs/", {"times": 1}),
        ("cut", "/lfs/", {"times": 1, "skip": 2}),
        ("cut", "/lfs/", {"times": 5}),
        ("short", "/lfs/", {"times": 2}),
        ("403", "/lfs/", {"times": 1, "skip": 2}),  # a link that has expired
    ],
)
def test_passing_faults_end_well(
    hub: LocalHub, waits: list[float], kind: str, path: str, options: dict[str, object]
) -> None:
    hub.add("org/lm", DEMO_LM)
    hub.fail(kind, path, **options)
    assert same_filter(read(), DEMO_LM)
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_broken_read_goes_on_where_it_broke(hub: LocalHub, waits: list[float]) -> None:
    hub.add("org/lm", DEMO_LM)
    hub.fail("cut", "/lfs/", times=3, skip=2)
    assert same_filter(read(), DEMO_LM)
    stored = open_unembedding(DEMO_LM).stored
    # Nothing twice but what was on the wire when it was cut.
    assert hub.sent(RANGE) < 1.1 * stored.nbytes + 10_000
    assert not waits


def test_waits_double_and_obey_the_server(hub: LocalHub, waits: list[float]) -> None:
    hub.add("org/lm", DEMO_LM)
    hub.fail("500", "resolve.*model.safetensors$", method="HEAD", times=3)
    read()
    assert waits == [0.5, 1.0, 2.0]
    waits.clear()
    hub.fail(
        "429", "resolve.*model.safetensors$", method="HEAD", times=1, headers={"Retry-After": "7"}
    )
    read()
    assert waits == [7.0]


# Faults that stay --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "options", "message"),
    [
        ("500", "config.json", {"method": "HEAD"}, "must answer for org/lm, got 500; try again"),
        ("500", "config.json", {}, "must answer for org/lm, got 500; try again"),
        ("503", "model.safetensors$", {"method": "HEAD"}, "must answer for org/lm, got 503"),
        ("500", "/lfs/", {"skip": 2}, "got HTTP 500 from the storage; check the connection"),
        ("403", "/lfs/", {}, "got HTTP 403 from the storage"),
        (
            "401",
            "resolve",
            {"method": "HEAD"},
            "needs a valid token or does not exist, got 401; log in",
        ),
        ("403", "resolve", {"method": "HEAD"}, "needs a token with the right to do this, got 403"),
        ("404", "resolve", {"method": "HEAD"}, "got 404: it does not exist, or it is private"),
        ("cut", "/lfs/", {}, "must be reachable to read or write org/lm, got"),
        ("short", "/lfs/", {"skip": 2}, "bytes for bytes 6024-"),
        ("long", "/lfs/", {"skip": 2}, "bytes for bytes 6024-"),
        ("whole", "/lfs/", {}, r"must answer range requests \(206\), got 200"),
        ("etag", "/lfs/", {"skip": 2, "times": 1}, "must stay the same while it is read"),
    ],
)
def test_lasting_faults_are_one_sentence_and_leave_nothing(
    hub: LocalHub,
    waits: list[float],
    tmp_path: Path,
    kind: str,
    path: str,
    options: dict[str, object],
    message: str,
) -> None:
    hub.add("org/lm", DEMO_LM)
    hub.fail(kind, path, **options)
    with pytest.raises(HubError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert cached_files(tmp_path) <= {"config.json"}
    hub.faults.clear()
    assert same_filter(read(), DEMO_LM)


def test_a_file_that_changes_between_two_tries(hub: LocalHub, waits: list[float]) -> None:
    hub.add("org/lm", DEMO_LM)
    hub.fail("cut", "/lfs/", times=1, skip=2)
    hub.fail("etag", "resolve.*model.safetensors$", method="HEAD", skip=1, times=1)
    with pytest.raises(HubError, match=r"must stay the same while it is read, got ETag \w+ after"):
        read()


def test_no_hub_at_all(hub: LocalHub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    with pytest.raises(HubError, match="must be reachable to read or write org/lm, got ConnectErr"):
        read()


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ({"private": True}, None, "got 401: it does not exist, or it is private; check its name"),
        (
            {"private": True},
            "hf_wrong",
            "org/lm needs a valid token or does not exist, got 401",
        ),
        ({"gated": True}, None, "org/lm is gated and needs a token with access, got 403; ask for"),
    ],
)
def test_access(hub: LocalHub, options: dict[str, bool], token: str | None, message: str) -> None:
    hub.add("org/lm", DEMO_LM, **options)
    with pytest.raises(HubError, match=message):
        read(token=token)
    assert same_filter(read(token=TOKEN), DEMO_LM)


def test_wrong_names(hub: LocalHub) -> None:
    hub.add("org/lm", DEMO_LM)
    hub.add("org/empty", {"README.md": b""})
    hub.add("org/no-weights", {"config.json": (DEMO_LM / "config.json").read_bytes()})
    for name, revision, error, message in (
        ("org/none", None, HubError, "org/none must be a model folder or a Hub repository, got 4"),
        ("org/lm", "v9", HubError, "org/lm must have the revision 'v9', got 404"),
        ("org/empty", None, UnembeddingError, "config.json, got none in org/empty"),
        ("org/no-weights", None, UnembeddingError, "got none of them in org/no-weights"),
        ("no/such/folder", None, UnembeddingError, "a model folder must exist, got no/such/folder"),
    ):
        with pytest.raises(error, match=message):
            read(name, revision=revision)


def test_a_full_disk_is_no_fault_of_the_hub(
    hub: LocalHub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "hf_hub_download", full)
    with pytest.raises(HubError, match="cannot read or write files for org/lm: No space left"):
        read()
    assert not waits
