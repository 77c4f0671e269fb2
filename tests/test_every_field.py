"""Every field of the schema does something: flipped, a built object or the run is another, or it is refused.

A field that nothing reads does not exist; one without a row in the table below fails the test.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import BaseModel
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

import truthgpt.build
import truthgpt.build_attention
import truthgpt.build_data
from tests.sample_data import CHAT_TEMPLATE, write_every_source, write_hub_datasets
from tests.test_build import COMPLETIONS, NO_DROPOUT, build, registered, small_config
from truthgpt.build import Components
from truthgpt.build_trainer import build_trainer
from truthgpt.config.schema import Config
from truthgpt.config.section import Component
from truthgpt.data.base import Batch, LossAndLogits
from truthgpt.errors import ConfigError, DataError, NonFiniteError
from truthgpt.factories.attention import ATTENTION_BACKENDS
from truthgpt.factories.memory import MEMORY_POLICIES
from truthgpt.memory.base import MemoryPlan
from truthgpt.models.adapted_linear import AdaptedLinear
from truthgpt.models.causal_lm import causal_lm_loss
from truthgpt.models.tokenizer import byte_tokenizer, train_bpe_tokenizer
from truthgpt.runtime.run_directory import RunDirectory
from truthgpt.trainers.trainer import GenericTrainer

Overrides = tuple[str, ...]


def leaf_fields(section: type[BaseModel] = Config, path: str = "") -> Iterator[str]:
    """Dotted names of all keys that hold a value; a component is one value, its options are its own affair."""
    for name, info in section.model_fields.items():
        inner = info.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not Component
        if nested:
            yield from leaf_fields(inner, f"{path}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{path}{name}"


class Lab:
    """Builds and trains variants of the small configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        write_every_source(folder)
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        chats = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
        both = [
            {**row, **pair, **chat, "other": pair["prompt"], "first_turn": chat["messages"][:2]}
            for row, pair, chat in zip(rows, pairs, chats, strict=True)
        ]
        lines = [json.dumps(row) for row in both]
        write_hub_datasets(folder, lines)
        (folder / "both.jsonl").write_text("\n".join(lines))
        (folder / "bad.jsonl").write_text("\n".join([*lines, "{"] * 2))
        (folder / "short.txt").write_text("a text file with some words in it\n" * 40)
        for name, vocabulary in (("bpe_a", 270), ("bpe_b", 280)):
            train_bpe_tokenizer([(folder / "corpus.txt").read_text()], vocabulary).save_pretrained(folder / name)
        config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=257, layer_norm_epsilon=0.125)
        GPT2LMHeadModel(config).save_pretrained(folder / "pretrained")
        byte_tokenizer().save_pretrained(folder / "pretrained")

    def _fill(self, overrides: Overrides) -> Overrides:
        return tuple(override.replace("FOLDER", str(self.folder)) for override in overrides)

    def config(self, overrides: Overrides) -> Config:
        return small_config(self.folder, *self._fill(overrides))

    def components(self, overrides: Overrides) -> Components:
        return build(self.folder, *self._fill(overrides))

    def trainer(self, overrides: Overrides) -> GenericTrainer:
        """In a directory of its own; one that the overrides name is moved aside first, unless it is resumed."""
        own = f"output_dir={self.folder}/{next(self._numbers)}"
        config = self.config((own, *overrides))
        path, resume = Path(config.run_directory), config.resume.enabled
        with RunDirectory.claim(path, resume=resume, overwrite=not resume) as run:
            return build_trainer(config, self.components(overrides), run)

    def run(self, overrides: Overrides) -> Path:
        """The directory of a finished run, of four steps if nothing else is said."""
        steps = () if any("max_steps" in override for override in overrides) else ("training.max_steps=4",)
        trainer = self.trainer((*steps, *overrides))
        trainer.train()
        return trainer.parts.checkpoints.folder.parent


Look = Callable[[Lab, Overrides], Any]


def built(look: Callable[[Components], Any]) -> Look:
    return lambda lab, overrides: look(lab.components(overrides))


