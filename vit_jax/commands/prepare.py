"""vit_jax prepare"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from vit_jax.commands import options
from vit_jax.errors import UserError, reason

EPILOG = """\
What it reads and writes, how long that takes and the free disk are said first.
Interrupted, it goes on where it stopped when the same command is given again.

  vit_jax prepare imagenet2012 --tars=/downloads --data_dir=/data/tfds
  vit_jax prepare imagenet2012 --folder=/data/imagenet --data_dir=/data/tfds
  vit_jax prepare imagenet2012 --tfrecords=/old/tfds --data_dir=/data/tfds
  vit_jax prepare cifar10 --data_dir=/data/tfds     # TFDS downloads; needs TensorFlow

docs/data.md goes from there to the first step of training.
"""
IMAGENET = 'imagenet2012'


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'prepare',
        'A dataset as array_record files, which training reads.',
        epilog=EPILOG,
    )
    parser.add_argument('dataset', metavar='DATASET', help='name that TFDS knows')
    parser.add_argument('--data_dir', metavar='DIR', help="where to (default: TFDS's)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        '--tars', metavar='DIR', help='ImageNet: folder of the two official tars'
    )
    source.add_argument(
        '--folder', metavar='DIR', help='ImageNet: folder with train/SYNSET/ and val/'
    )
    source.add_argument(
        '--tfrecords', metavar='DIR', help='a TFDS folder with tfrecord files'
    )
    parser.add_argument(
        '--allow_partial', action='store_true', help='also if images are missing'
    )
    parser.add_argument(
        '--workers',
        type=options.positive,
        default=min(8, os.cpu_count() or 1),
        help='threads; each holds 0.2 GB of ImageNet (default %(default)s)',
    )
    parser.add_argument(
        '--dry_run', action='store_true', help='say what would be done, and stop'
    )
    args = options.parse_strict(parser, argv)
    options.quiet()
    if '://' in (args.data_dir or ''):
        raise UserError(
            f'--data_dir={args.data_dir} must be a local folder; copy what is prepared'
        )
    if args.data_dir:
        args.data_dir = os.path.expanduser(args.data_dir)
    _check_source(args)
    if args.tars or args.folder or args.tfrecords:
        _write(args)
    else:
        _build(args)


def _check_source(args: argparse.Namespace) -> None:
    name = args.dataset.partition(':')[0]
    if name in ('folder', 'synthetic') or '.' in name:
        raise UserError(f'{args.dataset} is read as it is; there is nothing to prepare')
    if (args.tars or args.folder) and args.dataset != IMAGENET:
        raise UserError(
            f'--{"tars" if args.tars else "folder"} is for {IMAGENET}; other folders '
            'are read as they are, by --config.dataset.name=folder:/path'
        )
    if args.allow_partial and not (args.tars or args.folder):
        raise UserError('--allow_partial goes with --tars or --folder')


def _write(args: argparse.Namespace) -> None:
    """From tars, a folder or tfrecords, without TensorFlow."""
    from vit_jax.data import imagenet, prepare, tfrecords
    from vit_jax.data.prepared import is_prepared

    if args.tfrecords:
        root = pathlib.Path(args.tfrecords).expanduser()
        source = tfrecords.find_source(root, args.dataset)
        plan = tfrecords.plan_tfrecords(source, args.dataset, args.data_dir)
        if is_prepared(plan.folder, plan.splits):
            return _tell(args, plan.folder)
    else:
        folder = imagenet.find_folder(args.data_dir)
        # Not from the source: once it is prepared, that may go.
        expected = None if args.allow_partial else imagenet.ImageNetLayout().splits
        if is_prepared(folder, expected):
            return _tell(args, folder)
        root = pathlib.Path(args.tars or args.folder).expanduser()
        plan = imagenet.plan_imagenet(
            root, args.data_dir, bool(args.tars), allow_partial=args.allow_partial
        )
    estimate = prepare.estimate(plan)
    print(*prepare.describe(plan, estimate), sep='\n', flush=True)
    prepare.check_space(plan, estimate)
    if not args.dry_run:
        prepare.write(plan, args.workers)
        _tell(args, plan.folder)
    return None


def _build(args: argparse.Namespace) -> None:
    """By the dataset's own builder, which downloads it."""
    if args.dataset.partition(':')[0] == IMAGENET:
        raise UserError(
            f'{IMAGENET} must be downloaded by hand; say where from: --tars=DIR (the '
            'official tars), --folder=DIR (train/SYNSET/, val/), or --tfrecords=DIR'
        )
    import contextlib
    import importlib.util

    import tensorflow_datasets as tfds

    from vit_jax.data.datasets import load_dataset
    from vit_jax.data.prepare import find_free
    from vit_jax.data.prepared import is_prepared
    from vit_jax.data.progress import size
    from vit_jax.data.text import load_text
    from vit_jax.data.tfds_builder import find_builder

    if args.dataset == 'digits' and args.dry_run:
        return print('digits: 1,797 images of scikit-learn, less than 1 MB')
    load: Callable = load_dataset  # which prepares digits itself
    if args.dataset != 'digits':
        builder = find_builder(args.dataset, args.data_dir)
        if isinstance(builder.info.features, tfds.features.Translation):
            load = load_text
    folder = pathlib.Path(load(args.dataset, args.data_dir).location)
    if is_prepared(folder):
        return _tell(args, folder)
    builder = tfds.builder(
        args.dataset, data_dir=args.data_dir, file_format='array_record'
    )
    free = find_free(folder)
    read = int(builder.info.download_size or 0)
    write = int(builder.info.dataset_size or 0)
    print(f'{args.dataset}: by its TFDS builder, to {folder}')
    if read + write:
        print(f'  downloads {size(read)}, writes {size(write)}')
    else:
        print('  downloads and writes: TFDS does not know how much')
    print(f'  free there: {size(free)}', flush=True)
    if read + write > free:
        raise UserError(
            f'{folder} takes {size(read + write)} with its downloads, and '
            f'{size(free)} are free there'
        )
    if importlib.util.find_spec('tensorflow') is None:
        raise UserError(
            f'TFDS needs TensorFlow to prepare {args.dataset}, this once: install the '
            "extra, pip install 'vit_jax[prepare]'"
        )
    if args.dry_run:
        return None
    try:
        # TFDS announces on stdout, which belongs to our commands' results.
        with contextlib.redirect_stdout(sys.stderr):
            if not sys.stderr.isatty():
                tfds.disable_progress_bar()
            builder.download_and_prepare()
    except Exception as error:  # whatever the code of a dataset raises
        text = f'TFDS cannot prepare {args.dataset}: {reason(error)}'
        raise UserError(text) from error
    return _tell(args, folder)


def _tell(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Where the dataset lies, and how a config names it."""
    import tensorflow_datasets as tfds

    from vit_jax.data.prepared import count_examples, list_splits

    print(f'{folder} holds {list_splits(count_examples(folder))} examples')
    name = args.dataset.partition(':')[0]
    known = {'digits', *tfds.list_builders(with_community_datasets=False)}
    if name != 'digits' and name.partition('/')[0] in known:
        usual = tfds.builder(name, data_dir=args.data_dir)
        if pathlib.Path(usual.data_path) != folder:  # of another version than the code
            name = f'{name}:{folder.name}'
    where = f' --config.dataset.data_dir={args.data_dir}' if args.data_dir else ''
    print(f'next: vit_jax check_data --config=... --config.dataset.name={name}{where}')
