"""The fused decode step of Llama-like models (Llama, Mistral, Qwen2, Qwen3) and of GPT-2.

For one new token a sequence, x (B, H) being the residual stream:

    Llama   q, k, v = rope(norm(x) Wqkv);  x += attention(q, cache) Wo
            x += (silu(norm(x) Wgate) * norm(x) Wup) Wdown;  logits = norm(x) Whead
    GPT-2   the same with LayerNorm, learned positions instead of rope, and gelu(norm(x) Wfc) Wproj

What transformers' modules do in some 40 kernels a layer takes about 15 here: on a CPU q, k and v
are one product, and so are gate and up; q and k turn together; the residual is added by the
product, or by the norm that follows. Llama's norms, rotations and gates are C++ and Triton
(fastrlhf_kernels/_decode_step.py): in torch they took longer than the products of a small model.
Weights are the model's own parameters (see products.py). Where they are bf16 or fp16, the residual
stream, norms and rotations stay in fp32, which loses less than transformers' modules do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastrlhf.generation.attention import Batch, CacheOps
from fastrlhf.generation.products import Product, packs
from fastrlhf.llama import is_llama_like, is_plain, rope_tables, window_of
from fastrlhf.models import LanguageModel
from fastrlhf_kernels import _decode_step as parts
from fastrlhf_kernels import _decode_step_triton as triton_parts


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
    plain: Any = model.model
    step: type[GPT2Step | LlamaStep]
    product: type[nn.Module]
    if type(plain).__name__ == "GPT2LMHeadModel":
        step, product = GPT2Step, Conv1D
    elif is_llama_like(plain):
        step, product = LlamaStep, nn.Linear
    else:
        return None
    if not is_plain(plain, product):
        return None
    pack = pack and packs(model.head.weight)
    return step(model, rows=rows, context=context, pack=pack)


@dataclass(slots=True, kw_only=True)
class LlamaLayer:
    """A layer's parameters, which may be updated in place, and its products."""

    first_norm: Tensor
    qkv: Product
    head_norms: tuple[Tensor, Tensor] | None
    """Of queries and keys (Qwen3)."""
    window: int | None
    out: Product
    second_norm: Tensor
    gate_up: Product
    activation: nn.Module
    down: Product


