"""Names that people bring with them: of Hugging Face's Trainer (HF), DeepSpeed's config (DS),
axolotl (AX), torchtune (TT), TRL, Lightning (PL) and accelerate (AC). Each leads to ours, with the
conversion where the unit or the meaning differs. Nothing is translated in silence: a recipe has one
word for one thing."""

from __future__ import annotations

BATCH = "global_batch counts over all ranks: per device x devices x accumulation"
HALF = "parameters and perturbation vanish in fp16: use model.dtype=bfloat16, masters stay fp32"
LAUNCHED = "the launcher says it: torchrun --nproc_per_node N, deepspeed --num_gpus N, srun"
OFFLOAD = "engine={name: zero, config: zero2_offload.json}"
LORA = "model.lora={r: 16, alpha: 32, targets: [q_proj, v_proj]}, or {} for the defaults"

ALIASES: dict[str, tuple[str, str]] = {  # theirs -> our key, and what to mind
    # the optimizer
    "learning_rate": ("optimizer.lr", ""),  # HF, AX, TRL
    "lr_scheduler_type": ("schedule.name", "constant, linear, polynomial or cosine"),  # HF
    "lr_scheduler": ("schedule.name", "constant, linear, polynomial or cosine"),  # AX, TT
    "scheduler": ("schedule", ""),  # DS
    "lr_scheduler_kwargs": ("schedule.power and schedule.end_lr", ""),  # HF
    "warmup_steps": ("schedule.warmup_steps", ""),  # HF, AX
    "num_warmup_steps": ("schedule.warmup_steps", ""),  # TT
    "warmup_num_steps": ("schedule.warmup_steps", ""),  # DS
    "warmup_ratio": ("schedule.warmup_steps", "in steps: warmup_ratio x train.steps"),  # HF, AX
    "cosine_min_lr_ratio": ("schedule.end_lr", "a rate: ratio x optimizer.lr"),  # AX
    "optim": ("optimizer.name", "sgd, adam or adamw"),  # HF
    "warmup": ("schedule.warmup_steps", "steps"),  # nanoGPT and its kind
    "min_lr": ("schedule.end_lr", "a rate"),
    "beta1": ("optimizer.betas", "both: [beta1, beta2]"),
    "beta2": ("optimizer.betas", "both: [beta1, beta2]"),
    "epsilon": ("optimizer.eps", ""),
    "adam_beta1": ("optimizer.betas", "both: [beta1, beta2]"),  # HF, AX
    "adam_beta2": ("optimizer.betas", "both: [beta1, beta2]"),  # HF, AX
    "adam_epsilon": ("optimizer.eps", ""),  # HF, AX
    "weight_decay": ("optimizer.weight_decay", ""),  # HF
    "max_grad_norm": ("train.clip_norm", "null: none, which is the default"),  # HF, TRL
    "gradient_clipping": ("train.clip_norm", "null: none, which is the default"),  # DS, AX
    "gradient_clip_val": ("train.clip_norm", "null: none, which is the default"),  # PL
    "clip_grad_norm": ("train.clip_norm", "null: none, which is the default"),  # TT
    # how much
    "per_device_train_batch_size": ("train.micro_batch", BATCH),  # HF, TRL
    "per_gpu_train_batch_size": ("train.micro_batch", BATCH),  # HF of old
    "train_micro_batch_size_per_gpu": ("train.micro_batch", BATCH),  # DS
    "micro_batch_size": ("train.micro_batch", BATCH),  # AX
    "batch_size": ("train.micro_batch", BATCH),  # TT
    "gradient_accumulation_steps": ("train.global_batch", BATCH),  # HF, DS, AX, TT
    "accumulate_grad_batches": ("train.global_batch", BATCH),  # PL
    "train_batch_size": ("train.global_batch", ""),  # DS
    "per_device_eval_batch_size": ("eval.batch", ""),  # HF
    "eval_batch_size": ("eval.batch", ""),  # AX
    "num_train_epochs": ("train.epochs", ""),  # HF, TRL
    "num_epochs": ("train.epochs", ""),  # AX
    "max_epochs": ("train.epochs", ""),  # PL
    "max_steps": ("train.steps", "optimizer steps"),  # HF, AX
    "max_steps_per_epoch": ("train.steps", "of the whole run"),  # TT
    "label_smoothing_factor": ("", "the loss is the model's cross-entropy, without smoothing"),
    "random_seed": ("train.seed", ""),
    "data_seed": ("train.seed", ""),  # HF
    # the model
    "model_name_or_path": ("model.path", ""),  # HF, TRL
    "base_model": ("model.path", ""),  # AX
    "checkpointer": ("model.path", ""),  # TT
    "model_revision": ("model.revision", ""),  # TRL
    "torch_dtype": ("model.dtype", "float32 or bfloat16"),  # HF
    "bf16": ("model.dtype", "model.dtype=bfloat16; masters stay fp32"),  # HF, DS, AX
    "bf16_full_eval": ("model.dtype", "model.dtype=bfloat16, for training too"),  # HF
    "mixed_precision": ("model.dtype", "model.dtype=bfloat16; masters stay fp32"),  # AC
    "precision": ("model.dtype", "model.dtype=bfloat16; masters stay fp32"),  # PL
    "fp16": ("model.dtype", HALF),  # HF, DS, AX
    "tf32": ("", "torch's own setting is taken; model.dtype says float32 or bfloat16"),  # HF
    "gradient_checkpointing": ("model.activation_checkpointing", ""),  # HF, AX, TRL
    "enable_activation_checkpointing": ("model.activation_checkpointing", ""),  # TT
    "attn_implementation": ("model.attention", "sdpa, eager or flash_attention_2"),  # HF
    "use_flash_attention_2": ("model.attention", "model.attention=flash_attention_2"),  # HF
    "flash_attention": ("model.attention", "model.attention=flash_attention_2"),  # AX
    "torch_compile": ("model.compile", ""),  # HF, AX
    "use_liger_kernel": ("model.logits", "chunks, the default, never holds all of them"),  # HF
    "load_in_8bit": ("", "quantised weights lose the perturbation: model.dtype=bfloat16"),  # HF
    "load_in_4bit": ("", "quantised weights lose the perturbation: model.dtype=bfloat16"),  # HF
    "lora_r": ("model.lora.r", ""),  # AX, TRL
    "lora_rank": ("model.lora.r", ""),  # TT
    "lora_alpha": ("model.lora.alpha", ""),  # AX, TT, TRL
    "lora_dropout": ("model.lora.dropout", ""),  # AX, TT, TRL
    "lora_target_modules": ("model.lora.targets", "null: every linear layer"),  # AX, TRL
    "target_modules": ("model.lora.targets", "null: every linear layer"),  # peft
    "lora_target_linear": ("model.lora.targets", "null, the default: every linear layer"),  # AX
    "lora_attn_modules": ("model.lora.targets", "names as in the model: q_proj, v_proj"),  # TT
    "use_dora": ("model.lora.dora", ""),  # TT, TRL
    "adapter": ("model.lora", LORA),  # AX
    "use_peft": ("model.lora", LORA),  # TRL
    "peft_config": ("model.lora", LORA),  # TRL
    # the data
    "dataset_name": ("task.data", ""),  # TRL
    "datasets": ("task.data", "one name or folder"),  # AX
    "dataset": ("task.data", "one name or folder"),  # TT
    "train_file": ("task.data", "a folder that holds train.* (docs/data.md)"),  # HF
    "validation_file": ("task.data", "a folder that holds valid.* too (docs/data.md)"),  # HF
    "test_file": ("task.data", "a folder that holds test.* too (docs/data.md)"),  # HF
    "data_path": ("task.data", "a file or folder"),
    "data_dir": ("task.data", "a file or folder"),
    "dataloader_num_workers": ("", "batches are read ahead in the background: nothing to set"),
    "sample_packing": ("task.packing", "of instruction; text always fills its blocks"),  # AX
    "train_on_inputs": ("", "instruction counts the answers' tokens alone"),  # AX, TT
    "assistant_only_loss": ("", "instruction counts the answers' tokens alone"),  # TRL
    "model_max_length": ("task.seq_len", "tokens"),
    "max_seq_length": ("task.seq_len", "tokens"),  # TRL
    "max_length": ("task.seq_len", "tokens"),  # TRL
    "sequence_len": ("task.seq_len", "tokens"),  # AX
    "max_seq_len": ("task.seq_len", "tokens"),  # TT
    "block_size": ("task.seq_len", "tokens"),  # HF
    "tokenizer_name": ("task.tokenizer", ""),  # HF
    "dataset_text_field": ("task.column", ""),  # TRL
    "val_set_size": ("task.held_out", "a share"),  # AX
    "validation_split_percentage": ("task.held_out", "a share: percentage / 100"),  # HF
    "buffer_size": ("task.streaming.buffer", "rows of seq_len, in memory on each rank"),
    "shuffle_buffer_size": ("task.streaming.buffer", "rows of seq_len, in memory on each rank"),
    "pretraining_dataset": ("task.data", "and task.streaming={buffer: 10000}"),  # AX
    # where it runs
    "deepspeed": ("engine.config", "engine={name: zero, config: zero3.json}"),  # HF, AX
    "zero_optimization": ("engine.config", "engine={name: zero, config: zero3.json}"),  # DS
    "zero_stage": ("engine.config", "engine={name: zero, config: zero3.json}"),  # AC
    "offload_optimizer": ("engine.config", OFFLOAD),  # DS
    "offload_param": ("engine.config", "engine={name: zero, config: zero3_offload.json}"),  # DS
    "cpu_offload": ("engine.config", OFFLOAD),
    "strategy": ("engine.name", "auto, replicated, fsdp2 or zero"),  # PL
    "devices": ("", LAUNCHED),  # PL
    "num_nodes": ("", LAUNCHED),  # PL
    "num_processes": ("", LAUNCHED),  # AC
    "nproc_per_node": ("", LAUNCHED),
    "fsdp": ("engine.name", "engine=fsdp2"),  # HF, AX
    "fsdp_config": ("engine.config", "engine={name: fsdp2, config: shard.yaml}"),  # HF, AX
    # what it leaves
    "output_dir": ("run_dir", "the run's folder"),  # HF, AX, TT, TRL
    "logging_dir": ("run_dir", "the run's folder"),  # HF
    "log_interval": ("train.log_every", "steps"),
    "logging_steps": ("train.log_every", "steps"),  # HF
    "log_every_n_steps": ("train.log_every", "steps"),  # TT
    "steps_per_print": ("train.log_every", "steps"),  # DS
    "save_steps": ("checkpoint.every_steps", "steps; checkpoint.every_minutes too"),  # HF, AX
    "save_strategy": ("checkpoint.every_steps", "steps; checkpoint.every_minutes too"),  # HF
    "save_interval": ("checkpoint.every_steps", "steps; checkpoint.every_minutes too"),
    "save_total_limit": ("checkpoint.keep", ""),  # HF, AX
    "eval_steps": ("eval.every_steps", "steps"),  # HF
    "eval_strategy": ("eval.every_steps", "steps; null: no validation runs"),  # HF
    "evaluation_strategy": ("eval.every_steps", "steps; null: no validation runs"),  # HF of old
    "eval_interval": ("eval.every_steps", "steps"),
    "eval_on_start": ("eval.initial", ""),  # HF
    "max_new_tokens": ("eval.generate.max_tokens", ""),
    "evals_per_epoch": ("eval.every_steps", "in steps"),  # AX
    "load_best_model_at_end": ("eval.select", "eval.select=best"),  # HF
    "metric_for_best_model": ("eval.key", "validation_loss or validation/DOMAIN/METRIC"),  # HF
    "greater_is_better": ("", "eval.key says it: accuracies are to rise, all else to fall"),  # HF
    "early_stopping_patience": ("train.early_stopping.patience", "validation runs"),  # HF, AX
    "early_stopping_threshold": ("train.early_stopping.min_delta", ""),  # HF
    "report_to": ("tracking.enabled", "MLflow: tracking.enabled, tracking.uri"),  # HF
    "wandb_project": ("tracking.experiment", "MLflow is what is written to"),  # AX
    "push_to_hub": ("", "a command afterwards: tram export RUN --out FOLDER --push OWNER/NAME"),
    "hub_model_id": ("", "a command afterwards: tram export RUN --out FOLDER --push OWNER/NAME"),
    "run_name": ("name", ""),  # HF
    "mlflow_experiment_name": ("tracking.experiment", ""),  # AX
    "mlflow_tracking_uri": ("tracking.uri", ""),  # AX
    "resume_from_checkpoint": ("", "a flag of the command line: --resume"),  # HF, AX, TT
    "overwrite_output_dir": ("", "a flag of the command line: --overwrite"),  # HF
    # the method
    "rho": ("algorithm.rho", ""),
    "sam_rho": ("algorithm.rho", ""),
    "adaptive": ("algorithm.name", "algorithm=asam"),  # SAM's reference code
    "ema_decay": ("algorithm.decay", "of mesa and asam_mesa"),
}

