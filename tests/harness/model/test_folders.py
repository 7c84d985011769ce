"""`model.path`: what a folder brings, which overrides fit its weights, what is refused, and identity by content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import model
from harness.config import checks, compose
from harness.config.identity import identity
from harness.config.model_facts import facts
from harness.config.schema import ModelConfig, RunConfig
from harness.errors import InputError

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 3},
    "qwen3": {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    "gpt2": {"vocab_size": 300, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256},
    "mixtral": {**SIZES, "num_key_value_heads": 3, "num_local_experts": 4},
    "qwen3_moe": {
        **SIZES,
        "num_key_value_heads": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "olmo2": {**SIZES, "tie_word_embeddings": True},
}


def _saved(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    network: Any = model.build(ModelConfig(model_type=kind, config=FAMILIES[kind]), seed=3)
    network.to(dtype).save_pretrained(folder, **more)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("folders")
    return {kind: _saved(base / f"my-{kind}", kind) for kind in FAMILIES}


def _load(path: Path, *words: str) -> RunConfig:
    return compose.load([f"model.path={path}", "data.vocab_size=300", *words])


def _checked(path: Path, *words: str) -> RunConfig:
    return checks.check(_load(path, *words), {}, devices=0)


def _weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().float() for name, p in network.named_parameters()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_brings_type_shape_name_and_weights(kind: str, folders: dict[str, Path]) -> None:
    config = _checked(folders[kind])
    assert (config.model.name, config.model.model_type) == (f"my-{kind}", kind)
    for key, value in FAMILIES[kind].items():
        assert config.model.config[key] == value, key
    network = model.build(config.model, seed=0)
    assert facts(config.model).parameters == model.count_parameters(network)
    original = model.build(ModelConfig(model_type=kind, config=FAMILIES[kind]), seed=3)
    loaded = _weights(network)
    assert all(torch.equal(weight, loaded[name]) for name, weight in _weights(original).items())


def test_the_record_of_a_run_describes_the_model_without_its_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["qwen3"], tmp_path / "gone")
    config = _checked(tmp_path / "gone")
    (tmp_path / "config.yaml").write_text(compose.to_yaml(config))
    key = identity(config, "corpus", "tokenizer")
    again = compose.load_file(tmp_path / "config.yaml")
    assert identity(checks.check(again, {}, devices=0), "corpus", "tokenizer") == key
    replayed = checks.check(compose.load([str(tmp_path / "config.yaml")]), {}, devices=0)
    assert replayed.model == config.model
    assert identity(replayed, "corpus", "tokenizer") == key
    shutil.rmtree(tmp_path / "gone")
    again = compose.load_file(tmp_path / "config.yaml")
    shapes = {name: p.shape for name, p in model.build(again.model, seed=0, weights=False).named_parameters()}
    original = model.build(ModelConfig(path=str(folders["qwen3"])), seed=0)
    assert shapes == {name: p.shape for name, p in original.named_parameters()}
    with pytest.raises(InputError, match="is not a folder"):
        model.build(again.model, seed=0)


def test_forms_of_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = _weights(model.build(ModelConfig(path=str(folders["llama"])), seed=0))
    sharded = _saved(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert facts(ModelConfig(path=str(sharded))).parameters == sum(w.numel() for w in whole.values())
    assert all(
        torch.equal(weight, whole[name])
        for name, weight in _weights(model.build(_checked(sharded).model, seed=0)).items()
    )
    rounded = model.build(_checked(_saved(tmp_path / "bf16", dtype=torch.bfloat16)).model, seed=0)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    assert all(
        torch.equal(weight.bfloat16().float(), _weights(rounded)[name]) for name, weight in whole.items()
    )
    (sharded / sorted(sharded.glob("*.safetensors"))[1].name).unlink()
    with pytest.raises(InputError, match=r"lacks model-00002-of-\d+\.safetensors"):
        _load(sharded)


def test_weights_of_the_body_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """A tied head is the embedding; an untied one would be random."""
    for kind in ("gpt2", "llama"):
        network: Any = model.build(ModelConfig(path=str(folders[kind])), seed=0)
        network.base_model.save_pretrained(tmp_path / kind)
    loaded = _weights(model.build(ModelConfig(path=str(tmp_path / "gpt2")), seed=0))
    whole = _weights(model.build(ModelConfig(path=str(folders["gpt2"])), seed=0))
    assert all(torch.equal(weight, whole[name]) for name, weight in loaded.items())
    with pytest.raises(InputError, match=r"lacks 1 weights .*lm_head"):
        model.build(ModelConfig(path=str(tmp_path / "llama")), seed=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.config.hidden_size=64"], r"hidden_size: 64 does not fit the weights .* which have 48"),
        (["model.config.num_hidden_layers=1"], "num_hidden_layers: 1 does not fit"),
        (["model.config.num_attention_heads=3"], "num_attention_heads: 3 does not fit"),
        (["model.config.tie_word_embeddings=true"], "tie_word_embeddings: True does not fit"),
        (["model.config.hiden_size=48"], r"did you mean model\.config\.hidden_size"),
        (["model.config.intermediate_size=x"], "intermediate_size: x"),
        (["model.model_type=gpt2"], "is not the type of the model in .* which is llama"),
        (["model=qwen3_tiny"], "leave model=qwen3_tiny out"),
        (["model=llama_tiny"], r"model\.config\.vocab_size is 4096 there and 300 in the folder"),
        (["seq_len=512"], "longer than the model's 256 positions"),
        (["data.vocab_size=400"], r"larger than the model's vocabulary of 300; fix: data\.vocab_size=300$"),
    ],
)
def test_what_does_not_fit_the_weights_is_refused(
    words: list[str], said: str, folders: dict[str, Path]
) -> None:
    kept = [word for word in ("data.vocab_size=300",) if not any(w.startswith("data.vocab") for w in words)]
    with pytest.raises(InputError, match=said):
        checks.check(compose.load([f"model.path={folders['llama']}", *kept, *words]), {}, devices=0)


def test_overrides_that_fit_are_laid_over_the_folder(folders: dict[str, Path]) -> None:
    words = (
        "model.config.max_position_embeddings=512",
        "model.config.attention_dropout=0.1",
        "model.name=mine",
    )
    config = _checked(folders["llama"], *words, "model.config.rope_parameters.rope_theta=50000.0")
    network: Any = model.build(config.model, seed=0)
    assert config.model.name == "mine"
    assert network.config.max_position_embeddings == 512
    assert network.config.attention_dropout == 0.1
    assert network.config.rope_parameters["rope_theta"] == 50000.0
    assert network.config.num_attention_heads == 6
    # A shape that is repeated is not a conflict, under either of its names.
    assert _checked(folders["gpt2"], "model.config.hidden_size=48").model.config["n_embd"] == 48


def test_a_preset_of_the_same_model_may_be_named(tmp_path: Path) -> None:
    network: Any = model.build(compose.load(["model=qwen3_tiny"]).model, seed=1)
    network.save_pretrained(tmp_path / "trained")
    config = compose.load(["model=qwen3_tiny", f"model.path={tmp_path / 'trained'}"])
    assert config.model.model_type == "qwen3"
    assert config.model.name == "trained"


def test_a_preset_of_ones_own_may_hold_a_path(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs" / "model").mkdir(parents=True)
    text = f"name: started\npath: {folders['llama']}\nconfig: {{attention_dropout: 0.25}}\n"
    (tmp_path / "configs" / "model" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = compose.load(["model=mine"])
    assert config.model.name == "started"
    assert config.model.config["attention_dropout"] == 0.25
    assert config.model.config["num_attention_heads"] == 6


def _without(folder: Path, source: Path, *names: str, **texts: str) -> Path:
    shutil.copytree(source, folder)
    for name in names:
        (folder / name).unlink()
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("names", "texts", "said"),
    [
        (["model.safetensors"], {}, r"holds no weights \(model\.safetensors\)"),
        (
            ["model.safetensors"],
            {"pytorch_model__bin": "x"},
            "save_pretrained, which writes model.safetensors",
        ),
        (["model.safetensors"], {"model__h5": "x"}, r"as model\.h5 only"),
        (["config.json"], {"adapter_config__json": "{}"}, "holds an adapter"),
        ([], {"adapter_config__json": "{}"}, "holds an adapter"),
        (["config.json"], {}, r"has no config\.json"),
        ([], {"config__json": "{"}, r"unreadable config\.json"),
        ([], {"config__json": "[]"}, "not a JSON object"),
        ([], {"config__json": '{"model_type": "llama", "quantization_config": {"bits": 4}}'}, "quantized"),
        ([], {"config__json": '{"model_type": "of_ones_own"}'}, "is not a model type"),
        (
            [],
            {"config__json": '{"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}'},
            "trust_remote_code=true",
        ),
        (
            ["model.safetensors"],
            {"model__safetensors__index__json": "[]"},
            "damaged model.safetensors.index.json",
        ),
    ],
)
def test_folders_that_are_no_model_are_one_clear_line(
    names: list[str], texts: dict[str, str], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        _checked(_without(tmp_path / "folder", folders["llama"], *names, **texts))
    assert caught.value.key in ("model.path", "model.model_type")
    assert "\n" not in str(caught.value)


def test_a_name_of_the_hub_says_how_to_fetch_it() -> None:
    with pytest.raises(InputError, match=r"hf download org/Some-1\.5B --local-dir Some-1\.5B"):
        checks.check(compose.load(["model.path=org/Some-1.5B"]), {}, devices=0)


def test_a_folder_that_lacks_weights_of_its_model_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = _without(tmp_path / "folder", folders["llama"])
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layers.1.mlp" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 3 weights .*layers\.1\.mlp"):
        model.build(_load(folder).model, seed=0)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"can't be loaded"):
        model.build(_load(folder).model, seed=0)


def test_identity_is_that_of_the_contents(folders: dict[str, Path], tmp_path: Path) -> None:
    def key(folder: Path, *words: str) -> str:
        return identity(_checked(folder, "optimizer.lr=0.1", *words), "corpus", "tokenizer")

    first = key(_without(tmp_path / "a", folders["llama"]))
    assert key(_without(tmp_path / "b", folders["llama"])) == first
    # One bit in the middle of the file.
    file = tmp_path / "b" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert key(tmp_path / "b") != first
    assert key(tmp_path / "a", "model.config.attention_dropout=0.1") != first
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**settings, "transformers_version": "4.0.0"}))
    assert key(tmp_path / "a") == first
    (tmp_path / "a" / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-5}))
    assert key(tmp_path / "a") != first


def test_the_default_learning_rate_is_that_of_the_folders_size(tmp_path: Path) -> None:
    config = {**SIZES, "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 6}
    network: Any = model.build(ModelConfig(model_type="llama", config=config), seed=0)
    network.save_pretrained(tmp_path / "llama-30m")
    assert 29e6 < model.count_parameters(network) < 31e6
    for optimizer in ("adamw", "sumo", "galore"):
        checked = _checked(tmp_path / "llama-30m", f"optimizer={optimizer}")
        assert checked.optimizer.lr_tuned is False
        assert str(checked.optimizer.lr_source).startswith("nearest size, random weights: ")
        assert "tuned at 1.8M" not in str(checked.optimizer.lr_source)
        said = "\n".join(checks.warnings(checked))
        assert "at 29." in said or "at 30." in said
        assert "starts from trained weights" in said
        assert "optimizer.lr" not in str(
            checks.warnings(_checked(tmp_path / "llama-30m", "optimizer.lr=0.1"))
        )


def test_a_folders_tokenizer_comes_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _without(tmp_path / "folder", folders["llama"], tokenizer__json="{}")
    assert compose.load([f"model.path={folder}"]).data.tokenizer == str(folder)
    assert compose.load([f"model.path={folder}", "data=c4"]).data.tokenizer == str(folder)
    assert compose.load([f"model.path={folder}", "data.tokenizer=bpe"]).data.tokenizer == "bpe"
    assert compose.load([f"model.path={folders['llama']}"]).data.tokenizer == "bpe"
    said = "\n".join(checks.warnings(_checked(folders["llama"])))
    assert "holds no tokenizer" in said


CODE = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "of_ones_own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def _with_code(folder: Path, source: Path, marker: Path, kind: str) -> Path:
    shutil.copytree(source, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": kind,
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder


def _never(*args: Sequence[object]) -> str:
    raise AssertionError("asked on the terminal")


def test_a_folders_code_runs_only_where_that_was_asked_for(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", _never)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"
    known = _with_code(tmp_path / "known", folders["llama"], marker, "llama")
    network: Any = model.build(_checked(known).model, seed=0)
    assert type(network).__name__ == "LlamaForCausalLM"
    own = _with_code(tmp_path / "own", folders["llama"], marker, "of_ones_own")
    with pytest.raises(InputError, match="trust_remote_code=true"):
        _checked(own)
    with pytest.raises(InputError, match="is not a model type"):
        model.build(ModelConfig(path=str(own)), seed=0)
    assert not marker.exists()
    config = _checked(own, "trust_remote_code=true")
    trusted: Any = model.build(config.model, seed=0, trust_remote_code=True)
    assert type(trusted).__name__ == "OwnModel"
    assert marker.read_text() == "executed"
