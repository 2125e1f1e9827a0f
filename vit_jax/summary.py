def count_params(x):
    return 0
