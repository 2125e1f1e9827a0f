"""Experiment configs: every key, its unit and meaning; recipes; overrides.

A recipe is a Python file with `get_config(arg=None) -> ConfigDict` that starts from
`default_config()` and sets what differs. A key that does not exist is an error, and
so is a key that was set but that the run does not read.
"""

import ast
import copy
import importlib.util
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import absl.flags
from ml_collections import ConfigDict, config_dict, config_flags

from vit_jax.errors import UserError, unknown


def default_config(task: str = 'classify') -> ConfigDict:
    """Every key with its default.

    Args:
      task: 'classify', 'distill', 'translate', 'gan', or a fork's module,
        'my_fork.my_task'.
    """
    config = ConfigDict()
    config.seed = 0  # of parameters, data order, augmentation, dropout
    config.task = task

    config.model = ConfigDict()
    config.model.name = 'ViT-S/16'  # see `vit_jax.list_models`, or 'my_fork.nets:Net'
    config.model.kwargs = ConfigDict()  # fields of the module that differ

    config.init = ConfigDict()
    # None: random. Or a file, a folder, a workdir or an address such as
    # 'hf:timm/convit_tiny.fb_in1k', see `vit_jax.load_variables`.
    config.init.weights = config_dict.placeholder(str)
    config.init.new_head = False  # leave the classifier of `weights`, start another

    config.dataset = ConfigDict()
    config.dataset.name = 'digits'  # or a TFDS name, 'folder:/path', 'synthetic'
    config.dataset.data_dir = config_dict.placeholder(str)  # of TFDS; None: its own
    config.dataset.train_split = 'train'
    # None: 'validation', 'val' or 'test', the first there is.
    config.dataset.eval_split = config_dict.placeholder(str)
    config.dataset.train_fraction = 1.0  # of every class; num_epochs counts the whole
    config.dataset.image_size = config_dict.placeholder(tuple)  # (h, w); None: native
    config.dataset.normalize = 'half'  # 'half': to [-1, 1]; 'imagenet': its mean, std
    config.dataset.eval_crop = 1.0  # central part evaluated, side / largest that fits
    config.dataset.interpolation = 'bicubic'  # of images that are resized; 'bilinear'
    config.dataset.num_workers = 0  # processes that decode; 0: threads of this one
    # 'host': examples are read, decoded and augmented as training goes. 'device': all
    # of them lie decoded in the accelerators' memory, for datasets that fit there.
    config.dataset.placement = 'host'
    # Of 'device': steps that one call of the compiled step makes. None: as many as the
    # periods of log, eval and checkpoint allow; on a CPU 1, for XLA's convolutions
    # there take many times as long inside a loop.
    config.dataset.steps_per_call = config_dict.placeholder(int)
    config.dataset.skip_corrupt = False  # images that cannot be read: rows of weight 0
    config.dataset.timeout_seconds = 300  # without a batch, after which that is told

    config.augment = ConfigDict()
    config.augment.crop = 'none'  # or 'pad' (random shift), 'resized' (random box)
    config.augment.pad = 4  # pixels, for crop='pad'
    config.augment.min_scale = 0.08  # smallest share of the area, for 'resized'
    config.augment.flip = False  # mirror half of the images
    # 'rand-m9-mstd0.5-inc1': timm's, as in DeiT; 'plain-n2-m9': the paper's.
    config.augment.randaugment = config_dict.placeholder(str)
    config.augment.erasing = 0.0  # probability that a box becomes noise
    config.augment.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: off
    config.augment.cutmix = 0.0  # alpha; where both are on, one of them is drawn
    config.augment.mix_mode = 'batch'  # what shares a draw; or 'pair', 'elem'
    config.augment.mix_prob = 1.0  # that images are mixed at all
    config.augment.mix_switch_prob = 0.5  # of cutmix, where both are on
    config.augment.repeats = 1  # of every image in a batch, augmented differently

    config.batch_size = 128  # images per step, over all devices of all hosts
    config.accum_steps = 1  # micro-batches of a batch, one after the other: less memory
    # Exactly one of the two. An epoch is the whole training split, also where
    # train_fraction is below 1: the number of images seen stays the same.
    config.num_steps = config_dict.placeholder(int)
    config.num_epochs = config_dict.placeholder(float)

    config.optim = ConfigDict()
    config.optim.name = 'adamw'  # or 'sgd' (Nesterov), 'lamb', 'adafactor'
    config.optim.learning_rate = 1e-3  # at its highest, for the batch size as it is
    config.optim.weight_decay = 0.05  # of kernels; times the learning rate
    config.optim.b1 = 0.9  # decay of the mean of gradients; momentum of 'sgd'
    config.optim.b2 = 0.999  # decay of the mean of their squares
    config.optim.clip_norm = config_dict.placeholder(float)  # of the whole gradient
    config.optim.schedule = 'cosine'  # or 'linear', 'rsqrt', 'constant'
    config.optim.end_learning_rate = 0.0  # where 'cosine' and 'linear' end
    config.optim.warmup_steps = 0  # linear from 0
    config.optim.cooldown_steps = 0  # linear to 0, at the end of the run
    config.optim.label_smoothing = 0.0
    config.optim.layer_decay = 1.0  # of the learning rate, per layer below the head
    # (pattern, factor of the learning rate, of the weight decay) for parameters whose
    # path the regular expression is found in, such as (('posemb', 0.1, 1.0),).
    config.optim.rules = ()
    config.optim.freeze = ()  # patterns; '(?!head/)' leaves the head alone trained
    config.optim.ema_decay = config_dict.placeholder(float)  # of averaged parameters

    config.dtype = 'float32'  # of the computation, or 'bfloat16'; parameters: float32

    config.parallel = ConfigDict()
    config.parallel.mode = 'jit'  # over a mesh of all devices, or 'pmap'
    # The mesh: rows of the batch are split over data x fsdp devices; parameters and
    # optimizer over fsdp; heads and hidden units over tensor.
    config.parallel.data = config_dict.placeholder(int)  # None: all that are left
    config.parallel.fsdp = 1
    config.parallel.tensor = 1
    # What the backward pass computes again: 'none', 'dots' (all but matrix products),
    # 'full' (all inside a block).
    config.parallel.remat = 'none'
    config.parallel.heartbeat_seconds = 100  # of silence until a process counts as dead

    config.eval = ConfigDict()
    config.eval.every_steps = 1000  # and after the last step
    config.eval.batch_size = config_dict.placeholder(int)  # None: batch_size

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000  # and after the last step
    config.checkpoint.keep = 2  # newest ones
    # Metric of the evaluation, such as 'accuracy', by which the best is kept as well.
    config.checkpoint.keep_best = config_dict.placeholder(str)
    config.checkpoint.average = 0  # of the last ones, evaluated at the end; 0: off

    config.log = ConfigDict()
    config.log.every_steps = 50
    config.log.tensorboard = True
    config.log.wandb = config_dict.placeholder(str)  # project of Weights & Biases
    config.log.profile_steps = config_dict.placeholder(str)  # '10:15', both included

    config.nan_policy = 'stop'  # or 'skip': such a step changes nothing, and counts

    if task == 'distill':
        config.distill = ConfigDict()
        config.distill.teacher = ''  # weights, as for init.weights
        config.distill.kind = 'hard'  # its most likely class; or 'soft', probabilities
        config.distill.weight = 0.5  # of the teacher's part of the loss
        config.distill.temperature = 1.0  # of both, for 'soft'
    if task == 'gan':  # the learning rate of each net is set by optim.rules
        config.gan = ConfigDict()
        # Weights, as for init.weights, of a classifier of the same images, in whose
        # features an evaluation tells the Frechet distance. None: it does not.
        config.gan.classifier = config_dict.placeholder(str)
        config.gan.num_samples = 10_000  # images that are generated for it
    if task == 'translate':
        config.text = ConfigDict()
        config.text.vocab_size = 8000  # tokens, of both languages together
        config.text.tokenizer = 'unigram'  # of SentencePiece; or 'bpe', 'char'
        # Pairs of sentences are padded to the first of these lengths, in tokens, that
        # holds both; what is longer is not trained on, and cut in evaluation. (): one
        # that holds every line, of data whose lines are of known length ('copy:').
        config.text.buckets = (16, 32, 64, 128)
        # Of each side, padding included, in a batch over all devices.
        config.text.tokens_per_batch = 4096
        config.text.score = 'bleu'  # of decoded sentences; or 'exact_match', 'none'
        config.text.beam = 1  # hypotheses that decoding keeps; 1: greedy
        config.text.length_penalty = 0.6  # of beam search
        config.text.extra_length = 50  # tokens that a translation may have more
    return config.lock()


