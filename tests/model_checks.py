"""Checks that every model passes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np


def leaves(params, name):
    """The leaves of that name."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in paths if path[-1].key == name]


def half_zeros(rng, shape, dtype=None):
    """An initializer that its dtype betrays."""
    del rng, dtype
    return jnp.zeros(shape, jnp.float16)


def as_inputs(shape):
    """What a model is called on: an image of that shape, unless told as specs."""
    if isinstance(shape[0], jax.ShapeDtypeStruct):
        return shape
    return (jax.ShapeDtypeStruct(shape, jnp.float32),)


def fingerprint(model, shape):
    """What the model does, without doing it: initialisation and training pass."""

    def run(seed, *inputs):
        rngs = {'params': jax.random.key(seed), 'dropout': jax.random.key(seed)}
        return model.init_with_output(rngs, *inputs, train=True)

    closed = jax.make_jaxpr(run)(0, *as_inputs(shape))
    text = re.sub(r'0x[0-9a-f]+', '', str(closed))  # addresses of functions
    return text, [np.asarray(const).tobytes() for const in closed.consts]


def check_every_field_matters(make_model, shape, others):
    """Each field changes what is computed when set to its value in `others`."""
    base = make_model()
    names = {field.name for field in dataclasses.fields(base)}
    assert names - {'parent', 'name'} == set(others), 'a field is not tried'
    expected = fingerprint(base, shape)
    assert fingerprint(make_model(), shape) == expected
    for name, value in others.items():
        assert getattr(base, name) != value
        assert fingerprint(make_model(**{name: value}), shape) != expected, name


def check_dtype_reaches_every_module(model, shape, float32_modules):
    """Outputs of modules are bfloat16, but those named; parameters are float32.

    The dropout of attention weights is left out: they are float32 by design.
    """
    inputs = as_inputs(shape)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    for leaf in jax.tree.leaves(variables):
        assert leaf.dtype == jnp.float32

    def apply(variables, *inputs):
        return model.apply(
            variables, *inputs, capture_intermediates=True, mutable=['intermediates']
        )[1]

    captured = jax.eval_shape(apply, variables, *inputs)['intermediates']
    outputs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(captured):
        *modules, method = [entry.key for entry in path[:-1]]
        name = '/'.join(modules)
        if method == '__call__' and not name.endswith('attention/dropout'):
            outputs[name] = leaf.dtype
    assert len(outputs) > 3
    wrong = {name for name, dtype in outputs.items() if dtype != jnp.bfloat16}
    assert wrong == set(float32_modules), wrong ^ set(float32_modules)
