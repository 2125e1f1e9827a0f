"""vit_jax evaluate"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vit_jax import cluster
from vit_jax.commands import options
from vit_jax.errors import UserError

if TYPE_CHECKING:  # JAX is imported when it is needed
    from vit_jax.build import Run
    from vit_jax.typing import Variables

EPILOG = f"""\
{options.CONFIG_HELP}
  vit_jax evaluate --workdir=/tmp/digits
  vit_jax evaluate --workdir=/tmp/digits --config.dataset.eval_split=train
  vit_jax evaluate --config=configs/digits_convit.py --weights=/tmp/digits
  vit_jax evaluate --config=configs/imagenet_convit.py \\
      --weights=hf:timm/convit_tiny.fb_in1k --config.model.name=ConViT-Ti/16
  vit_jax evaluate --workdir=/tmp/digits --probe=knn --probe_k=10
"""
# The options of each probe, with their defaults.
PROBES: dict[str, dict[str, Any]] = {
    'knn': {'probe_k': 20, 'probe_temperature': 0.07},
    'few_shot': {'shots': 5, 'trials': 5},
    'linear': {'l2': None},
}


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'evaluate', 'Exact metrics on a split, as JSON on stdout.', epilog=EPILOG
    )
    parser.add_argument('--workdir', help='folder of a run: its config, its weights')
    options.add_config(parser, required=False)
    parser.add_argument(
        '--weights',
        help='workdir, exported folder, weight file or address, with --config; pixels '
        'are normalised and cropped as it says, unless --config.dataset.* do',
    )
    _add_probes(parser)
    args, overrides = options.parse(parser, argv)
    _check_probe(args)
    given = bool(args.workdir), bool(args.config), bool(args.weights)
    if given not in ((True, False, False), (False, True, True)):
        raise UserError('give --workdir=DIR, or both --config=FILE and --weights=PATH')

    options.quiet()
    cluster.join()  # several processes, where the environment or the cluster says so
    import jax

    from vit_jax.build import build
    from vit_jax.config import from_dict, override
    from vit_jax.data.vocabulary import folder_of
    from vit_jax.evaluate import evaluate
    from vit_jax.features import headless
    from vit_jax.pretrained import load_variables
    from vit_jax.pretrained.classes import check_classes
    from vit_jax.pretrained.source import open_source
    from vit_jax.stored import latest_step

    weights, named = args.workdir or args.weights, options.keys(overrides)
    folder = weights if os.path.exists(weights) else weights.rpartition('@')[0]
    if args.workdir:  # raises where it is none
        latest_step(pathlib.Path(folder or weights))
    source = open_source(weights)
    metadata = source.metadata or {}
    if args.config:
        config = options.read_config(args.config, overrides)
        _take_preprocessing(config, named, metadata.get('preprocessing', {}))
        _take_facts(config, named, metadata.get('model', {}))
    else:
        config = override(from_dict(metadata['config']), overrides)
    # Of a run's own config, what it does not read was no error when it was trained.
    run = build(config, named=named if args.workdir else named or None)
    model = run.model
    if run.vocabulary:
        run.vocabulary.load(folder_of(weights))
    if args.probe and run.probe_data is None:
        raise UserError('--probe is for models of images')
    if args.probe:  # which are of any classes
        model = headless(model)
    else:
        check_classes(weights, metadata, run.metadata.get('class_names', []))
    variables, report = load_variables(
        source,
        model,
        run.inputs,
        sharding=run.parallel.leaf_sharding,
    )
    if args.weights or report.resized or report.notes:
        print(report.summary(), file=sys.stderr)
    _compare_models(metadata, json.loads(json.dumps(run.metadata)))
    about = {'dataset': run.dataset.name, 'split': run.metadata['eval_split']}
    if source.step is not None:
        about['step'] = source.step
    if run.score and run.score.signature:
        about['signature'] = run.score.signature
    result = _probe(run, variables, args) if args.probe else evaluate(run, variables)
    if jax.process_index() == 0:
        print(json.dumps({**about, **result}))


def _add_probes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--probe',
        choices=list(PROBES),
        help='classify by the features of the frozen model, its classifier left out, '
        'from the training split, not augmented',
    )
    known = {
        'probe_k': (options.positive, 'knn: how many neighbours vote (20)'),
        'probe_temperature': (_above_0, 'knn: of their votes (0.07)'),
        'shots': (options.positive, 'few_shot: examples of each class (5)'),
        'trials': (options.positive, 'few_shot: choices of them, averaged (5)'),
        'l2': (_above_0, 'linear: penalty; chosen on a fifth of the split if left out'),
    }
    for name, (kind, text) in known.items():
        parser.add_argument(f'--{name}', type=kind, metavar='N', help=text)


def _above_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 < number < float('inf'):
        raise argparse.ArgumentTypeError(f'a number above 0, not {text!r}')
    return number


def _check_probe(args: argparse.Namespace) -> None:
    """Fills in the probe's defaults; raises UserError for options it does not read."""
    for probe, defaults in PROBES.items():
        for name, default in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif args.probe != probe:
                raise UserError(f'--{name} is an option of --probe={probe}')