def wired(look: Callable[[GenericTrainer], Any]) -> Look:
    return lambda lab, overrides: look(lab.trainer(overrides))


def ran(look: Callable[[Path], Any]) -> Look:
    return lambda lab, overrides: look(lab.run(overrides))


def outcome(lab: Lab, overrides: Overrides) -> str:
    try:
        lab.components(overrides)
    except (ConfigError, DataError) as error:
        return type(error).__name__
    return "built"


def passed_to(module: Any, name: str, argument: str | int | None = None) -> Look:
    """What reaches `module.name`: one argument, or whether it is called at all. For what needs other hardware."""

    def look(lab: Lab, overrides: Overrides) -> Any:
        with mock.patch.object(module, name, wraps=getattr(module, name)) as spy:
            lab.components(overrides)
        if argument is None:
            return spy.called
        call = spy.call_args
        return call.kwargs[argument] if isinstance(argument, str) else call.args[argument]

    return look


def compilation(argument: int | None) -> Look:
    def look(lab: Lab, overrides: Overrides) -> Any:
        with mock.patch.object(truthgpt.build, "compile_layers") as spy:
            lab.components(overrides)
        return spy.called if argument is None else spy.call_args.args[argument]

    return look


def first_weight(components: Components) -> list[float]:
    return next(components.model.parameters()).detach().flatten()[:8].tolist()


def fingerprint(components: Components) -> str:
    return str(components.train_loader.state_dict(0)["fingerprint"])


def first_batch(components: Components) -> list[Any]:
    return [batch["input_ids"].shape for batch in next(components.train_loader.batches()).micro_batches]


def first_ids(components: Components) -> list[Any]:
    return next(components.train_loader.batches()).micro_batches[0]["input_ids"].tolist()


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_with(key: str) -> Look:
    return ran(lambda run: [row["step"] for row in rows(run) if key in row])


def checkpoint_part(part: str) -> Look:
    def look(run: Path) -> list[float]:
        payload = torch.load(run / "checkpoints/last.pt", weights_only=True)
        return [float(tensor.sum()) for tensor in payload[part].values()]

    return ran(look)


def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*.pt"))


def fact(name: str) -> Look:
    return wired(lambda trainer: trainer.parts.facts[name])


def sees_anomalies(trainer: GenericTrainer) -> bool:
    seen = []

    def objective(model: torch.nn.Module, batch: Batch) -> LossAndLogits:
        seen.append(torch.is_anomaly_enabled())
        return causal_lm_loss(model, batch)

    trainer.parts.engine.objective = objective
    trainer.parts.engine.train_step(next(trainer.parts.loader.batches()), 0)
    return seen[0]


def survives_two_bad_steps(trainer: GenericTrainer) -> bool:
    guard, bad = trainer.parts.engine.guard, torch.tensor(torch.nan)
    for _ in range(2):
        guard.judge(bad, bad)
    try:
        guard.check()
    except NonFiniteError:
        return False
    return True


@built
def adapters(components: Components) -> list[Any]:
    """Name, kind, rank, scale and dropout of every adapted layer."""
    return [
        (name, type(layer), tuple(layer.lora_A.weight.shape), layer.scaling, str(layer.lora_dropout))
        for name, layer in components.model.named_modules()
        if isinstance(layer, AdaptedLinear)
    ]


def deterministic(_: Components) -> bool:
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    return enabled


def resumed_step(lab: Lab, overrides: Overrides) -> int:
    """Step at which a run begins in (a copy of) the directory of one that has saved steps 2 and 4."""
    first, copy = lab.folder / "first", lab.folder / "copy"
    if not first.exists():
        lab.run((f"output_dir={first}", "checkpoint.interval_steps=2"))
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(first, copy, ignore=shutil.ignore_patterns(".lock"))
    return lab.trainer((f"output_dir={copy}", *overrides)).state.step


