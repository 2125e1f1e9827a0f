"""What accelerators can do at their best: the peaks that a run is measured against."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

GIB = 2**30

CLOUD_TPU = 'https://docs.cloud.google.com/tpu/docs/'
NVIDIA = 'https://www.nvidia.com/en-us/data-center/'


class Hardware(NamedTuple):
    """The published peaks of one device, as JAX counts devices.

    Attributes:
      name: as its users call it.
      flops: bfloat16 operations a second, a multiply-add being two; no sparsity.
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
    'NVIDIA L40S': _chip('L40S', 362.05, 864, NVIDIA + 'l40s/'),
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


def utilisation(
    flops: float, seconds: float, devices: Sequence[jax.Device]
) -> float | None:
    """The share of the devices' peak that some work reached.

    With the model's own operations (three forward passes a step, two operations a
    multiply-add) this is the "model FLOPs utilisation" of PaLM, arXiv 2204.02311,
    appendix B; with those of the compiled program it counts recomputation too.

    Args:
      flops: operations of the work, over all devices.
      seconds: how long it took.
      devices: that took part, of all hosts.

    Returns:
      In [0, 1]; None where a device's peak is not known.
    """
    found = [find_hardware(device.device_kind) for device in devices]
    peak = sum(hardware.flops for hardware in found if hardware is not None)
    if None in found or not peak * seconds:
        return None
    return flops / (peak * seconds)
