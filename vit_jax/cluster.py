"""One process of several: joining the others before JAX starts.

`jax.distributed` shows every process the devices of all. Where the processes are is
told by options, by the environment (`vit_jax launch` sets it), or by the cluster's
scheduler, which JAX asks itself: https://docs.jax.dev/en/latest/multi_process.html
"""

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
import types
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError, reason

# What `--coordinator`, `--num_processes` and `--process_id` are in the environment.
# JAX itself reads the first.
VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_OPTIONS = ('--coordinator', '--num_processes', '--process_id')
# What JAX looks for, to take a process for a task of Slurm.
_SLURM = (
    'SLURM_JOB_ID',
    'SLURM_STEP_NODELIST',
    'SLURM_NTASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
)
_NOTICE_SECONDS = 10


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_seconds: int = 100,
    timeout_seconds: int = 300,
) -> None:
    """Joins the other processes, where there are any; before JAX looks for devices.

    Process 0 says on stderr how many there are. Does nothing the second time.

    Args:
      coordinator: 'HOST:PORT' at which process 0 can be reached by all; like the next
        two from the environment where it is None, see `VARIABLES`.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      heartbeat_timeout_seconds: how long a process may be silent before the others
        take it for dead, and end.
      timeout_seconds: how long to wait for the others.

    Raises:
      UserError: when only some of the first three are known, or they are no address
        and numbers, or process 0 cannot be reached.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    timeouts: dict[str, Any] = {
        'heartbeat_timeout_seconds': heartbeat_timeout_seconds,
        'initialization_timeout': timeout_seconds,
    }
    given = _given((coordinator, num_processes, process_id))
    if given:
        address, count, index = given
        if count == 1:
            return
        _keep_stdout()
        _meet(address, index, timeout_seconds)
        with _Notice(f'process {index} waits for all {count} to come to {address}'):
            # Not asked: Slurm, which would give each process one GPU of those it has.
            jax.distributed.initialize(
                address, count, index, cluster_detection_method='deactivate', **timeouts
            )
        how = f'at {address}'
    else:
        kind = detect(os.environ)
        if kind is None:
            return
        _keep_stdout()
        devices = slurm_devices(os.environ) if kind == 'Slurm' else None
        try:
            with _Notice(f'this process waits for the others, which {kind} tells of'):
                jax.distributed.initialize(local_device_ids=devices, **timeouts)
        except Exception as error:  # whatever JAX's questions to the cluster raise
            # Nobody speaks of hosts, and no metadata server answers (an error of
            # `requests` is an OSError; those of a failed join are not).
            unknown = kind == 'TPU' and _tpu_hosts(os.environ) is None
            if unknown and isinstance(error, OSError):
                print(f'a TPU of one host ({reason(error)})', file=sys.stderr)
                return
            raise UserError(
                f'cannot join the processes that {kind} tells of ({reason(error)}); '
                f'give {", ".join(_OPTIONS)}'
            ) from error
        count, index = jax.process_count(), jax.process_index()
        how = f'found by {kind}'
    _leave_when_failing()
    _connect_cpus()
    if index == 0 and count > 1:
        print(f'{count} processes, {how}', file=sys.stderr, flush=True)


def is_joined() -> bool:
    """Whether this process is one of several; JAX hears their signals then."""
    jax = sys.modules.get('jax')
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int) -> None:
    """Ends a process that failed, at once; returns where there is only one.

    An ordinary exit would wait for the others to end too, which wait for this one.
    """
    if not is_joined():
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody listens any more
            stream.flush()
    os._exit(code)


def environment(
    coordinator: str, num_processes: int, process_id: int
) -> dict[str, str]:
    """The environment in which `join` needs no arguments.

    >>> environment('host:1234', 2, 1)['JAX_PROCESS_ID']
    '1'
    """
    values = (coordinator, str(num_processes), str(process_id))
    return dict(zip(VARIABLES, values))


def detect(environ: Mapping[str, str]) -> str | None:
    """Who can tell JAX of the other processes: 'Slurm', 'Open MPI', 'TPU', or nobody.

    Args:
      environ: the environment, after JAX was imported: it notes TPUs there.

    Raises:
      UserError: for an Open MPI that does not say where its processes are.

    >>> detect({'HOME': '/root'})
    """
    if int(environ.get('OMPI_COMM_WORLD_SIZE', '1')) > 1:
        if 'OMPI_MCA_orte_hnp_uri' not in environ:  # Open MPI 5
            raise UserError(
                'this Open MPI does not say where process 0 is; give '
                '--coordinator=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE '
                '--process_id=$OMPI_COMM_WORLD_RANK'
            )
        return 'Open MPI'
    if all(name in environ for name in _SLURM) and int(environ['SLURM_NTASKS']) > 1:
        return 'Slurm'
    platforms = environ.get('JAX_PLATFORMS') or 'tpu'
    if environ.get('TPU_ML_PLATFORM') == 'JAX' and 'tpu' in platforms:
        hosts = _tpu_hosts(environ)
        # Where no variable says it, JAX asks the host's metadata server.
        ask = hosts is None and 'TPU_SKIP_MDS_QUERY' not in environ
        if ask or (hosts or 0) > 1:
            return 'TPU'
    return None


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that a Slurm task sees are its own; None: one, by its number.

    JAX takes the GPU of the task's number on its node. That is wrong where the task is
    the only one there, and where Slurm shows each task its own GPU alone.

    >>> slurm_devices({'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_STEP_TASKS_PER_NODE': '1'})
    [0, 1]
    """
    seen = visible_gpus(environ)
    if not seen or 'JAX_LOCAL_DEVICE_IDS' in environ:
        return None
    tasks = environ.get('SLURM_STEP_TASKS_PER_NODE', '')
    alone = re.fullmatch(r'1(\(x\d+\))?', tasks) is not None
    return list(range(len(seen))) if alone or len(seen) == 1 else None


