"""Data-sheet figures of GPUs, found by the name that the driver reports. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Format = Literal["bf16", "fp16", "tf32", "fp32", "fp64"]
"""Number format in which matrices are multiplied."""


@dataclass(frozen=True)
class DeviceSpec:
    """What the vendor states for one device as torch sees it (for an MI250X: one of its two dies).

    Attributes:
        name: words of the device's name that identify it.
        memory: bytes, by the data sheet's decimal gigabytes. Drivers report up to 7 % more.
        bandwidth: of the device memory, byte/s.
        bf16, fp16, tf32: dense matrix FLOP/s with fp32 accumulation, without sparsity; None: not in hardware.
        fp32: dense FLOP/s in IEEE single precision.
        fp64: dense FLOP/s of matrix products, by tensor cores where they have fp64.
        link: byte/s in one direction, over all NVLink or Infinity Fabric links of the device together; None: PCIe only
            (bridges between two cards are not counted), or not known.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float
    fp64: float
    link: float | None

    def peak(self, format: Format) -> float | None:
        """Return the dense peak in a number format, FLOP/s; None where the hardware lacks the format."""
        return getattr(self, format)


def _spec(
    name: str,
    memory_gb: float,
    bandwidth_gb: float,
    bf16: float | None,
    tf32: float | None,
    fp32: float,
    fp64: float,
    link_gb: float = 0,
    fp16: float | None = None,
) -> DeviceSpec:
    """Return a spec from data-sheet units: GB, GB/s, TFLOP/s; `link_gb` counts both directions, as vendors do."""

    def tera(value: float | None) -> float | None:
        return None if value is None else value * 1e12

    half = bf16 if fp16 is None else fp16
    return DeviceSpec(
        name,
        memory_gb * 1e9,
        bandwidth_gb * 1e9,
        tera(bf16),
        tera(half),
        tera(tf32),
        fp32 * 1e12,
        fp64 * 1e12,
        link_gb * 1e9 / 2 or None,
    )


