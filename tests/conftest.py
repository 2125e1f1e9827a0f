"""Eight virtual CPU devices for every test; programs are compiled fast, and once."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

# Before JAX starts: tests never take an accelerator, and see eight devices.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Their programs run for milliseconds, so what XLA would spend on making them faster is
# most of a test's time. XLA_FLAGS of the environment stand behind ours, and win.
flags = ['--xla_backend_optimization_level=0']
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # others may not know it
    flags.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join(
    [
        *flags,
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
    ]
)
# Many tests compile the same program; here all processes of a run share them.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = tempfile.mkdtemp(prefix='vit_jax_tests_')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