# What may differ between a run and its continuation: the result is the same.
RESUMABLE = (
    'dataset.data_dir',
    'dataset.num_workers',
    'dataset.steps_per_call',
    'dataset.timeout_seconds',
    'parallel.mode',
    'parallel.data',
    'parallel.fsdp',
    'parallel.tensor',
    'parallel.remat',
    'parallel.heartbeat_seconds',
    'eval.every_steps',
    'eval.batch_size',
    'gan.classifier',
    'gan.num_samples',
    'text.score',
    'text.beam',
    'text.length_penalty',
    'text.extra_length',
    'checkpoint.every_steps',
    'checkpoint.keep',
    'checkpoint.keep_best',
    'checkpoint.average',
    'log.every_steps',
    'log.tensorboard',
    'log.wandb',
    'log.profile_steps',
)


def choose_variant(arg: str | None, *variants: str) -> str | None:
    """What follows the colon of `--config=file.py:arg`, checked.

    Raises:
      UserError: when it is none of `variants`.
    """
    if arg and arg not in variants:
        raise unknown('config variant', arg, variants)
    return arg or None


def flatten(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping, as ('optim.name', 'adamw')."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and len(value):
            yield from flatten(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


class ConfigReader:
    """A read-only view of a config that remembers which keys were read."""

    def __init__(self, config: ConfigDict, prefix: str = '', read: set | None = None):
        self._config = config
        self._prefix = prefix
        self._read: set[str] = set() if read is None else read

    def __getattr__(self, key: str) -> Any:
        value = self._config[key]
        name = f'{self._prefix}{key}'
        if isinstance(value, ConfigDict) and key != 'kwargs':
            return ConfigReader(value, f'{name}.', self._read)
        self._read.add(name)
        return value.to_dict() if isinstance(value, ConfigDict) else value

    def unread(self) -> list[str]:
        """Keys that nothing read so far."""
        keys = [key for key, _ in flatten(self._config)]
        return [key for key in keys if not self._was_read(key)]

    def _was_read(self, key: str) -> bool:
        return any(key == read or key.startswith(f'{read}.') for read in self._read)


# In words, as a predicate, and of which keys. Optional keys may be None too.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        'above 0',
        lambda x: 0 < x < float('inf'),
        (
            'batch_size',
            'num_steps',
            'num_epochs',
            'eval.batch_size',
            'optim.clip_norm',
            'eval.every_steps',
            'checkpoint.every_steps',
            'checkpoint.keep',
            'log.every_steps',
            'augment.repeats',
            'accum_steps',
            'dataset.steps_per_call',
            'dataset.timeout_seconds',
            'parallel.data',
            'parallel.fsdp',
            'parallel.tensor',
            'parallel.heartbeat_seconds',
            'text.vocab_size',
            'text.tokens_per_batch',
            'text.beam',
        ),
    ),
    (
        '0 or more',
        lambda x: 0 <= x < float('inf'),
        (
            'dataset.num_workers',
            'augment.pad',
            'optim.learning_rate',
            'optim.end_learning_rate',
            'optim.weight_decay',
            'optim.cooldown_steps',
            'augment.mixup',
            'augment.cutmix',
            'checkpoint.average',
            'text.extra_length',
        ),
    ),
    ('from 0 to 10', lambda x: 0 <= x <= 10, ('text.length_penalty',)),
    (
        'in (0, 1]',
        lambda x: 0 < x <= 1,
        (
            'dataset.train_fraction',
            'dataset.eval_crop',
            'augment.min_scale',
            'optim.layer_decay',
        ),
    ),
    (
        'in [0, 1)',
        lambda x: 0 <= x < 1,
        ('optim.label_smoothing', 'optim.b1', 'optim.b2', 'optim.ema_decay'),
    ),
    (
        'in [0, 1]',
        lambda x: 0 <= x <= 1,
        ('augment.erasing', 'augment.mix_prob', 'augment.mix_switch_prob'),
    ),
    ('in [0, 2**32)', lambda x: 0 <= x < 2**32, ('seed',)),
)


