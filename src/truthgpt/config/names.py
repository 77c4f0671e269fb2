"""Names around the schema: where components stand, second names of keys, and what other trainers call them."""

from __future__ import annotations

BARE_NAME_SLOTS: tuple[tuple[str, ...], ...] = (
    ("optimizer",),
    ("training", "scheduler"),
    ("data", "source"),
    ("data", "collate"),
)
"""Where a component's bare name stands for `{type: name}`."""

COMPONENT_SLOTS: dict[tuple[str, ...], tuple[str, str]] = {
    ("model", "attention"): ("ATTENTION_BACKENDS", "backend"),
    ("model", "kv_cache"): ("KV_CACHES", "type"),
    ("model", "memory"): ("MEMORY_POLICIES", "policy"),
    ("optimizer",): ("OPTIMIZERS", "type"),
    ("training", "scheduler"): ("SCHEDULERS", "type"),
    ("data", "source"): ("DATASETS", "type"),
    ("data", "sources"): ("DATASETS", "source"),
    ("data", "collate"): ("COLLATORS", "type"),
    ("training", "callbacks"): ("CALLBACKS", "type"),
    ("eval", "metrics"): ("METRICS", "type"),
}
"""Where a component is named: its registry, and the key that holds the name. Callbacks, metrics and
`data.sources` are lists."""

LIST_SLOTS: tuple[tuple[str, ...], ...] = (("training", "callbacks"), ("eval", "metrics"), ("data", "sources"))
"""The slots that hold a list of components."""

ALIASES: dict[str, str] = {
    "training.batch_size": "training.train_batch_size",
    "training.lr": "training.learning_rate",
}
"""Second names of keys, accepted and rewritten on loading."""

FOREIGN_VALUES: dict[str, str] = {
    "alpaca": "prompt_completion",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "none",
    "fp32": "none",
    "gpu": "cuda",
    "sharegpt": "chat",
}
"""What other trainers call a choice that is called otherwise here."""

FOREIGN_NAMES: dict[str, str] = {
    "accumulate_grad_batches": "training.grad_accum_steps",
    "adam_beta1": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "adapter": "model.lora.enabled",
    "assistant_only_loss": "data.train_on",
    "attn_implementation": "model.attention.backend",
    "base_model": "model.name_or_path",
    "bf16": "training.mixed_precision",
    "completion_only_loss": "data.train_on",
    "cutoff_len": "data.max_seq_len",
    "dataloader_num_workers": "data.num_workers",
    "dataset_name": "data.dataset",
    "dataset_text_field": "data.text_field",
    "eval_steps": "training.eval_interval",
    "finetuning_type": "model.lora.enabled",
    "flash_attention": "model.attention.backend",
    "flash_attn": "model.attention.backend",
    "fp16": "training.mixed_precision",
    "gradient_accumulation_iters": "training.grad_accum_steps",
    "gradient_accumulation_steps": "training.grad_accum_steps",
    "gradient_clipping": "training.max_grad_norm",
    "group_by_length": "data.bucket_by_length",
    "load_in_4bit": "model.lora.quantization",
    "logging_dir": "logging.dir",
    "logging_steps": "training.log_interval",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_target": "model.lora.target_modules",
    "lora_target_modules": "model.lora.target_modules",
    "lr_scheduler": "training.scheduler",
    "lr_scheduler_type": "training.scheduler",
    "max_length": "data.max_seq_len",
    "max_seq_length": "data.max_seq_len",
    "metric_for_best_model": "eval.select_best_by",
    "micro_batch_size": "training.train_batch_size",
    "model_name_or_path": "model.name_or_path",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "optim": "optimizer.type",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "per_device_train_batch_size": "training.train_batch_size",
    "report_to": "training.callbacks",
    "resume_from_checkpoint": "resume.enabled",
    "sample_packing": "data.packing",
    "save_steps": "checkpoint.interval_steps",
    "save_total_limit": "checkpoint.keep_last",
    "sequence_len": "data.max_seq_len",
    "tf32": "training.allow_tf32",
    "train_file": "data.path",
    "train_on_inputs": "data.train_on",
    "use_dora": "model.lora.method",
    "use_rslora": "model.lora.method",
    "val_set_size": "data.validation_fraction",
    "val_size": "data.validation_fraction",
    "validation_file": "data.validation_path",
    "wandb_project": "logging.project",
    "warmup_steps": "training.warmup_ratio",
}
"""Keys of other trainers, and the key that means the same here."""
