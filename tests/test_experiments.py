"""The scripts below experiments/ that no command runs."""

import importlib.util
import pathlib

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


def load_script(name):
    spec = importlib.util.spec_from_file_location('script', EXPERIMENTS / name)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_input_pipeline_is_measured_on_jpegs_of_any_case(tmp_path):
    """ImageNet's end in .JPEG."""
    (tmp_path / 'n01440764').mkdir()
    for name in ('a.jpg', 'b.JPEG', 'n01440764/c.Jpeg', 'd.png', 'e.txt'):
        (tmp_path / name).write_bytes(name.encode())
    read = load_script('input_pipeline/benchmark.py').read_jpegs(tmp_path)
    assert read == [b'a.jpg', b'b.JPEG', b'n01440764/c.Jpeg']
