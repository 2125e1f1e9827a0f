import json

from command_lines import DIGITS

pytest_plugins = ['command_fixtures']


def test_what_a_run_leaves(digits):
    names = {path.name.split('.')[0] for path in digits.glob('[!.]*')}
    assert names == {'checkpoints', 'config', 'events', 'launches', 'metrics'}
    assert [path.name for path in (digits / 'checkpoints').iterdir()] == ['3']
    config = json.loads((digits / 'config.json').read_text())
    assert config['model']['name'] == 'ConViT-Ti/2'


def test_a_finished_run_is_not_trained_again(run, digits, data_dir):
    metrics = (digits / 'metrics.jsonl').read_bytes()
    data = f'--config.dataset.data_dir={data_dir}'
    code, out, err = run('train', *DIGITS, data, f'--workdir={digits}')
    assert (code, err) == (0, f'{digits} holds this run, already finished\n')
    last = json.loads(metrics.splitlines()[-1])
    assert f'finished at step 3: accuracy {100 * last["eval/accuracy"]:.2f}%' in out
    assert f'next: vit_jax predict --weights={digits} IMAGE' in out
    assert (digits / 'metrics.jsonl').read_bytes() == metrics
