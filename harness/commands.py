"""The commands of `optbench`: what each takes, in one table that parsing, ``--help`` and completion read.

Standard library only, so that `optbench --help` is instant: a command's module is imported when the command runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option that begins with dashes.

    Attributes:
        names: spellings; the first one is shown and, without dashes, names the parsed value.
        meaning: one line for ``--help``.
        metavar: what its value is; empty: a switch without a value.
        example: what to type, for an error about a missing or wrong value.
        choices: allowed values; empty: any.
        is_repeatable: every occurrence adds a value.
        is_value_optional: the value can be left out, and is given only as ``--name=VALUE``.
    """

    names: tuple[str, ...]
    meaning: str
    metavar: str = ""
    example: str = ""
    choices: tuple[str, ...] = ()
    is_repeatable: bool = False
    is_value_optional: bool = False

    @property
    def usage(self) -> str:
        """Return the option with its value, as ``--help`` shows it: ``--out DIR``."""
        if self.is_value_optional:
            return f"{self.names[0]}[={self.metavar}]"
        return f"{self.names[0]} {self.metavar}".strip()


class Command(NamedTuple):
    """A command of the table.

    Attributes:
        target: "module:function"; the function takes the arguments after the command and returns the exit code.
        summary: one line for `optbench --help`.
        usage: the arguments after the command that are not options.
        examples: (arguments, what they do).
        options: besides ``--json``, which every command takes.
        arguments: (argument, meaning) of arguments that need a line in ``--help``.
        takes_keys: it takes the ``key=value`` overrides of a run.
        takes_optimizers: it takes names of optimizers.
        values: "module:name" of the names that the command takes, a list or a function that returns it; empty: none.
        keys: "module:function" of the text about the command's own keys; empty: none.
    """

    target: str
    summary: str
    usage: str
    examples: tuple[tuple[str, str], ...]
    options: tuple[Option, ...] = ()
    arguments: tuple[tuple[str, str], ...] = ()
    takes_keys: bool = False
    takes_optimizers: bool = False
    values: str = ""
    keys: str = ""


JSON = Option(("--json",), "print one JSON document on standard output, nothing else")
_DRY_RUN = ("--dry-run",)
_VERBOSITY = (
    Option(("--quiet", "-q"), "print only runs that do not finish, and the result"),
    Option(("--verbose", "-v"), "also print the output of each run (it is in its log.txt anyway)"),
)

LOG_FORMATS = ("track3", "nanochat", "wandb")
"""Formats of public logs that `optbench report` reads: modded-nanogpt's track 3, nanochat, exports from W&B."""

