"""The plan against what real ranks hold and send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness import cli
from harness.config import checks, compose
from harness.config.gpus import Gpu
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.plan import activations, command, estimate
from harness.plan.command import main
from harness.plan.estimate import plan
from tests.harness.running import small, write_documents

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

WORDS = ["wandb.mode=disabled"]


def configured(*words: str) -> Any:
    given = {word.partition("=")[0] for word in words}
    defaults = [word for word in ("model=llama_tiny", "batch_size=8") if word.partition("=")[0] not in given]
    return checks.check(compose.load([*WORDS, *defaults, *words]), environ={})


def real(rank: int, words: list[str]) -> dict[str, Any]:
    """Runs on each rank: two optimizer steps of the very model on random gradients."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import optimizers
    from harness import model
    from harness.optimizer import shard_axes
    from harness.plan.simulated_rank import shards_of

    config = configured(*words)
    network = model.build(config.model, seed=0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    named: list[tuple[str, Any]] = []
    if config.engine.name == "fsdp2":
        axes = shard_axes(config, network, shards_of(config))
        for name, p in network.named_parameters():
            cut = distribute_tensor(p.detach(), mesh, [Shard(axes.get(name, 0))])
            named.append((name, torch.nn.Parameter(cut)))
    else:
        named = list(network.named_parameters())
    options = {**config.optimizer.options, "lr": config.optimizer.lr}
    if config.engine.name == "ddp":
        options |= {"process_group": dist.group.WORLD, "work": config.engine.optimizer_work}
    optimizer: Any = optimizers.build(config.optimizer.name, named, modules=network, **options)
    optimizer.found_inf = torch.zeros(())  # as the engines of these layouts do
    sent = []
    for _ in range(2):
        for _, p in named:
            p.grad = torch.randn_like(p)
        before = sum(optimizer.bytes_sent().values())
        optimizer.step()
        sent.append(sum(optimizer.bytes_sent().values()) - before)
    return {"sent": sent, "state": optimizer.state_bytes()}


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer=sumo", "engine=fsdp2"],
        ["optimizer=galore", "engine=fsdp2"],
        ["optimizer=muon", "engine=fsdp2"],
        ["optimizer=sumo", "engine=ddp", "engine.optimizer_work=split"],
        ["optimizer=sumo", "engine=ddp"],
    ],
    ids=" ".join,
)
def test_the_plan_is_what_two_ranks_hold_and_send(two_ranks: RankPool, words: list[str]) -> None:
    """Byte for byte, the worst of the ranks: an ordinary step and one with a refresh."""
    words = [*words, "world_size=2"]
    found = plan(configured(*words))
    results = two_ranks.run(real, words)
    for kind in results[0]["state"]:
        assert found["per_rank"][f"optimizer/{kind}"] == max(r["state"][kind] for r in results)
    traffic = found["traffic_per_step"]
    assert traffic["optimizer"] == round(max(r["sent"][1] for r in results))
    refresh = traffic.get("optimizer/refresh", traffic["optimizer"])
    assert refresh == round(max(r["sent"][0] for r in results))


def held(rank: int, words: list[str]) -> dict[str, int]:
    """Runs on each rank: the bytes that the engine itself reports after one step of a real run."""
    from harness import engines
    from harness.loop import forward_backward
    from harness.preparation import prepare
    from harness.run import assemble

    prepared = prepare(words, say=lambda text: None, worker=True, writes_folder=False)
    engine = engines.start(prepared.config)
    run = assemble(prepared, engine)
    run.stop.restore()
    forward_backward(run, run.loader.micro_batches(0), weight=1.0)
    engine.step(prepared.config.max_grad_norm)
    buffers = sum(b.numel() * b.element_size() for b in run.model.buffers())
    optimizer: Any = run.optimizer
    state = {f"optimizer/{kind}": size for kind, size in optimizer.state_bytes().items()}
    found = {**engine.memory_bytes(), **state}
    engine.release()
    # Rotary frequencies are not planned.
    return {**found, "weights": found["weights"] - buffers}


ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("engine", "optimizer", "adapter"),
    [
        pytest.param(engine, optimizer, adapter, marks=() if is_quick else pytest.mark.slow)
        for engine in ENGINES
        for optimizer in ("sumo", "muon", "adamw")
        for adapter in ("null", "lora")
        for is_quick in [
            (engine, optimizer, adapter) in (("fsdp2", "sumo", "null"), ("zero3", "adamw", "lora"))
        ]
    ],
)
def test_the_plan_is_what_engines_report(
    engine: str, optimizer: str, adapter: str, precision: str, tmp_path: Path, two_ranks: RankPool
) -> None:
    """Byte for byte, but for padding: ZeRO rounds every group up to whole elements of all ranks."""
    asked = [f"engine={engine}", f"optimizer={optimizer}", f"precision={precision}", "world_size=2"]
    asked += [f"model.adapter={adapter}"]
    if optimizer != "adamw":
        asked.append("optimizer.lr=0.01")
    words = small(write_documents(tmp_path), tmp_path, *asked, "micro_batch_size=2")
    planned = plan(checks.check(compose.load(words), environ={}))["per_rank"]
    real_bytes = two_ranks.run(held, words)
    for kind in real_bytes[0]:
        largest = max(found[kind] for found in real_bytes)
        if engine == "zero1" and kind == "gradients":
            # At the step DeepSpeed has reduced them to the shard; the plan has the whole ones of the backward pass.
            largest *= 2
        assert planned[kind] == pytest.approx(largest, rel=0, abs=64 if engine.startswith("zero") else 0), (
            kind
        )


