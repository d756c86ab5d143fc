"""TensorRT and TensorRT-RTX engines: building, reusing, checking; the building itself is in a process of its own.

`build.py` makes one or takes the one that is there, `pipeline.py` finds those of a whole pipeline, `check.py` says
before an engine is opened whether it can run here. Nothing in this package imports TensorRT.
"""
