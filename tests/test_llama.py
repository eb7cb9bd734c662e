"""Llama-like models run packed: what transformers' own modules give, and where they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same_bits
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastrlhf import llama
from fastrlhf.models import IGNORE, LanguageModel, ScalarModel, runs_packed, set_residual_dropout
from fastrlhf_kernels import _native, use_backend

pytestmark = pytest.mark.skipif(
    _native.cpu is None or torch.cuda.is_available(),
    reason="models run packed on a CPU, with the C++ extension",
)
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, tied, biased": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES | {"tie_word_embeddings": True}, attention_bias=True, mlp_bias=True)
    ),
    "llama3's rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
}  # fmt: skip
LENGTHS = [9, 17, 1, 2]


def made(family: str, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide them
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return LanguageModel(model)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of LENGTHS, with labels from the second to the last token of the longer ones."""
    torch.manual_seed(seed)
    ids = torch.randint(0, 61, (len(LENGTHS), max(LENGTHS)))
    column, lengths = torch.arange(ids.shape[1]), torch.tensor(LENGTHS)[:, None]
    return ids, torch.where((column >= 2) & (column < lengths), ids, IGNORE)


def by_its_modules(model: LanguageModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Log-probs (B, T) by transformers and log_softmax alone."""
    logits = model.model(ids).logits[:, :-1].log_softmax(-1)
    found = logits.gather(2, ids[:, 1:, None])[..., 0]
    return F.pad(torch.where(labels[:, 1:] != IGNORE, found, 0.0), (1, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_its_modules(family: str) -> None:
    model, (ids, labels) = made(family), batch()
    assert runs_packed(model)
    upstream = torch.randn(ids.shape)

    def results(f: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        out = f()
        out.backward(upstream.to(out.dtype))
        return [out.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]

    found = results(lambda: model(ids, labels))
    plain = results(lambda: by_its_modules(model, ids, labels))
    wanted = results(lambda: by_its_modules(model.double(), ids, labels))
    assert len(found) == len(plain) == len(wanted)
    for x, y, z in zip(found, plain, wanted, strict=True):
        own, size = float((y - z).abs().max()), float(z.abs().max())
        assert float((x - z).abs().max()) <= 2.0 * own + 8.0 * 2.0**-23 * size


def test_a_sequences_log_probs_do_not_depend_on_the_others() -> None:
    model, (ids, labels) = made("llama"), batch()
    found = model(ids, labels)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length], labels[row : row + 1, :length])
        torch.testing.assert_close(found[row : row + 1, :length], alone, rtol=1e-5, atol=1e-6)
        assert not bool(found[row, length:].any())


def test_scalars_at_positions_and_up_to_lengths() -> None:
    torch.manual_seed(0)
    model = ScalarModel(LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=1)))
    assert runs_packed(model)
    ids, lengths = batch()[0], torch.tensor(LENGTHS)
    everywhere = model(ids)
    hidden = model.model.base_model(input_ids=ids).last_hidden_state
    wanted = F.linear(hidden, model.head.weight, model.head.bias).squeeze(-1)
    torch.testing.assert_close(everywhere, wanted, rtol=1e-5, atol=1e-6)
    rows = torch.arange(len(ids))
    torch.testing.assert_close(model(ids, lengths - 1), wanted[rows, lengths - 1])
    inside = torch.arange(ids.shape[1]) < lengths[:, None]
    some = model(ids, lengths=lengths)
    torch.testing.assert_close(some, torch.where(inside, wanted, 0.0), rtol=1e-5, atol=1e-6)


def test_no_labels_no_loss_and_no_gradient() -> None:
    model, (ids, _) = made("llama"), batch()
    loss = model(ids, torch.full_like(ids, IGNORE), loss_normalizer=1.0)
    assert float(loss) == 0.0
    loss.backward()
    assert all(not bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_runs_repeat_their_bits() -> None:
    model, (ids, labels) = made("llama"), batch()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for x, y in zip(*gradients, strict=True):
        assert_same_bits(x, y)


def test_under_autocast_products_are_bf16_and_the_rest_is_not() -> None:
    model, (ids, labels) = made("llama"), batch()
    exact = model(ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, labels)
        modules = by_its_modules(model, ids, labels)
    assert found.dtype == torch.float32
    error, own = float((found - exact).abs().max()), float((modules - exact).abs().max())
    assert 0.0 < error <= own
    found.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_residual_dropout_keeps_its_expectation() -> None:
    model, (ids, labels) = made("llama"), batch()
    exact = model(ids, labels).detach()
    set_residual_dropout(model.model, 0.2)
    assert runs_packed(model)
    model.eval()
    assert_same_bits(model(ids, labels), exact)
    model.train()
    first, second = model(ids, labels), model(ids, labels)
    assert float((first - second).abs().max()) > 0.01
    # Through one layer the residual stream has the mean that it has without dropout.
    x, product = torch.randn(4, 40), model.model.model.layers[0].mlp.down_proj
    draws = torch.stack([llama._add_product(torch.zeros(4, 24), product, x) for _ in range(4000)])
    wanted = product(x) if not product.training else F.linear(x, product.weight, product.bias)
    spread = float(draws.std(0).max()) / 4000**0.5
    assert float((draws.mean(0) - wanted).abs().max()) < 5.0 * spread


def hooked(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def adapted(model: PreTrainedModel) -> None:
    class Adapter(nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj = Adapter(24, 40, bias=False)


def checkpointed(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable()


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "a hook": hooked,
    "an adapter": adapted,
    "gradient checkpointing": checkpointed,
    "fp64": lambda model: model.double(),
    "bf16": lambda model: model.bfloat16(),
    "attention dropout": lambda model: setattr(model.config, "attention_dropout", 0.1),
    "another gate": lambda model: setattr(model.config, "hidden_act", "gelu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_not_plain_runs_by_its_own_modules(change: str) -> None:
    model = made("llama")
    CHANGES[change](model.model)
    assert not runs_packed(model)


def test_other_models_and_backends_run_by_their_own_modules() -> None:
    assert not runs_packed(LanguageModel(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2))))
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
    assert not runs_packed(LanguageModel(windowed))
    assert llama.runs_packed(windowed, 5)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    turned = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope))
    assert not runs_packed(LanguageModel(turned))
    model = made("llama")
    with use_backend("ref"):
        assert not runs_packed(model)
        ids, labels = batch()
        modules = model(ids, labels)
    torch.testing.assert_close(model(ids, labels), modules, rtol=1e-4, atol=1e-5)
