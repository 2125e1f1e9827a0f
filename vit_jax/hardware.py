"""What accelerators can do at their best: the peaks that a run is measured against."""

from typing import NamedTuple

GIB = 2**30

CLOUD_TPU = 'https://docs.cloud.google.com/tpu/docs/'
NVIDIA = 'https://www.nvidia.com/en-us/data-center/'
H100_SHEET = (
    'https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet'
)
V100_SHEET = (
    'https://images.nvidia.com/content/technologies/volta/pdf/'
    'volta-v100-datasheet-update-us-1165301-r5.pdf'
)
T4_SHEET = (
    'https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/'
    't4-tensor-core-datasheet-951643.pdf'
)


class Hardware(NamedTuple):
    """The published peaks of one device, as JAX counts devices.

    Attributes:
      name: as its users call it.
      flops: bfloat16 operations a second, a multiply-add being two; no sparsity.
        float16 ones of V100 and T4, whose matrix units know no bfloat16.
      hbm_bandwidth: bytes a second to and from its memory.
      cores: devices that make up a chip. The numbers above are a device's share.
      source: the page that says so.
    """

    name: str
    flops: float
    hbm_bandwidth: float
    cores: int
    source: str


def _chip(
    name: str,
    teraflops: float,
    gigabytes_per_second: float,
    source: str,
    cores: int = 1,
) -> Hardware:
    """The row of a chip from its page's numbers, divided over its devices."""
    return Hardware(
        name=name,
        flops=teraflops * 1e12 / cores,
        hbm_bandwidth=gigabytes_per_second * 1e9 / cores,
        cores=cores,
        source=source,
    )


_V5E = _chip('TPU v5e', 197, 819, CLOUD_TPU + 'v5e')
_V5P = _chip('TPU v5p', 459, 2765, CLOUD_TPU + 'tpu7x')
_V6E = _chip('TPU v6e', 918, 1638, CLOUD_TPU + 'v6e')
_V100 = _chip('V100', 125, 900, V100_SHEET)
_V100_PCIE = _chip('V100 PCIe', 112, 900, V100_SHEET)

# By the device_kind that JAX reports; some kinds have had two names.
HARDWARE: dict[str, Hardware] = {
    'TPU v3': _chip('TPU v3', 123, 900, CLOUD_TPU + 'v3', cores=2),
    'TPU v4': _chip('TPU v4', 275, 1200, CLOUD_TPU + 'v4'),
    'TPU v5 lite': _V5E,
    'TPU v5e': _V5E,
    'TPU v5': _V5P,
    'TPU v5p': _V5P,
    'TPU v6 lite': _V6E,
    'TPU v6e': _V6E,
    'TPU7x': _chip('TPU7x', 2307, 7380, CLOUD_TPU + 'tpu7x', cores=2),
    'NVIDIA A100-SXM4-40GB': _chip('A100', 312, 1555, NVIDIA + 'a100/'),
    'NVIDIA A100-SXM4-80GB': _chip('A100', 312, 2039, NVIDIA + 'a100/'),
    'NVIDIA A100-PCIE-40GB': _chip('A100', 312, 1555, NVIDIA + 'a100/'),
    'NVIDIA A100 80GB PCIe': _chip('A100', 312, 1935, NVIDIA + 'a100/'),
    'NVIDIA H100 80GB HBM3': _chip('H100', 989, 3350, NVIDIA + 'h100/'),
    'NVIDIA H200': _chip('H200', 989, 4800, NVIDIA + 'h200/'),
    'NVIDIA H100 PCIe': _chip('H100 PCIe', 756.5, 2000, H100_SHEET),
    'NVIDIA B200': _chip('B200', 2250, 8000, NVIDIA + 'dgx-b200/'),
    'NVIDIA L40S': _chip('L40S', 362.05, 864, NVIDIA + 'l40s/'),
    'NVIDIA L4': _chip('L4', 121, 300, NVIDIA + 'l4/'),
    'NVIDIA A40': _chip('A40', 149.7, 696, NVIDIA + 'a40/'),
    'Tesla V100-SXM2-16GB': _V100,
    'Tesla V100-SXM2-32GB': _V100,
    'Tesla V100-PCIE-16GB': _V100_PCIE,
    'Tesla V100-PCIE-32GB': _V100_PCIE,
    'Tesla T4': _chip('T4', 65, 300, T4_SHEET),
}


def find_hardware(device_kind: str) -> Hardware | None:
    """The peaks of a device; None for one that is not in the table, such as a CPU.

    Args:
      device_kind: of a `jax.Device`.

    >>> find_hardware('TPU v5 lite').flops
    197000000000000.0
    >>> find_hardware('cpu') is None
    True
    """
    return HARDWARE.get(device_kind)
