import jax
import pytest

from vit_jax.hardware import HARDWARE, find_hardware


@pytest.mark.parametrize(
    ('kind', 'teraflops', 'gigabytes_per_second'),
    [
        ('TPU v4', 275, 1200),
        ('TPU v5 lite', 197, 819),
        ('TPU v5', 459, 2765),
        ('TPU v6 lite', 918, 1638),
        # Of a chip: 2307, 7380; it is two devices.
        ('TPU7x', 1153.5, 3690),
        ('NVIDIA H200', 989, 4800),
        # Half of what the sheets give with sparsity: 1513, 4500, 242, 299.4.
        ('NVIDIA H100 PCIe', 756.5, 2000),
        ('NVIDIA B200', 2250, 8000),
        ('NVIDIA L4', 121, 300),
        ('NVIDIA A40', 149.7, 696),
        ('Tesla V100-SXM2-32GB', 125, 900),
        ('Tesla V100-PCIE-16GB', 112, 900),
        ('Tesla T4', 65, 300),
    ],
)
def test_peaks_of_a_device(kind, teraflops, gigabytes_per_second):
    hardware = find_hardware(kind)
    assert hardware.flops == teraflops * 1e12
    assert hardware.hbm_bandwidth == gigabytes_per_second * 1e9


def test_a_kind_of_two_names_is_one():
    assert find_hardware('TPU v5p') == find_hardware('TPU v5')
    assert find_hardware('TPU v6e') == find_hardware('TPU v6 lite')


def test_rows_are_plausible():
    """No unit has slipped: all of these differ by less than a factor of 60."""
    for kind, hardware in HARDWARE.items():
        assert 5e13 < hardware.flops < 3e15, kind
        assert 2e11 < hardware.hbm_bandwidth < 1e13, kind
        assert hardware.source.startswith('https://'), kind


def test_unknown_hardware():
    assert find_hardware('TPU v99') is None
    assert find_hardware(jax.devices()[0].device_kind) is None  # a CPU
