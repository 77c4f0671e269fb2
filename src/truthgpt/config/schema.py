"""The YAML contract as pydantic models: every key, its type, default and meaning. Layer 1: no torch.

The docstring under a field is its documentation: the reference page and the comments of `llm_default.yaml` are
generated from it. Named components (`optimizer.type`, `data.source` ...) are typed here as a name with free options;
`validate_config` resolves them against the registries.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from truthgpt.config.data_section import DataConfig
from truthgpt.config.section import AutoBool, Component, Fraction, Label, LocalPath, NameList, Positive, Section


class TokenizerConfig(Section):
    """Which tokenizer the model reads and writes with."""

    type: Literal["auto", "byte", "bpe", "path"] = "auto"
    """`auto`: the model's own, or `byte` for a model from scratch; `byte`: one token a byte; `bpe`: byte-level BPE
    trained on the run's training split; `path`: a local tokenizer folder."""
    vocab_size: Annotated[int, Field(ge=257)] | None = None
    """Vocabulary size of a `bpe` tokenizer, at least 257 (256 bytes and the end-of-text token)."""
    path: LocalPath | None = None
    """Folder of a saved tokenizer, for `type: path`."""


class AttentionConfig(Section):
    """How attention is computed; further keys are the backend's own options."""

    model_config = ConfigDict(extra="allow")

    backend: str = "sdpa"
    """Attention backend."""
    verify: AutoBool = "auto"
    """Compare the backend with transformers' own attention on the model before the first step, in the run's precision.
    `auto`: the backends that come with this package; true: those of plugins too."""


class KVCacheConfig(Section):
    """Key-value cache for generation; further keys are the cache's own options."""

    model_config = ConfigDict(extra="allow")

    type: str = "none"
    """How samples keep the keys and values of tokens they have seen: `paged` in blocks; `none` not at all, which takes
    no memory from training and is slow for long samples."""
    block_size: Positive = 128
    """Tokens a block of a paged cache."""


class MemoryConfig(Section):
    """How a step is fitted into memory; further keys are the policy's own options."""

    model_config = ConfigDict(extra="allow")

    policy: str = "adaptive"
    """Memory policy. `adaptive` cuts a step into the micro-batches, and recomputes the layers, that are fastest of all
    that fit; the samples of a step stay. `static` takes exactly what the YAML gives."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021): small matrices beside the frozen layers of a causal_lm, made and saved
    by peft (extra `lora`). Tokens that the model lacks are trained with them."""

    enabled: bool = False
    """Train low-rank adapters instead of all weights. With `mixed_precision: bf16` the frozen model is held in bf16."""
    method: Literal["lora", "rslora", "dora"] = "lora"
    """`rslora` (Kalajdzievski 2023) scales by alpha / sqrt(r), for high ranks. `dora` (Liu et al. 2024) trains the
    length of every row of a weight apart from its direction: closer to full fine-tuning at low ranks, and slower."""
    r: Positive = 16
    """Rank of the adapters."""
    alpha: Positive = 32
    """Scale of the adapters; the update is multiplied by alpha / r."""
    dropout: Fraction = 0.05
    """Dropout on the adapters' input. Without it, layers that share an input share its product: faster on a GPU."""
    target_modules: NameList = ["all-linear"]
    """Layers to adapt: endings of module names such as `[q_proj, v_proj]`, or `all-linear`: all but the output head."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4` holds the linear layers of a pretrained frozen model in four bits (QLoRA, Dettmers et al. 2023; extra
    `qlora`), for a quarter of the memory that bf16 takes; every product is slower."""


