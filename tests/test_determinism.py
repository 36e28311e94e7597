"""A build is the same in every process, and with every number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from st_embfilter.spectrum.band import Band
from tests.conftest import DEMO_LM, ROOT, TINY, contents, sine

# In a fresh process each time: a float64 build, a float32 one, and what they are saved as.
BUILD = """
import sys
import torch
from safetensors.torch import save_file
import st_embfilter
from st_embfilter.unembedding.source import open_unembedding
from st_embfilter.spectrum.band import Band

demo, large, output, threads = sys.argv[1:]
assert torch.get_num_threads() == int(threads)
model = st_embfilter.from_causal_lm(demo, device="cpu", show_progress_bar=False)
st_embfilter.save_pretrained(model, f"{output}/demo")
st_embfilter.build_filter(large, show_progress_bar=False).save_pretrained(f"{output}/large")
for name, source in (("demo", demo), ("large", large)):
    spectrum, provenance = open_unembedding(source).fit(Band())
    tensors = {
        "directions": spectrum.directions.contiguous(),
        "singular_values": spectrum.singular_values,
        "error": torch.tensor(spectrum.subspace_error(Band())),
    }
    save_file(tensors, f"{output}/{name}.safetensors")
"""

PROCESSES = {"first": 1, "second": 1, "two threads": 2}
CASES = ("demo", "large")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that three processes wrote."""
    place = tmp_path_factory.mktemp("determinism")
    large = place / "lm"
    # More than 32 MiB in 16 bits: what is summed in float32 by default.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70_000, 256, generator=generator) * torch.linspace(3, 1, 256)
    AutoConfig.for_model(
        "llama", **{**TINY["llama"], "hidden_size": 256, "vocab_size": 70_000}
    ).save_pretrained(large)
    save_file({"lm_head.weight": weight.to(torch.bfloat16)}, large / "model.safetensors")
    folders = {}
    for name, threads in PROCESSES.items():
        folders[name] = place / name
        folders[name].mkdir()
        limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        subprocess.run(
            [sys.executable, "-c", BUILD, DEMO_LM, large, folders[name], str(threads)],
            env={**os.environ, **dict.fromkeys(limits, str(threads)), "PYTHONPATH": str(ROOT)},
            check=True,
            timeout=300,
        )
    return folders


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_the_same_bytes(builds: dict[str, Path], case: str) -> None:
    first, second = contents(builds["first"] / case), contents(builds["second"] / case)
    weights = "2_Dense/model.safetensors" if case == "demo" else "model.safetensors"
    assert {weights, "embfilter.json", "embfilter_spectrum.safetensors", "README.md"} <= set(first)
    assert set(first) == set(second)
    for name, content in first.items():
        assert second[name] == content, name


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_turns_no_subspace(builds: dict[str, Path], case: str) -> None:
    one = load_file(builds["first"] / f"{case}.safetensors")
    two = load_file(builds["two threads"] / f"{case}.safetensors")
    assert (one["error"] > 0) == (case == "large")  # which arithmetic it was
    assert torch.allclose(one["singular_values"], two["singular_values"], rtol=1e-9)
    for keep in (1.0, 0.5, 0.25, 0.125):
        rows = Band("bulk", keep).indices(256)
        assert sine(one["directions"][rows], two["directions"][rows]) <= 1e-9


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_no_metadata(builds: dict[str, Path], case: str) -> None:
    one, two = contents(builds["first"] / case), contents(builds["two threads"] / case)
    assert set(one) == set(two)
    for name in ("embfilter.json", "README.md"):
        assert one[name] == two[name], name
    weights = "2_Dense/model.safetensors" if case == "demo" else "model.safetensors"
    rows = [load_file(builds[name] / case / weights)["linear.weight"] for name in PROCESSES]
    assert np.abs((rows[0] - rows[2]).numpy()).max() <= 1e-7