def test_a_cluster_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "model=llama_60m", "optimizer=sumo", "engine=fsdp2", "--world-size", "32", "--json"]
    assert cli.main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["world_size"] == 32
    assert document["fits"] is True
    assert document["total_bytes"] == sum(document["per_rank"].values())
    # In fp32, on the devices that are shown by default.
    assert set(document["step_time_s"]) == {"A100", "H100", "H200", "B200", "RTX 4090", "MI300X"}
    # 58.07 M parameters in fp32 over 32 ranks, cut evenly but for norms.
    assert document["per_rank"]["weights"] == pytest.approx(58.07e6 * 4 / 32, rel=0.01)


def test_what_fully_shard_sends_is_what_was_counted_once() -> None:
    """Counted at the dispatcher on 64 ranks of torch's fake process group, bf16 weights, fp32 reduction, whole
    buffers: all-gathers of 160 MiB, reduce-scatters of 222 MiB."""
    words = [
        "model=llama_60m",
        "optimizer=adamw",
        "precision=bf16",
        "engine=fsdp2",
        "world_size=64",
        "batch_size=64",
    ]
    sent = plan(configured(*words))["traffic_per_step"]
    assert sent["weights"] == pytest.approx(160 * 2**20 * 63 / 64, rel=0.01)
    assert sent["gradients"] == pytest.approx(222 * 2**20 * 63 / 64, rel=0.01)


def test_muon_divides_its_moments_and_sums_to_the_formula() -> None:
    """mn numbers of each matrix, whole at owners: 4·mn·(W-1)/W² there and as much back, on average."""
    one = plan(configured("optimizer=muon", "engine=fsdp2", "world_size=2"))
    whole = plan(configured("optimizer=muon", "engine=ddp", "world_size=2"))
    assert whole["traffic_per_step"]["optimizer"] == 0
    assert one["per_rank"]["optimizer/moment"] == pytest.approx(
        whole["per_rank"]["optimizer/moment"] / 2, rel=0.1
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--world-size", "many"],
        ["--world-size", "9" * 5000],
        ["--world-size"],
        ["--device-memory", "much"],
        ["--device-memory=0"],
        ["--memory", "80 bananas"],
        ["--device", "H1000"],
        ["--device", "A100 MIG 1g.10gb"],
        ["--network", "fast"],
        ["device_memory=80 bananas"],
    ],
)
def test_bad_input(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"--world-size|--memory|--device|--network"):
        main(words)