class ModelConfig(Section):
    """Layer 1: the model."""

    task: Literal["causal_lm", "image_classification"] = "causal_lm"
    """What the model learns."""
    name_or_path: LocalPath | None = None
    """Hub id or local folder of a transformers model."""
    init: Literal["auto", "pretrained", "scratch"] = "auto"
    """`pretrained` loads the weights of `name_or_path`, `scratch` starts from random ones; `auto`: pretrained
    when `name_or_path` is set."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Configuration of a model from scratch as transformers names it: `{model_type: llama, hidden_size: 256, ...}`.
    With `name_or_path`, values that override the model's own."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Which tokenizer the model reads and writes with."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose code you have read."""
    gradient_checkpointing: AutoBool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more compute.
    `auto` leaves it to the memory policy."""
    attention: AttentionConfig = AttentionConfig()
    """How attention is computed."""
    kv_cache: KVCacheConfig = KVCacheConfig()
    """Key-value cache for generation."""
    memory: MemoryConfig = MemoryConfig()
    """How a step is fitted into memory."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""


class TrainingConfig(Section):
    """Layer 2: the loop."""

    epochs: Positive = 3
    """Passes over the training data. `max_steps` wins when both are set."""
    max_steps: Positive | None = None
    """Optimizer steps to train; null: derived from `epochs`."""
    max_tokens: Positive | None = None
    """Stop after the step that reaches this many trained tokens; null: no limit. The schedule is not shortened."""
    max_time_s: Annotated[float, Field(gt=0)] | None = None
    """Stop after the step that reaches this many seconds of training; null: no limit. The schedule is not shortened."""
    train_batch_size: Positive = 8
    """Samples a micro-batch (alias `batch_size`)."""
    eval_batch_size: Positive = 8
    """Samples a batch in evaluation."""
    grad_accum_steps: Positive = 2
    """Micro-batches an optimizer step. The loss is the mean over the supervised tokens of all of them."""
    learning_rate: Annotated[float, Field(gt=0)] = 5.0e-5
    """Peak learning rate (alias `lr`)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, on matrices only (not on biases, norms or embeddings)."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm above which gradients are scaled down; null: no clipping."""
    warmup_ratio: Fraction = 0.06
    """Share of all steps over which the learning rate rises linearly."""
    scheduler: Component = Component(type="cosine")
    """Learning-rate schedule after the warm-up."""
    mixed_precision: Literal["bf16", "fp16", "none"] = "bf16"
    """Compute precision. `fp16` scales the loss. Where the device lacks it, falls back and says so."""
    weights: Literal["float32", "bf16_master", "bf16_stochastic"] = "float32"
    """What the weights are kept in, with `mixed_precision: bf16`. `float32`: cast for every product. `bf16_master`:
    the model in bf16, which is faster, with a float32 copy in the optimizer. `bf16_stochastic`: bf16 alone, rounded at
    random, for a quarter less memory. The last two are for the optimizer adamw."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Multiply in float8 in the decoder layers, with `mixed_precision: bf16` (extra `torchao`): for wide layers. Scaled
    by a tensor's largest value, or by each row's, which is slower and closer to bf16."""
    early_stopping_patience: Positive | None = 2
    """Stop after this many evaluations in a row without a better `eval.select_best_by`; null: off."""
    allow_tf32: bool = True
    """Let float32 matrix products use TF32 on GPUs that have it."""
    torch_compile: AutoBool = "auto"
    """Compile each decoder layer with torch.compile; `auto`: on a GPU when the run is long enough to pay for it."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Mode of torch.compile."""
    fused_adamw: bool = True
    """Fused AdamW kernel; fusing is off when this or `optimizer.fused` is false."""
    detect_anomaly: bool = False
    """Find the operation that made a NaN in the backward pass; slow, for debugging."""
    save_safetensors: bool = True
    """Write the final weights as safetensors; false: as `pytorch_model.bin`."""
    callbacks: list[Component] = [Component(type="print")]
    """Callbacks, in the order they are called."""
    log_interval: Positive = 50
    """Steps between log lines."""
    eval_interval: Positive = 500
    """Steps between evaluations; the last step is always evaluated."""


class OptimizerConfig(Component):
    """Layer 2: the optimizer; further keys are its own options."""

    type: str = "adamw"
    """Optimizer."""
    fused: bool = True
    """Use the optimizer's fused kernel where it has one."""