def doubled_plan(train_batch_size: int, grad_accum_steps: int) -> MemoryPlan:
    return MemoryPlan(train_batch_size * 2, grad_accum_steps, 0)


JSONL: Overrides = (
    *("data.source=jsonl", "data.path=FOLDER/both.jsonl", "data.validation_fraction=0.1"),
    "data.packing=false",
)
CHAT: Overrides = (*JSONL, "data.format=chat", f"data.chat_template={json.dumps(CHAT_TEMPLATE)}")
HUB: Overrides = ("data.source=hf", "data.path=null", "data.dataset=FOLDER/hub")
STDLIB: Overrides = ("data.source=python_stdlib", "data.path=null")
MIXED: Overrides = (
    *STDLIB,
    "data.sources=[{source: jsonl, path: FOLDER/both.jsonl, weight: 1}, "
    "{source: text, path: FOLDER/corpus.txt, weight: 1}]",
)
IMAGES: Overrides = (
    *("model.task=image_classification", "data.source=hf", "data.path=FOLDER/images.parquet", "data.collate=cv"),
    "model.config={model_type: vit, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1, image_size: 8, "
    "intermediate_size: 8, patch_size: 4}",
)
LONG: Overrides = (*JSONL, "data.max_seq_len=64")
PAIRS: Overrides = (*COMPLETIONS, "data.path=FOLDER/both.jsonl")
BAD: Overrides = ("data.source=jsonl", "data.path=FOLDER/bad.jsonl")
PRETRAINED: Overrides = ("model.name_or_path=FOLDER/pretrained", "model.init=pretrained")
STUCK: Overrides = (
    "training.learning_rate=1e-30",
    "ema.enabled=false",
    "training.eval_interval=1",
    "training.max_steps=6",
)
HERE: Overrides = ("output_dir=FOLDER/here",)
LORA: Overrides = ("model.lora.enabled=true",)
SAMPLES: Overrides = ("generate.prompts=[the]", "generate.max_new_tokens=4", "generate.temperature=5.0")


@dataclass(frozen=True)
class Shows:
    """`change` on top of `base` makes `look` see something else."""

    change: str
    look: Look
    base: Overrides = ()


@dataclass(frozen=True)
class Refused:
    """`change` is a ConfigError that says `because`."""

    change: str
    because: str
    base: Overrides = field(default=())


groups = built(lambda c: [(group["lr"], group["weight_decay"]) for group in c.optimizer.param_groups])
fused = built(lambda c: c.optimizer.param_groups[0]["fused"])
plan = built(lambda c: c.plan)
schedule = built(lambda c: [c.schedule(step) for step in range(40)])
steps_per_epoch = built(lambda c: c.train_loader.steps_per_epoch)
order = built(lambda c: c.train_loader.state_dict(0)["order"])
evaluation_batches = built(lambda c: None if c.eval_loader is None else len(c.eval_loader))
facts_of_workers = tuple(passed_to(truthgpt.build_data, "WorkerSettings", index) for index in range(3))