def visible_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """Names of the GPUs that CUDA_VISIBLE_DEVICES lets a process see; None: all.

    CUDA reads up to the first that there cannot be.

    >>> visible_gpus({'CUDA_VISIBLE_DEVICES': '2,GPU-8932f937,-1,3'})
    ['2', 'GPU-8932f937']
    """
    visible = environ.get('CUDA_VISIBLE_DEVICES')
    if visible is None:
        return None
    names = (name.strip() for name in visible.split(','))
    return list(itertools.takewhile(lambda name: name and name[0] != '-', names))


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def _tpu_hosts(environ: Mapping[str, str]) -> int | None:
    """How many hosts the variables of a TPU tell of; None where they do not."""
    hosts = environ.get('TPU_WORKER_HOSTNAMES')
    hosts = environ.get('TPU_PROCESS_ADDRESSES', hosts)
    slices = int(environ.get('MEGASCALE_NUM_SLICES', '1'))
    if hosts is None and slices == 1:
        return None
    return slices * len((hosts or '').split(','))


def _given(
    options: tuple[str | None, int | None, int | None],
) -> tuple[str, int, int] | None:
    """Address, count and number of this process, where they are told."""
    told = [
        os.environ.get(name) if option is None else option
        for name, option in zip(VARIABLES, options)
    ]
    missing = [name for name, value in zip(_OPTIONS, told) if value is None]
    only_jax_reads_it = options[0] is None and missing == list(_OPTIONS[1:])
    if len(missing) == 3 or only_jax_reads_it:
        return None
    if missing:
        known = [name for name in _OPTIONS if name not in missing]
        raise UserError(
            f'{" and ".join(known)} given, but not {" and ".join(missing)} (or '
            f'{" and ".join(VARIABLES[_OPTIONS.index(name)] for name in missing)})'
        )
    address = str(told[0])
    if not re.fullmatch(r'\S+:\d{1,5}', address) or _port(address) > 65535:
        raise UserError(f'--coordinator is HOST:PORT, not {address!r}')
    try:
        count, index = (int(value) for value in told[1:])  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(
            f'{_OPTIONS[1]} and {_OPTIONS[2]} are numbers, not {told[1]} and {told[2]}'
        ) from error
    if count < 1:
        raise UserError(f'--num_processes is at least 1, not {count}')
    if not 0 <= index < count:
        raise UserError(
            f'--process_id is from 0 to {count - 1} with {count} processes, not {index}'
        )
    return address, count, index


def _port(address: str) -> int:
    return int(address.rpartition(':')[2])


def _meet(address: str, process_id: int, timeout_seconds: float) -> None:
    """Raises UserError where JAX would abort the process in C++, without a reason."""
    host, _, port = address.rpartition(':')
    if process_id == 0:
        try:
            socket.create_server(('', int(port))).close()
        except OSError as error:
            raise UserError(
                f'process 0 cannot listen at port {port} ({reason(error)}); choose '
                'another one for --coordinator'
            ) from error
        return
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host.strip('[]'), int(port)), 5).close()
            return
        except OSError as error:  # process 0 may be late, and so may its name
            if time.monotonic() > end:
                raise UserError(
                    f'process {process_id} cannot reach process 0 at {address} after '
                    f'{timeout_seconds} s ({reason(error)})'
                ) from error
        time.sleep(0.2)


class _Notice:
    """Says what is waited for, when that takes long: JAX's time-out does not."""

    def __init__(self, text: str):
        self._timer = threading.Timer(
            _NOTICE_SECONDS, print, (text,), {'file': sys.stderr, 'flush': True}
        )
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exc_info: object) -> None:
        self._timer.cancel()


def _keep_stdout() -> None:
    """Leaves standard output to results: what C++ prints there goes to stderr."""
    sys.stdout.flush()
    try:
        sys.stdout = os.fdopen(os.dup(1), 'w', buffering=1)
    except OSError:  # closed
        return
    os.dup2(2, 1)


def _connect_cpus() -> None:
    """Connects the devices of CPUs by a first sum over all of them.

    Gloo fails where a process comes 30 s later than another to the first one: after
    compiling a large step on a busy host. Now they come at the same time.
    """
    import jax
    import numpy as np

    if jax.default_backend() != 'cpu':
        return
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('all',))
    spread, same = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axis))
        for axis in (('all',), ())
    )
    ones = jax.make_array_from_callback(
        (jax.device_count(),), spread, lambda _: np.ones(1, np.float32)
    )
    total = jax.jit(lambda x: x.sum(), out_shardings=same)(ones)
    jax.block_until_ready(total)


def _leave_when_failing() -> None:
    """Lets an error that nobody catches end the process at once."""
    show = sys.excepthook

    def show_and_leave(
        kind: type[BaseException],
        error: BaseException,
        traceback: types.TracebackType | None,
    ) -> None:
        show(kind, error, traceback)
        leave(1)

    sys.excepthook = show_and_leave
