"""Notebooks run, in a process of their own, and show what running them shows.

Their code cells are executed one after the other by plain Python: Jupyter and what it
needs are thirty packages more, for nothing that the cells use. Lines that begin with
'%', which tell Jupyter how to show pictures, are left out.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

NOTEBOOKS = pathlib.Path(__file__).parent.parent / 'notebooks'

EXECUTE = """
import json, sys

with open(sys.argv[1]) as file:
    cells = json.load(file)['cells']
names = {'__name__': '__main__'}
for number, cell in enumerate(cells):
    if cell['cell_type'] == 'code':
        lines = ''.join(cell['source']).splitlines()
        code = '\\n'.join('' if line[:1] == '%' else line for line in lines)
        exec(compile(code, f'cell {number}', 'exec'), names)
"""


def execute(notebook, folder):
    """Runs the code cells of a notebook, from where it lies.

    Args:
      notebook: path of the file.
      folder: for data and temporary files.
    """
    environ = {
        **os.environ,
        'MPLBACKEND': 'agg',
        'TFDS_DATA_DIR': str(folder / 'data'),
        'TMPDIR': str(folder),
    }
    environ.pop('XLA_FLAGS', None)  # those of the tests: 600 steps are worth compiling
    command = [sys.executable, '-c', EXECUTE, str(notebook)]
    return subprocess.run(
        command, cwd=notebook.parent, env=environ, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path):
    done = execute(NOTEBOOKS / 'quickstart.ipynb', tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'logits (1, 1000)' in done.stdout
    assert '69 leaves loaded, 0 initialised' in done.stdout
    accuracy = re.findall(r'evaluation: accuracy ([\d.]+)%', done.stderr)[-1]
    assert float(accuracy) > 85


def test_a_cell_that_raises_is_told(tmp_path):
    cells = [
        {'cell_type': 'markdown', 'source': ['1 / 0']},
        {'cell_type': 'code', 'source': ['%matplotlib inline\n', 'x = 3']},
        {'cell_type': 'code', 'source': ['print(x)\n', 'y = 1 / (x - 3)']},
        {'cell_type': 'code', 'source': ["print('not reached')"]},
    ]
    notebook = tmp_path / 'fails.ipynb'
    notebook.write_text(json.dumps({'cells': cells}))
    done = execute(notebook, tmp_path)
    assert done.returncode == 1
    assert done.stdout == '3\n'
    assert 'File "cell 2", line 2' in done.stderr
    assert done.stderr.splitlines()[-1] == 'ZeroDivisionError: division by zero'


def test_outputs_are_those_of_one_run_and_tell_of_no_machine():
    path = NOTEBOOKS / 'quickstart.ipynb'
    cells = json.loads(path.read_text())['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell['outputs']]
    assert any('image/png' in output.get('data', {}) for output in outputs)
    for output in outputs:
        assert output['output_type'] != 'error'
        assert output.get('name') != 'stderr'  # warnings; how fast a machine was
        shown = output.get('text') or output['data'].get('text/plain', '')
        assert not re.search(r'(?<![\w.])/\w+/', ''.join(shown))
    assert path.stat().st_size < 400_000