TABLE: dict[str, Shows | Refused] = {
    "seed": Shows("seed=8", built(first_weight)),
    "run_name": Shows("run_name=another", ran(lambda run: "# another" in (run / "model/README.md").read_text())),
    "output_dir": Shows("output_dir=FOLDER/there", wired(lambda t: t.parts.checkpoints.folder), HERE),
    "plugins": Refused("plugins=[my_parts]", "--allow-plugins"),
    "strict": Shows("strict=true", outcome, ("training.mixed_precision=fp16",)),
    "model.task": Shows("model.task=image_classification", outcome),
    "model.name_or_path": Shows(
        "model.name_or_path=FOLDER/pretrained", built(lambda c: c.model.config.layer_norm_epsilon)
    ),
    "model.init": Shows("model.init=scratch", built(first_weight), PRETRAINED),
    "model.config": Shows(f"model.config={NO_DROPOUT}", built(lambda c: c.model.config.attn_pdrop)),
    "model.tokenizer.type": Shows(
        "model.tokenizer={type: bpe, vocab_size: 270}", built(lambda c: len(c.tokenizer))
    ),
    "model.tokenizer.vocab_size": Shows(
        "model.tokenizer.vocab_size=275",
        built(lambda c: len(c.tokenizer)),
        ("model.tokenizer={type: bpe, vocab_size: 270}",),
    ),
    "model.tokenizer.path": Shows(
        "model.tokenizer.path=FOLDER/bpe_b",
        built(lambda c: len(c.tokenizer)),
        ("model.tokenizer={type: path, path: FOLDER/bpe_a}",),
    ),
    "model.trust_remote_code": Shows(
        "model.trust_remote_code=true", passed_to(AutoConfig, "from_pretrained", "trust_remote_code"), PRETRAINED
    ),
    "model.gradient_checkpointing": Shows("model.gradient_checkpointing=true", plan),
    "model.attention.backend": Shows(
        "model.attention.backend=other", built(lambda c: c.model.config._attn_implementation)
    ),
    "model.attention.verify": Shows(
        "model.attention.verify=false", passed_to(truthgpt.build_attention, "dense_error"), ("data.packing=false",)
    ),
    "model.kv_cache.type": Shows("model.kv_cache.type=paged", built(lambda c: c.kv_cache)),
    "model.kv_cache.block_size": Shows(
        "model.kv_cache.block_size=64", built(lambda c: c.kv_cache), ("model.kv_cache.type=paged",)
    ),
    "model.memory.policy": Shows("model.memory.policy=other", plan),
    "model.lora.enabled": Shows(LORA[0], built(lambda c: [n for n, _ in c.model.named_parameters()])),
    "model.lora.method": Shows("model.lora.method=dora", adapters, LORA),
    "model.lora.quantization": Refused("model.lora.quantization=nf4", "starts from random weights", LORA),
    "model.lora.r": Shows("model.lora.r=8", adapters, LORA),
    "model.lora.alpha": Shows("model.lora.alpha=8", adapters, LORA),
    "model.lora.dropout": Shows("model.lora.dropout=0.5", adapters, LORA),
    "model.lora.target_modules": Shows("model.lora.target_modules=[c_attn]", adapters, LORA),
    "training.epochs": Shows("training.epochs=2", built(lambda c: c.max_steps), ("training.max_steps=null",)),
    "training.max_steps": Shows("training.max_steps=3", built(lambda c: c.max_steps)),
    "training.max_tokens": Shows("training.max_tokens=300", steps_with("loss")),
    "training.max_time_s": Shows("training.max_time_s=1e-6", steps_with("loss")),
    "training.train_batch_size": Shows("training.train_batch_size=2", built(first_batch)),
    "training.eval_batch_size": Shows("training.eval_batch_size=2", evaluation_batches),
    "training.grad_accum_steps": Shows("training.grad_accum_steps=3", built(first_batch)),
    "training.learning_rate": Shows("training.learning_rate=2e-3", groups),
    "training.weight_decay": Shows("training.weight_decay=0.5", groups),
    "training.max_grad_norm": Shows("training.max_grad_norm=1e-9", checkpoint_part("model")),
    "training.warmup_ratio": Shows("training.warmup_ratio=0.5", schedule),
    "training.scheduler": Shows("training.scheduler=linear", schedule),
    "training.mixed_precision": Shows(
        "training.mixed_precision=fp16", built(lambda c: (c.precision.name, c.fallbacks.to_json()))
    ),
    "training.weights": Shows(
        "training.weights=bf16_master",
        built(lambda c: (first_weight(c), c.fallbacks.to_json())),
        ("training.mixed_precision=bf16",),
    ),
    "training.float8": Shows(
        "training.float8=tensorwise", built(lambda c: c.fallbacks.to_json()), ("training.mixed_precision=bf16",)
    ),
    "training.early_stopping_patience": Shows("training.early_stopping_patience=2", steps_with("loss"), STUCK),
    "training.allow_tf32": Shows("training.allow_tf32=false", passed_to(truthgpt.build, "configure_backends", 1)),
    "training.torch_compile": Shows("training.torch_compile=true", compilation(None)),
    "training.compile_mode": Shows(
        "training.compile_mode=max-autotune", compilation(1), ("training.torch_compile=true",)
    ),
    "training.fused_adamw": Shows("training.fused_adamw=false", fused),
    "training.detect_anomaly": Shows("training.detect_anomaly=true", wired(sees_anomalies)),
    "training.save_safetensors": Shows(
        "training.save_safetensors=false", ran(lambda run: (run / "model/model.safetensors").exists())
    ),
    "training.callbacks": Shows("training.callbacks=[print]", built(lambda c: [name for name, _ in c.callbacks])),
    "training.log_interval": Shows("training.log_interval=3", steps_with("loss")),
    "training.eval_interval": Shows("training.eval_interval=2", steps_with("val_loss")),
    "optimizer.type": Shows("optimizer.type=lion", built(lambda c: type(c.optimizer))),
    "optimizer.fused": Shows("optimizer.fused=false", fused),
    "data.source": Shows("data.source=jsonl", steps_per_epoch, ("data.path=FOLDER/both.jsonl",)),
    "data.sources": Shows(
        "data.sources=[{source: jsonl, path: FOLDER/both.jsonl}]", built(fingerprint), STDLIB
    ),
    "data.mix_by": Shows("data.mix_by=tokens", order, MIXED),
    "data.dataset": Shows("data.dataset=FOLDER/hub2", built(fingerprint), HUB),
    "data.subset": Shows("data.subset=small", built(fingerprint), HUB),
    "data.split": Shows("data.split=test", built(fingerprint), HUB),
    "data.validation_split": Shows("data.validation_split=test", evaluation_batches, HUB),
    "data.path": Shows("data.path=FOLDER/short.txt", built(fingerprint)),
    "data.validation_path": Shows("data.validation_path=FOLDER/short.txt", built(fingerprint)),
    "data.validation_fraction": Shows("data.validation_fraction=0.3", evaluation_batches),
    "data.format": Shows("data.format=prompt_completion", built(fingerprint), JSONL),
    "data.text_field": Shows("data.text_field=prompt", built(fingerprint), JSONL),
    "data.prompt_field": Shows("data.prompt_field=text", built(fingerprint), PAIRS),
    "data.completion_field": Shows("data.completion_field=text", built(fingerprint), PAIRS),
    "data.messages_field": Shows("data.messages_field=first_turn", built(fingerprint), CHAT),
    "data.chat_template": Shows(
        "data.chat_template='{% for m in messages %}{{ m.content }}.{% endfor %}'", built(fingerprint), CHAT
    ),
    "data.image_field": Shows("data.image_field=other", built(fingerprint), IMAGES),
    "data.label_field": Shows("data.label_field=shade", built(lambda c: c.model.config.id2label), IMAGES),
    "data.train_on": Shows("data.train_on=all", built(fingerprint), PAIRS),
    "data.overlong": Shows("data.overlong=split", steps_per_epoch, (*JSONL, "data.max_seq_len=16")),
    "data.on_bad_row": Shows("data.on_bad_row=skip", outcome, (*BAD, "data.max_bad_fraction=0.5")),
    "data.max_bad_fraction": Shows("data.max_bad_fraction=0.001", outcome, (*BAD, "data.on_bad_row=skip")),
    "data.streaming": Shows("data.streaming=true", built(lambda c: type(c.train_loader)), JSONL),
    "data.shuffle_window": Shows("data.shuffle_window=9", built(first_ids), (*JSONL, "data.streaming=true")),
    "data.packing": Shows("data.packing=true", steps_per_epoch, JSONL),
    "data.max_tokens": Shows("data.max_tokens=64", plan, JSONL),
    "data.collate": Shows("data.collate={type: lm, pad_to_multiple_of: 64}", built(first_batch), LONG),
    "data.max_seq_len": Shows("data.max_seq_len=16", built(first_batch)),
    "data.bucket_by_length": Shows("data.bucket_by_length=true", order, JSONL),
    "data.bucket_bins": Shows("data.bucket_bins=[10, 20]", order, (*JSONL, "data.bucket_by_length=true")),
    "data.num_workers": Shows("data.num_workers=1", facts_of_workers[0]),
    "data.prefetch_factor": Shows("data.prefetch_factor=4", facts_of_workers[1]),
    "data.persistent_workers": Shows("data.persistent_workers=false", facts_of_workers[2]),
    "checkpoint.interval_steps": Shows("checkpoint.interval_steps=1", ran(saved_steps)),
    "checkpoint.keep_last": Shows("checkpoint.keep_last=1", ran(saved_steps), ("checkpoint.interval_steps=1",)),
    "ema.enabled": Shows("ema.enabled=false", checkpoint_part("ema")),
    "ema.on_cpu": Shows("ema.on_cpu=true", wired(lambda trainer: trainer.parts.engine.ema.device)),  # type: ignore[attr-defined]
    "ema.decay": Shows("ema.decay=0.05", checkpoint_part("ema")),
    "resume.enabled": Shows("resume.enabled=true", resumed_step),
    "resume.checkpoint_dir": Shows(
        "resume.checkpoint_dir=FOLDER/first/checkpoints/step_00000002.pt", resumed_step, ("resume.enabled=true",)
    ),
    "eval.metrics": Shows("eval.metrics=[ppl, bits_per_byte]", built(lambda c: [metric.name for metric in c.metrics])),
    "eval.select_best_by": Shows("eval.select_best_by=loss", ran(lambda run: rows(run)[-1]["best_metric"])),
    "logging.project": Shows("logging.project=another", fact("project")),
    "logging.run_name": Shows("logging.run_name=another", fact("run_name")),
    "logging.dir": Shows("logging.dir=another", fact("log_dir")),
    "hardware.device": Shows(
        "hardware.device=cuda",
        (lambda lab, o: str(lab.components(o).device)) if torch.cuda.is_available() else outcome,
    ),
    "hardware.deterministic": Shows("hardware.deterministic=true", built(deterministic)),
    "guards.max_consecutive_skips": Shows("guards.max_consecutive_skips=1", wired(survives_two_bad_steps)),
    "generate.prompts": Shows("generate.prompts=[the, a]", wired(lambda t: len(t.parts.sample())), SAMPLES),
    "generate.max_new_tokens": Shows(
        "generate.max_new_tokens=20", wired(lambda t: t.parts.sample()), (*SAMPLES, "generate.temperature=0.0")
    ),
    "generate.temperature": Shows("generate.temperature=0.0", wired(lambda t: t.parts.sample()), SAMPLES),
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    from tests.plugins.reference_attention import reference_attention

    with ExitStack() as stack:
        stack.enter_context(registered(ATTENTION_BACKENDS, "other", lambda: reference_attention))
        stack.enter_context(registered(MEMORY_POLICIES, "other", doubled_plan))
        yield Lab(tmp_path_factory.mktemp("lab"))


def test_every_field_has_a_row() -> None:
    fields = set(leaf_fields())
    assert len(fields) > 70
    assert TABLE.keys() == fields


@pytest.mark.parametrize("name", TABLE)
def test_field_shows(lab: Lab, name: str) -> None:
    row = TABLE[name]
    assert row.change.partition("=")[0] == name or name.startswith(row.change.partition("=")[0])
    if isinstance(row, Refused):
        with pytest.raises(ConfigError) as caught:
            lab.config((*row.base, row.change))
        assert row.because in str(caught.value) and name in str(caught.value)
        return
    before = row.look(lab, row.base)
    repeated = row.look(lab, row.base)
    assert before == repeated, "what is looked at must not change by itself"
    key = row.change.partition("=")[0]
    base = tuple(override for override in row.base if override.partition("=")[0] != key)
    assert row.look(lab, (*base, row.change)) != before, f"{row.change} changes nothing"