def kept_in_a_real_pass(config: Any) -> tuple[int, int]:
    """Oracle: bytes that autograd keeps of a real forward pass of the whole model; those of logits apart."""
    import torch

    from harness import model

    network = model.build(config.model, seed=0)
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    ids = torch.zeros(config.micro_batch_size, config.seq_len, dtype=torch.int64)
    logits_size = ids.numel() * config.model.config["vocab_size"]
    body: dict[int, torch.Tensor] = {}
    logits: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            place = logits if tensor.numel() == logits_size else body
            place[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output: Any = network(input_ids=ids).logits
        loss = model.loss_sum(output, ids)
    sizes = [sum(t.untyped_storage().nbytes() for t in place.values()) for place in (body, logits)]
    del loss
    return sizes[0], sizes[1] + 2 * output.numel() * 4


@pytest.mark.parametrize("name", ["llama_tiny", "gpt2_tiny", "qwen3_tiny"])
def test_activations_are_what_autograd_keeps(name: str) -> None:
    """Counted on fake tensors at two depths and two batch sizes, against one real pass at another of each.

    The fake attention kernel lays its output out in another order, which costs one copy a layer.
    """
    config = configured(f"model={name}", "batch_size=3", "seq_len=32", "world_size=1")
    found = plan(config)["activations"]
    body, logits = kept_in_a_real_pass(config)
    assert found["without_checkpointing"] == pytest.approx(body, rel=0.06)
    assert found["logits"] == logits
    assert found["with_checkpointing"] < body / 2


def test_selective_checkpointing_keeps_attention_and_every_second_product() -> None:
    """A further layer keeps of each token its input, query, value, attention with its log-sum-exp, gate and down."""
    words = ["batch_size=3", "seq_len=32", "world_size=1", "model.activation_checkpointing=selective"]
    config = configured(*words)
    sizes = config.model.config
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    keys = hidden // heads * sizes.get("num_key_value_heads", heads)
    layers = sizes["num_hidden_layers"]
    kept = [activations.count(config, depth).selective for depth in (layers, layers + 1)]
    per_token = hidden + hidden + keys + hidden + heads + inner + hidden
    assert kept[1] - kept[0] == 4 * 3 * 32 * per_token
    found = plan(config)
    assert found["per_rank"]["activations"] == kept[0]
    assert (
        found["activations"]["with_checkpointing"] < kept[0] < found["activations"]["without_checkpointing"]
    )


@pytest.mark.parametrize("engine", ["single", "fsdp2", "zero1", "zero3"])
def test_state_of_options_around_a_rule(engine: str) -> None:
    """Moments in bf16 are half as large, and an average as large as the weights in fp32."""
    where = [f"engine={engine}", f"world_size={1 if engine == 'single' else 2}", "optimizer=sumo"]
    usual = plan(configured(*where))["per_rank"]
    options = [
        "optimizer.state_dtype=bfloat16",
        "optimizer.average_decay=0.99",
        "optimizer.weight_norm=fixed",
    ]
    found = plan(configured(*where, *options))["per_rank"]
    for kind in ("optimizer/moment", "optimizer/aux"):
        assert found[kind] * 2 == usual[kind]
    assert found["optimizer/basis"] == usual["optimizer/basis"]

    assert found["optimizer/average"] > 0
    if engine in ("single", "fsdp2"):
        assert found["optimizer/average"] == usual["weights"]
    assert found["optimizer/weight_norm"] % 8 == 0


def test_what_fits_depends_on_checkpointing_and_memory() -> None:
    words = ("batch_size=64", "seq_len=512", "world_size=1")
    needs = plan(configured(*words))["needed_bytes"]
    whole = plan(configured(*words), needs - 1)
    less = plan(configured(*words, "model.activation_checkpointing=true"), needs - 1)
    assert (whole["fits"], less["fits"]) == (False, True)
    assert plan(configured(*words), needs)["fits"] is True
    assert whole["per_rank"]["activations"] == less["activations"]["without_checkpointing"]
    assert plan(configured(*words))["fits"] is None


def test_a_loss_in_chunks_needs_a_fraction_of_whole_logits() -> None:
    """What the operator says of itself, and 16 times the tokens in place of whole logits as the control."""
    words = (
        "model=llama_60m",
        "precision=bf16",
        "engine=fsdp2",
        "batch_size=32",
        "seq_len=1024",
        "world_size=1",
    )
    chunks = plan(configured(*words))["activations"]["logits"]
    whole = plan(configured(*words, "model.loss_chunk=null"))["activations"]["logits"]
    logits = 32 * 1024 * 32000
    assert whole == pytest.approx(12 * logits, rel=0.1)
    # 2,048 tokens at a time in fp32 and bf16; hidden states and their gradient in bf16; the head's gradient in fp32.
    assert chunks == 2048 * 32000 * 6 + 2 * 32 * 1024 * 512 * 2 + 32000 * 512 * 4


def test_any_depth_is_planned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.plan import estimate

    words = ("optimizer=sumo", "engine=fsdp2", "world_size=2", "model.config.num_hidden_layers=12")
    whole = plan(configured(*words))
    monkeypatch.setattr(estimate, "MAX_DEPTH", 8)
    continued = plan(configured(*words))
    assert continued["depths_looked_at"] == [4, 8]
    for group in ("per_rank", "traffic_per_step"):
        for kind, size in whole[group].items():
            assert continued[group][kind] == pytest.approx(size, rel=0.02), kind
    monkeypatch.undo()
    deep = plan(configured("model.config.num_hidden_layers=1024", "world_size=1"), 10**9)
    assert deep["fits"] is False
    with pytest.raises(InputError, match="at most 1,024"):
        configured("model.config.num_hidden_layers=100000000", "world_size=1")


def test_a_named_device_decides_as_its_driver_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "model=llama_350m",
        "optimizer=muon",
        "batch_size=64",
        "seq_len=1024",
        "world_size=8",
        "engine=ddp",
    ]
    loaded = compose.load(words)
    here = checks.check(loaded, {}, [Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 << 30)] * 8, memory=24 << 30)
    checked: list[RunConfig] = []
    monkeypatch.setattr(command, "json_document", lambda **facts: "")
    monkeypatch.setattr(estimate, "plan", lambda config, *rest, **options: checked.append(config) or {})
    for device in ("4090", "v100", "h100"):
        assert command.main([*words, "--device", device, "--json"]) == 0
    rtx, volta, hopper = checked
    assert rtx.engine.optimizer_work == here.engine.optimizer_work
    assert (rtx.precision, volta.precision, hopper.precision) == ("bf16", "fp32", "bf16")