VALUES: dict[str, dict[str, str]] = {  # our key -> their value -> ours, or why not
    "model.dtype": {"bf16": "bfloat16", "fp32": "float32", "fp16": HALF, "float16": HALF},
    "task.name": {
        "causal_lm": "language_modeling",
        "clm": "language_modeling",
        "text-generation": "language_modeling",
        "sft": "instruction",
        "chat": "instruction",
        "sequence_classification": "entailment",
        "text-classification": "entailment",
        "nli": "entailment",
        "image-classification": "image_classification",
    },
    "engine.name": {
        "deepspeed": "zero",
        "fsdp": "fsdp2",
        "ddp": "replicated",
        "single": "replicated",
    },
    "optimizer.name": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "fusedadam": "adamw",
    },
    "schedule.name": {
        "constant_with_warmup": "constant, with schedule.warmup_steps",
        "warmuplr": "constant, with schedule.warmup_steps",
        "warmupdecaylr": "linear, with schedule.warmup_steps",
    },
    "model.attention": {"flash": "flash_attention_2", "xformers": "sdpa"},
}


def key(theirs: str) -> str | None:
    """What somebody else's key is here, in one clause; None for a name that is nobody's."""
    found = ALIASES.get(theirs.lower().replace("-", "_"))
    if found is None:
        return None
    ours, more = found
    if not ours:
        return more
    return f"here it is {ours}" + (f" ({more})" if more else "")


def refusals() -> dict[str, str]:
    """Their key -> the text it is refused with."""
    return {theirs: f"unknown key '{theirs}'; {key(theirs)}" for theirs in ALIASES}


def table() -> str:
    """Markdown: yours -> ours."""
    rows = [f"| `{name}` | {_code(ours)} | {more} |" for name, (ours, more) in ALIASES.items()]
    for ours, values in VALUES.items():
        rows += [f"| `{ours}: {name}` | | {text} |" for name, text in values.items()]
    return "\n".join(["| yours | ours | mind |", "|---|---|---|", *rows]) + "\n"


def _code(ours: str) -> str:
    return " and ".join(f"`{part}`" for part in ours.split(" and ")) if ours else ""
