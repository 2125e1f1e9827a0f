"""How long functions take next to each other, and the memory they need meanwhile."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Measured(NamedTuple):
    """What one function took.

    Attributes:
      seconds: median over the rounds.
      temp_bytes: peak temporary memory of the compiled program, without arguments
        and results.
    """

    seconds: float
    temp_bytes: int


def compare(
    functions: Mapping[str, Callable], args: tuple[Any, ...], rounds: int = 20
) -> dict[str, Measured]:
    """Compiles functions of the same arguments and times them in turns.

    Turns, because a noisy machine slows neighbours in time alike: every round runs
    each function once, in another order.

    Args:
      functions: name -> function of arrays.
      args: its arguments, the same for all.
      rounds: how often each runs.
    """
    compiled = {
        name: jax.jit(function).lower(*args).compile()
        for name, function in functions.items()
    }
    for program in compiled.values():
        jax.block_until_ready(program(*args))
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(compiled)):
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Measured(
            float(np.median(seconds[name])),
            program.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
        )
        for name, program in compiled.items()
    }
