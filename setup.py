"""vit_jax: from convolution to attention in JAX and Flax."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r"__version__ = '(.+)'", (HERE / 'vit_jax' / '__init__.py').read_text()
)[1]

setup(
    name='vit_jax',
    version=VERSION,
    description='From convolution to attention, in JAX and Flax: ViT, ConViT, GPSA',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['vit_jax', 'vit_jax.*']),
    package_data={
        'vit_jax.pretrained': ['imagenet_classes.txt'],
        'vit_jax.report': ['page.css'],
    },
    entry_points={'console_scripts': ['vit_jax = vit_jax.main:main']},
    # Lower bounds are the oldest versions whose interfaces we use, upper bounds the
    # next release that may break them. `constraints.txt` pins a set that passed.
    install_requires=[
        'absl-py>=2.1,<3',
        'array-record>=0.7,<0.9',
        'chex>=0.1.90,<0.2',
        'filelock>=3.13,<5',
        'flatbuffers>=24,<26',  # jax.export's format
        'flax>=0.12,<0.13',
        'google-crc32c>=1.5,<2',  # checksums of tfrecord files
        'grain>=0.2.12,<0.3',
        'huggingface-hub>=1.0,<3',
        'jax>=0.10,<0.12',
        'importlib-resources>=6,<8',  # TFDS imports it without asking for it
        'markdown-it-py>=3,<5',
        'matplotlib>=3.9,<4',
        'ml-dtypes>=0.4,<1',
        'ml-collections>=1.0,<2',
        'numpy>=2.0,<3',
        'optax>=0.2.5,<0.3',
        'orbax-checkpoint>=0.11.25,<0.13',
        'pillow>=11,<14',
        'requests>=2.32,<3',
        'safetensors>=0.5,<1',
        'scikit-learn>=1.5,<2',
        'tensorboardX>=2.6.2,<3',
        'tensorflow-datasets>=4.9.9,<5',
        'tqdm>=4.66,<5',
    ],
    extras_require={
        'test': [
            'hypothesis>=6.100,<7',
            'mypy>=1.11,<3',
            'pytest>=8,<10',
            'pytest-xdist>=3.6,<4',
            'ruff>=0.6,<1',
            'sacrebleu>=2.4,<3',
            'sentencepiece>=0.2,<0.3',
            'submitit>=1.5,<2',
        ],
        # TensorFlow, for TFDS to prepare the datasets it downloads itself.
        'prepare': ['tensorflow>=2.18,<3'],
        'torch': ['torch>=2.10,<3'],
        'slurm': ['submitit>=1.5,<2'],
        'text': ['sentencepiece>=0.2,<0.3', 'sacrebleu>=2.4,<3'],
        'tpu': ['jax[tpu]>=0.10,<0.12'],
        'gpu': ['jax[cuda12]>=0.10,<0.12'],
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
