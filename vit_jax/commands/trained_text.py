"""A trained model of sentences: what `translate` and `attend --source` share."""

from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn

from vit_jax.errors import UserError
from vit_jax.typing import Variables

if TYPE_CHECKING:  # --help is quick
    from vit_jax.data.buckets import Bucket
    from vit_jax.data.tokenizer import Tokenizer
    from vit_jax.parallel import Parallel
    from vit_jax.translation import Translator


class TrainedText(NamedTuple):
    """A model of sentences with its weights and its tokens.

    Attributes:
      model, variables: for `model.apply`.
      tokenizer: of both languages.
      parallel: where the variables are.
      text: what the weights say of sentences: 'buckets', 'tokens_per_batch',
        'extra_length'.
      settings: section 'text' of the run's config; empty where it is not known.
    """

    model: nn.Module
    variables: Variables
    tokenizer: 'Tokenizer'
    parallel: 'Parallel'
    text: dict[str, Any]
    settings: dict[str, Any]

    @property
    def longest(self) -> int:
        """Tokens of the longest sentence it was trained on, with its EOS."""
        return self.text['buckets'][-1]

    @property
    def buckets(self) -> tuple['Bucket', ...]:
        """Those of its training."""
        from vit_jax.data.buckets import make_buckets

        rows = self.parallel.data * self.parallel.fsdp
        return make_buckets(self.text['buckets'], self.text['tokens_per_batch'], rows)

    def make_translator(self, beam: int, length_penalty: float) -> 'Translator':
        """What translates with this model."""
        from vit_jax.translation import Decoding, Translator

        how = Decoding(beam, length_penalty, self.text['extra_length'])
        return Translator(self.model, how, self.parallel)


def load(weights: str) -> TrainedText:
    """The model that --weights names.

    Raises:
      UserError: for weights that are not there, damaged, or not of a model of
        sentences, and where no tokenizer lies beside them.
    """
    import jax
    import jax.numpy as jnp

    from vit_jax.data.vocabulary import folder_of, load_tokenizer
    from vit_jax.modules import make_stored_model
    from vit_jax.parallel import make_parallel
    from vit_jax.pretrained import load_variables
    from vit_jax.pretrained.source import open_source

    source = open_source(weights)
    metadata = source.metadata or {}
    if 'text' not in metadata or 'model' not in metadata:
        raise UserError(
            f'{weights} does not say that it is of a model of sentences; take the '
            'workdir of a run of one, such as configs/multi30k_transformer.py'
        )
    text = metadata['text']
    tokenizer = load_tokenizer(folder_of(weights))
    parallel = make_parallel('jit')
    model = make_stored_model(metadata['model'], weights)
    example = jax.ShapeDtypeStruct((1, text['buckets'][-1]), jnp.int32)
    variables, _ = load_variables(
        source, model, (example, example), sharding=parallel.leaf_sharding
    )
    settings = metadata.get('config', {}).get('text', {})
    return TrainedText(model, variables, tokenizer, parallel, text, settings)
