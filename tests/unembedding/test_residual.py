"""The residual stream: what reads and writes it, and that it can be rotated."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from st_embfilter.errors import UnembeddingError
from st_embfilter.unembedding.residual import bake, final_norm, residual_of
from tests.conftest import FLOAT32, FLOAT64, GRAM64

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 120,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input: those of transformers compute in float32."""

    def __init__(self, norm: nn.Module, offset: float) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * (self.weight + self.offset)


def random_lm(family: str, dtype: torch.dtype, *, tied: bool, **config: object) -> PreTrainedModel:
    """A random model in which every parameter matters, gains and biases too."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **(SIZES | {"tie_word_embeddings": tied} | config))
    model = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    if dtype == torch.float64:
        offset = final_norm(made).offset
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ExactNorm(module, offset))
    return model


def random_rotation(d: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def run(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits and the state after the final norm."""
    tokens = torch.randint(0, 120, (3, 17), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    return output.logits, output.hidden_states[-1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, GRAM64), (torch.float32, FLOAT32)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_the_state_is_rotated(
    family: str, dtype: torch.dtype, tolerance: float, tied: bool
) -> None:
    model = random_lm(family, dtype, tied=tied)
    residual = residual_of(model.config)
    rotation = random_rotation(32)
    logits, state = run(model)
    gain = model.get_parameter(residual.reads[residual.head]).detach() + residual.offset
    baked = bake(model.state_dict(), residual, rotation)
    twin = random_lm(family, dtype, tied=False)
    twin.load_state_dict(baked)
    new_logits, new_state = run(twin)
    assert float((new_logits - logits).norm() / logits.norm()) < tolerance
    expected = (state.double() / gain.double()) @ rotation.T  # R n
    assert float((new_state - expected).norm() / expected.norm()) < tolerance


def test_rmsnorm_commutes_with_rotations_and_a_gain_does_not() -> None:
    norm = ExactNorm(LlamaRMSNorm(32), 0.0).double()
    rotation = random_rotation(32)
    x = torch.randn(5, 32, dtype=torch.float64)
    assert torch.allclose(norm(x @ rotation.T), norm(x) @ rotation.T, rtol=0, atol=FLOAT64)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, 32))
    assert not torch.allclose(norm(x @ rotation.T), norm(x) @ rotation.T, atol=1e-3)


def test_names_of_every_layer() -> None:
    residual = residual_of(AutoConfig.for_model("qwen2", **SIZES))
    layers = [f"model.layers.{n}" for n in range(3)]
    assert residual.writes == {
        f"{layer}.{name}.weight"
        for layer in layers
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert len(residual.reads) == 3 * 5 + 1
    assert residual.reads["lm_head.weight"] == "model.norm.weight"
    assert residual.gains == {
        "model.norm.weight",
        *(f"{layer}.{norm}.weight" for layer in layers for norm in (
            "input_layernorm", "post_attention_layernorm"
        )),
    }  # fmt: skip


def test_biases_of_what_adds_to_the_stream_are_rotated() -> None:
    model = random_lm("llama", torch.float64, tied=False, attention_bias=True, mlp_bias=True)
    residual = residual_of(model.config)
    assert "model.layers.0.mlp.down_proj.bias" in residual.writes
    logits, _ = run(model)
    model.load_state_dict(bake(model.state_dict(), residual, random_rotation(32)))
    assert torch.allclose(run(model)[0], logits, rtol=0, atol=GRAM64 * float(logits.abs().max()))


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("gemma2", {}, "post_attention_layernorm' behind .*o_proj' \\(a post-norm\\)"),
        ("gemma3_text", {}, "a post-norm"),
        ("gpt2", {"n_embd": 32, "n_layer": 1}, "LayerNorm\\), which subtracts the mean"),
        ("cohere", {}, "CohereLayerNorm\\), which subtracts the mean"),
        ("mixtral", {"num_local_experts": 2}, "which no linear layer reads"),
        ("gemma3", {}, "composite model type"),
    ],
)
def test_other_streams_are_refused_with_the_reason(
    family: str, config: dict[str, object], reason: str
) -> None:
    sizes = {} if family in ("gpt2", "gemma3") else SIZES
    with pytest.raises(UnembeddingError, match=reason):
        residual_of(AutoConfig.for_model(family, **(sizes | config)))


def test_parallel_blocks_are_refused() -> None:
    """GPT-J's form with RMSNorm: attention and MLP read one norm side by side."""
    from transformers.models.llama import modeling_llama

    class Parallel(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
            x = self.input_layernorm(hidden_states)
            return hidden_states + self.self_attn(hidden_states=x, **kwargs)[0] + self.mlp(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "LlamaDecoderLayer", Parallel)
        with pytest.raises(UnembeddingError, match=r"parallel blocks: .*mlp and .*self_attn read"):
            residual_of(AutoConfig.for_model("llama", **SIZES))


def test_a_model_whose_logits_change_is_refused() -> None:
    """Clamping is no norm and no linear layer; only the run shows it."""
    from transformers.models.llama import modeling_llama

    class Clamped(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
            return super().forward(hidden_states.clamp(min=0), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "LlamaDecoderLayer", Clamped)
        with pytest.raises(UnembeddingError, match="logits change by"):
            residual_of(AutoConfig.for_model("llama", **SIZES))


def test_the_final_norm_is_found_where_the_stream_cannot_be_rotated() -> None:
    norm = final_norm(AutoConfig.for_model("gemma3_text", **SIZES))
    assert (norm.weight, norm.offset) == ("model.norm.weight", 1.0)
    with pytest.raises(UnembeddingError, match="subtracts the mean"):
        final_norm(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1))
