"""What other programs call our keys, options and values: tables that `suggestions` reads."""

from __future__ import annotations

KEYS: dict[str, str] = {
    **dict.fromkeys(("learning_rate", "peak_lr", "max_lr", "base_lr", "lr"), "optimizer.lr"),
    **dict.fromkeys(("wd", "decay_rate"), "optimizer.weight_decay"),
    **dict.fromkeys(("beta", "beta1", "mu"), "optimizer.momentum"),
    **dict.fromkeys(("adam_eps", "adam_epsilon", "epsilon"), "optimizer.eps"),
    **dict.fromkeys(("optim", "opt", "optimizer_name", "optimizer_type", "algorithm"), "optimizer"),
    **dict.fromkeys(
        (
            "max_steps",
            "num_steps",
            "n_steps",
            "train_steps",
            "training_steps",
            "total_steps",
            "num_train_steps",
        ),
        "steps",
    ),
    **dict.fromkeys(("iterations", "iters", "max_iters", "num_iterations", "updates", "step"), "steps"),
    **dict.fromkeys(
        ("train_batch_size", "global_batch_size", "total_batch_size", "batch", "bs", "gbs"), "batch_size"
    ),
    **dict.fromkeys(
        (
            "micro_batch",
            "microbatch_size",
            "micro_bsz",
            "mbs",
            "per_device_train_batch_size",
            "device_batch_size",
        ),
        "micro_batch_size",
    ),
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "per_device_batch_size"), "micro_batch_size"),
    **dict.fromkeys(
        ("sequence_length", "seq_length", "max_seq_len", "max_seq_length", "max_length", "context_length"),
        "seq_len",
    ),
    **dict.fromkeys(("block_size", "context", "ctx_len", "context_size", "seqlen", "n_ctx"), "seq_len"),
    **dict.fromkeys(
        (
            "num_processes",
            "nproc",
            "nproc_per_node",
            "gpus",
            "num_gpus",
            "n_gpus",
            "ngpus",
            "devices",
            "ranks",
        ),
        "world_size",
    ),
    **dict.fromkeys(
        ("dtype", "torch_dtype", "mixed_precision", "amp_dtype", "compute_dtype", "param_dtype"), "precision"
    ),
    **dict.fromkeys(
        (
            "grad_clip",
            "clip_grad",
            "gradient_clipping",
            "gradient_clip_val",
            "clip",
            "max_norm",
            "clip_grad_norm",
        ),
        "max_grad_norm",
    ),
    **dict.fromkeys(("random_seed", "manual_seed", "rng_seed"), "seed"),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "num_warmup_steps", "warmup_iters"), "schedule.warmup"),
    **dict.fromkeys(("decay_steps", "decay_ratio", "cooldown"), "schedule.decay"),
    **dict.fromkeys(("min_lr", "end_lr", "final_lr", "lr_min"), "schedule.min_lr_ratio"),
    **dict.fromkeys(
        ("scheduler", "lr_scheduler", "lr_schedule", "lr_scheduler_type", "lr_decay_style", "scheduler_type"),
        "schedule",
    ),
    **dict.fromkeys(("model_name", "arch", "architecture", "network", "model_size"), "model"),
    **dict.fromkeys(
        (
            "model_name_or_path",
            "model_path",
            "pretrained",
            "pretrained_model",
            "init_from",
            "base_model",
            "weights",
        ),
        "model.path",
    ),
    **dict.fromkeys(
        (
            "gradient_checkpointing",
            "activation_checkpoint",
            "grad_checkpointing",
            "recompute",
            "checkpoint_activations",
        ),
        "model.activation_checkpointing",
    ),
    **dict.fromkeys(("torch_compile", "use_compile"), "model.compile"),
    **dict.fromkeys(("attn_implementation", "attn_impl", "attn", "flash_attention"), "model.attention"),
    **dict.fromkeys(("hidden", "dim", "d_model", "width", "embed_dim", "n_embd"), "model.config.hidden_size"),
    **dict.fromkeys(
        ("layers", "num_layers", "n_layers", "n_layer", "depth", "num_hidden_layers"),
        "model.config.num_hidden_layers",
    ),
    **dict.fromkeys(("heads", "num_heads", "n_heads", "n_head"), "model.config.num_attention_heads"),
    **dict.fromkeys(("ffn_dim", "d_ff", "mlp_dim", "ffn_hidden_size"), "model.config.intermediate_size"),
    **dict.fromkeys(("dataset_name", "dataset_path", "hf_dataset"), "data.dataset"),
    **dict.fromkeys(
        ("train_file", "train_files", "data_path", "data_files", "data_dir", "path", "file"), "data.files"
    ),
    **dict.fromkeys(("tokenizer_name", "tokenizer_path", "tokenizer_name_or_path"), "data.tokenizer"),
    **dict.fromkeys(("text_column", "text_field", "column", "text_key", "content_field"), "data.field"),
    **dict.fromkeys(
        ("eval_every", "eval_steps", "eval_interval", "eval_freq", "val_check_interval"), "eval.every"
    ),
    **dict.fromkeys(
        (
            "save_every",
            "save_steps",
            "save_interval",
            "checkpoint_interval",
            "ckpt_every",
            "checkpoint_every",
        ),
        "checkpoint.every",
    ),
    **dict.fromkeys(("save_total_limit", "keep_checkpoints", "max_checkpoints"), "checkpoint.keep"),
    **dict.fromkeys(("logging_steps", "log_interval", "log_freq", "log_steps", "print_every"), "log_every"),
    **dict.fromkeys(
        ("output_dir", "out_dir", "save_dir", "log_dir", "logdir", "work_dir", "results_dir"), "runs_dir"
    ),
    **dict.fromkeys(("run_name", "exp_name", "job_name", "run_id", "run"), "name"),
    **dict.fromkeys(("run_group", "experiment_group"), "group"),
    **dict.fromkeys(("wandb_project", "project", "project_name"), "wandb.project"),
    **dict.fromkeys(("wandb_entity", "team"), "wandb.entity"),
    **dict.fromkeys(("report_to", "wandb_mode", "logger", "use_wandb"), "wandb.mode"),
    **dict.fromkeys(
        ("strategy", "parallelism", "distributed", "distributed_type", "distributed_backend"), "engine"
    ),
    **dict.fromkeys(("deepspeed", "deepspeed_config", "ds_config"), "engine.config_file"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from", "load_checkpoint", "auto_resume"), "resume"),
    **dict.fromkeys(("force", "overwrite_output_dir"), "overwrite"),
    **dict.fromkeys(("max_time", "walltime", "timeout"), "time_limit"),
    **dict.fromkeys(("exp", "recipe", "preset"), "experiment"),
}
"""Word of other programs (the last part of a key) → key here."""

