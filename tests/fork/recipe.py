"""A recipe of the fork: its own dataset; what else it adds by variant."""

from ml_collections import ConfigDict

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    variant = choose_variant(variant, 'model', 'layer', 'block', 'task')
    config = default_config()
    config.dataset.name = 'my_fork.data:stripes'
    if variant == 'model':
        config.model.name = 'my_fork.models:Pixels'
    elif variant == 'block':
        config.model.name = 'ResNet-18'
        config.model.kwargs = {
            'stage_sizes': (1, 1),
            'width': 8,
            'bottleneck': False,
            'stem': 'small',
            'attention': 'my_fork.layers:RowAttention',
            'attention_stages': (2,),
        }
    else:
        config.model.name = 'ViT-Ti/2'
        config.model.kwargs = {'width': 8, 'depth': 1, 'mlp_dim': 16, 'num_heads': 2}
    if variant == 'layer':
        config.model.kwargs.attention = 'my_fork.layers:LinearAttention'
    if variant == 'task':
        config.task = 'my_fork.tasks'
        with config.unlocked():
            config.error = ConfigDict({'power': 2.0})
    config.batch_size = 8
    config.num_steps = 60
    config.optim.learning_rate = 1e-2
    config.log.tensorboard = False
    return config
