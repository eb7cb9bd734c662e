"""Models of the trainer: a language model under the fused head, a scalar model for rewards, values.

Both are thin ``nn.Module`` wrappers around ordinary transformers models and are saved as ordinary
Hugging Face directories, so that ``AutoModelForCausalLM`` and
``AutoModelForTokenClassification`` load them without this package.

The head lives inside ``LanguageModel.forward`` rather than beside it: reading ``lm_head.weight``
outside of a wrapped module's forward would bypass DDP's reducer and meet a DTensor under FSDP2.
No (tokens, vocabulary) tensor is held: hidden states of valid tokens go to ``linear_logprobs`` or
``linear_cross_entropy`` of fastrlhf_kernels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from fastrlhf import llama
from fastrlhf.config import require
from fastrlhf.errors import UserError
from fastrlhf.llama import ResidualDropout
from fastrlhf_kernels import linear_cross_entropy, linear_logprobs

hf_logging.disable_progress_bar()  # one bar a stage, not one more for each file of weights

IGNORE = -100  # a label that asks for nothing, torch's convention
SCALAR_HEADS = ("score", "classifier")  # transformers' names of the head of token classification


@dataclass(slots=True, kw_only=True)
class ModelShape:
    """Architecture of a model that is trained from scratch."""

    kind: Literal["llama", "gpt2"] = "llama"
    """Family: llama (RMSNorm, RoPE, SwiGLU) or gpt2 (LayerNorm, learned positions, GELU)."""
    width: int = 96
    """Hidden size H."""
    layers: int = 3
    """Number of decoder blocks."""
    heads: int = 4
    """Attention heads; the width must be a multiple."""
    mlp: int = 256
    """Inner size of the feed-forward block."""
    context: int = 64
    """Longest sequence in tokens."""
    rope_theta: float = 10_000.0
    """Longest wavelength of rotary positions (llama); short contexts learn faster with less."""
    tie_embeddings: bool = False
    """Share the input embedding with the output head."""

    def __post_init__(self) -> None:
        require(self.width > 0 and self.layers > 0 and self.mlp > 0, "width", "sizes are positive")
        require(
            self.heads > 0 and self.width % self.heads == 0,
            "heads",
            f"must divide the width {self.width}, got {self.heads}",
        )
        require(self.context > 1, "context", f"must be at least 2, got {self.context}")


class LanguageModel(nn.Module):
    """A causal transformers model whose head is computed by the fused kernels."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies logits by logit_scale, Granite divides them by logits_scaling.
        scale = getattr(config, "logit_scale", None) or 1.0
        self.logit_scale = float(scale) / float(getattr(config, "logits_scaling", None) or 1.0)

    @property
    def head(self) -> nn.Linear:
        """The output embedding: weight (V, H), bias (V) or None."""
        return self.model.get_output_embeddings()

    @property
    def context(self) -> int:
        """Longest sequence in tokens that the model was made for."""
        return context_of(self.model)

    def hidden_states(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The decoder's output without the head; ``inputs`` go to the transformers model."""
        return self.model.base_model(input_ids=input_ids, **inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, H), with scale and softcap of the model: to sample."""
        return self.scaled(self.head(hidden))

    def scaled(self, logits: Tensor) -> Tensor:
        """The head's products (N, V) with scale and softcap of the model."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def forward(
        self,
        input_ids: Tensor,  # (B, T) int64, padded on the right
        labels: Tensor,  # (B, T) int64: input_ids where a prediction is wanted, IGNORE elsewhere
        *,
        loss_normalizer: float | Tensor | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
    ) -> Any:
        """Log-probs of the labelled tokens, or their summed loss.

        With ``loss_normalizer``: the scalar -sum(log p) / loss_normalizer. Without: log-probs
        (B, T) fp32, entry [b, t] being log p(input_ids[b, t] | what stands before) at labelled
        tokens and 0 elsewhere, and with ``return_entropy`` the entropies (B, T) of the same
        distributions. A label in column 0 has no context and is ignored. Padding on the right needs
        no attention mask, since attention is causal and no padded position is labelled.
        """
        targets = labels[:, 1:]
        valid = targets != IGNORE
        # Hidden states are wanted up to each row's last valid place, and none of padding.
        places = torch.arange(labels.shape[1], device=labels.device)
        lengths = (F.pad(valid, (1, 0)) * places).amax(1)
        hidden = _hidden_states(self.model, input_ids, lengths, valid)
        head = self.head
        shared: dict[str, Any] = {
            "bias": head.bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }
        if loss_normalizer is not None:
            return linear_cross_entropy(
                hidden, head.weight, targets[valid], normalizer=loss_normalizer, **shared
            )
        inputs = (hidden, head.weight, targets[valid])
        if return_entropy:
            logprobs, entropy = linear_logprobs(
                *inputs, temperature=temperature, return_entropy=True, **shared
            )
            return _place(logprobs, valid), _place(entropy, valid)
        return _place(linear_logprobs(*inputs, temperature=temperature, **shared), valid)

    def save(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a Hugging Face directory (config, safetensors, tokenizer)."""
        save_pretrained(self.model, path, tokenizer)


def _hidden_states(
    model: PreTrainedModel, input_ids: Tensor, lengths: Tensor, wanted: Tensor
) -> Tensor:
    """Hidden states (N, H) of the wanted tokens, row after row.

    input_ids (B, T); lengths (B,): how many tokens of each row matter, the wanted ones among them;
    wanted (B, up to T) bool. Where the model runs packed, nothing else is computed.
    """
    if llama.runs_packed(model, input_ids.shape[1]):
        inside = torch.arange(wanted.shape[1], device=lengths.device) < lengths[:, None]
        packed = llama.hidden_states(model, input_ids[:, : wanted.shape[1]][inside], lengths)
        return packed[wanted[inside]]
    out = model.base_model(input_ids=input_ids, use_cache=False)
    hidden: Tensor = out.last_hidden_state[:, : wanted.shape[1]]
    return hidden[wanted]


def _place(values: Tensor, valid: Tensor) -> Tensor:
    """Scatter (N,) values to their (B, T) slots; valid is (B, T - 1), column 0 stays 0."""
    placed = values.new_zeros(valid.shape).masked_scatter(valid, values)
    return F.pad(placed, (1, 0))


class ScalarModel(nn.Module):
    """A decoder without its unembedding, under one scalar output a token: rewards and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def head(self) -> nn.Linear:
        """The scalar head: weight (1, H), bias (1)."""
        for name in SCALAR_HEADS:
            if isinstance(module := getattr(self.model, name, None), nn.Linear):
                return module
        raise UserError(f"{type(self.model).__name__} has no scalar head named score or classifier")

    @property
    def context(self) -> int:
        """Longest sequence in tokens that the model was made for."""
        return context_of(self.model)

    def forward(
        self,
        input_ids: Tensor,  # (B, T) int64, padded on the right
        positions: Tensor | None = None,  # (B,) int64
        *,
        lengths: Tensor | None = None,  # (B,) int64
    ) -> Tensor:
        """Scalars fp32: (B,) at one position of each row, or else (B, T) at every token.

        With ``lengths`` the entries past a row's length are 0 and cost nothing.
        """
        B, T = input_ids.shape
        column = torch.arange(T, device=input_ids.device)
        if positions is not None:
            lengths, wanted = positions + 1, column == positions[:, None]
        elif lengths is not None:
            wanted = column < lengths[:, None]
        else:
            lengths, wanted = torch.full_like(input_ids[:, 0], T), torch.ones_like(input_ids) > 0
        hidden = _hidden_states(self.model, input_ids, lengths, wanted)
        head = self.head
        # Scores in bf16 would have two digits: the head is computed in fp32 under autocast too.
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            found = F.linear(hidden.float(), head.weight.float(), head.bias.float()).squeeze(-1)
        if positions is not None:
            return found
        return found.new_zeros(B, T).masked_scatter(wanted, found)

    def save(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a Hugging Face directory (config, safetensors, tokenizer)."""
        save_pretrained(self.model, path, tokenizer)


def runs_packed(model: nn.Module) -> bool:
    """Whether a LanguageModel or ScalarModel, wrapped or not, computes nothing for padding."""
    wrapped: Any = getattr(model, "module", model)
    bare: PreTrainedModel = wrapped.model
    return llama.runs_packed(bare, context_of(bare))


# --- making, loading, saving --------------------------------------------------------------------


def new_language_model(shape: ModelShape, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    """A language model with random weights (from torch's generator), sized by ``shape``."""
    shared = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": shape.tie_embeddings,
    }
    if shape.kind == "llama":
        config = AutoConfig.for_model(
            "llama",
            hidden_size=shape.width,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.context,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            **shared,
        )
    else:
        config = AutoConfig.for_model(
            "gpt2",
            n_embd=shape.width,
            n_inner=shape.mlp,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_positions=shape.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
    return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def load_language_model(path: Path, residual_dropout: float = 0.0) -> LanguageModel:
    """A causal language model of a local Hugging Face directory, in fp32."""
    _require_kind(path, ("ForCausalLM", "LMHeadModel"), "a causal language model")
    model = _load(AutoModelForCausalLM, path)
    set_residual_dropout(model, residual_dropout)
    return LanguageModel(model)


def load_scalar_model(path: Path) -> ScalarModel:
    """A reward or value model of a local Hugging Face directory, in fp32, without dropout."""
    _require_kind(path, ("ForTokenClassification",), "a reward model")
    model = _load(AutoModelForTokenClassification, path, num_labels=1)
    set_residual_dropout(model, 0.0)
    return ScalarModel(model)


def scalar_from_language_model(path: Path) -> ScalarModel:
    """A language model without its unembedding, with a new scalar head.

    The head starts at N(0, 1 / sqrt(H + 1)) (lm-human-preferences), its bias at 0.
    """
    _require_kind(path, ("ForCausalLM", "LMHeadModel"), "a causal language model")
    model = _load(AutoModelForTokenClassification, path, new=SCALAR_HEADS, num_labels=1)
    model.config.classifier_dropout = 0.0
    set_residual_dropout(model, 0.0)
    scalar = ScalarModel(model)
    nn.init.normal_(scalar.head.weight, std=1.0 / math.sqrt(scalar.head.in_features + 1))
    nn.init.zeros_(scalar.head.bias)
    return scalar


def save_pretrained(model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write config, safetensors and tokenizer to ``path``, whole or not at all.

    The files go to a folder beside it, which then takes its name, so that a killed run never
    leaves half a checkpoint under a good name.
    """
    from fastrlhf.training import replace_folder  # here, since training imports this module

    with replace_folder(path) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def set_residual_dropout(model: PreTrainedModel, p: float) -> None:
    """Dropout on what attention and feed-forward add to the residual stream.

    GPT-2 has such modules; Llama-like models have none, so the outputs of ``o_proj`` and
    ``down_proj`` are hooked. Other dropout of the model is switched off.
    """
    if not 0.0 <= p < 1.0:
        raise UserError(f"field 'residual_dropout': must lie in [0, 1), got {p}")
    found = 0
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Dropout):
            on_residual = leaf in ("resid_dropout",) or name.endswith("mlp.dropout")
            module.p = p if on_residual else 0.0
            found += on_residual
        elif leaf in ("o_proj", "down_proj") and p > 0.0:
            module.register_forward_hook(ResidualDropout(p))
            found += 1
    if p > 0.0 and not found:
        raise UserError(
            f"field 'residual_dropout': {type(model).__name__} has no known residual outputs; use 0"
        )


def context_of(model: PreTrainedModel) -> int:
    """Longest sequence in tokens, from the model's config."""
    for name in ("max_position_embeddings", "n_positions"):
        if value := getattr(model.config, name, None):
            return int(value)
    raise UserError(f"{type(model).__name__} does not say how long a sequence it takes")


def _require_kind(path: Path, endings: Iterable[str], wanted: str) -> None:
    """Refuse a folder that is no Hugging Face checkpoint, or one of another kind."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path}: no checkpoint here (config.json is missing)")
    try:
        architectures = json.loads(file.read_text(encoding="utf-8")).get("architectures") or []
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{file}: not a model's config ({error})") from error
    if not any(str(name).endswith(ending) for name in architectures for ending in endings):
        found = ", ".join(map(str, architectures)) or "nothing"
        raise UserError(f"{file}: field 'architectures': wanted {wanted}, found {found}")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: no weights here (*.safetensors is missing)")


def _load(cls: Any, path: Path, new: tuple[str, ...] = (), **options: Any) -> PreTrainedModel:
    """Load a checkpoint that has all weights but those of the modules in ``new``.

    transformers reports heads that are new or unused, which is meant here, and fills tensors that
    are missing with random numbers, which is not: those are refused.
    """
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model, found = cls.from_pretrained(
            str(path),
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    finally:
        hf_logging.set_verbosity(level)
    missing = sorted(name for name in found["missing_keys"] if name.split(".")[0] not in new)
    if missing:
        raise UserError(f"{path}: {len(missing)} tensors are missing, among them {missing[0]}")
    # Loaded weights lie in the mapped file at any multiple of 4 bytes, and the last bit of a matrix
    # product may depend on where operands start. Copies start where all other tensors do.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


@dataclass(slots=True)
class EMA:
    """Moving average of a model's parameters: shadow <- decay * shadow + (1 - decay) * p.

    It starts at the model's weights, as in InstructGPT's PPO models (decay 0.992).
    """

    decay: float
    shadow: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, decay: float) -> EMA:
        """A new average that equals the model."""
        return cls(decay, {name: p.detach().clone() for name, p in model.named_parameters()})

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights."""
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(
            [self.shadow[name] for name in parameters],
            [p.detach() for p in parameters.values()],
            1.0 - self.decay,
        )

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model."""
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"decay": self.decay, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.decay = state["decay"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)
