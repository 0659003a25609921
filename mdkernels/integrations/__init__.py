"""Bridges to other code: each module here needs a package that mdkernels itself does not."""