SWITCHES: dict[str, str] = {
    "bf16": "precision=bf16",
    "fp16": "precision=fp16",
    "fp32": "precision=fp32",
    "amp": "precision=bf16",
    "ddp": "engine=ddp",
    "fsdp": "engine=fsdp2",
    "fsdp2": "engine=fsdp2",
    "hsdp": "engine=hsdp",
    "no_wandb": "wandb.mode=disabled",
    "cosine": "schedule=cosine",
}
"""Words that are on or off elsewhere → what to type here."""

COUNTED: dict[str, str] = {
    **dict.fromkeys(
        ("epochs", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs", "train_epochs"),
        "steps=… (an epoch has training tokens / (batch_size × seq_len) steps; the log of a run names its tokens)",
    ),
    **dict.fromkeys(
        (
            "gradient_accumulation_steps",
            "grad_accum",
            "accumulation",
            "accumulate_grad_batches",
            "grad_accum_steps",
        ),
        "micro_batch_size=… (batch_size / world_size / the micro-batches that a step accumulates)",
    ),
    **dict.fromkeys(
        ("train_tokens", "total_tokens", "num_tokens", "token_budget", "max_train_tokens"),
        "steps=… (tokens / (batch_size × seq_len))",
    ),
}
"""Quantities that follow from others here → how."""

OPTIONS: dict[str, dict[str, str]] = {
    "optimizer": {
        **dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "fused_adamw", "adam_w"), "adamw"),
        "sgd": "torch.optim.SGD",
        "rmsprop": "torch.optim.RMSprop",
        "adagrad": "torch.optim.Adagrad",
        "adafactor": "torch.optim.Adafactor",
        "nadam": "torch.optim.NAdam",
        "lbfgs": "torch.optim.LBFGS",
        **dict.fromkeys(("muon_ns5", "muon_ns"), "muon"),
        **dict.fromkeys(("moonlight", "moonshot"), "muon_moonlight"),
        **dict.fromkeys(("galore_adamw", "galore_adam"), "galore"),
    },
    "engine": {
        **dict.fromkeys(("fsdp", "fsdp1", "fully_shard", "full_shard", "sharded"), "fsdp2"),
        **dict.fromkeys(("hybrid", "hybrid_shard"), "hsdp"),
        **dict.fromkeys(
            ("dp", "data_parallel", "dataparallel", "distributed", "multi_gpu", "nccl", "gloo"), "ddp"
        ),
        **dict.fromkeys(("none", "no", "cpu", "gpu", "cuda", "local", "null"), "single"),
        **dict.fromkeys(("deepspeed", "zero", "ds"), "zero2"),
        **{
            f"{prefix}{stage}": f"zero{stage}"
            for prefix in ("zero_", "zero-", "stage", "stage_", "deepspeed_stage_", "z")
            for stage in range(4)
        },
    },
    "schedule": {
        **dict.fromkeys(("cos", "cosine_annealing", "cosine_with_warmup", "cosine_decay"), "cosine"),
        **dict.fromkeys(("const", "none", "no", "flat", "fixed", "constant_with_warmup", "null"), "constant"),
        **dict.fromkeys(("linear", "trapezoid", "trapezoidal", "warmup_stable_decay", "linear_decay"), "wsd"),
    },
    "data": {
        **dict.fromkeys(("json", "jsonlines", "ndjson"), "jsonl"),
        **dict.fromkeys(("txt", "plain", "files"), "text"),
        **dict.fromkeys(("bible", "king_james"), "kjv"),
        **dict.fromkeys(("fineweb_edu", "fineweb-edu"), "fineweb"),
        **dict.fromkeys(("allenai/c4",), "c4"),
    },
    "model": {
        "gpt2": "gpt2_tiny",
        "llama": "llama_tiny",
        "tiny": "llama_tiny",
        "qwen3": "qwen3_tiny",
        **{size: f"llama_{size}" for size in ("9m", "60m", "130m", "350m", "1b", "7b")},
        **{f"llama{size}": f"llama_{size}" for size in ("9m", "60m", "130m", "350m", "1b", "7b")},
    },
}
"""Group → name elsewhere → option here. An option that this installation lacks is not suggested."""