def _probe(
    run: 'Run', variables: 'Variables', args: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy of a probe, and what it depends on."""
    import numpy as np

    from vit_jax import probes

    split = run.metadata['config']['dataset']['train_split']
    assert run.probe_data is not None  # as checked
    train = probes.extract_features(run, variables, run.probe_data(), split)
    split = run.metadata['eval_split']
    test = probes.extract_features(run, variables, run.eval_data(), split)
    about = {
        'probe': args.probe,
        'train_split': run.metadata['config']['dataset']['train_split'],
        'train_examples': len(train.labels),
        'width': train.features.shape[1],
        **{name: getattr(args, name) for name in PROBES[args.probe]},
    }

    def accuracy(predicted: np.ndarray) -> float:
        return float(np.mean(predicted == test.labels))

    if args.probe == 'knn':
        predicted = probes.knn(
            train, test.features, args.probe_k, args.probe_temperature
        )
        about['accuracy'] = accuracy(predicted)
    elif args.probe == 'few_shot':
        trials = [
            accuracy(probes.few_shot(train, test.features, args.shots, seed))
            for seed in range(args.trials)
        ]
        about['accuracy'] = float(np.mean(trials))
        about['accuracy_sd'] = float(np.std(trials, ddof=1)) if trials[1:] else None
    else:
        fit = probes.linear_probe(train, test.features, args.l2)
        about |= {'l2': fit.l2, 'converged': fit.converged}
        about['accuracy'] = accuracy(fit.predicted)
    return {**about, 'examples': len(test.labels)}


def _take_preprocessing(
    config: ConfigDict, named: Collection[str], theirs: Mapping[str, Any]
) -> None:
    """Sets how the weights were trained to see pixels, where the user does not."""
    from vit_jax.image_data import NORMALIZATIONS

    pixels = [theirs.get('mean'), theirs.get('std')]
    known = {
        name: [list(mean), list(std)] for name, (mean, std) in NORMALIZATIONS.items()
    }
    values = {
        'normalize': next((name for name, v in known.items() if v == pixels), None),
        'eval_crop': theirs.get('crop_fraction'),
        'interpolation': theirs.get('interpolation'),
    }
    if all(pixels) and values['normalize'] is None:
        print(
            f'warning: the weights saw pixels of mean {pixels[0]} and std {pixels[1]}, '
            'which config.dataset.normalize has no name for',
            file=sys.stderr,
        )
    for key, value in values.items():
        if value is not None and f'dataset.{key}' not in named:
            config.dataset[key] = value


def _take_facts(
    config: ConfigDict, named: Collection[str], theirs: Mapping[str, Any]
) -> None:
    """Sets what shapes do not tell of the weights' model, where the user does not."""
    from vit_jax.modules import make_model

    kwargs = config.model.kwargs.to_dict()
    model = make_model(config.model.name, 1, config.dtype, kwargs)
    for field in ('activation', 'layer_norm_eps'):
        if (
            field in theirs
            and f'model.kwargs.{field}' not in named
            and getattr(model, field, theirs[field]) != theirs[field]
        ):
            with config.unlocked():
                config.model.kwargs[field] = theirs[field]
            print(
                f'config.model.kwargs.{field}={theirs[field]}, as the weights have it',
                file=sys.stderr,
            )


def _compare_models(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Warns when the weights are those of a model with other fields."""
    if 'model' in there:
        theirs, ours = (
            [m['model']['name'], m['model']['kwargs']] for m in (there, here)
        )
        if theirs != ours:
            print(
                f'warning: the weights are those of {theirs[0]} with {theirs[1]}, the '
                f'config has {ours[0]} with {ours[1]}',
                file=sys.stderr,
            )
