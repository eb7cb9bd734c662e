"""Every family on the paged cache: tokens of transformers' generate, log-probs of a plain forward.

The fused step and the model's own modules are held to the same bounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastrlhf.batching import pad
from fastrlhf.generation import Engine, Outcome, Request, Sampling, UnsupportedModel
from fastrlhf.generation.fused import fused_step
from fastrlhf.models import LanguageModel, set_residual_dropout
from fastrlhf_kernels import _triton, use_backend

END = 2
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama, biases, tied": (
        "llama",
        GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),
    "mistral, window": ("mistral", GROUPED | {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2, window": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}),
    "gpt2": ("gpt2", COMMON),
    "gpt_neox": ("gpt_neox", COMMON),
    # Without a fused step, and not in the list of tested families: softcaps, sinks, logit scales.
    "gemma2": ("gemma2", GROUPED | {"head_dim": 8, "sliding_window": 5}),
    "granite": ("granite", GROUPED | {"logits_scaling": 2.0}),
    "gpt_oss": (
        "gpt_oss",
        GROUPED
        | {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
FUSED = [name for name, (kind, _) in SHAPES.items() if kind in "llama mistral qwen2 qwen3 gpt2"]
ALL = pytest.mark.parametrize("name", SHAPES)
ON = pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
WAYS = pytest.mark.parametrize(
    ("name", "fused"), [(n, False) for n in SHAPES] + [(n, True) for n in FUSED]
)


def model_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Random weights, large enough for distributions that are far from flat."""
    kind, shape = SHAPES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def requests(n: int = 10, **options: Any) -> list[Request]:
    """Prompts of 1 to 20 tokens, within and beyond the windows."""
    return [
        Request(
            prompt=[3 + (i * k) % 90 for k in range(1 + i * 7 % 20)],
            seed=i,
            sampling=Sampling(**({"max_new_tokens": 24} | options)),
        )
        for i in range(n)
    ]


def forward_logprobs(
    model: nn.Module, asked: list[Request], outcome: Outcome, temperature: float = 1.0
) -> Tensor:
    """Log-probs, fp64, of all generated tokens under one forward pass, padded on the right."""
    whole = [[*r.prompt, *found.tokens] for r, found in zip(asked, outcome, strict=True)]
    tokens, lengths = pad(whole, 0)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model(tokens.to(device), attention_mask=mask.long().to(device))
    logits = found.logits[:, :-1].double().cpu()
    placed = (logits / temperature).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return torch.cat(
        [
            row[len(request.prompt) - 1 : length - 1]
            for row, request, length in zip(placed, asked, lengths.tolist(), strict=True)
        ]
    )


def own_logprobs(outcome: Outcome) -> Tensor:
    return torch.cat([result.logprobs for result in outcome]).double().cpu()


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_step_is_taken(name: str) -> None:
    model = LanguageModel(model_of(name))
    assert fused_step(model, rows=4, context=64, pack=True) is not None


@WAYS
def test_greedy_equals_transformers_generate(name: str, fused: bool) -> None:
    model = model_of(name)
    asked = requests(temperature=0.0, end_token_id=END)
    outcome = Engine(model, slots=3, fused=fused).run(asked)
    for request, result in zip(asked, outcome, strict=True):
        tokens = torch.tensor([request.prompt])
        theirs = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )[0, len(request.prompt) :].tolist()
        assert result.tokens == theirs
        assert result.finish == ("end" if theirs[-1] == END else "length")


@ON
@WAYS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_forward_pass_in_fp32(
    name: str, fused: bool, temperature: float, device: str
) -> None:
    model = model_of(name).to(device)
    asked = requests(temperature=temperature)
    outcome = Engine(model, slots=4, fused=fused).run(asked)
    wanted = forward_logprobs(model, asked, outcome, temperature)
    torch.testing.assert_close(own_logprobs(outcome), wanted, atol=1e-5, rtol=0)


@pytest.mark.skipif(_triton.missing is not None, reason=f"no Triton here: {_triton.missing}")
@pytest.mark.parametrize("name", [name for name in FUSED if name != "gpt2"])
def test_the_fused_step_in_triton(name: str) -> None:
    model = model_of(name).to("cuda" if torch.cuda.is_available() else "cpu")
    asked = requests(4, max_new_tokens=5)
    with use_backend("triton"):
        outcome = Engine(model, slots=3).run(asked)
    wanted = forward_logprobs(model, asked, outcome)
    torch.testing.assert_close(own_logprobs(outcome), wanted, atol=1e-5, rtol=0)


@WAYS
def test_weights_in_rows_and_in_blocks_agree(name: str, fused: bool) -> None:
    model = model_of(name)
    asked = requests()
    rows = Engine(model, fused=fused, pack=False).run(asked)
    wanted = forward_logprobs(model, asked, rows)
    torch.testing.assert_close(own_logprobs(rows), wanted, atol=1e-5, rtol=0)