class CheckpointConfig(Section):
    """Layer 4: checkpoints."""

    interval_steps: Positive = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Positive = 3
    """Checkpoints to keep by step; `best.pt` and `last.pt` are always kept."""


class EMAConfig(Section):
    """Layer 4: exponential moving average of the weights."""

    enabled: bool = True
    """Keep an average of the weights and use it for evaluation, `best.pt` and the final model."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Decay a step, with warm-up: min(decay, (1 + step) / (10 + step))."""
    on_cpu: bool = False
    """Keep the average in the host's memory: 4 bytes a weight less on a GPU, and a copy of all weights every step."""


class ResumeConfig(Section):
    """Layer 4: resuming; `--resume` on the command line wins."""

    enabled: bool = False
    """Go on from the newest valid checkpoint of the run directory; without any, start fresh and say so."""
    checkpoint_dir: LocalPath | None = None
    """Checkpoint file, or folder whose newest valid checkpoint is used, instead of the run directory's own."""


class EvalConfig(Section):
    """Layer 4: evaluation."""

    metrics: list[Component] = [Component(type="ppl")]
    """Metrics of the validation split; the loss is always computed."""
    select_best_by: str = "ppl"
    """Metric that decides `best.pt` and early stopping: `loss` or one of `metrics`."""


class LoggingConfig(Section):
    """Layer 4: labels and folder for trackers."""

    project: str = "truthgpt"
    """Project name for trackers."""
    run_name: Label | None = None
    """Run name for trackers; null: the top-level `run_name`."""
    dir: LocalPath = "runs"
    """Folder of tracker files."""


class HardwareConfig(Section):
    """Layer 4: the device."""

    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """Device to train on; `auto`: cuda, then mps, then cpu."""
    deterministic: bool = False
    """Only deterministic kernels: bit-for-bit repeatable on a GPU, and slower."""


class GuardsConfig(Section):
    """Layer 4: guards against non-finite training."""

    max_consecutive_skips: Positive = 10
    """Non-finite steps in a row, each skipped and counted, after which the run ends with exit code 5."""


class GenerateConfig(Section):
    """Layer 4: samples during training, after every evaluation."""

    prompts: list[str] = []
    """Prompts to continue; none: no samples."""
    max_new_tokens: Positive = 64
    """New tokens a sample."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature; 0: greedy."""


class Config(Section):
    """The whole configuration of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of everything random: initial weights, data order, dropout, samples."""
    run_name: Label = "llm_default"
    """Label of the run."""
    output_dir: LocalPath | None = None
    """Run directory; null: `runs/<run_name>`."""
    plugins: list[str] = []
    """Python modules whose components this YAML needs; imported only with `--allow-plugins`."""
    strict: bool = False
    """Turn every fallback (a missing optional part) into an error."""
    model: ModelConfig = ModelConfig()
    """Layer 1: the model."""
    training: TrainingConfig = TrainingConfig()
    """Layer 2: the loop."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Layer 2: the optimizer."""
    data: DataConfig = DataConfig()
    """Layer 3: the data."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Layer 4: checkpoints."""
    ema: EMAConfig = EMAConfig()
    """Layer 4: exponential moving average of the weights."""
    resume: ResumeConfig = ResumeConfig()
    """Layer 4: resuming."""
    eval: EvalConfig = EvalConfig()
    """Layer 4: evaluation."""
    logging: LoggingConfig = LoggingConfig()
    """Layer 4: labels and folder for trackers."""
    hardware: HardwareConfig = HardwareConfig()
    """Layer 4: the device."""
    guards: GuardsConfig = GuardsConfig()
    """Layer 4: guards against non-finite training."""
    generate: GenerateConfig = GenerateConfig()
    """Layer 4: samples during training."""

    @property
    def run_directory(self) -> str:
        """`output_dir`, or `runs/<run_name>` when it is not set."""
        return self.output_dir or f"runs/{self.run_name}"

    @property
    def tracker_run_name(self) -> str:
        """`logging.run_name`, or `run_name` when it is not set."""
        return self.logging.run_name or self.run_name