VALUES: dict[str, dict[str, str]] = {
    "precision": {
        **dict.fromkeys(
            ("float16", "half", "16", "16_mixed", "fp16_mixed", "f16", "torch.float16", "16bit"), "fp16"
        ),
        **dict.fromkeys(("float16_mixed", "mixed_fp16"), "fp16"),
        **dict.fromkeys(
            ("bfloat16", "bf16_mixed", "bfloat16_mixed", "torch.bfloat16", "bfloat", "bf", "mixed_bf16"),
            "bf16",
        ),
        **dict.fromkeys(("mixed", "amp", "autocast", "true"), "bf16"),
        **dict.fromkeys(("bf16_true", "pure_bf16", "bfloat16_true", "full_bf16", "bf16_full"), "bf16_pure"),
        **dict.fromkeys(
            (
                "float32",
                "32",
                "32_true",
                "full",
                "float",
                "single",
                "f32",
                "torch.float32",
                "32bit",
                "no",
                "none",
                "null",
            ),
            "fp32",
        ),
        **dict.fromkeys(("fp32_true", "tf32", "false"), "fp32"),
    },
    "wandb.mode": {
        **dict.fromkeys(("off", "none", "no", "false", "disable", "0", "null"), "disabled"),
        **dict.fromkeys(("on", "true", "yes", "enabled", "wandb", "1", "all"), "online"),
        **dict.fromkeys(("dryrun", "local"), "offline"),
    },
    "model.attention": {
        **dict.fromkeys(
            ("flash", "flash_attention_2", "fa2", "flash_attn", "scaled_dot_product", "torch", "true"), "sdpa"
        ),
        **dict.fromkeys(("math", "naive", "vanilla", "false"), "eager"),
    },
    "data.mode": {
        **dict.fromkeys(("pack", "packing", "concat", "true"), "packed"),
        **dict.fromkeys(("pad", "padding", "false"), "padded"),
    },
    "data.source": {
        **dict.fromkeys(("hf", "hub", "huggingface", "dataset", "streaming"), "datasets"),
        **dict.fromkeys(("txt", "file", "files"), "text"),
        **dict.fromkeys(("json", "ndjson", "jsonlines"), "jsonl"),
    },
    "resume": {
        **dict.fromkeys(("auto", "latest", "last", "allow", "must", "best"), "true"),
        **dict.fromkeys(("never", "scratch", "none", "null"), "false"),
    },
}
"""Key → value elsewhere → value here."""
SWITCH_VALUES = {
    **dict.fromkeys(("yes", "y", "on", "1", "enable", "enabled", "t"), "true"),
    **dict.fromkeys(("no", "n", "off", "0", "disable", "disabled", "f", "none"), "false"),
}
NOTHING = ("none", "nil", "off", "no", "never", "false", "disabled", "~", "undefined", "-1", "inf")
"""What other programs write for null."""

FILES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    ".csv": "csv",
    ".tsv": "tsv",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CONFIGS = ("config", "config_file", "config_path", "config_name", "cfg", "c", "f", "file", "yaml")
"""What other programs call a file of keys."""
RESUMES = ("resume_from_checkpoint", "resume_from", "load_checkpoint", "auto_resume")
"""What other programs call going on with a run."""