def check_ranges(config: ConfigDict) -> None:
    """Raises UserError for a number that makes no sense in any run."""
    values = dict(flatten(config))
    for words, holds, keys in _RANGES:
        for key in keys:
            value = values.get(key)  # not every task has it
            if value is not None and not holds(value):
                raise UserError(f'config.{key} must be {words}, not {value}')


def check_unread(
    config: ConfigDict, unread: Sequence[str], named: Collection[str] | None = None
) -> None:
    """Raises UserError for keys that were set and that a run does not read.

    Args:
      config: the config of the run.
      unread: keys that the run did not read.
      named: keys that the user named over the recipe, which count as set even at their
        default. The recipe's own are no errors then: whoever turns something off on the
        command line need not know what else the recipe says of it. None for a recipe as
        it is.
    """
    defaults = dict(flatten(default_config(config.task)))
    for key, value in flatten(config):
        is_set = key not in defaults or value != defaults[key]
        if key in unread and (is_set if named is None else key in named):
            raise UserError(
                f'config.{key} is set to {value!r}, but this run does not read it; '
                f'leave it out, or set what makes use of it'
            )


def load_config(path: str) -> ConfigDict:
    """Runs a recipe.

    Args:
      path: 'configs/digits_vit.py', or with a variant, 'configs/digits_vit.py:smoke'.

    Raises:
      UserError: for a file that is not there or does not run.
    """
    file, _, variant = path.partition(':')
    if not pathlib.Path(file).is_file():
        raise UserError(f'no such config file: {file}')
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f'{file} is not a Python file')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*filter(None, [variant]))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f'{path} does not run: {_one_line(error)}') from error
    if not isinstance(config, ConfigDict) or not set(default_config()) <= set(config):
        raise UserError(f'get_config of {file} must start from default_config()')
    return config.lock()


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """The config that `config.to_dict()` was stored from, by way of JSON."""
    config = default_config(values['task'])
    with config.unlocked():
        config.model.kwargs = _tuples(values['model']['kwargs'])
        if '.' in values['task']:  # a fork's may have sections of its own
            for key in values.keys() - config.keys():
                config[key] = ConfigDict(_tuples(values[key]))
    for key, value in flatten(values):
        if not key.startswith('model.kwargs'):
            config.update_from_flattened_dict({key: _tuples(value)})
    return config


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies overrides from the command line.

    Args:
      config: is left as it is.
      overrides: such as '--config.optim.learning_rate=3e-4'; 'None' unsets an
        optional key. Fields of the model that the config does not set are Python
        literals, or else strings.

    Raises:
      UserError: for a key that does not exist (offers the nearest) or a value of
        another type.
    """
    config = copy.deepcopy(config)  # keeps the types of optional keys
    known = dict(flatten(config)) | {'model.kwargs': None}
    defaults = flatten(default_config(config.task))
    optional = [key for key, value in defaults if value is None]
    typed = []
    for argument in overrides:
        key, has_value, value = argument.removeprefix('--config.').partition('=')
        if not argument.startswith('--config.') or not has_value:
            raise UserError(f'{argument!r} is not of the form --config.key=value')
        if key in optional and value == 'None':
            config.update_from_flattened_dict({key: None})
        elif key in known:
            typed.append(argument)
        elif re.fullmatch(r'model\.kwargs\.\w+', key):
            with config.unlocked():
                config.model.kwargs[key.removeprefix('model.kwargs.')] = _literal(value)
        else:
            raise unknown('config key', key, known)
    # ml_collections' own parser knows the type of each key.
    flags = absl.flags.FlagValues()
    argv = ['vit_jax', *typed]
    config_flags.DEFINE_config_dict('config', config, flag_values=flags, sys_argv=argv)
    try:
        flags(argv)
    except (absl.flags.Error, TypeError, ValueError) as error:
        raise UserError(_type_error(config, error) or _one_line(error)) from error
    return flags.config.lock()


_TYPES = {
    int: 'a whole number',
    float: 'a number',
    bool: 'True or False',
    tuple: "a tuple, such as '(224, 224)'",
}


def _type_error(config: ConfigDict, error: Exception) -> str | None:
    """What would be right, for absl's error about a value of another type."""
    found = re.match(r'flag --config\.([\w.]*?)(\w+)=(.*?): ', str(error))
    if found is None:
        return None
    section, key, value = found.groups()
    for name in section.split('.')[:-1]:
        config = config[name]
    wanted = _TYPES.get(config.get_type(key))
    return wanted and f'config.{section}{key} must be {wanted}, not {value!r}'


def _one_line(error: BaseException) -> str:
    # ml_collections wraps a KeyError, which shows its message as a literal, and
    # prints all the keys there are.
    cause = error.args[0] if error.args else error
    message = str(cause.args[0] if isinstance(cause, KeyError) else error)
    message = re.sub(r'Other fields present: "{.*}"', '', message, flags=re.DOTALL)
    return f'{type(error).__name__}: {" ".join(message.split())}'


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
