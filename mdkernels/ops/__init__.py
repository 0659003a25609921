"""The operators, one folder each: contract and autograd in ``__init__``, derivation in README.md,
``reference.py`` as the specification, one module per further backend."""
