"""The scripts here need PyTorch; no test imports them."""

collect_ignore_glob = ['*.py']