class LlamaStep:
    """Llama, Mistral, Qwen2, Qwen3."""

    def __init__(self, model: LanguageModel, *, rows: int, context: int, pack: bool) -> None:
        self.model = model
        core: Any = model.model.base_model
        self.core = core
        config = model.model.config
        self.eps = float(config.rms_norm_eps)
        layers: Any = core.layers[: config.num_hidden_layers]
        first = layers[0].self_attn
        self.head_dim = int(first.head_dim)
        self.scale = float(first.scaling)
        self.cos, self.sin = rope_tables(core, context)

        def product(*modules: nn.Module) -> Product:
            return Product(modules, packed=pack, rows=rows)

        self.layers = [
            LlamaLayer(
                first_norm=layer.input_layernorm.weight,
                qkv=product(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                head_norms=(
                    (layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight)
                    if hasattr(layer.self_attn, "q_norm")
                    else None
                ),
                window=window_of(core, layer),
                out=product(layer.self_attn.o_proj),
                second_norm=layer.post_attention_layernorm.weight,
                gate_up=product(layer.mlp.gate_proj, layer.mlp.up_proj),
                activation=layer.mlp.act_fn,
                down=product(layer.mlp.down_proj),
            )
            for layer in layers
        ]
        self.head = product(model.head)
        self.cache = CacheOps(model.head.weight)
        native = self.cache.native and model.head.weight.dtype in parts.NATIVE_DTYPES
        self.norm, self.rope_append, gate = parts.norm_ref, parts.rope_append_ref, None
        if native:
            self.norm, self.rope_append = parts.norm_native, parts.rope_append_native
            gate = parts.gate_native
        self.on_triton = self.cache.backend == "triton"
        if self.on_triton:
            self.norm, self.rope_append = triton_parts.norm_triton, triton_parts.rope_append_triton
            gate = triton_parts.gate_triton
        self.own_gate = gate if config.hidden_act in ("silu", "swish") else None
        self.between = self._between() if native and self.own_gate is not None else None

    def _between(self) -> parts.Between | None:
        """The parts between attentions in one call each, where all weights are in panels."""
        layers = []
        for x in self.layers:
            qkv, out, gate_up, down = (p.panels for p in (x.qkv, x.out, x.gate_up, x.down))
            if qkv is None or out is None or gate_up is None or down is None:
                return None
            layers.append(
                parts.Layer(x.first_norm, qkv, x.head_norms, out, x.second_norm, gate_up, down)
            )
        if self.head.panels is None:
            return None
        kv_heads = int(self.core.config.num_key_value_heads)
        rope = self.cos, self.sin
        return parts.Between(
            layers, self.core.norm.weight, self.head.panels, rope, kv_heads, self.eps
        )

    def __call__(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """Logits (B, V)."""
        B, D, eps, cache = len(tokens), self.head_dim, self.eps, batch.cache
        x = F.embedding(tokens, self.core.embed_tokens.weight).float()
        if self.between is not None:
            return self._by_layers(self.between, x, positions, batch)
        h = self.norm(x, self.layers[0].first_norm, eps)
        next_norms = [layer.first_norm for layer in self.layers[1:]] + [self.core.norm.weight]
        for i, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            qkv = layer.qkv(h).view(B, -1, D)
            q = self.rope_append(
                qkv, positions, batch.slots, self.cos, self.sin, layer.head_norms,
                cache.keys[i], cache.values[i], eps,
            )  # fmt: skip
            seen = self.cache.attend(q, batch, i, scale=self.scale, window=layer.window)
            x, h = self.add_and_norm(x, layer.out, seen.view(B, -1), layer.second_norm)
            hidden = self.gate(layer.gate_up(h), layer)
            x, h = self.add_and_norm(x, layer.down, hidden, next_norm)
        return self.model.scaled(self.head(h))

    def _by_layers(
        self, between: parts.Between, x: Tensor, positions: Tensor, batch: Batch
    ) -> Tensor:
        """The step in two calls a layer."""
        B, D = len(x), self.head_dim
        between.into(batch.cache.keys, batch.cache.values)
        found = between(0, x, None, positions, batch.slots)
        for i, layer in enumerate(self.layers):
            q = found.view(B, -1, D)[:, : -2 * between.kv_heads]
            seen = self.cache.attend(q, batch, i, scale=self.scale, window=layer.window)
            found = between(i + 1, x, seen, positions, batch.slots)
        return self.model.scaled(found)

    def add_and_norm(
        self, x: Tensor, product: Product, inputs: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x plus the product of the inputs, and the norm of that; x may be overwritten."""
        if self.on_triton:
            return x, triton_parts.norm_triton(x, weight, self.eps, product(inputs))
        x = product.add_to(x, inputs)
        return x, self.norm(x, weight, self.eps)

    def gate(self, gate_up: Tensor, layer: LlamaLayer) -> Tensor:
        """The MLP's hidden units (B, I)."""
        if self.own_gate is not None:
            return self.own_gate(gate_up)
        gate, up = gate_up.chunk(2, -1)
        hidden: Tensor = layer.activation(gate)
        return hidden.mul_(up)


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
        self.cache = CacheOps(model.head.weight)

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
            self.cache.append(k, v, batch, i)
            seen = self.cache.attend(q, batch, i, scale=layer.attn.scaling)
            x = out_of.add_to(x, seen.view(B, -1))
            up = up_of(self.norm(x, layer.ln_2))
            x = down_of.add_to(x, F.gelu(up, approximate="tanh") if self.tanh_gelu
                               else layer.mlp.act(up))  # fmt: skip
        return self.model.scaled(self.head(self.norm(x, self.core.ln_f)))
