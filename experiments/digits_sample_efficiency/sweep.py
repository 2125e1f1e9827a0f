"""CNN, ViT and ConViT of equal size on all and on a tenth of the training digits.

    python experiments/digits_sample_efficiency/sweep.py --workdir=/tmp/digits_sweep

Runs every cell that `results.jsonl` does not hold yet, then writes `table.md`.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Iterator

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / 'results.jsonl'
MODELS = ('cnn', 'vit', 'convit')
FRACTIONS = (1.0, 0.1)
SEEDS = (0, 1, 2)


def sweep() -> Iterator[tuple[str, dict[str, float], int]]:
    """Yields (config, overrides, seed) of every cell."""
    for seed in SEEDS:
        for fraction in FRACTIONS:
            for model in MODELS:
                config = f'configs/digits_{model}.py'
                yield config, {'dataset.train_fraction': fraction}, seed


def run_cell(config: str, overrides: dict, seed: int, workdir: pathlib.Path) -> dict:
    """Trains one cell and returns its line of `results.jsonl`."""
    import jax

    from vit_jax.build import build
    from vit_jax.config import load_config, override
    from vit_jax.train import train

    values = {**overrides, 'seed': seed}
    arguments = [f'--config.{key}={value}' for key, value in values.items()]
    start = time.time()
    run = build(override(load_config(config), arguments))
    result = train(run, workdir)
    return {
        'config': config,
        'overrides': overrides,
        'seed': seed,
        'accuracy': result['accuracy'],
        'examples': result['examples'],
        'steps': run.num_steps,
        'seconds': round(time.time() - start, 1),
        'date': time.strftime('%Y-%m-%d'),
        'hardware': f'{jax.devices()[0].device_kind}, {platform.machine()}',
        'jax': jax.__version__,
    }


def render(lines: list[dict]) -> str:
    """The table: mean and standard deviation over seeds, in per cent."""
    header = ['training digits', 'CNN', 'ViT', 'ConViT']
    rows = ['| ' + ' | '.join(header) + ' |', '|' + ' --- |' * len(header)]
    for fraction in FRACTIONS:
        cells = [f'{fraction:.0%}']
        for model in MODELS:
            values = [
                100 * line['accuracy']
                for line in lines
                if line['config'] == f'configs/digits_{model}.py'
                and line['overrides']['dataset.train_fraction'] == fraction
            ]
            spread = statistics.stdev(values) if len(values) > 1 else float('nan')
            mean = statistics.mean(values) if values else float('nan')
            cells.append(f'{mean:.1f} ± {spread:.1f} ({len(values)} seeds)')
        rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--workdir', required=True, type=pathlib.Path)
    args = parser.parse_args()
    text = RESULTS.read_text() if RESULTS.exists() else ''
    lines = [json.loads(line) for line in text.splitlines()]
    done = [(line['config'], line['overrides'], line['seed']) for line in lines]
    for config, overrides, seed in sweep():
        if (config, overrides, seed) in done:
            continue
        name = (
            f'{pathlib.Path(config).stem}-{overrides["dataset.train_fraction"]}-{seed}'
        )
        lines.append(run_cell(config, overrides, seed, args.workdir / name))
        with RESULTS.open('a') as file:
            file.write(json.dumps(lines[-1]) + '\n')
    (HERE / 'table.md').write_text(render(lines))
    print(render(lines))


if __name__ == '__main__':
    main()
