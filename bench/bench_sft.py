"""A step of supervised fine-tuning beside TRL's SFTTrainer, with and without its fused head.

    make trl-1.12               # the last TRL that can do without the fused head
    pytest bench/bench_sft.py

A Llama of 30M parameters (V = 50257, of which the two embeddings are 26M; random weights, fp32), 16
demonstrations of 128 tokens a step, all alike, so that their order makes no difference: the first
step's losses are compared. Same optimiser (AdamW, gradients clipped at norm 1) and no dropout on
all sides. TRL 1.16 has the fused head alone. Memory is resident memory at its peak, above what the
process held before it loaded the model and above the weights; so it holds gradients and Adam's two
moments, three times the weights, on every side.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import beside
import pytest
import torch
from common import DEVICE, Missing, Row
from transformers import LlamaConfig, LlamaForCausalLM

from fastrlhf.encoding import demonstration_examples
from fastrlhf.models import LanguageModel
from fastrlhf.records import read_demonstrations
from fastrlhf.world import build_tokenizer

BATCH, LENGTH, STEPS, VOCABULARY = 16, 128, 5, 50257
TOLERANCE = 1e-3  # of the loss: TRL logs four digits


def write_case(folder: Path) -> dict[str, Any]:
    """Model and demonstrations to the folder; what the sides need to know."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    LanguageModel(model).save(folder / "model", tokenizer)
    word = next(w for w in sorted(tokenizer.get_vocab()) if w.isalpha())
    line = {"prompt": word, "completion": " ".join([word] * LENGTH)}  # cut to what has room
    path = folder / "demonstrations.jsonl"
    path.write_text((json.dumps(line) + "\n") * (BATCH * STEPS))
    (example,) = demonstration_examples(
        tokenizer, read_demonstrations(path)[:1], max_response=LENGTH - 2
    )
    assert len(example.tokens) == LENGTH
    return {
        "model": str(folder / "model"),
        "data": str(folder),
        "tokens": example.tokens,
        "labels": [-100] * example.start + list(example.tokens[example.start :]),
        "batch": BATCH,
        "steps": STEPS,
        "lr": 1e-6,
        "seed": 0,
    }


@pytest.mark.skipif(DEVICE != "cpu", reason="beside TRL on a CPU")
def test_sft(keep: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = write_case(Path(folder))
        found = {
            "cpu": beside.ours("sft", case),
            "TRL 1.16": beside.trl("sft", case | {"loss_type": "nll"}),
            "TRL 1.12, without its fused head": beside.trl_1_12("sft", case | {"loss_type": "nll"}),
        }
    shape = f"{BATCH} x {LENGTH} tokens, V={VOCABULARY}"
    rows, facts = [], {}
    expected = math.nan
    for variant, side in found.items():
        row = Row("SFT step", variant, "cpu", shape, "float32")
        rows.append(row)
        if isinstance(side, Missing):
            row.note = side.why
            continue
        low, median, high = statistics.quantiles(side["seconds"], n=4)
        row.median_s, row.iqr_s, row.rounds = median, high - low, len(side["seconds"])
        row.peak_bytes = side["peak_bytes"]
        expected = side["losses"][0] if variant == "cpu" else expected
        if not abs(side["losses"][0] - expected) <= TOLERANCE:
            row.note = f"WRONG: loss {side['losses'][0]:.4f}, ours {expected:.4f}"
            row.median_s = None
            continue
        facts[variant] = {
            "tokens a second": BATCH * LENGTH / median,
            "first loss": side["losses"][0],
            "weights_bytes": side["weights_bytes"],
        }
    keep(rows, facts=facts)