@ON
@WAYS
def test_bf16_is_no_further_from_fp32_than_transformers(
    name: str, fused: bool, device: str
) -> None:
    """Where the step is transformers' own its errors are as large, drawn anew.

    They must then be no larger than chance allows, in the mean (a paired t-test) and beyond the
    99.9th percentile of theirs (a binomial test), one in a thousand.
    """
    model = model_of(name, torch.bfloat16).to(device)
    exact = model_of(name)
    exact.load_state_dict(model.state_dict())
    asked = requests(100, max_new_tokens=40)
    outcome = Engine(model, fused=fused).run(asked)
    wanted = forward_logprobs(exact, asked, outcome)
    ours = (own_logprobs(outcome) - wanted).abs()
    theirs = (forward_logprobs(model, asked, outcome) - wanted).abs()
    if fused:
        assert ours.mean() <= theirs.mean()
        assert ours.quantile(0.999) <= theirs.quantile(0.999)
        return
    assert stats.ttest_rel(ours.numpy(), theirs.numpy(), alternative="greater").pvalue > 1e-3
    beyond = int((ours > theirs.quantile(0.999)).sum())
    assert stats.binomtest(beyond, len(ours), 0.001, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_fp16_is_close_to_fp32(name: str) -> None:
    model = model_of(name, torch.float16)
    exact = model_of(name)
    exact.load_state_dict(model.state_dict())
    asked = requests()
    outcome = Engine(model).run(asked)
    wanted = forward_logprobs(exact, asked, outcome)
    torch.testing.assert_close(own_logprobs(outcome), wanted, atol=2e-2, rtol=0)


def test_residual_dropout_leaves_the_fused_step_alone_and_other_hooks_do_not() -> None:
    model = LanguageModel(model_of("llama"))
    set_residual_dropout(model.model, 0.2)
    model.train()
    asked = requests()
    wanted = own_logprobs(Engine(model, fused=False).run(asked))
    assert fused_step(model, rows=4, context=64, pack=False) is not None
    torch.testing.assert_close(own_logprobs(Engine(model).run(asked)), wanted, atol=1e-5, rtol=0)
    assert model.training
    assert model.model.training
    model.model.model.layers[1].mlp.register_forward_hook(lambda _m, _i, out: out * 0.5)
    assert fused_step(model, rows=4, context=64, pack=False) is None
    outcome = Engine(model).run(asked)
    model.eval()
    torch.testing.assert_close(
        own_logprobs(outcome), forward_logprobs(model.model, asked, outcome), atol=1e-5, rtol=0
    )


def test_replaced_modules_are_obeyed() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2.0 * super().forward(input)

    model = model_of("qwen2")
    inner = model.model.layers[0].mlp
    doubled = Doubled(48, 32, bias=False)
    doubled.load_state_dict(inner.down_proj.state_dict())
    inner.down_proj = doubled
    asked = requests()
    outcome = Engine(model).run(asked)
    wanted = forward_logprobs(model, asked, outcome)
    torch.testing.assert_close(own_logprobs(outcome), wanted, atol=1e-5, rtol=0)


def test_weights_changed_between_runs_are_seen() -> None:
    model = model_of("llama")
    engine, asked = Engine(model), requests()
    engine.run(asked)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    outcome = engine.run(asked)
    wanted = forward_logprobs(model, asked, outcome)
    torch.testing.assert_close(own_logprobs(outcome), wanted, atol=1e-5, rtol=0)


def test_the_attention_and_mode_of_a_model_are_left_as_they_were() -> None:
    model = model_of("gpt2")
    for training in (True, False):
        model.train(training)
        before = model.config._attn_implementation
        Engine(model, fused=False).run(requests(2))
        assert model.config._attn_implementation == before
        assert model.training == training
        assert model.transformer.h[0].training == training


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("bloom", "it does not take transformers' attention interface"),
        ("mamba", "it does not take transformers' attention interface"),
        ("opt", "keys"),
    ],
)
def test_other_families_are_refused_with_the_list_of_supported_ones(kind: str, why: str) -> None:
    shape = GROUPED | {"ffn_dim": 48, "word_embed_proj_dim": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    with pytest.raises(UnsupportedModel, match=f"{why}.*Supported: the Llama, Mistral, Qwen2"):
        Engine(model)


def test_a_family_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("granite")
    engine = Engine(model)  # it passes
    plain = type(model).forward

    def other(self: Any, *args: Any, **options: Any) -> Any:
        out = plain(self, *args, **options)
        out.logits = out.logits.roll(1, -1)
        return out

    monkeypatch.setattr(type(model), "forward", other)
    with pytest.raises(UnsupportedModel, match="its logits are others"):
        engine.decoder.verify()
