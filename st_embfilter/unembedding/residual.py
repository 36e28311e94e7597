"""How a language model's tensors meet its residual stream, found by running a small copy of it.

The copy has the config's architecture and layers, random weights and narrow matrices. Which linear
layer reads which norm is seen from the tensors that pass between its modules, so no list of
architectures or parameter names has to be kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from st_embfilter.errors import UnembeddingError
from st_embfilter.text import first_line

#: Width of the small copy; no usual head width, so that it tells what belongs to the stream.
_D: Final = 144
_SMALL: Final[Mapping[str, Any]] = {
    "hidden_size": _D,
    "intermediate_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

#: Far above what float32 arithmetic inside a norm leaves, far below what a wrong plan does.
_GUARD: Final = 1e-3


@dataclass(frozen=True)
class FinalNorm:
    """The RMSNorm whose output the unembedding matrix reads.

    Attributes:
        weight: Name of its parameter.
        offset: What it adds to the parameter: 0, or 1 where the gain is 1 + weight (Gemma).
    """

    weight: str
    offset: float


@dataclass(frozen=True)
class Residual:
    """How the tensors of a pre-norm RMSNorm model meet its residual stream.

    Attributes:
        embedding: Name of the input embedding (V, d), whose rows start the stream.
        head: Name of the unembedding matrix (V, d).
        reads: Names of the matrices (n, d) that read the stream through a norm, the head among
            them, with the name of that norm's weight (d,).
        writes: Names of the matrices (d, n) and biases (d,) whose result is added to the stream.
        offset: What the norms add to their weights, see `FinalNorm`.
    """

    embedding: str
    head: str
    reads: Mapping[str, str]
    writes: frozenset[str]
    offset: float = 0.0

    @property
    def gains(self) -> frozenset[str]:
        """Names of the norms' weights."""
        return frozenset(self.reads.values())


@dataclass(frozen=True)
class _Norm:
    name: str
    module: nn.Module
    after: str | None  # the linear layer whose output it takes
    offset: float | None  # None if it is no RMSNorm


@dataclass(frozen=True)
class _Trace:
    """What passed between the modules of a small model in one run."""

    model: nn.Module
    norms: Mapping[str, _Norm]
    reads: Mapping[str, str]  # linear layer to norm
    writes: tuple[str, ...]

    @property
    def head(self) -> str:
        return _name_of(self.model, self.model.get_output_embeddings())  # type: ignore[operator]


def final_norm(config: PretrainedConfig) -> FinalNorm:
    """The norm before the unembedding matrix of a config's language model.

    Raises:
        UnembeddingError: If there is none, or it is no RMSNorm.
    """
    trace = _traced(config)
    norm = trace.norms.get(trace.reads.get(trace.head, ""))
    if norm is None:
        raise UnembeddingError(
            "folding needs an unembedding matrix that reads a norm's output, got "
            f"{type(trace.model).__name__}, where none was seen"
        )
    if norm.offset is None:
        raise _no_rms(norm)
    return FinalNorm(f"{norm.name}.weight", norm.offset)


def residual_of(config: PretrainedConfig) -> Residual:
    """How the tensors of a config's language model meet its residual stream.

    Proven on the small copy: with its gains folded and its stream rotated, its logits stay.

    Raises:
        UnembeddingError: Gives the reason if the stream of this model cannot be rotated.
    """
    trace = _traced(config)
    by_norm: dict[str, set[str]] = {name: set() for name in trace.norms}
    for linear, norm_name in trace.reads.items():
        by_norm[norm_name].add(linear.rpartition(".")[0])
    for norm in trace.norms.values():
        if norm.offset is None:
            raise _no_rms(norm)
        if norm.after is not None:
            raise _refusal(
                f"the norm {norm.name!r} behind {norm.after!r} (a post-norm), whose gain acts on "
                "what is added to the stream and does not commute with a rotation"
            )
        if len(by_norm[norm.name]) > 1:
            blocks = " and ".join(sorted(by_norm[norm.name]))
            raise _refusal(f"parallel blocks: {blocks} read one norm, {norm.name!r}")
        if not by_norm[norm.name]:
            raise _refusal(f"the norm {norm.name!r}, which no linear layer reads")
    offsets = {norm.offset for norm in trace.norms.values()}
    if len(offsets) != 1 or trace.head not in trace.reads:
        raise _refusal("norms of several kinds, or none before the head")
    model = trace.model
    names = set(model.state_dict())
    written = [f"{name}.{part}" for name in trace.writes for part in ("weight", "bias")]
    residual = Residual(
        embedding=f"{_name_of(model, model.get_input_embeddings())}.weight",  # type: ignore[operator]
        head=f"{trace.head}.weight",
        reads={f"{linear}.weight": f"{norm}.weight" for linear, norm in trace.reads.items()},
        writes=frozenset(name for name in written if name in names),
        offset=float(offsets.pop() or 0.0),
    )
    _prove(model, residual)
    return residual


def bake(state: Mapping[str, Tensor], residual: Residual, rotation: Tensor) -> dict[str, Tensor]:
    """Folds the gains of a state dict and rotates its residual stream; the logits stay the same.

    RMSNorm without a gain commutes with rotations: |R x| = |x|. So with x -> R x everywhere in the
    stream, a matrix W behind the gain g reads W diag(g) R^T, one that adds to the stream writes
    R W, and the state after the final norm is R n, n of unit root mean square.

    Args:
        state: Tensors by name, any floating dtype. A head that is tied may be missing.
        residual: How they meet the stream.
        rotation: R, (d, d), orthogonal.

    Returns:
        A state dict of its own in the dtypes of the first, with a head that is not tied.
    """
    baked = dict(state)
    head = state.get(residual.head, state[residual.embedding])
    for name, gain in residual.reads.items():
        weight = head if name == residual.head else state[name]
        scale = state[gain].to(rotation.dtype) + residual.offset
        baked[name] = rotated_columns(weight, rotation, scale).to(weight.dtype)
    embedding = state[residual.embedding]
    baked[residual.embedding] = rotated_columns(embedding, rotation).to(embedding.dtype)
    for name in residual.writes:
        baked[name] = (rotation @ state[name].to(rotation.dtype)).to(state[name].dtype)
    for name in residual.gains:
        baked[name] = torch.full_like(state[name], 1.0 - residual.offset)
    return baked


