"""Checks of a composed run: what depends on several keys, the machine and the launcher."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from harness.config import checks, derived_defaults, launcher, model_facts
from harness.config import gpus as gpus_of_machine
from harness.config.compose import load
from harness.config.gpus import Gpu
from harness.config.identity import differing_keys, identity
from harness.config.schema import RunConfig
from harness.errors import InputError

LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}


def make(**changes: Any) -> RunConfig:
    """A run as `load` gives it, without the cost of composing files."""
    values: dict[str, Any] = {"model": {"config": LLAMA}}
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = {**place.get(last, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


def run_check(config: RunConfig, environ: dict[str, str] | None = None, **options: Any) -> RunConfig:
    return checks.check(config, environ or {}, options.pop("devices", 0), **options)


BAD: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"optimizer__name": "sumo", "optimizer__rank": 512},
        ["optimizer.rank: 512", "layers.0", "128×128", "=128"],
    ),
    ({"optimizer__rank": 8}, ["optimizer.rank: 8 is not an option of adamw", "optimizer=sumo"]),
    (
        {"optimizer__name": "sumo", "optimizer__rnk": 8},
        ["did you mean optimizer.rank?", "fix: optimizer.rank=8"],
    ),
    ({"optimizer__name": "sumo", "optimizer__side": "lon"}, ["did you mean long?", "short, long"]),
    ({"optimizer__name": "sumo", "optimizer__rank": "abc"}, ["optimizer.rank: abc", "a whole number"]),
    ({"optimizer__name": "sumo", "optimizer__transport": 5}, ["optimizer.transport: 5", "false, true"]),
    ({"optimizer__name": "sumoo"}, ["optimizer.name: sumoo", "did you mean sumo?", "fix: optimizer=sumo"]),
    ({"optimizer__target": "nonsense"}, ["optimizer.target: nonsense", "package.Class"]),
    ({"optimizer__target": "no_such_package.X"}, ["no_such_package, which is not installed"]),
    (
        {"optimizer__target": "torch.optim.SGD"},
        ["optimizer.lr: null", "no default for torch.optim.SGD", "=0.001"],
    ),
    ({"batch_size": 10, "world_size": 4}, ["batch_size: 10 is not divisible by world_size = 4", "=8"]),
    (
        {"batch_size": 12, "world_size": 2, "micro_batch_size": 4},
        ["world_size × micro_batch_size = 8", "fix: batch_size=16"],
    ),
    ({"engine__name": "single", "world_size": 2}, ["engine.name: single", "world_size is 2", "engine=ddp"]),
    ({"name": "../x"}, ["name: ../x leaves its folder", "fix: name="]),
    ({"name": ".."}, ["name: .. leaves"]),
    ({"name": ""}, ["name: '' leaves"]),
    ({"name": "x" * 300}, ["at most 200 bytes"]),
    ({"group": "a/b"}, ["group: a/b leaves its folder", "fix: group=a-b"]),
    ({"group": "a\nb"}, ["group: a b leaves"]),
    ({"model__config": {"num_attention_heads": 3}}, ["num_attention_heads: 3 does not divide", "128"]),
    ({"model__config": {"num_attention_heads": 128}}, ["odd width 1"]),
    ({"model__config": {"num_key_value_heads": 3}}, ["num_key_value_heads: 3 does not divide"]),
    ({"model__config": {"hidden_size": "abc"}}, ["model.config.hidden_size: abc", "a whole number"]),
    ({"model__config": {"hidden_size": 0}}, ["model.config.hidden_size: 0", "≥ 1"]),
    ({"model__config": {"rms_norm_eps": "x"}}, ["model.config.rms_norm_eps: x", "a number"]),
    ({"model__config": {"tie_word_embeddings": 3}}, ["tie_word_embeddings: 3", "true, false"]),
    ({"model__model_type": "lama"}, ["model.model_type: lama", "did you mean llama?"]),
    ({"model__path": "/no/such/folder"}, ["model.path: /no/such/folder is not a folder"]),
    ({"seq_len": 4096}, ["seq_len: 4096 is longer than the model's 2048 positions", "seq_len=2048"]),
    ({"data__vocab_size": 9000}, ["data.vocab_size: 9000 is larger than the model's vocabulary of 4096"]),
    ({"schedule__warmup": 500}, ["schedule.warmup: 500 is longer than the run of steps = 200"]),
    ({"schedule__warmup": 1.5}, ["schedule.warmup: 1.5", "a whole number of steps"]),
    (
        {"schedule__name": "wsd", "schedule__warmup": 0.7, "schedule__decay": 0.5},
        ["schedule.decay: 0.5", "together are longer"],
    ),
    ({"eval__tokens": 5}, ["eval.tokens: 5 is less than one sequence", "=128"]),
]


@pytest.mark.parametrize(("changes", "parts"), BAD, ids=[parts[0] for _, parts in BAD])
def test_what_cannot_work_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        run_check(make(**changes))
    for part in parts:
        assert part in str(caught.value)
    assert "fix: " in str(caught.value)


def test_a_checked_run_is_complete_and_stays_the_same() -> None:
    checked = run_check(make(optimizer__name="sumo", world_size=2))
    assert (checked.world_size, checked.micro_batch_size, checked.engine.name) == (2, 8, "ddp")
    assert (checked.optimizer.lr, checked.optimizer.options["aux_lr"]) == (0.004, 0.016)
    assert checked.optimizer.lr_source
    assert checked.optimizer.options["update_scale"] == "rms_max"
    assert "lr" not in checked.optimizer.options
    assert run_check(checked) == checked
    assert run_check(RunConfig.model_validate(checked.model_dump(mode="json"))) == checked


def test_options_of_every_preset_resolve() -> None:
    from optimizers.presets import PRESETS

    for name, preset in PRESETS.items():
        options = run_check(make(optimizer__name=name)).optimizer.options
        assert set(options) == set(preset.options) - {"lr"}


def test_the_optimizer_draws_by_the_seed_of_the_run() -> None:
    assert run_check(make(optimizer__name="sumo", seed=3)).optimizer.options["seed"] == 3
    assert run_check(make(optimizer__name="sumo", seed=3, optimizer__seed=1)).optimizer.options["seed"] == 1


def test_a_composed_run_passes_the_checks() -> None:
    config = run_check(load(["optimizer=galore", "optimizer.rank=16", "world_size=2"]))
    assert config.optimizer.options["rank"] == 16


def test_rank_is_compared_with_the_short_side() -> None:
    assert run_check(make(optimizer__name="sumo", optimizer__rank=128)).optimizer.options["rank"] == 128
    with pytest.raises(InputError, match=r"129 is larger"):
        run_check(make(optimizer__name="sumo", optimizer__rank=129))


def test_world_size_defaults_to_the_devices() -> None:
    assert run_check(make(), devices=4).world_size == 4
    assert run_check(make(), devices=0).world_size == 1
    assert run_check(make(), devices=4).engine.name == "ddp"
    assert run_check(make(world_size=2), devices=4).world_size == 2


def test_more_processes_than_gpus_are_refused_where_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "visible_gpus", lambda environ: (Gpu(),) * 8)
    with pytest.raises(InputError, match=r"world_size: 16 .* shows them 8 GPU\(s\): .* fix: world_size=8"):
        checks.check(make(world_size=16), {})
    assert checks.check(make(world_size=8), {}).world_size == 8
    # Submitted from here to machines with as many GPUs as it takes.
    assert checks.check(make(world_size=16), {}, 8).world_size == 16
    monkeypatch.setattr(launcher, "visible_gpus", lambda environ: ())
    assert checks.check(make(world_size=16), {}).world_size == 16


OLD, NEW, UNKNOWN = Gpu("V100", (7, 0)), Gpu("H100", (9, 0)), Gpu()


@pytest.mark.parametrize(
    ("gpus", "environ", "expected"),
    [
        ((), {}, "fp32"),
        ((NEW, NEW), {}, "bf16"),
        ((UNKNOWN,), {}, "bf16"),
        ((OLD,), {}, "fp32"),  # fp16 would need a loss scale, which nobody asked for
        ((NEW, OLD), {}, "fp32"),
        ((NEW, OLD), {"CUDA_VISIBLE_DEVICES": "0"}, "bf16"),
        ((NEW,), {"CUDA_VISIBLE_DEVICES": ""}, "fp32"),
        ((NEW,), {"ACCELERATE_USE_CPU": "true"}, "fp32"),
    ],
)
def test_precision_auto_is_what_the_device_multiplies(
    gpus: tuple[Gpu, ...], environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus_of_machine, "present", lambda: gpus)
    resolved = checks.check(make(world_size=1), environ)
    assert resolved.precision == expected
    # A checked run is the same elsewhere: a job trains as was checked where it was submitted.
    assert run_check(resolved, devices=0).precision == expected
    assert checks.check(make(world_size=1, precision="fp16"), environ).precision == "fp16"


def test_the_identity_holds_the_resolved_precision_and_tf32_only_where_it_is_on() -> None:
    def key(**changes: Any) -> str:
        devices = changes.pop("devices", 0)
        return identity(run_check(make(world_size=1, **changes), devices=devices), "corpus", "tokenizer")

    assert key() == key(precision="fp32") == key(precision="fp32", devices=1)
    assert key(devices=1) == key(precision="bf16") != key()
    assert key(precision="fp32", tf32=True, devices=1) not in (key(), key(devices=1))


def test_a_memory_snapshot_needs_a_gpu_and_is_no_part_of_the_identity() -> None:
    with pytest.raises(InputError, match=r"memory_snapshot: true is of the .* fix: memory_snapshot=false"):
        run_check(make(memory_snapshot=True))
    assert not differing_keys(make(), make(memory_snapshot=True))


def test_tf32_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"tf32: true is a number format of GPUs.* has none; fix: tf32=false"
    ):
        run_check(make(tf32=True))
    monkeypatch.setattr(gpus_of_machine, "present", lambda: (OLD,))
    with pytest.raises(InputError, match="has an older one"):
        checks.check(make(tf32=True, world_size=1), {})


def launched(world: int, rank: int = 0) -> dict[str, str]:
    return {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def test_the_launcher_decides_and_disagreement_names_both() -> None:
    assert run_check(make(), launched(4, 3), worker=True).world_size == 4
    assert run_check(make(world_size=4), launched(4), worker=True).world_size == 4
    with pytest.raises(InputError) as caught:
        run_check(make(world_size=2), launched(4), worker=True)
    assert "world_size: 2 disagrees with the launcher, which started 4 processes" in str(caught.value)
    assert "WORLD_SIZE=4" in str(caught.value)


def test_a_worker_without_a_launcher_is_alone() -> None:
    # Devices do not count: nobody started a process for them.
    assert run_check(make(), devices=4, worker=True).world_size == 1
    with pytest.raises(InputError, match=r"world_size: 2 disagrees .* started 1 process \(no WORLD_SIZE\)"):
        run_check(make(world_size=2), worker=True)


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: two"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "contradict each other"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "precision: fp32 disagrees"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
    ],
)
def test_what_the_launcher_was_told_is_not_dropped(environ: dict[str, str], part: str) -> None:
    with pytest.raises(InputError) as caught:
        run_check(make(), environ, worker=True)
    assert part in str(caught.value)


def test_accelerates_precision_may_agree() -> None:
    environ = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert run_check(make(precision="bf16"), environ, worker=True).precision == "bf16"


def test_runs_dir_must_be_writable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"runs_dir: .*is a file"):
        run_check(make(runs_dir=str(file / "runs")))


def test_a_local_model_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        run_check(make(model__path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, "hidden_size": 256}))
    assert model_facts.parameter_count(make(model__path=str(tmp_path)).model) > 0
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"without model_type"):
        run_check(make(model__path=str(tmp_path)))


def test_learning_rate_and_its_source() -> None:
    given = run_check(make(optimizer__lr=0.5)).optimizer
    assert (given.lr, given.lr_source, given.lr_tuned) == (0.5, "given", True)
    small = run_check(make(optimizer__name="galore", model__config={**LLAMA, "num_hidden_layers": 40}))
    assert small.optimizer.lr_tuned is False
    assert "no default for galore at" in checks.warnings(small)[0]
    assert checks.warnings(run_check(make(optimizer__lr=0.5))) == []


def test_the_learning_rate_beside_a_rule_comes_with_the_default() -> None:
    tuned = run_check(make(optimizer__name="muon"))
    assert tuned.optimizer.lr_tuned is True
    assert tuned.optimizer.options["aux_lr"] == 0.016
    assert run_check(tuned).optimizer == tuned.optimizer
    assert run_check(make(optimizer__name="muon", optimizer__lr=0.02)).optimizer.options["aux_lr"] == 3e-4
    given = run_check(make(optimizer__name="muon", optimizer__aux_lr=0.5))
    assert given.optimizer.options["aux_lr"] == 0.5


def test_learning_rates_of_the_published_sizes() -> None:
    row = derived_defaults.default_learning_rate("galore", 58_073_600)
    assert row is not None
    assert (row.lr, row.tuned, row.warning) == (0.01, True, None)
    large = derived_defaults.default_learning_rate("galore", 6_738_415_616)
    assert large is not None
    assert (large.lr, large.warning) == (0.005, None)
    between = derived_defaults.default_learning_rate("galore", 5_000_000_000)
    assert between is not None
    assert between.lr == 0.005
    assert between.warning is not None
    assert derived_defaults.default_learning_rate("nothing", 1) is None


def test_every_preset_has_a_learning_rate() -> None:
    from optimizers.presets import PRESETS

    assert set(derived_defaults.LEARNING_RATES) == set(PRESETS)
    for rows in derived_defaults.LEARNING_RATES.values():
        for low, high in itertools.pairwise(rows):
            assert low.largest < high.smallest
