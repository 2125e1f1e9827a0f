"""Joining other processes: who tells of them, and what can be wrong."""

import http.server
import os
import socket
import subprocess
import sys
import textwrap
import threading

import jax
import pytest

from vit_jax import cluster
from vit_jax.errors import UserError

SLURM = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'node[3-4]',
    'SLURM_NTASKS': '6',
    'SLURM_PROCID': '5',
    'SLURM_LOCALID': '2',
}
OPEN_MPI = {
    'OMPI_COMM_WORLD_SIZE': '3',
    'OMPI_COMM_WORLD_RANK': '2',
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1:34911',
}
TPU = {'TPU_ML_PLATFORM': 'JAX'}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in (*cluster.VARIABLES, *SLURM, *OPEN_MPI):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ('environ', 'kind'),
    [
        ({}, None),
        (SLURM, 'Slurm'),
        ({**SLURM, 'SLURM_NTASKS': '1'}, None),
        # In a batch script, before srun: no task.
        ({k: v for k, v in SLURM.items() if k != 'SLURM_STEP_NODELIST'}, None),
        (OPEN_MPI, 'Open MPI'),
        ({**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '1'}, None),
        (TPU, 'TPU'),  # JAX asks the metadata server
        ({**TPU, 'TPU_SKIP_MDS_QUERY': '1'}, None),
        ({**TPU, 'TPU_WORKER_HOSTNAMES': 'a,b'}, 'TPU'),
        ({**TPU, 'TPU_WORKER_HOSTNAMES': 'a'}, None),
        ({**TPU, 'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, 'TPU'),
        ({**TPU, 'TPU_WORKER_HOSTNAMES': 'a', 'TPU_PROCESS_ADDRESSES': 'a,b'}, 'TPU'),
        ({**TPU, 'JAX_PLATFORMS': 'cpu'}, None),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, None),  # no TPU that JAX sees
    ],
)
def test_who_tells_of_the_others(environ, kind):
    assert cluster.detect(environ) == kind


def test_open_mpi_5_says_too_little():
    environ = {k: v for k, v in OPEN_MPI.items() if 'orte' not in k}
    with pytest.raises(UserError, match=r'give --coordinator=HOST:PORT .*_RANK'):
        cluster.detect(environ)


def test_jax_takes_them_for_the_same():
    """The variables are those that this version of JAX asks for."""
    from jax._src.clusters import OmpiCluster, SlurmCluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SLURM, **OPEN_MPI}.items():
            assert not (SlurmCluster.is_env_present() and OmpiCluster.is_env_present())
            patch.setenv(name, value)
        assert SlurmCluster.is_env_present()
        assert OmpiCluster.is_env_present()
        assert SlurmCluster.get_process_count() == 6
        assert OmpiCluster.get_process_count() == 3


# JAX takes this host for one of a pod: it asks the variables and the metadata.
ON_A_TPU = textwrap.dedent("""
    import os
    import jax
    from vit_jax import cluster
    from vit_jax.errors import UserError

    os.environ.pop('TPU_SKIP_MDS_QUERY', None)  # set where there is no chip
    try:
        cluster.join(timeout_seconds=1)
        print('not joined')
    except UserError as error:
        print(error)
""")
NO_METADATA = {'GCE_METADATA_IP': '127.0.0.1:1'}
CANNOT = 'cannot join the processes that TPU tells of'