# Vendors often print the figures with 2:4 sparsity, which are twice as high: these are the dense ones.
# GeForce, RTX and the inference cards: fp64 at 1/64 of fp32 (CUDA C++ Programming Guide, throughput of arithmetic
# instructions, compute capabilities 8.6, 8.9 and 12.0).
DEVICES: tuple[DeviceSpec, ...] = (
    # Volta and Turing: fp16 tensor cores, neither bf16 nor TF32 (V100 and T4 data sheets, NVIDIA 2018-2020).
    _spec("V100", 16, 900, None, None, 15.7, 7.8, 300, fp16=125),
    _spec("V100 32GB", 32, 900, None, None, 15.7, 7.8, 300, fp16=125),
    _spec("V100 PCIe", 16, 900, None, None, 14, 7, fp16=112),
    _spec("V100 PCIe 32GB", 32, 900, None, None, 14, 7, fp16=112),
    _spec("V100S", 32, 1134, None, None, 16.4, 8.2, fp16=130),
    _spec("T4", 16, 320, None, None, 8.1, 8.1 / 32, fp16=65),
    # Ampere: data sheets of the A100 (2022), A800, A30, A40, A10, A16 and RTX A6000 (NVIDIA); the A10G is AWS' part.
    _spec("A100", 80, 2039, 312, 156, 19.5, 19.5, 600),
    _spec("A100 40GB", 40, 1555, 312, 156, 19.5, 19.5, 600),
    _spec("A100 PCIe", 80, 1935, 312, 156, 19.5, 19.5),
    _spec("A100 PCIe 40GB", 40, 1555, 312, 156, 19.5, 19.5),
    _spec("A800", 80, 2039, 312, 156, 19.5, 19.5, 400),
    _spec("A800 PCIe", 80, 1935, 312, 156, 19.5, 19.5),
    _spec("A30", 24, 933, 165, 82, 10.3, 10.3),
    _spec("A40", 48, 696, 149.7, 74.8, 37.4, 37.4 / 64),
    _spec("A10", 24, 600, 125, 62.5, 31.2, 31.2 / 64),
    _spec("A10G", 24, 600, 70, 35, 35, 35 / 64),
    _spec("A16", 16, 200, 17.9, 9, 4.5, 4.5 / 64),
    _spec("RTX A6000", 48, 768, 154.8, 77.4, 38.7, 38.7 / 64),
    # GA102 whitepaper, appendix: GeForce runs fp32 accumulation at half rate.
    _spec("RTX 3090", 24, 936, 71, 35.6, 35.6, 35.6 / 64),
    # Ada: data sheets of L4, L20, L40, L40S; Ada whitepaper for the RTX cards.
    _spec("L4", 24, 300, 121, 60, 30.3, 30.3 / 64),
    _spec("L20", 48, 864, 119.5, 59.8, 59.8, 59.8 / 64),
    _spec("L40", 48, 864, 181, 90.5, 90.5, 90.5 / 64),
    _spec("L40S", 48, 864, 362, 183, 91.6, 91.6 / 64),
    _spec("RTX 4090", 24, 1008, 165.2, 82.6, 82.6, 82.6 / 64),
    _spec("RTX 6000 Ada", 48, 960, 364.2, 182.1, 91.1, 91.1 / 64),
    # Hopper: H100 data sheet (SXM, PCIe, NVL), H200 data sheet, GH200 data sheet; H800 and H20 as sold in China.
    _spec("H100", 80, 3350, 989, 494, 67, 67, 900),
    _spec("H100 PCIe", 80, 2000, 756, 378, 51, 51),
    _spec("H100 NVL", 94, 3900, 835, 417, 60, 60),
    _spec("H200", 141, 4800, 989, 494, 67, 67, 900),
    _spec("H200 NVL", 141, 4800, 835, 417, 60, 60),
    _spec("H800", 80, 3350, 989, 494, 67, 1, 400),
    _spec("H800 PCIe", 80, 2000, 756, 378, 51, 0.8),
    _spec("H20", 96, 4000, 148, 74, 44, 1, 900),
    _spec("H20 3e", 141, 4800, 148, 74, 44, 1, 900),
    _spec("GH200", 96, 4000, 989, 494, 67, 67, 900),
    _spec("GH200 144G", 144, 4900, 989, 494, 67, 67, 900),
    # Blackwell: HGX B200 and HGX B300 (an eighth of the board), GB200 and GB300 NVL72 (a 72nd of the rack).
    _spec("B200", 180, 7700, 2250, 1125, 75, 37, 1800),
    _spec("GB200", 186, 8000, 2500, 1250, 80, 40, 1800),
    _spec("B300", 270, 7700, 2250, 1125, 75, 1.25, 1800),
    _spec("GB300", 279, 8000, 2500, 1250, 80, 1.3, 1800),
    # RTX Blackwell and RTX PRO Blackwell whitepapers. The Server Edition's tensor figures are not published per format.
    _spec("RTX 5090", 32, 1792, 209.5, 104.8, 104.8, 104.8 / 64),
    _spec("RTX PRO 6000 Blackwell Workstation", 96, 1792, 503.8, 251.9, 125.9, 125.9 / 64),
    _spec("RTX PRO 6000 Blackwell Max-Q", 96, 1792, 438.9, 219.5, 109.7, 109.7 / 64),
    # AMD Instinct data sheets. The two dies of an MI250 or MI250X are two devices. CDNA 2 and 4 have no TF32.
    _spec("MI250", 64, 1638, 181, None, 45.3, 45.3),
    _spec("MI250X", 64, 1638, 191.5, None, 47.9, 47.9),
    _spec("MI300X", 192, 5300, 1307.4, 653.7, 163.4, 163.4, 896),
    _spec("MI325X", 256, 6000, 1307.4, 653.7, 163.4, 163.4, 896),
    _spec("MI355X", 288, 8000, 2516.6, None, 157.3, 78.6, 1075),
)

PCIE_BANDWIDTH = 25e9
"""byte/s of a device without links, in one direction: PCIe 4.0 × 16 has 31.5e9 before protocol."""
NETWORK_BANDWIDTH = 50e9
"""byte/s of each device between nodes, in one direction: one 400 Gbit/s adapter a device, as in HGX and DGX systems."""

_OTHER_PRODUCTS = {"MIG", "GRID", "LAPTOP", "MOBILE", "SERVER", "TI", "SUPER", "D", "Q", "VF"}
"""Words that make a name another product, or a slice of one: an entry must have them, too."""
_VGPU = re.compile(r"\d+[ABCQ]")
"""The last word of a virtual GPU such as "NVIDIA A40-8Q", which has an unknown share of the device."""


def device_spec(name: str) -> DeviceSpec | None:
    """Return the figures of a device, or None if it is unknown.

    Whole words of the name are compared, so that an L40 is not taken for an L4 nor an A10G for an A10; the entry with
    the most words counts. A slice of a GPU (MIG, a virtual GPU) and a mobile version have an unknown share of the peak.

    Args:
        name: as the driver reports it, such as "NVIDIA H100 80GB HBM3" or "NVIDIA A100-SXM4-80GB MIG 1g.10gb", or an
            entry's own, such as "H100".
    """
    present = _words(name)
    if any(_VGPU.fullmatch(word) for word in present):
        return None
    others = present & _OTHER_PRODUCTS
    matching = [spec for spec in DEVICES if others <= _words(spec.name) <= present]
    most = max((len(_words(spec.name)) for spec in matching), default=0)
    best = [spec for spec in matching if len(_words(spec.name)) == most]
    # "MI250X / MI250" is one driver's name for two products.
    return best[0] if len(best) == 1 else None


def _words(name: str) -> frozenset[str]:
    return frozenset(word.upper() for word in re.split(r"[^A-Za-z0-9.]+", name) if word)
