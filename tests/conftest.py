"""Eight virtual CPU devices for every test."""

import os

# Before JAX starts: tests never take an accelerator, and see eight devices.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
