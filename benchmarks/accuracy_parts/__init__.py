"""What `accuracy.py` is made of: a model opened for experiments, published baselines, tables, and three measurements beside them."""
