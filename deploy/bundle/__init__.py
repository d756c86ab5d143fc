"""Bundles: what a machine needs to make images, and nothing else, with a manifest that is checked before all else.

`sources.py` finds the denoisers that an artifact has, `rest.py` the pipeline's other components, `contents.py` chooses
and writes; `description.py` is what the manifest says of it; `archive.py` packs it into one file and unpacks that
safely; `load.py` opens it in the best runtime that is here.

    manifest.json            files, sizes, SHA-256, provenance, requirements
    README.md, licenses/
    model_index.json, scheduler/, tokenizer/, text_encoder/, vae_decoder/ ...   as optimum has them
    unet/                    the first graph; further ones are in graphs/NAME/
    engines/NAME/            engines, each with its own manifest
    sizes/HEIGHTxWIDTH/      VAEs for further sizes of images
"""
