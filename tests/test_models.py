"""The models under the fused head against transformers' own forward, and their checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from trainer_fixtures import flat, tiny_model, weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from fastrlhf.errors import UserError
from fastrlhf.models import (
    EMA,
    IGNORE,
    LanguageModel,
    ModelShape,
    context_of,
    load_language_model,
    load_scalar_model,
    new_language_model,
    parameter_count,
    scalar_from_language_model,
    set_residual_dropout,
)

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def batch(vocabulary: int, rows: int = 3, width: int = 11) -> tuple[Tensor, Tensor]:
    """Random tokens, and labels that ask for about half of them."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(vocabulary, (rows, width), generator=generator)
    wanted = torch.rand((rows, width), generator=generator) < 0.5
    return input_ids, torch.where(wanted, input_ids, IGNORE)


def plain_logprobs(model: Any, input_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, T - 1, V) by the transformers model's own forward pass and log_softmax."""
    logits = model(input_ids=input_ids).logits[:, :-1]
    return torch.log_softmax(logits / temperature, -1)


# --- the fused head against the plain forward pass


@KINDS
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logprobs_and_entropy_equal_the_plain_forward(
    kind: str, tied: bool, dtype: torch.dtype
) -> None:
    model, _ = tiny_model(kind=kind, tie_embeddings=tied)
    model.to(dtype)
    input_ids, labels = batch(model.model.config.vocab_size)
    for temperature in (1.0, 0.7):
        logprobs, entropy = model(input_ids, labels, temperature=temperature, return_entropy=True)
        alone = model(input_ids, labels, temperature=temperature)
        full = plain_logprobs(model.model, input_ids, temperature)
        wanted = F.pad(full.gather(2, input_ids[:, 1:, None])[..., 0], (1, 0))
        wanted_entropy = F.pad(-(full.exp() * full).sum(-1), (1, 0))
        valid = (labels != IGNORE) & (torch.arange(labels.shape[1]) > 0)
        atol = 1e-5 if dtype == torch.float32 else 1e-12
        for found, value in ((logprobs, wanted), (alone, wanted), (entropy, wanted_entropy)):
            torch.testing.assert_close(
                found.double(), torch.where(valid, value, 0.0).double(), atol=atol, rtol=0
            )


@KINDS
def test_the_loss_and_its_gradient_equal_those_of_transformers(kind: str) -> None:
    model, _ = tiny_model(kind=kind, tie_embeddings=kind == "gpt2")
    model.double()
    input_ids, labels = batch(model.model.config.vocab_size)
    count = int((labels[:, 1:] != IGNORE).sum())
    loss = model(input_ids, labels, loss_normalizer=count)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    output = model.model(input_ids=input_ids, labels=labels)
    wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss.float(), output.loss.float(), atol=1e-6, rtol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-9, rtol=1e-6)


def test_the_loss_scales_with_its_normalizer_and_is_zero_without_labels() -> None:
    model, _ = tiny_model()
    input_ids, labels = batch(model.model.config.vocab_size)
    one, four = (model(input_ids, labels, loss_normalizer=n).item() for n in (1.0, 4.0))
    assert one == pytest.approx(4 * four, rel=1e-6)
    nothing = torch.full_like(labels, IGNORE)
    assert model(input_ids, nothing, loss_normalizer=1.0).item() == 0.0
    assert not model(input_ids, nothing).any()


def test_padding_on_the_right_changes_nothing() -> None:
    model, tokenizer = tiny_model()
    input_ids, labels = batch(model.model.config.vocab_size)
    padded = F.pad(input_ids, (0, 4), value=tokenizer.pad_token_id)
    found = model(padded, F.pad(labels, (0, 4), value=IGNORE))
    torch.testing.assert_close(found[:, :11], model(input_ids, labels), atol=1e-6, rtol=0)
    assert not found[:, 11:].any()


def test_scale_and_softcap_of_a_config_are_obeyed() -> None:
    model, _ = tiny_model()
    model.softcap, model.logit_scale = 2.0, 3.0
    input_ids, labels = batch(model.model.config.vocab_size)
    logits = 2.0 * torch.tanh(3.0 * model.model(input_ids=input_ids).logits / 2.0)
    wanted = torch.log_softmax(logits[:, :-1], -1).gather(2, input_ids[:, 1:, None])[..., 0]
    valid = labels[:, 1:] != IGNORE
    found = model(input_ids, labels)[:, 1:]
    torch.testing.assert_close(found[valid], wanted[valid], atol=1e-5, rtol=0)
    hidden = model.hidden_states(input_ids).last_hidden_state
    torch.testing.assert_close(model.logits(hidden), logits, atol=1e-5, rtol=0)


def test_scales_are_read_from_the_config() -> None:
    made, _ = tiny_model()
    made.model.config.logit_scale, made.model.config.logits_scaling = 0.5, 4.0
    made.model.config.final_logit_softcapping = 30.0
    again = LanguageModel(made.model)
    assert (again.logit_scale, again.softcap) == (0.125, 30.0)