def on_a_tpu(**variables):
    """(stdout, stderr) of a process that joins the others of a TPU."""
    environ = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
    environ |= {'JAX_FORCE_TPU_INIT': '1', 'JAX_PLATFORMS': 'tpu', **variables}
    done = subprocess.run(
        [sys.executable, '-c', ON_A_TPU], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_tpu_of_which_nobody_tells_has_one_host():
    out, err = on_a_tpu(**NO_METADATA)
    assert out == 'not joined\n'
    assert err.startswith('a TPU of one host (')


@pytest.mark.parametrize(
    'told', [{'TPU_WORKER_HOSTNAMES': 'localhost,b'}, {'MEGASCALE_NUM_SLICES': '2'}]
)
def test_a_pod_never_trains_unjoined(told):
    out, _ = on_a_tpu(**NO_METADATA, TPU_WORKER_ID='1', **told)
    assert out.startswith(CANNOT), out
    assert out.endswith('; give --coordinator, --num_processes, --process_id\n')


class Metadata(http.server.BaseHTTPRequestHandler):
    """Says that there are other hosts, but not where."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'a:b,c:d' if self.path.endswith('endpoints') else b'1')

    def log_message(self, *args):
        pass


def test_metadata_that_jax_cannot_read_is_no_single_host():
    with http.server.HTTPServer(('127.0.0.1', 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        out, _ = on_a_tpu(GCE_METADATA_IP=f'127.0.0.1:{server.server_port}')
        server.shutdown()
    assert out.startswith(f'{CANNOT} (unsupported worker-network-endpoints')


@pytest.mark.parametrize(
    ('seen', 'tasks', 'devices'),
    [
        ('0,1,2,3', '4', None),  # one each
        ('0,1,2,3', '1', [0, 1, 2, 3]),
        ('0,1,2', '1(x2)', [0, 1, 2]),
        ('2', '4(x2)', [0]),  # bound to the task by Slurm
        ('', '4', None),
        ('-1', '4', None),
        ('3,5,-1,7', '1', [0, 1]),  # CUDA reads no further
        ('0,1,2,3', '11', None),
    ],
)
def test_gpus_of_a_slurm_task(seen, tasks, devices):
    environ = {'CUDA_VISIBLE_DEVICES': seen, 'SLURM_STEP_TASKS_PER_NODE': tasks}
    assert cluster.slurm_devices(environ) == devices
    assert cluster.slurm_devices({**environ, 'JAX_LOCAL_DEVICE_IDS': '0'}) is None


@pytest.mark.parametrize(
    ('told', 'message'),
    [
        (('a:1', None, None), '--coordinator given, but not --num_processes and --pro'),
        (
            (None, 2, 0),
            '--num_processes and --process_id given, but not --coor',
        ),
        (('a:1', None, 1), r'but not --num_processes \(or JAX_NUM_PROCESSES\)'),
        (('host', 2, 0), "--coordinator is HOST:PORT, not 'host'"),
        (('host:70000', 2, 0), "HOST:PORT, not 'host:70000'"),
        (('a:1', 0, 0), 'at least 1, not 0'),
        (('a:1', 3, 3), 'from 0 to 2 with 3 processes, not 3'),
        (('a:1', 3, -1), 'from 0 to 2 with 3 processes, not -1'),
    ],
)
def test_what_is_told_must_fit(told, message):
    with pytest.raises(UserError, match=message):
        cluster.join(*told)
    assert not jax.distributed.is_initialized()


def test_the_environment_tells_it_too(monkeypatch):
    for name, value in cluster.environment('a:1', 3, 7).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='from 0 to 2 with 3 processes, not 7'):
        cluster.join()
    with pytest.raises(UserError, match='from 0 to 4 with 5 processes, not 7'):
        cluster.join(num_processes=5)
    monkeypatch.setenv('JAX_PROCESS_ID', 'x')
    with pytest.raises(UserError, match='are numbers, not 3 and x'):
        cluster.join()


def test_one_process_joins_nobody(monkeypatch):
    cluster.join()
    cluster.join('a:1', 1, 0)
    # An address alone is JAX's own variable, for a cluster that tells the rest.
    monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'a:1')
    cluster.join()
    assert not jax.distributed.is_initialized()
    cluster.leave(3)  # as if nothing had been asked


def test_a_port_in_use_is_told():
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf'cannot listen at port {port} \(Addr'):
            cluster.join(f'localhost:{port}', 2, 0)


def test_nobody_at_the_address_is_told():
    address = f'localhost:{cluster.free_port()}'
    with pytest.raises(UserError, match=rf'process 1 cannot reach .* at {address} aft'):
        cluster.join(address, 2, 1, timeout_seconds=0)


TALK = textwrap.dedent("""
    import os, sys
    import jax
    from vit_jax import cluster

    cluster.join(timeout_seconds=60)
    os.write(1, b'what C++ prints\\n')
    if jax.process_index() == 1:
        fail = sys.argv[1]
        if fail == 'leave':
            cluster.leave(5)
        raise RuntimeError('an error that nobody catches')
    print('a result', jax.process_count())
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)
""")


@pytest.mark.parametrize(('how', 'code'), [('leave', 5), ('raise', 1)])
def test_a_process_that_fails_does_not_wait_for_the_others(how, code):

    address = f'localhost:{cluster.free_port()}'
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', TALK, how],
            env={**os.environ, **cluster.environment(address, 2, i)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    # Process 0 does not end before it is told to, and so would not process 1.
    _, err = processes[1].communicate(timeout=60)
    assert processes[1].returncode == code
    assert ('an error that nobody catches' in err) == (how == 'raise')
    out, err = processes[0].communicate('')
    assert out == 'a result 2\n'  # and not what C++ prints
    assert f'2 processes, at {address}\nwhat C++ prints\n' in err
