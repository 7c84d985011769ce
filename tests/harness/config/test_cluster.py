"""The cluster group: presets, one's own files, and refusals that say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import cluster
from harness.config.compose import load as load_run
from harness.config.sources import options
from harness.errors import InputError


def test_presets_compose_and_words_win() -> None:
    assert {"local_ci", "generic_gpu", "preemptible", "container"} <= set(options("cluster"))
    for name in options("cluster"):
        assert cluster.load([f"cluster={name}"]).name == name
    config = cluster.load(
        ["cluster.time=01:30:00", "cluster=preemptible", "cluster.nodes=3", "cluster.env.A=007"]
    )
    assert (config.gpus, config.world_size, config.idle_attempts) == (8, 24, 3)
    assert cluster.time_limit(config) == "0-01:30:00"
    assert config.env == {"A": "007"}


@pytest.mark.parametrize(
    ("time", "written"),
    [("90m", "0-01:30:00"), ("1-12:00:00", "1-12:00:00"), ("7200", "0-02:00:00"), ("36h", "1-12:00:00")],
)
def test_times_as_sbatch_takes_them(time: str, written: str) -> None:
    assert cluster.time_limit(cluster.load([f"cluster.time={time}"])) == written


def test_an_own_file_inherits_from_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "configs" / "cluster"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "defaults: [generic_gpu, _self_]\nname: mine\npartition: gpu\ntime: 4:00:00\nenv: {A: yes, B: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = cluster.load(["cluster=mine"])
    # YAML reads 4:00:00 as 14400, and yes as true.
    assert (config.partition, config.gpus, cluster.time_limit(config)) == ("gpu", 8, "0-04:00:00")
    assert config.env == {"A": "true", "B": "1"}
    assert load_run([]).model.name == "llama_tiny"
    (own / "mine.yaml").write_text("name: mine\npartiton: gpu\n")
    with pytest.raises(InputError, match=r"mine\.yaml; did you mean cluster\.partition"):
        cluster.load(["cluster=mine"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["cluster=generic_gpuu"], "did you mean generic_gpu?"),
        (["cluster.partiton=x"], "did you mean cluster.partition?"),
        (["cluster.nodes=0"], "allowed: a whole number ≥ 1"),
        (["cluster.gpus=many"], "cluster.gpus: many is wrong"),
        (["cluster.time=soon"], "is not a duration"),
        (["cluster.time=60s"], "is not longer than cluster.grace_s"),
        (["cluster.extra.output=x"], "is decided by the script"),
        (["cluster.env.HF_TOKEN=x"], "export HF_TOKEN in your shell"),
        (["cluster.env={A-B:1}"], "is not the name of an environment variable"),
        (["cluster.preflight=3"], "is a group of keys"),
        (["cluster.preflight.secnds=3"], "did you mean cluster.preflight.seconds?"),
        (["cluster.nodes=1", "cluster.nodes=2"], "are two values for one key"),
        (["cluster.gpus=0", "cluster.gpu_type=h100"], "cluster.gpu_type: h100 without GPUs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(words: list[str], part: str) -> None:
    with pytest.raises(InputError) as caught:
        cluster.load(words)
    assert part in str(caught.value)


def test_words_of_the_cluster_are_told_from_the_rest() -> None:
    words = ["model=llama_9m", "cluster=local_ci", "+cluster.nodes=2", "name=cluster", "cluster"]
    assert cluster.split(words) == (
        ["cluster=local_ci", "+cluster.nodes=2"],
        ["model=llama_9m", "name=cluster", "cluster"],
    )
