"""Encoders: modules that return features ``[b, n, d_e]``.

Any module will do. What an encoder may say of itself, and is asked for where it helps:

* ``feature_dim``: the width ``d_e`` of its features;
* ``num_tokens``: the number of features of one image;
* ``image_size``: the side of the square images that it takes, in pixels;
* ``example_input()``: keywords of the smallest input that it runs on.
"""
