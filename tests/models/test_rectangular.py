"""Every family of models of images on maps of 4x9: a training pass, compiled."""

import conv_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import build_model, list_models
from vit_jax.models.variants import is_generative_model, is_sequence_model

B, V = 2, 7
TOKENS = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 4}
STAGES = {'stage_sizes': (1, 1), 'width': 16, 'num_groups': 2}
HYBRID = (8, {**TOKENS, 'patch_size': 8, 'stem_kwargs': STAGES})
ATTENDING = (4, {**STAGES, 'attention_stages': (2,)})

# Family -> (pixels along a side of a cell of 4x9, overrides).
FAMILIES = {
    'ViT': (2, {**TOKENS, 'patch_size': 2}),
    'DeiT': (2, {**TOKENS, 'patch_size': 2}),
    'DINOv2': (2, {**TOKENS, 'patch_size': 2}),
    'ConViT': (2, {**TOKENS, 'patch_size': 2, 'depth': 2, 'num_local_layers': 1}),
    'R+ViT': (
        4,
        {**TOKENS, 'patch_size': 4, 'stem_kwargs': {**STAGES, 'stage_sizes': ()}},
    ),
    'R26+ViT': HYBRID,
    'R50+ViT': HYBRID,
    'ResNet': (4, STAGES),
    'BiT': (4, STAGES),
    'SASA': (4, {**STAGES, 'attention_stages': (1, 2)}),
    'AA': ATTENDING,
    'BoTNet': ATTENDING,
    'CNN': (1, {'attention_after': (0,), 'widths': (8, 16), 'strides': (1, 2)}),
    'MLP': (1, {'widths': (16,)}),
}


def family_of(name):
    return name.partition('-')[0]


def test_every_family_is_tried():
    others = is_generative_model, is_sequence_model
    names = [name for name in list_models() if not any(x(name) for x in others)]
    assert {family_of(name) for name in names} == set(FAMILIES)


@pytest.mark.parametrize('family', FAMILIES)
def test_training_pass_is_finite(family):
    name = next(name for name in list_models() if family_of(name) == family)
    side, overrides = FAMILIES[family]
    model = build_model(name, V, **overrides)
    image = np.random.default_rng(0).normal(size=(B, 4 * side, 9 * side, 3))
    image = jnp.asarray(image, jnp.float32)
    variables = conv_reference.random_variables(model, image.shape)
    params = variables.pop('params')

    @jax.jit
    def run(params):
        def loss(params):
            logits, _ = model.apply(
                {'params': params, **variables},
                image,
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': jax.random.key(2)},
            )
            return jnp.sum((logits - 1.0) ** 2), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, logits), gradient = run(params)
    assert logits.shape == (B, V)
    assert logits.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
        if path[-1].key != 'position_bias':  # the softmax ignores it
            assert np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)
