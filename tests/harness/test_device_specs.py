"""Devices are found by whole words of their names; figures are consistent with each other."""

from __future__ import annotations

import pytest

from harness.device_specs import DEVICES, DeviceSpec, device_spec


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GH200 144G HBM3e", "GH200 144G"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
        ("AMD Instinct MI300X", "MI300X"),
        # Names that hold a shorter known one.
        ("NVIDIA L40", "L40"),
        ("NVIDIA A10G", "A10G"),
        # A part of a device, or another product of a similar name.
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("GRID A100-4C", None),
        ("NVIDIA A40-8Q", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA A1000", None),
        # One name of two products.
        ("AMD Instinct MI250X / MI250", None),
    ],
)
def test_a_device_is_found_by_whole_words_of_its_name(name: str, entry: str | None) -> None:
    spec = device_spec(name)
    assert (spec and spec.name) == entry


def test_figures_by_format() -> None:
    spec = device_spec("NVIDIA H100 80GB HBM3")
    assert spec is not None
    assert [spec.peak(f) for f in ("bf16", "fp16", "tf32", "fp32", "fp64")] == [
        989e12,
        989e12,
        494e12,
        67e12,
        67e12,
    ]
    assert (spec.memory, spec.bandwidth, spec.link) == (80e9, 3350e9, 450e9)
    old = device_spec("Tesla V100-SXM2-16GB")
    assert old is not None
    assert (old.bf16, old.fp16, old.tf32) == (None, 125e12, None)


@pytest.mark.parametrize("spec", DEVICES, ids=lambda spec: spec.name)
def test_an_entry_is_found_by_its_own_name_and_its_figures_are_dense(spec: DeviceSpec) -> None:
    assert device_spec(spec.name) is spec
    if spec.bf16 is not None and spec.tf32 is not None:
        # Tensor cores multiply TF32 at half the rate of bf16: a figure with sparsity in one column would show.
        assert spec.bf16 / spec.tf32 == pytest.approx(2, rel=0.03)
    assert spec.fp16 is not None
    assert spec.fp64 <= spec.fp32 <= spec.fp16
    # Gigabytes and terabytes per second of every device in the table.
    assert 16e9 <= spec.memory <= 300e9
    assert 200e9 <= spec.bandwidth <= 8000e9
