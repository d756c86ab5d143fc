"""A pipeline's unet, VAE and text encoders in other runtimes than torch, as modules that diffusers takes for its own.

`session.py` says what a runtime must offer, `*_session.py` are the runtimes, `opening.py` opens any of them by name;
`unet.py`, `vae.py` and `text_encoder.py` are the modules, and `pipeline.py` puts a whole pipeline together. Here are
the runtimes' names alone, so that a command line can offer them without loading anything.
"""
