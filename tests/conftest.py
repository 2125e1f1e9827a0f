"""Eight virtual CPU devices for every test; programs are compiled once."""

import atexit
import os
import shutil
import tempfile

# Before JAX starts: tests never take an accelerator, and see eight devices.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
# Many tests compile the same program; here all processes of a run share them.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = tempfile.mkdtemp(prefix='vit_jax_tests_')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
