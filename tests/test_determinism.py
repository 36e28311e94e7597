"""A build is the same in every process, with every number of threads, byte for byte."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.conftest import DEMO_LM, ROOT, TINY, contents

# In a fresh process each time: a float64 build, a float32 one, and what they are saved as.
BUILD = """
import sys
import torch
from safetensors.torch import save_file
import st_embfilter
from st_embfilter.unembedding.source import open_unembedding
from st_embfilter.spectrum.band import Band

demo, large, output, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # above the number of cores it takes no environment's word
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

PROCESSES = {"first": 1, "second": 1, "two threads": 2, "three threads": 3}
CASES = ("demo", "large")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that four processes wrote."""
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
        )
    return folders


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("other", list(PROCESSES)[1:])
def test_every_process_writes_the_same_bytes(
    builds: dict[str, Path], case: str, other: str
) -> None:
    first, second = contents(builds["first"] / case), contents(builds[other] / case)
    place = "2_Dense/" if case == "demo" else ""
    files = {f"{place}model.safetensors", f"{place}embfilter_spectrum.safetensors"}
    assert {*files, "embfilter.json", "README.md"} <= set(first)
    assert set(first) == set(second)
    for name, content in first.items():
        assert second[name] == content, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("other", list(PROCESSES)[1:])
def test_every_direction_has_the_same_bits(builds: dict[str, Path], case: str, other: str) -> None:
    file = f"{case}.safetensors"
    one = load_file(builds["first"] / file)
    assert (one["error"] > 0) == (case == "large")  # which arithmetic it was
    assert (builds[other] / file).read_bytes() == (builds["first"] / file).read_bytes()
