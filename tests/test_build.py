"""Config -> Components -> trainer, in this process; other in-process tests start from `small_config` and `build`."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import truthgpt.build
import truthgpt.runtime.onednn
import truthgpt.runtime.precision
from tests.plugins.reference_attention import reference_attention
from tests.sample_data import BASE, write_sources
from truthgpt.build import Components, build_components, build_evaluation
from truthgpt.build_sources import build_text_data
from truthgpt.build_trainer import build_trainer
from truthgpt.config.schema import Config
from truthgpt.errors import ConfigError, DataError, RunDirectoryError
from truthgpt.factories.attention import ATTENTION_BACKENDS
from truthgpt.factories.callbacks import CALLBACKS
from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.factories.registry import Availability, Options, Registry
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.load_model import LoadedModel
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.runtime.onednn import OneDnnConv1D, OneDnnLinear, linear_layers
from truthgpt.trainers.trainer import GenericTrainer
from truthgpt.validate_config import load_config

NO_DROPOUT = (
    "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 64, "
    "resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}"
)
COMPLETIONS = (
    "data.source=jsonl",
    "data.format=prompt_completion",
    "data.train_on=completion",
    "data.validation_fraction=0.1",
)


def small_config(folder: Path, *overrides: str) -> Config:
    """The configuration of the end-to-end tests with its files in `folder`."""
    if not (folder / "corpus.txt").exists():
        write_sources(folder)
    files = {"data.source=jsonl": "rows.jsonl", "data.format=prompt_completion": "pairs.jsonl"}
    name = next((files[o] for o in reversed(overrides) if o in files), "corpus.txt")
    own = [f"data.path={folder / name}", f"output_dir={folder / 'runs/t'}", "training.callbacks=[]"]
    given = {override.partition("=")[0] for override in overrides}
    return load_config(BASE, [*(o for o in own if o.partition("=")[0] not in given), *overrides])


def build(folder: Path, *overrides: str) -> Components:
    """The components of `small_config`, on one thread."""
    torch.set_num_threads(1)
    return build_components(small_config(folder, *overrides))


def build_small_trainer(folder: Path, *overrides: str) -> GenericTrainer:
    """The trainer of `small_config`; its run directory is held by this process until the trainer is gone."""
    torch.set_num_threads(1)
    config = small_config(folder, *overrides)
    return build_trainer(config, build_components(config))


@contextmanager
def registered(registry: Registry, name: str, builder: Any, **keywords: Any) -> Iterator[None]:
    """A component that exists inside the context only: registries are shared by all tests of a process."""
    registry.register(name, **keywords)(builder)
    try:
        yield
    finally:
        registry.unregister(name)


def test_components_are_what_the_config_says(tmp_path: Path) -> None:
    components = build(tmp_path)
    assert components.device == torch.device("cpu") and components.precision.name == "none"
    assert components.max_steps == 40 and components.plan.micro_batch_size == 4
    assert components.model.config.model_type == "gpt2" and components.model.config.vocab_size == 257
    assert [metric.name for metric in components.metrics] == ["loss", "ppl"]
    assert components.fallbacks.to_json() == []
    assert not components.kv_cache.keeps
    assert build(tmp_path, "model.kv_cache={type: paged, block_size: 8}").kv_cache == PagedKVCache(8)


def test_steps_come_from_epochs(tmp_path: Path) -> None:
    components = build(tmp_path, "training.max_steps=null", "training.epochs=2")
    assert components.max_steps == 2 * components.train_loader.steps_per_epoch > 0


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build(tmp_path, "data.num_workers=0")
    assert torch.equal(before, torch.get_rng_state())


def test_building_leaves_the_run_directory_as_it_was(tmp_path: Path) -> None:
    """Only `build_trainer` writes, and only once everything could be built."""
    build(tmp_path)
    assert not (tmp_path / "runs").exists()
    trainer = build_small_trainer(tmp_path)
    assert (tmp_path / "runs/t/config.yaml").is_file()
    assert (tmp_path / "runs/t/model/tokenizer.json").is_file()
    assert trainer.state.step == 0


def test_failed_restore_writes_nothing(tmp_path: Path) -> None:
    checkpoints = tmp_path / "runs/t/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000001.pt").write_bytes(b"torn")
    with pytest.raises(Exception, match=r"no checkpoint in .* is valid"):
        build_small_trainer(tmp_path, "resume.enabled=true")
    assert not (tmp_path / "runs/t/config.yaml").exists()


def test_used_directory_is_refused(tmp_path: Path) -> None:
    first = build_small_trainer(tmp_path, "training.max_steps=1")
    first.train()
    del first
    with pytest.raises(RunDirectoryError):
        build_small_trainer(tmp_path)


def test_missing_tracker_falls_back_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def probe() -> Availability:
        return Availability(False, "nowhere is not installed", fallback="print")

    with registered(CALLBACKS, "absent", object, probe=probe):
        with caplog.at_level(logging.WARNING, "truthgpt"):
            components = build(tmp_path, "training.callbacks=[absent]")
        assert [f["wanted"] for f in components.fallbacks.to_json()] == ["absent"]
        assert len(caplog.records) == 1 and "nowhere is not installed" in caplog.text
        with pytest.raises(ConfigError, match="strict"):
            build(tmp_path, "training.callbacks=[absent]", "strict=true")


def test_an_optimizer_that_is_not_there_falls_back_in_one_line_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    chosen = "optimizer={type: adamw8bit, betas: [0.5, 0.75]}"
    with caplog.at_level(logging.WARNING, "truthgpt"):
        components = build(tmp_path, chosen)
    assert len(caplog.records) == 1 and "optimizer.type: using adamw instead of adamw8bit: torchao" in caplog.text
    assert type(components.optimizer) is torch.optim.AdamW
    assert components.optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    assert [f["wanted"] for f in components.fallbacks.to_json()] == ["adamw8bit"]
    with pytest.raises(ConfigError, match=r"optimizer.type: adamw8bit cannot be used: .*truthgpt\[torchao\]"):
        build(tmp_path, chosen, "strict=true")


def test_an_option_that_the_stand_in_does_not_know_is_left_out_and_nothing_may_stand_in(tmp_path: Path) -> None:
    class MyOptions(Options):
        eps: float = 0.5
        mine: int = 3

    def gone(fallback: str | None) -> Callable[[], Availability]:
        return lambda: Availability(False, "it is gone", fallback)

    with registered(OPTIMIZERS, "absent", object, options=MyOptions, probe=gone("adamw")):
        components = build(tmp_path, "optimizer.type=absent")
        assert components.optimizer.param_groups[0]["eps"] == 0.5
    with (
        registered(OPTIMIZERS, "absent", object, options=MyOptions, probe=gone(None)),
        pytest.raises(ConfigError, match=r"^optimizer.type: absent: it is gone$"),
    ):
        build(tmp_path, "optimizer.type=absent", "data.path=nowhere")  # said before any data is read


def test_evaluation_needs_a_validation_split(tmp_path: Path) -> None:
    config = small_config(tmp_path, "data.validation_fraction=0")
    components = build(tmp_path)
    loaded = LoadedModel(components.model, components.tokenizer, tmp_path, run_directory=None)
    with pytest.raises(DataError, match="validation_fraction"):
        build_evaluation(config, loaded)


def test_config_is_checked_before_data_is_read(tmp_path: Path) -> None:
    """A mistake that only the libraries know is found although the data is missing too."""
    with pytest.raises(ConfigError, match="positions"):
        build(tmp_path, "data.max_seq_len=65", f"data.path={tmp_path / 'missing.txt'}")
    with pytest.raises(ConfigError, match="did you mean n_layer"):
        build(tmp_path, "model.config={model_type: gpt2, n_layers: 2}", f"data.path={tmp_path / 'missing.txt'}")
    with pytest.raises(DataError, match="missing"):
        build(tmp_path, f"data.path={tmp_path / 'missing.txt'}")


ROWS = ("data.source=jsonl", "data.validation_fraction=0.1")


@pytest.mark.parametrize(
    ("overrides", "packed"),
    [
        ((), False),
        (("data.packing=true",), True),
        (ROWS, True),
        ((*ROWS, "data.packing=false"), False),
        ((*ROWS, "data.bucket_by_length=true"), False),
        ((*ROWS, "data.collate={type: lm, pad_to_multiple_of: 8}"), False),
        ((*ROWS, "model.attention.backend=own"), False),
    ],
)
def test_what_is_packed(tmp_path: Path, overrides: tuple[str, ...], packed: bool) -> None:
    with registered(ATTENTION_BACKENDS, "own", lambda: reference_attention):
        components = build(tmp_path, *overrides)
    assert ("cu_seq_lens" in next(components.train_loader.batches()).micro_batches[0]) == packed
    assert components.eval_loader is not None
    assert ("cu_seq_lens" in next(iter(components.eval_loader))) == packed
    assert components.task.fixed_shapes == (packed or not overrides)


MARKED_ANSWER = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
NO_END = "{% for m in messages %}{{ '' if loop.first else '\\n' }}{{ m.role }}: {{ m.content }}{% endfor %}"
IM_END = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "train_on", "warned"),
    [
        (IM_END, "assistant", True),
        (IM_END, "all", False),  # then the letters are trained too
        (IM_END.replace("<|im_end|>", "{{ eos_token }}"), "assistant", False),
        (IM_END.replace("{{ m.content }}<|im_end|>", MARKED_ANSWER), "assistant", False),
        (NO_END, "assistant", False),  # an end-of-text token closes the last answer, and is trained
    ],
    ids=("letters", "all is trained", "a token", "marks", "nothing"),
)
def test_answers_without_a_trained_end_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, train_on: str, warned: bool
) -> None:
    """A base model's tokenizer has no `<|im_end|>`: nothing would tell the model where to stop."""
    turns = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 20)
    chats = ("data.source=jsonl", f"data.path={tmp_path / 'chats.jsonl'}", "data.format=chat")
    shape = ("data.max_seq_len=64", "data.validation_fraction=0")
    with caplog.at_level(logging.WARNING, "truthgpt"):
        build(tmp_path, *chats, *shape, f"data.train_on={train_on}", f"data.chat_template={json.dumps(template)}")
    assert ("behind an answer, which is no token of the tokenizer" in caplog.text) == warned
    assert ("puts '<|im_end|>' behind" in caplog.text) == warned


