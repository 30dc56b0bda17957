"""The four models, matched in parameters: Sessa, Sessa without feedback, and Llama and Mamba-2 of `transformers` (made here, nothing is downloaded).

At width 128, without embeddings and head: Sessa with 4 layers 595,716; without feedback with 5 layers 578,816 that do something (its feedback projections
stand still); Llama with 4 layers and 216 of SwiGLU 595,072; Mamba-2 with 5 layers, state 64, 590,328. Other widths scale the SwiGLU and the state alike.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import scan
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sessa_deploy import SessaConfig, SessaLM, UserError
from sessa_deploy.errors import need
from sessa_deploy.influence import end_to_end, stack

sys.path.insert(0, str(Path(__file__).parents[1]))  # for common.py

MODELS = ("sessa", "no-feedback", "llama", "mamba2")
TITLES = {"sessa": "Sessa", "no-feedback": "Sessa without feedback", "llama": "Llama", "mamba2": "Mamba-2"}
LAYERS = {"sessa": 4, "no-feedback": 5, "llama": 4, "mamba2": 5}
_HEAD_DIM, _MAMBA_HEAD, _CHUNK = 32, 32, 48


class Logits(nn.Module):
    """A causal model of transformers as ids (B,T) -> logits (B,T,V) float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def stack(self, x: Tensor) -> Tensor:
        """The layers' output of embeddings x (B,T,D); transformers' base models end with their norm."""
        out: Tensor = self.base(inputs_embeds=x, use_cache=False).last_hidden_state
        return out

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self.model.base_model


def need_transformers() -> None:
    """Raise UserError, one line, where `transformers` is missing or this Python is too old for it."""
    if sys.version_info < (3, 11):
        raise UserError("Llama and Mamba-2 come from transformers, which needs a newer Python", got=f"Python {sys.version_info[0]}.{sys.version_info[1]}",
                        allowed="Python >= 3.11", fix="name another interpreter: make paper PYTHON=python3.12 VENV=.venv-paper")
    need("transformers", extra="paper")
    import transformers

    transformers.logging.set_verbosity_error()  # that its Mamba-2 runs without CUDA kernels is known: the report says which path ran


def build(name: str, vocabulary: int, width: int = 128, layers: int | None = None, context: int = 1024, seed: int = 0) -> nn.Module:
    """A model of MODELS with random weights of `seed`: ids (B,T) int64 -> logits (B,T,V) float32. layers: None takes LAYERS.

    Matrices begin with the deviation width^-1/2, in every model alike. Seen of a Llama of width 64 on an easier Diffuse MQAR: with
    0.02 it knew no key after 1500 steps, with 0.1 it knew 87% after 1100.
    """
    count, heads = LAYERS[name] if layers is None else layers, max(1, width // _HEAD_DIM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in ("sessa", "no-feedback"):
            model = SessaLM(SessaConfig(d_model=width, n_layers=count, n_heads=heads, vocab_size=vocabulary, max_context=context))
            model.reset_parameters(width**-0.5)
            return without_feedback(model) if name == "no-feedback" else model
        need_transformers()
        return Logits(_llama(vocabulary, width, count, heads, context) if name == "llama" else _mamba(vocabulary, width, count))


def without_feedback(model: SessaLM) -> SessaLM:
    """The paper's ablation: gamma = 0 everywhere and frozen, so that s = f; what only the feedback would read is frozen too."""
    for layer in model.layers:
        mixer = layer.mixer
        nn.init.zeros_(mixer.gamma_bias)
        nn.init.zeros_(mixer.gamma_ctx.weight)
        for p in (mixer.gamma_bias, mixer.gamma_ctx.weight, *mixer.proj_fb.parameters()):
            p.requires_grad_(False)
    return model


def _causal(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **rest: Any) -> tuple[Tensor, None]:
    """PyTorch's causal attention for transformers: a mask of its own would be made, and looked at by the host, at every step."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2).contiguous(), None


def _llama(vocabulary: int, width: int, layers: int, heads: int, context: int) -> nn.Module:
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("causal", _causal)  # a name without a kind of mask: none is made
    swiglu = max(8, round(width * 5 / 3 / 8) * 8)  # 216, 320, 424 at 128, 192, 256
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=swiglu, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=context, tie_word_embeddings=False, initializer_range=width**-0.5, attn_implementation="causal",  # type: ignore[call-arg]
        bos_token_id=None, eos_token_id=None))


def _mamba(vocabulary: int, width: int, layers: int) -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    scan.install()
    state = 64 if width <= 128 else 128
    return Mamba2ForCausalLM(Mamba2Config(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, state_size=state, expand=2, n_groups=1, num_heads=2 * width // _MAMBA_HEAD,
        head_dim=_MAMBA_HEAD, chunk_size=_CHUNK, tie_word_embeddings=False, initializer_range=width**-0.5,
        use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None))


def versions() -> dict[str, str | None]:
    """Versions behind the figures; mamba_ssm None: Mamba-2 ran its reference scan in PyTorch."""
    return {name: metadata.version(name) if importlib.util.find_spec(name) is not None else None for name in ("torch", "triton", "transformers", "mamba_ssm")}


def parameters(model: nn.Module) -> dict[str, int]:
    """Trainable parameters: `body` without embeddings and head, and `all`."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    outside = sum(count for name, count in trained.items() if "embed" in name or "lm_head" in name)
    return {"body": sum(trained.values()) - outside, "all": sum(trained.values())}


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """(1,T,D) embeddings of ids (1,T)."""
    table: nn.Module = model.embedding if isinstance(model, SessaLM) else model.base.get_input_embeddings()  # type: ignore[union-attr, operator]
    x: Tensor = table(ids)
    return x.detach()


def reach(model: nn.Module, ids: Tensor, sources: list[int], probes: int = 8) -> Any:
    """||dy_t / dx_tau||_F (T,N) through the layers of any of the models, on the CPU, the routing free to move.

    Sessa in float64 by central differences. transformers' norms and scan compute in float32 whatever they are given, where a difference of 1e-5 drowns, so
    theirs come as forward-mode derivatives, exact to float32's relative precision however small.
    """
    if isinstance(model, SessaLM):
        double = SessaLM(model.config)
        double.load_state_dict(model.state_dict())
        double.to_precision("fp64").eval()
        return end_to_end(stack(double), embed(double, ids), sources, probes)
    forward: Callable[[Tensor], Tensor] = model.eval().stack  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH):  # the other backends have no forward mode
        return end_to_end(forward, embed(model, ids), sources, probes, tangents=True)
