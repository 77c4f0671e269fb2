"""Tokens a second of generation, ours against transformers' three ways: a process each, in one call.

    python benchmarks/gpu/generation.py --out benchmarks/results/generate.jsonl
    python benchmarks/gpu/generation.py --contenders ours hf_static --loads fixed64

Loads: `fixedN`, N prompts of 128 tokens and 256 new ones each; `contextN`, N prompts of 384 tokens and 256 new ones, so
that the context is 512 in the middle; `ragged`, 256 requests whose prompts and answers have 100 to 1,024 tokens each.
The model has the shape of Llama 1B, random bf16 weights, and writes to the end whatever it says. A load is run once to
warm up and then `--repeats` times; tokens a second count the answers' tokens over the whole time, prompts included.
`hf_dynamic` is `generate`, `hf_static` `generate` with a static cache, which transformers compiles, `hf_paged`
`generate_batch`, its continuous batching.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from processes import append_record, gpu_state, offline_environment
from random_llama import VOCABULARY, random_llama

CONTENDERS = ("ours", "hf_dynamic", "hf_static", "hf_paged")
LOADS = ("fixed64", "fixed256", "context64", "context256", "ragged")
TIMEOUT_S = 120.0
BLOCK_SIZE = 16

Prompts = list[list[int]]
Run = Callable[[Prompts, list[int]], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every contender on every load, print and append a record each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file to append the records to")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure is not None:
        measure(options.measure, options.loads, options.repeats)
        return
    for contender in options.contenders:
        command = [sys.executable, __file__, "--measure", contender, "--repeats", str(options.repeats), "--loads"]
        try:
            done = subprocess.run(
                [*command, *options.loads],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
                env=offline_environment(),
            )
            said = done.stdout
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        for line in said.splitlines():
            if not line.startswith("{"):
                continue
            record = {"kind": "generate", "contender": contender, "gpu": gpu_state(), **json.loads(line)}
            if options.out is not None:
                append_record(options.out, record)
            print(_line(record), flush=True)


def requests(load: str, repeat: int) -> tuple[Prompts, list[int]]:
    """Prompts, which are others in every repeat so that none is remembered, and how many tokens to write after each."""
    shapes, tokens = random.Random(load), random.Random(f"{load} {repeat}")
    if load == "ragged":
        lengths = [shapes.randint(100, 1024) for _ in range(256)]
        new = [shapes.randint(100, 1024) for _ in range(256)]
    else:
        length = 128 if load.startswith("fixed") else 384
        count = int(load.removeprefix("fixed").removeprefix("context"))
        lengths, new = [length] * count, [256] * count
    return [[tokens.randrange(VOCABULARY) for _ in range(length)] for length in lengths], new


def measure(contender: str, loads: Sequence[str], repeats: int) -> None:
    """Run the loads, and print a JSON object for each."""
    import torch
    import transformers

    model = random_llama("1b")
    runs = {"ours": _ours, "hf_dynamic": _dynamic, "hf_static": _static, "hf_paged": _generate_batch}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with ExitStack() as stack:
        _measure(runs[contender](model, stack), contender, loads, repeats, versions)


def _measure(run: Run, contender: str, loads: Sequence[str], repeats: int, versions: dict[str, str]) -> None:
    import torch

    for load in loads:
        if contender in ("hf_dynamic", "hf_static") and load == "ragged":
            continue  # a batch of it would be padded to the longest prompt, and run to the longest answer
        run(*requests(load, 0))
        found = []
        for repeat in range(1, repeats + 1):
            prompts, new = requests(load, repeat)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            details = run(prompts, new)
            torch.cuda.synchronize()
            found.append({"seconds": time.perf_counter() - begin, **details})
        seconds = [each["seconds"] for each in found]
        rates = sorted(sum(new) / each for each in seconds)
        record = {
            "load": load,
            "tokens_per_s": {"median": statistics.median(rates), "lowest": rates[0], "highest": rates[-1]},
            **{key: statistics.median(each[key] for each in found) for key in found[0] if key != "seconds"},
        }
        print(json.dumps({**record, "versions": versions}), flush=True)


def _ours(model: Any, stack: ExitStack) -> Run:
    from transformers import PreTrainedTokenizerFast

    from truthgpt.inference.open_engine import EngineOptions, open_engine
    from truthgpt.inference.request import Sampling
    from truthgpt.kv_cache.paged import PagedKVCache
    from truthgpt.runtime.fallbacks import Fallbacks

    tokenizer, fallbacks = _byte_tokenizer(PreTrainedTokenizerFast), Fallbacks(strict=True)
    options = EngineOptions(compiled=True)
    engine = stack.enter_context(open_engine(model, tokenizer, PagedKVCache(BLOCK_SIZE), fallbacks, options))

    def run(prompts: Prompts, new: list[int]) -> dict[str, Any]:
        first: dict[int, float] = {}
        full_steps: list[float] = []
        held = filled = passes = 0
        begin = time.perf_counter()
        for prompt, count in zip(prompts, new, strict=True):
            engine.submit(prompt, Sampling(max_new_tokens=count, temperature=0.0))
        while engine.has_work:
            step_begin = time.perf_counter()
            pieces = engine.step()
            now = time.perf_counter()
            for piece in pieces:
                first.setdefault(piece.request_id, now - begin)
            if len(pieces) == len(prompts):
                full_steps.append(now - step_begin)
            passes += 1
            if passes % 16 == 0:
                held += engine.load().cache_used_tokens
                filled += sum(sequence.computed for sequence in engine._running)
        waits = sorted(first.values())
        return {
            "time_to_first_token_p95_s": waits[int(0.95 * (len(waits) - 1))],
            "decoding_tokens_per_s": len(prompts) / statistics.median(full_steps or [math.inf]),
            "cache_wasted": 1 - filled / held,
        }

    return run


def _byte_tokenizer(kind: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return kind(tokenizer_object=tokenizer)


def _dynamic(model: Any, stack: ExitStack) -> Run:
    del stack
    return _generate(model, None)


def _static(model: Any, stack: ExitStack) -> Run:
    del stack
    return _generate(model, "static")


def _generate(model: Any, cache: str | None) -> Run:
    import torch
    from transformers import GenerationConfig

    def run(prompts: Prompts, new: list[int]) -> dict[str, Any]:
        config = GenerationConfig(max_new_tokens=new[0], do_sample=False, cache_implementation=cache, pad_token_id=0)
        ids = torch.tensor(prompts, device="cuda")
        with torch.no_grad():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert written.shape[1] == len(prompts[0]) + new[0]
        return {}

    return run


def _generate_batch(model: Any, stack: ExitStack) -> Run:
    from transformers import GenerationConfig

    del stack

    def run(prompts: Prompts, new: list[int]) -> dict[str, Any]:
        config = GenerationConfig(max_new_tokens=max(new), do_sample=False, eos_token_id=-1, pad_token_id=0)
        written = model.generate_batch(prompts, generation_config=config)
        assert len(written) == len(prompts)
        return {}

    return run


def _line(record: dict[str, Any]) -> str:
    rate = record["tokens_per_s"]
    extra = "".join(f", {key} {value:.4g}" for key, value in record.items() if isinstance(value, float))
    return f"{record['contender']:10} {record['load']:10} {rate['median']:9,.0f} tokens/s{extra}"


if __name__ == "__main__":
    main()
