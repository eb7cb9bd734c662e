"""The fused decode step of Llama-like models (Llama, Mistral, Qwen2, Qwen3) and of GPT-2.

For one new token a sequence, x (B, H) being the residual stream:

    Llama   q, k, v = rope(norm(x) Wqkv);  x += attention(q, cache) Wo
            x += (silu(norm(x) Wgate) * norm(x) Wup) Wdown;  logits = norm(x) Whead
    GPT-2   the same with LayerNorm, learned positions instead of rope, and gelu(norm(x) Wfc) Wproj

What transformers' modules do in some 40 kernels a layer takes about 15 here: q, k and v are one
product, so are gate and up; q and k turn together; the residual is added by the product. Weights
are the model's own parameters (see products.py). Where they are bf16 or fp16, the residual stream,
norms and rotations stay in fp32, which loses less than transformers' modules do.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastrlhf.generation.attention import Batch, CacheOps
from fastrlhf.generation.products import Product, packs
from fastrlhf.models import LanguageModel, is_residual_dropout

LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Rotary positions that are a function of the position alone.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Step(Protocol):
    """Logits (B, V) after one more token (B,) a sequence, at positions (B,)."""

    def __call__(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """Compute, and write keys and values to the cache."""
        ...


def fused_step(model: LanguageModel, *, rows: int, context: int, pack: bool) -> Step | None:
    """The fused step for this very model, or None if its own modules have to do it.

    rows: sequences a step; context: positions that it may see; pack: copy weights to the layout in
    which products are fastest, where there is one.
    """
    name = type(model.model).__name__
    kinds: dict[str, tuple[type, type]] = dict.fromkeys(LLAMA_LIKE, (LlamaStep, nn.Linear))
    kinds["GPT2LMHeadModel"] = (GPT2Step, Conv1D)
    if name not in kinds or not _is_plain(model.model, *kinds[name][1:]):
        return None
    if name in LLAMA_LIKE:
        rope = model.model.config.rope_parameters
        if rope["rope_type"] not in FIXED_ROPE:
            return None
    pack = pack and packs(model.head.weight)
    return kinds[name][0](model, rows=rows, context=context, pack=pack)


def _is_plain(model: nn.Module, product: type) -> bool:
    """Transformers' own modules, none replaced (adapters) or hooked, but by residual dropout."""
    for module in model.modules():
        kind = type(module)
        if not kind.__module__.startswith(("transformers.", "torch.nn.")):
            return False
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(is_residual_dropout(hook) for hook in hooks):
            return False
    return all(type(m) in (product, nn.Linear) for m in model.modules() if hasattr(m, "weight")
               and m.weight.ndim == 2 and not isinstance(m, nn.Embedding))  # fmt: skip


