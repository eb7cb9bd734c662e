"""Llama-like models over the tokens of sequences that stand end to end: no padding, few passes.

`hidden_states` gives what transformers' own modules give for each sequence alone. Between the
matrix products, which q, k and v share and so do gate and up, it runs the kernels of
fastrlhf_kernels/_llama_block.py, forward and backward: on a CPU, where they are C++. `runs_packed`
says whether a model can be run so; all others, and all on a GPU, run by their own modules.
Parameters are the model's own, which stay where they are; products obey autocast, and all else is
fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf_kernels import _llama_block as block
from fastrlhf_kernels._backends import BACKENDS, choose

LLAMA_LIKE = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
# Rotary positions that are a function of the position alone.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")

# Called for each layer with its number, its queries, keys and values (N, Hq + 2 Hkv, D) before
# their positions, and the rotary tables.
Keep = Callable[[int, Tensor, Tensor, Tensor], None]


class ResidualDropout:
    """A forward hook: dropout of the module's output, in training mode."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        """The output with entries dropped, the others scaled."""
        return F.dropout(output, self.p, training=module.training)


def is_llama_like(model: PreTrainedModel) -> bool:
    """Whether the decoder's blocks are known here, and its positions turn by fixed angles."""
    core = model.base_model
    rope = getattr(core.config, "rope_parameters", None) or {}
    return (
        type(core).__name__ in LLAMA_LIKE
        and rope.get("rope_type") in FIXED_ROPE
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )


def is_plain(model: nn.Module, product: type) -> bool:
    """Transformers' own modules, none replaced (adapters) or hooked, but by residual dropout.

    product: the class of the modules that hold matrices, beside nn.Linear and embeddings.
    """
    for module in model.modules():
        if not type(module).__module__.startswith(("transformers.", "torch.nn.")):
            return False
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(isinstance(hook, ResidualDropout) for hook in hooks):
            return False
    return all(type(m) in (product, nn.Linear) for m in model.modules() if hasattr(m, "weight")
               and m.weight.ndim == 2 and not isinstance(m, nn.Embedding))  # fmt: skip


def rope_tables(core: Any, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, D) fp32, the sine with the sign of its half of the head.

    rope(x) = x * cos + (second half, first half) * sin.
    """
    device = core.embed_tokens.weight.device
    blank = torch.empty(0, dtype=torch.float32, device=device)
    cos, sin = (
        table[0] for table in core.rotary_emb(blank, torch.arange(positions, device=device)[None])
    )
    half = cos.shape[-1] // 2
    return cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)


def window_of(core: Any, layer: Any) -> int | None:
    """Positions that a layer's tokens see, if not all before them."""
    own = (
        getattr(core.config, "sliding_window", None)
        if core.config.model_type == "mistral"
        else None
    )
    window: int | None = getattr(layer.self_attn, "sliding_window", own)
    return window


def runs_packed(model: PreTrainedModel, longest: int = 0) -> bool:
    """Whether `hidden_states` can stand in for this model's own modules.

    longest: tokens of the longest sequence, which a sliding window must not be shorter than.
    """
    core: Any = model.base_model
    if not is_llama_like(model) or not is_plain(model, nn.Linear):
        return False
    weight = core.embed_tokens.weight
    if not weight.is_cpu or choose("Llama blocks", (weight,), None, BACKENDS) != "cpu":
        return False
    config = core.config
    windows = [window_of(core, layer) for layer in core.layers]
    return (
        all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in core.parameters())
        and config.hidden_act in ("silu", "swish")
        and not getattr(config, "attention_dropout", 0.0)
        and not core.gradient_checkpointing
        and core.layers[0].self_attn.head_dim % 2 == 0
        and all(window is None or window >= longest for window in windows)
    )


def hidden_states(
    model: PreTrainedModel, ids: Tensor, lengths: Tensor, keep: Keep | None = None
) -> Tensor:
    """The decoder's output (N, H) fp32, after its last norm, for a model that `runs_packed`.

    ids (N,): the tokens of sequences of these lengths (S,), end to end; a sequence of 0 tokens
    is allowed. keep: what is to be done with each layer's queries, keys and values.
    """
    core: Any = model.base_model
    config = core.config
    layers = core.layers[: config.num_hidden_layers]
    D, eps = int(layers[0].self_attn.head_dim), float(config.rms_norm_eps)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    cos, sin = rope_tables(core, max(int(lengths.max()), 1) if len(lengths) else 1)
    x = F.embedding(ids, core.embed_tokens.weight)
    for i, layer in enumerate(layers):
        own, mlp = layer.self_attn, layer.mlp
        x, h = block.norm(x, layer.input_layernorm.weight, eps)
        kv_heads = own.k_proj.out_features // D
        heads = own.q_proj.out_features // D + 2 * kv_heads
        qkv = _product(h, own.q_proj, own.k_proj, own.v_proj).view(len(ids), heads, D)
        if hasattr(own, "q_norm"):
            qkv = _norm_heads(qkv, own.q_norm.weight, own.k_norm.weight, kv_heads, eps)
        seen = block.attention(qkv, cu_seqlens, cos, sin, kv_heads, float(own.scaling))
        if keep is not None:
            keep(i, qkv, cos, sin)
        x = _add_product(x, own.o_proj, seen.flatten(1))
        x, h = block.norm(x, layer.post_attention_layernorm.weight, eps)
        x = _add_product(x, mlp.down_proj, block.gate(_product(h, mlp.gate_proj, mlp.up_proj)))
    return block.norm(x, core.norm.weight, eps)[1]


def _product(x: Tensor, *modules: Any) -> Tensor:
    """The products of modules that share their input, side by side."""
    bias = None if modules[0].bias is None else torch.cat([m.bias for m in modules])
    return F.linear(x, torch.cat([m.weight for m in modules]), bias).float()


def _add_product(x: Tensor, module: Any, inputs: Tensor) -> Tensor:
    """x plus the module's product, entries of which are dropped where the model is told to."""
    drops = [hook.p for hook in module._forward_hooks.values()] if module.training else []
    if module.bias is None and not drops and not torch.is_autocast_enabled("cpu"):
        return torch.addmm(x, inputs, module.weight.t())
    y = F.linear(inputs, module.weight, module.bias)
    for p in drops:
        y = F.dropout(y, p)
    return x + y


def _norm_heads(qkv: Tensor, q: Tensor, k: Tensor, kv_heads: int, eps: float) -> Tensor:
    """Queries and keys with an RMSNorm of their own (Qwen3)."""
    D = qkv.shape[-1]
    queries, keys, values = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    queries, keys = F.rms_norm(queries, (D,), q, eps), F.rms_norm(keys, (D,), k, eps)
    return torch.cat([queries, keys, values], 1)
