"""Special tokens of a chat template on a base that lacks them: trained, resumed, evaluated, and loaded by peft."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.process import Cli
from tests.sample_data import sentence
from tests.test_lora_run import LORA, bases, last_loss, needs_bf16, pretrained, run, train_straight_and_resumed
from truthgpt.load_model import load_model
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.models.trained_weights import adapter_weights

__all__ = ["bases"]
CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>{% endfor %}"
CHAT = (
    *("data.source=jsonl", "data.path=chats.jsonl", "data.format=chat", "data.validation_fraction=0.1"),
    *("data.max_seq_len=64", f"data.chat_template={json.dumps(TEMPLATE)}"),
)
TOKENIZER = ("model.tokenizer={type: path, path: chat_tokenizer}",)
MARKS = [257, 258]


@pytest.fixture
def chats(bases: Cli) -> Cli:
    """`bases` with chats and a tokenizer that has two tokens more than the models."""
    rng = random.Random(3)
    rows = [
        {"messages": [{"role": role, "content": sentence(rng, 2)} for role in ("user", "assistant")]}
        for _ in range(120)
    ]
    (bases.folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(bases.folder / "chat_tokenizer")
    return bases


@pytest.mark.parametrize("precision", ["none", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize(("name", "method"), [("gpt2", "lora"), ("llama", "dora")])
def test_new_tokens_are_trained_with_the_adapters(chats: Cli, name: str, method: str, precision: str) -> None:
    chosen = (*LORA, *pretrained(name), *TOKENIZER, *CHAT, f"model.lora.method={method}")
    chosen = (*chosen, f"training.mixed_precision={precision}")
    said = run(chats, "train", "base.yaml", *chosen).stderr
    assert said.count("2 tokens of the tokenizer are not in the model: as many rows are added") == 1
    folder = chats.folder / "runs/t"
    assert json.loads((folder / "environment.json").read_text())["fallbacks"] == []
    evaluated = run(chats, "eval", "runs/t", "--json").json
    assert evaluated["metrics"]["loss"] == last_loss(folder)
    assert run(chats, "eval", "runs/t/checkpoints/best.pt", "--json").json == evaluated
    run(chats, "generate", "runs/t", "--prompt", "<|im_start|>user", "--max-new-tokens", "4")

    ids = torch.tensor([[257, *b"user\nthe cat", 258]])
    model = load_model(folder, CPU).model
    rows = [value for key, value in adapter_weights(model).items() if "token_adapter" in key]
    assert len(rows) == (1 if name == "gpt2" else 2)
    assert all(not torch.equal(table[0], table[1]) for table in rows), "both still as they began"
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        theirs = AutoPeftModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        base = AutoModelForCausalLM.from_pretrained(chats.folder / name, trust_remote_code=False)
        base.resize_token_embeddings(len(tokenizer))
        by_hand = PeftModel.from_pretrained(base, folder / "model", trust_remote_code=False).eval()
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 258 and ours.shape[-1] == 259
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours)
        torch.testing.assert_close(by_hand(input_ids=ids).logits, ours)
    card = (folder / "model/README.md").read_text()
    assert "resize_token_embeddings(len(processor))" in card
    described = json.loads((folder / "model/adapter_config.json").read_text())
    assert list(described["trainable_token_indices"].values()) == [MARKS] * len(rows)


def test_new_tokens_on_unused_embeddings_are_told(chats: Cli) -> None:
    spare = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1)
    for name, size in (("spare", 320), ("fewer", 258)):
        spare.vocab_size = size
        LlamaForCausalLM(spare).save_pretrained(chats.folder / name)
        byte_tokenizer().save_pretrained(chats.folder / name)
    chosen = (*LORA, *CHAT, "training.max_steps=1")
    said = run(chats, "train", "base.yaml", *chosen, *pretrained("spare"), *TOKENIZER).stderr
    assert "2 tokens of the tokenizer, for example '<|im_start|>', are new to" in said and "are added" not in said
    said = run(chats, "train", "base.yaml", *chosen, *pretrained("fewer"), *TOKENIZER, "output_dir=f").stderr
    assert (
        "1 tokens of the tokenizer, for example '<|im_start|>', are new to" in said
        and "1 tokens of the tokenizer are not" in said
    )
    said = run(chats, "train", "base.yaml", *chosen, *pretrained("llama"), *TOKENIZER, "output_dir=l").stderr
    assert "are new to" not in said


def test_resume_with_new_tokens_is_exact(chats: Cli) -> None:
    train_straight_and_resumed(chats, *LORA, *pretrained("gpt2"), *TOKENIZER, *CHAT)


def test_all_weights_with_new_tokens(chats: Cli) -> None:
    chosen = ("training.max_steps=12", "training.eval_interval=6", "checkpoint.interval_steps=5")
    chosen = (*chosen, *pretrained("llama"), *TOKENIZER, *CHAT)
    said = run(chats, "train", "base.yaml", *chosen).stderr
    assert "2 tokens of the tokenizer are not in the model" in said
    evaluated = run(chats, "eval", "runs/t", "--json").json
    assert evaluated["metrics"]["loss"] == last_loss(chats.folder / "runs/t")
    assert run(chats, "eval", "runs/t/checkpoints/best.pt", "--json").json == evaluated
    model = AutoModelForCausalLM.from_pretrained(chats.folder / "runs/t/model", trust_remote_code=False)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(chats.folder / "runs/t/model")) == 259
    train_straight_and_resumed(chats, *chosen)


def test_adapters_that_train_tokens_of_their_base(chats: Cli) -> None:
    run(chats, "train", "base.yaml", *LORA, *pretrained("gpt2"), *TOKENIZER, *CHAT)
    path = Path(chats.folder / "runs/t/model/adapter_config.json")
    described = json.loads(path.read_text())
    described["trainable_token_indices"] = {"transformer.wte": [3, 258]}
    path.write_text(json.dumps(described))
    refused = run(chats, "generate", "runs/t", "--prompt", "a", exit_code=4)
    assert "they train tokens that the base model has" in refused.stderr
