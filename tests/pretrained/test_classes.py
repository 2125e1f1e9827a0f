"""Whether weights know the classes of the data."""

import pytest

from vit_jax.errors import UserError
from vit_jax.pretrained.classes import check_classes


def test_imagenet_in_words_is_taken_for_imagenet_in_ids(capsys):
    ids = ['n01440764', 'n01443537 goldfish']
    check_classes('w', {'class_names': ['n01440764 tench', 'n01443537']}, ids)
    assert capsys.readouterr().err == ''
    check_classes('w', {'class_names': ['tench, Tinca tinca', 'goldfish']}, ids)
    assert 'in this order' in capsys.readouterr().err
    check_classes('w', {'class_names': ['0', '1']}, ['cat', 'dog'])
    assert 'in this order' in capsys.readouterr().err
    with pytest.raises(UserError, match='the data has 2'):  # a run on digits
        check_classes('w', {'class_names': ['0', '1'], 'config': {}}, ['cat', 'dog'])
    for names in (['tench'], ['n01440764', 'n01484850'], ['tench', 'n01443537']):
        with pytest.raises(UserError, match='the data has 2'):
            check_classes('w', {'class_names': names}, ids)
