"""A pipeline's unet, VAE and text encoders in other runtimes than torch, as modules that diffusers takes for its own.

`session.py` says what a runtime must offer, `*_session.py` are the runtimes, `exporters/registry.py` has a row of each,
and `opening.py` opens any of them by name; `unet.py`, `vae.py` and `text_encoder.py` are the modules, and `pipeline.py`
puts a whole pipeline together.
"""