def rotated_columns(block: Tensor, rotation: Tensor, gain: Tensor | None = None) -> Tensor:
    """Rows (n, d) of a matrix W as those of W diag(gain) R^T, in the dtype of R."""
    wide = block.to(rotation.dtype)
    return (wide if gain is None else wide * gain.to(rotation.dtype)) @ rotation.T


def check_gain(gain: Tensor) -> None:
    """Checks that the gain of a norm can be undone.

    Raises:
        UnembeddingError: If it is zero or not finite somewhere.
    """
    bad = (gain == 0) | ~torch.isfinite(gain)
    if bool(bad.any()):
        raise UnembeddingError(
            "the gains of the norm before the unembedding matrix must be finite and not zero to be "
            f"folded, got {int(bad.sum())} that are not, first at {int(bad.nonzero()[0])}; use the "
            "filter without norm='folded'"
        )


def _traced(config: PretrainedConfig) -> _Trace:
    model = _small_model(config)
    outputs: dict[int, tuple[str, Tensor]] = {}  # by storage, which stays alive here
    inputs: dict[str, tuple[nn.Module, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                inputs[name] = (module, given[0])
                outputs[_storage(output)] = (name, output)

        return hook

    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves.items()]
    try:
        with torch.no_grad():
            model(torch.arange(7)[None] + 3)
    except Exception as error:  # code of many architectures fails in many ways
        raise _unknown(config, error) from error
    finally:
        for handle in handles:
            handle.remove()
    made_by = {place: name for place, (name, _) in outputs.items()}
    linear = {name for name, (module, _) in inputs.items() if _is_linear(module)}
    norms = {}
    reads = {}
    writes = []
    for name, (module, given) in inputs.items():
        weight = getattr(module, "weight", None)
        source = made_by.get(_storage(given))
        if name not in linear and isinstance(weight, Tensor) and weight.shape == (_D,):
            norms[name] = _Norm(name, module, source if source in linear else None, _offset(module))
    for name in sorted(linear):
        module, given = inputs[name]
        source = made_by.get(_storage(given))
        if source in norms:
            reads[name] = source
        elif getattr(module, "out_features", 0) == _D:
            writes.append(name)
    return _Trace(model, norms, reads, tuple(writes))


def _small_model(config: PretrainedConfig) -> nn.Module:
    if config.get_text_config() is not config:
        raise _refusal(f"the composite model type {config.model_type!r}; give its language model")
    small = copy.deepcopy(config)
    try:
        for name, value in _SMALL.items():
            setattr(small, name, value)
        model: nn.Module = AutoModelForCausalLM.from_config(small)
    except Exception as error:  # as above
        raise _unknown(config, error) from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) * _D**-0.5
            parameter.copy_(values + (1.0 if parameter.ndim == 1 else 0.0))
    return model.float().eval()


def _offset(norm: nn.Module) -> float | None:
    """What an RMSNorm adds to its weight; None if this is no RMSNorm."""
    probe = copy.deepcopy(norm)
    ones = torch.ones(_D)
    x = torch.randn(3, _D, generator=torch.Generator().manual_seed(1)) + 1.0
    with torch.no_grad():
        gain = probe(ones[None])[0]
        expected = gain * x / x.square().mean(dim=-1, keepdim=True).sqrt()
        # Epsilon, 1e-5 as a rule, moves an RMSNorm by half of it over the mean square, which is
        # about 2; a norm that also subtracts the mean, which is 1 here, is another vector.
        if not torch.allclose(probe(x), expected, rtol=1e-3, atol=1e-3):
            return None
        probe.weight.zero_()  # type: ignore[operator]
        return float(probe(ones[None])[0].mean().round())


def _prove(model: nn.Module, residual: Residual) -> None:
    random = torch.randn(_D, _D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rotation = torch.linalg.qr(random)[0]
    tokens = torch.arange(11)[None] + 5
    with torch.no_grad():
        before = model(tokens).logits
        model.load_state_dict(bake(model.state_dict(), residual, rotation))
        after = model(tokens).logits
    change = float((after - before).norm() / before.norm())
    if not change < _GUARD:
        raise _refusal(f"a model whose logits change by {change:.1g} under a rotation")


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _name_of(model: nn.Module, module: object) -> str:
    return next((name for name, found in model.named_modules() if found is module), "")


def _refusal(what: str) -> UnembeddingError:
    return UnembeddingError(
        "only the stream of a sequential pre-norm model with RMSNorm can be rotated (Llama, "
        f"Mistral, Qwen2, Qwen3 and others of that form), got {what}; use the filter as a layer"
    )


def _no_rms(norm: _Norm) -> UnembeddingError:
    return _refusal(
        f"the norm {norm.name!r} ({type(norm.module).__name__}), which subtracts the mean or adds "
        "a bias and so does not commute with a rotation"
    )


def _unknown(config: PretrainedConfig, error: Exception) -> UnembeddingError:
    return _refusal(
        f"model type {config.model_type!r}, of which no small copy runs: {first_line(error)}"
    )
