"""Generation on a CPU, ours against transformers' `generate`, interleaved in one process.

    python benchmarks/generate.py --json benchmarks/results/generate_cpu.jsonl

A Llama of 7M parameters with random weights writes greedily. `one`: a prompt of 64 tokens, 128 new ones. `eight`:
requests whose prompts have 10 to 128 tokens and whose answers 16 to 256. `queue`: 32 such requests, eight at a time.
transformers pads eight to their longest prompt and runs them to their longest answer; only tokens that were asked for
count.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.inference.engine import Engine, EngineLimits
from truthgpt.inference.open_engine import EngineOptions, open_engine
from truthgpt.inference.request import Sampling
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.runtime.fallbacks import Fallbacks

VOCABULARY, BLOCK_SIZE, BATCH = 4096, 16, 8
Load = tuple[list[list[int]], list[int]]
"""Prompts, and how many tokens to write after each."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both loads, print and append a record each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to append the records to")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    model, tokenizer = build_model(), byte_tokenizer()
    for name, load in loads().items():
        ratios, rates = compare(model, tokenizer, load, options.pairs)
        record = {
            "kind": "generate_cpu",
            "load": name,
            "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
            "tokens_per_s": rates,
            "threads": options.threads,
            "machine": platform.machine(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if options.json is not None:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:8} {statistics.median(ratios):.2f} x ({spread}); {rates['ours']:.0f} tokens/s", flush=True)


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, load: Load, pairs: int
) -> tuple[list[float], dict[str, float]]:
    """Ratios of the times, transformers' to ours, of interleaved runs; and both medians in tokens a second."""
    ours, theirs = [], []
    lengths = [len(prompt) + count for prompt, count in zip(*load, strict=True)]
    for _ in range(pairs + 1):  # the first of each warms up
        theirs.append(timed(lambda: generate(model, load)))
        policy, options = PagedKVCache(BLOCK_SIZE), EngineOptions(limits=EngineLimits(sequences=BATCH))
        with open_engine(model, tokenizer, policy, Fallbacks(strict=True), options, lengths) as engine:
            ours.append(timed(lambda engine=engine: answer(engine, load)))
    ours, theirs = ours[1:], theirs[1:]
    asked = sum(load[1])
    rates = {"ours": asked / statistics.median(ours), "transformers": asked / statistics.median(theirs)}
    return [their / our for our, their in zip(ours, theirs, strict=True)], rates


def timed(run: Any) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def answer(engine: Engine, load: Load) -> None:
    """Ours."""
    for prompt, count in zip(*load, strict=True):
        engine.submit(prompt, Sampling(max_new_tokens=count, temperature=0.0))
    while engine.has_work:
        engine.step()


def generate(model: PreTrainedModel, load: Load) -> None:
    """transformers' `generate`: batches of eight, padded on the left."""
    prompts, new = load
    if len(prompts) > BATCH:
        generate(model, (prompts[:BATCH], new[:BATCH]))
        generate(model, (prompts[BATCH:], new[BATCH:]))
        return
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(max_new_tokens=max(new), do_sample=False, pad_token_id=0)
    with torch.no_grad():
        written = model.generate(ids, attention_mask=mask, generation_config=config)
    assert written.shape[1] == longest + max(new)


def loads() -> dict[str, Load]:
    """One request, eight of all lengths, and 32 of them."""
    numbers = random.Random(1)
    lengths, new = [numbers.randint(10, 128) for _ in range(8)], [numbers.randint(16, 256) for _ in range(8)]
    eight = [prompt(numbers, length) for length in lengths], new
    lengths, new = [numbers.randint(10, 128) for _ in range(32)], [numbers.randint(16, 256) for _ in range(32)]
    queue = [prompt(numbers, length) for length in lengths], new
    return {"one": ([prompt(numbers, 64)], [128]), "eight": eight, "queue": queue}


def prompt(numbers: random.Random, length: int) -> list[int]:
    """Random token ids."""
    return [numbers.randrange(VOCABULARY) for _ in range(length)]


def build_model() -> PreTrainedModel:
    """The model; it has no end-of-text token, so that every answer is written to its end."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, for the first ids; the others have no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


if __name__ == "__main__":
    main()