def test_no_step_has_more_tokens_than_is_said(tmp_path: Path) -> None:
    """Of short samples a micro-batch holds more of `data.max_tokens` than of long ones."""
    (tmp_path / "short.jsonl").write_text(f"{json.dumps({'text': 'abcdef'})}\n" * 40)
    data = ("data.source=jsonl", f"data.path={tmp_path / 'short.jsonl'}", "data.max_seq_len=32")
    buckets = ("data.bucket_by_length=true", "data.bucket_bins=[8]", "data.max_tokens=60")
    components = build(tmp_path, *data, *buckets)
    with closing(components.train_loader.batches()) as batches:
        step = next(iter(batches))
    largest = max(batch["input_ids"].numel() for batch in step.micro_batches)
    assert largest == 56 > 32
    assert components.task.tokens_per_step == 60 * len(step.micro_batches)


def test_auto_pads_where_packing_fills_less(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Samples of more than half a row cannot share one."""
    rows = [{"text": f"{number:02} is a row of twenty-one"} for number in range(40)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = (*ROWS, f"data.path={tmp_path / 'long.jsonl'}")
    with caplog.at_level(logging.INFO):
        padded = build(tmp_path, *long)
    assert "cu_seq_lens" not in next(padded.train_loader.batches()).micro_batches[0]
    assert "rows are padded, not packed: padding fills 100%" in caplog.text
    packed = build(tmp_path, *long, "data.packing=true")
    assert "cu_seq_lens" in next(packed.train_loader.batches()).micro_batches[0]


@pytest.mark.parametrize("trained", [["data.dataset=FOLDER/set"], ["data.path=FOLDER/set/train.csv"]])
@pytest.mark.parametrize("split", ["train", "train[:50%]"])
def test_validation_files_beside_any_data_set(tmp_path: Path, trained: list[str], split: str) -> None:
    """They are no data set with splits of its own: all of them are read, whatever part is trained on."""
    (tmp_path / "set").mkdir()
    for name, rows in (("set/train.csv", 40), ("held_out_rows.csv", 8)):
        (tmp_path / name).write_text("text\n" + "".join(f"{name} {number}\n" for number in range(rows)))
    overrides = [*trained, f"data.split={split}", "data.validation_path=FOLDER/held_out_rows.csv", "data.packing=false"]
    given = [override.replace("FOLDER", str(tmp_path)) for override in [*overrides, "output_dir=FOLDER/runs"]]
    base = {**BASE, "data": {"source": "hf", "max_seq_len": 32, "num_workers": 0}}
    components = build_components(load_config(base, given))
    assert components.train_loader.state_dict(0)["samples"] == (40 if split == "train" else 20)
    assert components.eval_loader is not None
    assert sum(len(batch["labels"]) for batch in components.eval_loader) == 8
    with pytest.raises(DataError, match="0 usable validation rows of 8: 8 are longer"):
        build_components(load_config(base, [*given, "data.max_seq_len=16", "data.overlong=drop"]))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("mix_by", "overlong", "ratio"),
    [("documents", "drop", 1.0), ("tokens", "drop", 1.0), ("tokens", "truncate", (32 / 33) / (6 / 8))],
)
def test_a_mixture_is_shared_out_by_what_is_trained_on(
    tmp_path: Path, mix_by: str, overlong: str, ratio: float, packing: bool
) -> None:
    """Of the first source half the rows are dropped, or all are cut: 32 of its 33 tokens are then labels with an x, of
    the others' 8 are 6 with a y."""
    first = ["x" * 7, "x" * 99] if overlong == "drop" else ["x" * 99] * 2
    for name, texts in (("first", first * 20), ("second", ["y" * 7] * 40)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("first", "second")]
    data = {
        "sources": [{"source": "jsonl", "path": path, "weight": 1, "validation_path": paths[1]} for path in paths],
        **{"mix_by": mix_by, "overlong": overlong, "packing": packing, "max_seq_len": 32, "num_workers": 0},
    }
    components = build_components(load_config({**BASE, "data": data}, [f"output_dir={tmp_path / 'runs'}"]))
    labels: Counter[int] = Counter()
    with closing(components.train_loader.batches()) as batches:
        for batch in islice(batches, 100):
            labels.update(label for part in batch.micro_batches for label in part["labels"].flatten().tolist())
    x, y = byte_tokenizer()("xy").input_ids
    assert labels[x] / labels[y] == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_files_of_a_mixture_are_read_once(tmp_path: Path, streaming: bool) -> None:
    """By the first source without any of its own, which is the second; the last one cannot even read them."""
    rows = {
        "first": {"text": "1"},
        "own": {"text": "2"},
        "second": {"t": "3"},
        "shared": {"t": "4"},
        "last": {"u": "5"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in rows}
    sources = [
        {"source": "jsonl", "path": paths["first"], "validation_path": paths["own"], "weight": 1},
        {"source": "jsonl", "path": paths["second"], "text_field": "t", "weight": 1},
        {"source": "jsonl", "path": paths["last"], "text_field": "u", "weight": 1},
    ]
    data = {"sources": sources, "validation_path": paths["shared"], "streaming": streaming, "max_seq_len": 8}
    found = build_text_data(load_config({**BASE, "data": {**data, "num_workers": 0}}))
    held_out = [part.validation and [document.segments[0].text for document in part.validation] for part in found.parts]
    assert held_out == [["2"] * 40, ["4"] * 40, None]


def test_packing_a_model_that_cannot_keep_documents_apart_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    falcon = "model.config={model_type: falcon, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    with pytest.raises(ConfigError, match=r"data.packing: true, but FalconForCausalLM keeps transformers' own"):
        build(tmp_path, *ROWS, falcon, "data.packing=true")
    with caplog.at_level(logging.INFO):
        components = build(tmp_path, *ROWS, falcon)
    assert "rows are padded, not packed: FalconForCausalLM" in caplog.text
    assert [fallback["part"] for fallback in components.fallbacks.to_json()] == ["model.attention.backend"]


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    shape = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2"
    with pytest.raises(ConfigError, match=r"model: tokens of this BertLMHeadModel see those after them"):
        build(tmp_path, f"model.config={{model_type: bert, {shape}}}")
    build(tmp_path, f"model.config={{model_type: bert, is_decoder: true, {shape}}}")


def test_a_model_with_masks_of_its_own_keeps_transformers_attention(tmp_path: Path) -> None:
    llama4 = (
        "model.config={model_type: llama4_text, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 4, "
        "num_attention_heads: 2, num_key_value_heads: 2, head_dim: 16, attention_chunk_size: 8, num_local_experts: 2, "
        "intermediate_size_mlp: 32, num_experts_per_tok: 1, max_position_embeddings: 64}"
    )
    components = build(tmp_path, llama4)
    (fallback,) = components.fallbacks.to_json()
    assert "needs masks of its own" in fallback["reason"]
    assert components.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize(
    ("overrides", "by_onednn"),
    [
        ((), True),
        (("model.lora.enabled=true",), True),
        (("training.mixed_precision=bf16",), False),
        (("training.torch_compile=true",), False),
    ],
    ids=["float32", "adapters", "bf16", "compiled"],
)
def test_float32_on_a_cpu_is_multiplied_by_onednn_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], by_onednn: bool, compiles: bool
) -> None:
    monkeypatch.setattr(truthgpt.runtime.onednn, "is_faster", lambda: True)
    monkeypatch.setattr(truthgpt.runtime.precision, "has_native_bf16", lambda device: True)
    monkeypatch.setattr(truthgpt.build, "compile_layers", lambda *arguments: compiles)
    config = small_config(tmp_path, "data.validation_fraction=0.1", *overrides)
    components = build_components(config)
    layers = linear_layers(components.model)
    compiled = "training.torch_compile=true" in overrides
    by_onednn |= compiled and not compiles
    assert layers and {isinstance(layer, OneDnnLinear | OneDnnConv1D) for layer in layers} == {by_onednn}
    if compiled:
        return
    for layer in layers:
        layer.__class__ = torch.nn.Linear if isinstance(layer, torch.nn.Linear) else Conv1D
    build_evaluation(config, LoadedModel(components.model, components.tokenizer, tmp_path, run_directory=None))
    assert {isinstance(layer, OneDnnLinear | OneDnnConv1D) for layer in layers} == {by_onednn}
