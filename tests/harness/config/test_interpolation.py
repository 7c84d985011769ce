"""A configuration takes from the environment only what is on the list, whatever way is tried."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from harness.config import compose
from harness.config.cluster import load as load_cluster
from harness.errors import InputError

SECRET = "3f1c0de7c0ffee5ec2e7"

LEAKS = [
    "${oc.env:WANDB_API_KEY}",
    "${oc.env:WANDB_API_KEY,none}",
    "${ oc.env : WANDB_API_KEY }",
    "${oc.env:OPTBENCH_TOKEN}",
    "${oc.env:MY_VARIABLE}",
    "x${oc.env:WANDB_API_KEY}x",
    "${oc.decode:${oc.env:WANDB_API_KEY}}",
    "${oc.decode:'${oc.env:WANDB_API_KEY}'}",
    "${oc.create:'{a: ${oc.env:WANDB_API_KEY}}'}",
    "${oc.select:nothing,${oc.env:WANDB_API_KEY}}",
    "${oc.deprecated:seed}",
    "${oc.dict.keys:model}",
    "${${name}:WANDB_API_KEY}",
    "${hydra:runtime.cwd}",
    "${hydra:job.env_copy}",
    "${my.resolver:x}",
    "\\\\${oc.env:WANDB_API_KEY}",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "OPTBENCH_TOKEN", "MY_VARIABLE"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OPTBENCH_TEAM", "vision")


@pytest.mark.parametrize("text", LEAKS)
@pytest.mark.parametrize("place", ["run.yaml", "configs/experiment/e.yaml", "configs/cluster/c.yaml", "word"])
def test_nothing_else_is_read(text: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / place
    if place != "word":
        path.parent.mkdir(parents=True, exist_ok=True)
        is_cluster = "cluster" in place
        head = "account" if is_cluster else "# @package _global_\nwandb:\n  project"
        path.write_text(f"{head}: {yaml.safe_dump(text)}")
    words = {"run.yaml": [str(path)], "word": [f"wandb.project={text}"]}.get(place, ["experiment=e"])
    try:
        value = (
            load_cluster(["cluster=c"]).account if "cluster" in place else compose.load(words).wandb.project
        )
    except InputError as error:
        value = str(error)
    assert SECRET not in str(value)


def test_a_defaults_list_reads_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /model: ${oc.env:WANDB_API_KEY}\n"
    (tmp_path / "configs/experiment/e.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        compose.load(["experiment=e"])
    assert SECRET not in str(caught.value)


def test_what_is_allowed_is_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "wandb: {project: 'a-${oc.env:OPTBENCH_TEAM}', entity: '${oc.env:OPTBENCH_NONE,us}'}\n"
        "name: ${optimizer.name}-${seed}\ngroup: \\${x}\nlog_every: ${eval.every}\neval: {every: 4}\n"
    )
    config = compose.load([str(path), "optimizer=sumo", "seed=3", "eval.every=5"])
    assert (config.wandb.project, config.wandb.entity) == ("a-vision", "us")
    assert (config.name, config.group, config.log_every) == ("sumo-3", "${x}", 5)


def test_other_programs_keep_their_resolvers() -> None:
    compose.load(["optimizer=sumo"])
    assert OmegaConf.create({"a": "${oc.env:WANDB_API_KEY}"}).a == SECRET


@pytest.mark.parametrize("text", ["${", "${}", "${nope}", "${group}", "${oc.env:OPTBENCH_NONE}", "a${b"])
def test_a_broken_interpolation_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"group: '{text}'\n")
    for words in ([str(path)], [f"group={text}"], [f'group="{text}"']):
        with pytest.raises(InputError, match="group"):
            compose.load(words)
