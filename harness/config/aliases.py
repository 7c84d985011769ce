"""What other programs call our keys, options and values: tables that `suggestions` reads.

A table lists, for each name here, the names elsewhere, separated by spaces.
"""

from __future__ import annotations

from collections.abc import Mapping


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    """Turn name here → names elsewhere into name elsewhere → name here."""
    return {name: here for here, names in table.items() for name in names.split()}


KEYS = _by_name(
    {
        "optimizer.lr": "learning_rate peak_lr max_lr base_lr lr",
        "optimizer.weight_decay": "wd decay_rate",
        "optimizer.momentum": "beta beta1 mu",
        "optimizer.eps": "adam_eps adam_epsilon epsilon",
        "optimizer": "optim opt optimizer_name optimizer_type algorithm",
        "steps": (
            "max_steps num_steps n_steps train_steps training_steps total_steps num_train_steps iterations iters "
            "max_iters num_iterations updates step"
        ),
        "batch_size": "train_batch_size global_batch_size total_batch_size batch bs gbs",
        "micro_batch_size": (
            "micro_batch microbatch_size micro_bsz mbs per_device_train_batch_size device_batch_size "
            "train_micro_batch_size_per_gpu per_device_batch_size"
        ),
        "seq_len": (
            "sequence_length seq_length max_seq_len max_seq_length max_length context_length block_size context "
            "ctx_len context_size seqlen n_ctx"
        ),
        "world_size": "num_processes nproc nproc_per_node gpus num_gpus n_gpus ngpus devices ranks",
        "precision": "dtype torch_dtype mixed_precision amp_dtype compute_dtype param_dtype",
        "max_grad_norm": "grad_clip clip_grad gradient_clipping gradient_clip_val clip max_norm clip_grad_norm",
        "seed": "random_seed manual_seed rng_seed",
        "schedule.warmup": "warmup_steps warmup_ratio num_warmup_steps warmup_iters",
        "schedule.decay": "decay_steps decay_ratio cooldown",
        "schedule.min_lr_ratio": "min_lr end_lr final_lr lr_min",
        "epochs": "num_epochs n_epochs max_epochs num_train_epochs train_epochs",
        "schedule": "scheduler lr_scheduler lr_schedule lr_scheduler_type lr_decay_style scheduler_type",
        "model": "model_name arch architecture network model_size",
        "model.path": "model_name_or_path model_path pretrained pretrained_model init_from base_model weights",
        "model.activation_checkpointing": (
            "gradient_checkpointing activation_checkpoint grad_checkpointing recompute checkpoint_activations"
        ),
        "model.compile": "torch_compile use_compile",
        "model.attention": "attn_implementation attn_impl attn flash_attention",
        "model.config.hidden_size": "hidden dim d_model width embed_dim n_embd",
        "model.config.num_hidden_layers": "layers num_layers n_layers n_layer depth num_hidden_layers",
        "model.config.num_attention_heads": "heads num_heads n_heads n_head",
        "model.config.intermediate_size": "ffn_dim d_ff mlp_dim ffn_hidden_size",
        "data.dataset": "dataset_name dataset_path hf_dataset",
        "data.files": "train_file train_files data_path data_files data_dir path file",
        "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path",
        "data.validation_files": "validation_file eval_file dev_file val_file test_file eval_files val_files",
        "data.validation_split": "eval_split dev_split val_split",
        "data.columns": "column_names",
        "data.field": "text_column text_field column text_key content_field",
        "eval.every": "eval_every eval_steps eval_interval eval_freq val_check_interval",
        "checkpoint.every": "save_every save_steps save_interval checkpoint_interval ckpt_every checkpoint_every",
        "checkpoint.keep": "save_total_limit keep_checkpoints max_checkpoints",
        "log_every": "logging_steps log_interval log_freq log_steps print_every",
        "runs_dir": "output_dir out_dir save_dir log_dir logdir work_dir results_dir",
        "name": "run_name exp_name job_name run_id run",
        "group": "run_group experiment_group",
        "wandb.project": "wandb_project project project_name",
        "wandb.entity": "wandb_entity team",
        "wandb.mode": "report_to wandb_mode logger use_wandb",
        "engine": "strategy parallelism distributed distributed_type distributed_backend",
        "engine.config_file": "deepspeed deepspeed_config ds_config",
        "resume": "resume_from_checkpoint resume_from load_checkpoint auto_resume",
        "overwrite": "force overwrite_output_dir",
        "time_limit": "max_time walltime timeout",
        "experiment": "exp recipe preset",
    }
)
"""Last part of a key elsewhere → key here."""

SWITCHES = _by_name(
    {
        "precision=bf16": "bf16 amp",
        "precision=fp16": "fp16",
        "precision=fp32": "fp32",
        "engine=ddp": "ddp",
        "engine=fsdp2": "fsdp fsdp2",
        "engine=hsdp": "hsdp",
        "wandb.mode=disabled": "no_wandb",
        "schedule=cosine": "cosine",
    }
)
"""Names that are on or off elsewhere → what to type here."""

COUNTED = _by_name(
    {
        "micro_batch_size=… (batch_size / world_size / the micro-batches that a step accumulates)": (
            "gradient_accumulation_steps grad_accum accumulation accumulate_grad_batches grad_accum_steps"
        ),
        "steps=… (tokens / (batch_size × seq_len))": (
            "train_tokens total_tokens num_tokens token_budget max_train_tokens"
        ),
    }
)
"""Quantities that follow from others here → how."""

