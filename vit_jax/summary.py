"""What a model costs: parameters, multiply-adds and activation memory, per block; and
what a step of its training does.

Nothing is computed: the forward pass and its linearisation are traced to a jaxpr,
whose equations carry the name of the module that made them.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from vit_jax.models import check_takes_images, generates
from vit_jax.typing import Inputs, Shape

if TYPE_CHECKING:  # a model alone needs no data
    from vit_jax.build import Run

OTHER = '(other)'
SCOPE = 'multiply_adds'


class Cost(NamedTuple):
    """Cost of one block.

    Attributes:
      params: number of parameters.
      macs: multiply-adds of matrix products and convolutions, for one image.
      activation_bytes: what differentiation keeps of the forward pass of one image
        for the backward pass, parameters aside. The compiler may keep less, by
        computing some of it again.
    """

    params: int
    macs: int
    activation_bytes: int


def count_params(params: Any) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def summarize(model: nn.Module, inputs: Shape | Inputs) -> dict[str, Cost]:
    """The cost of each top-level block, in the order of the forward pass.

    Args:
      model: an unbound module.
      inputs: what it takes: images of a shape (height, width, channels), or shapes and
        dtypes of something else. A model that makes images makes one beside.

    Returns:
      Name of the block -> Cost; '(other)' for what no block did, where there is such.

    Raises:
      UserError: for images, and a model of sequences.
    """
    arrays = [jnp.zeros(x.shape, x.dtype) for x in _inputs(model, inputs)]
    model = same_everywhere(model)
    rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
    variables = jax.eval_shape(lambda: model.init(rngs, *arrays, train=False))
    params = variables['params']
    others = {
        name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        for name, tree in variables.items()
        if name != 'params'
    }

    latent = jnp.zeros((1, model.latent_dim)) if generates(model) else None

    def forward(params, *arrays):
        apply = partial(model.apply, {'params': params, **others}, train=False)
        outputs = apply(*arrays)
        if latent is not None:  # by a net that the call leaves out
            outputs = outputs, apply(latent, method='generate')
        return outputs

    def residuals(params, *arrays):
        """What the backward pass is given: the leaves of the vjp function."""
        return jax.vjp(forward, params, *arrays)[1]

    macs = dict.fromkeys([*params, OTHER], 0)
    order: dict[str, None] = {}  # blocks as the forward pass meets them
    for block, eqn, times in _equations(jax.make_jaxpr(forward)(params, *arrays).jaxpr):
        name = block if block in macs else OTHER
        order[name] = None
        macs[name] += times * _macs(eqn)

    saved = dict.fromkeys(macs, 0)
    jaxpr = jax.make_jaxpr(residuals)(params, *arrays).jaxpr
    made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    for var in {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}:
        if var in made_by:  # the others are parameters and inputs
            block = _block(str(made_by[var].source_info.name_stack))
            name = block if block in saved else OTHER
            saved[name] += _aval(var).size * _aval(var).dtype.itemsize

    return {
        name: Cost(count_params(params.get(name, {})), macs[name], saved[name])
        for name in order | dict.fromkeys(macs)
        if name != OTHER or macs[name] or saved[name]
    }


def count(model: nn.Module, inputs: Shape | Inputs) -> tuple[int, int]:
    """Parameters and multiply-adds of the whole model: `total` without the memory.

    Args:
      model, inputs: see `summarize`, also for what is raised.

    >>> from vit_jax.models import build_model
    >>> count(build_model('DeiT-Ti/16', 1000), (224, 224, 3))
    (5717416, 1253683200)
    """
    if generates(model):
        cost = total(summarize(model, inputs))
        return cost.params, cost.macs
    # One trace tells both, since initializers have no products.
    init = partial(same_everywhere(model).init_with_output, train=False)
    trace = jax.make_jaxpr(init, return_shape=True)
    jaxpr, (_, variables) = trace(jax.random.key(0), *_inputs(model, inputs))
    return count_params(variables['params']), count_macs(jaxpr.jaxpr)


def step_flops(run: 'Run') -> int:
    """Operations of a training step, of all devices, a multiply-add being two.

    They are the products and convolutions of the step's own trace: each pass of each
    net, and none through what is frozen. Where batches differ in shape it is that of
    the largest. What is computed again for memory's sake is no use, and not counted
    (PaLM, arXiv 2204.02311, appendix B).

    Args:
      run: from `build`.
    """
    model = same_everywhere(run.model)
    if hasattr(model, 'remat'):
        model = model.clone(remat='none')
    step = partial(run.train_step, model=model)  # type: ignore[call-arg]
    return 2 * count_macs(jax.make_jaxpr(step)(run.state_shape, run.batch_shape).jaxpr)


def count_macs(jaxpr: core.Jaxpr) -> int:
    """Multiply-adds of matrix products and convolutions of a traced function."""
    return sum(times * _macs(eqn) for _, eqn, times in _equations(jaxpr))


def total(costs: Mapping[str, Cost]) -> Cost:
    """The sum of the blocks."""
    return Cost(*map(sum, zip(*costs.values())))


def _inputs(model: nn.Module, inputs: Shape | Inputs) -> Inputs:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in inputs):
        return inputs  # type: ignore[return-value]
    check_takes_images(model)
    return (jax.ShapeDtypeStruct((1, *inputs), jnp.float32),)  # type: ignore[misc]


def same_everywhere(model: nn.Module) -> nn.Module:
    """The model, with the same cost on every machine: 'auto' differs between them."""
    if hasattr(model, 'attention_impl'):
        return model.clone(attention_impl='dense')
    return model


def _equations(
    jaxpr: core.Jaxpr, outer: str = '', times: int = 1
) -> Iterator[tuple[str, core.JaxprEqn, int]]:
    """Every equation with its block, and how often it runs (loops unrolled)."""
    for eqn in jaxpr.eqns:
        stack = '/'.join(filter(None, [outer, str(eqn.source_info.name_stack)]))
        inner = times * eqn.params.get('length', 1) if 'jaxpr' in eqn.params else times
        for sub in core.jaxprs_in_params(eqn.params):
            yield from _equations(sub, stack, inner)
        yield _block(stack), eqn, times


def _block(name_stack: str) -> str:
    """The top-level module of 'Model/block00/mlp' or 'jvp(Model)/block00/mlp'.

    A method beside `__call__` adds a scope, 'ResNet/ResNet._stem/stem', or is the first
    one, 'SAGAN.generate/generator'.
    """
    _, *parts = name_stack.split('/')
    return next((part for part in parts if '.' not in part), '')


def _macs(eqn: core.JaxprEqn) -> int:
    """Multiply-adds of a matrix product or a convolution, else 0.

    Layers that write such a product as a sum of elementwise ones (local attention) do
    so in the scope 'multiply_adds'.
    """
    if eqn.primitive.name == 'dot_general':
        (contracted, _), _ = eqn.params['dimension_numbers']
        shape = _aval(eqn.invars[0]).shape
        size = _aval(eqn.outvars[0]).size
        return size * math.prod(shape[i] for i in contracted)
    if eqn.primitive.name == 'conv_general_dilated':
        kernel = _aval(eqn.invars[1])
        out_channels = kernel.shape[eqn.params['dimension_numbers'].rhs_spec[0]]
        # Of a transposed convolution, as the gradient of a strided one is, only what is
        # not a zero between the pixels.
        holes = math.prod(eqn.params['lhs_dilation'])
        return _aval(eqn.outvars[0]).size * kernel.size // out_channels // holes
    if eqn.primitive.name == 'mul' and SCOPE in str(eqn.source_info.name_stack):
        return _aval(eqn.outvars[0]).size
    return 0


def _aval(var: Any) -> jax.core.ShapedArray:
    return var.aval