def test_tied_embeddings_are_one_parameter() -> None:
    tied, _ = tiny_model(tie_embeddings=True)
    free, _ = tiny_model(tie_embeddings=False)
    assert tied.head.weight is tied.model.get_input_embeddings().weight
    assert parameter_count(free) - parameter_count(tied) == tied.head.weight.numel()


@KINDS
def test_bf16_products_come_near_fp32(kind: str) -> None:
    model, _ = tiny_model(kind=kind)
    input_ids, labels = batch(model.model.config.vocab_size)
    exact = model(input_ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids, labels)
        loss = model(input_ids, labels, loss_normalizer=1.0)
    loss.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0)
    assert float(loss.detach()) == pytest.approx(-float(exact.detach().sum()), abs=0.5)


# --- dropout on the residual stream


def _residual_outputs(model: nn.Module, kind: str) -> list[nn.Module]:
    endings = ("o_proj", "down_proj") if kind == "llama" else ("resid_dropout", "mlp.dropout")
    return [m for name, m in model.named_modules() if name.endswith(endings)]


@KINDS
def test_dropout_acts_on_every_residual_output_and_nowhere_else(kind: str) -> None:
    p = 0.3
    model, _ = tiny_model(kind=kind, width=64)
    if kind == "gpt2":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.9  # what a published config may hold
    set_residual_dropout(model.model, p)
    input_ids, _ = batch(model.model.config.vocab_size, rows=8, width=40)
    dropped: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                dropped[name] = float((output == 0).float().mean())

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(watch(name))
    model.train()
    model.hidden_states(input_ids)
    endings = ("o_proj", "down_proj") if kind == "llama" else ("resid_dropout", "mlp.dropout")
    expected = {name for name in dropped if name.endswith(endings)}
    assert len(expected) == 2 * model.model.config.num_hidden_layers
    count = 8 * 40 * 64
    for name, share in dropped.items():
        if name in expected:
            assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5, name
        elif not name.endswith("mlp"):  # hands on what its last part dropped
            assert share < 0.01, name
    model.eval()
    model.hidden_states(input_ids)
    assert max(dropped.values()) < 0.01


def test_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    layer = nn.Module()
    layer.o_proj = nn.Linear(4, 4)
    set_residual_dropout(layer, 0.25)  # type: ignore[arg-type]
    layer.train()
    x = torch.randn(1, 4)
    draws = layer.o_proj(x.expand(40_000, 4)).detach()
    layer.eval()
    exact = layer.o_proj(x).detach()
    kept = draws[draws[:, 0] != 0]
    torch.testing.assert_close(kept[0, 0], exact[0, 0] / 0.75)
    assert float((draws.mean(0) - exact[0]).abs().max()) < 0.02


@KINDS
def test_without_dropout_training_mode_is_deterministic(kind: str, tmp_path: Path) -> None:
    made, tokenizer = tiny_model(kind=kind)
    made.save(tmp_path / "m", tokenizer)
    input_ids, labels = batch(made.model.config.vocab_size)
    for p, equal in ((0.0, True), (0.5, False)):
        model = load_language_model(tmp_path / "m", p).train()
        assert torch.equal(model(input_ids, labels), model(input_ids, labels)) == equal


def test_dropout_is_refused_out_of_range_or_without_a_place() -> None:
    model, _ = tiny_model()
    with pytest.raises(UserError, match=r"field 'residual_dropout': must lie in \[0, 1\), got 1"):
        set_residual_dropout(model.model, 1.0)
    with pytest.raises(UserError, match="Linear has no known residual outputs"):
        set_residual_dropout(nn.Linear(2, 2), 0.1)  # type: ignore[arg-type]


# --- checkpoints