OPTIONS: dict[str, dict[str, str]] = {
    "optimizer": _by_name(
        {
            "adamw": "adam adamw_torch adamw_torch_fused fused_adamw adam_w",
            "torch.optim.SGD": "sgd",
            "torch.optim.RMSprop": "rmsprop",
            "torch.optim.Adagrad": "adagrad",
            "torch.optim.Adafactor": "adafactor",
            "torch.optim.NAdam": "nadam",
            "torch.optim.LBFGS": "lbfgs",
            "muon": "muon_ns5 muon_ns",
            "muon_moonlight": "moonlight moonshot",
            "galore": "galore_adamw galore_adam",
        }
    ),
    "engine": _by_name(
        {
            "fsdp2": "fsdp fsdp1 fully_shard full_shard sharded",
            "hsdp": "hybrid hybrid_shard",
            "ddp": "dp data_parallel dataparallel distributed multi_gpu nccl gloo",
            "single": "none no cpu gpu cuda local null",
            "zero2": "deepspeed zero ds zero_2 zero-2 stage2 stage_2 deepspeed_stage_2 z2",
            "zero0": "zero_0 zero-0 stage0 stage_0 deepspeed_stage_0 z0",
            "zero1": "zero_1 zero-1 stage1 stage_1 deepspeed_stage_1 z1",
            "zero3": "zero_3 zero-3 stage3 stage_3 deepspeed_stage_3 z3",
        }
    ),
    "schedule": _by_name(
        {
            "cosine": "cos cosine_annealing cosine_with_warmup cosine_decay",
            "constant": "const none no flat fixed constant_with_warmup null",
            "linear": "linear_decay linear_with_warmup polynomial",
            "wsd": "trapezoid trapezoidal warmup_stable_decay",
        }
    ),
    "data": _by_name(
        {
            "jsonl": "json jsonlines ndjson",
            "text": "txt plain files",
            "kjv": "bible king_james",
            "fineweb": "fineweb_edu fineweb-edu",
            "c4": "allenai/c4",
        }
    ),
    "model": _by_name(
        {
            "gpt2_tiny": "gpt2",
            "llama_tiny": "llama tiny",
            "qwen3_tiny": "qwen3",
            "llama_9m": "9m llama9m",
            "llama_60m": "60m llama60m",
            "llama_130m": "130m llama130m",
            "llama_350m": "350m llama350m",
            "llama_1b": "1b llama1b",
            "llama_7b": "7b llama7b",
        }
    ),
}
"""Group → name elsewhere → option here. An option that this installation lacks is not suggested."""

VALUES: dict[str, dict[str, str]] = {
    "precision": _by_name(
        {
            "fp16": "float16 half 16 16_mixed fp16_mixed f16 torch.float16 16bit float16_mixed mixed_fp16",
            "bf16": (
                "bfloat16 bf16_mixed bfloat16_mixed torch.bfloat16 bfloat bf mixed_bf16 mixed amp autocast true"
            ),
            "bf16_pure": "bf16_true pure_bf16 bfloat16_true full_bf16 bf16_full",
            "fp32": (
                "float32 32 32_true full float single f32 torch.float32 32bit no none null fp32_true tf32 false"
            ),
        }
    ),
    "wandb.mode": _by_name(
        {
            "disabled": "off none no false disable 0 null",
            "online": "on true yes enabled wandb 1 all",
            "offline": "dryrun local",
        }
    ),
    "model.attention": _by_name(
        {
            "sdpa": "flash flash_attention_2 fa2 flash_attn scaled_dot_product torch true",
            "eager": "math naive vanilla false",
        }
    ),
    "model.activation_checkpointing": _by_name(
        {
            "full": "all layer every_layer on yes 1",
            "selective": "op operator sac select partial",
            "none": "off no 0 null disabled",
        }
    ),
    "data.mode": _by_name(
        {
            "packed": "pack packing concat true",
            "padded": "pad padding false",
        }
    ),
    "data.source": _by_name(
        {
            "datasets": "hf hub huggingface dataset streaming",
            "text": "txt file files",
            "jsonl": "ndjson jsonlines",
        }
    ),
    "resume": _by_name(
        {
            "true": "auto latest last allow must best",
            "false": "never scratch none null",
        }
    ),
}
"""Key → value elsewhere → value here."""

SWITCH_VALUES = _by_name(
    {
        "true": "yes y on 1 enable enabled t",
        "false": "no n off 0 disable disabled f none",
    }
)
NOTHING = ("none", "nil", "off", "no", "never", "false", "disabled", "~", "undefined", "-1", "inf")
"""What other programs write for null."""

FILES = _by_name(
    {
        "jsonl": ".jsonl .ndjson",
        "json": ".json",
        "parquet": ".parquet",
        "text": ".txt .text .md",
        "csv": ".csv",
        "tsv": ".tsv",
    }
)
"""Ending of a file → data group that reads it."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CONFIGS = ("config", "config_file", "config_path", "config_name", "cfg", "c", "f", "file", "yaml")
"""What other programs call a file of keys."""
RESUMES = ("resume_from_checkpoint", "resume_from", "load_checkpoint", "auto_resume")
"""What other programs call going on with a run."""