COMMANDS: dict[str, Command] = {
    "train": Command(
        "harness.jobs.train_command:main",
        "train one run",
        "[FILE.yaml] [group=option …] [key=value …]",
        (
            ("", "the defaults: a tiny LLaMA on the King James Bible with AdamW"),
            ("model=llama_9m optimizer=sumo optimizer.rank=64 steps=1000 world_size=2", "two processes"),
            ("model=llama_60m optimizer=galore precision=bf16 batch_size=512 micro_batch_size=64", "GPUs"),
        ),
        arguments=(
            ("FILE.yaml", "keys of a run, such as the config.yaml of an earlier one; key=value overrides it"),
        ),
        takes_keys=True,
    ),
    "compare": Command(
        "analysis.compare.command:main",
        "train several optimizers under one protocol, write the report",
        "OPTIMIZER … [seeds=N] [OPTIMIZER.key=value …] [group=option …] [key=value …]",
        (
            ("adamw muon galore sumo preset=quickstart", "what `make quickstart` runs"),
            ("adamw sumo seeds=5 model=llama_9m steps=2000", "with confidence intervals"),
            ("sumo galore sumo.rank=32 galore.rank=64", "options for one of them"),
        ),
        _VERBOSITY,
        (
            ("seed=K, seeds=N", "run the seeds K to K+N-1 (0, 3 seeds)"),
            ("concurrency=N", "train N runs side by side on this machine's CPUs (1)"),
        ),
        takes_keys=True,
        takes_optimizers=True,
    ),
    "sweep": Command(
        "analysis.tuning.command:main",
        "tune optimizers with equal budgets, compare on fresh seeds",
        "OPTIMIZER … | study=NAME [trials=5] [seeds=3] [[OPTIMIZER.]option=A,B,…|LOW..HIGH] [extend=N] "
        "[OPTIMIZER.key=value …] [key=value …]",
        (
            ("adamw muon galore sumo preset=quickstart", "five learning rates each, around its default"),
            (
                "adamw sumo lr=1e-3..1e-1 sumo.rank=16,32 trials=6 seeds=5 model=llama_9m",
                "your own search spaces",
            ),
            ("study=quickstart", "a study from a file: configs/study/NAME.yaml"),
            ("adamw sumo trials=3 steps=1000 --dry-run", "list the trials and how many tokens they take"),
        ),
        (Option(_DRY_RUN, "print the trials and their tokens; start nothing"), *_VERBOSITY),
        (
            ("trials=N", "settings for every optimizer (5, or the length of a list)"),
            ("seed=K, seeds=N", "seed of the trials (0); the comparison runs seeds K+1 to K+N (3 seeds)"),
            ("concurrency=N", "train N runs side by side on this machine's CPUs (1)"),
            (
                "extend=N",
                "while a best setting is on an edge: up to N more trials for every optimizer (2; own space: 0)",
            ),
        ),
        takes_keys=True,
        takes_optimizers=True,
    ),
    "matrix": Command(
        "analysis.matrix.command:main",
        "fine-tune what each optimizer pretrained with each optimizer",
        "OPTIMIZER … pretrained=DIR [OPTIMIZER.key=value …] [key=value …] | DIR",
        (
            (
                "adamw muon sumo pretrained=runs/pretrained experiment=mawps_sumo data.files=[train.json] …",
                "each model with each optimizer",
            ),
            ("runs/matrix", "report finished runs: writes matrix.html, matrix.md and matrix.json there"),
        ),
        (Option(_DRY_RUN, "print the runs; nothing is exported or started"), *_VERBOSITY),
        arguments=(
            ("pretrained=DIR", "finished runs of optbench compare, whose last weights are fine-tuned"),
        ),
        takes_keys=True,
        takes_optimizers=True,
    ),
    "report": Command(
        "analysis.report.command:main",
        "compare the runs below a folder, and tables of other trainers",
        "DIR | ENTITY/PROJECT[/GROUP] --export DIR",
        (
            ("runs/quickstart", "writes report.html, comparison.md and comparison.csv there"),
            ("runs/quickstart --figures png", "and each plot as a PNG, with matplotlib"),
            ("runs/quickstart --wandb", "and a workspace, a report and its files as artifacts in W&B"),
            ("team/optbench/quickstart --export runs/back", "download runs from W&B and compare them"),
            ("track3/results --format track3", "public logs: an arm for each folder, a run for each file"),
        ),
        (
            Option(
                ("--format",),
                "read the logs of another program; the report goes to runs/NAME",
                "|".join(LOG_FORMATS),
                "--format track3",
                LOG_FORMATS,
            ),
            Option(("--out",), "write there instead", "DIR", "optbench report runs/GROUP --out FOLDER"),
            Option(("--figures",), "also write each plot as an image", "png", "--figures png", ("png",)),
            Option(
                ("--wandb",),
                "dashboards in W&B; without a login, their definition as a file",
                "ENTITY/PROJECT",
                "--wandb=ENTITY/PROJECT",
                is_value_optional=True,
            ),
            Option(
                ("--export",),
                "download runs from W&B into run folders below DIR, then compare them",
                "DIR",
                "optbench report ENTITY/PROJECT/GROUP --export FOLDER",
            ),
        ),
    ),
    "plan": Command(
        "harness.plan.command:main",
        "compute memory, traffic and FLOPs of a run, and whether it fits",
        "[FILE.yaml] [group=option …] [key=value …]",
        (
            ("model=llama_60m optimizer=sumo engine=fsdp2 --world-size 64", "for a planned cluster"),
            ("model=llama_7b precision=bf16 engine=fsdp2 --world-size 8 --device H100", "on a known GPU"),
            ("optimizer=muon engine=zero3 world_size=2 --json", "as one JSON document"),
        ),
        (
            Option(("--world-size", "--world_size"), "processes to plan for", "N", "--world-size 8"),
            Option(
                ("--device",),
                "GPU by name, for its memory and the time of a step: A100, H100, H200, B200, 4090, MI300X, …",
                "NAME",
                "--device H100",
            ),
            Option(
                ("--memory", "--device-memory", "--device_memory"),
                'memory of one device, for "fits": 80GB, 24GiB (that of --device, else 80GB)',
                "SIZE",
                "--memory 80GB",
            ),
            Option(
                ("--network",),
                "bandwidth of each GPU between nodes, one direction, per second (50GB)",
                "SIZE",
                "--network 25GB",
            ),
        ),
        takes_keys=True,
    ),
    "paper": Command(
        "analysis.paper.command:main",
        "compare a published table with predicted and measured values",
        "[TABLE | sumo_theory] [runs=DIR …]",
        (
            ("", "list the available tables"),
            ("sumo_table3", "memory counted with optbench's optimizers, perplexities from runs/sumo_table3"),
            ("sumo_table3 runs=runs/mine --out runs/paper", "from finished runs elsewhere, written as files"),
            ("sumo_table9 --commands", "the commands of the missing runs"),
            (
                "sumo_theory --out runs/paper",
                "SUMO's lemmas, and its figures from the runs in runs/sumo_theory",
            ),
        ),
        (
            Option(("--list",), "list the available tables"),
            Option(
                ("--commands",),
                "print the commands of the missing runs, with the paper's protocol, instead of the table",
            ),
            Option(
                ("--out",),
                "write TABLE.json, TABLE.md and TABLE.csv there (of sumo_theory: .json, .md and .html)",
                "DIR",
                "--out runs/paper",
            ),
        ),
        values="analysis.paper.command:names",
    ),
    "certify": Command(
        "harness.verify.command:main",
        "check that an engine computes what an optimizer's rule defines",
        "[rule=…] [engine=…] [dtype=…] [accumulation=…] [clipping=…] [world_size=…] [variant=…] [option=…]",
        (
            (
                "",
                "every rule in every layout, every setting of each engine, every option: a quarter of an hour",
            ),
            ("rule=sumo,muon engine=fsdp2,zero3", "some of them"),
            ("rule=galore dtype=bf16", "every combination of the given values"),
            ("option=refresh_stagger", "the cells that have an option which no preset has"),
            ("--include-controls", "also deliberate defects, which must fail"),
        ),
        (
            Option(("--full",), "every combination (hours on 2 cores)"),
            Option(
                ("--include-controls",), "also nine defects of other implementations, which must be detected"
            ),
            Option(
                ("--include-peers",), "also torch's and DeepSpeed's own Muon, which do not change the verdict"
            ),
            Option(
                ("--out",),
                "write certificates.json and certificates.md there (runs/certificates)",
                "DIR",
                "--out runs/certificates",
            ),
        ),
    ),
    "audit": Command(
        "harness.verify.audit.command:main",
        "check any torch optimizer on every engine, and what it promises",
        "TARGET … | --all PACKAGE",
        (
            ("pytorch_optimizer.SOAP", "a class by its import path"),
            ("'torch.optim.AdamW(lr=1e-3, betas=(0.9, 0.95))'", "with arguments of its constructor"),
            ("mine.make --out runs/audit", "a class or a factory in ./mine.py, and files of the results"),
            ("--all pytorch_optimizer --json", "every optimizer of a package"),
        ),
        (
            Option(
                ("--all",),
                "audit every optimizer that a package defines: pytorch_optimizer, torch.optim, …",
                "PACKAGE",
                "optbench audit --all pytorch_optimizer",
                is_repeatable=True,
            ),
            Option(
                ("--kwargs",),
                "arguments of the constructor, for every target: 'lr=0.1, betas=(0.9, 0.99)'",
                "ARGUMENTS",
                "--kwargs 'lr=0.1'",
            ),
            Option(
                ("--engine",),
                "these engines only: single, ddp, fsdp2, hsdp, zero0, zero1, zero2, zero3",
                "NAME,…",
                "--engine fsdp2,zero3",
                is_repeatable=True,
            ),
            Option(("--include-controls",), "also 14 deliberate defects, which must be detected"),
            Option(
                ("--ci",),
                "for a pull request: at most 3 minutes, and a table in the job summary of GitHub Actions",
            ),
            Option(
                ("--time-limit", "--time_limit"),
                "of one engine, and of the import with the first steps, in seconds (60; with --ci 20)",
                "SECONDS",
                "--time-limit 120",
            ),
            Option(
                ("--out",),
                "write audit.json, a page and a badge there",
                "DIR",
                "--out runs/audit",
            ),
        ),
        (
            (
                "TARGET",
                "package.Class of a torch.optim.Optimizer, a factory, or a preset; NAME(lr=…) passes arguments",
            ),
        ),
        values="optimizers.presets:names",
    ),
    "diverge": Command(
        "harness.verify.diverge.command:main",
        "tell rounding from a defect where two runs differ",
        "RUN_A RUN_B",
        (
            (
                "runs/mine/single runs/mine/fsdp2",
                "run A is replayed with eight twins that differ by rounding",
            ),
            ("runs/mine/single other_trainer.csv --steps 50", "against the losses of another trainer"),
            ("runs/mine/single runs/mine/fsdp2 --replay", "replay run B too, to name step and parameter"),
        ),
        (
            Option(("--twins",), "twins of run A that make the envelope (8)", "N", "--twins 8"),
            Option(("--steps",), "first steps that are compared (20)", "N", "--steps 20"),
            Option(
                ("--replay",), "replay the first steps of run B on its engine instead of reading its record"
            ),
            Option(("--minutes",), "refuse to start twins that would take longer (30)", "M", "--minutes 30"),
            Option(
                ("--comparisons",),
                "pairs that are read together, this one included (1)",
                "K",
                "--comparisons 12",
            ),
            Option(("--force",), "compare runs of different experiments, which differ by more than rounding"),
        ),
        (
            ("RUN_A", "a run folder, whose first steps are replayed on this machine's CPUs"),
            ("RUN_B", "a run folder, or a .csv or .jsonl table with columns step and train/loss"),
        ),
    ),
    "margin": Command(
        "analysis.margin.command:main",
        "measure how slowly training reaches its robustness margin",
        "[mode=toy|flow|disks|mlp|head] [key=value …] [NAME.option=value …]",
        (
            ("", "gradient descent on two neurons and two points, then its flow: the gap closes as 1/ln t"),
            (
                "optimizer=gd,adam,muon,sumo w=1,-3 b=0.5,0 steps=100000",
                "which optimizers are faster in steps",
            ),
            (
                "experiment=margin_starts",
                "over random starts: which optimizer has the smaller gap at equal loss",
            ),
            ("experiment=margin_inits", "many random starts; dead starts are counted"),
        ),
        (Option(("--out",), "write there instead of runs/margin/<name>", "DIR", "--out runs/margin/mine"),),
        keys="analysis.margin.config:help_text",
    ),
    "reconstruct": Command(
        "analysis.reconstruction.command:main",
        "reconstruct training images from weights",
        "[mode=fixture] [experiment=NAME] [key=value …] [OPTIMIZER.option=value …]",
        (
            (
                "mode=fixture",
                "a network in closed form: alternatives that are exact, controls that must fail",
            ),
            ("optimizer=gd,muon seeds=3", "victims, certificates, alternatives, attacks, susceptibility"),
            (
                "checkpoint=weights.safetensors batch=batch.npz",
                "your own network, if the theory covers it",
            ),
        ),
        keys="analysis.reconstruction.config:help_text",
    ),
    "memorize": Command(
        "analysis.memorization.command:main",
        "measure what the models of several optimizers memorize",
        "RUN_OR_GROUP … [key=value …]",
        (
            ("runs/memorization", "exposure of canaries, extraction, membership, at equal validation loss"),
            ("runs/memorization/sumo-seed0 checkpoints=last", "the last checkpoint of one run"),
            ("runs/memorization reference=runs/other/mine", "membership also against a reference model"),
        ),
        (Option(("--out",), "write there instead of the folder of the runs", "DIR", "--out runs/memorize"),),
        (("RUN_OR_GROUP", "a run folder with checkpoints, or a folder of such runs"),),
        keys="analysis.memorization.config:help_text",
    ),
    "export": Command(
        "harness.export:main",
        "write trained weights as a Hugging Face model folder",
        "CHECKPOINT FOLDER",
        (
            ("runs/default/mine model", "the newest checkpoint of a run, with its tokenizer"),
            ("runs/default/mine/checkpoints/step_00001000 model", "this checkpoint"),
            (
                "runs/default/mine model --weights raw",
                "of a run with optimizer.average_decay: not the average",
            ),
        ),
        (
            Option(
                ("--weights",),
                "which weights of a run with optimizer.average_decay: their average, as val/loss (the default), or raw",
                "average|raw",
                "optbench export runs/default/mine model --weights raw",
                choices=("average", "raw"),
            ),
        ),
    ),
    "clean": Command(
        "harness.clean:main",
        "list files that run folders no longer need, and remove them",
        "[DIR]",
        (
            (
                "",
                "list rows and checkpoints of earlier attempts, half-written files, replaced runs below runs/",
            ),
            ("runs/mine --yes", "remove them"),
        ),
        (Option(("--yes",), "remove what is listed"),),
    ),
    "doctor": Command(
        "harness.doctor:main",
        "show what this machine can run, and what is missing",
        "",
        (("", "packages, GPUs, engines, folders, W&B, SLURM; exit code 1 if something is broken"),),
    ),
    "completion": Command(
        "harness.completion:main",
        "print a script that completes commands, keys and values on TAB",
        "bash|zsh|fish",
        (("bash >> ~/.bash_completion", "for every new shell"),),
        values="harness.completion:SHELLS",
    ),
    "submit": Command(
        "analysis.submit.command:main",
        "submit a run, a comparison, a study or any command to SLURM",
        "[train|compare|sweep|COMMAND] [its arguments] [cluster=NAME] [cluster.key=value …]",
        (
            ("model=llama_60m optimizer=sumo cluster=generic_gpu --dry-run", "print the script"),
            ("model=llama_1b engine=fsdp2 cluster.nodes=4 cluster.time=12h", "one run on four nodes"),
            (
                "compare adamw sumo seeds=3 cluster.throttle=4",
                "an array, one row per run, and the report after it",
            ),
            (
                "sweep adamw sumo trials=5 cluster.throttle=8",
                "an array of trials, and what follows from them",
            ),
            ("margin optimizer=gd,sumo --after 12", "any other command, after job 12"),
        ),
        (
            Option(_DRY_RUN, "print the script, queue nothing"),
            Option(("--next",), "of a sweep: queue what follows its trials, without repeating failed ones"),
            Option(
                ("--after",), "begin when these jobs have ended", "JOB,…", "--after 12", is_repeatable=True
            ),
            Option(
                ("--then",),
                "one more job afterwards, even if this one failed",
                "'COMMAND …'",
                "--then 'margin optimizer=gd,adam'",
                is_repeatable=True,
            ),
        ),
        (
            (
                "cluster.KEY",
                "partition, account, nodes, gpus, time, container …: optbench show generic_gpu",
            ),
        ),
    ),
    "status": Command(
        "harness.jobs.status_command:main",
        "show the state of the runs below a folder",
        "[DIR]",
        (
            ("", "all runs below runs/"),
            ("runs/mine --watch", "update every two seconds while a run is active"),
            ("--cancel sumo-seed0", "end its job; the run saves and can be resumed"),
            ("--resubmit sumo-seed0", "queue its script again"),
        ),
        (
            Option(("--watch",), "keep the table up to date"),
            Option(
                ("--cancel",),
                "end the job of a run",
                "NAME",
                "optbench status runs --cancel NAME",
                is_repeatable=True,
            ),
            Option(
                ("--resubmit",),
                "queue a run again, from its last checkpoint",
                "NAME",
                "optbench status runs --resubmit NAME",
                is_repeatable=True,
            ),
        ),
    ),
    "list": Command(
        "harness.listing:list_command",
        "list models, optimizers, engines, data sets",
        "",
        (("", "all names"),),
    ),
    "show": Command(
        "harness.listing:show_command",
        "show a model, optimizer, engine or data set: options, defaults",
        "NAME",
        (("sumo", "options of an optimizer"), ("llama_60m", "a model"), ("train", "every key of a run")),
        values="harness.listing:names",
    ),
}

HEADINGS: dict[str, tuple[str, ...]] = {
    "train": ("train", "plan", "export", "clean"),
    "compare": ("compare", "sweep", "matrix", "report", "paper"),
    "verify": ("certify", "audit", "diverge"),
    "study": ("margin", "reconstruct", "memorize"),
    "run on a cluster": ("submit", "status"),
    "look up": ("list", "show", "doctor", "completion"),
}
"""Heading of `optbench --help` → commands; those that are in no group come last."""


def load(target: str) -> Any:
    """Import the object that "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
