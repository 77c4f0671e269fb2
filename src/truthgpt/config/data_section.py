"""Layer 3 of the YAML: where the data comes from, how rows become samples, and samples batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from truthgpt.config.section import AutoBool, Component, Count, Fraction, PathList, Positive, Section

Format = Literal["text", "prompt_completion", "chat"]
TrainOn = Literal["all", "completion", "assistant"]


class MixedSource(Section):
    """One source of a mixture. What is not set here is taken from the same key of `data`; further keys are the
    source's own options."""

    model_config = ConfigDict(extra="allow")

    source: str
    """Where the documents come from."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source, relative to the others; null for all of them: every sample once an epoch."""
    path: PathList | None = None
    """File, folder or glob, or a list of them."""
    dataset: str | None = None
    """Name of a hub dataset, or a local folder of one."""
    subset: str | None = None
    """Configuration of the hub dataset."""
    split: str | None = None
    """Split of the dataset to train on."""
    validation_path: PathList | None = None
    """File, folder or glob of the validation documents of this source."""
    validation_split: str | None = None
    """Split of the dataset to validate on."""
    format: Format | None = None
    """What a row holds."""
    text_field: str | None = None
    """Field of a row that holds its text."""
    prompt_field: str | None = None
    """Field of a row that holds the prompt."""
    completion_field: str | None = None
    """Field of a row that holds the completion."""
    messages_field: str | None = None
    """Field of a row that holds the chat messages."""
    train_on: TrainOn | None = None
    """Which tokens the loss counts."""


class DataConfig(Section):
    """Layer 3: the data."""

    source: Component = Component(type="python_stdlib")
    """Where the documents come from."""
    sources: list[MixedSource] = []
    """Several sources mixed, each `{source: name, weight: 2, path: ...}`; used instead of `source`."""
    mix_by: Literal["documents", "tokens"] = "documents"
    """What the weights of `sources` share out: documents, or tokens."""
    dataset: str | None = None
    """Name of a hub dataset, or a local folder of one, for sources that read one."""
    subset: str | None = None
    """Configuration of the hub dataset."""
    split: str | None = None
    """Split of the dataset to train on; null: `train`."""
    path: PathList | None = None
    """File, folder or glob, or a list of them."""
    validation_path: PathList | None = None
    """File, folder or glob of the validation documents; null: `validation_fraction` of the training
    documents is held out."""
    validation_split: str | None = None
    """Split of the dataset to validate on; null: `validation_fraction` of the training documents is held out."""
    validation_fraction: Fraction = 0.05
    """Share of the documents held out for validation, chosen by a hash of each document; 0: no validation."""
    format: Format = "text"
    """What a row holds: one text, a prompt and its completion, or a list of chat messages."""
    text_field: str = "text"
    """Field of a row that holds its text."""
    prompt_field: str = "prompt"
    """Field of a row that holds the prompt, for `format: prompt_completion`."""
    completion_field: str = "completion"
    """Field of a row that holds the completion, for `format: prompt_completion`."""
    messages_field: str = "messages"
    """Field of a row that holds the list of `{role, content}` messages, for `format: chat`."""
    image_field: str = "image"
    """Field of a row that holds the image, for `model.task: image_classification`."""
    label_field: str = "label"
    """Field of a row that holds the class of the image."""
    chat_template: str | None = None
    """Jinja template of a chat, or a file ending in `.jinja` that holds it; null: the tokenizer's own."""
    train_on: TrainOn = "all"
    """Which tokens the loss counts: all, the completion's only (`format: prompt_completion`), or the assistant's turns
    only (`format: chat`)."""
    overlong: Literal["truncate", "split", "drop", "error"] = "truncate"
    """What happens to a row longer than `max_seq_len`; always counted and reported.
    Plain text files are cut into blocks and never too long."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row ends the run, or is skipped, counted and reported."""
    max_bad_fraction: Fraction = 0.01
    """With `on_bad_row: skip`, the share of bad rows above which the run ends all the same."""
    streaming: bool = False
    """Read and tokenise the data while training instead of before; needs `training.max_steps`."""
    shuffle_window: Positive = 2048
    """With `streaming`, documents that are shuffled and packed among themselves; the shards are shuffled too."""
    collate: Component = Component(type="lm")
    """How samples become a batch."""
    max_seq_len: Annotated[int, Field(ge=2)] = 512
    """Tokens a sample at most."""
    packing: AutoBool = "auto"
    """Fill each row of `max_seq_len` tokens with several documents that do not see each other, instead of padding.
    `auto`: for rows, when collator, attention and model can keep documents apart and padding does not fill rows
    better; plain text stays joined into blocks."""
    bucket_by_length: bool = False
    """Batch rows of like length together, padded to the next of `bucket_bins`."""
    bucket_bins: Annotated[list[Positive], Field(min_length=1)] = [64, 128, 256, 512]
    """Lengths that batches are padded to, with `bucket_by_length`; `max_seq_len` is always the last."""
    max_tokens: Positive | None = None
    """Tokens a micro-batch at most, padding counted: as many rows as fit, instead of `training.train_batch_size`;
    null: no budget."""
    num_workers: Count = 4
    """Loader processes; capped at the number of cores."""
    prefetch_factor: Positive = 2
    """Batches each loader process prepares ahead."""
    persistent_workers: bool = True
    """Keep the validation loader's processes alive between evaluations."""
