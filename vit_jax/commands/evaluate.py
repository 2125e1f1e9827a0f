"""vit_jax evaluate"""

import json
import pathlib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax.commands import options
from vit_jax.errors import UserError, some

EPILOG = f"""\
{options.CONFIG_HELP}
  vit_jax evaluate --workdir=/tmp/digits
  vit_jax evaluate --workdir=/tmp/digits --config.dataset.eval_split=train
  vit_jax evaluate --config=configs/digits_convit.py --weights=/tmp/digits
  vit_jax evaluate --config=configs/imagenet_convit.py \\
      --weights=hf:timm/convit_tiny.fb_in1k --config.model.name=ConViT-Ti/16
"""


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
    args, overrides = options.parse(parser, argv)
    given = bool(args.workdir), bool(args.config), bool(args.weights)
    if given not in ((True, False, False), (False, True, True)):
        raise UserError('give --workdir=DIR, or both --config=FILE and --weights=PATH')

    options.quiet()
    from vit_jax.build import build
    from vit_jax.checkpoint import load_metadata
    from vit_jax.config import from_dict, override
    from vit_jax.evaluate import evaluate
    from vit_jax.pretrained import load_variables
    from vit_jax.pretrained.source import open_source

    weights, named = args.workdir or args.weights, options.keys(overrides)
    if args.workdir:
        load_metadata(pathlib.Path(weights))  # raises where it is none
    source = open_source(weights)
    metadata = source.metadata or {}
    if args.config:
        config = options.read_config(args.config, overrides)
        _take_preprocessing(config, named, metadata.get('preprocessing', {}))
        _take_facts(config, named, metadata.get('model', {}))
    else:
        config = override(from_dict(metadata['config']), overrides)
    run = build(config, named=named)
    _check_classes(weights, metadata, run.dataset.class_names)
    *image_size, channels = run.batch_shape['image'].shape[1:]
    variables, report = load_variables(
        source,
        run.model,
        tuple(image_size),
        channels=channels,
        sharding=run.parallel.replicated,
    )
    if args.weights or report.resized or report.notes:
        print(report.summary(), file=sys.stderr)
    _compare_models(metadata, json.loads(json.dumps(run.metadata)))
    about = {'dataset': run.dataset.name, 'split': run.metadata['eval_split']}
    if source.step is not None:
        about['step'] = source.step
    print(json.dumps({**about, **evaluate(run, variables)}))


def _take_preprocessing(
    config: ConfigDict, named: Collection[str], theirs: Mapping[str, Any]
) -> None:
    """Sets how the weights were trained to see pixels, where the user does not."""
    from vit_jax.build import NORMALIZATIONS

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
    from vit_jax.build import make_model

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


def _check_classes(
    weights: str, metadata: Mapping[str, Any], here: Sequence[str]
) -> None:
    """Raises UserError when the weights' classes are not those of the data.

    ImageNet's are known by their WordNet id, with or without names behind it.
    """
    from vit_jax.pretrained.metadata import default_class_names

    there = metadata.get('class_names')
    if there is None:
        return
    if list(map(_wordnet_id, there)) == list(map(_wordnet_id, here)):
        return
    # Numbers, where nobody knew names (but those of a run are its data's); words there
    # and ids here, in transformers' ImageNet, whose order is that of the ids.
    numbers = default_class_names(len(there))
    nameless = list(there) == numbers and 'config' not in metadata
    in_words = not any(map(_is_id, there)) and all(map(_is_id, here))
    if (nameless or in_words) and len(there) == len(here):
        print(
            f'warning: the classes of {weights} ({some(there)}) are taken for those of '
            f'the data ({some(here)}), in this order',
            file=sys.stderr,
        )
        return
    raise UserError(
        f'{weights} knows {len(there)} classes ({some(there)}), the data has '
        f'{len(here)} ({some(here)})'
    )


def _wordnet_id(name: str) -> str:
    match = re.match(r'n\d{8}\b', name)
    return match[0] if match else name


def _is_id(name: str) -> bool:
    return re.fullmatch(r'n\d{8}', _wordnet_id(name)) is not None