@KINDS
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_checkpoint_loads_in_plain_transformers(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    model, tokenizer = tiny_model(kind=kind, tie_embeddings=tied)
    model.save(tmp_path / "m", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    again = load_language_model(tmp_path / "m").eval()
    input_ids, labels = batch(model.model.config.vocab_size)
    wanted = model.model(input_ids=input_ids).logits
    assert torch.equal(plain(input_ids=input_ids).logits, wanted)
    assert torch.equal(again(input_ids, labels), model(input_ids, labels))
    assert not (tmp_path / "m.partial").exists()


@KINDS
def test_a_reward_model_checkpoint_loads_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    made, tokenizer = tiny_model(kind=kind)
    made.save(tmp_path / "lm", tokenizer)
    torch.manual_seed(3)
    scalar = scalar_from_language_model(tmp_path / "lm").eval()
    scalar.save(tmp_path / "rm", tokenizer)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "rm").eval()
    again = load_scalar_model(tmp_path / "rm").eval()
    input_ids, _ = batch(made.model.config.vocab_size)
    values = scalar(input_ids)
    assert plain.config.num_labels == 1
    torch.testing.assert_close(plain(input_ids=input_ids).logits[..., 0], values)
    assert torch.equal(again(input_ids), values)
    positions = torch.tensor([10, 0, 4])
    torch.testing.assert_close(again(input_ids, positions), values[torch.arange(3), positions])
    # The body is the language model's.
    body = weights(tmp_path / "lm")
    for name, value in weights(tmp_path / "rm").items():
        if not name.startswith(("score", "classifier")):
            assert torch.equal(value, body[name]), name


def test_the_reward_head_starts_as_lm_human_preferences_do(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(width=1024, heads=2, layers=1)
    model.save(tmp_path / "lm", tokenizer)
    torch.manual_seed(0)
    head = scalar_from_language_model(tmp_path / "lm").head
    assert head.weight.shape == (1, 1024)
    deviation = float(head.weight.detach().std())
    assert deviation == pytest.approx(1 / 1025**0.5, rel=5 / (2 * 1024) ** 0.5)
    assert not head.bias.detach().any()


def test_scores_stay_fp32_under_autocast(tmp_path: Path) -> None:
    made, tokenizer = tiny_model()
    made.save(tmp_path / "lm", tokenizer)
    scalar = scalar_from_language_model(tmp_path / "lm").eval()
    with torch.no_grad():
        scalar.head.bias.fill_(100.0)
    input_ids, _ = batch(made.model.config.vocab_size)
    with torch.autocast("cpu", torch.bfloat16):
        scores = scalar(input_ids)
    assert scores.dtype == torch.float32
    # In bf16 numbers around 100 stand 0.5 apart.
    torch.testing.assert_close(scores, scalar(input_ids), atol=0.1, rtol=0)


def test_a_checkpoint_of_the_wrong_kind_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made, _ = tiny_model()
    made.save(tmp_path / "lm", tokenizer)
    scalar_from_language_model(tmp_path / "lm").save(tmp_path / "rm", tokenizer)
    found = "found LlamaForTokenClassification"
    with pytest.raises(UserError, match=f"config.json: .*wanted a causal language model, {found}"):
        load_language_model(tmp_path / "rm")
    with pytest.raises(UserError, match=f"wanted a causal language model, {found}"):
        scalar_from_language_model(tmp_path / "rm")
    with pytest.raises(UserError, match="wanted a reward model, found LlamaForCausalLM"):
        load_scalar_model(tmp_path / "lm")


def test_a_broken_checkpoint_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made, _ = tiny_model()
    made.save(tmp_path / "m", tokenizer)
    with pytest.raises(UserError, match=r"nowhere: no checkpoint here \(config.json is missing\)"):
        load_language_model(tmp_path / "nowhere")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="m: cannot be loaded: "):
        load_language_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="m: no weights here"):
        load_language_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a model's config"):
        load_language_model(tmp_path / "m")


def test_weights_that_lack_a_tensor_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made, _ = tiny_model()
    made.save(tmp_path / "m", tokenizer)
    tensors = weights(tmp_path / "m")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"m: .*layers\.0\.self_attn\.q_proj\.weight"):
        load_language_model(tmp_path / "m")


def test_context_is_read_from_either_config() -> None:
    assert tiny_model(kind="llama", context=32)[0].context == 32
    assert tiny_model(kind="gpt2", context=24)[0].context == 24
    model, _ = tiny_model()
    model.model.config = PreTrainedConfig()
    with pytest.raises(UserError, match="does not say how long a sequence"):
        context_of(model.model)


def test_new_models_follow_their_shape_and_the_generator(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    shape = ModelShape(width=16, layers=3, heads=2, mlp=40, context=20)
    torch.manual_seed(5)
    one = new_language_model(shape, tokenizer)
    torch.manual_seed(5)
    two = new_language_model(shape, tokenizer)
    assert torch.equal(flat(one), flat(two))
    config = one.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (16, 3, 40)
    assert config.vocab_size == len(tokenizer)
    assert json.loads(config.to_json_string())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"heads": 5}, "heads"), ({"width": 0}, "width"), ({"context": 1}, "context")],
)
def test_bad_shapes_name_the_field(changes: dict[str, int], field: str) -> None:
    with pytest.raises(UserError, match=f"field '{field}'"):
        ModelShape(**changes)


# --- the average of weights


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    average = EMA.of(model, 0.9)
    values = []
    for target in ([[2.0, 0.0]], [[4.0, -1.0]]):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(target))
        average.update(model)
        values.append(average.shadow["weight"].clone())
    first = [0.9 * 1 + 0.1 * 2, 0.9 * 2]
    torch.testing.assert_close(values[0], torch.tensor([first]))
    torch.testing.assert_close(
        values[1], torch.tensor([[0.9 * first[0] + 0.4, 0.9 * first[1] - 0.1]])
    )
    # State goes through a checkpoint, and into a model.
    other = EMA.of(nn.Linear(2, 1, bias=False), 0.5)
    other.load_state_dict(average.state_dict())
    other.copy_to(model)
    assert torch.equal(model.weight.detach(), values[1])
    assert other.decay == 0.9