def test_a_run_that_fits_nowhere_is_planned_on_the_gpus_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 10 << 30
    monkeypatch.setattr(command, "visible_gpus", lambda: [Gpu("NVIDIA H100 80GB HBM3", (9, 0), memory)])
    monkeypatch.setattr(command, "device_memory", lambda: memory)
    assert cli.main(["plan", "model=llama_1b", "optimizer=adamw", "world_size=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_bytes"] > memory


def test_progress_and_verdict_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "model=llama_tiny", "precision=bf16", "--memory", "24GB"]) == 0
    # Wrapped at the width of the terminal.
    text = " ".join(capsys.readouterr().out.split())
    assert "Fits in 24 GB: yes" in text
    assert "in total" in text
    assert "activation checkpointing on" in text
    assert all(name in text for name in ("H100", "MI300X", "5% fragmentation", "refresh_step"))


def test_a_plug_in_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer.target"):
        plan(configured("optimizer=torch.optim.SGD", "optimizer.lr=0.1"))
    with pytest.raises(InputError, match="only the optimizers of optbench"):
        plan(configured("optimizer.target=torch.optim.SGD", "optimizer.lr=0.1", "engine=fsdp2"))


def test_the_plan_chooses_as_a_run_on_such_gpus_would(capsys: pytest.CaptureFixture[str]) -> None:
    """The engine, the precision and, where nothing fits, advice instead of an error."""
    words = ["plan", "model=llama_60m", "model.config.num_hidden_layers=2", "--world-size", "8"]
    assert cli.main([*words, "--device", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["device_memory"], found["fits"]) == ("ddp", 80 * 10**9, True)
    assert list(found["step_time_s"]) == ["H100"]
    # bf16, which the run would choose on such a GPU: weights in fp32 and autocast's copies.
    assert found["per_rank"]["autocast_copies"] > 0
    assert cli.main([*words, "--memory", "1GB"]) == 0
    text = capsys.readouterr().out
    assert "Fits in 1 GB: no" in text


def test_times_are_a_bound_and_a_band_above_it() -> None:
    words = ("precision=bf16", "engine=fsdp2", "optimizer=muon")
    eight = plan(configured(*words, "world_size=8"), device="H100", network=10**9)["step_time_s"]["H100"]
    assert (
        0
        < eight["forward_backward_at_peak"]
        <= eight["total"]
        < eight["expected_from"]
        < eight["expected_to"]
    )
    # Eight GPUs are one node, in which the network has no part; sixteen are two.
    same = plan(configured(*words, "world_size=8"), device="H100")["step_time_s"]["H100"]
    assert same["communication"] == eight["communication"]
    near, far = (
        plan(configured(*words, "world_size=16", "batch_size=16"), device="H100", network=rate)["step_time_s"]
        for rate in (5e10, 1e9)
    )
    assert far["H100"]["communication"] == pytest.approx(50 * near["H100"]["communication"])