class LlamaStep:
    """Llama, Mistral, Qwen2, Qwen3."""

    def __init__(self, model: LanguageModel, *, rows: int, context: int, pack: bool) -> None:
        self.model = model
        core: Any = model.model.base_model
        self.core = core
        config = model.model.config
        self.eps = float(config.rms_norm_eps)
        self.width = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        layers: Any = core.layers[: config.num_hidden_layers]
        first = layers[0].self_attn
        self.head_dim = int(first.head_dim)
        self.scale = float(first.scaling)
        window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
        device = model.head.weight.device
        positions = torch.arange(context, device=device)[None]
        blank = torch.empty(0, dtype=torch.float32, device=device)
        cos, sin = (table[0] for table in core.rotary_emb(blank, positions))
        half = cos.shape[-1] // 2
        # rope(x) = x * cos + (second half, first half) * (-sin, sin)
        self.cos, self.sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)

        def product(*modules: nn.Module) -> Product:
            return Product(modules, packed=pack, rows=rows)

        self.layers = [
            (
                layer,
                product(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                product(layer.self_attn.o_proj),
                product(layer.mlp.gate_proj, layer.mlp.up_proj),
                product(layer.mlp.down_proj),
                getattr(layer.self_attn, "sliding_window", window),
            )
            for layer in layers
        ]
        self.head = product(model.head)
        self.attend = CacheOps(model.head.weight)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm (.., H), in fp32, to the dtype of the weight."""
        y = F.rms_norm(x, x.shape[-1:], None, self.eps).mul_(weight)
        return y.to(weight.dtype)

    def __call__(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """Logits (B, V)."""
        B, n_q, n_kv, D = len(tokens), self.heads, self.kv_heads, self.head_dim
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        x = F.embedding(tokens, self.core.embed_tokens.weight).float()
        for i, (layer, qkv_of, out_of, gate_up_of, down_of, window) in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = qkv_of(self.norm(x, layer.input_layernorm.weight)).view(B, n_q + 2 * n_kv, D)
            qk, v = qkv[:, : n_q + n_kv].float(), qkv[:, n_q + n_kv :]
            if hasattr(attention, "q_norm"):
                qk = F.rms_norm(qk, (D,), None, self.eps)
                qk[:, :n_q] *= attention.q_norm.weight
                qk[:, n_q:] *= attention.k_norm.weight
            qk = (qk * cos).addcmul_(qk.roll(D // 2, -1), sin).to(v.dtype)
            seen = self.attend(
                qk[:, :n_q], qk[:, n_q:], v, batch, i, scale=self.scale, window=window
            )
            x = out_of.add_to(x, seen.view(B, n_q * D))
            gate_up = gate_up_of(self.norm(x, layer.post_attention_layernorm.weight))
            gate, up = gate_up.chunk(2, -1)
            x = down_of.add_to(x, mlp.act_fn(gate).mul_(up))
        return self.model.scaled(self.head(self.norm(x, self.core.norm.weight)))


class GPT2Step:
    """GPT-2."""

    def __init__(self, model: LanguageModel, *, rows: int, context: int, pack: bool) -> None:
        self.model = model
        core: Any = model.model.base_model
        self.core = core
        config = model.model.config
        self.heads = int(config.num_attention_heads)
        self.eps = float(config.layer_norm_epsilon)
        # transformers' own gelu_new is seven operations; torch's is the same function in one.
        self.tanh_gelu = config.activation_function in ("gelu_new", "gelu_pytorch_tanh")

        def product(module: nn.Module) -> Product:
            return Product((module,), packed=pack, rows=rows)

        self.layers = [
            (
                layer,
                product(layer.attn.c_attn),
                product(layer.attn.c_proj),
                product(layer.mlp.c_fc),
                product(layer.mlp.c_proj),
            )
            for layer in core.h
        ]
        self.head = product(model.head)
        self.attend = CacheOps(model.head.weight)

    def norm(self, x: Tensor, module: nn.LayerNorm) -> Tensor:
        """LayerNorm (B, H), in fp32, to the dtype of the weight."""
        weight, bias = module.weight, module.bias
        if weight.dtype == x.dtype:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        y = F.layer_norm(x, x.shape[-1:], None, None, self.eps)
        return y.mul_(weight).add_(bias).to(weight.dtype)

    def __call__(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """Logits (B, V)."""
        B, n = len(tokens), self.heads
        x = F.embedding(tokens, self.core.wte.weight).float()
        x = x + F.embedding(positions, self.core.wpe.weight)
        for i, (layer, qkv_of, out_of, up_of, down_of) in enumerate(self.layers):
            qkv = qkv_of(self.norm(x, layer.ln_1)).view(B, 3, n, -1)
            q, k, v = qkv.unbind(1)
            seen = self.attend(q, k, v, batch, i, scale=layer.attn.scaling)
            x = out_of.add_to(x, seen.view(B, -1))
            up = up_of(self.norm(x, layer.ln_2))
            x = down_of.add_to(x, F.gelu(up, approximate="tanh") if self.tanh_gelu
                               else layer.mlp.act(up))  # fmt: skip
        return self.model.scaled(self.head(self.norm(x, self.core.ln_f)))
