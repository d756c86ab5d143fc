"""Pipelines, schedulers and storage formats of diffusers, found by themselves: done right, or refused in one line.

Pipelines go through compression, storage, commands and states of torch that the caller left; schedulers through modes.
"""
