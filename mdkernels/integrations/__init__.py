"""Bridges to other people's trainers, and to the files of the authors' code.

A module here may need a package that mdkernels itself does not; its first lines say which.
"""
